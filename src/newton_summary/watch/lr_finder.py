"""A learning-rate finder that knows layers: rates for every group of an optimizer, measured and then tried out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary._checks import check_positive
from newton_summary.measure import Engine, Loss, LossFunction, preserved_randomness, resolve_engine
from newton_summary.measure.next_step import next_step
from newton_summary.measure.stream import BatchStream
from newton_summary.optim import MeasuredOptimizer
from newton_summary.partition import Partition, default_partition, resolve_partition, unwrap
from newton_summary.summary import Summary
from newton_summary.watch.advice import alone

_MEASURED = 8  # batches that the rates are measured on
_WIDEST = 100.0  # no group's own rate counts as further than this from the shared one
_MOST_DOUBLINGS = 6  # of all rates, up or down, in the trials
_TIE = 0.02  # trials whose losses are this close, relatively, cannot be told apart


@dataclass(frozen=True, eq=False)
class SuggestedRates:
    """Learning rates for every group, and how they were found.  Its ``repr`` is a readable table.

    Args:
        rates: the suggested learning rate of each group.
        before: what the optimizer had.
        param_groups: ready for ``type(optimizer)(param_groups)``: the groups with their names, the suggested rates and
            the optimizer's other hyperparameters.
        trials: the loss that short trainings came to with multiples of the measured rates, infinite where one diverged.
        multiple: the one that was chosen, which is part of the rates.
    """

    rates: dict[str, float]
    before: dict[str, float]
    param_groups: list[dict[str, Any]]
    trials: dict[float, float]
    multiple: float

    def __repr__(self) -> str:
        rows = [("group", "learning rate", "before", "factor")]
        rows += [
            (name, f"{rate:.2g}", f"{self.before[name]:.2g}", f"{rate / self.before[name]:.2g}×")
            for name, rate in self.rates.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
        return "\n".join(["Suggested learning rates", *lines])


def suggest_rates(
    loss_fn: LossFunction,
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    partition: Partition | str | None = None,
    steps: int = 120,
    engine: str | Engine = "auto",
    seed: int = 0,
) -> SuggestedRates:
    """Learning rates for every group of an optimizer, whatever rates it has now.

    1. Along the optimizer's next step the loss is measured on batches that the step does not come from.  The best rate
       of each group alone and the best rate that all could share are averaged, logarithmically: the first
       knows the layers, the second their interactions.  An exact line search in the quadratic model sets their scale.
    2. One step says little of many.  So copies of the model are trained for ``steps`` steps with multiples of these
       rates, a factor of 2 apart and then √2, until the best one lies between worse ones.  What counts is the median
       loss of the second half.  Short trainings favour small rates: of multiples whose losses are within 2 % of the
       lowest, the largest is taken.

    The model, the optimizer and all random states stay as they are (docs/monitor.md).

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        model: the module that is to be trained, in the mode that it is trained in.
        batches: training batches: a ``DataLoader`` or a list.  They are read over and over where they are few.
        optimizer: any ``torch.optim.Optimizer`` over the model's parameters whose ``step()`` needs no closure.
        partition: the groups, of whole tensors, or the name of a constructor.  Default: one for each tensor, coarser
            above 100 tensors.
        steps: the length of each trial.
        engine: what measures: a name, or an :class:`~newton_summary.measure.Engine`.
        seed: fixes the order of the batches.

    Raises:
        ValueError: there are no batches; a group has parts of tensors, or tensors that the optimizer does not hold; a
            learning rate is not positive; the loss is not finite.
        TypeError: the optimizer is a :class:`~newton_summary.NewtonSummary`, which sets its rates itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(8, 16, 4)]
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean()
        >>> suggested = suggest_rates(loss_fn, model, batches, torch.optim.Adam(model.parameters(), lr=1e-5))
        >>> optimizer = torch.optim.Adam(suggested.param_groups)
        >>> min(suggested.rates.values()) > 1e-4
        True
    """
    check_positive("steps", steps)
    if isinstance(optimizer, MeasuredOptimizer):
        raise TypeError("NewtonSummary sets its rates by itself: it needs no suggestion")
    model = unwrap(model)
    partition = resolve_partition(partition, model, default_partition)
    before = _rates_of(optimizer, partition)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    start = _Start(loss_fn, model, optimizer, partition, batches, seed)
    with preserved_randomness({partition.device}):
        measured = profile(start.measure(resolve_engine(engine)))
        multiple, trials = search(lambda multiple: start.trial((multiple * measured).tolist(), steps))
    rates = dict(zip(partition.names, (multiple * measured).tolist(), strict=True))
    return SuggestedRates(rates, before, _param_groups(optimizer, partition, rates), trials, multiple)


def profile(summary: Summary) -> Tensor:
    """Rates for every group from one summary, in units of its direction: shape (S,), positive.

    √(shared · own), where *shared* is the best rate for all groups together and *own* that of each group alone, times
    the factor that is best for all of them in the quadratic model.  A group without descent of its own gets
    the shared rate.
    """
    hessian = summary.tensor(2)
    shared = (summary.gradient.sum() / hessian.sum()).abs()
    own = alone(summary)
    own = torch.where(own > 0, own, shared).clamp(shared / _WIDEST, shared * _WIDEST)
    mean = (shared * own).sqrt()
    factor = (summary.gradient @ mean / (mean @ hessian @ mean)).abs()
    result: Tensor = mean * factor if 0 < factor < math.inf else mean
    if not bool(result.isfinite().all() and (result > 0).all()):
        raise ValueError("the loss does not change along the optimizer's step: is the model trained already?")
    return result


def search(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The largest multiple whose score is as good as the lowest: by steps of 2 from 1 to where scores rise, then by √2.

    Args:
        score: a function of a multiple.

    Returns:
        That multiple, and all scores by multiple, in ascending order.

    Raises:
        ValueError: all scores are infinite.
    """
    scores: dict[int, float] = {}  # by half powers of two

    def at(half: int) -> float:
        if half not in scores:
            scores[half] = score(2 ** (half / 2))
        return scores[half]

    best = min((0, 2, -2), key=at)
    stride = best
    while stride and abs(best + stride) <= 2 * _MOST_DOUBLINGS and at(best + stride) < at(best):
        best += stride
    best = min((best, best + 1, best - 1), key=at)
    if math.isinf(at(best)):
        raise ValueError("every trial diverged: the loss is not finite on these batches")
    enough = at(best) + _TIE * abs(at(best))
    while best < 2 * _MOST_DOUBLINGS and at(best + 1) <= enough:
        best += 1
    return 2 ** (best / 2), {2 ** (half / 2): scores[half] for half in sorted(scores)}


