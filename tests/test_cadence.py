"""How often to measure: counted, not timed."""

from __future__ import annotations

import contextlib
import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
import newton_summary.optim.clipping
import newton_summary.optim.newton_summary
from newton_summary.optim.cadence import (
    BEGINNING,
    MEASUREMENTS,
    SEARCHES,
    Intervals,
    Price,
    SearchCadence,
    affordable_interval,
    interval_at,
)


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def make_loader(batch_size=20):
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size, shuffle=True)


def make(width=16, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    return model, ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), **options)


def backward(model, optimizer, number):
    batches = list(make_loader())
    optimizer.zero_grad()
    loss_fn(model, batches[number % len(batches)]).backward()


def train(model, optimizer, steps, start=0):
    for number in range(start, start + steps):
        backward(model, optimizer, number)
        optimizer.step()


def explode(model, optimizer, number):
    """A step whose gradient is a hundred times as long as usual."""
    backward(model, optimizer, number)
    for parameter in model.parameters():
        parameter.grad *= 100
    optimizer.step()


def steps_that_search(model, optimizer, start, count):
    seen = []
    for number in range(start, start + count):
        before = optimizer.counts["searched"]
        train(model, optimizer, 1, start=number)
        if optimizer.counts["searched"] > before:
            seen.append(number)
    return seen


def price(calls, operations):
    result = Price()
    result.calls, result.operations = calls, operations
    return result


def test_products_and_convolutions_are_counted_to_the_last_operation() -> None:
    with Price() as linear:
        torch.randn(5, 7) @ torch.randn(7, 11)
    assert linear.operations == 2 * 5 * 7 * 11
    with Price() as convolution:
        functional.conv2d(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3))
    assert convolution.operations == 2 * 2 * 4 * 6 * 6 * 3 * 9
    with Price() as nothing:
        torch.ones(3).add_(1).tanh()
    assert nothing.operations == 0
    assert nothing.calls == 3


INTERVALS = Intervals(first=20, shortest=10, longest=50, share=0.2)


def test_the_interval_follows_the_price() -> None:
    evaluation = price(0, 10**9)  # a step has three times that
    assert affordable_interval(price(0, 10**11), evaluation, INTERVALS) == 50
    assert affordable_interval(price(0, 12 * 10**9), evaluation, INTERVALS) == 21  # with the code around it
    assert affordable_interval(price(0, 10**9), evaluation, INTERVALS) == 10
    assert affordable_interval(price(4160, 0), price(1000, 0), INTERVALS) == 21, "calls, where operations are few"


def test_a_run_settles_for_intervals_and_keeps_them() -> None:
    model, optimizer = make(partition="canonical")
    train(model, optimizer, SEARCHES.first + 1)
    looks = optimizer.line_search_every
    assert SEARCHES.shortest <= looks <= SEARCHES.longest
    train(model, optimizer, MEASUREMENTS.first - SEARCHES.first - 1)
    assert optimizer.every is None
    assert optimizer.counts["measured"] == 1
    train(model, optimizer, 1)
    period = optimizer.every
    assert MEASUREMENTS.shortest <= period <= MEASUREMENTS.longest
    train(model, optimizer, 2 * period)
    assert (optimizer.every, optimizer.line_search_every) == (period, looks)
    assert optimizer.counts["measured"] == 2 + (20 + 2 * period) // period - 20 // period


def test_searches_are_four_times_as_frequent_at_first(monkeypatch) -> None:
    monkeypatch.setattr(newton_summary.optim.clipping.GradientClipping, "take_alarm", lambda clipping: False)
    assert [interval_at(step, 12) for step in (0, BEGINNING - 1, BEGINNING, 10**6)] == [3, 3, 12, 12]
    assert [interval_at(0, settled) for settled in (1, 5, 20)] == [1, 2, 5]
    model, optimizer = make()
    looks = steps_that_search(model, optimizer, 0, BEGINNING + 50)
    often, seldom = interval_at(0, optimizer.line_search_every), optimizer.line_search_every
    first = [s for s in (1, 2, 4, 8, 16) if s < often]
    settled = [s for s in range(BEGINNING, BEGINNING + 50) if s % seldom == 0]
    assert looks == sorted({*first, *range(0, BEGINNING, often), *settled})


