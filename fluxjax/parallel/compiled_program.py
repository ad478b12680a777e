"""What a compiled program does on each device: bytes it holds, products it forms, bytes it moves.

Read from the optimised program's text, so that loops count as often as they run (XLA's own
`cost_analysis` counts a loop's body once) and collectives are those that the partitioner made.
Needs no weights: compile for ShapeDtypeStructs on simulated devices.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM_BYTES = {"pred": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16, "token": 0}


class Collective(NamedTuple):
    """`bytes` that each device sends in one call, with the usual ring algorithms; `calls` of it."""

    kind: str
    shape: str
    devices: int
    bytes: float
    calls: int
    source: str  # where in the model


@dataclass(frozen=True)
class Structure:
    """Of one device. `argument_bytes` includes arguments that the outputs take over (donated)."""

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    donated_bytes: int
    matmul_flops: float
    collectives: tuple[Collective, ...]

    def part(self, share: float) -> Structure:
        """With so much of the work, in the same memory."""
        sent = tuple(one._replace(bytes=share * one.bytes) for one in self.collectives)
        return replace(self, matmul_flops=share * self.matmul_flops, collectives=sent)

    @property
    def collective_bytes(self) -> dict[str, float]:
        """Bytes that a device sends, by kind."""
        total: Counter[str] = Counter()
        for one in self.collectives:
            total[one.kind] += one.bytes * float(one.calls)  # pyright: ignore[reportArgumentType]
        return dict(total)


def measure(compiled: Any) -> Structure:
    """Of what `jax.jit(f).lower(...).compile()` returns."""
    memory = compiled.memory_analysis()
    program = _Program(compiled.as_text())
    flops, collectives = program.totals()
    return Structure(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        matmul_flops=flops,
        collectives=collectives,
    )


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.+)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


class _Program:
    """The text of an HLO module, taken apart."""

    def __init__(self, text: str):
        self.entry, self.computations = "", dict[str, dict[str, _Instruction]]()
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif found := _LINE.match(line):
                instruction = _instruction(found[1], found[2])
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("this is not the text of a compiled program")
        found = re.search(r"num_partitions=(\d+)", text)
        self.partitions = int(found[1]) if found else 1

    def totals(self) -> tuple[float, tuple[Collective, ...]]:
        flops, calls = self._of(self.entry, {})
        merged: Counter[Collective] = Counter()
        for one, times in calls:
            merged[one] += times
        collectives = tuple(one._replace(calls=times) for one, times in merged.items())
        return flops, collectives

    def _of(self, name: str, known: dict[str, Any]) -> tuple[float, list[tuple[Collective, int]]]:
        """FLOPs and collectives of one call of a computation."""
        if name in known:
            return known[name]
        flops, collectives = 0.0, list[tuple[Collective, int]]()
        scope = self.computations[name]
        for instruction in scope.values():
            flops += _flops(instruction, scope)
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                collectives.append((self._collective(kind, instruction, scope), 1))
                continue
            times = 1
            if instruction.opcode == "while":
                trips = _TRIPS.search(instruction.rest)
                if trips is None:
                    raise ValueError(f"the loop {instruction.name} does not tell how often it runs")
                times = int(trips[1])
            branches = _BRANCHES.search(instruction.rest)
            if branches or "true_computation" in instruction.rest:
                names = (
                    re.findall(r"%?([\w.\-]+)", branches[1])
                    if branches
                    else _CALLED.findall(instruction.rest)
                )
                # One of them runs: the one with the most work.
                parts = [max((self._of(called, known) for called in names), key=lambda p: p[0])]
            else:
                called = _CALLED.findall(instruction.rest)
                parts = [self._of(part, known) for part in called if part in self.computations]
            for part_flops, part_collectives in parts:
                flops += times * part_flops
                collectives += [(one, times * n) for one, n in part_collectives]
        known[name] = flops, collectives
        return known[name]

    def _collective(self, kind: str, instruction: _Instruction, scope: dict) -> Collective:
        devices = self._group(instruction.rest)
        sent = sum(_bytes(scope[name].shape) for name in instruction.operands)
        if self._narrowed(instruction.name, scope):
            sent //= 2
        share = (devices - 1) / devices
        moved = {
            "all-gather": sent * (devices - 1),
            "all-reduce": 2 * sent * share,
            "reduce-scatter": sent * share,
            "all-to-all": sent * share,
            "collective-permute": sent,
        }[kind]
        source = re.search(r'op_name="([^"]*)"', instruction.rest)
        shape = re.sub(r"\{[^}]*\}", "", instruction.shape)
        return Collective(kind, shape, devices, moved, 0, source[1] if source else "")

    def _narrowed(self, name: str, scope: dict[str, _Instruction]) -> bool:
        """Whether a float32 value is rounded to 16 bits wherever it is read.

        CPUs hold 16-bit values in 32 bits, and so move them; other devices move 16.
        """
        if not scope[name].shape.lstrip("(").startswith("f32"):
            return False
        users = [one for one in scope.values() if name in one.operands]
        return bool(users) and all(self._rounds(one, name, scope) for one in users)

    def _rounds(self, user: _Instruction, name: str, scope: dict[str, _Instruction]) -> bool:
        if user.opcode == "convert":
            return user.shape.startswith(("bf16", "f16"))
        if user.opcode in ("get-tuple-element", "bitcast", "copy", "reshape", "transpose"):
            return self._narrowed(user.name, scope)
        called = _CALLED.search(user.rest)
        if user.opcode != "fusion" or called is None:
            return False
        inside = self.computations[called[1]]
        places = [i for i, operand in enumerate(user.operands) if operand == name]
        found = [
            one.name
            for one in inside.values()
            if one.opcode == "parameter"
            and any(re.match(rf"param_{i}\b", one.name) for i in places)
        ]
        return bool(found) and all(self._narrowed(one, inside) for one in found)

    def _group(self, text: str) -> int:
        """How many devices take part together."""
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
            return int(found[1])
        if (found := re.search(r"replica_groups=\{\{([\d,]*)\}", text)) and found[1]:
            return len(found[1].split(","))
        return self.partitions


def _instruction(name: str, text: str) -> _Instruction:
    """`f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, ...`; a tuple's shape has brackets."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    return _Instruction(name, shape, rest[:opening], operands, rest[closing:])


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced: {text[:80]}")


