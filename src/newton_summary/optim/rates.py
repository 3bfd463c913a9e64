"""From measurements to rates: what a training run remembers of its summaries, and which rates it takes from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from newton_summary import solve
from newton_summary._checks import check_fraction, check_not_negative
from newton_summary.optim.summary_average import SummaryAverage
from newton_summary.solve import Status
from newton_summary.summary import Summary

_EXPLOSION = 1000.0


class RateRule(Protocol):
    """What turns the measurements of a run into rates."""

    @property
    def rates(self) -> Tensor | None:
        """η ≥ 0, shape (S,), float64 on the host; ``None`` before the first solve that succeeded."""
        ...

    def update(self, summary: Summary) -> Status:
        """Takes a measurement in; where it or its solve fails, the rates stay as they were."""
        ...

    def scale(self, factor: float) -> None:
        """Multiplies every rate."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that is remembered, as plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        ...


class PaperRates:
    """The paper's rule: solve each measurement by itself, average the solutions, cut negative rates to zero.

    Source: Algorithm 1 of arXiv:2312.03885 (docs/method.md, section 2).

    Args:
        regularization: λ_int, the weight of the cubic term; without it the solution is Newton's, H̄⁻¹ḡ.
        momentum: μ_η, the share of the past in the average of the rates.
    """

    def __init__(self, regularization: float = 1.0, momentum: float = 0.5) -> None:
        check_not_negative("regularization", regularization)
        check_fraction("rate_momentum", momentum)
        self.regularization, self.momentum = regularization, momentum
        self.average: Tensor | None = None

    @property
    def rates(self) -> Tensor | None:
        """The positive part of the averaged solutions."""
        return None if self.average is None else self.average.clamp(min=0)

    def update(self, summary: Summary) -> Status:
        """Solves the cubic model of this measurement and averages the rates."""
        step = solve.cubic(summary, self.regularization) if self.regularization else solve.newton(summary)
        if step.ok:
            past = step.sizes if self.average is None else self.average
            self.average = self.momentum * past + (1 - self.momentum) * step.sizes
        return step.status

    def scale(self, factor: float) -> None:
        """Multiplies the average."""
        self.average = None if self.average is None else self.average * factor

    def state_dict(self) -> dict[str, Any]:
        """The averaged rates."""
        return {"average": None if self.average is None else self.average.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.average = _vector(state["average"])


class AveragedRates:
    """The default rule: average the measurements, solve their cubic model, and never step uphill in it.

    1. ḡ, H̄ and |D^(3)[s, s, s]|, relative to the loss, are averaged over recent measurements
       (:class:`~newton_summary.optim.summary_average.SummaryAverage`).  A curvature that has more than doubled counts
       at once: that of the averages, along the rates, is at least half of the last one measured.
    2. The cubic model of the averages is shrunk towards a target and solved; negative rates are set to zero.  Where it
       has no minimum (no cubic term and negative curvature), the target itself is taken: what remains as ρ grows.
       A curvature below the rounding of the whole counts as that rounding.  The bias before a batch norm has no effect
       on the loss: what is measured of it is rounding, and the ratio of two roundings must not become its rate.
    3. No rate more than doubles between measurements.
    4. An exact line search along the result in the cubic model of the averages, never beyond 1.

    A measurement whose loss is a thousand times the last one's is left out, unless the one before it was.

    Args:
        regularization: λ_int, the weight of the cubic term.
        shrinkage: ρ, the weight of the target.
        target: ``"shared"``, one rate for all groups, or ``"invariant"``, which keeps the invariance to a rescaling of
            each group.
        averaging: the share of the past in the averages, in the long run.
        precision: the relative rounding of a measurement: the ``eps`` of the parameters' type.
    """

    growth = 2.0

    def __init__(
        self,
        regularization: float = 1.0,
        shrinkage: float = 0.1,
        target: str = "shared",
        averaging: float = 0.9,
        precision: float = 0.0,
    ) -> None:
        check_not_negative("regularization", regularization)
        check_not_negative("shrinkage", shrinkage)
        if target not in ("shared", "invariant"):
            raise ValueError(f"target must be 'shared' or 'invariant', got {target!r}")
        self.regularization, self.shrinkage, self.target = regularization, shrinkage, target
        self.precision = precision
        self.average = SummaryAverage(averaging)
        self._rates: Tensor | None = None
        self._ceiling: Tensor | None = None
        self._exploded = False

    @property
    def rates(self) -> Tensor | None:
        """The rates of the last measurement that succeeded."""
        return self._rates

    def update(self, summary: Summary) -> Status:
        """Averages a measurement in and solves again."""
        if not summary.is_finite():
            return Status.NOT_FINITE
        explodes = abs(float(summary.loss)) > _EXPLOSION * self.average.scale > 0
        self._exploded = explodes and not self._exploded
        if self._exploded:
            return Status.OUTLIER
        mean = self._alert(self.average.update(summary), summary)
        certain = _above_rounding(mean, self.precision)
        step = solve.cubic(solve.shrink(certain, self.shrinkage, self.target), self.regularization)
        sizes = step.sizes if step.ok else solve.target_rates(certain, self.target)
        limited = sizes.clamp(min=0)
        if self._ceiling is not None:
            limited = torch.minimum(limited, self._ceiling)
        step = solve.line_search(mean, limited, self.regularization)
        if step.ok:
            self._keep(step.sizes)
        return step.status

    def _alert(self, mean: Summary, summary: Summary) -> Summary:
        """The average, with a curvature along the rates of at least half that of the last measurement."""
        assert mean.hessian is not None
        assert summary.hessian is not None
        along = torch.ones(len(mean.gradient), dtype=torch.float64) if self._rates is None else self._rates
        usual = float(along @ mean.hessian @ along)
        last = float(along @ summary.hessian.cpu().double() @ along) / self.average.scale
        return replace(mean, hessian=mean.hessian * (last / usual / 2)) if last > 2 * usual > 0 else mean

    def scale(self, factor: float) -> None:
        """Multiplies every rate, and its limit with it."""
        if self._rates is not None:
            self._keep(self._rates * factor)

    def _keep(self, rates: Tensor) -> None:
        """Makes these the rates, and their growth limit the next ceiling; a rate of zero keeps the ceiling it had.

        Were the ceiling of a zero rate zero, its group would never move again.
        """
        unlimited = torch.full_like(rates, torch.inf)
        previous = unlimited if self._ceiling is None else self._ceiling
        self._rates, self._ceiling = rates, torch.where(rates > 0, self.growth * rates, previous)

    def state_dict(self) -> dict[str, Any]:
        """The averages, the rates and their limits."""
        return {
            "average": self.average.state_dict(),
            "rates": None if self._rates is None else self._rates.tolist(),
            "ceiling": None if self._ceiling is None else self._ceiling.tolist(),
            "exploded": self._exploded,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.average.load_state_dict(state["average"])
        self._rates, self._ceiling = _vector(state["rates"]), _vector(state["ceiling"])
        self._exploded = state["exploded"]


def _above_rounding(summary: Summary, precision: float) -> Summary:
    """The summary with every diagonal entry of H̄ at least as large as the rounding of the whole of it."""
    assert summary.hessian is not None
    floor = precision * summary.hessian.abs().sum()
    diagonal = summary.hessian.diagonal()
    raised = torch.where(diagonal.abs() < floor, floor, diagonal)
    return replace(summary, hessian=summary.hessian + torch.diag(raised - diagonal))


def _vector(values: list[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)
