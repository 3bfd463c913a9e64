"""Fused operations written as simpler ones, which the rules know (docs/engine.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

CONSTANT = aten.detach_copy.default
"""Marks a value that counts as a constant: what the loss detached, or computed without gradients."""

Lowering = Callable[..., Any]

_OWN: dict[Any, Lowering] = {}


def lowering_of(op: Any) -> Lowering | None:
    """What an operation is decomposed by: ours, or torch's where no rule takes the operation as it is."""
    from newton_summary.measure.rules import has_rule

    own = _OWN.get(op)
    return own if own is not None or has_rule(op) else _torch_lowerings().get(op)


@functools.cache
def _torch_lowerings() -> dict[Any, Lowering]:
    from torch._decomp import core_aten_decompositions  # takes long to load, and small networks do without

    return dict(core_aten_decompositions())


def _lowers(*ops: Any) -> Callable[[Lowering], Lowering]:
    def put(function: Lowering) -> Lowering:
        _OWN.update(dict.fromkeys(ops, function))
        return function

    return put


def _normalised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """A value minus its mean, divided by its deviation; with the mean and the reciprocal deviation."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    reciprocal = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * reciprocal, mean, reciprocal


def _channels(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.view(1, -1, *[1] * (x.dim() - 2))


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None and bias is not None:
        return torch.addcmul(bias, x, weight)
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


@_lowers(aten.native_layer_norm.default)
def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    if weight is None and bias is None:
        return NotImplemented  # it has a rule
    normal, mean, reciprocal = aten.native_layer_norm.default(x, shape, None, None, eps)
    return _scaled(normal, weight, bias), mean, reciprocal


@_lowers(aten._fused_rms_norm.default)
def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    reciprocal = (x.square().mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _scaled(x * reciprocal, weight, None), reciprocal


@_lowers(aten.native_group_norm.default)
def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normal, mean, reciprocal = _normalised(x.reshape(n, groups, -1), [2], eps)
    w = None if weight is None else _channels(weight, x)
    b = None if bias is None else _channels(bias, x)
    return _scaled(normal.reshape(x.shape), w, b), mean.view(n, groups), reciprocal.view(n, groups)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    w = None if weight is None else _channels(weight, x)
    b = None if bias is None else _channels(bias, x)
    if training or running_mean is None or running_var is None:
        normal, mean, reciprocal = _normalised(x, [0, *range(2, x.dim())], eps)
        return _scaled(normal, w, b), mean.flatten(), reciprocal.flatten()
    scale = (_channels(running_var, x) + eps).rsqrt()
    shifted = x - _channels(running_mean, x)
    if w is not None:
        scale = scale * w
    return _scaled(shifted, scale, b), x.new_empty(0), x.new_empty(0)


@_lowers(aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
def _batch_norm_with_statistics(
    x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, w, b, mean, var, training, eps)


@_lowers(aten._native_batch_norm_legit.no_stats)
def _batch_norm_of_batch(
    x: Tensor, w: Any, b: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, w, b, None, None, True, eps)


@_lowers(aten.cudnn_batch_norm.default)
def _cudnn_batch_norm(
    x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_batch_norm(x, w, b, mean, var, training, eps), x.new_empty(0, dtype=torch.uint8))


def _along_the_end(op: Any, x: Tensor, dim: int, half_to_float: bool) -> Any:
    """Softmax and its logarithm have rules for the last dimension, and for one type."""
    if half_to_float:
        x = x.float()
    elif x.dim() > 0 and dim % x.dim() == x.dim() - 1:
        return NotImplemented
    if x.dim() == 0:
        return x - x if op is aten._log_softmax.default else (x - x).exp()
    return op(x.transpose(dim, -1), -1, False).transpose(dim, -1)


@_lowers(aten._softmax.default)
def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    return _along_the_end(aten._softmax.default, x, dim, half_to_float)


@_lowers(aten._log_softmax.default)
def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    return _along_the_end(aten._log_softmax.default, x, dim, half_to_float)


@_lowers(aten._safe_softmax.default)
def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """A softmax whose rows of minus infinity alone are zero."""
    x = x if dtype is None else x.to(dtype)
    empty = (x == -torch.inf).all(dim, keepdim=True)
    return torch.where(empty, 0.0, aten._softmax.default(torch.where(empty, 0.0, x), dim, False))


@_lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, attn_mask, is_causal, scale), q.new_zeros(())


@_lowers(aten.copy.default)
def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attention in as few operations as it takes.

    Args:
        q: queries, shape (…, L, E).
        k: keys, shape (…, M, E).
        v: values, shape (…, M, F).
        mask: what is added to the scores, shape (…, L, M); rows of minus infinity alone attend to nothing.
        is_causal: whether later keys are not seen.
        scale: of the scores.  Default: 1/√E.
    """
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    batch = q.shape[:-2]
    is_flat = len(batch) > 1 and batch == k.shape[:-2] == v.shape[:-2]
    if is_flat:  # often views of one tensor, whose tangents can go when all three are copied
        q, k, v = (x.flatten(0, -3) for x in (q, k, v))
    scores = q @ k.mT
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores + torch.zeros(scores.shape[-2:], dtype=q.dtype, device=q.device).masked_fill(future, -torch.inf)
    if mask is None:
        mixed = scores.softmax(-1) @ v
        return mixed.unflatten(0, batch) if is_flat else mixed
    blind = (mask == -torch.inf).all(-1, keepdim=True)
    mask = torch.where(blind, 0.0, mask)
    if is_flat:
        mixed = (scores.unflatten(0, batch) + mask).flatten(0, -3).softmax(-1) @ v
        mixed = mixed.unflatten(0, batch)
    else:
        mixed = (scores + mask).softmax(-1) @ v
    return torch.where(blind, 0.0, mixed)


