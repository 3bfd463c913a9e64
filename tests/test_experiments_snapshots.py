"""What runs remember of their interactions: right, repeatable, and without a trace in the training."""

import json
import math

import pytest
import torch
from reference import dense_derivatives
from torch.nn import functional

from newton_summary.errors import UsageError
from newton_summary.partition import Partition
from newton_summary.report.reading import read_interactions
from newton_summary_experiments import snapshots
from newton_summary_experiments.models import mlp
from newton_summary_experiments.optimizers import OPTIMIZERS
from newton_summary_experiments.tasks import Task, get_task
from newton_summary_experiments.training import Trainer, config_of, train

SMALL = Task("small", lambda: mlp([64, 6, 10]), epochs=3, rates={"sgd": 0.1})


@pytest.fixture(scope="module")
def digits():
    return get_task("digits").read()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_looking_changes_nothing(optimizer, digits):
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(SMALL, config_of(SMALL, optimizer, epochs=2), digits, watched=watched)
        while not trainer.finished:
            trainer.step()
        ends.append([torch.get_rng_state(), *trainer.model.parameters()])
        assert [snapshot.epoch for snapshot in trainer.snapshots] == ([0, 1, 2] if watched else [])
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))


def test_a_snapshot_is_along_the_step_that_was_taken(digits):
    """Against dense derivatives in float64, along the step of SGD as its formula has it."""
    task = Task("small", lambda: mlp([64, 4, 10]), epochs=1, rates={"sgd": 0.1})
    trainer = Trainer(task, config_of(task, "sgd"), digits, watched=True)
    model = task.make_model(0)
    trainer.step()
    (snapshot,) = trainer.snapshots
    assert (snapshot.epoch, snapshot.step, len(snapshot.parts)) == (0, 0, 5)
    from newton_summary_experiments.data import shuffled

    images, classes = next(shuffled(digits.train, 100, 0, 0))
    gradients = torch.autograd.grad(functional.cross_entropy(model(images), classes), list(model.parameters()))
    along = [0.1 * g.double() for g in gradients]
    batches = snapshots._batches(task, digits, 0, 0)
    seen = torch.cat([images for images, _ in batches])
    assert len(seen.unique(dim=0)) == len(seen) == 500
    after, model = 0.0, model.double()
    for (inputs, targets), part in zip(batches, snapshot.summaries(), strict=True):
        batch = inputs.double(), targets
        values = dense_derivatives(task.loss_fn, model, batch, Partition.canonical(model), along, 2)
        assert part.loss.item() == pytest.approx(float(values[0]), rel=1e-5)
        torch.testing.assert_close(part.gradient, values[1], rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(part.hessian, values[2], rtol=2e-3, atol=1e-6)
        moved = mlp([64, 4, 10]).double()
        moved.load_state_dict(model.state_dict())
        with torch.no_grad():
            for p, u in zip(moved.parameters(), along, strict=True):
                p.sub_(u)
            after += float(task.loss_fn(moved, (inputs.double(), targets))) / 5
    before = sum(part.loss.item() for part in snapshot.summaries()) / 5
    assert snapshot.actual_decrease == pytest.approx(before - after, rel=1e-3)


def test_groups_that_did_not_move_are_measured_along_their_gradients(digits):
    model = SMALL.make_model(0)
    watcher = snapshots.Watcher(SMALL, digits, model, 0)
    watcher.remember(model)
    SMALL.loss_fn(model, (digits.train[0][:50], digits.train[1][:50])).backward()
    (first, second, third, last), gradients = model.parameters(), [p.grad for p in model.parameters()]
    with torch.no_grad():
        first.sub_(0.5)
        second.sub_(0.1 * second.grad)
        third.sub_(0.25)
    found = watcher.look(model, epoch=0, step=0)
    assert found.still == ["linear2.bias"]
    start = SMALL.make_model(0).double()
    along = [torch.full_like(first, 0.5), 0.1 * gradients[1], torch.full_like(third, 0.25), gradients[3]]
    images, classes = snapshots._batches(SMALL, digits, 0, 0)[0]
    reference = dense_derivatives(
        SMALL.loss_fn, start, (images.double(), classes), Partition.canonical(start), [u.double() for u in along], 2
    )
    torch.testing.assert_close(found.summaries()[0].hessian, reference[2], rtol=1e-3, atol=1e-6)
    moved = found.along_the_step()[0]
    torch.testing.assert_close(moved.hessian[:3, :3], reference[2][:3, :3], rtol=1e-3, atol=1e-6)
    assert not moved.hessian[3].any()
    assert moved.gradient[3] == 0
    assert last.grad is gradients[3]


def test_an_interrupted_run_has_the_same_interactions(digits, tmp_path):
    config = config_of(SMALL, "newton-summary")
    train(SMALL, config, digits, tmp_path / "whole")
    trainer = Trainer(SMALL, config, digits, watched=True)
    trainer.record()
    for _ in range(20):
        trainer.step()
    trainer.save(tmp_path / "stopped")
    train(SMALL, config, digits, tmp_path / "stopped")
    whole, stopped = ((tmp_path / name / snapshots.INTERACTIONS).read_text() for name in ("whole", "stopped"))
    assert whole == stopped
    sizes, found = read_interactions(tmp_path / "whole")
    assert sizes == {name: p.numel() for name, p in SMALL.make_model(0).named_parameters()}
    assert [(snapshot.epoch, snapshot.step) for snapshot in found] == [(0, 0), (1, 16), (2, 32), (3, 47)]


def test_what_is_not_finite_is_left_out(digits, tmp_path):
    train(SMALL, config_of(SMALL, "sgd", lr=1e38), digits, tmp_path)
    assert read_interactions(tmp_path)[1] == []


def test_a_run_without_interactions_has_none_and_a_damaged_file_is_named(tmp_path):
    assert read_interactions(tmp_path) == ({}, [])
    path = tmp_path / snapshots.INTERACTIONS
    for content in ("{", "[]", json.dumps({"groups": {}, "snapshots": [{"epoch": 1}]})):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"interactions\.json is damaged"):
            read_interactions(tmp_path)


@pytest.mark.parametrize("epochs", [1, 2, 3, 75, 100, 1000])
def test_chosen_epochs_are_few_and_end_below_the_last(epochs):
    chosen = snapshots.chosen_epochs(epochs)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] < epochs
    assert len(chosen) <= 2 + 3 * math.log10(epochs)
    steps = [snapshots.is_chosen(epochs, 7, taken) for taken in range(7 * epochs)]
    assert [epoch for epoch in steps if epoch is not None] == [*chosen, epochs]
