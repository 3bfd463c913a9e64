"""Comparisons of the weights with their average while training: on which samples, and what comes of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary._warned import warn
from newton_summary.measure.along import LossAlongStep
from newton_summary.measure.batches import batch_size
from newton_summary.measure.loss import preserved_randomness
from newton_summary.optim.cadence import ComparisonCadence
from newton_summary.optim.directions import State
from newton_summary.optim.directions.affordable import SidesByCount
from newton_summary.optim.first_length import first_scale
from newton_summary.optim.rate_adaptation import RateAdaptation
from newton_summary.optim.samples import Samples
from newton_summary.optim.weight_average import WeightAverage, go_towards

logger = logging.getLogger(__name__)


def _later() -> None:
    """For the stream, which then leaves random states as a batch was drawn: the loss rewinds them, once for both."""


class AverageComparison:
    """Now and then finds what each group adds to the loss from the weights to their average, for rates to be adapted.

    That takes one gradient on a new batch, on the way between the two, which takes about as long as a training step.
    The first evaluation, before the first step, is of the loss alone; it counts which sides of matrices are worth a
    Kronecker factor.  Where the loss has diverged, the weights go back to their average; :func:`.forget` goes with it.

    Args:
        samples: where batches come from.
        every: the number of steps between comparisons.
        sides: what is chosen at the first evaluation, if anything.

    Attributes:
        adaptation: what is found: the scales of the rates.
        cadence: when.
        average: of the weights.
        is_evaluating: whether the average was last asked for, and would have come, if it were better.
    """

    def __init__(self, samples: Samples, every: int, sides: SidesByCount | None) -> None:
        self.adaptation = RateAdaptation(len(samples.partition))
        self.cadence = ComparisonCadence(every)
        self.average = WeightAverage(samples.partition.parameters, samples.loss.model)
        self._samples = samples
        self._sides = sides
        self.is_evaluating = False
        self._has_warned = False

    def run(self, state: State, step: int) -> bool:
        """Compares.

        Args:
            state: the optimizer's, which holds the average.
            step: the number of steps taken.

        Returns:
            Whether the weights have gone back to their average.
        """
        gap = self.cadence.take(step)
        with preserved_randomness(self._samples.loss.devices) as rewind:
            if step == 0:
                first = self._first_loss(rewind)
                self._check(math.isfinite(first), f"is {first} before the first step: look at loss_fn and the data")
                self.adaptation.begin(first)
                return False
            batch = self._samples.next(_later)
            on_the_way, behind = self._behind(self.average.values(state), batch, rewind)
            is_suspicious = self.adaptation.is_suspicious(on_the_way, gain=-sum(behind))
            if is_suspicious and self._has_diverged(on_the_way, self.average.before(state), batch, rewind):
                logger.info("the loss has diverged at step %d: back to averaged weights", step)
                self.adaptation.roll_back()
                self.average.restore(state)
                return True
        if math.isfinite(on_the_way):
            self.average.keep(state)
        self.adaptation.compare(behind, step, gap, on_the_way)
        return False

    def follow(self, state: State, steps: int) -> None:
        """Takes the weights after so many steps into their average."""
        self.average.follow(state, self.adaptation.share(steps))

    def _first_loss(self, rewind: Callable[[], None]) -> float:
        """The loss of the next batch at the first weights, in the block whose randomness is preserved."""
        samples = self._samples
        batch = samples.next(_later)
        with samples.whole() as (partition, _), samples.loss.movable(batch, partition, rewind) as (_, loss):
            if self._sides is None:
                return samples.mean(loss(), batch_size(batch))
            here = self._sides.choose(partition.parameters, loss, samples.processes)
            return samples.mean(here, batch_size(batch))

    def _behind(self, average: Sequence[Tensor], batch: Any, rewind: Callable[[], None]) -> tuple[float, list[float]]:
        """By how much the loss of a batch is higher at the average, as the parts of the groups.

        Args:
            average: of the weights.
            batch: this process's.
            rewind: restores the random states.

        Returns:
            The loss on the way there, and S numbers.
        """
        samples, size, part = self._samples, batch_size(batch), self.adaptation.constants.part
        mark = self._mark(average)
        with (
            samples.whole(average) as (partition, average),
            samples.loss.movable(batch, partition, rewind) as (weights, loss),
        ):
            go_towards(weights, average, part)
            here, gradient = loss.gradient()
            self._check(
                any(g is not None for g in gradient),
                "does not depend on the parameters: compute it with the model that loss_fn gets, and do not detach it",
            )
            rest = (a - w for a, w in zip(average, weights, strict=True))
            parts = torch.stack(partition.dot(gradient, rest)) / (1 - part)
            here, mark_of_all, *behind = samples.means([here, mark, *parts.tolist()], size)
            samples.processes.check_alike(mark, mark_of_all)
        return here, behind

    def _has_diverged(self, here: float, before: Sequence[Tensor], batch: Any, rewind: Callable[[], None]) -> bool:
        """Whether the loss on the way is far above that at the average of before."""
        samples = self._samples
        with (
            samples.whole(before) as (partition, before),
            samples.loss.movable(batch, partition, rewind) as (weights, loss),
        ):
            torch._foreach_copy_(weights, before)
            return self.adaptation.has_diverged(here, samples.mean(loss(), batch_size(batch)))

    def _mark(self, average: Sequence[Tensor]) -> float:
        """Of the way from the average to the weights, which all processes must have gone, in the smallest tensor."""
        if self._samples.processes.count == 1:
            return 0.0
        parameters = self._samples.partition.parameters
        least = min(range(len(parameters)), key=lambda number: parameters[number].numel())
        return self._samples.processes.mark([parameters[least].detach() - average[least]])

    def _check(self, is_well: bool, otherwise: str) -> None:
        """Warns, once, where comparisons would tell nothing, and the training loop need not notice."""
        if not is_well and not self._has_warned:
            self._has_warned = True
            warn(f"the loss on a batch of curvature_data {otherwise}; such batches tell nothing about rates")

    def begin(self, u: Mapping[Tensor, Tensor], eta: Tensor) -> None:
        """Finds where the rates begin, on the next batch.

        Args:
            u: the direction, for the parameters that have one.
            eta: the rates to look at first, shape (S,).
        """
        samples = self._samples
        with preserved_randomness(samples.loss.devices) as rewind:
            batch = samples.next(_later)
            size = batch_size(batch)
            with samples.along(u) as (partition, along):
                step = [v * f for v, f in zip(along, partition.spread(eta.tolist()), strict=True)]
                with samples.loss.movable(batch, partition, rewind) as (weights, loss):
                    losses = LossAlongStep(weights, step, lambda: samples.mean(loss(), size))
                    self.adaptation.scales = [first_scale(losses)] * len(partition)

    def show_average(self, state: State) -> None:
        """Puts the average in the place of the weights, if the loss was found lower there."""
        if self.average.is_in_place:
            return
        self.is_evaluating = True
        if self.adaptation.advantage > 0:
            self.average.exchange(state)

    def hide_average(self, state: State) -> None:
        """Puts the weights back that :meth:`show_average` has taken out."""
        self.is_evaluating = False
        if self.average.is_in_place:
            self.average.exchange(state)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and averaged statistics; the average of the weights is in the optimizer's state."""
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
