"""The versions of packages, which a run and each file of results record: another version may round differently."""

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping

PACKAGES = ("sddit-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


def versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES, by name, without the packages that are not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def changed_versions(recorded: Mapping[str, str]) -> str:
    """Names the packages of a record by `versions` that have another version here; "" if none has."""
    here = versions()
    changed = [name for name in recorded if recorded[name] != here.get(name)]
    return ", ".join(f"{name} {recorded[name]} (here {here.get(name, 'none')})" for name in changed)