class _Start:
    """Where every trial starts from: copies of a model and its optimizer.

    The copy of the optimizer has one parameter group for each tensor, and learning rates of 1.
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        partition: Partition,
        batches: Iterable[Any],
        seed: int,
    ) -> None:
        self.loss_fn, self.batches, self.seed = loss_fn, batches, seed
        self.model, self.optimizer, self.partition = copy.deepcopy((model, optimizer, partition))
        options = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self.optimizer.param_groups = [{**options[id(p)], "params": [p], "lr": 1.0} for p in self.partition.parameters]

    def measure(self, engine: Engine) -> Summary:
        """The summary along the next step at learning rates of 1, on batches other than the step's own."""
        stream = BatchStream(self.batches, self.seed)
        device = self.partition.device
        self._backward(self.model, self.optimizer, stream.next(device))
        along = next_step(self.optimizer, self.partition.parameters)
        loss = Loss(self.loss_fn, self.model)
        others = (stream.next(device) for _ in range(_MEASURED))
        summary = Summary.mean(
            [engine.measure(loss, batch, self.partition, along, 3, "diagonal").cpu() for batch in others]
        )
        if not summary.is_finite():
            raise ValueError("the loss or its derivatives are not finite: look for it in the data or the model")
        return summary

    def trial(self, rates: list[float], steps: int) -> float:
        """The median loss of the second half of a short training; every trial meets the same batches and draws."""
        torch.manual_seed(self.seed)
        model, optimizer, partition = copy.deepcopy((self.model, self.optimizer, self.partition))
        by_parameter = dict(zip(map(id, partition.parameters), partition.spread(rates), strict=True))
        for group in optimizer.param_groups:
            group["lr"] = by_parameter[id(group["params"][0])]
        stream = BatchStream(self.batches, self.seed)
        losses = []
        for _ in range(steps):
            losses.append(self._backward(model, optimizer, stream.next(partition.device)))
            if not math.isfinite(losses[-1]):
                return math.inf
            optimizer.step()
        return float(torch.tensor(losses[steps // 2 :]).median())

    def _backward(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = self.loss_fn(model, batch)
        loss.backward()
        return float(loss.detach())


def _rates_of(optimizer: torch.optim.Optimizer, partition: Partition) -> dict[str, float]:
    """The learning rate of each group of a partition, that of its first tensor."""
    held = {id(p): float(group.get("lr", 0.0)) for group in optimizer.param_groups for p in group["params"]}
    for name, label, parameter in zip(partition.parameter_names, partition.labels, partition.parameters, strict=True):
        shape = tuple(parameter.shape)
        if not isinstance(label, int):
            raise ValueError(f"parameter {name!r}, of shape {shape}, is split between groups: an optimizer cannot be")
        if id(parameter) not in held:
            raise ValueError(f"the optimizer does not hold parameter {name!r}, of shape {shape}: add it, or freeze it")
        if not held[id(parameter)] > 0:
            raise ValueError(
                f"the learning rate of parameter {name!r} is {held[id(parameter)]}: start from any above 0"
            )
    return {
        name: held[id(partition.parameters[tensors[0]])]
        for name, tensors in zip(partition.names, partition.tensors_of, strict=True)
    }


def _param_groups(
    optimizer: torch.optim.Optimizer, partition: Partition, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """The partition's groups with these rates and the optimizer's other hyperparameters.

    A group whose tensors had several sets of hyperparameters becomes several.
    """
    result = []
    group_of = {
        id(p): partition.names[label]
        for p, label in zip(partition.parameters, partition.labels, strict=True)
        if isinstance(label, int)
    }
    for name in partition.names:
        for group in optimizer.param_groups:
            members = [p for p in group["params"] if group_of.get(id(p)) == name]
            if members:
                options = {key: value for key, value in group.items() if key not in ("initial_lr", "param_names")}
                result.append({**options, "name": name, "params": members, "lr": rates[name]})
    return result
