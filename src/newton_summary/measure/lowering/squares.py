"""Squares of lengths, absolute values and deviations, without the root that they undo.

A length has no derivative where it is zero; its square has all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.lowering.table import Lowering, aten


def square_of(op: Any) -> Lowering | None:
    """What gives the square of an operation's result, from the same arguments."""
    return _SQUARES.get(op)


def between(x: Tensor, y: Tensor) -> Tensor:
    """The differences of all points of two sets."""
    return x.unsqueeze(-2) - y.unsqueeze(-3)


def within(x: Tensor) -> Tensor:
    """The differences of all pairs of points of a set."""
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return x.index_select(0, first) - x.index_select(0, second)


def by_product(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The squared distances of all points of two sets, by one product, and the size of the terms of each."""
    x_size, y_size = (points.square().sum(-1, keepdim=True) for points in (x, y))
    left = torch.cat([-2 * x, x_size, torch.ones_like(x_size)], -1)
    right = torch.cat([y, torch.ones_like(y_size), y_size], -1)
    return left @ right.mT, x_size + y_size.mT


def _of_entries(x: Tensor) -> Tensor:
    return torch.view_as_real(x).square().sum(-1) if x.is_complex() else x.square()


def _of_norm(
    x: Tensor,
    ord: float = 2,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    if ord != 2 or dtype is not None:
        return NotImplemented
    return _of_entries(x).sum(list(dim) if dim else list(range(x.dim())), keepdim=keepdim)


def _of_distance(x: Tensor, y: Tensor, p: float = 2) -> Any:
    return _of_entries(x - y).sum() if p == 2 else NotImplemented


def _of_distances(x: Tensor, y: Tensor, p: float = 2, compute_mode: int | None = None) -> Any:
    return between(x, y).square().sum(-1) if p == 2 else NotImplemented


def _of_many_distances(x: Tensor, y: Tensor) -> Any:
    return by_product(x, y)[0]


def _of_distances_within(x: Tensor, p: float = 2) -> Any:
    return within(x).square().sum(-1) if p == 2 else NotImplemented


_SQUARES: dict[Any, Lowering] = {
    aten.abs.default: _of_entries,
    aten.linalg_vector_norm.default: _of_norm,
    aten.dist.default: _of_distance,
    aten._cdist_forward.default: _of_distances,
    aten._euclidean_dist.default: _of_many_distances,
    aten._pdist_forward.default: _of_distances_within,
    aten.std.correction: aten.var.correction,
}
