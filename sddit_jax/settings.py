"""How a key of the configuration is declared: its default, where that is from, what it means, and what it may be.

A section is a frozen dataclass whose fields are made by `setting`. It lies beside the code that reads it. It may have a
method `check()`, which raises ConfigError for values that cannot be used together.

Where a default is from:
  P  the SD-DiT paper's abstract or introduction
  S  a secondary source about SD-DiT
  I  inferred from MaskDiT, iBOT or EDM, on which SD-DiT builds
  C  our choice
"""

import dataclasses
from typing import Any


def setting(default: Any, source: str, meaning: str, **allowed: Any) -> Any:
    """A field of a section: default, source (P, S, I or C), meaning in one line, and what its values may be.

    allowed: least, most, above (numbers; for a tuple, of each element) and choices (strings).
    """
    return dataclasses.field(default=default, metadata={"source": source, "meaning": meaning, **allowed})
