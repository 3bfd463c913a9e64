"""The monitor: what it measures, that it changes nothing, and what it remembers."""

from __future__ import annotations

import copy
import errno
import gc
import io
import json
import math
import pickle
import re
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from reference import dense_derivatives
from rounding import assert_rounded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.measure.next_step import next_step
from newton_summary.watch.advice import advise
from newton_summary.watch.step_taken import StepTaken


def make_model(dtype=torch.float64, noisy: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    between = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if noisy else [nn.Identity(), nn.Identity()]
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *between, nn.Linear(8, 3)).to(dtype)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_batches(count: int = 8, size: int = 16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * size, 5, generator=generator, dtype=dtype)
    y = (x @ torch.randn(5, 3, generator=generator, dtype=dtype)).argmax(1)
    return list(zip(x.split(size), y.split(size), strict=True))


def train(model, optimizer, batches, steps: int, monitor=None, before=None) -> None:
    for t in range(steps):
        batch = batches[t % len(batches)]
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        if before is not None:
            before(t)
        if monitor is not None:
            monitor.step(batch)
        optimizer.step()


def flat_state(model, optimizer) -> list[torch.Tensor]:
    state = [value for _, value in sorted(model.state_dict().items())]
    for p in model.parameters():
        state += [value for _, value in sorted(optimizer.state[p].items()) if isinstance(value, torch.Tensor)]
        state += [] if p.grad is None else [p.grad]
    return [torch.get_rng_state(), *state]


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
}


# It changes nothing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["step", "attach"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_bit_for_bit_with_dropout_and_batch_norm(name: str, way: str) -> None:
    results = []
    for watched in (False, True):
        model = make_model(torch.float32, noisy=True)
        optimizer = OPTIMIZERS[name](model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        loader = DataLoader(
            TensorDataset(*map(torch.cat, zip(*make_batches(dtype=torch.float32), strict=True))), 16, True
        )
        monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=3) if watched else None
        if monitor is not None and way == "attach":
            monitor.attach(loader, repeats=2)
        torch.manual_seed(5)
        for _ in range(3):
            for batch in loader:
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                if monitor is not None and way == "step":
                    monitor.step(batch)
                optimizer.step()
                scheduler.step()
        if monitor is not None:
            assert monitor.counts["measured"] == len(monitor.records) == 8
        results.append(flat_state(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(results[0]) > 20


# What it measures -----------------------------------------------------------------------------------------------------


def test_a_measurement_is_the_summary_along_the_optimizers_own_step() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=4)
    train(model, optimizer, batches, 6, monitor)
    optimizer.zero_grad()
    loss_fn(model, batches[6]).backward()
    advice = monitor.measure([batches[7]])
    twin, memory = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    other = torch.optim.Adam(twin.parameters(), lr=1e-2)
    other.load_state_dict(memory)
    other.step()
    along = [(p - q).detach() for p, q in zip(model.parameters(), twin.parameters(), strict=True)]
    loss, gradient, hessian, third = dense_derivatives(loss_fn, model, batches[7], monitor.partition, along, 3)
    torch.testing.assert_close(monitor.summary.loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(monitor.summary.gradient, gradient, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(monitor.summary.hessian, hessian, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(monitor.summary.third, torch.einsum("sss->s", third), rtol=1e-8, atol=1e-14)
    assert advice is monitor.advice
    record = monitor.records[-1]
    assert record.predicted_decrease == pytest.approx((gradient.sum() - hessian.sum() / 2).item(), rel=1e-8)
    optimizer.step()
    expected = loss - loss_fn(twin, batches[7])
    assert monitor.records[-1].actual_decrease == pytest.approx(expected.item(), rel=1e-9)
    assert monitor.records[-1].actual_decrease == pytest.approx(record.predicted_decrease, rel=0.3)


def test_the_actual_decrease_meets_the_same_dropout_and_batch_statistics() -> None:
    model, batches = make_model(noisy=True), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-20)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    train(model, optimizer, batches, 3, monitor)
    assert len(monitor.records) == 3
    for record in monitor.records:  # other masks or statistics would change it by a tenth
        assert_rounded(record.loss - record.actual_decrease, record.loss, 100)


def test_repeated_batches_are_pooled_over_the_window() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, window=3, level=0.8)
    loss_fn(model, batches[0]).backward()
    monitor.measure([batches[1]])
    monitor.measure(batches[2:6])
    along = [0.1 * p.grad for p in model.parameters()]
    parts = [ns.summarize(loss_fn, model, [b], direction=along) for b in batches[3:6]]
    expected = advise(parts, level=0.8)
    assert monitor.advice.batches == 3
    for mine, theirs in zip(monitor.advice.groups, expected.groups, strict=True):
        assert mine.alone == pytest.approx(theirs.alone, rel=1e-9)
        assert mine.high == pytest.approx(theirs.high, rel=1e-9)
    whole = ns.summarize(loss_fn, model, batches[2:6], direction=along)
    torch.testing.assert_close(monitor.summary.hessian, whole.hessian)


@pytest.mark.parametrize("name", ["adam", "adamw", "momentum"])
@pytest.mark.parametrize("c", [30.0, 1 / 30])
def test_scaling_a_groups_learning_rate_divides_its_factor(name: str, c: float) -> None:
    factors = []
    for scale in (1.0, c):
        model, batches = make_model(), make_batches()
        optimizer = OPTIMIZERS[name](ns.Partition.canonical(model).param_groups())
        train(model, optimizer, batches, 5)
        optimizer.param_groups[2]["lr"] *= scale
        monitor = ns.Monitor(model, loss_fn, optimizer=optimizer)
        loss_fn(model, batches[0]).backward()
        monitor.measure(batches[1:4])
        factors.append(torch.tensor([[g.alone, g.low, g.high] for g in monitor.advice.groups], dtype=torch.float64))
    expected = factors[0].clone()
    expected[2] /= c
    torch.testing.assert_close(factors[1], expected, rtol=1e-9, atol=0)


def test_older_measurements_count_in_todays_learning_rates() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer)
    loss_fn(model, batches[0]).backward()
    before = monitor.measure(batches[1:3])
    optimizer.param_groups[0]["lr"] = 0.025
    after = monitor.measure(batches[1:3])
    assert after.batches == 4
    for a, b in zip(before.groups, after.groups, strict=True):
        assert b.alone == pytest.approx(4 * a.alone, rel=1e-9)


def test_attached_it_measures_within_step_on_clipped_gradients() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=2).attach(batches)
    train(model, optimizer, batches, 5, before=lambda t: nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
    assert [record.step for record in monitor.records] == [0, 2, 4]
    assert all(0 < abs(r.actual_decrease) < 2e-3 for r in monitor.records)
    monitor.close()
    train(model, optimizer, batches, 4, monitor)
    assert monitor.counts["measured"] == 3
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_attached_twice_it_measures_once_and_on_the_last_batches() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1).attach([None]).attach(batches)
    train(model, optimizer, batches, 3)
    assert dict(monitor.counts) == {"measured": 3, "failed": 0}
    monitor.close()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("way", ["step", "attach"])
