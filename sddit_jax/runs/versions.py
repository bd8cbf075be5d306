"""The versions that a file's numbers were computed with: other versions may round otherwise."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping

PACKAGES = ("sddit-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


def versions() -> dict[str, str]:
    """The version of Python and of each package that computes; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def changed_versions(recorded: Mapping[str, str]) -> str:
    """What of a record by `versions` is another version here, in words; "" if nothing is.

    A package that the record does not name is not compared.
    """
    here = versions()
    changed = [name for name in recorded if recorded[name] != here.get(name)]
    return ", ".join(f"{name} {recorded[name]} (here {here.get(name, 'none')})" for name in changed)
