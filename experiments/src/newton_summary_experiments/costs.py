"""What things cost: a step of every optimizer, and a summary of given size (docs/method.md, sections 1 and 4).

Times are of the processor, with one thread: on a machine that others use too they say more than a clock does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn import functional

from newton_summary.measure import Engine, ForwardEngine, Loss, NestedEngine, summarize
from newton_summary.partition import Partition
from newton_summary.report.records import Config, Row
from newton_summary_experiments.data import Batch, Data
from newton_summary_experiments.models import initialised, mlp
from newton_summary_experiments.tasks import Task
from newton_summary_experiments.training import Trainer

ROUNDS = 8
_STEPS = 10
_REPEATS = 5


# A step ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCost:
    """Seconds of a training step.

    Args:
        plain: of a step without a measurement.
        measuring: what a measurement (of rates, or of K-FAC's factors) adds to it.
    """

    plain: float
    measuring: float = 0.0

    def seconds(self, row: Row) -> float:
        """The time of the training up to a row of its record."""
        return self.plain * row.step + self.measuring * row.counts.get("measured", 0)


def step_costs(task: Task, data: Data, configs: Mapping[str, Config], rounds: int = ROUNDS) -> dict[str, StepCost]:
    """The cost of a step of every optimizer, medians of interleaved rounds of ten steps.

    Args:
        task: what is trained.
        data: its data.
        configs: a run of each optimizer.
        rounds: how many there are; the first does not count.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainers = {name: Trainer(task, config, data) for name, config in configs.items()}
        plain: dict[str, list[float]] = {name: [] for name in configs}
        measuring: dict[str, list[float]] = {name: [] for name in configs}
        for number in range(rounds):
            for name, trainer in trainers.items():
                for _ in range(_STEPS):
                    spent, measured = _timed_step(trainer)
                    if number:
                        (measuring if measured else plain)[name].append(spent)
    finally:
        torch.set_num_threads(before)
    costs = {}
    for name in configs:
        usual = median(plain[name])
        extra = max(median(measuring[name]) - usual, 0.0) if measuring[name] else 0.0
        costs[name] = StepCost(usual, extra)
    return costs


def _timed_step(trainer: Trainer) -> tuple[float, bool]:
    """Takes a step: its seconds, and whether something was measured in it."""
    counts = getattr(trainer.optimizer, "counts", {})
    before = counts.get("measured", 0)
    start = time.process_time()
    trainer.take_step()
    spent = time.process_time() - start
    return spent, counts.get("measured", 0) > before


# A summary ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SummaryCost:
    """What a summary costs.

    Args:
        parameters: P.
        groups: S.
        order: d.
        entries: S^d.
        full: P^d, the entries of the full derivative.
        nested: processor time of nested differentiation, in gradients of the same loss.
        forward: that of the forward engine.
    """

    parameters: int
    groups: int
    order: int
    entries: int
    full: float
    nested: float
    forward: float


def summary_costs() -> list[SummaryCost]:
    """The cost of summaries of an MLP of ten layers, tanh, on 100 random images, against P, S and d."""
    costs = []
    for width in (32, 128):
        for count in (None, 1, 3, 10):
            costs += [_summary_cost(width, count, order) for order in (1, 2, 3)]
    return costs


def _summary_cost(width: int, chunks: int | None, order: int) -> SummaryCost:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(100, 64, generator=generator), torch.randint(10, (100,), generator=generator)
    model = initialised(lambda: mlp([64, *[width] * 9, 10]), 0)
    partition = Partition.trivial(model) if chunks is None else Partition.chunks(model, chunks)

    def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def gradient() -> object:
        return torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))

    loss = Loss(loss_fn, model)
    direction = [g.detach() for g in torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))]

    def measurement(engine: Engine) -> Callable[[], object]:
        return lambda: engine.measure(loss, batch, partition, direction, order, "full")

    unit = _time(gradient)
    groups, parameters = len(partition), sum(p.numel() for p in model.parameters())
    return SummaryCost(
        parameters,
        groups,
        order,
        groups**order,
        float(parameters) ** order,
        _time(measurement(NestedEngine())) / unit,
        _time(measurement(ForwardEngine())) / unit,
    )


def _time(function: Callable[[], object]) -> float:
    """Processor time with one thread: the median of five, after one that does not count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        function()
        times = []
        for _ in range(_REPEATS):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(before)
    return median(times)


def full_batch_seconds(task: Task, data: Data) -> tuple[float, int]:
    """The seconds by the clock that H̄ takes over all images there are, and how many these are."""
    images = torch.cat([data.train[0], data.validation[0]])
    classes = torch.cat([data.train[1], data.validation[1]])
    model = task.make_model(0)
    batches = list(zip(images.split(1000), classes.split(1000), strict=True))
    start = time.perf_counter()
    summarize(task.loss_fn, model, batches, partition=task.partition(model), order=2)
    return time.perf_counter() - start, len(classes)
