"""Tasks: a model, its data and how long to train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from newton_summary.experiments import data
from newton_summary.experiments.data import Batch, Data, Source
from newton_summary.experiments.errors import UsageError
from newton_summary.experiments.models import initialised, lenet, mlp
from newton_summary.measure import LossFunction
from newton_summary.partition import Partition


def cross_entropy(model: Any, batch: Batch) -> Tensor:
    """The mean cross-entropy of a classifier over a batch."""
    images, classes = batch
    return functional.cross_entropy(model(images), classes)


@dataclass(frozen=True)
class Task:
    """Everything that a training run needs but its optimizer.

    Args:
        name: what the command line calls it.
        build: makes the model, with any weights.
        epochs: how long to train unless told otherwise.
        rates: the learning rate of each optimizer that needs one, unless told otherwise.
        source: the file of its images; ``None`` stands for scikit-learn's digits.
        batch_size: of training batches and of those that curvature is measured on.
        gain: σ_w of the initial weights, drawn from N(0, σ_w² / fan_in).
        loss_fn: the loss.
        partition: makes the groups.
        threads: that torch computes with, unless told otherwise; ``None`` leaves that to torch.
    """

    name: str
    build: Callable[[], nn.Module]
    epochs: int
    rates: Mapping[str, float] = field(default_factory=dict)
    source: Source | None = None
    batch_size: int = 100
    gain: float = 1.0
    loss_fn: LossFunction = cross_entropy
    partition: Callable[[nn.Module], Partition] = Partition.canonical
    threads: int | None = None

    def make_model(self, seed: int) -> nn.Module:
        """The model with the initial weights that a seed stands for."""
        return initialised(self.build, seed, self.gain)

    def read(self, folder: Path | None = None) -> Data:
        """The data, looked for in ``folder`` or in the usual places.

        Raises:
            UsageError: it is missing or not as expected.
        """
        return data.digits() if self.source is None else data.read(self.source, folder)


# The rates of digits are the best of a search, results/digits-rates.md.  Those of Adam and SGD for the others were the
# best of small grids on parts of the same data (4,000 images of MNIST, 10,000 of CIFAR-10; one to three seeds), and
# λ_1 of the paper's method there is that of digits, not searched.
TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits",
            build=lambda: mlp([64, 128, 64, 32, 10]),
            epochs=75,
            rates={"adam": 1e-2, "sgd": 0.3, "newton-summary-paper": 0.1},
            threads=1,  # too small for more
        ),
        Task(
            name="mlp-mnist",
            build=lambda: mlp([784, 1024, 200, 100, 10]),
            epochs=10,
            source=data.MNIST,
            rates={"adam": 1e-3, "sgd": 0.1, "newton-summary-paper": 0.1},
        ),
        Task(
            name="lenet-cifar10",
            build=lenet,
            epochs=12,
            source=data.CIFAR10,
            rates={"adam": 3e-3, "sgd": 0.01, "newton-summary-paper": 0.1},
        ),
    )
}


def get_task(name: str) -> Task:
    """A task by its name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]
