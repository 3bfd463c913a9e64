"""Which changes of learning rates are worth it: pure functions of what trainings come to.

What a training is, whoever calls them says; :mod:`newton_summary.watch.rehearsed_advice` rehearses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

FACTOR = 3
"""What a rate is multiplied or divided by at a time: half a decade, as rates are swept."""

SURE = 1.8
"""Standard errors by which one of two losses must be lower: one-sided, one in thirty by chance."""

ROUNDING = 1e-5
"""Losses that are this close, relatively, may differ by the rounding of single precision: a hundred times its unit."""

MOST_CHANGES = 6
"""How many changes may follow one another."""

Levels: TypeAlias = tuple[int, ...]
"""For each group the power of :data:`FACTOR` that its rate is multiplied by."""


@dataclass(frozen=True)
class Trial:
    """A training with changed rates, compared with the best that was found before it.

    Args:
        words: the change, as ``"all rates × 3"``.
        factors: of all groups, on the rates that the optimizer has.
        training: the mean loss of the second half of the training; infinite where it diverged.
        averaged: the loss at the average of the weights over that half, on batches beyond those of the training.
        verdict: ``"better"``; ``"not better"``; or ``"no room"``, where a change as large again is worse than none.
    """

    words: str
    factors: tuple[float, ...]
    training: float
    averaged: float
    verdict: str


@dataclass(frozen=True)
class Outcome:
    """What a training comes to.

    Args:
        training: its losses over the second half, shape (n,); infinite where it diverged.
        averaged: the losses at the average of the weights over that half, on other batches, shape (m,).
        progress: of each group, shape (S,); see :class:`~newton_summary.watch.rehearsed_advice.RehearsedGroup`.
        noise: of each group, shape (S,).
    """

    training: Tensor
    averaged: Tensor
    progress: Tensor
    noise: Tensor

    @property
    def diverged(self) -> bool:
        """Whether some loss is not finite."""
        return not bool(self.training.isfinite().all() and self.averaged.isfinite().all())

    def is_lower(self, other: Outcome) -> bool:
        """Whether both losses are lower in the mean than another training's, be it by chance."""
        return _is_lower(self.training, other.training) and _is_lower(self.averaged, other.averaged)

    def is_better(self, other: Outcome) -> bool:
        """Whether both losses are lower in the mean, by more than rounding, and one of them surely."""
        pairs = (self.training, other.training), (self.averaged, other.averaged)
        lower = all(_is_lower(*pair, by=ROUNDING) for pair in pairs)
        return lower and max(_errors_lower(*pair) for pair in pairs) >= SURE


@dataclass(frozen=True)
class Found:
    """Where :func:`follow` has come to.

    Args:
        path: the levels that were accepted, one after another, from none changed on.
        outcomes: of all trainings.
        trials: the comparisons.
    """

    path: tuple[Levels, ...]
    outcomes: dict[Levels, Outcome]
    trials: tuple[Trial, ...]


