"""The published sizes of diffusion transformers."""

from sddit_jax.errors import ConfigError

# (depth, width, heads): S to XL from Peebles & Xie 2023, Table 1, H from MaskDiT's code
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "H": (32, 1280, 16),
}
PATCHES = (2, 4, 8)


def parse_size(size: str) -> dict[str, int]:
    """The keys of `model` for a size: 'XL/2' -> {"depth": 28, "width": 1152, "heads": 16, "patch": 2}.

    Raises ConfigError for a name that is not in SIZES, or a patch that is not in PATCHES.
    """
    name, _, patch = size.partition("/")
    if name not in SIZES or patch not in map(str, PATCHES):
        raise ConfigError(
            f"model size {size!r} is not one of {', '.join(SIZES)} with a patch of "
            f"{', '.join(map(str, PATCHES))}, as in 'XL/2'"
        )
    depth, width, heads = SIZES[name]
    return {"depth": depth, "width": width, "heads": heads, "patch": int(patch)}
