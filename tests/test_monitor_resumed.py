"""A training that is resumed from a checkpoint is watched as if it had not stopped."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import newton_summary as ns
from newton_summary.report.monitor_log import read_log
from newton_summary.watch.cadence import Affordable
from newton_summary.watch.record import RESUMED


def make_training(
    attached: bool, groups: str = "canonical", **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, ns.Monitor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, partition=groups, **options)
    if attached:
        monitor.attach(BATCHES, repeats=2, seed=3)
    return model, optimizer, monitor


def loss_fn(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_batches(count: int = 8, size: int = 16) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * size, 5, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)).argmax(1)
    return list(zip(x.split(size), y.split(size), strict=True))


BATCHES = make_batches()


def train(model: Any, optimizer: Any, monitor: ns.Monitor, first: int, last: int) -> None:
    for step in range(first, last):
        batch = BATCHES[step % len(BATCHES)]
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        if monitor._stream is None:
            monitor.step(batch)
        optimizer.step()


def through_a_file(*states: Any) -> Any:
    file = io.BytesIO()
    torch.save(states, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("samples", [None, 6])
def test_a_resumed_monitor_says_what_one_says_that_never_stopped(attached: bool, samples: int | None, tmp_path) -> None:
    options = {"every": 5, "samples": samples, "window": 6, "history": 4}
    whole = make_training(attached, path=tmp_path / "whole.jsonl", **options)
    train(*whole, 0, 40)
    first = make_training(attached, path=tmp_path / "parts.jsonl", **options)
    train(*first, 0, 17)
    states = through_a_file(*(part.state_dict() for part in first))
    train(*first, 17, 33)  # what is lost: records of steps 20, 25 and 30 are in the file
    second = make_training(attached, path=tmp_path / "parts.jsonl", **options)
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    assert [record.step for record in second[2].records] == [0, 5, 10, 15]
    assert second[2].advice is not None
    assert second[2].advice.sentences() == list(second[2].records[-1].sentences)
    train(*second, 17, 40)
    assert second[2].counts == whole[2].counts
    assert list(second[2].records) == list(whole[2].records)
    assert second[2].advice == whole[2].advice
    assert torch.equal(second[2].summary.hessian, whole[2].summary.hessian)
    ours, theirs = (read_log(tmp_path / name) for name in ("parts.jsonl", "whole.jsonl"))
    assert ours.runs == theirs.runs == 1
    steps = [entry.record.step for entry in ours.entries]
    assert steps == [entry.record.step for entry in theirs.entries] == [0, 5, 10, 15, 20, 25, 30, 35]
    for one, other in zip(ours.entries, theirs.entries, strict=True):
        assert one.record == other.record
    lines = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert [line.get(RESUMED) for line in lines] == [None] * 7 + [17, None, None, None]


def test_what_is_loaded_before_data_is_attached_counts_too() -> None:
    whole = make_training(True, every=2)
    train(*whole, 0, 12)
    model, optimizer, monitor = first = make_training(True, every=2)
    train(*first, 0, 5)
    state = monitor.state_dict()
    monitor.close()
    later = ns.Monitor(model, loss_fn, optimizer=optimizer, partition="canonical", every=2)
    later.load_state_dict(state)
    assert later.state_dict()["stream"] == state["stream"]  # not yet attached, and saved again
    later.attach(BATCHES, repeats=2, seed=3)
    train(model, optimizer, later, 5, 12)
    assert list(later.records) == list(whole[2].records)


def test_a_monitor_of_other_groups_is_named() -> None:
    state = make_training(False)[2].state_dict()
    other = make_training(False, "trivial")[2]
    with pytest.raises(ValueError, match=r"the state is of a monitor of 4 groups \(0\.weight, 0\.bias, 2\.weight, …\)"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"this is no state of a Monitor: it has the entries 'state', 'param_groups'"):
        other.load_state_dict(other.optimizer.state_dict())
    assert other._taken == 0


def test_numbers_of_numpy_are_as_good_as_pythons() -> None:
    def watched(count: Any, share: Any) -> Any:
        options = {"every": count(2), "samples": count(4), "window": count(3), "history": count(2)}
        model, optimizer, monitor = make_training(False, **options, level=share(0.875), regularization=share(1.0))
        train(model, optimizer, monitor, 0, 5)
        return through_a_file(monitor.state_dict())[0]

    of_numpy, of_python = watched(np.int64, np.float32), watched(int, float)
    assert of_numpy["records"] == of_python["records"]
    assert of_numpy["progress"] == of_python["progress"]


def test_one_that_had_nothing_to_say_yet_and_one_that_was_silent() -> None:
    model, optimizer, monitor = make_training(False, every=1)
    fresh = monitor.state_dict()
    monitor.counts.update(errors=3, disabled=1)
    silent = through_a_file(monitor.state_dict())[0]
    train(model, optimizer, monitor, 0, 3)
    assert not monitor.records
    monitor.load_state_dict(silent)
    train(model, optimizer, monitor, 0, 3)
    assert len(monitor.records) == 3, "it tries again"
    monitor.load_state_dict(fresh)
    assert (monitor.advice, monitor.summary, len(monitor.records)) == (None, None, 0)


def make_cadence(samples: int | None = None) -> tuple[Affordable, list[float]]:
    now = [0.0]
    return Affordable(0.05, samples, clock=lambda: now[0]), now


def go(cadence: Affordable, now: list[float], first: int, last: int) -> list[tuple[int, int]]:
    """Steps of a second; a measurement takes three, and a tenth for each sample."""
    found = []
    for step in range(first, last):
        if cadence.is_due(step):
            with cadence.spending():
                count = cadence.samples_of(400, FakePrice)
                now[0] += 3 + 0.1 * count
                cadence.has_measured(step, float(count))
            found.append((step, count))
        now[0] += 1
        cadence.end_of_step(step + 1, list)
    return found


class FakePrice:
    calls, operations = 1, 10**9


def test_what_measurements_have_cost_is_known_after_a_night() -> None:
    whole, clock = make_cadence()
    expected = go(whole, clock, 0, 6000)
    first, clock = make_cadence()
    found = go(first, clock, 0, 2500)
    second, clock = make_cadence()
    clock[0] = 1e6
    second.load_state_dict(through_a_file(first.state_dict())[0])
    found += go(second, clock, 2500, 6000)
    assert len(expected) > 5
    assert [count for _, count in found] == [count for _, count in expected]
    assert all(abs(a - b) <= 2 for (a, _), (b, _) in zip(found, expected, strict=True))


def test_a_number_of_samples_that_is_asked_for_now_stays() -> None:
    first, clock = make_cadence()
    go(first, clock, 0, 900)
    asked, _ = make_cadence(12)
    asked.load_state_dict(first.state_dict())
    assert asked.samples_of(400, FakePrice) == 12
    assert math.isnan(asked._last)
