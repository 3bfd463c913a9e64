"""What a run leaves in its folder: its configuration, a row for each epoch, and its interactions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from newton_summary.errors import UsageError
from newton_summary.summary import Summary

METRICS = "metrics.jsonl"
PLAN = "comparison.json"
INTERACTIONS = "interactions.json"


@dataclass(frozen=True)
class Config:
    """What decides a run, together with the data and the versions of the software.

    Args:
        task: the task's name.
        optimizer: the optimizer's name.
        lr: its learning rate; λ_1 for newton-summary.
        epochs: how long to train.
        seed: of the initial weights and of the order of the data.
        options: the optimizer's other hyperparameters.
        budget: of the task.
        ntk: whether the task is in the NTK parameterisation.
    """

    task: str
    optimizer: str
    lr: float
    epochs: int
    seed: int = 0
    options: dict[str, float] = field(default_factory=dict)
    budget: str = "full"
    ntk: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"the learning rate must be above 0, got {self.lr}")
        if self.epochs < 1:
            raise UsageError(f"the number of epochs must be at least 1, got {self.epochs}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"the seed must be at least 0, and less than 2⁶³, got {self.seed}")
        for name, value in self.options.items():
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} must be a number that is not negative, got {value}")


@dataclass(frozen=True)
class Row:
    """What is recorded at the end of an epoch; epoch 0 is the start.

    Args:
        epoch: whole epochs trained.
        step: steps taken.
        train_loss: mean loss over the training set in eval mode, ``None`` where it is not finite.
        validation_loss: the same over the validation set.
        validation_accuracy: the share of its images whose class is right.
        seconds: spent on training steps so far, measurements included and evaluations left out.
        lr: the optimizer's learning rate, λ_1 for newton-summary.
        rates: the rate η of every group, λ_1 left out; empty for optimizers that have none.
        counts: measurements made, failed and held back, so far.
        diverged: whether the run ended here because its loss was not finite or ten times that of its start.
    """

    epoch: int
    step: int
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: float
    seconds: float
    lr: float
    rates: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    diverged: bool = False


@dataclass(frozen=True)
class Snapshot:
    """The interactions of the groups along one step of the optimizer, measured on batches of an independent sampler.

    Args:
        epoch: whole epochs trained before the step; at the last step of a run, those of the run.
        step: steps taken before it.
        actual_decrease: of the loss on these batches, by the step.
        parts: a :meth:`~newton_summary.Summary.to_dict` for each batch, along θ − θ', the step: a factor of 1 is what
            the optimizer did.  A group that the step did not move, by a rate of 0, is measured along its gradient.
        still: the names of those groups.
    """

    epoch: int
    step: int
    actual_decrease: float
    parts: list[dict[str, Any]]
    still: list[str]

    def summaries(self) -> list[Summary]:
        """The measurement of each batch."""
        return [Summary.from_dict(part) for part in self.parts]

    def along_the_step(self) -> list[Summary]:
        """The same with nothing for the groups that the step did not move."""
        return [part.scale([float(name not in self.still) for name in part.names]) for part in self.summaries()]
