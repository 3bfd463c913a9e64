"""What a monitor, or an optimizer that finds its rates by itself, has to tell since it was last asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

from newton_summary.optim import MeasuredOptimizer
from newton_summary.summary import Summary
from newton_summary.watch.monitor import Monitor
from newton_summary.watch.record import TAG, markdown

Source: TypeAlias = Monitor | MeasuredOptimizer
"""What measures."""


@dataclass(frozen=True)
class Measured:
    """A measurement, or new rates, ready to be logged.

    Args:
        step: the optimizer's steps before it.
        scalars: numbers by tags, all finite.  Of a monitor :meth:`~newton_summary.watch.record.Record.scalars`; of an
            optimizer λ_1, every group's rate, how many measurements and comparisons were made, how many failed, and the
            loss where it was measured.
        summary: of the groups; ``None`` where weights were compared with their average, and nothing was measured.
        sentences: a monitor's advice, the most important first; an optimizer that measures by itself has none.
    """

    step: int
    scalars: dict[str, float]
    summary: Summary | None
    sentences: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The advice as Markdown, for loggers that show text."""
        return markdown(self.sentences)

    @property
    def with_words(self) -> dict[str, float | str]:
        """The numbers, and the advice in one string, for logs of dictionaries."""
        return {**self.scalars, TAG: "; ".join(self.sentences)} if self.sentences else {**self.scalars}


class News:
    """Tells each measurement, and each comparison, once.

    Args:
        source: a :class:`~newton_summary.Monitor` or a :class:`~newton_summary.NewtonSummary`.

    Raises:
        TypeError: it is something else.
    """

    def __init__(self, source: Source) -> None:
        if not isinstance(source, Monitor | MeasuredOptimizer):
            raise TypeError(
                f"a Monitor or a NewtonSummary was expected, which measure, got {type(source).__name__}: put "
                "ns.Monitor(model, loss_fn, optimizer=…) beside an optimizer, and give that"
            )
        self.source = source
        self._told = self._counts()

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers whose steps are told of."""
        return self.source.optimizers if isinstance(self.source, Monitor) else (self.source,)

    def latest(self) -> Measured | None:
        """The last one, to be asked for after the optimizer's step; ``None`` where there is none that is new.

        A monitor's measurement that was not finite is no news; an optimizer's is, for its count of failures.
        """
        counts = self._counts()
        if counts == self._told:
            return None
        if isinstance(self.source, Monitor) and self.source.is_waiting:  # for the other ones of several optimizers
            return None
        is_measured, self._told = counts[0] != self._told[0], counts
        if isinstance(self.source, Monitor):
            if not (self.source.records and self.source.summary is not None and self.source.summary.is_finite()):
                return None
            record = self.source.records[-1]
            return Measured(record.step, record.scalars(), self.source.summary, record.sentences)
        summary = self.source.summary if is_measured else None
        return Measured(self.source._taken - 1, _of_optimizer(self.source, summary), summary)

    def _counts(self) -> tuple[int, int]:
        """How many measurements and comparisons there were."""
        return self.source.counts["measured"], self.source.counts["compared"]


def _of_optimizer(optimizer: MeasuredOptimizer, summary: Summary | None) -> dict[str, float]:
    scalars = {"lr": float(optimizer.param_groups[0]["lr"])}
    if summary is not None:
        scalars["loss"] = summary.loss.item()
    scalars |= {key: float(optimizer.counts[key]) for key in ("measured", "failed", "compared")}
    scalars |= {f"rate/{name}": rate for name, rate in optimizer.rates.items()}
    return {f"newton_summary/{tag}": value for tag, value in scalars.items() if math.isfinite(value)}
