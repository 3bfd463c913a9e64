"""The paper's experiments on a small stand-in: what is kept, what is not run again, and what the page says."""

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from newton_summary import Summary, cli
from newton_summary.errors import UsageError
from newton_summary.report.records import Row
from newton_summary_experiments import (
    analysis,
    claims,
    costs,
    invariance,
    page,
    paper,
    paper_figures,
    reproduction,
    search,
    tasks,
)
from newton_summary_experiments.costs import StepCost
from newton_summary_experiments.data import Data
from newton_summary_experiments.models import mlp
from newton_summary_experiments.optimizers import OPTIMIZERS as OPTIMIZERS_BY_NAME
from newton_summary_experiments.reproduction import DEFAULT, OPTIMIZERS, SEARCHED, Reproduction
from newton_summary_experiments.search import PAPER, Search
from newton_summary_experiments.tasks import Task
from newton_summary_experiments.training import config_of

ROOT = Path(__file__).parents[1]

STAND_IN = """
    from newton_summary_experiments import costs, reproduction, search, tasks
    from newton_summary_experiments.models import mlp
    from newton_summary_experiments.tasks import Task

    tasks.TASKS["tiny"] = Task("tiny", lambda: mlp([64, 12, 10]), epochs=2)
    reproduction.NETWORKS["tiny"] = "Tiny"
    reproduction.SEEDS["tiny"] = 2
    search.GRIDS.update(adam={"lr": (-4, -3)}, sgd={"lr": (-2, -1)}, kfac={"lr": (-3, -3), "damping": (-1, 0)})
    search.GRIDS["newton-summary-paper"] = {"lr": (-1, 0), "regularization": (0, 0)}
    search.MOST_GRIDS.update({1: 1, 2: 1})
    sizes = [(s, d) for s in (1, 4) for d in (1, 2, 3)]
    costs.summary_costs = lambda: [costs.SummaryCost(10, s, d, s**d, 10.0**d, 2.0, 3.0) for s, d in sizes]
    """


