"""How often to measure: counted, not timed."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
import newton_summary.optim.clipping
import newton_summary.optim.newton_summary
from newton_summary.optim.cadence import (
    COMPARISONS,
    MEASUREMENTS,
    Intervals,
    Price,
    affordable_interval,
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
    assert optimizer.compare_every is None
    train(model, optimizer, 5)
    interval, period = optimizer.compare_every, optimizer.every
    assert COMPARISONS.shortest <= interval <= COMPARISONS.longest
    assert MEASUREMENTS.shortest <= period <= MEASUREMENTS.longest
    train(model, optimizer, 2 * period)
    assert (optimizer.every, optimizer.compare_every) == (period, interval)
    assert optimizer.counts["measured"] == 3


def test_an_interval_that_was_asked_for_holds_once_comparisons_have_grown_apart() -> None:
    model, optimizer = make(compare_every=8)
    train(model, optimizer, 40)
    assert optimizer.counts["compared"] == 7  # before steps 0, 4, 8, 12, 18, 26 and 34
    twin, resumed = make()  # which would settle
    resumed.load_state_dict(optimizer.state_dict())
    train(twin, resumed, 40)
    assert resumed.counts["compared"] == 12


def test_wider_networks_of_the_same_depth_are_measured_more_often() -> None:
    """On a small one a measurement is all calls."""
    periods = []
    for width in (8, 1000):
        model, optimizer = make(width, partition="canonical")
        train(model, optimizer, MEASUREMENTS.first + 1)
        periods.append((optimizer.every, optimizer.compare_every))
    (small, small_looks), (large, large_looks) = periods
    assert small > large
    assert small_looks > large_looks


def test_counting_changes_nothing_of_the_run(monkeypatch) -> None:
    model, optimizer = make(partition="canonical")
    train(model, optimizer, MEASUREMENTS.first + 5)
    for module in (newton_summary.optim.newton_summary, newton_summary.optim.comparison):
        monkeypatch.setattr(module, "Price", lambda: contextlib.nullcontext(object()))
    counted = {COMPARISONS: optimizer.compare_every, MEASUREMENTS: optimizer.every}
    for module in (newton_summary.optim.newton_summary, newton_summary.optim.comparison):
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
    assert (resumed.every, resumed.compare_every) == (optimizer.every, optimizer.compare_every)
    train(model, optimizer, 90)
    train(twin, resumed, 90)
    assert (resumed.every, resumed.compare_every) == (optimizer.every, optimizer.compare_every)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