def follow(run: Callable[[Levels], Outcome], names: Sequence[str], moves: Sequence[bool]) -> Found:
    """Changes rates by :data:`FACTOR` as long as one change is better than none: the best, and on from there.

    Four changes are tried: all rates, up and down; up, the group whose rate promises most; and down, the one that
    promises most.  In first order the loss changes by noise − progress where the logarithm of a group's rate grows by
    1: the way a group goes is proportional to its rate, and so is the loss that its swaying keeps up.

    A larger rate needs room: one that is good for some steps may be unstable after.  It is accepted only where one that
    is as much larger again is still no worse than the present one.

    Where training diverges, all rates are divided until it does not.

    Args:
        run: trains with the levels, on the same batches every time.
        names: of the groups.
        moves: whether each group has a rate that could change.
    """
    outcomes: dict[Levels, Outcome] = {}
    trials: list[Trial] = []

    def at(levels: Levels) -> Outcome:
        if levels not in outcomes:
            outcomes[levels] = run(levels)
        return outcomes[levels]

    def judged(words: str, change: Levels) -> Trial:
        now, changed = at(path[-1]), at(_plus(path[-1], change))
        verdict = "better" if changed.is_better(now) else "not better"
        if verdict == "better" and max(change) > 0 and not at(_plus(path[-1], change, change)).is_lower(now):
            verdict = "no room"
        factors = tuple(float(FACTOR) ** level for level in _plus(path[-1], change))
        return Trial(words, factors, float(changed.training.mean()), float(changed.averaged.mean()), verdict)

    path = [(0,) * len(names)]
    for _ in range(MOST_CHANGES):
        changes = candidates(at(path[-1]), names, moves)
        verdicts = {change: judged(words, change) for words, change in changes.items()}
        trials += verdicts.values()
        better = [change for change, trial in verdicts.items() if trial.verdict == "better"]
        if at(path[-1]).diverged and not better:
            better = [_plus(path[0], tuple(map(int, moves)), sign=-1)]
        if not better:
            break
        path.append(_plus(path[-1], min(better, key=lambda change: verdicts[change].averaged)))
    return Found(tuple(path[:1] if at(path[-1]).diverged else path), outcomes, tuple(trials))


def candidates(now: Outcome, names: Sequence[str], moves: Sequence[bool]) -> dict[str, Levels]:
    """The changes that are worth a trial, in words and levels; those of single groups only where there are several."""
    free = [s for s, able in enumerate(moves) if able]
    everything = tuple(map(int, moves))
    found = {
        f"all rates × {FACTOR}": everything,
        f"all rates ÷ {FACTOR}": _plus((0,) * len(names), everything, sign=-1),
    }
    gains = (now.progress - now.noise).tolist()
    if len(free) > 1 and all(math.isfinite(gains[s]) for s in free):
        up, down = max(free, key=gains.__getitem__), min(free, key=gains.__getitem__)
        found[f"`{names[up]}` × {FACTOR}"] = tuple(int(s == up) for s in range(len(names)))
        found[f"`{names[down]}` ÷ {FACTOR}"] = tuple(-int(s == down) for s in range(len(names)))
    return found


def confirmed(run: Callable[[Levels], Outcome], path: Sequence[Levels]) -> Levels:
    """The furthest levels of a path that are better than its first on batches, and over a time, not chosen by.

    Of many comparisons some come out well by chance, and some of what is good for a while is not for longer.
    """
    first = run(path[0]) if len(path) > 1 else None
    for levels in reversed(path[1:]):
        if first is not None and run(levels).is_better(first):
            return levels
    return path[0]


def _is_lower(losses: Tensor, others: Tensor, by: float = 0.0) -> bool:
    """Whether the mean of losses is lower than that of others, by this share of it; what diverges is never lower."""
    if not bool(losses.isfinite().all() and others.isfinite().all()):
        return bool(losses.isfinite().all())
    lowest, mean = float(losses.mean()), float(others.mean())
    return lowest < mean - by * abs(mean)


def _errors_lower(losses: Tensor, others: Tensor) -> float:
    """By how many standard errors losses are lower than others of the same batches, by signed ranks (Wilcoxon, 1945).

    The differences are taken batch by batch: what makes a batch hard has no part in them.  And their ranks count, not
    their sizes: where rates are off, a few losses are huge.
    """
    if not bool(others.isfinite().all()):
        return math.inf
    difference, n = others - losses, len(losses)
    ranks = difference.abs().argsort().argsort() + 1
    return float((difference.sign() * ranks).sum()) / math.sqrt(n * (n + 1) * (2 * n + 1) / 6)


def _plus(levels: Levels, *changes: Levels, sign: int = 1) -> Levels:
    for change in changes:
        levels = tuple(a + sign * b for a, b in zip(levels, change, strict=True))
    return levels
