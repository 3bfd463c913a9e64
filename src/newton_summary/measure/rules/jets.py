"""Tangents: how a value moves with every group's rate, and how the tangents of several values become one's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from newton_summary.measure.arena import empty

Groups: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Jet:
    """The derivatives of a value by the rates of the groups that reach it.

    Args:
        second: the groups whose second derivative ẍ is known and not zero.  Each is in ``first``, too, and in the same
            order where these are as many.
        first: the groups that the value depends on.
        rows: ẍ of every group of ``second``, then ẋ of every group of ``first``: shape (rows, *value).
    """

    second: Groups
    first: Groups
    rows: Tensor

    @property
    def ddot(self) -> Tensor:
        """The second derivatives, one row for each group of ``second``."""
        return self.rows[: len(self.second)]

    @property
    def dot(self) -> Tensor:
        """The first derivatives, one row for each group of ``first``."""
        return self.rows[len(self.second) :]

    def like(self, rows: Tensor) -> Jet:
        """The same groups with other rows."""
        return Jet(self.second, self.first, rows)


Writer: TypeAlias = Callable[[slice, Tensor, bool], None]
"""Computes some rows and writes them into a tensor, or adds them to it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are added to a jet.

    Args:
        second: as in :class:`Jet`.
        first: as in :class:`Jet`.
        rows: a tensor, or a function that computes them.
        spare: whether nobody else will read this tensor, so that the sum may be made in it.
    """

    second: Groups
    first: Groups
    rows: Tensor | Writer
    spare: bool = False

    def jet(self) -> Jet:
        """The same as a jet, where the rows are known."""
        assert isinstance(self.rows, Tensor)
        return Jet(self.second, self.first, self.rows)


_NEARLY = 4 / 3


class _Move(NamedTuple):
    source: slice
    target: slice
    is_new: bool


class _Layout(NamedTuple):
    second: Groups
    first: Groups
    moves: tuple[tuple[_Move, ...], ...]
    zeros: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _layout(parts: tuple[tuple[Groups, Groups], ...]) -> _Layout:
    """Where each part's rows go: the groups of the sum, for each part its moves, and what stays zero.

    Where nearly all groups have second derivatives, all get a row: what curves tangents can then do so in place.
    """
    second = tuple(dict.fromkeys(g for part in parts for g in part[0]))
    first = tuple(dict.fromkeys(g for part in parts for g in part[1]))
    if set(second) <= set(first) and len(first) <= _NEARLY * len(second):
        second = first
    place = {(2, g): i for i, g in enumerate(second)} | {(1, g): len(second) + i for i, g in enumerate(first)}
    filled: set[int] = set()
    moves = []
    for part in parts:
        targets = [place[2, g] for g in part[0]] + [place[1, g] for g in part[1]]
        moves.append(tuple(_runs(targets, filled)))
        filled.update(targets)
    return _Layout(second, first, tuple(moves), tuple(sorted(set(place.values()) - filled)))


def _runs(targets: Sequence[int], filled: set[int]) -> list[_Move]:
    """Runs of rows that move together."""
    moves: list[_Move] = []
    start = 0
    for i in range(1, len(targets) + 1):
        if (
            i == len(targets)
            or targets[i] != targets[i - 1] + 1
            or ((targets[i] in filled) != (targets[start] in filled))
        ):
            target = slice(targets[start], targets[i - 1] + 1)
            moves.append(_Move(slice(start, i), target, targets[start] not in filled))
            start = i
    return moves


def combine(parts: Sequence[Part], like: Tensor) -> Jet:
    """The sum of jets.

    Args:
        parts: their rows broadcast to those of the sum.
        like: the value whose jet it is: its shape and type.
    """
    largest = parts[0]
    fits = isinstance(largest.rows, Tensor) and largest.rows.shape[1:] == like.shape
    if len(parts) == 1 and fits:
        return largest.jet()
    second, first, moves, zeros = _layout(tuple((p.second, p.first) for p in parts))
    in_place = fits and largest.spare and (second, first) == (largest.second, largest.first)
    if in_place and may_hold(largest.jet().rows, like):
        out = largest.jet().rows
        parts, moves = parts[1:], moves[1:]
    else:
        out = empty((len(second) + len(first), *like.shape), like)
        for row in zeros:
            out[row].zero_()
    for part, runs in zip(parts, moves, strict=True):
        for source, target, is_new in runs:
            _put(part.rows, source, out[target], not is_new)
    return Jet(second, first, out)


def may_hold(rows: Tensor, like: Tensor) -> bool:
    """Whether rows of a value such as this can be written into a tensor of the right shape."""
    return rows.dtype == like.dtype and rows.is_contiguous()


def _put(rows: Tensor | Writer, source: slice, out: Tensor, add: bool) -> None:
    if not isinstance(rows, Tensor):
        rows(source, out, add)
    elif add:
        out.add_(lift(rows, out.dim() - 1)[source])
    else:
        out.copy_(lift(rows, out.dim() - 1)[source])


def lift(rows: Tensor, dims: int) -> Tensor:
    """Rows of a value with fewer dimensions as rows that broadcast with those of a value with ``dims`` of them."""
    missing = dims - (rows.dim() - 1)
    return rows.view(rows.shape[0], *[1] * missing, *rows.shape[1:]) if missing > 0 else rows


def flat(rows: Tensor) -> Tensor:
    """Rows as a matrix."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def add_rows(target: Tensor, place: slice | list[int], rows: Tensor) -> None:
    """Adds to some rows, each of which stands there once."""
    if isinstance(place, slice):
        target[place].add_(rows)
    else:
        target[place] += rows


def dots(x: Tensor, y: Tensor) -> Tensor:
    """The dot products of rows of two matrices."""
    return (x * y).sum(1)


@functools.lru_cache(maxsize=4096)
def rows_of(groups: Groups, some: Groups) -> slice | list[int]:
    """Where some of the groups are: a slice where they lie together."""
    places = [groups.index(g) for g in some]
    together = bool(places) and places == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[0] + len(places)) if together else places


_BLOCK = 1 << 19  # entries


def blocks(length: int, width: int) -> Iterator[slice]:
    """Slices of ``length`` positions with about as many entries each as a cache holds, ``width`` for each position."""
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
