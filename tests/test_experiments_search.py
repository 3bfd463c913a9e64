"""The search for a learning rate: which rates it tries, and when it ends."""

import dataclasses
import math

import pytest

from newton_summary.experiments import search as module
from newton_summary.experiments.errors import UsageError
from newton_summary.experiments.search import half_decade, search
from newton_summary.experiments.tasks import get_task
from newton_summary.experiments.training import Row, Run

TASK = get_task("digits")


def pretend(monkeypatch, loss_of):
    """Training whose final loss is a function of rate and seed: the configurations that it was called with."""
    called = []

    def train(task, config, data, progress):
        called.append(config)
        loss = loss_of(config.lr, config.seed)
        row = Row(1, 1, loss if math.isfinite(loss) else None, None, 0.0, 0.0, config.lr, diverged=math.isinf(loss))
        return Run(config, [row], None)

    monkeypatch.setattr(module, "train", train)
    return called


def test_the_grid_goes_by_half_decades():
    assert [half_decade(n) for n in range(-5, 4)] == [3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


@pytest.mark.parametrize("best", [-7, -5, -4, 0])
def test_the_best_has_worse_rates_on_both_sides(best, monkeypatch):
    called = pretend(monkeypatch, lambda lr, seed: 1 + abs(math.log(lr / half_decade(best))) + 0.01 * seed)
    found = search(TASK, None, "adam", -5, seeds=(0, 1, 2))
    assert found.best == half_decade(best)
    rates = list(found.losses)
    assert rates == sorted(rates)
    assert 0 < rates.index(found.best) < len(rates) - 1
    assert all(len(losses) == 3 for losses in found.losses.values())
    assert len(called) == len({(c.lr, c.seed) for c in called}) == 3 * len(rates)


def test_the_median_decides_and_divergence_counts_as_infinite(monkeypatch):
    losses = {0.03: (3, 3, 3), 0.1: (2, 2, 2), 0.3: (1, 1, math.inf), 1.0: (0, math.inf, math.inf)}
    pretend(monkeypatch, lambda lr, seed: losses[lr][seed])
    found = search(TASK, None, "sgd", -2)
    assert found.best == 0.3
    assert found.losses[0.3] == [1, 1, math.inf]
    assert "| **0.3** | **1.00e+00** | **1.00e+00 1.00e+00 inf** |" in found.table()


def test_a_search_that_runs_away_ends(monkeypatch):
    pretend(monkeypatch, lambda lr, seed: -math.log(lr))
    with pytest.raises(UsageError, match="at the edge"):
        search(TASK, None, "sgd", -2)


def test_it_trains_for_real():
    task = dataclasses.replace(TASK, epochs=1)
    found = search(task, task.read(), "sgd", -3, seeds=(0,))
    assert found.losses[half_decade(-3)][0] < 2.3
