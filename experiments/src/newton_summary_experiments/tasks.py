"""Tasks: a model, its data and how long to train, at two budgets (docs/method.md, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from newton_summary.errors import UsageError
from newton_summary.measure import LossFunction, preserved_randomness
from newton_summary.partition import Partition
from newton_summary_experiments import data
from newton_summary_experiments.data import Batch, Data, Source
from newton_summary_experiments.models import initialised, lenet, mlp, ntk, vgg11


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
        options: their other hyperparameters, likewise.
        source: the file of its images; ``None`` stands for scikit-learn's digits.
        batch_size: of training batches and of those that curvature is measured on.
        gain: σ_w of the initial weights, drawn from N(0, σ_w² / fan_in).
        loss_fn: the loss.
        partition: makes the groups.
        threads: that torch computes with, unless told otherwise; ``None`` leaves that to torch.
        images: how many of the training images are used; ``None`` stands for all.
        budget: what the sizes are meant for (:data:`BUDGETS`).
        network: the network in words.
        ntk: whether weights stand in the NTK parameterisation (:func:`~newton_summary_experiments.models.ntk`).
        evaluated: over how many images of each part losses are recorded, the first ones; ``None`` stands for all.
        records: how often they are recorded in an epoch.
    """

    name: str
    build: Callable[[], nn.Module]
    epochs: int
    rates: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: Source | None = None
    batch_size: int = 100
    gain: float = 1.0
    loss_fn: LossFunction = cross_entropy
    partition: Callable[[nn.Module], Partition] = Partition.canonical
    threads: int | None = None
    images: int | None = None
    budget: str = "full"
    network: str = ""
    ntk: bool = False
    evaluated: int | None = None
    records: int = 1

    def make_model(self, seed: int) -> nn.Module:
        """The model with the initial weights that a seed stands for."""
        model = initialised(self.build, seed, self.gain)
        if not self.ntk:
            return model
        assert isinstance(model, nn.Sequential)
        with preserved_randomness():
            return ntk(model, self.gain)

    def read(self, folder: Path | None = None) -> Data:
        """The data, looked for in ``folder`` or in the usual places.

        Raises:
            UsageError: it is missing or not as expected.
        """
        found = data.digits() if self.source is None else data.read(self.source, folder)
        images, classes = found.train
        return replace(found, train=(images[: self.images], classes[: self.images]))


# The rates of digits are the best of a search, results/digits-rates.md.  Those of Adam and SGD for MLP and LeNet were
# the best of small grids on parts of the same data (4,000 images of MNIST, 10,000 of CIFAR-10; one to three seeds), and
# λ_1 of the paper's method there is that of digits, not searched.  The experiments of docs/reproduction.md take theirs
# from a search of their own.
TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits",
            build=lambda: mlp([64, 128, 64, 32, 10]),
            epochs=75,
            rates={"adam": 1e-2, "sgd": 0.3, "newton-summary-paper": 0.1},
            threads=1,  # too small for more
            network="MLP 64-128-64-32-10, tanh",
        ),
        Task(
            name="mlp-mnist",
            build=lambda: mlp([784, 1024, 200, 100, 10]),
            epochs=60,
            source=data.MNIST,
            rates={"adam": 1e-3, "sgd": 0.1, "newton-summary-paper": 0.1},
            network="MLP 784-1024-200-100-10, tanh",
        ),
        Task(
            name="lenet-cifar10",
            build=lenet,
            epochs=60,
            source=data.CIFAR10,
            rates={"adam": 3e-3, "sgd": 0.01, "newton-summary-paper": 0.1},
            network="LeNet, tanh",
        ),
        Task(
            name="vgg-cifar10",
            build=vgg11,
            epochs=50,
            source=data.CIFAR10,
            gain=math.sqrt(2),
            network="VGG-11', 64 to 512 channels, ELU",
        ),
        Task(
            name="bigmlp-cifar10",
            build=partial(mlp, [3072, *[1024] * 20, 10], nn.ELU),
            epochs=50,
            source=data.CIFAR10,
            gain=math.sqrt(2),
            network="BigMLP, 20 hidden layers of 1024, ELU",
        ),
        Task(
            name="vbigmlp-cifar10",
            build=partial(mlp, [3072, *[1024] * 100, 10], nn.ELU),
            epochs=50,
            source=data.CIFAR10,
            gain=math.sqrt(2),
            partition=lambda model: Partition.chunks(model, 5),
            network="VBigMLP, 100 hidden layers of 1024, ELU",
        ),
    )
}

BUDGETS = ("quick", "hours", "full")
"""The paper's sizes (``"full"``), its networks in as many epochs as a core does in some hours (``"hours"``; the same
but for VGG-11' and BigMLP), and less of everything, for minutes (``"quick"``)."""

_FEW: dict[str, Any] = {"images": 5000, "epochs": 12}
_QUICK: dict[str, dict[str, Any]] = {
    "mlp-mnist": _FEW,
    "lenet-cifar10": _FEW,
    "vgg-cifar10": {
        **_FEW,
        "build": partial(vgg11, 8),
        "network": "VGG-11', an eighth as wide: 8 to 64 channels, ELU",
    },
    "bigmlp-cifar10": {
        **_FEW,
        "build": partial(mlp, [3072, *[256] * 20, 10], nn.ELU),
        "network": "BigMLP, a quarter as wide: 20 hidden layers of 256, ELU",
    },
    "vbigmlp-cifar10": {
        **_FEW,
        "build": partial(mlp, [3072, *[64] * 100, 10], nn.ELU),
        "network": "VBigMLP, a sixteenth as wide: 100 hidden layers of 64, ELU",
    },
}
"""What differs at the quick budget: 600 steps on 5,000 images, and networks that a core can train in a minute."""

_HOURS: dict[str, dict[str, Any]] = {
    "vgg-cifar10": {"epochs": 2, "evaluated": 2000, "records": 3},
    "bigmlp-cifar10": {"epochs": 4, "evaluated": 2000, "records": 3},
}
_SMALLER: dict[str, dict[str, dict[str, Any]]] = {"quick": _QUICK, "hours": _HOURS}


def get_task(name: str, budget: str = "full", ntk: bool = False) -> Task:
    """A task by its name, at a budget; tasks that fit two cores as they are do not differ.

    Raises:
        UsageError: there is none of this name, or no such budget.
    """
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    if budget not in BUDGETS:
        raise UsageError(f"unknown budget {budget!r}: choose one of {', '.join(BUDGETS)}")
    smaller = _SMALLER.get(budget, {}).get(name, {})
    return replace(TASKS[name], budget=budget, ntk=ntk, **smaller)
