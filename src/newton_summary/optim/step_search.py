"""Line searches while training: when to make one, on which samples, and what comes of it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from newton_summary.measure.along import LossAlongStep
from newton_summary.measure.batches import batch_size
from newton_summary.measure.loss import preserved_randomness
from newton_summary.optim.cadence import COMPARED, SEARCHES, Price, SearchCadence, affordable_interval
from newton_summary.optim.directions import State
from newton_summary.optim.line_search import LineSearch
from newton_summary.optim.samples import Samples
from newton_summary.optim.weight_average import WeightAverage
from newton_summary.parallel.sharding import unsharded

logger = logging.getLogger(__name__)


class StepSearch:
    """Now and then evaluates the loss of a new batch along the step to come, for a line search to adapt its length.

    Every third time the loss at the average of the weights is compared.  Where the loss has diverged, the weights go
    back to that average.

    Args:
        samples: where batches come from.
        every: the number of steps between line searches; ``None``: by their price.

    Attributes:
        line_search: what is found: the length of the step, and the multiplier of the learning rate.
        cadence: when.
        average: of the weights.
        count: the number of line searches.
    """

    def __init__(self, samples: Samples, every: int | None) -> None:
        self.line_search = LineSearch()
        self.cadence = SearchCadence(every, settles=every is None)
        self.average = WeightAverage(samples.partition.parameters)
        self.count = 0
        self._samples = samples

    def run(self, u: Mapping[Tensor, Tensor], eta: Tensor, state: State, step: int) -> None:
        """Searches along the step.

        Args:
            u: the direction, for the parameters that have one.
            eta: the relative rates, shape (S,).
            state: the optimizer's, which holds the average.
            step: its number.
        """
        gap = self.cadence.gap(step)
        here, diverged = self._evaluate(u, eta, self.average.values(state), gap)
        if diverged:
            logger.info("the loss has diverged to %g at step %d: back to averaged weights", here, step)
            self.line_search.roll_back()
            self.average.restore(state)
            self.cadence.begin(step)
        elif math.isfinite(here):
            self.average.update(state, gap)
        self.count += 1

    def _evaluate(self, u: Mapping[Tensor, Tensor], eta: Tensor, average: list[Tensor], gap: int) -> tuple[float, bool]:
        """Searches on the next batch: the loss at the weights, and whether that has diverged.

        Where the price of a search is not yet known, it is counted, with one more evaluation for what comparisons with
        the average take.
        """
        counting, samples = self.cadence.every is None, self._samples
        with preserved_randomness(samples.loss.devices) as rewind:
            batch = samples.next()
            size = batch_size(batch)
            with samples.along(u) as (partition, along), Price() if counting else contextlib.nullcontext() as price:
                step = [v * f for v, f in zip(along, partition.spread(eta.tolist()), strict=True)]
                start = [p.detach() for p in partition.parameters]  # which hold copies in the block
                with samples.loss.movable(batch, partition, rewind) as (weights, loss):
                    losses = LossAlongStep(weights, start, step, lambda: samples.mean(loss(), size))
                    found = self._compare(losses, average, gap)
                if counting:
                    with Price() as evaluation:
                        samples.evaluate(batch, partition, along)
        if price is not None:
            self.cadence.every = round(samples.mean(affordable_interval(price, evaluation, SEARCHES)))
        return found

    def _compare(self, losses: LossAlongStep, average: list[Tensor], gap: int) -> tuple[float, bool]:
        """Searches, and compares with the average of the weights where it is time to, or the loss may have diverged."""
        here = self.line_search.search(losses, gap)
        suspicious = self.line_search.may_have_diverged(here)
        if not suspicious and self.count % COMPARED != COMPARED - 1:
            return here, False
        there = losses.at([unsharded(a) for a in average])
        if suspicious:
            return here, self.line_search.has_diverged(here, there)
        self.line_search.multiplier.compare(there, here, COMPARED * gap)
        return here, False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; the average itself is in the optimizer's state."""
        return {
            "line_search": self.line_search.state_dict(),
            "cadence": self.cadence.state_dict(),
            "average": self.average.state_dict(),
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.line_search.load_state_dict(state["line_search"])
        self.cadence.load_state_dict(state["cadence"])
        self.average.load_state_dict(state["average"])
        self.count = state["count"]
