"""The declaration of a config key: its default, where the default is from, its meaning, and its allowed values.

A section is a frozen dataclass whose fields are made by `setting`. It lies beside the code that reads it. It may have a
method `check(prefix)`, which raises ConfigError for values that cannot be used together; `prefix` is the dotted key of
the section and a dot, as in "objectives.discrimination.", for the message to name each key in full.
"""

import dataclasses
from typing import Any

# Where a default is from.
SOURCES = """\
P: the abstract or the introduction of the SD-DiT paper; few defaults are.
S: a secondary source about SD-DiT.
I: a reasoned guess: what MaskDiT, iBOT or EDM do, on which SD-DiT builds.
C: a choice of this project."""


def setting(default: Any, source: str, meaning: str, **allowed: Any) -> Any:
    """A field of a section: its default, the source of the default (P, S, I or C), its meaning and its allowed values.

    allowed: least, most and above (numbers, for each element of a tuple) and choices (strings), as in

        steps: int = setting(40, "I", "noise levels of the solver", least=1)
    """
    return dataclasses.field(default=default, metadata={"source": source, "meaning": meaning, **allowed})
