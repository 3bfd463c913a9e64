"""Arithmetic, means and deviations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.lowering.table import CONSTANT, as_it_is, aten, lowers, same_type


@lowers(aten.div.Tensor)
def _div(x: Tensor, y: Any) -> Any:
    """A quotient of tensors as a product."""
    if isinstance(y, complex):
        return x * (1 / y)
    if not isinstance(y, Tensor):
        return NotImplemented
    if not y.is_floating_point() and not y.is_complex():
        y = y.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())
    return x * y.reciprocal()


@lowers(aten.maximum.default)
def _maximum(x: Tensor, y: Tensor) -> Any:
    if not x.is_floating_point():
        return NotImplemented
    return torch.where(x == y, (x + y) / 2, torch.where(x > y, x, y))


@lowers(aten.minimum.default)
def _minimum(x: Tensor, y: Tensor) -> Any:
    if not x.is_floating_point():
        return NotImplemented
    return torch.where(x == y, (x + y) / 2, torch.where(x < y, x, y))


@lowers(aten.mish.default)
def _mish(x: Tensor) -> Tensor:
    return x * torch.nn.functional.softplus(x).tanh()


@lowers(aten.addcmul.default)
def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Any:
    is_plain = value == 1 and not a.is_complex() and not b.is_complex() and same_type(x, a, b)
    return NotImplemented if is_plain else x + value * (a * b)


@lowers(aten.addmm.default)
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    is_plain = beta == alpha == 1 and not a.is_complex() and not b.is_complex()
    return NotImplemented if is_plain else beta * bias + alpha * (a @ b)


@lowers(aten.baddbmm.default)
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = a @ b if alpha == 1 else alpha * (a @ b)
    return product if beta == 0 else (bias if beta == 1 else beta * bias) + product


@lowers(aten.var.correction)
def _var(x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]  # type: ignore[no-any-return]


@lowers(aten.var_mean.correction)
def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(dim) if dim else list(range(x.dim()))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    count = x.numel() // max(mean.numel(), 1)
    variance = centred.square().sum(dims, keepdim=keepdim) / max(count - (1 if correction is None else correction), 0)
    return variance, mean if keepdim else mean.sum(dims)


def _step(op: Any) -> None:
    """Says that a function is constant wherever it has a slope."""
    lowers(op)(lambda x, *args, **kwargs: as_it_is(op, CONSTANT(x), *args, **kwargs))


for _op in (
    aten.floor.default,
    aten.ceil.default,
    aten.trunc.default,
    aten.round.default,
    aten.round.decimals,
    aten.sign.default,
):
    _step(_op)