def _dimensions(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _bytes(shape: str) -> int:
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = re.search(r"\d+", kind)
        item = _ITEM_BYTES.get(kind) or (int(bits[0]) // 8 if bits else 0)
        total += item * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def _flops(instruction: _Instruction, scope: dict[str, _Instruction]) -> float:
    """Of a matrix product or a convolution: two for each multiply and add."""
    if instruction.opcode == "custom-call" and "gemm" in instruction.rest:
        contracted = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
    elif instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([^}]*)\}", instruction.rest)
    elif instruction.opcode == "convolution":
        return _convolution_flops(instruction, scope)
    else:
        return 0.0
    if contracted is None:
        return 0.0
    left = _dimensions(scope[instruction.operands[0]].shape)
    depth = math.prod(left[int(i)] for i in re.findall(r"\d+", contracted[1]))
    return 2.0 * math.prod(_dimensions(instruction.shape)) * depth


def _convolution_flops(instruction: _Instruction, scope: dict[str, _Instruction]) -> float:
    labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", instruction.rest)
    kernel = _dimensions(scope[instruction.operands[1]].shape)
    if labels is None:
        return 0.0
    # Every output number sums over the kernel's window and its input channels.
    outputs = kernel[labels[1].index("o")]
    return 2.0 * math.prod(_dimensions(instruction.shape)) * math.prod(kernel) / outputs
