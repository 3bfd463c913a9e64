"""Tangents: how a value moves with every group's rate, and how the tangents of several values become one's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Groups: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Jet:
    """The derivatives of a value by the rates of the groups that reach it.

    Args:
        second: the groups whose second derivative ẍ is known and not zero.  Each is in ``first``, too.
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


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are added to a jet: a tensor, or a function that computes them, into a given tensor if there is one."""

    second: Groups
    first: Groups
    rows: Tensor | Callable[[Tensor | None], Tensor]


class _Move(NamedTuple):
    source: slice
    target: slice
    is_new: bool


@functools.lru_cache(maxsize=4096)
def _layout(parts: tuple[tuple[Groups, Groups], ...]) -> tuple[Groups, Groups, tuple[tuple[_Move, ...], ...]]:
    """Where each part's rows go: the groups of the sum, and for each part its moves."""
    second = tuple(dict.fromkeys(g for part in parts for g in part[0]))
    first = tuple(dict.fromkeys(g for part in parts for g in part[1]))
    place = {(2, g): i for i, g in enumerate(second)} | {(1, g): len(second) + i for i, g in enumerate(first)}
    filled: set[int] = set()
    moves = []
    for part in parts:
        targets = [place[2, g] for g in part[0]] + [place[1, g] for g in part[1]]
        moves.append(tuple(_runs(targets, filled)))
        filled.update(targets)
    return second, first, tuple(moves)


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
    if len(parts) == 1 and isinstance(parts[0].rows, Tensor) and parts[0].rows.shape[1:] == like.shape:
        return Jet(parts[0].second, parts[0].first, parts[0].rows)
    second, first, moves = _layout(tuple((p.second, p.first) for p in parts))
    out = torch.empty((len(second) + len(first), *like.shape), dtype=like.dtype, device=like.device)
    for part, runs in zip(parts, moves, strict=True):
        _put(part, runs, out)
    return Jet(second, first, out)


def _put(part: Part, runs: Sequence[_Move], out: Tensor) -> None:
    rows = part.rows
    if not isinstance(rows, Tensor):
        if len(runs) == 1 and runs[0].is_new:
            rows(out[runs[0].target])
            return
        rows = rows(None)
    rows = lift(rows, out.dim() - 1)
    for source, target, is_new in runs:
        if is_new:
            out[target].copy_(rows[source])
        else:
            out[target].add_(rows[source])


def lift(rows: Tensor, dims: int) -> Tensor:
    """Rows of a value with fewer dimensions as rows that broadcast with those of a value with ``dims`` of them."""
    missing = dims - (rows.dim() - 1)
    return rows.view(rows.shape[0], *[1] * missing, *rows.shape[1:]) if missing > 0 else rows


def flat(rows: Tensor) -> Tensor:
    """Rows as a matrix."""
    return rows.reshape(len(rows), -1)


@functools.lru_cache(maxsize=4096)
def rows_of(groups: Groups, some: Groups) -> slice | list[int]:
    """Where some of the groups are: a slice where they lie together."""
    places = [groups.index(g) for g in some]
    together = bool(places) and places == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[0] + len(places)) if together else places


_BLOCK = 1 << 17  # entries


def blocks(length: int, width: int) -> Iterator[slice]:
    """Slices of ``length`` positions with about as many entries each as a cache holds, ``width`` for each position."""
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