@pytest.fixture(scope="module")
def stand_in():
    """A tiny task in place of the paper's, with grids of two points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "tiny", Task("tiny", lambda: mlp([64, 12, 10]), epochs=2))
        for owner, name in (
            (reproduction, "NETWORKS"),
            (reproduction, "SEEDS"),
            (search, "GRIDS"),
            (search, "MOST_GRIDS"),
        ):
            patch.setattr(owner, name, dict(getattr(owner, name)))
        for module in (claims, page, paper):
            patch.setattr(module, "NETWORKS", reproduction.NETWORKS)
        patch.setattr(costs, "summary_costs", costs.summary_costs)
        exec(textwrap.dedent(STAND_IN), {})
        yield


def make_study(folder):
    return Reproduction("quick", folder / "results", folder / "runs", tasks=("tiny",))


@pytest.fixture(scope="module")
def done(stand_in, tmp_path_factory):
    """All experiments of the stand-in, and its folder."""
    folder = tmp_path_factory.mktemp("reproduction")
    study = make_study(folder)
    paper.search_all(study, SEARCHED)
    paper.reproduce(study, folder / "images", None)
    return study, folder


def kept(folder):
    """What does not depend on how fast the machine is."""
    runs = {}
    for path in sorted((folder / "results/quick/runs/tiny").iterdir()):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        runs[path.name] = [{k: v for k, v in row.items() if k not in ("seconds", "environments")} for row in rows]
    tables = [(folder / "results/quick" / name).read_text() for name in ("search.csv", "search.md")]
    return runs, tables, (folder / "results/quick/measured/interactions-tiny.json").read_text()


# Running --------------------------------------------------------------------------------------------------------------


def test_every_run_is_kept_with_the_best_hyperparameters(done):
    study, folder = done
    assert len(list((folder / "results/quick/runs/tiny").iterdir())) == 2 * len(OPTIMIZERS)
    with (folder / "results/quick/search.csv").open() as file:
        rows = list(csv.DictReader(file))
    for optimizer in SEARCHED:
        best = min((row for row in rows if row["optimizer"] == optimizer), key=lambda row: float(row["loss"]))
        config = study.config("tiny", optimizer, 1)
        assert config.lr == float(best["lr"])
        assert list(config.options.values()) == ([float(best["value"])] if best["value"] else [])
        assert config.seed == 1
    assert study.config("tiny", DEFAULT, 0).lr == OPTIMIZERS_BY_NAME[DEFAULT].lr
    for optimizer in OPTIMIZERS:
        final = [rows[-1] for rows in study.all_rows("tiny", optimizer)]
        assert [(row.epoch, row.step) for row in final] == [(2, 32)] * 2
    assert {path.name for path in (folder / "runs/quick").iterdir()} <= {"search", "tiny"}
    assert not list((folder / "runs").rglob("*.pt"))  # checkpoints of runs that ended


def test_what_is_kept_is_not_run_again(done, monkeypatch):
    study, folder = done
    again = make_study(folder)
    monkeypatch.setattr(reproduction, "train", None)
    monkeypatch.setattr(costs, "step_costs", None)
    paper.run_all(again)
    paper.measure_all(again)
    assert page.tables(again) == page.tables(study)


def test_a_run_of_other_hyperparameters_is_not_taken(done):
    study, folder = done
    other = make_study(folder)
    losses = dict.fromkeys([(0.5,)], 0.0)
    other.searches["tiny", "adam"] = search.Search("tiny", "adam", ("lr",), losses, 2, 1, False)
    assert not other.all_rows("tiny", "adam")
    assert other.all_rows("tiny", "sgd") == study.all_rows("tiny", "sgd")


def test_searches_that_processes_keep_at_the_same_time_are_all_kept(tmp_path):
    one, other = (Reproduction("quick", tmp_path / "results", tmp_path / "runs") for _ in range(2))
    assert not one.searches
    assert not other.searches
    one.keep_search(Search("mlp-mnist", "adam", ("lr",), {(1e-3,): 0.5}, 1, 1, False))
    other.keep_search(Search("mlp-mnist", "sgd", ("lr",), {(1e-2,): 0.4}, 1, 1, False))
    kept = Reproduction("quick", tmp_path / "results", tmp_path / "runs").searches
    assert set(kept) == {("mlp-mnist", "adam"), ("mlp-mnist", "sgd")}


def test_the_papers_own_size_has_fewer_seeds_of_what_takes_longest(tmp_path):
    full = Reproduction("full", tmp_path, tmp_path)
    assert full.task("mlp-mnist").epochs == full.task("lenet-cifar10").epochs == 60
    assert full.search_plan.epochs("mlp-mnist", "kfac", of=60) == 6
    assert full.search_plan.epochs("mlp-mnist", "sgd", of=60) == 20  # one value, cheap steps: a trial may be longer
    assert full.search_plan.epochs("mlp-mnist", "adam", of=60) == 60  # a tie after a third
    assert [len(full.seeds("lenet-cifar10", optimizer)) for optimizer in OPTIMIZERS] == [5, 5, 2, 5, 5]
    assert len(full.seeds("vgg-cifar10", "adam")) == 1


def test_networks_of_full_width_are_trained_for_some_epochs_after_searches_of_a_hundred_steps(tmp_path):
    hours = Reproduction("hours", tmp_path, tmp_path)
    for name in ("vgg-cifar10", "bigmlp-cifar10"):
        few, paper_ = hours.task(name), Reproduction("full", tmp_path, tmp_path).task(name)
        assert few.epochs < paper_.epochs
        assert (few.network, few.images) == (paper_.network, paper_.images)
        for optimizer in SEARCHED:
            assert hours.search_plan.epochs(name, optimizer, of=few.epochs) == 1
            grid = hours.search_plan.grid(name, optimizer)
            assert hours.search_plan.grids_at_most(len(grid)) == {1: 2, 2: 1}[len(grid)]
    samples = torch.zeros(10_500, 1), torch.zeros(10_500, dtype=torch.long)
    hours._read["vgg-cifar10"] = Data(samples, samples, "none", "none")
    assert len(hours.search_samples("vgg-cifar10").train[1]) == 100 * few.batch_size
    assert len(hours.samples("vgg-cifar10").train[1]) == 10_500


def test_epochs_are_told_from_steps_where_a_run_ended_before_the_first_one():
    runs = [[Row(s // 4, s, 1.0, 1.0, 0.5, 0.0, 1.0) for s in steps] for steps in ((0, 2, 4, 6, 8), (0, 2))]
    assert paper_figures._epochs(runs[0], runs) == [0, 0.5, 1, 1.5, 2]
    assert paper_figures._epochs(runs[1], runs) == [0, 0.5]


def test_a_missing_search_is_named(stand_in, tmp_path):
    with pytest.raises(UsageError, match="newton-summary search tiny --optimizers adam --budget quick"):
        paper.run_all(make_study(tmp_path))


def test_the_interactions_are_those_of_the_best_epoch(done):
    study, _ = done
    known = study.measured("interactions-tiny")
    rows = study.rows("tiny", PAPER, 0)
    assert known["epoch"] == min(rows, key=lambda row: row.validation_loss).epoch
    found = claims.moments(study, "tiny")
    data = study.samples("tiny")
    model = study.task("tiny").make_model(0)
    loss = study.task("tiny").loss_fn(model, data.train)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = [float(g.double().square().sum()) for g in gradients]
    torch.testing.assert_close(
        found["initialisation"][1].gradient, torch.tensor(expected).double(), rtol=1e-4, atol=1e-9
    )
    assert float(next(s for _, s in found.values()).loss) == pytest.approx(rows[0].train_loss, rel=1e-5)


SCRIPT = (
    textwrap.dedent(STAND_IN)
    + """
