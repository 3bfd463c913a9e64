"""Who holds what in a piece of memory that several tensors look at, some of which are written in place.

Where a graph is recorded, a value that is overwritten gets a new name, and whatever else looks at the same memory is
read from it anew: this is what makes operations in place functional.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Geometry(NamedTuple):
    """How a tensor looks at its memory."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    conjugate: bool = False
    negative: bool = False


def geometry(tensor: Tensor) -> Geometry:
    """How a tensor looks at its memory."""
    where = int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride(), tensor.dtype
    return Geometry(*where, tensor.is_conj(), tensor.is_neg())


@functools.lru_cache(maxsize=256)
def _positions(view: Geometry) -> NDArray[np.int64]:
    """The places in memory of all entries, in their order."""
    places = np.asarray(view.offset)
    for size, stride in zip(view.size, view.stride, strict=True):
        places = places[..., None] + np.arange(size) * stride
    return places.reshape(-1)


@functools.lru_cache(maxsize=4096)
def overlaps(one: Geometry, other: Geometry) -> bool:
    """Whether two tensors look at a common entry."""
    if one.dtype != other.dtype:
        return True
    (a, b), (c, d) = _range(one), _range(other)
    return a < d and c < b and np.intersect1d(_positions(one), _positions(other)).size > 0


def _range(view: Geometry) -> tuple[int, int]:
    if 0 in view.size:
        return view.offset, view.offset
    return view.offset, view.offset + 1 + sum((n - 1) * s for n, s in zip(view.size, view.stride, strict=True))


@functools.lru_cache(maxsize=256)
def _places(whole: Geometry, views: tuple[Geometry, ...]) -> NDArray[np.int64]:
    """Where the entries of some views are in the flattened whole.

    Raises:
        ValueError: the whole does not hold them, or holds an entry twice.
    """
    inside = _positions(whole)
    number = np.full(max([inside.max(initial=-1), *(_positions(v).max(initial=-1) for v in views)]) + 1, -1)
    number[inside] = np.arange(len(inside))
    found = number[np.concatenate([_positions(v) for v in views])]
    if (found < 0).any() or len(np.unique(inside)) != len(inside) or any(v.dtype != whole.dtype for v in views):
        raise ValueError("two tensors look at the same memory in ways that cannot be told apart")
    places: NDArray[np.int64] = found
    return places


@dataclass(frozen=True, slots=True)
class Views:
    """A tensor that looks at all of a piece of memory, and others that look at parts of it."""

    whole: Geometry
    parts: tuple[Geometry, ...]


def _seen(x: Tensor, by: Geometry, of: Geometry) -> Tensor:
    """A value that one view shows as another one does: conjugates and opposites are views, too."""
    x = x.conj() if by.conjugate != of.conjugate else x
    return -x if by.negative != of.negative else x


def read_memory(x: Tensor, views: Views) -> Tensor:
    """What the only part shows, where the whole shows ``x``."""
    index = torch.from_numpy(_places(views.whole, views.parts)).to(x.device)
    part = x.reshape(-1).index_select(0, index).reshape(views.parts[0].size)
    return _seen(part, views.parts[0], views.whole)


def write_memory(x: Tensor, views: Views, *values: Tensor) -> Tensor:
    """What the whole shows after values were written to some parts of it, of which no two overlap."""
    places = _places(views.whole, views.parts)
    written = torch.cat([_seen(v, views.whole, p).reshape(-1) for v, p in zip(values, views.parts, strict=True)])
    if len(places) == x.numel():
        order = np.empty_like(places)
        order[places] = np.arange(len(places))
        return written.index_select(0, torch.from_numpy(order).to(x.device)).reshape(x.shape)
    return x.reshape(-1).scatter(0, torch.from_numpy(places).to(x.device), written).reshape(x.shape)


@dataclass(slots=True)
class Memory:
    """A piece of memory with moving values in it.

    Attributes:
        views: what each known view of it shows: a slot.
        whole: a view that holds all others, and the slot that it showed when ``pending`` began.
        pending: views and slots that were written since.
        objects: the tensors that are known to look at it.
    """

    views: dict[Geometry, int]
    whole: tuple[Geometry, int]
    pending: list[tuple[Geometry, int]] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)

    def write(self, view: Geometry, slot: int) -> None:
        """Notes that a view now shows another value."""
        for other in [v for v in self.views if v != view and overlaps(v, view)]:
            del self.views[other]
        self.views[view] = slot
        if view == self.whole[0]:
            self.whole = (view, slot)
            self.pending.clear()
        else:
            self.pending.append((view, slot))

    def read(self, view: Geometry, emit: Callable[..., int]) -> int:
        """The slot that a view shows.

        Args:
            view: how it looks at the memory.
            emit: records the call of a function on a first slot, views, and further slots; gives its slot.
        """
        known = self.views.get(view)
        if known is not None:
            return known
        self._settle(emit)
        shape, slot = self.whole
        if view != shape:
            slot = emit(read_memory, (slot,), Views(shape, (view,)))
        self.views[view] = slot
        return slot

    def _settle(self, emit: Callable[..., int]) -> None:
        """Writes what is pending into the whole, as many at once as do not overlap."""
        shape, slot = self.whole
        while self.pending:
            some: list[tuple[Geometry, int]] = []
            while self.pending and not any(overlaps(self.pending[0][0], v) for v, _ in some):
                some.append(self.pending.pop(0))
            views = Views(shape, tuple(v for v, _ in some))
            slot = emit(write_memory, (slot, *(s for _, s in some)), views)
        self.whole = (shape, slot)
        self.views[shape] = slot
