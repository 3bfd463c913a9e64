"""The optimizers that the experiments compare, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from newton_summary.errors import UsageError
from newton_summary.optim.newton_summary import NewtonSummary
from newton_summary_experiments.data import Batch, Data, InMemory, as_it_is
from newton_summary_experiments.kfac import KFAC
from newton_summary_experiments.tasks import Task, cross_entropy


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
        options: its other hyperparameters, by name.
    """

    task: Task
    data: Data
    model: nn.Module
    lr: float
    steps: int
    seed: int
    options: Mapping[str, float] = field(default_factory=dict)

    def curvature(self) -> dict[str, Any]:
        """What NewtonSummary takes to measure: an independent sampler over the training set."""
        loader = DataLoader(
            InMemory(self.data.train), self.task.batch_size, shuffle=True, drop_last=True, collate_fn=as_it_is
        )
        return {"curvature_data": loader, "seed": self.seed}

    def groups(self) -> dict[str, Any]:
        """The task's groups."""
        return {"partition": self.task.partition(self.model)}


@dataclass(frozen=True)
class Recipe:
    """How to make an optimizer.

    Args:
        make: from a setting to the optimizer.
        lr: its learning rate where the task names none.
        plateau: whether its learning rate is halved when the training loss has not improved for two checks, made
            every second epoch (Algorithm 1 of the paper).
        options: its other hyperparameters, where the task names none.
    """

    make: Callable[[Setting], torch.optim.Optimizer]
    lr: float
    plateau: bool = False
    options: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class MakesGradients(Protocol):
    """An optimizer that makes its gradients itself, in place of ``loss.backward()``."""

    def backward(self, batch: Batch) -> Tensor:
        """Sets the gradients, and returns the loss of the batch."""
        ...


CHECK_EVERY = 2
"""Epochs between two checks for a plateau."""

_OUR_RATE: float = inspect.signature(NewtonSummary).parameters["lr"].default


def _kfac(setting: Setting) -> torch.optim.Optimizer:
    if setting.task.loss_fn is not cross_entropy:
        raise UsageError(f"kfac is for the cross-entropy of a classifier; task {setting.task.name} has another loss")
    if setting.task.ntk:
        raise UsageError("kfac does not know layers with a scale: leave out --ntk")
    if setting.options["damping"] == 0:
        raise UsageError("kfac inverts matrices that may be singular: damping must be above 0")
    return KFAC(setting.model, setting.lr, setting.options["damping"], setting.task.batch_size, setting.seed)


def _paper(setting: Setting) -> torch.optim.Optimizer:
    strength = setting.options["regularization"]
    return NewtonSummary.paper(
        setting.model,
        setting.task.loss_fn,
        lr=setting.lr,
        regularization=strength,
        **setting.curvature(),
        **setting.groups(),
    )


OPTIMIZERS = {
    "adam": Recipe(lambda s: torch.optim.Adam(s.model.parameters(), s.lr), lr=1e-3),
    "sgd": Recipe(lambda s: torch.optim.SGD(s.model.parameters(), s.lr, momentum=0.9), lr=1e-2),
    "kfac": Recipe(_kfac, lr=1e-2, options={"damping": 0.1}),
    "newton-summary": Recipe(
        lambda s: NewtonSummary(s.model, s.task.loss_fn, lr=s.lr, steps=s.steps, **s.curvature()), lr=_OUR_RATE
    ),
    "newton-summary-constant": Recipe(
        lambda s: NewtonSummary(s.model, s.task.loss_fn, lr=s.lr, **s.curvature()), lr=_OUR_RATE
    ),
    "newton-summary-paper": Recipe(_paper, lr=0.1, plateau=True, options={"regularization": 1.0}),
}
"""``newton-summary`` knows the length of the run, ``newton-summary-constant`` does not."""


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


def default_options(task: Task, optimizer: str) -> dict[str, float]:
    """The other hyperparameters of an optimizer on a task, unless told otherwise."""
    return {**get_recipe(optimizer).options, **task.options.get(optimizer, {})}
