"""What a compiled program does, read off the text of its optimised HLO: collectives and matrix products.

Loops count as often as they turn; XLA's own `cost_analysis` counts the body of a loop once, and no collectives. The
text is read because JAX gives nothing else of a compiled program: jaxlib has no Python classes for the message that
`as_serialized_hlo_module_proto` writes, and its HloInstruction tells neither attributes nor, in 0.10, shapes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it."""

    kind: str  # one of KINDS
    bytes: float  # sent by a device each time, by the best algorithm for a ring
    times: int  # in a run of the program
    op_name: str  # where in the traced function it is from


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    arguments: str  # names of instructions, or the value of a constant
    attributes: str

    @property
    def operands(self) -> list[str]:
        return _names(self.arguments)


_Computation = Mapping[str, _Instruction]


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, each once, however many steps it is split into to overlap with other work."""
    found: dict[str, Collective] = {}

    def visit(computation: _Computation, instruction: _Instruction, times: int, caller: _Instruction | None) -> None:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            return
        if caller is not None and "all-reduce-scatter" in caller.attributes:
            # TPU's reduce-scatter: a fusion of an all-reduce and of the slice that is kept of it.
            kind = "reduce-scatter"
        # TPU's compiler writes a collective down in each of the fusions that move a part of it, and calls them a chain.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        found[chain[0] if chain else instruction.name] = Collective(
            kind, _sent_bytes(kind, computation, instruction), times, _origin(computation, instruction, caller)
        )

    _walk(text, visit)
    return list(found.values())


def matrix_flops(text: str) -> float:
    """Floating-point operations of all matrix products and convolutions of a program, on one device."""
    total = 0.0

    def visit(computation: _Computation, instruction: _Instruction, times: int, caller: _Instruction | None) -> None:
        nonlocal total
        del caller
        if instruction.opcode == "dot":
            total += times * _dot_flops(computation, instruction)
        elif instruction.opcode == "convolution":
            total += times * _convolution_flops(computation, instruction)

    _walk(text, visit)
    return total


def _walk(text: str, visit: Callable[[_Computation, _Instruction, int, _Instruction | None], None]) -> None:
    """Calls visit(computation, instruction, times it runs, the instruction that calls the computation)."""
    computations, entry = _parse(text)

    def walk(name: str, times: int, caller: _Instruction | None = None) -> None:
        computation = computations[name]
        for instruction in computation.values():
            visit(computation, instruction, times, caller)
            if instruction.opcode == "while":
                body, condition = (
                    re.search(rf"\b{key}=%?([\w.-]+)", instruction.attributes)[1] for key in ("body", "condition")
                )
                walk(body, times * _trips(instruction, computation, computations[condition]), instruction)
            elif instruction.opcode == "conditional":
                # As if all branches ran: which one does is not known.
                for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.attributes):
                    for branch in _names(branches):
                        walk(branch, times, instruction)
                for branch in re.findall(r"(?:true|false)_computation=%?([\w.-]+)", instruction.attributes):
                    walk(branch, times, instruction)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                called = re.search(r"\b(?:calls|to_apply)=%?([\w.-]+)", instruction.attributes)
                walk(called[1], times, instruction)

    walk(entry, 1)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Computations by name, each its instructions by name, and the name of the entry."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line.startswith("}"):
            current = None
        elif line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.-]+) \(", line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[1], match[2])
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of a compiled HLO module: it has no ENTRY computation")
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    # A shape has no space, but for tuples of shapes, which are in parentheses.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return _Instruction(name, shape, rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _names(text: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", text)


def _arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dtype, sizes) of an array's shape, or of each of a tuple's."""
    for dtype, sizes in _ARRAY.findall(shape):
        yield dtype, tuple(int(size) for size in sizes.split(",") if size)


def _sizes(shape: str) -> tuple[int, ...]:
    return next(_arrays(shape))[1]


def _total_bytes(shape: str) -> float:
    def width(dtype: str) -> float:
        return _BYTES[dtype] if dtype in _BYTES else int(re.search(r"\d+", dtype)[0]) / 8

    return sum(width(dtype) * math.prod(sizes) for dtype, sizes in _arrays(shape))


def _origin(computation: _Computation, instruction: _Instruction, caller: _Instruction | None) -> str:
    """Its op_name, that of the nearest instruction that it is computed from, or its caller's; "" if all are lost."""
    seen, found = set(), [instruction]
    while found:
        names = [name for i in found for name in re.findall(r'op_name="([^"]+)"', i.attributes)]
        if names:
            return names[0]
        seen |= {i.name for i in found}
        found = [computation[name] for i in found for name in i.operands if name in computation and name not in seen]
    names = re.findall(r'op_name="([^"]+)"', caller.attributes) if caller else []
    return names[0] if names else ""


def _sent_bytes(kind: str, computation: _Computation, instruction: _Instruction) -> float:
    operands = sum(_total_bytes(computation[name].shape) for name in instruction.operands)
    if kind == "collective-permute":
        return operands
    n = _group_size(instruction.attributes)
    share = (n - 1) / n
    if kind == "all-gather":
        return operands * n * share
    return operands * share * (2 if kind == "all-reduce" else 1)


def _group_size(attributes: str) -> int:
    """Devices that take part in a collective together, from each notation of `replica_groups`."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        # An axis may be used in part: 'axis':(offset)size.
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    raise ValueError(f"no group of devices in {attributes[:200]!r}")


def _trips(loop: _Instruction, computation: _Computation, condition: _Computation) -> int:
    """How often a loop turns: stated by the compiler, or from a condition `counter < constant`."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    compare = next((i for i in condition.values() if i.opcode == "compare"), None)
    if compare is None or "direction=LT" not in compare.attributes:
        raise ValueError(f"the condition of loop {loop.name} is not `counter < constant`")
    counter, limit = (condition[name] for name in compare.operands)
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])
    start = computation[computation[loop.operands[0]].operands[index]]
    while start.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        start = computation[start.operands[0]]
    return _constant(limit) - _constant(start)


def _constant(instruction: _Instruction) -> int:
    if instruction.opcode != "constant":
        raise ValueError(f"{instruction.name} is not a constant, but {instruction.opcode}")
    return int(instruction.arguments)


def _dot_flops(computation: _Computation, dot: _Instruction) -> float:
    lhs = _sizes(computation[dot.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)[1]
    return 2.0 * math.prod(_sizes(dot.shape)) * math.prod(lhs[int(d)] for d in contracted.split(",") if d)


def _convolution_flops(computation: _Computation, convolution: _Instruction) -> float:
    """Only products of two elements that are there: TPU's compiler writes batched products as padded convolutions."""
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes).groups()
    lhs, rhs = (_sizes(computation[name].shape) for name in convolution.operands)
    out = _sizes(convolution.shape)
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    settings = dict(pair.split("=") for pair in window[1].split()) if window else {}
    count = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for d in range(len(out_labels) - 2):

        def setting(key: str, default: str, d: int = d) -> str:
            return settings[key].split("x")[d] if key in settings else default

        stride, dilation, base = (int(setting(key, "1")) for key in ("stride", "rhs_dilate", "lhs_dilate"))
        low = int(setting("pad", "0_0").split("_")[0])
        size, kernel, outputs = (
            sizes[labels.index(str(d))] for sizes, labels in ((lhs, lhs_labels), (rhs, rhs_labels), (out, out_labels))
        )
        place = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * dilation - low
        count *= np.count_nonzero((place >= 0) & (place <= (size - 1) * base) & (place % base == 0))
    return count
