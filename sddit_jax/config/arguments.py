"""What may stand behind the colon of --config=FILE:ARGUMENTS, the same way for all files."""

import re
from collections.abc import Mapping

from sddit_jax.errors import ConfigError


def parse_arguments(text: str, defaults: Mapping[str, str], short: str = "", *, path: bool = False) -> dict[str, str]:
    """Values by name from 'name=value,name=value'; those that are not given are as in `defaults`.

    Text that does not begin with a known name and '=' is the value of the name `short`, if there is one: a method or a
    path may stand alone. path: that value is a path, in which '=' may stand. Raises ConfigError for a name that is not
    in `defaults`.
    """
    known = f"it takes {','.join(f'{name}=...' for name in defaults)}"
    if not text:
        return dict(defaults)
    if text.partition("=")[0] not in defaults or "=" not in text:
        if not short or ("=" in text and not path):
            raise ConfigError(f"config argument {text!r} does not begin with a known name: {known}")
        return {**defaults, short: text}
    values = dict(defaults)
    # A comma divides only where a name follows: a path may have commas.
    for pair in re.split(r",(?=\w+=)", text):
        name, _, value = pair.partition("=")
        if name not in defaults:
            raise ConfigError(f"config argument {pair!r} has an unknown name: {known}")
        values[name] = value
    return values
