"""Comparisons of the weights with their average while training: on which samples, and what comes of them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary.measure.along import LossAlongStep
from newton_summary.measure.batches import batch_size
from newton_summary.measure.loss import preserved_randomness
from newton_summary.optim.cadence import COMPARISONS, ComparisonCadence, Price, affordable_interval
from newton_summary.optim.directions import State
from newton_summary.optim.directions.affordable import SidesByCount
from newton_summary.optim.first_length import first_scale
from newton_summary.optim.rate_adaptation import RateAdaptation
from newton_summary.optim.samples import Samples
from newton_summary.optim.weight_average import WeightAverage
from newton_summary.parallel.sharding import unsharded
from newton_summary.partition import Partition

logger = logging.getLogger(__name__)


class AverageComparison:
    """Now and then evaluates the loss of a new batch at the weights and at their average, for rates to be adapted.

    The first evaluation, before the first step, also counts which sides of matrices are worth a Kronecker factor.
    Where the loss has diverged, the weights go back to their average.

    Args:
        samples: where batches come from.
        every: the number of steps between comparisons; ``None``: by their price.
        sides: what is chosen at the first evaluation, if anything.

    Attributes:
        adaptation: what is found: the scale of the rates.
        cadence: when.
        average: of the weights.
    """

    def __init__(self, samples: Samples, every: int | None, sides: SidesByCount | None) -> None:
        self.adaptation = RateAdaptation()
        self.cadence = ComparisonCadence(every)
        self.average = WeightAverage(samples.partition.parameters)
        self._samples = samples
        self._sides = sides

    def run(self, state: State, step: int, holds: bool) -> None:
        """Compares.

        Args:
            state: the optimizer's, which holds the average.
            step: the number of steps taken.
            holds: whether the scale stays as it is.
        """
        gap = self.cadence.take(step)
        if step == 0:
            self.average.values(state)
            self.adaptation.begin(self._evaluate(state, None)[0])
            return
        share = self.adaptation.share(step, gap)
        here, there, diverged = self._evaluate(state, share)
        if diverged:
            logger.info("the loss has diverged to %g at step %d: back to averaged weights", here, step)
            self.adaptation.roll_back()
            self.average.restore(state)
        else:
            self.average.update(state, share)
            self.adaptation.compare(here, there, step, gap, holds)

    def _evaluate(self, state: State, share: float | None) -> tuple[float, float, bool]:
        """The losses of the next batch at the weights and at their average, and whether the first has diverged.

        Args:
            state: the optimizer's.
            share: of the weights in the average; ``None`` before the first step, where they are their average.
        """
        samples = self._samples
        counting = self.cadence.every is None and share is not None
        with preserved_randomness(samples.loss.devices) as rewind:
            batch = samples.next()
            size = batch_size(batch)
            with (
                samples.whole() as partition,
                samples.loss.movable(batch, partition, rewind) as (weights, loss),
                Price() if counting else contextlib.nullcontext() as price,
            ):
                if share is None:
                    here = samples.mean(self._first_loss(partition, loss), size)
                    return here, here, False
                with Price() if counting else contextlib.nullcontext() as evaluation:
                    here = samples.mean(loss(), size)
                average = [unsharded(a) for a in self.average.values(state)]
                torch._foreach_lerp_(weights, average, 1 - share)
                there, diverged = samples.mean(loss(), size), False
                if self.adaptation.may_have_diverged(here, there):
                    torch._foreach_copy_(weights, average)
                    there = samples.mean(loss(), size)
                    diverged = math.isfinite(there) and not here <= there
        if price is not None and evaluation is not None:
            self.cadence.every = round(samples.mean(affordable_interval(price, evaluation, COMPARISONS)))
        return here, there, diverged

    def begin(self, u: Mapping[Tensor, Tensor], eta: Tensor) -> None:
        """Finds where the rates begin, on the next batch.

        Args:
            u: the direction, for the parameters that have one.
            eta: the rates to look at first, shape (S,).
        """
        samples = self._samples
        with preserved_randomness(samples.loss.devices) as rewind:
            batch = samples.next()
            size = batch_size(batch)
            with samples.along(u) as (partition, along):
                step = [v * f for v, f in zip(along, partition.spread(eta.tolist()), strict=True)]
                start = [p.detach() for p in partition.parameters]
                with samples.loss.movable(batch, partition, rewind) as (weights, loss):
                    losses = LossAlongStep(weights, start, step, lambda: samples.mean(loss(), size))
                    self.adaptation.scale = first_scale(losses)

    def show_average(self, state: State) -> None:
        """Puts the average in the place of the weights, if the loss was found lower there.

        A model that is evaluated with statistics of batches keeps its weights: the statistics are of those.
        """
        if self.average.is_in_place or self.adaptation.advantage <= 0:
            return
        if not _has_statistics(self._samples.loss.model):
            self.average.exchange(state)

    def hide_average(self, state: State) -> None:
        """Puts the weights back that :meth:`show_average` has taken out."""
        if self.average.is_in_place:
            self.average.exchange(state)

    def _first_loss(self, partition: Partition, loss: Callable[[], float]) -> float:
        """The loss at the first weights."""
        if self._sides is None:
            return loss()
        return self._sides.choose(partition.parameters, loss, self._samples.processes)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; the average itself is in the optimizer's state."""
        return {
            "adaptation": self.adaptation.state_dict(),
            "cadence": self.cadence.state_dict(),
            "average": self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.adaptation.load_state_dict(state["adaptation"])
        self.cadence.load_state_dict(state["cadence"])
        self.average.load_state_dict(state["average"])


def _has_statistics(model: nn.Module) -> bool:
    """Whether the model is evaluated with statistics that belong to the weights that it was trained at."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in model.modules())
