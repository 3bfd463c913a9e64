"""Memory for tangents, used again and again within a measurement.

A processor's first touch of fresh memory costs about as much as ten passes over warm memory, and large tensors are
fresh memory each time that torch allocates them.  Here they come from segments in which what was freed is given out
anew.  A tensor from an arena is an ordinary tensor: its place is free as soon as no tensor looks at it any more.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import insort
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SEGMENT = 1 << 29  # bytes: only what is touched becomes resident
_SMALLEST = 1 << 18  # bytes: the allocator below keeps small pieces warm by itself
_ALIGNMENT = 64


class Arena:
    """Segments of memory, and what is free in each: runs of bytes, in order of their places."""

    def __init__(self) -> None:
        self._segments: list[NDArray[np.uint8]] = []
        self._free: list[list[tuple[int, int]]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the host whose entries can be anything."""
        size = -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        number, start = self._take(size)
        piece = self._segments[number][start : start + size]
        weakref.finalize(piece, self._give_back, number, start, size)
        return torch.from_numpy(piece).view(dtype)[: prod(shape)].view(shape)

    def _take(self, size: int) -> tuple[int, int]:
        """The first free place of this size: its segment and where it starts."""
        for number, free in enumerate(self._free):
            for i, (start, room) in enumerate(free):
                if room >= size:
                    free[i : i + 1] = [(start + size, room - size)] if room > size else []
                    return number, start
        room = max(size, _SEGMENT)
        self._segments.append(np.empty(room, np.uint8))
        self._free.append([(size, room - size)] if room > size else [])
        return len(self._segments) - 1, 0

    def _give_back(self, number: int, start: int, size: int) -> None:
        """Frees a place, and joins it with free neighbours."""
        free = self._free[number]
        insort(free, (start, size))
        i = free.index((start, size))
        for left in (i, i - 1):
            if 0 <= left < len(free) - 1 and sum(free[left]) == free[left + 1][0]:
                free[left : left + 2] = [(free[left][0], free[left][1] + free[left + 1][1])]


_CURRENT: ContextVar[Arena | None] = ContextVar("arena", default=None)


@contextlib.contextmanager
def arena() -> Iterator[None]:
    """A block in which :func:`empty` uses an arena of its own."""
    token = _CURRENT.set(Arena())
    try:
        yield
    finally:
        _CURRENT.reset(token)


def is_large(size: int) -> bool:
    """Whether so many bytes are worth the trouble."""
    return size >= _SMALLEST


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of another one's type and device whose entries can be anything; from the arena if there is one."""
    current = _CURRENT.get()
    if current is None or like.device.type != "cpu" or not is_large(prod(shape) * like.dtype.itemsize):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return current.empty(shape, like.dtype)
