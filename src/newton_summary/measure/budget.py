"""How many directions fit into memory, and the sweeps that they take (docs/engine.md, "Memory").

A second derivative needs the tangents of its two groups at the same time, one of third order in full those of three.
Where the tangents of all groups are more than may be held, the groups are split into parts, and every two of them (or
three) are swept together: each entry is then computed by a sweep in which all its groups are.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.graph import Graph
from newton_summary.measure.rules import Groups, Linear
from newton_summary.measure.rules import linear as lin

aten = torch.ops.aten

SHARE = 0.75
"""Of the memory that is free, what tangents may take where no budget is given: others work on the machine, too."""

_SMALL = 1 << 26  # bytes of tangents that need no look at what is free
_VIEWS = (lin.reshaped, lin.expanded, lin.transposed, lin.permuted, lin.unpaired, lin.paired)
_PARTS = {aten.select.int, aten.slice.Tensor}


def free_memory(device: torch.device) -> float:
    """The bytes that can still be had on a device; infinite where nobody tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return math.inf
    return min(_available(), _left_in_container())


def _available() -> float:
    """What the system can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        if "SC_AVPHYS_PAGES" not in names:
            return math.inf
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _left_in_container() -> float:
    """What the limit of a control group leaves."""
    try:
        group = Path("/sys/fs/cgroup")
        return float(group.joinpath("memory.max").read_text()) - float(group.joinpath("memory.current").read_text())
    except (OSError, ValueError):  # there is no limit
        return math.inf


def held(tensors: Sequence[Any]) -> int:
    """The bytes of the memory that tensors, or lists of them, look at."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for t in tensor if isinstance(tensor, list | tuple) else (tensor,):
            if isinstance(t, Tensor) and t.layout is torch.strided:
                storage = t.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def tangent_bytes(graph: Graph, steps: Sequence[Any], values: Sequence[Any], full: bool) -> int:
    """The most bytes that one direction's tangents take at a time in a sweep.

    Views take none.  What :mod:`positions` pushes a few positions at a time is left out, and so is what is made of one
    parameter alone, such as a weight in another type, which moves with that parameter's groups and no others.  With
    all of the third order, every curved operation keeps its tangents, and those of its adjoint.
    """
    sections = frozenset() if full else frozenset(n for section in graph.sections for n in section.numbers)
    exits = {m.out for section in graph.sections for m in section.members if m.exits}
    alone = {slot: slot for slot, _, parameter in graph.inputs if parameter is not None}
    root: dict[int, int] = {}
    size: dict[int, int] = {}
    users: dict[int, int] = {}
    live = most = total = widest = 0
    for number, (instruction, step) in enumerate(zip(graph.instructions, steps, strict=True)):
        if step is not None:
            out = instruction.out
            source = step.places[0][1] if step.places else out
            origins = {alone.get(slot, -1) for _, slot in step.places}
            if len(origins) == 1 and -1 not in origins:
                alone[out] = origins.pop()
            if len(step.places) == 1 and source in root and _is_view(instruction, step):
                root[out] = root[source]
            else:
                root[out] = out
                hidden = (number in sections and out not in exits) or out in alone
                size[out] = 0 if hidden else _bytes(values[out])
                live += size[out]
                total += size[out]
                widest = max(widest, size[out])
            users[root[out]] = users.get(root[out], 0) + 1
            most = max(most, live)
        for slot in instruction.last_use:
            if slot in root:
                users[root[slot]] -= 1
                if not users[root[slot]]:
                    live -= size[root[slot]]
    return 2 * total if full else most + widest  # a copy of one argument, where it does not lie in order


def _is_view(instruction: Any, step: Any) -> bool:
    rule = step.rule
    return instruction.op in _PARTS or (isinstance(rule, Linear) and rule.rows in _VIEWS)


def _bytes(value: Any) -> int:
    several = value if isinstance(value, list | tuple) else (value,)
    return sum(v.nbytes for v in several if isinstance(v, Tensor) and v.is_floating_point())


def together(size: int, one: int, known: int, memory: float | None, device: torch.device, order: int) -> list[Groups]:
    """The groups of each sweep.

    Args:
        size: the number of groups.
        one: bytes for each group.
        known: bytes that values and adjoints take already.
        memory: the budget for both; none for a share of what is free.
        device: where they are.
        order: how many groups' tangents are needed at the same time.

    Raises:
        MemoryError: not even so many fit.
    """
    everything = tuple(range(size))
    if memory is None:
        if size * one <= _SMALL:
            return [everything]
        free = free_memory(device)
        room = SHARE * free
    else:
        free = room = memory - known
    if size * one <= room:
        return [everything]
    order = min(order, size)
    fit = int(min(room // one, size))
    if fit < order:
        if order * one > free:
            raise MemoryError(_message(order, one, known, memory, free))
        fit = order
    return unions(size, fit, order)


def unions(size: int, fit: int, order: int) -> list[Groups]:
    """Sets of at most ``fit`` groups, such that any ``order`` groups are in one of them together."""
    if fit >= size:
        return [tuple(range(size))]
    part = max(1, fit // order)
    count = -(-size // part)
    bounds = [size * i // count for i in range(count + 1)]
    parts = [tuple(range(start, end)) for start, end in itertools.pairwise(bounds)]
    return [tuple(g for p in some for g in p) for some in itertools.combinations(parts, min(order, count))]


def _message(order: int, one: int, known: int, memory: float | None, free: float) -> str:
    what = {1: "one group", 2: "a pair of groups", 3: "three groups"}[order]
    need = f"the tangents of {what} take {_readable(order * one)}"
    if memory is None:
        return (
            f"{need}, and {_readable(max(free, 0))} are free: measure on a smaller batch, or in slices of it "
            "(slices=), or say with memory= how many bytes to take"
        )
    return (
        f"{need}, the loss's own values and adjoints {_readable(known)}, and memory={memory:.0f} is "
        f"{_readable(memory)}: pass memory={known + order * one} or more, or measure on a smaller batch, or in "
        "slices of it (slices=)"
    )


def _readable(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
