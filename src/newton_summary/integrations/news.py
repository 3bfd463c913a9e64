"""What a monitor, or an optimizer that measures by itself, has to tell since it was last asked."""

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
    """A measurement, ready to be logged.

    Args:
        step: the optimizer's steps before it.
        scalars: numbers by tags, all finite.  Of a monitor :meth:`~newton_summary.watch.record.Record.scalars`; of an
            optimizer the loss, λ_1, every group's rate, and how many measurements were made and failed.
        summary: of the groups.
        sentences: a monitor's advice, the most important first; an optimizer that measures by itself has none.
    """

    step: int
    scalars: dict[str, float]
    summary: Summary
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
    """Tells each measurement once.

    Args:
        source: a :class:`~newton_summary.Monitor` or a :class:`~newton_summary.NewtonSummary`.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._told = source.counts["measured"]

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers whose steps are told of."""
        return self.source.optimizers if isinstance(self.source, Monitor) else (self.source,)

    def latest(self) -> Measured | None:
        """The last measurement, to be asked for after the optimizer's step; ``None`` where there is none that is new.

        A monitor's measurement that was not finite is no news; an optimizer's is, for its count of failures.
        """
        if self.source.counts["measured"] == self._told or self.source.summary is None:
            return None
        if isinstance(self.source, Monitor) and self.source.is_waiting:  # for the other ones of several optimizers
            return None
        self._told = self.source.counts["measured"]
        if isinstance(self.source, Monitor):
            if not (self.source.records and self.source.summary.is_finite()):
                return None
            record = self.source.records[-1]
            return Measured(record.step, record.scalars(), self.source.summary, record.sentences)
        return Measured(self.source._taken - 1, _of_optimizer(self.source), self.source.summary)


def _of_optimizer(optimizer: MeasuredOptimizer) -> dict[str, float]:
    assert optimizer.summary is not None
    scalars = {"loss": optimizer.summary.loss.item(), "lr": float(optimizer.param_groups[0]["lr"])}
    scalars |= {key: float(optimizer.counts[key]) for key in ("measured", "failed")}
    scalars |= {f"rate/{name}": rate for name, rate in optimizer.rates.items()}
    return {f"newton_summary/{tag}": value for tag, value in scalars.items() if math.isfinite(value)}
