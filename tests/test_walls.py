"""The walls of the house: imports go down the list of floors, and pure code touches no machine."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sddit_jax"
# From the top: what stands in a row may import from its own row, if that is its own folder, and from the rows below.
FLOORS = (
    ("main", "sample", "evaluate", "probe", "prepare", "convert", "preflight", "cli", "process_flags"),
    ("train",),
    ("evaluation",),
    ("generation",),
    ("interop",),
    ("weights",),
    ("runs",),
    ("data",),
    ("cost",),
    ("parallel",),
    ("config",),
    ("sampling",),
    ("method",),
    ("models",),
    ("settings",),
    ("ahead", "files"),
    ("errors",),
)
COMMANDS = FLOORS[0]
PURE = ("models", "method", "sampling")
# Modules and names that pure code may not import: files, pictures, logs, several processes, meshes.
IMPURE_MODULES = {"PIL", "pathlib", "os", "logging", "io", "etils", "sddit_jax.parallel", "sddit_jax.files"}
IMPURE_NAMES = {"multihost_utils", "Mesh", "NamedSharding", "PartitionSpec", "make_mesh"}
DEVICE_QUERIES = {"devices", "local_devices", "device_count", "local_device_count", "default_backend", "process_index"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE).with_suffix("")
        yield ".".join(relative.parts), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, wherever it stands; name is empty for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def floor_of(module: str) -> int:
    room = module.split(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


MODULES = dict(modules())


def test_every_module_has_a_floor():
    rooms = {room for rooms in FLOORS for room in rooms}
    assert {name.split(".")[0] for name in MODULES} - {"__init__", "__main__"} <= rooms
    assert len(list(PACKAGE.glob("*.py"))) <= 18


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__init__")])
def test_imports_go_down(module):
    for source, name in imports(MODULES[module]):
        if source != "sddit_jax" and not source.startswith("sddit_jax."):
            continue
        target = f"{source}.{name}".removeprefix("sddit_jax.").split(".")[0]
        same_room = target == module.split(".")[0]
        beside = module in COMMANDS and target in ("cli", "process_flags")
        assert same_room or beside or floor_of(module) < floor_of(target), (
            f"{module} imports {target}, which is above it"
        )


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] in PURE])
def test_pure_code_touches_no_machine(module):
    for source, name in imports(MODULES[module]):
        parts = source.split(".")
        found = {".".join(parts[: n + 1]) for n in range(len(parts))} & IMPURE_MODULES
        assert not found, f"{module} imports {source}"
        assert not IMPURE_NAMES & {name, parts[-1]}, f"{module} imports {source} {name}"
        assert source != "jax" or name not in DEVICE_QUERIES, f"{module} imports jax.{name}"
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jax":
            assert node.attr not in DEVICE_QUERIES, f"{module} asks jax.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input"}, f"{module} calls {node.func.id}"


def test_config_reads_nothing_but_its_files():
    for module in (name for name in MODULES if name.startswith("config.")):
        for source, _ in imports(MODULES[module]):
            assert source.split(".")[0] not in {"PIL", "logging", "os", "socket"}, f"{module} imports {source}"