@_lowers(aten.logsumexp.default)
def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    largest = x.amax(dim, keepdim=True)
    largest = CONSTANT(torch.where(largest.isfinite(), largest, 0.0))
    total = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return total if keepdim else total.sum(dim)  # type: ignore[no-any-return]


@_lowers(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def _nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    axis = 0 if x.dim() == 1 else 1
    kept = target != ignore_index
    safe = torch.where(kept, target, 0)
    picked = x.gather(axis, safe.unsqueeze(axis)).squeeze(axis)
    scale = (
        kept.to(x.dtype) if weight is None else torch.where(kept, weight.gather(0, safe.flatten()).view_as(safe), 0.0)
    )
    loss, total = -picked * scale, scale.sum()
    if reduction == 0:
        return loss, x.new_zeros(())
    return (loss.sum() / total if reduction == 1 else loss.sum()), total


@_lowers(aten.div.Tensor)
def _div(x: Tensor, y: Any) -> Any:
    """A quotient of tensors as a product."""
    if not isinstance(y, Tensor):
        return NotImplemented
    if not y.is_floating_point() and not y.is_complex():
        y = y.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())
    return x * y.reciprocal()


@_lowers(aten.maximum.default)
def _maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x == y, (x + y) / 2, torch.where(x > y, x, y))


@_lowers(aten.minimum.default)
def _minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x == y, (x + y) / 2, torch.where(x < y, x, y))


@_lowers(aten.huber_loss.default)
def _huber_loss(x: Tensor, y: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    difference = x - y
    inner = difference.clamp(-delta, delta)
    return _reduced(inner * difference - 0.5 * inner.square(), reduction)


@_lowers(aten.smooth_l1_loss.default)
def _smooth_l1_loss(x: Tensor, y: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    if beta == 0:
        return _reduced((x - y).abs(), reduction)
    return _huber_loss(x, y, reduction, beta) / beta  # type: ignore[no-any-return]


@_lowers(aten.binary_cross_entropy.default)
def _binary_cross_entropy(x: Tensor, y: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    loss = (y - 1) * (-x).log1p().clamp_min(-100) - y * x.log().clamp_min(-100)
    return _reduced(loss if weight is None else loss * weight, reduction)


@_lowers(aten.mish.default)
def _mish(x: Tensor) -> Tensor:
    return x * torch.nn.functional.softplus(x).tanh()


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    return (loss, loss.mean(), loss.sum())[reduction] if reduction else loss


@_lowers(aten.split_with_sizes.default)
def _split_with_sizes(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@_lowers(aten.split.Tensor)
def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    return [x.narrow(dim, s, min(size, x.shape[dim] - s)) for s in range(0, x.shape[dim], size)] or [x]


@_lowers(aten.unbind.int)
def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, i) for i in range(x.shape[dim])]


@_lowers(aten.addcmul.default)
def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Any:
    return NotImplemented if value == 1 else x + value * (a * b)


@_lowers(aten.addmm.default)
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return NotImplemented if beta == alpha == 1 else beta * bias + alpha * (a @ b)


@_lowers(aten.baddbmm.default)
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = a @ b if alpha == 1 else alpha * (a @ b)
    return product if beta == 0 else (bias if beta == 1 else beta * bias) + product


@_lowers(aten.var.correction)
def _var(x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]  # type: ignore[no-any-return]


@_lowers(aten.var_mean.correction)
def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(dim) if dim else list(range(x.dim()))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    count = x.numel() // max(mean.numel(), 1)
    variance = centred.square().sum(dims, keepdim=keepdim) / max(count - (1 if correction is None else correction), 0)
    return variance, mean if keepdim else mean.sum(dims)
