"""A learning-rate finder that knows layers: rates for every group of an optimizer, measured and then tried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from newton_summary._checks import check_count
from newton_summary._html import Cell, aligned, table
from newton_summary.measure import Engine, Loss, LossFunction, resolve_engine
from newton_summary.measure.next_step import OF_SCHEDULES, check_needs_no_closure, next_step, rates_held
from newton_summary.measure.stream import BatchStream, is_sized, kept
from newton_summary.measure.together import OneOrSeveral, members_of, together
from newton_summary.optim import MeasuredOptimizer
from newton_summary.parallel.sharding import UNSHARDED, check_whole
from newton_summary.partition import Partition, one_for_each, resolve_partition, unwrap
from newton_summary.summary import Summary
from newton_summary.watch.advice import alone
from newton_summary.watch.rehearsal import Learning, rehearsal
from newton_summary.watch.words import times

_HEADER = ("group", "learning rate", "before", "factor")
_MEASURED = 2  # batches that the rates are measured on
_WIDEST = 100.0  # no group's own rate counts as further than this from the shared one
_MOST_DOUBLINGS = 6  # of all rates, up or down, in the trials, from where none fails
_EPOCHS, _STEPS = 10, 1000  # of a training whose length is not told: where the data has a length, and where not
_TRIAL = 1 / 125  # of the training, which is the length of a trial: three to six of them are needed
_SHORTEST, _LONGEST = 8, 120  # of trials, in steps
_NORMAL = 1.4826  # the standard deviation of a normal distribution in its median deviations
_OF_OTHERS = {"param_names", *OF_SCHEDULES}  # names of another grouping, and rates of another training
_LEFT_OUT = "not suggested"  # the name of groups of what the partition leaves out
_HORIZON = 3 / 16  # the power of the length of a training with which its best constant rate falls (docs/research.md)


@dataclass(frozen=True, eq=False)
class SuggestedRates:
    """Learning rates for every group, and how they were found.  Its ``repr`` is a readable table.

    Args:
        rates: the suggested learning rate of each group.
        before: what the optimizer had.
        param_groups: ready for ``type(optimizer)(param_groups)``: the groups with their names, the suggested rates and
            the optimizer's other hyperparameters.  Of several optimizers, the groups of all of them.  Tensors that the
            partition leaves out, frozen ones or another model's, are in groups named ``"not suggested"``, as they were.
        trials: the loss that short trainings came to, by the factor on the suggested rates; infinite where one
            diverged.
        chosen: the factor of the trial that the rates are from: they are shorter than its, for a training is longer.
        steps: the length of the training that the rates are for.
        trial_steps: that of a trial.
        by_optimizer: ``param_groups`` by the optimizer that they are for, in the order in which these were given:
            ``Muon(suggested.by_optimizer[0])``, ``AdamW(suggested.by_optimizer[1])``.
        batches: how many there were; ``None`` where the data does not tell.
        dead: the factors of those trials in which some tensor stopped learning.
    """

    rates: dict[str, float]
    before: dict[str, float]
    param_groups: list[dict[str, Any]]
    trials: dict[float, float]
    chosen: float
    steps: int
    trial_steps: int
    by_optimizer: list[list[dict[str, Any]]]
    batches: int | None = None
    dead: tuple[float, ...] = ()

    def __repr__(self) -> str:
        return "\n".join([self._title, *aligned([_HEADER, *self._rows()]), *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return table(self._title, _HEADER, [[Cell(text) for text in row] for row in self._rows()], self._notes())

    @property
    def _title(self) -> str:
        trials = f"{len(self.trials)} trials of {_counted(self.trial_steps)} each"
        return f"Suggested learning rates for {_counted(self.steps)}, from {trials}"

    def _notes(self) -> list[str]:
        """What trials from one batch do not say, and where a network dies."""
        notes = []
        if self.batches == 1:
            notes.append("from one batch, which trainings fit at almost any rate: pass several, such as parts of it")
        if self.dead:
            notes.append(f"at {times(min(self.dead))} these rates some tensor stops learning: its gradient is 0 then")
        return notes

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (name, f"{rate:.2g}", f"{self.before[name]:.2g}", times(rate / self.before[name]))
            for name, rate in self.rates.items()
        ]


def suggest_rates(
    loss_fn: LossFunction,
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: OneOrSeveral,
    *,
    partition: Partition | str | None = None,
    steps: int | None = None,
    decays: bool = False,
    trial_steps: int | None = None,
    engine: str | Engine = "auto",
    seed: int = 0,
) -> SuggestedRates:
    """Learning rates for every group of an optimizer, whatever rates it has now.

    1. Along the optimizer's next step the loss is measured on batches that the step does not come from.  The best rate
       of each group alone and the best rate that all could share are averaged, logarithmically: the first
       knows the layers, the second their interactions.  An exact line search in the quadratic model sets their scale.
    2. One step says little of many.  So the model is trained for a while, 1 / 125 of ``steps`` but 8 to 120, with
       multiples of these rates, a factor of 2 apart, until the best one lies between worse ones.  What counts is the
       median loss of the second half; but a training in which a tensor stops learning while others go on, because its
       gradient is 0 on every batch of the second half, is worse than any in which none does.  Of multiples that cannot
       be told from the best one, batch by batch, the largest is taken.  What is added to a loss, or multiplies it, does
       not matter.
    3. A training is longer than its trial, and the longer it is, the shorter are the steps that are best for it.  Where
       noise limits them, the best constant rate falls with the square root of the length; where curvature does, it
       stays what it is.  Sweeps over many trainings are between: the trial's rates are multiplied by
       (trial / training)^(3/16); but not where a schedule brings the rates to zero.

    All that takes some 4 to 10 % of a training of a thousand steps, less of a longer one.

    The model is trained itself, not copied, by a shadow of the optimizer, whose hooks do not run.  After each training,
    and after an error, the model, the optimizer and all random states are what they were (docs/monitor.md).

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        model: the module that is to be trained, in the mode that it is trained in.
        batches: training batches: a ``DataLoader`` or a list.  They are read over and over where they are few.  Of a
            one-shot iterator no more than 120 are read, or ``trial_steps``.
        optimizer: any ``torch.optim.Optimizer`` over the model's parameters whose ``step()`` needs no closure; or
            several over different parameters, such as Muon for matrices and AdamW for the rest.
        partition: the groups, of whole tensors, or the name of a constructor.  Default: one for each tensor, coarser
            above 100 tensors; with several optimizers, one for each of them, which gives the ratio of their rates.
        steps: the length of the training that the rates are for.  Default: ten epochs, or 1,000 steps where the data
            does not tell its length.
        decays: whether a schedule brings the rates down to zero in the end: then they are those of its peak.
        trial_steps: the length of a trial, 2 at least.  Default: as above.  Longer ones are hardly a better guide: to a
            thousand steps fifty are not, at six times the price.
        engine: what measures: a name, or an :class:`~newton_summary.measure.Engine`.
        seed: fixes the order of the batches.

    Raises:
        ValueError: there are no batches; the partition is of another model; a parameter is sharded; a group has parts
            of tensors, or tensors that the optimizer does not hold; a learning rate is not positive, or ``None``; the
            optimizer's step needs a closure; the loss is not finite, or does not depend on the parameters.
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
    for what, length in (("steps", steps), ("trial_steps", trial_steps)):
        if length is not None:
            check_count(what, length)
    optimizer = together(optimizer)
    members = members_of(optimizer)
    if any(isinstance(member, MeasuredOptimizer) for member in members):
        raise TypeError("NewtonSummary sets its rates by itself: it needs no suggestion")
    check_needs_no_closure(optimizer)
    model = unwrap(model)
    partition = resolve_partition(partition, model, one_for_each(members))
    partition.check_is_of(model)
    check_whole(partition, "suggest_rates()", UNSHARDED)
    before = _rates_of(optimizer, partition)
    most = max(trial_steps or _LONGEST, 1 + _MEASURED)
    is_one_shot, batches = isinstance(batches, Iterator), kept(batches, most)
    count = len(batches) if is_sized(batches) else None
    is_cut = is_one_shot and count == most  # and does not tell its length
    training = int(steps) if steps is not None else _STEPS if is_cut else _length(batches)
    trial = trial_steps or min(max(round(_TRIAL * training), _SHORTEST), _LONGEST, training)
    trial = max(int(trial), 2)  # what a step does shows in the loss of the next one
    trials_of = _Trials(Loss(loss_fn, model), optimizer, partition, batches, seed)
    measured = profile(trials_of.measure(resolve_engine(engine)))
    multiple, tried = search(lambda multiple: trials_of.run((multiple * measured).tolist(), trial))
    factor = multiple * (1.0 if decays else min(trial / training, 1.0) ** _HORIZON)
    rates = dict(zip(partition.names, (factor * measured).tolist(), strict=True))
    trials = {other / factor: one.median for other, one in tried.items()}
    dead = tuple(other / factor for other, one in tried.items() if one.dead)
    groups = [_param_groups(member, partition, rates) for member in members]
    every = [group for own in groups for group in own]
    return SuggestedRates(rates, before, every, trials, multiple / factor, training, trial, groups, count, dead)


