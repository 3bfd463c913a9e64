"""Losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.lowering.table import CONSTANT, as_it_is, aten, lowers


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    return (loss, loss.mean(), loss.sum())[reduction] if reduction else loss


@lowers(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
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


@lowers(aten.huber_loss.default)
def _huber_loss(x: Tensor, y: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    difference = x - y
    inner = torch.where(difference.abs() < delta, difference, delta * difference.sign())
    return _reduced(inner * difference - 0.5 * inner.square(), reduction)


@lowers(aten.smooth_l1_loss.default)
def _smooth_l1_loss(x: Tensor, y: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    if beta == 0:
        return _reduced((x - y).abs(), reduction)
    return _huber_loss(x, y, reduction, beta) / beta  # type: ignore[no-any-return]


@lowers(aten.binary_cross_entropy.default)
def _binary_cross_entropy(x: Tensor, y: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    loss = (y - 1) * (-x).log1p().clamp_min(-100) - y * x.log().clamp_min(-100)
    return _reduced(loss if weight is None else loss * weight, reduction)


@lowers(aten.multi_margin_loss.default)
def _multi_margin_loss(
    x: Tensor, target: Tensor, p: float = 1, margin: float = 1, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """For each sample the mean over the classes but its own of max(0, margin − x_target + x)^p."""
    rows, labels = (x, target) if x.dim() > 1 else (x.reshape(1, -1), target.reshape(1))
    own = labels.unsqueeze(1)
    short = margin - rows.gather(1, own) + rows
    counts = (short > 0) & (torch.arange(rows.shape[1], device=x.device) != own)
    excess = torch.where(counts, short, 0.0)
    excess = excess if p == 1 else excess.square()
    excess = excess if weight is None else excess * weight.gather(0, labels).unsqueeze(1)
    loss = excess.mean(1)
    return _reduced(loss if x.dim() > 1 else loss.squeeze(0), reduction)


@lowers(aten.multilabel_margin_loss_forward.default)
def _multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """The sum of max(0, 1 − x_label + x) over all labels and all other classes, by the number of classes.

    Args:
        x: (samples, classes), or one sample.
        target: the labels, up to the first −1.
        reduction: as torch numbers them.
    """
    rows, labels = (x, target) if x.dim() > 1 else (x.reshape(1, -1), target.reshape(1, -1))
    listed = (labels == -1).cumsum(1) == 0
    safe = torch.where(listed, labels, 0)
    is_label = torch.zeros_like(rows).scatter_add(1, safe, listed.to(x.dtype)) > 0
    short = 1 - rows.gather(1, safe).unsqueeze(2) + rows.unsqueeze(1)
    counts = (short > 0) & listed.unsqueeze(2) & ~is_label.unsqueeze(1)
    loss = torch.where(counts, short, 0.0).sum((1, 2)) / rows.shape[1]
    return _reduced(loss if x.dim() > 1 else loss.squeeze(0), reduction), is_label.to(x.dtype).reshape(target.shape)


@lowers(aten._ctc_loss.default, aten._ctc_loss.Tensor)
def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    """Connectionist temporal classification: the forward variables of Graves et al. (2006), relative to their values.

    Each α_t(s) is divided by its value, known as a constant, so that all are 1 and nothing overflows or vanishes.

    Args:
        log_probs: (time, samples, classes).
        targets: (samples, labels), or the labels of all samples one after another.
        input_lengths: for each sample.
        target_lengths: for each sample.
        blank: the class between labels.
        zero_infinity: whether a sample whose labels do not fit counts as zero.
    """
    if log_probs.dim() == 2:  # one sample
        loss, alphas = _ctc_loss(
            log_probs.unsqueeze(1), targets.flatten(), input_lengths, target_lengths, blank, zero_infinity
        )
        return loss.squeeze(0), alphas
    known, alphas = _ctc_values(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    device = log_probs.device
    times = len(log_probs)
    lengths, label_lengths = (torch.as_tensor(n, device=device).flatten() for n in (input_lengths, target_lengths))
    states = _ctc_states(targets.to(device), label_lengths, alphas.shape[-1], blank)
    inside = torch.arange(alphas.shape[-1], device=device) <= 2 * label_lengths[:, None]
    skips = (states != blank) & (states != states.roll(2, 1)) & (torch.arange(alphas.shape[-1], device=device) > 1)
    emitted = log_probs.gather(2, states.expand(times, *states.shape))
    moving = (emitted - CONSTANT(emitted)).exp()  # 1, with all derivatives
    constant = CONSTANT(emitted)
    started = torch.arange(alphas.shape[-1], device=device) < 2
    current = torch.where(started & inside & _reached(alphas[:, 0]), moving[0], 0.0)
    for t in range(1, times):
        before, now = alphas[:, t - 1], alphas[:, t]
        usable = inside & _reached(now) & (t < lengths)[:, None]
        total = torch.zeros_like(constant[t])
        for shift in range(3):
            allowed = usable & _reached(before.roll(shift, 1)) & (torch.arange(now.shape[-1], device=device) >= shift)
            allowed = allowed & skips if shift == 2 else allowed
            gain = torch.where(allowed, (before.roll(shift, 1) + constant[t] - now).exp(), 0.0)
            total = total + current.roll(shift, 1) * gain
        current = torch.where((t < lengths)[:, None], total * moving[t], current)
    last = alphas.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, alphas.shape[-1])).squeeze(1)
    place = torch.arange(alphas.shape[-1], device=device)
    final = (place >= 2 * label_lengths[:, None] - 1) & inside & _reached(last)
    share = torch.where(final, (last + known[:, None]).exp(), 0.0)
    possible = known.isfinite()
    likelihood = torch.where(possible, (current * share).sum(1), 1.0)
    worst = torch.zeros_like(known) if zero_infinity else known
    return torch.where(possible, known - likelihood.log(), worst), alphas


def _ctc_values(log_probs: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The losses, and the logarithms of all α_t(s), (samples, time, states), by torch's own."""
    some_list = any(isinstance(r, list | tuple) for r in rest)
    op = aten._ctc_loss.default if some_list else aten._ctc_loss.Tensor
    loss, alphas = as_it_is(op, CONSTANT(log_probs), *rest)
    return loss, alphas


def _reached(log_alpha: Tensor) -> Tensor:
    return log_alpha.isfinite()


def _ctc_states(targets: Tensor, lengths: Tensor, count: int, blank: int) -> Tensor:
    """The labels of each sample with blanks before, between and after: (samples, states)."""
    place = torch.arange(count, device=targets.device)
    label = (place // 2).expand(len(lengths), count)
    if targets.dim() == 1:
        first = lengths.cumsum(0) - lengths
        label = first[:, None] + label
        labels = targets.gather(0, label.clamp(0, max(len(targets) - 1, 0)).flatten()).view(label.shape)
    else:
        labels = targets.gather(1, label.clamp(0, max(targets.shape[1] - 1, 0)))
    return torch.where((place % 2 == 1) & (place // 2 < lengths[:, None]), labels, blank)
