"""The reference of the configuration: its keys as they are declared, for --help_config and for docs/config.md.

python -m sddit_jax.config.reference > docs/config.md
"""

import dataclasses
import difflib
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sddit_jax.config.border import flatten, free_on_resume
from sddit_jax.config.schema import Config
from sddit_jax.errors import UserError
from sddit_jax.settings import SOURCES

RESUME = """\
yes: it may.
warns: the run prints the old and the new value, and goes on. It stops if arrays of the checkpoint no longer fit.
no: the run stops before the first step."""
INTRODUCTION = """\
<!-- Generated: python -m sddit_jax.config.reference > docs/config.md -->

# Configuration keys

```bash parsed
python -m sddit_jax.main --help_config=learning
python -m sddit_jax.main --help_config= --config=configs/imagenet256.py
```

The first command prints the keys whose name or meaning contains "learning", in capitals or not. The second prints all
keys, with the values of a config file where they are not the defaults. This page has the same tables.

A key is one setting of a run, such as `optimizer.learning_rate`; `optimizer` is its section. A config file
(`configs/*.py`) gives every key a value, and the command line changes values:

```bash parsed
python -m sddit_jax.main --config=configs/digits.py --workdir=runs/digits \\
    --config.optimizer.learning_rate=1e-3 --config.data.flip=true \\
    --config.objectives.discrimination.teacher_temperature=0.3,0.5 --config.log.wandb=
```

Commas divide the numbers of a key that takes several. Nothing behind `=` is an empty text. A key that does not exist, a
value that is not allowed, and values that exclude each other end the command before the first step, with one message
and exit code 2. `config.json` in a run's workdir has the run's value of every key.

The columns of the tables:

- **Values**: the type, and what is allowed.
- **Default**: the value of the declaration. A config file may set another value.
- **From**: where the default is from.
{sources}
- **Resume**: whether the key may change when a run is continued.
{resume}
"""


class Key(NamedTuple):
    """A key as it is declared. resume: yes, warns or no. about: the docstring of its section."""

    name: str
    values: str
    default: str
    source: str
    meaning: str
    resume: str
    about: str


def declared(section: type = Config, prefix: str = "") -> Iterator[Key]:
    """The keys of a section, and then those of the sections in it. prefix: its dotted key and a dot."""
    hints, about = typing.get_type_hints(section), " ".join(inspect.cleandoc(section.__doc__).split())
    for field in dataclasses.fields(section):
        if not dataclasses.is_dataclass(hints[field.name]):
            name, values, meta = prefix + field.name, _values(hints[field.name], field.metadata), field.metadata
            resume = "yes" if free_on_resume(name) else "no" if name.startswith("model.") else "warns"
            yield Key(name, values, written(field.default), meta["source"], meta["meaning"], resume, about)
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from declared(hints[field.name], f"{prefix}{field.name}.")


def written(value: Any) -> str:
    """A value as it stands on the command line; "" for an empty text."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def help_text(pattern: str, config: Config | None = None) -> str:
    """The keys whose name or meaning contains `pattern`, with the values of `config` where they are not the defaults.

    Raises UserError if there is no such key.
    """
    keys = {key.name: key for key in declared()}
    found = [key for key in keys.values() if pattern.lower() in f"{key.name} {key.meaning}".lower()]
    if not found:
        ends = {name: name.rpartition(".")[2] for name in keys}
        close = difflib.get_close_matches(pattern.rpartition(".")[2].lower(), set(ends.values()), n=2)
        similar = ", ".join(name for name, end in ends.items() if end in close)
        hint = f"similar keys: {similar}" if similar else "--help_config= prints all keys"
        raise UserError(f"--help_config={pattern}: no key has this in its name or meaning; {hint}")
    chosen = {name: written(value) for name, value in flatten(config).items()} if config else {}
    lines = []
    for key in found:
        other = chosen.get(key.name, key.default)
        lines.append(f"{key.name}: {key.default} [{key.source}]" + f", in this config {other}" * (other != key.default))
        lines += textwrap.wrap(key.meaning, 100, initial_indent="    ", subsequent_indent="    ")
        lines += [f"    Values: {key.values}. Resume: {key.resume}.", ""]
    file = "" if config else " A config file may set other values; --config=FILE shows them too."
    lines += [f"Behind a key stand its default and where the default is from.{file}", textwrap.indent(SOURCES, "  ")]
    return "\n".join(
        [*lines, "Resume: whether the key may change when a run is continued.", textwrap.indent(RESUME, "  ")]
    )


def page() -> str:
    """docs/config.md."""
    lines = [INTRODUCTION.format(sources=textwrap.indent(SOURCES, "  - "), resume=textwrap.indent(RESUME, "  - "))]
    for section, keys in itertools.groupby(declared(), lambda key: key.name.rpartition(".")[0]):
        rows = list(keys)
        lines += [f"## {section or 'Top level'}\n", f"{textwrap.fill(rows[0].about, 120)}\n"]
        lines += ["| Key | Values | Default | From | Resume | Meaning |", "|---|---|---|---|---|---|"]
        lines += [f"| `{k.name}` | {k.values} | `{k.default}` | {k.source} | {k.resume} | {k.meaning} |" for k in rows]
        lines.append("")
    return "\n".join(lines)


def _values(hint: Any, allowed: Mapping[str, Any]) -> str:
    """The type of a key and the bounds of its values, or its choices."""
    if "choices" in allowed:
        return ", ".join(allowed["choices"])
    words = {"above": "above", "least": "at least", "most": "at most"}
    bounds = [f"{words[bound]} {allowed[bound]}" for bound in words if bound in allowed]
    if elements := typing.get_args(hint):
        count = "one or more" if elements[-1] is Ellipsis else len(elements)
        return ", ".join([f"{count} {elements[0].__name__}s", *bounds])
    return ", ".join([hint.__name__, *bounds])


if __name__ == "__main__":
    print(page(), end="")