def test_a_training_that_stands_still_is_not_called_healthy(way: str, tmp_path) -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=2, path=tmp_path / "run.jsonl")
    start = copy.deepcopy(model.state_dict())
    optimizer.register_step_post_hook(lambda *_: model.load_state_dict(start))
    if way == "attach":
        monitor.attach(batches)
    train(model, optimizer, batches[:1] if way == "step" else batches, 12, monitor if way == "step" else None)
    lower = "no" if way == "step" else "(no|not surely)"
    said = rf"the loss is {lower} lower than at the first measurement \([\d.]+, now [\d.]+\)"
    row = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])
    flat = monitor.advice.to_dict()["words"]
    for words in (monitor.advice.headline, repr(monitor), flat, row["headline"], row["sentences"][0]):
        assert re.search(said, words)
        assert "leave the rates" not in words


def test_groups_that_were_frozen_since_are_not_advised_by_what_they_were() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    train(model, optimizer, batches, 3, monitor)
    assert monitor.advice["0.weight"].alone > 0
    optimizer.zero_grad()
    model[0].weight.requires_grad_(False)
    train(model, optimizer, batches, 2, monitor)
    assert monitor.advice.batches == 5
    assert monitor.advice["0.weight"].words == "`0.weight`: this step does not move it"
    assert monitor.advice["0.weight"].alone == 0
    assert monitor.advice["0.bias"].alone > 0


