"""Softmax, its logarithm, and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.lowering.table import CONSTANT, aten, lowers


def _along_the_end(op: Any, x: Tensor, dim: int, half_to_float: bool) -> Any:
    """Softmax and its logarithm have rules for the last dimension, and for one type."""
    if half_to_float:
        x = x.float()
    elif x.dim() > 0 and dim % x.dim() == x.dim() - 1:
        return NotImplemented
    if x.dim() == 0:
        return x - x if op is aten._log_softmax.default else (x - x).exp()
    return op(x.transpose(dim, -1), -1, False).transpose(dim, -1)


@lowers(aten._softmax.default)
def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    return _along_the_end(aten._softmax.default, x, dim, half_to_float)


@lowers(aten._log_softmax.default)
def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    return _along_the_end(aten._log_softmax.default, x, dim, half_to_float)


@lowers(aten._safe_softmax.default)
def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """A softmax whose rows of minus infinity alone are zero."""
    x = x if dtype is None else x.to(dtype)
    empty = (x == -torch.inf).all(dim, keepdim=True)
    return torch.where(empty, 0.0, aten._softmax.default(torch.where(empty, 0.0, x), dim, False))


@lowers(aten.logsumexp.default)
def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    largest = x.amax(dim, keepdim=True)
    largest = CONSTANT(torch.where(largest.isfinite(), largest, 0.0))
    total = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return total if keepdim else total.sum(dim)  # type: ignore[no-any-return]


@lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention without dropout in fewer operations than torch's own.

    Args:
        q: queries, (…, heads, length, width).
        k: keys; of fewer heads, where groups of queries share them.
        v: values, likewise.
        mask: what is added to the scores, or where they count; broadcasts to them.
        is_causal: whether scores of later keys do not count.
        scale: of the scores.  Default: one over the root of the width.

    Returns:
        A mean of the values for each query; zero where the mask lets none through.
    """
    k, v = (x if x.shape[-3] == q.shape[-3] else x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    batch = q.shape[:-2]
    is_flat = len(batch) > 1 and batch == k.shape[:-2] == v.shape[:-2]
    if is_flat:  # often views of one tensor, whose tangents can go when all three are copied
        q, k, v = (x.flatten(0, -3) for x in (q, k, v))
    scores = q @ k.mT
    closed = None
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores + torch.zeros(scores.shape[-2:], dtype=q.dtype, device=q.device).masked_fill(future, -torch.inf)
    if mask is not None:
        added, closed = _opened(mask, q.dtype)
        scores = scores.unflatten(0, batch) + added if is_flat else scores + added
    weights = scores.softmax(-1)
    mixed = (weights.flatten(0, -3) if is_flat and mask is not None else weights) @ v
    mixed = mixed.unflatten(0, batch) if is_flat else mixed
    return mixed if closed is None else mixed.masked_fill(closed, 0.0)


def _opened(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is added to scores, without rows that let nothing through, and which rows those were."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    closed = (CONSTANT(mask) == -torch.inf).all(-1, keepdim=True)
    return mask.to(dtype).masked_fill(closed, 0.0), closed
