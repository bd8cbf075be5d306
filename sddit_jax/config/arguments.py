"""The grammar of --config=FILE:ARGUMENTS, one for all config files."""

import re
from collections.abc import Mapping

from sddit_jax.config.border import keys_named
from sddit_jax.errors import ConfigError


def parse_arguments(text: str, defaults: Mapping[str, str], short: str = "", *, path: bool = False) -> dict[str, str]:
    """The values by name of 'name=value,name=value'. A name that the text lacks has its value of `defaults`.

    short: the name whose value may stand alone, such as a method or a path. path: whether that value may hold '='.
    Raises ConfigError for a name that is not in `defaults`.

        parse_arguments("maskdit", {"method": "sd_dit", "size": "S/2"}, short="method")
        # {"method": "maskdit", "size": "S/2"}
    """
    known = f"it takes {','.join(f'{name}=...' for name in defaults)}"
    if not text:
        return dict(defaults)
    if text.partition("=")[0] not in defaults or "=" not in text:
        if not short or ("=" in text and not path):
            raise ConfigError(f"config argument {text!r} does not begin with a known name: {known}{_as_flag(text)}")
        return {**defaults, short: text}
    values = dict(defaults)
    # Only a comma before a name divides: a path may have commas.
    for pair in re.split(r",(?=[\w.]+=)", text):
        name, _, value = pair.partition("=")
        if name not in defaults:
            raise ConfigError(f"config argument {pair!r} has an unknown name: {known}{_as_flag(pair)}")
        values[name] = value
    return values


def _as_flag(pair: str) -> str:
    """The flag for 'name=value', if `name` is a key of the config."""
    name, _, value = pair.rpartition(",")[2].partition("=")
    flags = [f"--config.{key}={value}" for key in keys_named(name.removeprefix("config."))]
    return f"; keys of the config are set by flags: did you mean {' or '.join(flags[:4])}?" if flags else ""
