"""The invariance to a rescaling of layers, on a real network (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from newton_summary.optim.newton_summary import NewtonSummary
from newton_summary_experiments.data import Batch, Data, shuffled
from newton_summary_experiments.models import ntk
from newton_summary_experiments.tasks import Task

Maker = Callable[[nn.Module, Task, list[Batch]], torch.optim.Optimizer]

METHODS: dict[str, Maker] = {
    "paper mode": lambda model, task, batches: NewtonSummary.paper(
        model, task.loss_fn, curvature_data=batches, lr=0.1, regularization=1.0
    ),
    "default, invariant target": lambda model, task, batches: NewtonSummary(
        model,
        task.loss_fn,
        curvature_data=batches,
        partition="canonical",
        target="invariant",
        direction="momentum",
        every=20,  # set, because it follows a count of calls, which differ between the parameterisations
        compare_every=5,
    ),
    "SGD, momentum": lambda model, task, batches: torch.optim.SGD(model.parameters(), 0.03, momentum=0.9),
}


def both_ways(task: Task, data: Data, make: Maker, steps: int) -> tuple[list[float], list[float]]:
    """The losses of the batches of a training in both parameterisations, from the same function, in float64."""
    standard, ntk = (losses(replace(task, ntk=way), data, make, steps) for way in (False, True))
    return standard, ntk


def losses(task: Task, data: Data, make: Maker, steps: int, seed: int = 0) -> list[float]:
    """The loss of each batch of a training in float64."""
    model = replace(task, ntk=False).make_model(seed).double()
    if task.ntk:
        assert isinstance(model, nn.Sequential)
        model = ntk(model, task.gain)  # of weights in float64, or both would differ by a rounding of float32
    double = replace(data, train=(data.train[0].double(), data.train[1]))
    curvature = list(shuffled(double.train, task.batch_size, seed + 1, 0))
    optimizer, found = make(model, task, curvature), []
    for _, batch in zip(range(steps), _endless(double, task.batch_size, seed), strict=False):
        optimizer.zero_grad()
        loss = task.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def _endless(data: Data, size: int, seed: int) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from shuffled(data.train, size, seed, epoch)
        epoch += 1
