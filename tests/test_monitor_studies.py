"""Small versions of the studies in benchmarks/monitor.py: ranking, the coverage of intervals, and acting on advice."""

from __future__ import annotations

import numpy as np
import pytest
from studies import benchmark

from newton_summary_experiments.data import digits
from newton_summary_experiments.models import initialised, mlp
from newton_summary_experiments.tasks import cross_entropy


@pytest.fixture(scope="module")
def studies():
    with benchmark("monitor") as module:
        yield module


@pytest.mark.slow
def test_the_layer_that_is_off_is_ranked_first(studies) -> None:
    network, cases = studies.digits(), 10
    hits, directions = 0, set()
    for seed in range(cases):
        wrong, factor, monitor = studies.rank_one(network, seed)
        hits += monitor.advice.ranked()[0].name == wrong
        directions.add(factor > 1)
    assert hits >= 9
    assert directions == {True, False}


@pytest.mark.slow
def test_intervals_cover_the_value_of_all_samples(studies) -> None:
    cases = [studies.cover_one(studies.digits(), seed) for seed in range(12)]
    for repeats in studies.REPEATS:
        assert 0.8 <= np.mean([hit for case in cases for hit in case[repeats][0]]) <= 0.99


@pytest.fixture(scope="module")
def acting():
    with benchmark("acting") as module:
        yield module


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["layer too slow", "all too slow"])
def test_acting_on_rehearsed_advice_closes_half_of_the_gap(acting, setting: str) -> None:
    x, y = digits().train
    make = lambda seed: initialised(lambda: mlp([64, 32, 32, 10]), seed)  # noqa: E731
    small = acting.Small("a small network", make, (x, y), cross_entropy, 50)
    case = acting.run(small, 1e-2, 100, setting, acting.Clock(processor=True))
    assert case.has_gap
    assert case.closed >= 0.5


def test_the_page_counts_what_was_lost_and_what_was_closed(acting, monkeypatch) -> None:
    def case(network: str, setting: str, left: float, acted: float, oracle: float):
        return acting.Case(network, 100, setting, "head", left, acted, oracle, "all × 3", "words", (3.0, 2.0))

    made = [
        case("a", "tuned", 1.0, 1.0, 0.9),
        case("a", "all too slow", 1.0, 0.6, 0.5),
        case("b", "all too slow", 1.0, 0.8, 0.5),
        case("b", "layer too fast", 1.0, 1.06, 0.96),
    ]
    monkeypatch.setattr(acting, "cases", lambda clock: made)
    page = "\n".join(acting.study(acting.Clock()))
    assert "× not acting in 1 of 4 cases" in page.replace("\n", " ")
    assert "at least half of the gap in 1 of 2 (median share: 60%" in page.replace("\n", " ")
    assert "| all too slow | 2 | 0 | 0.70 | 0.80 | 0.50 | 2 | 1 |" in page
    assert "| a | 1 | 0.80 | 1.00 | 0.70 | 1 | 1 | 300 |" in page
    assert "- b, after 100, layer too fast (`head`): 1.06 × 1. Told: words" in page
    assert "| layer too slow |" not in page