@pytest.mark.parametrize("way", ["step", "attach"])
def test_a_warm_up_that_starts_at_0_is_measured_from_where_it_moves(way: str) -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step // 2)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    if way == "attach":
        monitor.attach(batches)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    loss_fn(model, batches[0]).backward()
    assert monitor.measure(batches) is None
    train(model, optimizer, batches, 5, monitor if way == "step" else None)
    assert [record.step for record in monitor.records] == [2, 3, 4]
    assert monitor.advice.batches == 3
    assert all(group.alone > 0 for group in monitor.advice.groups)


def made_later(model, optimizer) -> None:
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.1})


def thawed(model, optimizer) -> None:
    model[0].requires_grad_(True)


def warmed_up(model, optimizer) -> None:
    optimizer.param_groups[1]["lr"] = 0.1


@pytest.mark.parametrize("begins", [made_later, thawed, warmed_up])
def test_a_group_that_begins_to_move_is_advised_from_then_on(begins) -> None:
    model, batches = make_model(), make_batches()
    later = [] if begins is made_later else [{"params": model[0].parameters(), "lr": 0.1 * (begins is thawed)}]
    optimizer = torch.optim.SGD([{"params": model[4].parameters()}, *later], lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    model[0].requires_grad_(begins is not thawed)
    train(model, optimizer, batches, 4, monitor)
    assert monitor.advice.batches == 4
    assert monitor.advice["0.weight"].alone == 0
    begins(model, optimizer)
    fresh = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    train(model, optimizer, batches[4:], 3, monitor, lambda t: fresh.step(batches[4 + t]))
    assert monitor.advice.batches == 3  # the earlier ones said that it changes nothing
    assert [group.__dict__ for group in monitor.advice.groups] == [group.__dict__ for group in fresh.advice.groups]


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("unscales", [True, False])
def test_gradients_that_are_still_scaled_are_found_when_the_step_is_taken(attached: bool, unscales: bool) -> None:
    model, batches, scaler = make_model(), make_batches(), torch.amp.GradScaler("cpu")
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[4])]
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizers, every=1)
    if attached:
        monitor.attach(batches)

    def loop() -> None:
        for batch in batches[:3]:
            model.zero_grad()
            scaler.scale(loss_fn(model, batch)).backward()
            for optimizer in optimizers if unscales else ():
                scaler.unscale_(optimizer)
            if not attached:
                monitor.step(batch)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()

    if unscales:
        loop()  # and warns of nothing
        return
    number = 2 if attached else 1  # the first one's gradients were unscaled before it stepped
    with pytest.warns(UserWarning, match=rf"step 1 of SGD {number} was 6.55e\+04 times shorter than the one") as caught:
        loop()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("accumulates", [True, False])
def test_where_no_step_is_heard_of_it_says_so_and_measures_no_more(accumulates: bool) -> None:
    model, batches = make_model(), make_batches()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizers[accumulates], every=2)

    def loop() -> None:
        for t, batch in enumerate(batches):
            (loss_fn(model, batch) / 4).backward()
            monitor.step(batch)
            if t % 4 == 3:
                optimizers[1].step()
                optimizers[1].zero_grad()

    with pytest.warns(UserWarning, match=r"has measured 3 times since a step of SGD: call .* after the last") as caught:
        loop()
    told = [str(warning.message) for warning in caught]
    assert told[0].startswith("the Monitor has measured")
    assert monitor.counts["measured"] == 3
    assert monitor._taken == 2 * accumulates


@pytest.mark.parametrize("by_name", [False, True])
def test_attached_it_measures_along_the_gradients_that_a_closure_computes(by_name: bool) -> None:
    """And returns what the closure does, which is called as often as without."""
    batches, calls, monitors = make_batches(), [], []
    for has_closure in (False, True):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        monitors.append(ns.Monitor(model, loss_fn, optimizer=optimizer, every=2).attach(batches))
        for batch in batches[:4]:

            def closure(batch=batch, model=model, optimizer=optimizer) -> torch.Tensor:
                calls.append(batch)
                optimizer.zero_grad()
                loss = loss_fn(model, batch)
                loss.backward()
                return loss

            if has_closure:
                assert (optimizer.step(closure=closure) if by_name else optimizer.step(closure)).ndim == 0
            else:
                closure()
                optimizer.step()
    assert len(calls) == 8
    assert [record.step for record in monitors[1].records] == [0, 2]
    assert [record.to_dict() for record in monitors[1].records] == [record.to_dict() for record in monitors[0].records]