def _counted(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"


def _length(batches: Iterable[Any]) -> int:
    """The length of a training on this data, as a guess."""
    return _EPOCHS * max(len(batches), 1) if is_sized(batches) else _STEPS


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


class Tried(NamedTuple):
    """What a training came to.

    Args:
        losses: of the second half, shape (n,); infinite where it diverged.
        dead: whether some tensor that learnt at first no longer does, while others go on: low as the loss may be, that
            of a constant soon is, it stays there.
    """

    losses: Tensor
    dead: bool = False

    @property
    def median(self) -> float:
        """The median loss."""
        return float(self.losses.median())


def search(run: Callable[[float], Tried]) -> tuple[float, dict[float, Tried]]:
    """The largest multiple that is as good as the best, by steps of 2 from 1 to where losses rise.

    Where a training with the first multiples diverges or dies, it goes on from smaller ones.

    Args:
        run: trains with a multiple, on the same batches every time.  The median loss counts, and first whether it is of
            a network that learns on.

    Returns:
        That multiple, and all trainings by multiple, in ascending order.

    Raises:
        ValueError: all trainings diverged.
    """
    tried: dict[int, Tried] = {}  # by powers of two

    def at(power: int) -> tuple[bool, float]:
        if power not in tried:
            tried[power] = run(2.0**power)
        return math.isinf(tried[power].median) or tried[power].dead, tried[power].median

    start = 0
    while at(start)[0] and start > -_MOST_DOUBLINGS:
        start -= 2
    lowest = min((start, start + 1, start - 1), key=at)
    stride = lowest - start
    while stride and abs(lowest + stride - start) <= _MOST_DOUBLINGS and at(lowest + stride) < at(lowest):
        lowest += stride
    failed, loss = at(lowest)
    if math.isinf(loss):
        raise ValueError(
            "every trial diverged: the loss is not finite on some of these batches at any rate; look for it in them"
        )
    best = lowest
    reference = tried[lowest].losses
    while best < _MOST_DOUBLINGS and at(best + 1)[0] <= failed and is_as_good(tried[best + 1].losses, reference):
        best += 1
    return 2.0**best, {2.0**power: tried[power] for power in sorted(tried)}


def is_as_good(losses: Tensor, others: Tensor) -> bool:
    """Whether losses, shape (n,), are not higher than others of the same batches by more than a standard error.

    The difference is taken batch by batch: what makes a batch hard, and what is added to every loss, has no part in it.
    The error is from the median deviation: a few losses that explode are no excuse for themselves.
    """
    difference = losses - others
    deviation = _NORMAL * float((difference - difference.quantile(0.5)).abs().quantile(0.5))
    return float(difference.mean()) <= deviation / math.sqrt(len(difference))


class _Trials:
    """Trainings from the same start, on the same batches and with the same random numbers."""

    def __init__(
        self, loss: Loss, optimizer: torch.optim.Optimizer, partition: Partition, batches: Iterable[Any], seed: int
    ) -> None:
        self.loss, self.optimizer, self.partition = loss, optimizer, partition
        self.batches, self.seed = batches, seed

    def measure(self, engine: Engine) -> Summary:
        """The summary along the next step at learning rates of 1, on batches other than the step's own."""
        stream, parameters = BatchStream(self.batches, self.seed, what="batches"), self.partition.parameters
        with rehearsal(self.loss, self.optimizer, list(parameters), self.seed) as trained:
            trained.backward(trained.next(stream, self.partition.device))
            along = next_step(trained.optimizer, parameters)
            others = (trained.next(stream, self.partition.device) for _ in range(_MEASURED))
            parts = [engine.measure(self.loss, batch, self.partition, along, 3, "diagonal").cpu() for batch in others]
        failed = sum(not part.is_finite() for part in parts)
        if failed:
            raise ValueError(
                f"the loss or its derivatives are not finite on {failed} of {len(parts)} batches: look for it in the "
                f"data{' or the model' * (failed == len(parts))}"
            )
        return Summary.mean(parts)

    def run(self, rates: list[float], steps: int) -> Tried:
        """A short training, from the start."""
        stream, parameters = BatchStream(self.batches, self.seed, what="batches"), self.partition.parameters
        losses: list[float] = []
        learning, half = Learning(parameters, steps), steps // 2
        with rehearsal(self.loss, self.optimizer, list(parameters), self.seed) as trained:
            trained.set_rates(dict(zip(parameters, map(float, self.partition.spread(rates)), strict=True)))
            while len(losses) < steps:
                losses.append(trained.backward(trained.next(stream, self.partition.device)))
                if not math.isfinite(losses[-1]):
                    return Tried(torch.full((steps - half,), math.inf, dtype=torch.float64))
                learning.look()
                trained.step()
        return Tried(torch.tensor(losses[half:], dtype=torch.float64), learning.died)


def _rates_of(optimizer: torch.optim.Optimizer, partition: Partition) -> dict[str, float]:
    """The learning rate of each group of a partition, that of its first tensor."""
    held = rates_held(optimizer)
    for name, label, parameter in zip(partition.parameter_names, partition.labels, partition.parameters, strict=True):
        shape = tuple(parameter.shape)
        if not isinstance(label, int):
            raise ValueError(f"parameter {name!r}, of shape {shape}, is split between groups: an optimizer cannot be")
        if id(parameter) not in held:
            raise ValueError(f"the optimizer does not hold parameter {name!r}, of shape {shape}: add it, or freeze it")
        if not held[id(parameter)] > 0:
            raise ValueError(
                f"the learning rate of parameter {name!r} is {held[id(parameter)]}: start from any above 0, before a "
                "schedule that begins or ends at 0 is made"
            )
    return {
        name: held[id(partition.parameters[tensors[0]])]
        for name, tensors in zip(partition.names, partition.tensors_of, strict=True)
    }


def _param_groups(
    optimizer: torch.optim.Optimizer, partition: Partition, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """The partition's groups with these rates and the optimizer's other hyperparameters.

    A group whose tensors had several sets of hyperparameters becomes several.  What the partition leaves out, such as
    frozen tensors and those of another model, keeps the rate that it has.
    """
    result: list[dict[str, Any]] = []
    group_of = {
        id(p): partition.names[label]
        for p, label in zip(partition.parameters, partition.labels, strict=True)
        if isinstance(label, int)
    }
    for name in (*partition.names, None):
        for group in optimizer.param_groups:
            members = [p for p in group["params"] if group_of.get(id(p)) == name]
            if members:
                options = {key: value for key, value in group.items() if key not in _OF_OTHERS}
                told = {"name": _LEFT_OUT} if name is None else {"name": name, "lr": rates[name]}
                result.append({**options, **told, "params": members})
    return result
