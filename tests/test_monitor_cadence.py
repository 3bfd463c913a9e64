"""A monitor that pays for itself: how often it measures, and on which samples."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from test_monitor import flat_state, loss_fn, make_batches, make_model, train
from torch import nn

import newton_summary as ns
from newton_summary.measure import Loss
from newton_summary.measure.price import CALL, Price
from newton_summary.measure.slices import RandomSamples
from newton_summary.watch.cadence import FEW, SHORTEST, Affordable
from newton_summary.watch.record import Record

STEP = 0.25  # seconds, in a world whose clock is moved by hand


class World:
    """A training in which a measurement of n samples takes a + b n seconds, and the first one some more."""

    def __init__(self, fixed: float, each: float, *, size: int = 256, share: float = 0.05, first: float = 0.0) -> None:
        self.now, self.fixed, self.each, self.size, self.first = 0.0, fixed, each, size, first
        self.cadence = Affordable(share, clock=lambda: self.now)
        self.guess = Price()
        self.measured: list[tuple[int, int, float]] = []  # before which step, on how many samples, at what price
        self.training = 0.0

    def run(self, steps: int, agree=list) -> World:
        for taken in range(steps):
            self.before(taken)
            self.pass_(STEP)
            self.cadence.end_of_step(taken + 1, agree)
        return self

    def before(self, taken: int) -> None:
        if not self.cadence.is_due(taken):
            return
        samples = self.cadence.samples_of(self.size, lambda: self.guess)
        price = self.fixed + self.each * samples + (self.first if not self.measured else 0.0)
        with self.cadence.spending():
            self.now += price
        self.cadence.has_measured(taken, samples)
        self.measured.append((taken, samples, price))

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.training += seconds


WORLDS = [(0.0, 0.3), (5.0, 0.0), (0.2, 0.002), (3.0, 0.1), (0.01, 0.04), (40.0, 2.0)]


@pytest.mark.parametrize(("fixed", "each"), WORLDS)
def test_measurements_take_their_share_of_the_time_and_no_more(fixed: float, each: float) -> None:
    world = World(fixed, each, first=7.0).run(40_000)
    spent = 0.0
    for (taken, _, price), (following, *_) in zip(world.measured, world.measured[1:], strict=False):
        spent += price
        assert spent + price <= 0.05 * following * STEP * (1 + 1e-9)  # for all before, and for one more like the last
        assert following - taken >= SHORTEST
        assert following - taken == SHORTEST or 2 * price > 0.05 * (following - taken - 2) * STEP
    assert len(world.measured) > 3


@pytest.mark.parametrize(
    ("fixed", "each", "expected"),
    [
        (0.0, 0.3, FEW),  # a hundred steps of 0.25 s pay for 1.25 s: not even for eight samples
        (0.25, 0.03, 32),  # for 33 samples
        (5.0, 0.01, 256),  # nearly all of it is not for samples
        (8.0, 0.4, 16),  # as much for 20 samples as for none
        (0.1, 0.001, 256),  # all are affordable
    ],
)
def test_as_many_samples_as_a_hundred_steps_pay_for_or_as_are_cheap(fixed: float, each: float, expected: int) -> None:
    for calls in (1, 10**6):  # whatever the count of operations made of the start
        world = World(fixed, each, first=1.0)
        world.guess.calls, world.guess.operations = calls, 10**4 * CALL
        world.run(100_000)
        assert [n for _, n, _ in world.measured[-4:]] == [expected] * 4
    assert world.measured[0][1] == 256


def test_the_first_number_of_samples_is_where_calls_weigh_as_much_as_operations() -> None:
    for calls, expected in ((1, FEW), (100, 16), (10_000, 256)):
        world = World(1.0, 1.0)
        world.guess.calls, world.guess.operations = calls, 1600 * CALL
        world.before(0)
        assert world.measured[0][1] == expected


def test_small_batches_are_not_cut_nor_by_less_than_half() -> None:
    assert {n for _, n, _ in World(0.0, 1.0, size=2 * FEW - 1).run(5000).measured} == {2 * FEW - 1}
    assert {n for _, n, _ in World(0.25, 0.03, size=60).run(20_000).measured} <= {8, 16, 60}


def test_a_pause_pays_for_nothing() -> None:
    steady, paused = World(2.0, 0.0), World(2.0, 0.0)
    steady.run(1000)
    for taken in range(1000):
        paused.before(taken)
        paused.pass_(10_000.0 if taken % 10 == 5 else STEP)
        paused.cadence.end_of_step(taken + 1, list)
    assert [m[0] for m in paused.measured] == [m[0] for m in steady.measured]


def test_processes_that_differ_decide_alike() -> None:
    slow, fast = World(4.0, 0.02), World(1.0, 0.01, first=3.0)
    for taken in range(6000):
        told = []
        for world in (slow, fast):
            world.before(taken)
            world.pass_(STEP if world is slow else STEP / 3)
            twin = copy.deepcopy(world.cadence)  # what this process has to say, before any has heard
            twin._clock = lambda now=world.now: now
            twin.end_of_step(taken + 1, lambda numbers, told=told: told.append(numbers) or numbers)
        means = [sum(numbers) / 2 for numbers in zip(*told, strict=True)]
        for world in (slow, fast):
            world.cadence.end_of_step(taken + 1, lambda _, means=means: means)
    assert [m[:2] for m in slow.measured] == [m[:2] for m in fast.measured]
    assert len(slow.measured) > 10


# Which samples --------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_at_random_and_stay_in_order_and_together() -> None:
    model, batch = (
        nn.Linear(1, 1),
        {"x": torch.arange(20.0)[:, None], "y": torch.arange(20) * 3, "scale": torch.ones(2)},
    )
    samples = RandomSamples(Loss(lambda model, b: (model(b["x"]).squeeze(1) - b["y"]).square().mean(), model))
    counts = torch.zeros(20)
    for _ in range(400):
        some, count = samples.of(batch, 5)
        x = some["x"][:, 0]
        assert count == len(x) == 5
        assert (x.diff() > 0).all()
        assert torch.equal(some["y"], (3 * x).long())
        assert some["scale"] is batch["scale"]
        counts[x.long()] += 1
    assert (counts - 100).abs().max() < 5 * math.sqrt(400 * 0.25 * 0.75)  # each is drawn a quarter of the time
    assert samples.of(batch, 20)[0] is batch


def test_samples_are_drawn_on_the_host_whatever_the_default_device() -> None:
    model, x = nn.Linear(1, 1), torch.randn(6, 1)
    with torch.device("meta"):
        some, count = RandomSamples(Loss(lambda model, x: model(x).mean(), model)).of(x, 4)
    assert (some.device.type, count) == ("cpu", 4)


def shuffled(model, batch):
    return model(batch[0]).mean() * (1 + torch.rand(()))


def weighted(model, batch):
    weight = batch[1]
    return (model(batch[0]).squeeze(1).square() * weight).sum() / weight.sum()


@pytest.mark.parametrize(
    ("model", "loss", "reason"),
    [
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), lambda m, b: m(b[0]).square().mean(), "the mean "),
        (nn.Linear(3, 1), weighted, "the mean loss"),
        (nn.Linear(3, 1), shuffled, "random"),
    ],
)
def test_samples_that_do_not_stand_for_the_batch_are_refused_and_the_monitor_takes_it_whole(model, loss, reason):
    torch.manual_seed(0)
    for layer in model.modules():  # made when this file was read, with whatever random numbers came
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    batch = torch.randn(40, 3), torch.rand(40)
    with pytest.raises(ValueError, match=rf"samples=8: .*{reason}"):
        RandomSamples(Loss(loss, model)).of(batch, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = ns.Monitor(model, loss, optimizer=optimizer)
    monitor.cadence.samples = FEW
    loss(model, batch).backward()
    monitor.step(batch)
    record = monitor.records[-1]
    assert (record.samples, record.available, record.measured_on) == (40, 40, "whole batches")
    assert monitor.summary.weight == 40
    asked = ns.Monitor(model, loss, optimizer=optimizer, samples=8)
    with pytest.warns(UserWarning, match=r"failed, training goes on.*samples=8"):
        asked.step(batch)


def test_a_failure_is_paid_for_as_a_measurement_is() -> None:
    seconds = iter(i / 8 for i in itertools.count())
    cadence = Affordable(1 / 16, clock=lambda: next(seconds))
    with cadence.spending():  # 1/8 s, as a step takes
        cadence.has_measured(0, 0.0)
    steps = next(n for n in itertools.count(1) if cadence.end_of_step(n, list) or cadence.is_due(n))
    assert steps == 100
    assert cadence.samples is None


# The monitor ----------------------------------------------------------------------------------------------------------


def test_a_number_of_samples_is_measured_and_told() -> None:
    model, batches = make_model(), make_batches(12, size=64)
    seen = []

    def watching(model, batch):
        seen.append(batch)
        return loss_fn(model, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, watching, optimizer=optimizer, every=5, samples=6)
    optimizer.zero_grad()
    loss_fn(model, batches[0]).backward()
    monitor.step(batches[0])
    some = seen[-1]
    assert len(some[1]) == 6
    along = [0.1 * p.grad for p in model.parameters()]
    expected = ns.summarize(loss_fn, model, [some], direction=along)
    torch.testing.assert_close(monitor.summary.hessian, expected.hessian, rtol=1e-9, atol=1e-14)
    assert monitor.summary.weight == 6
    before = loss_fn(model, some).item()
    optimizer.step()
    assert monitor.records[-1].actual_decrease == pytest.approx(before - loss_fn(model, some).item(), rel=1e-9)
    assert repr(monitor).startswith(
        "Monitor of SGD: 4 groups, every 5 steps, on 6 samples of a batch, measured 1×, last on 6 of 64 samples\n"
    )
    assert monitor.records[-1].scalars()["newton_summary/samples"] == 6.0
    assert set(monitor.to_frame().samples) == {6}
    assert Record.from_dict(monitor.records[-1].to_dict()).measured_on == "6 of 64 samples"


def test_fixed_numbers_of_steps_and_samples_repeat() -> None:
    runs = []
    for _ in range(2):
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=2, samples=8)
        train(model, optimizer, make_batches(12, size=64), 12, monitor)
        runs.append([record.to_dict() for record in monitor.records])
    assert runs[0] == runs[1]
    assert [row["step"] for row in runs[0]] == [0, 2, 4, 6, 8, 10]
    assert len({row["loss"] for row in runs[0]}) == 6


def test_by_default_training_is_the_same_and_what_is_measured_follows_from_the_time() -> None:
    results = []
    for watched in (False, True):
        model = make_model(noisy=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        monitor = ns.Monitor(model, loss_fn, optimizer=optimizer) if watched else None
        if monitor is not None:
            clock = iter(range(10**6))
            monitor.cadence = Affordable(0.05, clock=lambda clock=clock: float(next(clock)))  # every reading a second
        torch.manual_seed(5)
        train(model, optimizer, make_batches(12, size=64), 250, monitor)
        results.append(flat_state(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # a measurement takes two seconds, one before the step and one after it; so do a hundred steps' twentieths
    assert [record.step for record in monitor.records] == [0, 100, 200]
    assert repr(monitor).startswith("Monitor of Adam: 6 groups, in 5% of the time, measured 3×")


def test_arguments_are_checked() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments in ({"samples": 0}, {"share": 0.0}, {"share": 1.0}, {"share": -0.1}, {"samples": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            ns.Monitor(model, loss_fn, optimizer=optimizer, **arguments)