@pytest.mark.parametrize(
    ("other", "words"), [(5, "5 times as long as"), (0.01, "100 times shorter than"), (-1, "against")]
)
def test_another_step_than_was_measured_is_warned_of_once(other: float, words: str) -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    factor = 0.5  # a smaller one may be meant

    def before_step(*_) -> None:
        for p in model.parameters():
            p.grad.mul_(factor)

    optimizer.register_step_pre_hook(before_step)
    train(model, optimizer, batches, 2, monitor)
    factor = other
    with pytest.warns(UserWarning, match=f"step 3 of SGD was {words} the one that the Monitor") as caught:
        train(model, optimizer, batches, 3, monitor)
    assert len(caught) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("lr", [1e-3, 1e-7])
def test_the_step_that_was_measured_is_no_other_one_however_coarse_weights_are(lr: float, dtype: torch.dtype) -> None:
    """Adam's first step is as long in every entry: what rounding makes of equal weights does not cancel."""
    for size in (1.0, 0.7, 1e3, 1e-30):
        weight = torch.full((1000,), size, dtype=dtype, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.AdamW([weight], lr=lr * size)
        taken = StepTaken([optimizer], [weight], next_step(optimizer, [weight]))
        optimizer.step()
        assert not taken.others(), size


class Langevin(torch.optim.SGD):
    """Draws noise in every step."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad + 0.01 * torch.randn_like(p))


@pytest.mark.parametrize("way", ["step", "attach"])
def test_a_step_that_draws_noise_is_measured_with_that_noise_and_taken_as_without(way: str) -> None:
    steps, batches = [], make_batches()
    for watched in (False, True):
        model = make_model()
        optimizer = Langevin(model.parameters(), lr=1e-3)
        monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1) if watched else None
        if monitor is not None and way == "attach":
            monitor.attach(batches)
        train(model, optimizer, batches, 3, monitor if way == "step" else None)
        steps.append(model[0].weight.detach().clone())
    assert torch.equal(*steps)


def test_of_steps_whose_squares_are_no_numbers_nothing_is_said() -> None:
    torch.manual_seed(0)
    weight = (1e-17 * torch.rand(1000)).requires_grad_()
    after = weight.detach() - 1e-23
    taken = StepTaken([torch.optim.SGD([weight])], [weight], [weight.detach() - after])
    weight.data.copy_(after)
    assert not taken.others()


def test_weights_that_are_taken_away_after_a_measurement_end_no_training() -> None:
    """What was measured cannot be compared with the step then: the monitor says so, and training goes on."""
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    optimizer.zero_grad()
    loss_fn(model, batches[0]).backward()
    monitor.step(batches[0])
    first = next(model.parameters())
    kept, first.data, first.grad = first.data, torch.empty(0), None
    with pytest.warns(UserWarning, match="a measurement of the Monitor"):
        optimizer.step()
    first.data = kept
    assert monitor.counts["errors"] == 1


def test_a_failure_within_a_step_is_warned_of_where_the_step_is_taken() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ns.Monitor(model, lambda model, batch: None, optimizer=optimizer, every=1).attach(batches)
    with pytest.warns(UserWarning, match="before step 1 failed, training goes on") as caught:
        train(model, optimizer, batches, 3)
    assert [warning.filename for warning in caught] == [__file__]


# What it remembers ----------------------------------------------------------------------------------------------------


class Scalars(list):
    def add_scalar(self, tag, value, step) -> None:
        self.append((tag, value, step))


def test_records_go_to_a_file_a_frame_and_a_writer(tmp_path) -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    writer, path = Scalars(), tmp_path / "advice.jsonl"
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=2, writer=writer, path=path, history=3)
    train(model, optimizer, batches, 9, monitor)
    monitor.measure([batches[0]])  # a step that is never taken is written by close()
    monitor.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8, 9]
    assert rows[-1]["actual_decrease"] is None
    assert rows[0]["low"] == [None] * 4  # a single batch gives no interval
    assert [r.step for r in monitor.records] == [6, 8, 9]
    frame = monitor.to_frame()
    assert len(frame) == 12
    assert list(frame.group[:4]) == list(monitor.partition.names)
    assert set(frame.learning_rate) == {1e-2}
    assert {"step", "loss", "alone", "low", "high", "joint", "words", "predicted_decrease"} <= set(frame.columns)
    assert frame.alone.iloc[-1] == monitor.advice.groups[-1].alone
    tags = {tag for tag, _, _ in writer}
    assert {"newton_summary/actual_decrease", "newton_summary/alone/0.weight"} <= tags
    assert all(math.isfinite(value) for _, value, _ in writer)


def test_a_missing_pandas_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    model = make_model()
    monitor = ns.Monitor(model, loss_fn, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ImportError, match=r"pip install 'newton-summary\[frames\]'"):
        monitor.to_frame()


@pytest.mark.slow
def test_memory_is_flat_over_1000_monitored_steps() -> None:
    model, batches = make_model(torch.float32), make_batches(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1, history=50)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    train(model, optimizer, batches, 100, monitor)
    tracemalloc.start()
    before, (size, _) = tensors(), tracemalloc.get_traced_memory()
    train(model, optimizer, batches, 1000, monitor)
    after, (grown, _) = tensors(), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after == before
    assert grown - size < 1_000_000  # a leak of one record a step would be more
    assert monitor.counts["measured"] == 1100
    assert len(monitor.records) == 50


# Misuse and failure ---------------------------------------------------------------------------------------------------


def test_a_batch_that_is_not_finite_changes_no_advice() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer)
    loss_fn(model, batches[0]).backward()
    advice = monitor.measure([batches[0]])
    assert monitor.measure([(batches[0][0] * math.nan, batches[0][1])]) is None
    assert monitor.advice is advice
    assert monitor.counts == {"measured": 2, "failed": 1}
    assert len(monitor.records) == 1
    optimizer.step()


def test_misuse_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for every in (0, 0.5, -1, 2.5):
        with pytest.raises(ValueError, match="every must be a whole number"):
            ns.Monitor(model, loss_fn, optimizer=optimizer, every=every)
    with pytest.raises(ValueError, match="holds no parameter of this model"):
        ns.Monitor(model, loss_fn, optimizer=torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"^level must be"):
        ns.Monitor(model, loss_fn, optimizer=optimizer, level=90)
    with pytest.raises(ValueError, match=r"^regularization must not be negative"):
        ns.Monitor(model, loss_fn, optimizer=optimizer, regularization=-1)
    with pytest.raises(TypeError, match=r"writer must have add_scalar.*, got 'runs'"):
        ns.Monitor(model, loss_fn, optimizer=optimizer, writer="runs")
    with pytest.raises(ValueError, match="make the partition from it"):
        ns.Monitor(model, loss_fn, optimizer=optimizer, partition=ns.Partition.canonical(make_model()))
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(TypeError, match="measures by itself"):
        ns.Monitor(model, loss_fn, optimizer=ns.NewtonSummary(model, loss_fn))
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"^batches is a one-shot"):
        monitor.attach(iter(make_batches()))
    with pytest.raises(ValueError, match=r"^batches is empty"):
        monitor.attach([])
    with pytest.raises(TypeError, match=r"^batches must be .*, got TensorDataset: .* of a data set a DataLoader"):
        monitor.attach(TensorDataset(torch.randn(9, 5)))
    loss_fn(model, make_batches()[0]).backward()
    with pytest.raises(ValueError, match="no batches"):
        monitor.measure([])


def test_groups_that_the_optimizer_does_not_hold_do_not_move() -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer)
    loss_fn(model, batches[0]).backward()
    advice = monitor.measure(batches[1:4])
    assert advice["0.weight"].words == "`0.weight`: this step does not move it"
    assert math.isnan(monitor.records[-1].learning_rates[0])


def test_its_repr_says_what_it_watches_and_what_it_advises() -> None:
    model, batches = make_model(), make_batches()
    monitor = ns.Monitor(model, loss_fn, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), every=7)
    assert repr(monitor) == ("Monitor of SGD: 4 groups, every 7 steps, measured 0×\nno advice yet")
    loss_fn(model, batches[0]).backward()
    monitor.measure(batches[1:4])
    first, *rest = repr(monitor).splitlines()
    assert first.endswith("every 7 steps, measured 1×")
    assert rest == repr(monitor.advice).splitlines()


def test_a_loop_that_skips_backward_goes_on() -> None:
    model, batches = make_model(), make_batches(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)

    def loop() -> None:
        for t, batch in enumerate(batches):
            optimizer.zero_grad()
            if t not in (1, 3):
                loss_fn(model, batch).backward()
            monitor.step(batch)
            optimizer.step()

    with pytest.warns(UserWarning, match=r"nothing before step 2, .*call backward\(\)") as caught:
        loop()
    assert len(caught) == 1
    assert [record.step for record in monitor.records] == [0, 2, 4, 5]


def test_gradients_that_come_after_the_first_optimizers_step_are_asked_for() -> None:
    """Where optimizers step within ``backward()``, all but the first would pass for standing still."""
    model, batches = make_model(), make_batches(6)
    of_each = {p: torch.optim.Adam([p]) for p in model.parameters()}
    monitor = ns.Monitor(model, loss_fn, optimizer=list(of_each.values()), every=2).attach(batches)
    model[0].requires_grad_(False)  # whose optimizers have none in truth
    for batch in batches[:3]:
        loss_fn(model, batch).backward()
        for optimizer in of_each.values():
            optimizer.step()
            optimizer.zero_grad()
    model[0].requires_grad_(True)

    def step(parameter):
        of_each[parameter].step()
        of_each[parameter].zero_grad()

    def loop() -> None:
        for batch in batches:
            loss_fn(model, batch).backward()

    for parameter in of_each:
        parameter.register_post_accumulate_grad_hook(step)
    with pytest.warns(UserWarning, match=r"Adam had no gradients yet when another .* after backward\(\)") as caught:
        loop()
    assert len(caught) == 1
    assert monitor.counts["measured"] > 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda watched: pickle.loads(pickle.dumps(watched))])
@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_of_a_training_is_watched_as_the_training_is(attached, copied) -> None:
    model, batches = make_model(), make_batches(6)
    optimizer = torch.optim.Adam(model.parameters())
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=2)
    if attached:
        monitor.attach(batches)

    def go_on(model, optimizer, monitor, steps):
        train(model, optimizer, batches, steps, None if attached else monitor)
        return [record.to_dict() for record in monitor.records]

    go_on(model, optimizer, monitor, 3)
    twins = copied((model, optimizer, monitor))
    expected = go_on(model, optimizer, monitor, 4)
    assert [record["step"] for record in expected] == [0, 2, 4, 6]
    assert go_on(*twins, 4) == expected
    monitor.close()
    closed = copied((model, optimizer, monitor))
    assert go_on(*closed, 3) == expected


def test_a_training_that_is_not_finite_is_warned_of_once() -> None:
    model, batches = make_model(), make_batches(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1)
    train(model, optimizer, batches, 1, monitor)  # of which it knows no gradient when it is copied
    pickle.loads(pickle.dumps(monitor))
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, batches, 2, monitor)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(UserWarning, match=r"last 3 measurements, up to that before step 6, were not finite") as caught:
        train(model, optimizer, batches, 9, monitor)
    assert len(caught) == 1
    assert monitor.counts["failed"] == 9
    other = ns.Monitor(model, loss_fn, optimizer=optimizer)
    loss_fn(model, batches[0]).backward()
    for _ in range(4):  # before one step
        other.measure(batches[:1])
    with pytest.warns(UserWarning, match="last 3 measurements, up to that before step 1, were not finite"):
        optimizer.step()


@pytest.mark.parametrize("to_none", [True, False])
def test_measured_after_the_step_it_says_where_to_measure(to_none: bool) -> None:
    model, batches = make_model(), make_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop(monitor: ns.Monitor, late: bool) -> None:
        for t, batch in enumerate(batches):
            optimizer.zero_grad(set_to_none=to_none)
            loss_fn(model, batch).backward()
            if not late and t > 1:  # the first steps are not watched
                monitor.step(batch)
            optimizer.step()
            if late:
                monitor.step(batch)

    loop(ns.Monitor(model, loss_fn, optimizer=optimizer, every=3), late=False)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=3)
    with pytest.warns(UserWarning, match=r"step 3 has used already: call monitor\.step\(\) between") as caught:
        loop(monitor, late=True)
    assert len(caught) == 1


def test_gradients_of_another_optimizer_that_waits_are_not_called_used() -> None:
    model, batches = make_model(), make_batches()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, -1))
    monitor = ns.Monitor(model, loss_fn, optimizer=[first, second], every=1)
    loss_fn(model, batches[0]).backward()
    first.step()
    for batch in batches:  # the gradients of the first one stay what they were
        second.zero_grad()
        for p, gradient in zip(
            model[-1].parameters(), torch.autograd.grad(loss_fn(model, batch), model[-1].parameters()), strict=True
        ):
            p.grad = gradient
        monitor.step(batch)
        second.step()
    assert monitor.counts["measured"] > 1


def test_a_path_that_takes_no_records_is_refused_when_the_monitor_is_made(tmp_path, monkeypatch) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        ns.Monitor(model, loss_fn, optimizer=optimizer, path=tmp_path)
    with pytest.raises(ValueError, match=r"its folder cannot be made .*Not a directory"):
        ns.Monitor(model, loss_fn, optimizer=optimizer, path=tmp_path / "file" / "deep" / "run.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda *_: False)  # root may write everywhere
        with pytest.raises(ValueError, match="cannot be written"):
            ns.Monitor(model, loss_fn, optimizer=optimizer, path=tmp_path / "run.jsonl")
    assert not optimizer._optimizer_step_pre_hooks
    ns.Monitor(model, loss_fn, optimizer=optimizer, path=tmp_path / "new" / "folder" / "run.jsonl")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_records_that_cannot_be_written_end_no_training(tmp_path) -> None:
    class Failing:
        def add_scalar(self, tag, value, step) -> None:
            raise RuntimeError("closed")

    model, batches, path = make_model(), make_batches(6), tmp_path / "runs" / "run.jsonl"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1, path=path, writer=Failing())
    path.parent.rmdir()
    with pytest.warns(UserWarning, match="training goes on") as caught:
        train(model, optimizer, batches, 3, monitor)
    told = [str(warning.message) for warning in caught]
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert f"cannot write to {path} (FileNotFoundError: No such file" in told[0]
    assert "its writer, a Failing (RuntimeError: closed)" in told[1]
    path.parent.mkdir()
    train(model, optimizer, batches, 2, monitor)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 4]
    assert [record.step for record in monitor.records] == [0, 1, 2, 3, 4]
    assert dict(monitor.counts) == {"measured": 5, "failed": 0}


def test_a_line_that_a_full_disk_cuts_off_is_taken_back(tmp_path, monkeypatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            with path.open("ab") as file:
                file.write(text[:10].encode())
            raise OSError(errno.ENOSPC, "No space left on device")

    model, batches, path = make_model(), make_batches(6), tmp_path / "run.jsonl"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=1, path=path)
    train(model, optimizer, batches, 1, monitor)
    opened = Path.open
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda self, mode="r", **more: Full() if mode == "a" else opened(self, mode))
        with pytest.warns(UserWarning, match="No space left on device"):
            train(model, optimizer, batches, 1, monitor)
    train(model, optimizer, batches, 1, monitor)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 2]


def test_advice_that_fails_does_not_end_the_training(monkeypatch) -> None:
    def failing(*_, **__):
        raise ValueError("no advice")

    monkeypatch.setattr("newton_summary.watch.monitor.advise", failing)
    model, batch = nn.Linear(3, 1), torch.randn(8, 3)
    monitor = ns.Monitor(
        model, lambda m, x: m(x).square().mean(), optimizer=torch.optim.SGD(model.parameters()), every=1
    )
    model(batch).square().mean().backward()
    with pytest.warns(UserWarning, match=r"before step 1 failed, training goes on; .*no advice"):
        assert monitor.step(batch) is None
    for _ in range(3):
        assert monitor.step(batch) is None  # says no more
    assert (monitor.counts["errors"], monitor.counts["disabled"]) == (3, 1)
    assert "silent since 3 errors in a row" in repr(monitor)


def test_after_a_failure_it_measures_when_it_is_next_time_to() -> None:
    model, batches = make_model(), make_batches(6)

    def failing_on_some(model, batch):
        if batch[0] is batches[0][0] or batch[0] is batches[3][0]:
            raise OSError("for a moment")
        return loss_fn(model, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = ns.Monitor(model, failing_on_some, optimizer=optimizer, every=1)
    with pytest.warns(UserWarning, match="training goes on; .*for a moment") as caught:
        train(model, optimizer, batches, 6, monitor)
    assert len(caught) == 2
    assert dict(monitor.counts) == {"measured": 4, "failed": 0, "errors": 2}
