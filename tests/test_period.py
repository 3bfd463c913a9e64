"""How often to measure: counted, not timed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.period import FIRST_PERIOD, Price, affordable_period
from newton_summary.sampling import BatchStream


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def make_loader(batch_size=20):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(200, 6), torch.randint(3, (200,))), batch_size, shuffle=True)


def make(width=16, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    return model, ns.NewtonSummary(model, loss_fn, curvature_data=make_loader(), **options)


def train(model, optimizer, steps):
    batches = list(make_loader())
    for number in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batches[number % len(batches)]).backward()
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


def test_the_period_follows_the_price() -> None:
    step = price(0, 10**9)  # of a loss; a gradient of twice the batch has six times that
    assert affordable_period(price(0, 20 * 6 * 10**9), step, 0.5) == 50
    assert affordable_period(price(0, 44 * 10**8 * 6), step, 0.5) == 20
    assert affordable_period(price(0, 10**9), step, 0.5) == 10
    assert affordable_period(price(44 * 10**2, 0), price(1000, 0), 1.0) == 20, "calls, where operations are few"


def test_a_run_settles_for_a_period_and_keeps_it() -> None:
    model, optimizer = make()
    train(model, optimizer, FIRST_PERIOD)
    assert optimizer.every is None
    assert optimizer.counts["measured"] == 1
    train(model, optimizer, 1)
    period = optimizer.every
    assert 10 <= period <= 50
    train(model, optimizer, 4 * period)
    assert optimizer.every == period
    assert optimizer.counts["measured"] == 2 + (FIRST_PERIOD + 4 * period) // period - FIRST_PERIOD // period


def test_wider_networks_of_the_same_depth_are_measured_more_often() -> None:
    """On a small one a measurement is all calls."""
    periods = []
    for width in (8, 1000):
        model, optimizer = make(width)
        train(model, optimizer, FIRST_PERIOD + 1)
        periods.append(optimizer.every)
    assert periods[0] > periods[1]


def test_counting_changes_nothing_of_the_run() -> None:
    (model, optimizer), (twin, explicit) = make(), make(every=FIRST_PERIOD)
    train(model, optimizer, FIRST_PERIOD + 5)
    train(twin, explicit, FIRST_PERIOD + 5)
    assert optimizer.rates == explicit.rates
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("at", [5, FIRST_PERIOD + 1, FIRST_PERIOD + 30])
def test_a_resumed_run_has_the_same_period(at) -> None:
    model, optimizer = make()
    train(model, optimizer, at)
    twin, resumed = make()
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.every == optimizer.every
    train(model, optimizer, 90)
    train(twin, resumed, 90)
    assert resumed.every == optimizer.every
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_default_measures_on_half_of_a_batch_and_the_paper_on_all_of_it() -> None:
    seen = []

    def watched(model, batch):
        seen.append(len(batch[0]))
        return loss_fn(model, batch)

    for make_optimizer, size in ((ns.NewtonSummary, 10), (ns.NewtonSummary.paper, 20)):
        model = make()[0]
        optimizer = make_optimizer(model, watched, curvature_data=make_loader())
        loss_fn(model, next(iter(make_loader()))).backward()
        seen.clear()
        optimizer.step()
        assert set(seen) == {size}


@pytest.mark.parametrize(("share", "size"), [(1.0, 5), (0.5, 3), (0.01, 1)])
def test_a_share_of_every_batch_is_loaded(share, size) -> None:
    stream = BatchStream(DataLoader(torch.arange(20.0), batch_size=5), share=share)
    assert [len(stream.next(torch.device("cpu"))) for _ in range(8)] == [size] * 8
