"""The optimizers that the experiments compare, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from newton_summary.experiments.data import Data, InMemory, as_it_is
from newton_summary.experiments.errors import UsageError
from newton_summary.experiments.tasks import Task
from newton_summary.optimizer import NewtonSummary


@dataclass(frozen=True)
class Setting:
    """What an optimizer is made from.

    Args:
        task: the task.
        data: its data.
        model: the model to train.
        lr: the learning rate, λ_1 for newton-summary.
        steps: the length of the training.
        seed: of the sampler that curvature is measured on.
    """

    task: Task
    data: Data
    model: nn.Module
    lr: float
    steps: int
    seed: int

    def curvature(self) -> dict[str, Any]:
        """What NewtonSummary takes to measure: an independent sampler over the training set, and the task's groups."""
        loader = DataLoader(
            InMemory(self.data.train), self.task.batch_size, shuffle=True, drop_last=True, collate_fn=as_it_is
        )
        return {"curvature_data": loader, "partition": self.task.partition(self.model), "seed": self.seed}


@dataclass(frozen=True)
class Recipe:
    """How to make an optimizer.

    Args:
        make: from a setting to the optimizer.
        lr: its learning rate where the task names none.
        plateau: whether its learning rate is halved when the training loss has not improved for two checks, made
            every second epoch (Algorithm 1 of the paper).
    """

    make: Callable[[Setting], torch.optim.Optimizer]
    lr: float
    plateau: bool = False


CHECK_EVERY = 2
"""Epochs between two checks for a plateau."""

OPTIMIZERS = {
    "adam": Recipe(lambda s: torch.optim.Adam(s.model.parameters(), s.lr), lr=1e-3),
    "sgd": Recipe(lambda s: torch.optim.SGD(s.model.parameters(), s.lr, momentum=0.9), lr=1e-2),
    "newton-summary": Recipe(
        lambda s: NewtonSummary(s.model, s.task.loss_fn, lr=s.lr, steps=s.steps, **s.curvature()), lr=1.5
    ),
    "newton-summary-paper": Recipe(
        lambda s: NewtonSummary.paper(s.model, s.task.loss_fn, lr=s.lr, **s.curvature()), lr=0.1, plateau=True
    ),
}


def get_recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def default_rate(task: Task, optimizer: str) -> float:
    """The learning rate of an optimizer on a task, unless told otherwise."""
    return task.rates.get(optimizer, get_recipe(optimizer).lr)
