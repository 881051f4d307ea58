"""The collectives and the kernels of a compiled program, read from its HLO text."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
WIDTH = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8}  # fmt: skip


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: one of KINDS.
        tensors: each device's part of the results, as (type, shape).
        groups: the devices that communicate, by their index in the mesh; None if the text could not be parsed.
        conditional: whether it is inside a branch, so that not every run meets it.
    """

    kind: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[int, ...], ...] | None
    conditional: bool

    @property
    def nbytes(self) -> int:
        return sum(WIDTH[dtype] * math.prod(shape) for dtype, shape in self.tensors)

    def __str__(self) -> str:
        return f"{self.kind} of {', '.join(f'{dtype}{list(shape)}' for dtype, shape in self.tensors)}"


class Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes


def collectives(text: str) -> list[Collective]:
    """Every collective that a run of the program can meet.

    A computation counts at each of its calls (an asynchronous start, a fusion, a branch). The body of a loop counts
    once.
    """
    computations, entry = parse(text)
    return list(_walk(computations, entry, False, _partitions(text)))


class Met(NamedTuple):
    """A collective as a run of the program meets it.

    Attributes:
        loops: the bodies of the loops around it, outermost first.
        times: how often these loops run it.
    """

    collective: Collective
    loops: tuple[str, ...]
    times: int


def met(text: str) -> list[Met]:
    """Every collective of a program, with the loops around it.

    TPUs run some collectives asynchronously: a start, steps (also in an inner loop) and an end each name the
    collective, so each channel counts once. There, a reduce-scatter is mostly a fusion of an all-reduce with the slice
    that a device keeps; it is returned as a reduce-scatter. The tensors of a reduce-scatter are the whole ones that are
    summed.
    """
    computations, entry = parse(text)
    seen: set[tuple[tuple[str, ...], str, str]] = set()

    def walk(name: str, loops: tuple[str, ...], times: int) -> Iterator[Met]:
        for step in computations[name]:
            kind = step.op.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", step.rest)
                around = [(loops[:depth], kind, channel[1]) for depth in range(len(loops) + 1)] if channel else []
                if seen.isdisjoint(around):
                    yield Met(_whole(kind, step, partitions), loops, times)
                seen.update(around[-1:])
                continue
            if step.op == "while":
                body, condition = (re.findall(rf"{part}=%?([\w.\-]+)", step.rest)[0] for part in ("body", "condition"))
                yield from walk(body, (*loops, body), times * trips(computations, condition))
                continue
            for called in _called(step.rest):
                if called.startswith("all-reduce-scatter"):
                    yield Met(_fused(computations[called], partitions), loops, times)
                elif called in computations:
                    yield from walk(called, loops, times)

    partitions = _partitions(text)
    return list(walk(entry, (), 1))


def _whole(kind: str, step: Instruction, devices: int) -> Collective:
    tensors, groups = tuple(arrays(step.shape)), _groups(step.rest, devices)
    if kind != step.op and kind != "all-reduce":  # the shape of a start holds its operands too
        tensors = (max(tensors, key=lambda tensor: math.prod(tensor[1])),)
    if kind == "reduce-scatter":
        size = len(groups[0]) if groups else 1
        tensors = tuple((dtype, (size, *shape)) for dtype, shape in tensors)
    return Collective(kind, tensors, groups, False)


def _fused(steps: list[Instruction], devices: int) -> Collective:
    """The reduce-scatter that a fusion implements. Its operands may be padded inside."""
    tensors = tuple(tensor for step in steps if step.op == "parameter" for tensor in arrays(step.shape))
    groups = next(_groups(step.rest, devices) for step in steps if step.op == "all-reduce")
    return Collective("reduce-scatter", tensors, groups, False)


def trips(computations: dict[str, list[Instruction]], condition: str) -> int:
    """The number of iterations of a loop: scans count to a constant."""
    found = [re.match(r"(\d+)\)", step.rest) for step in computations[condition] if step.op == "constant"]
    return max((int(number[1]) for number in found if number), default=1)


def total(text: str, cost: Callable[[Instruction], int]) -> int:
    """The sum of a cost over the instructions of a run. Loops count each turn, a conditional its most expensive
    branch."""
    computations, entry = parse(text)

    def walk(name: str) -> int:
        found = 0
        for step in computations[name]:
            if step.op == "while":
                body, condition = (re.findall(rf"{part}=%?([\w.\-]+)", step.rest)[0] for part in ("body", "condition"))
                found += trips(computations, condition) * walk(body)
            elif step.op == "conditional":
                found += max(walk(branch) for branch in _called(step.rest))
            else:
                found += cost(step)
        return found

    return walk(entry)


