"""What a monitor has measured, until the step is taken and the loss of after it is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_summary.summary import Summary
from newton_summary.watch.advice import Advice
from newton_summary.watch.record import Record
from newton_summary.watch.step_taken import StepTaken


@dataclass(frozen=True)
class Measured:
    """What this process has measured; the loss on the batches is computed once more, after the step."""

    own: list[Summary]
    along: Sequence[Tensor]
    batches: Sequence[Any]
    randomness: Randomness
    counts: Counts
    step: StepTaken


@dataclass(frozen=True)
class Counts:
    """How many samples were measured, and how many the batches had; 0 where they were not counted."""

    samples: int = 0
    available: int = 0


class Randomness:
    """The random states that a measurement started from, so that the loss after the step meets the same dropout."""

    def __init__(self, device: torch.device, rewind_generators: Callable[[], None]) -> None:
        self.device = device
        self.rewind_generators = rewind_generators
        self.host = torch.get_rng_state()
        self.own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        """Puts them back."""
        self.rewind_generators()
        torch.set_rng_state(self.host)
        if self.own is not None:
            torch.get_device_module(self.device).set_rng_state(self.own, self.device)


def record_of(step: int, mean: Summary, rates: Tensor, advice: Advice, counts: Counts) -> Record:
    """What a measurement, and the advice after it, came to."""
    groups = advice.groups
    return Record(
        step=step,
        loss=mean.loss.item(),
        predicted_decrease=float(mean.gradient.sum() - mean.tensor(2).sum() / 2),
        actual_decrease=math.nan,
        names=mean.names,
        learning_rates=tuple(rates.tolist()),
        alone=tuple(g.alone for g in groups),
        low=tuple(g.low for g in groups),
        high=tuple(g.high for g in groups),
        joint=tuple(g.joint for g in groups),
        words=tuple(g.words for g in groups),
        headline=advice.headline,
        sentences=tuple(advice.sentences()),
        middle=advice.middle,
        batches=advice.batches,
        level=advice.level,
        samples=counts.samples,
        available=counts.available,
    )