import sys
from pathlib import Path
import torch
from newton_summary_experiments import paper
from newton_summary_experiments.reproduction import SEARCHED, Reproduction

torch.set_num_threads(1)
folder = Path(sys.argv[1])
study = Reproduction("quick", folder / "results", folder / "runs", tasks=("tiny",))
paper.search_all(study, SEARCHED)
paper.run_all(study)
"""
)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_tables(tmp_path):
    def start(folder):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stderr=subprocess.DEVNULL)

    begin = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    length = time.monotonic() - begin
    for share in (0.5, 0.7, 0.9):
        process = start(tmp_path / "killed")
        time.sleep(share * length)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert kept(tmp_path / "killed") == kept(tmp_path / "whole")


# Figures and the page -------------------------------------------------------------------------------------------------


def test_every_figure_is_drawn_twice(done):
    _, folder = done
    names = {path.name for path in (folder / "images").iterdir()}
    stems = ("interactions-tiny", "normalised-tiny", "rates-paper", "rates-default", "losses", "summary-costs")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    for path in (folder / "images").iterdir():
        assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF")


def test_drawing_without_results_says_what_to_run(stand_in, tmp_path):
    with pytest.raises(UsageError, match=r"there are no runs of .* to draw: run them, without --draw-only"):
        paper.reproduce(make_study(tmp_path), tmp_path / "images", None, only_draw=True)


def test_the_page_has_a_place_for_every_table(done, tmp_path):
    study, _ = done
    text = (ROOT / "docs/reproduction.md").read_text()
    (tmp_path / "page.md").write_text(text)
    for _ in range(2):  # a second time changes nothing
        page.rewrite(tmp_path / "page.md", page.tables(study))
        written = (tmp_path / "page.md").read_text()
        for table in page.tables(study).values():
            assert f"\n{table}\n" in written
    assert [line for line in written.splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if line.startswith("#")
    ]
    with pytest.raises(UsageError, match="no place for other"):
        page.rewrite(tmp_path / "page.md", {"other": ""})
    with pytest.raises(UsageError, match="cannot read the page"):
        page.rewrite(tmp_path / "none.md", {})


def test_the_papers_own_size_has_places_of_its_own_and_shares_the_claims(done, tmp_path):
    study, _ = done
    (tmp_path / "page.md").write_text((ROOT / "docs/reproduction.md").read_text())
    assert study.at("quick") is study
    assert study.at("full").tasks == ()  # nothing is known there
    for search_ in study.searches.values():
        study.at("full").keep_search(replace(search_, task="mlp-mnist"))
    full = study.at("full")
    assert full.tasks == ("mlp-mnist",)
    assert full.at("quick").folder == study.folder
    tables = page.tables(replace(full, tasks=("tiny",)))
    page.rewrite(tmp_path / "page.md", tables)
    assert [name for name in tables if not name.startswith("full-")] == ["claims"]
    (diverged,) = (line for line in claims.table(study).splitlines() if "some runs diverge" in line)
    assert diverged.count("in the searches") == 2  # at both budgets


def test_no_optimizer_is_missing_from_the_tables(done):
    study, _ = done
    tables = page.tables(study)
    for name in ("losses", "times"):
        assert all(f"| {reproduction.LABELS[optimizer]} |" in tables[name] for optimizer in OPTIMIZERS)
        assert "not " not in tables[name]
    assert len(claims.CLAIMS) == tables["claims"].count("\n") - 1


def test_tables_of_what_has_not_run_yet_can_be_written(done, tmp_path):
    study, _ = done
    missing = make_study(tmp_path)
    for search_ in study.searches.values():
        missing.keep_search(search_)
    tables = page.tables(missing)
    assert "not run" in tables["losses"]
    assert "not measured" in tables["times"]


def test_forgetting_an_optimizer_leaves_the_others(stand_in, tmp_path):
    study = make_study(tmp_path)
    for optimizer in (DEFAULT, "adam"):
        path = study.metrics("tiny", optimizer, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    study.keep_measured("costs-tiny", {})
    study.forget(DEFAULT)
    assert [path.name for path in study.metrics("tiny", "adam", 0).parent.iterdir()] == ["adam-seed0.jsonl"]
    assert study.measured("costs-tiny") is None


def test_the_command_line_refuses_what_is_no_task_of_the_paper(capsys):
    assert cli.main(["search", "digits"]) == 2
    assert "no task of the paper: choose from mlp-mnist" in capsys.readouterr().err
    assert cli.main(["figures", "nothing"]) == 2


# Numbers --------------------------------------------------------------------------------------------------------------


def test_shares_of_the_norm():
    matrix = torch.tensor([[3.0, 1.0, 2.0], [1.0, 4.0, 0.0], [2.0, 0.0, 5.0]]).double()
    whole = math.sqrt(9 + 16 + 25 + 2 * (1 + 4))
    assert analysis.share_off_blocks(matrix, ["a", "b", "c"]) == pytest.approx(math.sqrt(10) / whole)
    assert analysis.share_off_blocks(matrix, ["a", "b", "a"]) == pytest.approx(math.sqrt(2) / whole)
    assert analysis.share_off_tridiagonal(matrix, ["a", "b", "c"]) == pytest.approx(math.sqrt(8) / whole)


def test_the_inverse_bears_many_orders_of_magnitude():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    base, scale = base @ base.T + torch.eye(6), 10.0 ** torch.arange(-6, 6, 2).double()
    found = analysis.inverse(base * scale * scale[:, None])
    torch.testing.assert_close(found * scale * scale[:, None], torch.linalg.inv(base))
    assert analysis.unit_diagonal(found).diagonal().tolist() == pytest.approx([1.0] * 6)


def test_interactions_between_layers():
    names = ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"]
    hessian = torch.eye(6).double()
    for i, j, value in ((0, 2, 0.5), (0, 4, -0.25), (1, 5, 0.75), (2, 4, 0.1)):
        hessian[i, j] = hessian[j, i] = value
    summary = Summary(loss=1.0, gradient=torch.ones(6), hessian=4 * hessian, names=names)
    assert analysis.long_range(summary) == pytest.approx(0.25)  # weights alone
    assert analysis.mean_interaction(summary, ["a", "b"]) == pytest.approx(0.5 / 4)
    assert analysis.mean_interaction(summary, ["a"], ["b", "c"]) == pytest.approx((0.5 + 0.25 + 0.75) / 8)


def test_ratios_of_rates():
    rates = {"a.weight": 0.01, "a.bias": 1.0, "b.weight": 0.1, "b.bias": 0.4, "c.weight": 0.0, "c.bias": 5.0}
    assert analysis.biases_to_weights(rates) == pytest.approx(20.0)  # √(100 · 4)
    assert analysis.decades(rates) == pytest.approx(math.log10(500))
    assert analysis.mean_rate(rates, ["a.weight", "b.weight", "c.weight"]) == pytest.approx(math.sqrt(1e-3))
    assert analysis.biases_to_weights({"a.weight": 0.0, "a.bias": 1.0}) is None
    assert analysis.growth([1.0, 4.0, 7.0, 9.0, 0.0, 10.0]) == pytest.approx(5.0)
    assert analysis.growth([0.0, 0.0, 7.0, 9.0, 0.0, 10.0]) is None


def row(epoch, loss, measured=0, **others):
    return Row(epoch, 10 * epoch, loss, loss, 0.5, 0.0, 1.0, counts={"measured": measured}, **others)


def test_losses_at_equal_time():
    fast = [row(0, 1.0), row(1, 0.1), row(2, 0.01)]
    slow = [row(0, 1.0), row(1, 0.01, 1), row(2, 1e-4, 2)]
    cheap, dear = StepCost(0.1), StepCost(0.1, 1.0)  # an epoch takes 1 s and 2 s
    assert [dear.seconds(r) for r in slow] == [0.0, 2.0, 4.0]
    seconds, ours, theirs = analysis.equal_time([slow], dear, [fast], cheap)
    assert (seconds, ours, theirs) == (pytest.approx(2.0), pytest.approx(0.01), pytest.approx(0.01))
    assert analysis.loss_at(slow, dear, 1.0) == pytest.approx(0.1)  # half of the way, by the logarithm
    assert analysis.loss_at(slow, dear, 100.0) == pytest.approx(1e-4)
    gone = [row(0, 1.0), row(1, None, diverged=True)]
    assert analysis.loss_at(gone, cheap, 0.5) == math.inf


def test_both_parameterisations_train_alike_where_the_method_is_invariant(stand_in):
    task = tasks.get_task("tiny")
    data = task.read()
    apart = {}
    for name, make in invariance.METHODS.items():
        standard, other = invariance.both_ways(task, data, make, 40)
        assert standard[0] == pytest.approx(other[0], rel=1e-12)
        assert standard[-1] < standard[0]
        apart[name] = max(abs(a - b) / a for a, b in zip(standard, other, strict=True))
    assert apart["paper mode"] < 1e-6
    assert apart["default, invariant target"] < 1e-6
    assert apart["SGD, momentum"] > 0.1


def test_costs_of_steps_are_told_apart(stand_in):
    task = tasks.get_task("tiny")
    configs = {name: config_of(task, name) for name in ("sgd", "kfac", PAPER)}
    found = costs.step_costs(task, task.read(), configs, rounds=3)
    assert found["sgd"].measuring == 0.0
    assert all(cost.plain > 0 for cost in found.values())
    assert found[PAPER].measuring > 0
    assert found["sgd"].seconds(row(2, 1.0, 7)) == pytest.approx(20 * found["sgd"].plain)


def test_a_verdict_says_what_it_knows():
    assert str(claims.Verdict(0, 0, "")) == "not testable at this budget"
    assert str(claims.Verdict(3, 3, "")) == "held"
    assert str(claims.Verdict(1, 3, "")) == "held in 1 of 3"
    assert str(claims.Verdict(0, 3, "")) == "did not hold"


def test_rates_of_one_group_share_a_panel():
    one = [row(0, 1.0), row(1, 0.5, rates={"all": 0.1}), row(2, 0.5, rates={"all": 0.0})]
    two = [row(0, 1.0), row(1, 0.5, rates={"a.weight": 0.1, "a.bias": 0.0})]
    assert len(paper_figures.rates({"A": one, "B": one}, "").axes) == 1
    assert len(paper_figures.rates({"A": two}, "").axes) == 2


def test_rates_of_a_network_that_is_dead_are_drawn_as_zero():
    dead = [row(e, 1.0, rates={"a.weight": 0.1 * 10.0 ** (-60 * e), "a.bias": 0.2}) for e in range(6)]
    figure = paper_figures.rates({"one": dead}, "rates")
    figure.savefig(io.BytesIO())
    line, zeros = figure.axes[0].lines[:2]
    assert [math.isnan(y) for y in line.get_ydata()] == [False, *[True] * 5]
    assert list(zeros.get_xdata()) == [1, 2, 3, 4, 5]
    assert figure.axes[0].get_ylim()[0] > 1e-3


def test_losses_of_runs_that_diverged_are_drawn():
    runs = {"Tiny": {"adam": [[row(0, 1.0), row(1, 0.5)], [row(0, 1.0), row(1, 30.0, diverged=True)]]}}
    figure = paper_figures.losses(runs, {"Tiny": {"adam": StepCost(0.1)}}, {"adam": "Adam"})
    marks = [line for ax in figure.axes for line in ax.get_lines() if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in marks] == [[[1.0, 1.6]], [[1.0, 1.6]]], (
        "at the top, where they are beyond it"
    )
