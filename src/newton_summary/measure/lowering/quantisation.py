"""Rounding to a grid whose slope is one by intention: straight through where a value is within the grid, else zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.lowering.table import CONSTANT, as_it_is, aten, lowers

FUSED = aten._fused_moving_avg_obs_fq_helper.default
"""Follows the range of what comes, and rounds it to a grid over that."""


def _straight_through(x: Tensor, rounded: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded value, which is that of a constant, moving like ``x``."""
    return rounded + torch.where(within, x - CONSTANT(x), 0.0), within


def _rounds(op: Any) -> None:
    lowers(op)(lambda x, *args, **kwargs: _straight_through(x, *as_it_is(op, CONSTANT(x), *args, **kwargs)))


for _op in (
    aten.fake_quantize_per_tensor_affine_cachemask.default,
    aten.fake_quantize_per_channel_affine_cachemask.default,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default,
):
    _rounds(_op)


@lowers(FUSED)
def _fused(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """It overwrites ranges and grids, in single precision: those that are recorded are what they were before."""
    apart = [_single(a) if isinstance(a, Tensor) else a for a in args]
    rounded, within = as_it_is(FUSED, CONSTANT(x).float(), *apart, **kwargs)
    return _straight_through(x, rounded.to(x.dtype), within)


def _single(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.is_floating_point() else x.dtype, copy=True)
