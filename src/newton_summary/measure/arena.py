"""Memory for tangents, used again and again within a measurement.

A processor's first touch of fresh memory costs about as much as ten passes over warm memory, and large tensors are
fresh memory each time that torch allocates them.  Here they come from segments in which what was freed is given out
anew.  A tensor from an arena is an ordinary tensor: its place is free as soon as no tensor looks at it any more.

Measurements with one graph ask for the same sizes in the same order.  The first notes when each place is wanted and
freed; those that follow are given places that lie closer together.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right, insort
from collections.abc import Iterator, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SEGMENT = 1 << 29  # bytes: only what is touched becomes resident
_SMALLEST = 1 << 18  # bytes: the allocator below keeps small pieces warm by itself
_ALIGNMENT = 64


Layout: TypeAlias = Sequence[tuple[int, int]]
"""The size of each place, in the order in which they are asked for, and where in the first segment it starts."""


@dataclass(slots=True)
class _Life:
    """A place: its size, and when it was taken and freed."""

    size: int
    born: int
    died: float = inf


@dataclass(slots=True)
class Arena:
    """Segments of memory, and what is free in each: runs of bytes, in order of their places.

    Args:
        layout: where places are looked for first.
    """

    layout: Layout = ()
    lives: list[_Life] = field(default_factory=list)
    strayed: bool = False
    _clock: int = 0
    _segments: list[NDArray[np.uint8]] = field(default_factory=list)
    _free: list[list[tuple[int, int]]] = field(default_factory=list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the host whose entries can be anything."""
        size = -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        number, start = self._take(size)
        piece = self._segments[number][start : start + size]
        self._clock += 1
        self.lives.append(_Life(size, self._clock))
        weakref.finalize(piece, self._give_back, number, start, self.lives[-1])
        return torch.from_numpy(piece).view(dtype)[: prod(shape)].view(shape)

    def _take(self, size: int) -> tuple[int, int]:
        """The place of the layout, or the first free one of this size: its segment and where it starts."""
        turn = len(self.lives)
        if turn < len(self.layout) and self.layout[turn][0] == size:
            if not self._segments:
                self._add_segment(max(sum(place) for place in self.layout))
            start = self.layout[turn][1]
            if self._carve(0, start, size):
                return 0, start
        self.strayed = True
        for number, free in enumerate(self._free):
            for start, room in free:
                if room >= size:
                    self._carve(number, start, size)
                    return number, start
        self._add_segment(size)
        self._carve(len(self._free) - 1, 0, size)
        return len(self._free) - 1, 0

    def _add_segment(self, size: int) -> None:
        self._segments.append(np.empty(max(size, _SEGMENT), np.uint8))
        self._free.append([(0, max(size, _SEGMENT))])

    def _carve(self, number: int, start: int, size: int) -> bool:
        """Takes a place out of the run of free bytes that it lies in, if it does."""
        free = self._free[number]
        i = bisect_right(free, (start, inf)) - 1
        if i < 0 or sum(free[i]) < start + size:
            return False
        before, after = (free[i][0], start - free[i][0]), (start + size, sum(free[i]) - start - size)
        free[i : i + 1] = [run for run in (before, after) if run[1] > 0]
        return True

    def _give_back(self, number: int, start: int, life: _Life) -> None:
        """Frees a place, and joins it with free neighbours."""
        self._clock += 1
        life.died = self._clock
        free = self._free[number]
        insort(free, (start, life.size))
        i = free.index((start, life.size))
        for left in (i, i - 1):
            if 0 <= left < len(free) - 1 and sum(free[left]) == free[left + 1][0]:
                free[left : left + 2] = [(free[left][0], free[left][1] + free[left + 1][1])]


def packed(lives: Sequence[_Life]) -> Layout:
    """Places close together: the largest first, each in the smallest gap between those that live at the same time."""
    sizes, born, died = (np.array([getattr(x, name) for x in lives]) for name in ("size", "born", "died"))
    starts = np.full(len(lives), -1)
    for i in np.argsort(-sizes, kind="stable"):
        beside = (starts >= 0) & (born < died[i]) & (born[i] < died)
        gaps, end = [], 0
        for start, size in sorted(zip(starts[beside].tolist(), sizes[beside].tolist(), strict=True)):
            if start - end >= sizes[i]:
                gaps.append((start - end, end))
            end = max(end, start + size)
        starts[i] = min(gaps)[1] if gaps else end
    return list(zip(sizes.tolist(), starts.tolist(), strict=True))


_CURRENT: ContextVar[Arena | None] = ContextVar("arena", default=None)


@contextlib.contextmanager
def arena(layouts: MutableMapping[Any, Layout], key: Any) -> Iterator[None]:
    """A block in which :func:`empty` uses an arena of its own.

    Args:
        layouts: where layouts are kept.
        key: what kind of work the block does.
    """
    current = Arena(layouts.get(key, ()))
    token = _CURRENT.set(current)
    try:
        yield
    finally:
        _CURRENT.reset(token)
    if current.strayed:
        layouts[key] = packed(current.lives)


def is_large(size: int) -> bool:
    """Whether so many bytes are worth the trouble."""
    return size >= _SMALLEST


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of another one's type and device whose entries can be anything; from the arena if there is one."""
    current = _CURRENT.get()
    if current is None or like.device.type != "cpu" or not is_large(prod(shape) * like.dtype.itemsize):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return current.empty(shape, like.dtype)
