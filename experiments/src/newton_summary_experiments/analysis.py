"""What the paper's claims are checked by: numbers taken from a summary, and from the record of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import geometric_mean, median

import torch
from torch import Tensor

from newton_summary.plots.parts import is_bias, layer
from newton_summary.report.records import Row
from newton_summary.summary import Summary
from newton_summary_experiments.costs import StepCost

# Interactions ---------------------------------------------------------------------------------------------------------


def unit_diagonal(matrix: Tensor) -> Tensor:
    """M_ij / √|M_ii M_jj|: free of the lengths of the groups' directions; 0 in rows whose diagonal is 0."""
    scale = matrix.diagonal().abs().sqrt()
    return (matrix / scale / scale[:, None]).nan_to_num(0.0, 0.0, 0.0)


def inverse(matrix: Tensor) -> Tensor:
    """The inverse in float64, after a scaling to a unit diagonal: H̄ spans many orders of magnitude."""
    scale = matrix.double().diagonal().abs().sqrt()
    found: Tensor = torch.linalg.inv(matrix.double() / scale / scale[:, None]) / scale / scale[:, None]
    return found


def layers_of(names: Sequence[str]) -> list[str]:
    """The layer of each group."""
    return [layer(name) for name in names]


def share_off_blocks(matrix: Tensor, blocks: Sequence[str]) -> float:
    """The Frobenius norm outside the diagonal blocks, over that of the whole matrix.

    Args:
        matrix: shape (S, S).
        blocks: the block that each group belongs to.

    Example:
        >>> round(share_off_blocks(torch.ones(2, 2), ["a", "b"]), 3)
        0.707
    """
    together = torch.tensor([[a == b for b in blocks] for a in blocks])
    return float(matrix.masked_fill(together, 0.0).norm() / matrix.norm())


def share_off_tridiagonal(matrix: Tensor, blocks: Sequence[str]) -> float:
    """The same outside the blocks of equal and of neighbouring layers."""
    places = torch.tensor([list(dict.fromkeys(blocks)).index(block) for block in blocks])
    near = (places - places[:, None]).abs() <= 1
    return float(matrix.masked_fill(near, 0.0).norm() / matrix.norm())


def long_range(summary: Summary) -> float:
    """The largest |H̄_ij| / √|H̄_ii H̄_jj| of weights of two layers at least half the network apart."""
    matrix = unit_diagonal(summary.tensor(2))
    weights = [i for i, name in enumerate(summary.names) if not is_bias(name)]
    reach = math.ceil(len(weights) / 2)
    pairs = [(a, b) for n, a in enumerate(weights) for b in weights[n + reach :]]
    return max(float(matrix[a, b].abs()) for a, b in pairs)


def mean_interaction(summary: Summary, first: Sequence[str], second: Sequence[str] | None = None) -> float:
    """The mean of |H̄_ij| / √|H̄_ii H̄_jj| over pairs of different layers.

    Args:
        summary: with H̄.
        first: layers of the one side.
        second: layers of the other.  Default: the same.
    """
    matrix, layers = unit_diagonal(summary.tensor(2)).abs(), layers_of(summary.names)
    other = first if second is None else second
    pairs = [
        float(matrix[i, j])
        for i, a in enumerate(layers)
        for j, b in enumerate(layers)
        if a in first and b in other and a != b
    ]
    return sum(pairs) / len(pairs)


# Rates ----------------------------------------------------------------------------------------------------------------


def biases_to_weights(rates: Mapping[str, float]) -> float | None:
    """The rate of a bias over that of its layer's weight, geometric mean over layers where both are above 0."""
    by_layer: dict[str, dict[bool, float]] = {}
    for name, rate in rates.items():
        by_layer.setdefault(layer(name), {})[is_bias(name)] = rate
    ratios = [pair[True] / pair[False] for pair in by_layer.values() if min(pair.get(True, 0), pair.get(False, 0)) > 0]
    return geometric_mean(ratios) if ratios else None


def decades(rates: Mapping[str, float]) -> float | None:
    """How many orders of magnitude lie between the smallest and the largest rate above 0."""
    positive = [rate for rate in rates.values() if rate > 0]
    return math.log10(max(positive) / min(positive)) if len(positive) > 1 else None


def mean_rate(rates: Mapping[str, float], names: Sequence[str]) -> float | None:
    """The geometric mean of the rates of some groups, those of 0 left out."""
    positive = [rates[name] for name in names if rates[name] > 0]
    return geometric_mean(positive) if positive else None


def growth(rates: Sequence[float]) -> float | None:
    """The geometric mean of a group's rates above 0 in the last third of the training, over that in the first third."""
    third = max(len(rates) // 3, 1)
    first, last = ([rate for rate in part if rate > 0] for part in (rates[:third], rates[-third:]))
    return geometric_mean(last) / geometric_mean(first) if first and last else None


def over_training(runs: Sequence[Sequence[Row]], number: object) -> float | None:
    """The median over all rows of all runs of a number of a row's rates; ``None`` where it has none."""
    assert callable(number)
    values = [number(row.rates) for rows in runs for row in rows if row.rates]
    known = [value for value in values if value is not None]
    return median(known) if known else None


# Losses ---------------------------------------------------------------------------------------------------------------


def final_loss(rows: Sequence[Row]) -> float:
    """The training loss at the end; infinite where the run diverged."""
    last = rows[-1]
    return math.inf if last.diverged or last.train_loss is None else last.train_loss


def loss_at(rows: Sequence[Row], cost: StepCost, seconds: float) -> float:
    """The training loss at a time, by its logarithm between the ends of epochs; that of the end for later times."""
    if final_loss(rows) == math.inf:
        return math.inf
    points = [(cost.seconds(row), row.train_loss) for row in rows if row.train_loss is not None]
    for (t0, l0), (t1, l1) in pairwise(points):
        if t0 <= seconds <= t1:
            share = (seconds - t0) / (t1 - t0)
            return math.exp((1 - share) * math.log(l0) + share * math.log(l1))
    return points[-1][1]


def equal_time(
    ours: Sequence[Sequence[Row]], our_cost: StepCost, theirs: Sequence[Sequence[Row]], their_cost: StepCost
) -> tuple[float, float, float]:
    """The median losses of two optimizers when the faster one has ended: the time, ours, theirs."""
    seconds = min(
        median(our_cost.seconds(rows[-1]) for rows in ours), median(their_cost.seconds(rows[-1]) for rows in theirs)
    )
    return (
        seconds,
        median(loss_at(rows, our_cost, seconds) for rows in ours),
        median(loss_at(rows, their_cost, seconds) for rows in theirs),
    )
