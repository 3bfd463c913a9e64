"""Advice that was tried out before it is given: factors on learning rates that hold when they are acted on.

What one step tells of many is little (:mod:`newton_summary.watch.advice`).  Here changes of the rates are rehearsed:
each trains the model for a while, from the same start and on the same batches, and is advised only if it is better in
two ways that pull in opposite directions.  A smaller rate lowers the training loss by itself, because noise dies down;
a larger one lowers the loss at the average of the weights, because it goes further.  Only where a rate is off does a
change of it lower both.  And that must be seen twice, the second time on other batches and for twice as long.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from newton_summary._checks import check_count
from newton_summary._html import Cell, aligned, table
from newton_summary.measure import Loss
from newton_summary.measure.next_step import OF_SCHEDULES, rates_held
from newton_summary.measure.stream import BatchStream, is_sized, kept
from newton_summary.measure.together import OneOrSeveral, together
from newton_summary.parallel.sharding import UNSHARDED, check_whole
from newton_summary.partition import Partition, products
from newton_summary.watch.rate_search import FACTOR, Levels, Outcome, Trial, confirmed, follow
from newton_summary.watch.rehearsal import rehearsal

SHORTEST = 8
"""Steps of a trial below which nothing could be so sure: the second half has four losses."""

HELD_OUT = 20
"""Batches, beyond those of the training, that the average of the weights is judged on."""

_HEADER = ("group", "learning rate", "factor", "advised")


# What is told ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RehearsedGroup:
    """What one group is told.

    Args:
        name: of the group.
        learning_rate: what it had, that of its first tensor; NaN where the optimizer does not hold it.
        factor: the advised factor on it; 1: leave it.
        progress: ḡ · (the mean weights of the first half of a training at the present rates − those of the second), ḡ
            being the mean gradient of the second half: how far the loss falls along the group's way.  NaN where the
            training diverged.
        noise: the mean of g · (weights − their mean) over the second half: what the group's swaying costs.
    """

    name: str
    learning_rate: float
    factor: float
    progress: float
    noise: float


@dataclass(frozen=True)
class RehearsedAdvice:
    """Factors on learning rates that were tried out.  Its ``repr`` is a readable table.

    Args:
        groups: one entry for each group.
        steps: the length of each trial.
        left: the loss at averaged weights after so many steps at the present rates; infinite where they diverge.
        acted: the same, with the factors.
        trials: what was tried, in this order.
        words: what to do, in a sentence.
    """

    groups: tuple[RehearsedGroup, ...]
    steps: int
    left: float
    acted: float
    trials: tuple[Trial, ...]
    words: str
    _parameters: tuple[tuple[Tensor, ...], ...] = field(default=(), repr=False, compare=False)

    @property
    def factors(self) -> dict[str, float]:
        """The factor of every group."""
        return {group.name: group.factor for group in self.groups}

    @property
    def leaves(self) -> bool:
        """Whether the advice is to leave all rates as they are."""
        return all(group.factor == 1 for group in self.groups)

    def apply(self, optimizer: OneOrSeveral) -> None:
        """Multiplies the learning rates of an optimizer's parameter groups, and those that a scheduler keeps in them.

        A scheduler that was made before may set the rates back: some keep base rates of their own.  It warns where
        there was one, by the ``initial_lr`` that it leaves: make it anew afterwards, with ``last_epoch``.

        Args:
            optimizer: that which was rehearsed, or another one over the same parameters; or several.

        Raises:
            ValueError: a parameter group holds groups whose factors differ, or none holds a tensor that was rehearsed;
                no rate was changed then.
        """
        param_groups = together(optimizer).param_groups
        rehearsed = {id(p) for own in self._parameters for p in own}
        if not any(id(p) in rehearsed for group in param_groups for p in group["params"]):
            raise ValueError(
                "the optimizer holds no parameter that was rehearsed: make it from those of the model that the monitor "
                "watches"
            )
        factors = [self._factor_of(number, group) for number, group in enumerate(param_groups)]
        if any("initial_lr" in group for group, factor in zip(param_groups, factors, strict=True) if factor != 1):
            warnings.warn(
                "a scheduler was made for this optimizer before, and may set the rates back to what it remembers, as "
                "LambdaLR and CyclicLR do, other than StepLR: make it anew after apply()",
                stacklevel=2,
            )
        for group, factor in zip(param_groups, factors, strict=True):
            for key in {"lr", *OF_SCHEDULES} & group.keys() if factor != 1 else ():
                if isinstance(group[key], Tensor):
                    group[key].mul_(factor)  # a captured graph reads it where it is
                else:
                    group[key] = group[key] * factor

    def _factor_of(self, number: int, param_group: dict[str, Any]) -> float:
        """The factor that all of an optimizer's parameter group share; 1 for what was not rehearsed."""
        holder = {id(p): group for group, own in zip(self.groups, self._parameters, strict=True) for p in own}
        inside = list(dict.fromkeys(holder[id(p)] for p in param_group["params"] if id(p) in holder))
        if len({group.factor for group in inside}) > 1:
            told = ", ".join(f"{group.name!r} × {_short(group.factor)}" for group in inside[:4])
            raise ValueError(
                f"the optimizer's parameter group {param_group.get('name', number)!r} has one learning rate, and holds "
                f"groups that are advised different factors ({told}{', …' if len(inside) > 4 else ''}): make the "
                "optimizer with a parameter group for each of the monitor's groups, or the monitor with "
                "partition='trivial', which advises on all rates at once"
            )
        return inside[0].factor if inside else 1.0

    def to_dict(self) -> dict[str, float | str | None]:
        """Flat, with plain values, as what logs dictionaries takes it: ``None`` stands for infinite or unknown.

        Keys are ``factor/NAME`` and ``learning_rate/NAME`` for every group, ``steps``, ``left``, ``acted``, ``words``.
        """
        flat: dict[str, float | str | None] = {f"factor/{group.name}": group.factor for group in self.groups}
        flat |= {f"learning_rate/{group.name}": _finite(group.learning_rate) for group in self.groups}
        return (
            flat
            | {"steps": self.steps, "left": _finite(self.left), "acted": _finite(self.acted)}
            | {"words": self.words}
        )

    def _repr_html_(self) -> str:
        """A table for notebooks, with what to do; groups to be left as they are, are grey."""
        rows = [
            [Cell(text, grey=group.factor == 1) for text in row]
            for group, row in zip(self.groups, self._rows(), strict=True)
        ]
        return table(f"Learning rates, rehearsed over {self.steps} steps", _HEADER, rows, [self.words])

    def __repr__(self) -> str:
        return "\n".join([f"Rehearsed over {self.steps} steps: {self.words}", *aligned([_HEADER, *self._rows()])])

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                group.name,
                "–" if math.isnan(group.learning_rate) else f"{group.learning_rate:.2g}",
                f"{_short(group.factor)}×",
                "–" if math.isnan(group.learning_rate) else f"{group.learning_rate * group.factor:.2g}",
            )
            for group in self.groups
        ]


