"""What benchmarks/untuned.py makes of runs: verdicts, failures, and files that go on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from studies import benchmark

from newton_summary_experiments.suite import PROBLEMS


@pytest.fixture(scope="module")
def untuned():
    with benchmark("untuned") as module:
        yield module


def record(untuned, curve, **changes):
    run = untuned.Record("digits", "ours", 0.0, 0, list(range(1, 9)), list(curve), curve[-1], 0.9, 2.0)
    return replace(run, **changes)


@pytest.mark.parametrize(
    ("curve", "kind"),
    [
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], ""),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 1.01], "above half the initial loss"),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.2, 0.4, 0.61], "above 3 × its best"),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.2, 0.4, 0.59], ""),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.0, 0.4, 1e-8], ""),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.0, 0.4, 1e-6], "above 3 × its best"),
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, float("nan")], "not finite"),
        ([1.0, 0.9, float("inf")], "not finite"),
    ],
)
def test_failures(untuned, curve, kind) -> None:
    assert untuned.failure(record(untuned, curve)) == kind


def test_a_run_is_judged_by_the_loss_over_the_whole_set_too(untuned) -> None:
    assert untuned.failure(record(untuned, [1.0] * 8, train=float("inf"))) == "not finite"


def test_ratios_are_to_the_best_rival_after_its_own_time_or_after_as_many_epochs(untuned) -> None:
    verdict = untuned.Verdict(
        problem="digits",
        score="accuracy",
        overheads={},
        loss={"adam": 0.4, "sgd": 0.2},
        at_time_of={"default": {"adam": 0.3, "sgd": 0.5}},
        equal_epochs={"default": 0.1},
        scores={},
        rates={},
        reached={},
        seeds={},
        stopped={},
    )
    assert untuned.ratio(verdict, "default", ["adam"], of_time=True) == pytest.approx(0.3 / 0.4)
    assert untuned.ratio(verdict, "default", ["adam", "sgd"], of_time=True) == pytest.approx(0.5 / 0.2)
    assert untuned.ratio(verdict, "default", ["adam", "sgd"], of_time=False) == pytest.approx(0.1 / 0.2)
    none = replace(verdict, loss={"adam": 0.0}, equal_epochs={"default": 1e-20})
    assert untuned.ratio(none, "default", ["adam"], of_time=False) == 1.0, "both are below rounding"
    assert untuned.clipped([0.001, 100.0, 1.0]) == pytest.approx(1.0)
    assert untuned.clipped([0.5, 0.5]) == pytest.approx(0.5)


def test_the_time_to_a_loss_is_that_of_the_median_curve(untuned) -> None:
    runs = [record(untuned, [start - 0.1 * i for i in range(8)]) for start in (0.9, 1.0, 5.0)]
    assert untuned.time_to(0.71, runs, cost=1.2) == pytest.approx(1.2 * 4 / 8)
    assert untuned.time_to(0.1, runs, cost=1.2) is None
    ended_early = record(untuned, [0.9, float("inf")])
    assert untuned.time_to(0.9, [ended_early], cost=1.0) == pytest.approx(1 / 8)
    assert untuned.time_to(0.5, [ended_early], cost=1.0) is None


def test_a_slower_rival_has_taken_fewer_steps_at_a_time(untuned) -> None:
    run = record(untuned, [2.0 * 0.5**i for i in range(1, 9)])  # it begins at 2, and halves from point to point
    assert untuned.at_time(1.0, [run], cost=0.5) == run.loss
    assert untuned.at_time(1.0, [run], cost=2.0) == pytest.approx(2.0 * 0.5**4)
    assert untuned.at_time(1.0, [run], cost=16.0) == pytest.approx(2.0 * 0.5**0.5)
    assert untuned.at_time(1.0, [record(untuned, [1.0, math.inf])], cost=2.0) == math.inf


def test_a_store_runs_nothing_twice_and_knows_the_best_rate(untuned, tmp_path) -> None:
    digits, path = PROBLEMS["digits"], tmp_path / "runs.jsonl"
    store = untuned.Store(path)

    def make(model, rate, steps):
        return torch.optim.SGD(model.parameters(), rate)

    first = {r: [store.get(digits, "sgd", make, r, seed, steps=8) for seed in untuned.SEEDS] for r in (1e-4, 0.1)}
    assert len(path.read_text(encoding="utf-8").splitlines()) == 6
    again = untuned.Store(path)

    def fail(model, rate, steps):
        raise AssertionError("run again")

    for rate, records in first.items():
        for run in records:
            kept = again.get(digits, "sgd", fail, rate, run.seed, steps=8)
            assert kept.curve == pytest.approx(run.curve, rel=1e-4)
    assert {run.rate for run in again.best("digits", "sgd")} == {0.1}


def test_a_run_has_eight_points_and_does_not_go_on_after_one_that_is_not_finite(untuned) -> None:
    digits = PROBLEMS["digits"]
    ours = untuned.run(digits, "ours", untuned.ours(digits, 0), 0.0, 0, steps=24, marks=[12])
    assert ours.steps == [3, 6, 9, 12, 15, 18, 21, 24]
    assert len(ours.curve) == 8
    assert ours.marked is not None
    assert ours.curve[-1] < ours.initial
    assert ours.measured == 0
    assert ours.compared == 5
    exploding = untuned.run(
        digits, "sgd", lambda m, rate, n: torch.optim.SGD(m.parameters(), rate), math.inf, 0, steps=24
    )
    assert untuned.failure(exploding) == "not finite"
    assert len(exploding.curve) == 1


@pytest.mark.parametrize(("diverges_from", "best"), [(-20, -21), (-8, -9), (9, -5)])  # numbers of half decades
def test_a_search_goes_down_until_runs_do_not_diverge_and_ends_between_worse_rates(untuned, diverges_from, best):
    tried: dict[float, list[int]] = {}

    class Made:
        def get(self, problem, name, make, rate, seed):
            tried.setdefault(rate, []).append(seed)
            number = round(2 * math.log10(rate))
            return record(untuned, [math.inf if number >= diverges_from else abs(number + 5.0)])

    untuned.search(Made(), PROBLEMS["digits"], "adam")
    of_all = [rate for rate, seeds in tried.items() if set(seeds) == set(untuned.SEEDS)]
    assert sorted(of_all) == pytest.approx([untuned.half_decade(best + i) for i in (-1, 0, 1)])