def test_an_interval_that_was_asked_for_holds_once_searches_have_begun() -> None:
    model, optimizer = make(line_search_every=8)
    train(model, optimizer, 40)
    assert optimizer.counts["searched"] == 8  # after 0, 1, 2, 4, 8, 16, 24 and 32 steps
    twin, resumed = make()  # which would settle
    resumed.load_state_dict(optimizer.state_dict())
    train(twin, resumed, 40)
    assert resumed.counts["searched"] == 13


@given(st.integers(1, 60))
def test_searches_grow_apart_until_the_interval_is_reached(period) -> None:
    times = SearchCadence(period, settles=False)
    times.note(1000, alarmed=False)
    looks = [since for since in range(400) if times.is_due(1000 + since)]
    for since, following in pairwise(looks):
        assert following - since <= times.gap(1000 + since) <= period
        assert following - since <= max(since, 1), "no longer blind than it has looked already"
    assert all(following - since == period for since, following in pairwise(looks) if since >= period)


def test_after_a_gradient_that_is_far_too_long_searches_are_frequent_again() -> None:
    model, optimizer = make(line_search_every=16)
    train(model, optimizer, 40)
    before = optimizer.counts["searched"]
    explode(model, optimizer, 40)
    assert optimizer.counts["searched"] == before + 1
    assert steps_that_search(model, optimizer, 41, 40) == [41, 42, 44, 48, 56, 72]
    explode(model, optimizer, 81)
    train(model, optimizer, 2, start=82)
    explode(model, optimizer, 84)
    assert steps_that_search(model, optimizer, 85, 10) == [85, 89], "it was heard already"


def test_on_an_accelerator_an_alarm_is_heard_within_five_steps(monkeypatch) -> None:
    monkeypatch.setattr(newton_summary.optim.clipping, "_HOST", "no device")
    model, optimizer = make(line_search_every=16)
    train(model, optimizer, 41)
    before = optimizer.counts["searched"]
    explode(model, optimizer, 41)
    assert optimizer.counts["searched"] == before
    assert steps_that_search(model, optimizer, 42, 10) == [45, 46, 47, 49]


def test_wider_networks_of_the_same_depth_are_measured_more_often() -> None:
    """On a small one a measurement is all calls."""
    periods = []
    for width in (8, 1000):
        model, optimizer = make(width, partition="canonical")
        train(model, optimizer, MEASUREMENTS.first + 1)
        periods.append((optimizer.every, optimizer.line_search_every))
    (small, small_looks), (large, large_looks) = periods
    assert small > large
    assert small_looks > large_looks


def test_counting_changes_nothing_of_the_run(monkeypatch) -> None:
    model, optimizer = make(partition="canonical")
    train(model, optimizer, MEASUREMENTS.first + 5)
    for module in (newton_summary.optim.newton_summary, newton_summary.optim.step_search):
        monkeypatch.setattr(module, "Price", lambda: contextlib.nullcontext(object()))
    counted = {SEARCHES: optimizer.line_search_every, MEASUREMENTS: optimizer.every}
    for module in (newton_summary.optim.newton_summary, newton_summary.optim.step_search):
        monkeypatch.setattr(module, "affordable_interval", lambda *prices: counted[prices[-1]])
    twin, uncounted = make(partition="canonical")
    train(twin, uncounted, MEASUREMENTS.first + 5)
    assert optimizer.rates == uncounted.rates
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("at", [5, MEASUREMENTS.first + 1, MEASUREMENTS.first + 30])
def test_a_resumed_run_has_the_same_intervals(at) -> None:
    model, optimizer = make(partition="canonical")
    train(model, optimizer, at)
    twin, resumed = make(partition="canonical")
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (resumed.every, resumed.line_search_every) == (optimizer.every, optimizer.line_search_every)
    train(model, optimizer, 90)
    train(twin, resumed, 90)
    assert (resumed.every, resumed.line_search_every) == (optimizer.every, optimizer.line_search_every)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
