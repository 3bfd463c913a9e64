"""The search for hyperparameters: which points it tries, when it ends, and how it goes on."""

import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from newton_summary.errors import UsageError
from newton_summary.report.records import Row
from newton_summary_experiments import search as module
from newton_summary_experiments.search import half_decade, search
from newton_summary_experiments.tasks import get_task

TASK = get_task("digits")


def pretend(monkeypatch, loss_of):
    """Training whose final loss is a function of the configuration: the configurations that were trained."""
    called = []

    class Trainer:
        def __init__(self, task, config, data):
            called.append(config)
            self.config, self.rows, self.finished, self.position, self.epoch = config, [], False, 0, 0

        @property
        def diverged(self):
            return self.rows[-1].diverged

        def record(self, exploded=False):
            loss = loss_of(self.config) if self.epoch else 1.0
            known = loss if math.isfinite(loss) else None
            self.rows.append(Row(self.epoch, 1, known, None, 0.0, 0.0, self.config.lr, diverged=exploded))

        def take_step(self):
            self.epoch, self.finished = self.config.epochs, True
            return math.isfinite(loss_of(self.config))

    monkeypatch.setattr(module, "Trainer", Trainer)
    return called


def away(value, best):
    return abs(math.log(value / half_decade(best)))


def test_the_grid_goes_by_half_decades():
    assert [half_decade(n) for n in range(-5, 4)] == [3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


@pytest.mark.parametrize("best", [-8, -6, -5, -3])
def test_the_best_rate_has_worse_ones_on_both_sides(best, monkeypatch, tmp_path):
    called = pretend(monkeypatch, lambda c: 1 + away(c.lr, best) + 0.01 * c.seed)
    found = search(TASK, None, "adam", tmp_path, {"lr": (-6, -4)}, seeds=2)
    assert found.best == {"lr": half_decade(best)}
    rates = [rate for (rate,) in found.losses]
    assert rates == sorted(rates)
    assert 0 < rates.index(half_decade(best)) < len(rates) - 1
    assert not found.at_edge
    assert len(called) == len({(c.lr, c.seed) for c in called}) == 2 * len(rates)
    assert found.losses[half_decade(best),] == pytest.approx(1.005)  # the median of both seeds


def test_two_hyperparameters_widen_on_their_own(monkeypatch, tmp_path):
    called = pretend(monkeypatch, lambda c: 1 + away(c.lr, -4) + away(c.options["damping"], 1))
    found = search(TASK, None, "kfac", tmp_path, {"lr": (-5, -3), "damping": (-2, 0)})
    assert found.best == {"lr": 0.01, "damping": 3.0}
    expected = itertools.product([0.003, 0.01, 0.03], [0.1, 0.3, 1.0, 3.0, 10.0])
    assert list(found.losses) == list(expected)
    assert len(called) == 15
    assert "| 0.01 | 4.4 | 3.3 | 2.1 | **1** | 2.2 |" in found.table()


def test_a_search_that_runs_away_ends_and_says_so(monkeypatch, tmp_path):
    pretend(monkeypatch, lambda c: -math.log(c.lr))
    found = search(TASK, None, "sgd", tmp_path, {"lr": (-4, -2)})
    assert found.at_edge
    assert found.best == {"lr": half_decade(-2 + module.MOST_GRIDS[1] - 1)}


def test_divergence_is_pruned_and_counts_as_infinite(monkeypatch, tmp_path):
    pretend(monkeypatch, lambda c: math.inf if c.lr > 0.1 else 1 + away(c.lr, -3))
    found = search(TASK, None, "sgd", tmp_path, {"lr": (-4, -1)})
    assert found.best == {"lr": 0.03}
    assert found.losses[0.3,] == math.inf
    assert "| 0.3 | inf |" in found.table()


def test_what_was_tried_is_not_tried_again(monkeypatch, tmp_path):
    called = pretend(monkeypatch, lambda c: 1 + away(c.lr, -5))
    first = search(TASK, None, "adam", tmp_path, {"lr": (-5, -4)})
    count = len(called)
    assert search(TASK, None, "adam", tmp_path, {"lr": (-5, -4)}) == first
    assert len(called) == count


def test_what_an_error_ended_is_run_again(monkeypatch, tmp_path):
    broken = [True]

    def loss_of(config):
        if config.lr == 0.01 and broken[0]:
            raise OSError("no room")
        return 1 + away(config.lr, -4)

    pretend(monkeypatch, loss_of)
    with pytest.raises(OSError, match="no room"):
        search(TASK, None, "adam", tmp_path, {"lr": (-5, -3)})
    broken[0] = False
    assert search(TASK, None, "adam", tmp_path, {"lr": (-5, -3)}).losses[0.01,] == 1.0


def test_an_optimizer_without_a_grid_is_refused(tmp_path):
    with pytest.raises(UsageError, match="choose one of adam, sgd, kfac"):
        search(TASK, None, "newton-summary", tmp_path)


def test_it_trains_for_real(tmp_path, monkeypatch):
    monkeypatch.setitem(module.MOST_GRIDS, 1, 1)
    task = dataclasses.replace(TASK, epochs=1)
    found = search(task, task.read(), "sgd", tmp_path, {"lr": (-3, -3)})
    assert min(found.losses.values()) < 2.3


SCRIPT = """
    import sys
    from pathlib import Path
    from newton_summary_experiments import search as module
    from newton_summary_experiments.tasks import get_task
    import torch

    if __name__ == "__main__":
        torch.set_num_threads(1)
        module.MOST_GRIDS.update({1: 2})
        task = get_task("digits")
        found = module.search(task, task.read(), "sgd", Path(sys.argv[1]), {"lr": (-4, -2)}, epochs=4,
                              workers=int(sys.argv[2]))
        print(found.table())
    """


def start(folder, script, workers=1):
    script.write_text(textwrap.dedent(SCRIPT))
    return subprocess.Popen([sys.executable, str(script), str(folder), str(workers)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_search_ends_in_the_same_table(tmp_path):
    whole = start(tmp_path / "whole", tmp_path / "script.py").communicate()[0]
    journal = tmp_path / "killed" / module.JOURNAL
    for trials in (1, 3):
        process = start(tmp_path / "killed", tmp_path / "script.py")
        while process.poll() is None and (not journal.exists() or journal.read_text().count('"lr"') < 3 * trials):
            time.sleep(0.02)  # the journal is not locked any more
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert start(tmp_path / "killed", tmp_path / "script.py").communicate()[0] == whole
    assert "**" in whole


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path):
    tables = [start(tmp_path / str(n), tmp_path / "script.py", n).communicate()[0] for n in (1, 2)]
    assert tables[0] == tables[1]
    assert "**" in tables[0]
