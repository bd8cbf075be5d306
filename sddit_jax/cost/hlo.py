"""Reads the collectives and the matrix products of a compiled program off the text of its optimised HLO.

The body of a loop counts as often as the loop runs it; XLA's own `cost_analysis` counts it once, and no collectives.
JAX offers no other way: jaxlib has no Python classes for the message of `as_serialized_hlo_module_proto`, and its
HloInstruction tells no attributes and, in 0.10, no shapes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it."""

    kind: str  # one of KINDS
    bytes: float  # sent by a device each time, by the best algorithm for a ring
    times: int  # how often a run of the program executes it
    op_name: str  # its place in the traced function


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
    """The collectives of a program. One that is split into steps, to overlap with other work, counts once."""
    found: dict[str, Collective] = {}
    for computation, instruction, times, caller in _executed(text):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if caller is not None and "all-reduce-scatter" in caller.attributes:
            # TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
            kind = "reduce-scatter"
        # TPU's compiler repeats a collective in each fusion that moves a part of it; the chain_id connects them.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        found[chain[0] if chain else instruction.name] = Collective(
            kind, _sent_bytes(kind, computation, instruction), times, _origin(computation, instruction, caller)
        )
    return list(found.values())


def matrix_flops(text: str) -> float:
    """The FLOPs of all matrix products and convolutions of a program, on one device."""
    total = 0.0
    for computation, instruction, times, _ in _executed(text):
        if instruction.opcode == "dot":
            total += times * _dot_flops(computation, instruction)
        elif instruction.opcode == "convolution":
            total += times * _convolution_flops(computation, instruction)
    return total


def _executed(text: str) -> Iterator[tuple[_Computation, _Instruction, int, _Instruction | None]]:
    """Yields (computation, instruction, how often it runs, instruction that calls the computation), once per call."""
    computations, entry = _parse(text)

    def walk(name: str, times: int, caller: _Instruction | None) -> Iterator[Any]:
        computation = computations[name]
        for instruction in computation.values():
            yield computation, instruction, times, caller
            attributes, called, turns = instruction.attributes, [], 1
            if instruction.opcode == "while":
                body, condition = (re.search(rf"\b{key}=%?([\w.-]+)", attributes)[1] for key in ("body", "condition"))
                called, turns = [body], _trips(instruction, computation, computations[condition])
            elif instruction.opcode == "conditional":
                # Which branch runs is not known, so all count.
                for branches in re.findall(r"branch_computations=\{([^}]*)\}", attributes):
                    called += _names(branches)
                called += re.findall(r"(?:true|false)_computation=%?([\w.-]+)", attributes)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                called = [re.search(r"\b(?:calls|to_apply)=%?([\w.-]+)", attributes)[1]]
            for each in called:
                yield from walk(each, times * turns, instruction)

    yield from walk(entry, 1, None)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, each a dict of its instructions by name, and the name of the entry."""
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
    # Only a tuple of shapes, in parentheses, has spaces.
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
    """(dtype, sizes) of each array in a shape, which may be a tuple of shapes."""
    for dtype, sizes in _ARRAY.findall(shape):
        yield dtype, tuple(int(size) for size in sizes.split(",") if size)


def _sizes(shape: str) -> tuple[int, ...]:
    return next(_arrays(shape))[1]


def _total_bytes(shape: str) -> float:
    bits = {dtype: 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) for dtype, _ in _arrays(shape)}
    return sum(bits[dtype] / 8 * math.prod(sizes) for dtype, sizes in _arrays(shape))


def _origin(computation: _Computation, instruction: _Instruction, caller: _Instruction | None) -> str:
    """The op_name of an instruction, of the nearest operand that has one, or of the caller; "" if there is none."""
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
    if kind == "all-gather":
        return operands * (n - 1)
    return operands * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(attributes: str) -> int:
    """The number of devices that take part in a collective, from any notation of `replica_groups`."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        # 'axis':(offset)size stands for a part of an axis.
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in used)
    raise ValueError(f"no group of devices in {attributes[:200]!r}")


def _trips(loop: _Instruction, computation: _Computation, condition: _Computation) -> int:
    """How often a loop runs: as the compiler states, or from a condition `counter < constant`."""
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
    """Counts products with padding as nothing: TPU's compiler writes batched products as padded convolutions."""
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
