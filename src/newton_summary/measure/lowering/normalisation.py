"""Normalisations.  As torch's own they compute half precision in single, and give the type of what they were given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.half import wide
from newton_summary.measure.lowering.table import as_it_is, aten, lowers


def _channels(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else wide(parameter).view(1, -1, *[1] * (x.dim() - 2))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if weight is not None and bias is not None:
        x = torch.addcmul(bias, x, weight)
    elif weight is not None:
        x = x * weight
    elif bias is not None:
        x = x + bias
    return x if x.dtype == dtype else x.to(dtype)


def _standardised(x: Tensor, eps: float) -> Any:
    """With mean 0 and variance 1 along the last dimension, for which there is a rule; its mean and scale."""
    return aten.native_layer_norm.default(x, [x.shape[-1]], None, None, eps)


@lowers(aten.native_layer_norm.default)
def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    value, dims = wide(x), [*range(-len(shape), 0)]
    normal, *_ = as_it_is(aten.native_layer_norm.default, value, shape, None, None, eps)  # it has a rule
    mean = value.mean(dims, keepdim=True)
    reciprocal = ((value - mean).square().mean(dims, keepdim=True) + eps).rsqrt()  # for backward passes in a loss
    w, b = (None if p is None else wide(p) for p in (weight, bias))
    return _scaled(normal, w, b, x.dtype), mean, reciprocal


@lowers(aten._fused_rms_norm.default)
def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    value = wide(x)
    reciprocal = (value.square().mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    w = None if weight is None else wide(weight)
    return _scaled(value * reciprocal, w, None, x.dtype), reciprocal


@lowers(aten.native_group_norm.default)
def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normal, mean, reciprocal = _standardised(wide(x).reshape(n, groups, -1), eps)
    scaled = _scaled(normal.reshape(x.shape), _channels(weight, x), _channels(bias, x), x.dtype)
    return scaled, mean.view(n, groups), reciprocal.view(n, groups)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    w, b, value = _channels(weight, x), _channels(bias, x), wide(x)
    if training or running_mean is None or running_var is None:
        channels = value.transpose(0, 1)
        normal, mean, reciprocal = _standardised(channels.flatten(1), eps)
        whole = normal.reshape(channels.shape).transpose(0, 1)
        return _scaled(whole, w, b, x.dtype), mean.flatten(), reciprocal.flatten()
    shift, variance = _channels(running_mean, x), _channels(running_var, x)
    assert shift is not None
    assert variance is not None
    scale = (variance + eps).rsqrt()
    if w is not None:
        scale = scale * w
    return _scaled(value - shift, scale, b, x.dtype), x.new_empty(0), x.new_empty(0)


@lowers(aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
def _batch_norm_with_statistics(
    x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, w, b, mean, var, training, eps)


@lowers(aten._native_batch_norm_legit.no_stats)
def _batch_norm_of_batch(
    x: Tensor, w: Any, b: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, w, b, None, None, True, eps)


@lowers(aten.cudnn_batch_norm.default)
def _cudnn_batch_norm(
    x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_batch_norm(x, w, b, mean, var, training, eps), x.new_empty(0, dtype=torch.uint8))