def estimated_cycles(step: Instruction) -> int:
    """The TPU compiler's estimate of an instruction. Kernels and scatters have none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', step.rest)
    return int(found[1]) if found else 0


def splash_products(step: Instruction) -> int:
    """The number of products of [T,H] and [T,T] in a kernel of splash attention: 2 forward; backward 3 for the gradient
    of queries, 4 for those of keys and values, 5 for all three together. 0 for other instructions."""
    if not step.name.startswith("splash_"):
        return 0
    return 2 if "_fwd_" in step.name else 2 + len(list(arrays(step.shape)))


# Instructions that launch no kernel: they name values or order other instructions.
NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency",
             "opt-barrier", "partition-id", "replica-id"}  # fmt: skip


def kernels(text: str) -> Counter[str]:
    """The kernels that a run of a GPU program launches, by kind: fusions, custom calls, copies and others.

    The called computation of a call (XLA puts command buffers into such) counts at each call, and the body of a loop
    once. A conditional counts as one kernel without its branches. Kernels that a library launches within one custom
    call count once.
    """
    computations, entry = parse(text)

    def walk(name: str) -> Iterator[str]:
        for step in computations[name]:
            if step.op in ("call", "while"):
                attribute = "to_apply" if step.op == "call" else "body"
                yield from walk(re.findall(rf"\b{attribute}=%?([\w.\-]+)", step.rest)[0])
            elif step.op not in NO_KERNEL and not step.op.endswith("-done"):
                kind = re.search(r'\b(?:kind=(\w+)|custom_call_target="([^"]+)")', step.rest)
                yield f"{step.op} {kind[1] or kind[2]}" if kind else step.op

    return Counter(walk(entry))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {"": []}
    entry, name = "", ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
            computations[name].append(Instruction(*found.groups()))  # no shape has a name between space and bracket
    if not entry:
        raise ValueError("not the text of a compiled program: it has no ENTRY")
    return computations, entry


def _walk(
    computations: dict[str, list[Instruction]], name: str, conditional: bool, devices: int
) -> Iterator[Collective]:
    for step in computations[name]:
        kind = step.op.removesuffix("-start")
        if kind in KINDS:
            tensors = tuple(arrays(step.shape))
            if kind != step.op and kind != "all-reduce":  # the shape of a start holds its operands too
                tensors = (max(tensors, key=lambda tensor: math.prod(tensor[1])),)
            yield Collective(kind, tensors, _groups(step.rest, devices), conditional)
            continue
        branches = step.op == "conditional"
        for called in _called(step.rest):
            if called in computations:
                yield from _walk(computations, called, conditional or branches, devices)


def _called(rest: str) -> list[str]:
    one = re.findall(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
    several = re.findall(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}", rest)
    return one + [name.strip().lstrip("%") for names in several for name in names.split(",") if name.strip()]


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for dtype, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        yield dtype, tuple(int(size) for size in sizes.split(",") if size)


def _partitions(text: str) -> int:
    found = re.search(r"num_partitions=(\d+)", text)
    return int(found[1]) if found else 1


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...] | None:
    """Device groups from any of XLA's notations: lists and pairs, a transposed iota, axes of a mesh."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})?\}", rest):
        lists = json.loads("[" + (found[1] or "").replace("{", "[").replace("}", "]") + "]")
        return tuple(map(tuple, lists)) or (tuple(range(devices)),)
    if found := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={IOTA}", rest):
        return _rows(_iota(*found.groups()[2:]).reshape(int(found[1]), int(found[2])))
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? \{{([^}}]*)\}}", rest):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(sizes.values()))
        return _rows(_along(ids, sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[4])))
    return None


IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # numbers from 0 in this shape, transposed


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _along(ids: np.ndarray, sizes: dict[str, int], axes: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups of devices that differ along these axes of a mesh only, one group per row. An axis is given whole, or as a
    part of it: the size before that part, and its size."""
    dims, within = [], []
    for name, size in sizes.items():
        parts = [(int(pre or 1), int(pre or 1) * int(n or size)) for axis, pre, n in axes if axis == name]
        for low, high in pairwise(sorted({1, size, *(edge for part in parts for edge in part)})):
            dims.append(high // low)
            within.append(any(begin <= low and high <= end for begin, end in parts))
    order = sorted(range(len(dims)), key=within.__getitem__)
    count = math.prod(n for n, inside in zip(dims, within) if inside)
    return ids.reshape(dims).transpose(order).reshape(-1, count)


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, ids.tolist()))