def rehearse(
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    partition: Partition,
    batches: Iterable[Any],
    *,
    steps: int,
    seed: int = 0,
    before_step: Callable[[], Any] | None = None,
) -> RehearsedAdvice:
    """What :meth:`~newton_summary.Monitor.rehearse` does; nothing of the user's changes.

    Raises:
        ValueError: a tensor is split between groups, no group has a learning rate above 0, there are no batches, or
            one, or trials are shorter than :data:`SHORTEST`.
    """
    check_count("steps", steps)
    if steps < SHORTEST:
        raise ValueError(f"steps must be at least {SHORTEST}, got {steps}: from shorter trials nothing is sure")
    check_whole(partition, "rehearse()", UNSHARDED)
    rates = _rates_of(optimizer, partition)
    batches = kept(batches, 3 * steps + 2 * HELD_OUT)  # as many as trials and the confirmation read
    _check_judges(batches, steps)
    stage = _Stage(loss, optimizer, partition, batches, rates, before_step)
    groups = _groups_of(partition, rates)
    found = follow(lambda levels: stage.run(levels, steps, seed), partition.names, [rate > 0 for _, rate in groups])
    chosen = confirmed(lambda levels: stage.run(levels, 2 * steps, seed + 1), found.path)
    left, acted = found.outcomes[found.path[0]], found.outcomes[chosen]
    told = tuple(
        RehearsedGroup(name, rate, float(FACTOR) ** level, progress, noise)
        for (name, rate), level, progress, noise in zip(
            groups, chosen, left.progress.tolist(), left.noise.tolist(), strict=True
        )
    )
    return RehearsedAdvice(
        groups=told,
        steps=steps,
        left=float(left.averaged.mean()),
        acted=float(acted.averaged.mean()),
        trials=found.trials,
        words=_words(told, steps, left, acted, unconfirmed=chosen != found.path[-1]),
        _parameters=tuple(tuple(partition.parameters[i] for i in tensors) for tensors in partition.tensors_of),
    )


