"""Shrinkage: a summary whose quadratic model draws the rates to targets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from newton_summary._checks import check_not_negative
from newton_summary.summary import Summary


def shrink(summary: Summary, strength: float, target: str = "shared") -> Summary:
    """The summary with H̄ + Diag(w) and ḡ + w t in place of H̄ and ḡ: rates are drawn to targets t with weights w.

    This adds ½ Σ_s w_s (η_s − t_s)², up to a constant, to the quadratic model.  With w_s = ρ |tᵀH̄t| / (S t_s²), to
    move any group's rate by its whole target costs the same: half ρ/S of the curvature along all targets together.
    Groups at which more is at stake than that are free; those at which hardly anything is, whose own gradient and
    curvature noise or the overshoot of others decides, have the target.  Targets are never negative.

    - ``"shared"``: one rate for all groups, max(Σḡ, 0) / |ΣH̄|.  It depends on the units of the groups.
    - ``"invariant"``: c max(ḡ_s, 0) / |H̄_ss|, each group's own rate times the c that is best for all of them together,
      c = ḡᵀη / |ηᵀH̄η| along η_s = max(ḡ_s, 0) / |H̄_ss|.  When a group is rescaled by a positive number its target
      follows, so a solver's invariance is kept.

    Where the curvature that a target would be divided by is 0, the target is 0; where it is negative, its size counts.
    A target of 0 has the weight ρ |H̄_ss|.

    Args:
        summary: with the second order.  It may hold numbers that are not finite; so will the result.
        strength: ρ, not negative; 0 changes nothing.
        target: ``"shared"`` or ``"invariant"``.

    Returns:
        A summary on the host.  Its loss, third and higher orders are those of ``summary``.

    Raises:
        ValueError: the second order was not measured, the strength is not a number from 0 on, or the target is unknown.

    Source:
        docs/method.md, section 2.

    Example:
        >>> summary = Summary(loss=1.0, gradient=[2.0, 1.0], hessian=[[1.0, 0.0], [0.0, 4.0]])
        >>> shrink(summary, 1.0).gradient  # the shared rate is 3/5, the weight of each 5/2
        tensor([3.5000, 2.5000], dtype=torch.float64)
    """
    check_not_negative("strength", strength)
    host = summary.cpu()
    rates = target_rates(host, target)
    assert host.hessian is not None
    whole = (rates @ host.hessian @ rates).abs() / len(rates)
    weights = strength * torch.where(rates == 0, host.hessian.diagonal().abs(), whole / rates.square())
    return replace(host, gradient=host.gradient + weights * rates, hessian=host.hessian + weights.diag())


def target_rates(summary: Summary, target: str = "shared") -> Tensor:
    """The targets t that :func:`shrink` draws the rates to, shape (S,), on the host: what remains as ρ grows.

    Args:
        summary: with the second order.
        target: ``"shared"`` or ``"invariant"``.

    Raises:
        ValueError: the second order was not measured, or the target is unknown.

    Example:
        >>> target_rates(Summary(loss=1.0, gradient=[2.0, 1.0], hessian=[[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.6000, 0.6000], dtype=torch.float64)
    """
    if target not in _TARGETS:
        raise ValueError(f"no target is called {target!r}: the targets are {', '.join(map(repr, _TARGETS))}")
    host = summary.cpu()
    if host.hessian is None:
        raise ValueError("shrinkage needs the second order, which was not measured: summarize(..., order=2)")
    return _TARGETS[target](host.gradient, host.hessian)


def _shared(gradient: Tensor, hessian: Tensor) -> Tensor:
    return _divide(gradient.sum().clamp(min=0), hessian.sum().abs()).expand_as(gradient)


def _invariant(gradient: Tensor, hessian: Tensor) -> Tensor:
    alone = _divide(gradient.clamp(min=0), hessian.diagonal().abs())
    return alone * _divide(gradient @ alone, (alone @ hessian @ alone).abs())


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """The quotient; 0 where the divisor is."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


_TARGETS = {"shared": _shared, "invariant": _invariant}
