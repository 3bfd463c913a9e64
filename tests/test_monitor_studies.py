"""Small versions of the studies in benchmarks/monitor.py: ranking, and the coverage of intervals."""

from __future__ import annotations

import numpy as np
import pytest
from studies import benchmark


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