def _check_judges(batches: Iterable[Any], steps: int) -> None:
    """Says where trainings are judged on batches that they were trained on."""
    if not is_sized(batches):
        return
    count = len(batches)
    if count == 1:
        raise ValueError(
            "rehearse() got one batch: a training on it says nothing of others; pass several, such as parts of it"
        )
    if 1 < count <= steps:
        warnings.warn(
            f"{count} batches are few for trials of {steps} steps: they are judged on batches that they were trained "
            f"on, so that a rate may look better than it is; pass more than {steps}, or {steps + HELD_OUT} for batches "
            "that are all new",
            stacklevel=4,
        )


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """Where trainings are rehearsed, all from the same start."""

    loss: Loss
    optimizer: torch.optim.Optimizer
    partition: Partition
    batches: Iterable[Any]
    rates: dict[Tensor, float]
    before_step: Callable[[], Any] | None

    def run(self, levels: Levels, steps: int, seed: int) -> Outcome:
        """Trains with rates changed by these levels, and gives what it came to."""
        stream, device = BatchStream(self.batches, seed, what="batches"), self.partition.device
        factors = self.partition.spread([float(FACTOR) ** level for level in levels])
        rates: dict[Tensor, float] = {
            p: self.rates[p] * float(factor)
            for p, factor in zip(self.partition.parameters, factors, strict=True)
            if p in self.rates
        }
        losses: list[float] = []
        with rehearsal(self.loss, self.optimizer, list(rates), seed) as trained:
            trained.set_rates(rates)
            moves = _Moves(list(rates), steps)
            for _ in range(steps):
                losses.append(trained.backward(trained.next(stream, device)))
                if not math.isfinite(losses[-1]):
                    return self._diverged(steps)
                moves.add()
                if self.before_step is not None:
                    self.before_step()
                trained.step()
            moves.set_averages()
            averaged = [self.loss.value(trained.next(stream, device)) for _ in range(HELD_OUT)]
        second = torch.tensor(losses[steps // 2 :], dtype=torch.float64)
        return Outcome(second, torch.tensor(averaged, dtype=torch.float64), *self._by_group(moves))

    def _diverged(self, steps: int) -> Outcome:
        training, averaged = (torch.full((n,), math.inf, dtype=torch.float64) for n in (steps - steps // 2, HELD_OUT))
        unknown = torch.full((len(self.partition),), math.nan, dtype=torch.float64)
        return Outcome(training, averaged, unknown, unknown)

    def _by_group(self, moves: _Moves) -> tuple[Tensor, Tensor]:
        """Progress and noise of every group, each shape (S,)."""
        total = torch.zeros(2, len(self.partition), dtype=torch.float64)
        labels = dict(zip(map(id, self.partition.parameters), self.partition.labels, strict=True))
        for p, progress, noise in zip(moves.parameters, *moves.told(), strict=True):
            total[:, labels[id(p)]] += torch.tensor([progress, noise], dtype=torch.float64)
        return total[0], total[1]


class _Moves:
    """Sums over a training that tell each tensor's progress and noise, and the average of the weights.

    Weights are counted from where they begin, in single precision at least: sums of small moves lose nothing.
    """

    def __init__(self, parameters: list[Tensor], steps: int) -> None:
        self.parameters, self._half, self._count, self._taken = parameters, steps // 2, steps - steps // 2, 0
        self._start = [_wide(p) for p in parameters]
        self._first, self._second, self._gradient = ([torch.zeros_like(w) for w in self._start] for _ in range(3))
        self._products = [torch.zeros((), dtype=torch.float64, device=p.device) for p in parameters]

    def add(self) -> None:
        """Takes the present weights in, and in the second half their gradients."""
        for i, p in enumerate(self.parameters):
            moved = _wide(p) - self._start[i]
            if self._taken < self._half:
                self._first[i] += moved
                continue
            self._second[i] += moved
            if p.grad is not None:
                gradient = _wide(p.grad)
                self._gradient[i] += gradient
                self._products[i] += _dot(gradient, moved)
        self._taken += 1

    @torch.no_grad()
    def set_averages(self) -> None:
        """Puts the weights where they were in the mean of the second half."""
        for p, start, second in zip(self.parameters, self._start, self._second, strict=True):
            p.copy_(start + second / self._count)

    def told(self) -> tuple[list[float], list[float]]:
        """Progress and noise of every tensor."""
        progress, noise = [], []
        for first, second, gradient, product in zip(
            self._first, self._second, self._gradient, self._products, strict=True
        ):
            before, after, slope = first / max(self._half, 1), second / self._count, gradient / self._count
            progress.append(_dot(slope, before - after))
            noise.append(product / self._count - _dot(slope, after))
        return torch.stack(progress).tolist(), torch.stack(noise).tolist()


def _wide(tensor: Tensor) -> Tensor:
    """A dense copy, of single precision at least."""
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return products(a, b).sum(dtype=torch.float64)


def _rates_of(optimizer: torch.optim.Optimizer, partition: Partition) -> dict[Tensor, float]:
    """The learning rate of every tensor of a partition that the optimizer holds."""
    held = rates_held(optimizer)
    for name, label, p in zip(partition.parameter_names, partition.labels, partition.parameters, strict=True):
        if not isinstance(label, int):
            raise ValueError(
                f"parameter {name!r}, of shape {tuple(p.shape)}, is split between groups: an optimizer has one "
                "learning rate for a tensor; rehearse with a partition of whole tensors"
            )
    rates: dict[Tensor, float] = {p: held[id(p)] for p in partition.parameters if id(p) in held}
    if not any(rate > 0 for rate in rates.values()):
        raise ValueError(
            "no learning rate of the optimizer is above 0, and a factor on 0 is still 0: rehearse at a step where its "
            "schedule gives more"
        )
    return rates


def _groups_of(partition: Partition, rates: dict[Tensor, float]) -> list[tuple[str, float]]:
    """Every group's name and learning rate, that of its first tensor which the optimizer holds."""
    own = [[partition.parameters[i] for i in tensors] for tensors in partition.tensors_of]
    return [
        (name, next((rates[p] for p in members if p in rates), math.nan))
        for name, members in zip(partition.names, own, strict=True)
    ]


# Words ----------------------------------------------------------------------------------------------------------------


def _words(groups: Sequence[RehearsedGroup], steps: int, left: Outcome, acted: Outcome, *, unconfirmed: bool) -> str:
    before, after = float(left.averaged.mean()), float(acted.averaged.mean())
    factors = {group.factor for group in groups if group.learning_rate > 0}
    if factors == {1.0}:
        if math.isinf(before):
            return f"training diverges within {steps} steps, at these rates and at all that were tried"
        if unconfirmed:
            return (
                f"leave the rates as they are: what lowered the loss over {steps} steps did not do so over {2 * steps} "
                "on other batches"
            )
        return (
            f"leave the rates as they are: over {steps} steps no change lowered both the training loss and that of "
            "averaged weights"
        )
    gain = (
        f"at the present ones training diverges within {steps} steps"
        if math.isinf(before)
        else f"after {steps} steps the loss at averaged weights is then {after:.4g} in place of {before:.4g}"
    )
    return f"{_told(groups)}: {gain}"


def _told(groups: Sequence[RehearsedGroup]) -> str:
    """The factors, in words: what most groups share, and then those that differ."""
    able = [group for group in groups if group.learning_rate > 0]
    counts = Counter(group.factor for group in able)
    shared = max(counts, key=lambda factor: (counts[factor], factor == 1))
    others = [group for group in able if group.factor != shared]
    by_factor = {f: [g.name for g in others if g.factor == f] for f in dict.fromkeys(g.factor for g in others)}
    parts = []
    for factor, names in by_factor.items():
        rate = ("that", "those") if shared != 1 else ("the rate", "the rates")
        listed = f"{rate[len(names) > 1]} of {', '.join(f'`{name}`' for name in names)}"
        parts.append(f"{_verb(factor)} {listed}{_by(factor)}" if factor != 1 else f"leave {listed}")
    if shared == 1:
        return "; ".join(parts)
    everything = f"{_verb(shared)} all rates{_by(shared)}"  # and of those that differ the whole factor is told
    return f"{everything}, but {', and '.join(parts)}" if parts else everything


def _verb(factor: float) -> str:
    return "multiply" if factor > 1 else "divide"


def _by(factor: float) -> str:
    return f" by {_short(max(factor, 1 / factor))}"


def _short(value: float) -> str:
    """A power of 3: 27, 3, 0.33, 0.11."""
    return f"{value:.0f}" if value >= 1 else f"{value:.2g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
