"""Training runs: what is recorded, and that a run that stopped goes on as if it had not."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.nn import functional

from newton_summary import NewtonSummary
from newton_summary.errors import UsageError
from newton_summary.report.records import Row
from newton_summary_experiments import files, training
from newton_summary_experiments.models import mlp
from newton_summary_experiments.optimizers import CHECK_EVERY, OPTIMIZERS, default_rate
from newton_summary_experiments.tasks import TASKS, Task, cross_entropy, get_task
from newton_summary_experiments.training import Interrupted, Trainer, config_of, evaluate, train

SMALL = Task("small", lambda: mlp([64, 12, 10]), epochs=3, rates={"sgd": 0.1})


@pytest.fixture(scope="module")
def digits():
    return get_task("digits").read()


def without_seconds(rows):
    return [dataclasses.replace(row, seconds=0.0) for row in rows]


def is_own():
    """Whether a loss is computed for training: measuring watches the operations."""
    return not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def interrupting(task, at):
    """The task, with Ctrl-C pressed during the training step with this number (from 0)."""
    count = [0]

    def loss_fn(model, batch):
        if torch.is_grad_enabled() and is_own():
            if count[0] == at:
                signal.raise_signal(signal.SIGINT)
            count[0] += 1
        return task.loss_fn(model, batch)

    return dataclasses.replace(task, loss_fn=loss_fn)


# What is recorded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_learns_and_records_every_epoch(optimizer, digits, tmp_path):
    config = config_of(SMALL, optimizer)
    run = train(SMALL, config, digits, tmp_path / "run")
    header, *lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert header["config"] == dataclasses.asdict(config)
    assert header["data"] == {"digest": digits.digest, "train": 1600, "validation": 197}
    assert [env["torch"] for env in header["environments"]] == [torch.__version__]
    assert [Row(**line) for line in lines] == run.rows
    assert [(row.epoch, row.step) for row in run.rows] == [(0, 0), (1, 16), (2, 32), (3, 48)]
    assert run.rows[-1].train_loss < run.rows[0].train_loss
    assert [row.seconds for row in run.rows] == sorted(row.seconds for row in run.rows)
    assert not run.diverged
    names = [name for name, _ in run.model.named_parameters()]
    measured = optimizer.startswith("newton")
    assert list(run.rows[-1].rates) == (names if measured else [])
    if optimizer.endswith("paper"):
        assert run.rows[-1].counts["measured"] == math.ceil(48 / 10)
    elif measured:
        assert run.rows[-1].counts["measured"] == 0, "the direction has a usual rate"
        assert run.rows[-1].counts["compared"] > 1


def test_the_figures_are_those_of_the_model(digits):
    run = train(SMALL, config_of(SMALL, "sgd", epochs=1), digits)
    for data, loss in ((digits.train, run.rows[-1].train_loss), (digits.validation, run.rows[-1].validation_loss)):
        with torch.no_grad():
            logits = run.model(data[0]).double()
        expected = (logits.logsumexp(1) - logits.gather(1, data[1][:, None])[:, 0]).mean().item()
        assert loss == pytest.approx(expected, rel=1e-5)
    right = (logits.argmax(1) == data[1]).double().mean().item()
    assert run.rows[-1].validation_accuracy == pytest.approx(right, abs=1e-12)


def test_losses_may_be_recorded_within_an_epoch_and_over_some_images(digits, tmp_path):
    task = dataclasses.replace(SMALL, records=3, evaluated=150)
    run = train(task, config_of(task, "newton-summary-paper", epochs=2), digits, tmp_path)
    assert [(row.epoch, row.step) for row in run.rows] == [(0, 0), (0, 6), (0, 12), (1, 16), (1, 22), (1, 28), (2, 32)]
    assert files.load_checkpoint(tmp_path)["place"][:2] == (2, 0)
    whole = train(SMALL, config_of(SMALL, "newton-summary-paper", epochs=2), digits)
    for name, tensor in whole.model.state_dict().items():  # recording changes nothing of the training
        torch.testing.assert_close(run.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    images, classes = (part[:150] for part in digits.train)
    expected = functional.cross_entropy(run.model(images), classes).item()
    assert run.rows[-1].train_loss == pytest.approx(expected, rel=1e-5)


def test_sgd_is_the_loop_that_anyone_would_write(digits):
    run = train(SMALL, config_of(SMALL, "sgd", epochs=1, lr=0.05, seed=2), digits)
    from newton_summary_experiments.data import shuffled

    model = SMALL.make_model(2)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for images, classes in shuffled(digits.train, 100, 2, 0):
        gradients = torch.autograd.grad(functional.cross_entropy(model(images), classes), list(model.parameters()))
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(v, alpha=0.05)
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_evaluation_uses_eval_mode_and_restores_it():
    model = torch.nn.Sequential(torch.nn.Linear(4, 10), torch.nn.Dropout(0.9))
    data = torch.randn(2500, 4), torch.randint(10, (2500,))
    first, second = evaluate(SMALL, model, data), evaluate(SMALL, model, data)
    assert first == pytest.approx(second, rel=1e-6)
    assert model.training
    assert first[0] == pytest.approx(functional.cross_entropy(model[0](data[0]), data[1]).item(), rel=1e-5)


def test_seeds_differ_and_repeat(digits):
    def final(seed):
        return train(SMALL, config_of(SMALL, "sgd", epochs=1, seed=seed), digits).rows[-1].train_loss

    assert final(0) == final(0)
    assert final(0) != final(1)


def test_the_rate_of_the_papers_method_falls_on_a_plateau(digits):
    trainer = Trainer(SMALL, config_of(SMALL, "newton-summary-paper", lr=0.3, epochs=40), digits)
    rates = []
    for epoch in range(4 * CHECK_EVERY + 1):  # without training the loss stays where it is
        trainer.epoch = epoch
        trainer.record()
        rates.append(trainer.rows[-1].lr)
    assert rates[:-1] == [0.3] * (4 * CHECK_EVERY)
    assert rates[-1] == 0.15
    trainer.position = 1
    trainer.record()  # within an epoch nothing is checked
    assert trainer.rows[-1].lr == 0.15


def test_measuring_has_its_own_order(digits):
    """The batches that curvature is measured on are independent of those that are trained on."""
    seen = []

    def loss_fn(model, batch):
        seen.append((is_own(), batch[1].tolist()))
        return cross_entropy(model, batch)

    task = dataclasses.replace(SMALL, loss_fn=loss_fn)
    trainer = Trainer(task, config_of(task, "newton-summary"), digits)
    trainer.step()
    trained = [classes for own, classes in seen if own]
    measured = [classes for own, classes in seen if not own]
    assert len(trained) == 1
    assert measured
    assert all(len(classes) == 100 and classes != trained[0] for classes in measured)


# Divergence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e4, 1e38])
def test_a_run_that_diverges_ends_cleanly(lr, digits, tmp_path):
    config = config_of(SMALL, "sgd", lr=lr)
    run = train(SMALL, config, digits, tmp_path / "run")
    assert run.diverged
    assert len(run.rows) == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["diverged"] is True
    assert "NaN" not in "".join(lines)
    assert "Infinity" not in "".join(lines)
    again = train(SMALL, config, digits, tmp_path / "run")
    assert again.rows == run.rows
    assert (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() == lines


# Stopping and going on ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[name for name in OPTIMIZERS if name != "kfac"])
def whole(request, digits, tmp_path_factory):
    """A run of each optimizer that nothing stopped, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train(SMALL, config_of(SMALL, request.param), digits, folder), folder


@pytest.mark.parametrize("at", [0, 21, 31, 47])
def test_an_interrupted_run_goes_on_bit_for_bit(whole, at, digits, tmp_path):
    whole, whole_folder = whole
    config, folder = whole.config, tmp_path / "stopped"
    with pytest.raises(Interrupted):
        train(interrupting(SMALL, at), config, digits, folder)
    assert sum(map(int, files.load_checkpoint(folder)["place"][:2])) == (at + 1) // 16 + (at + 1) % 16
    resumed = train(SMALL, config, digits, folder)
    assert without_seconds(resumed.rows) == without_seconds(whole.rows)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (whole_folder, folder)]
    for ours, theirs in zip(*(map(json.loads, part) for part in lines), strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_every_environment_of_a_run_is_recorded_once(digits, tmp_path, monkeypatch):
    def environments():
        return json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["environments"]

    config = config_of(SMALL, "sgd")
    for number, at in enumerate((5, 5)):
        monkeypatch.setattr(training, "environment", lambda number=number: {"machine": number})
        with pytest.raises(Interrupted):
            train(interrupting(SMALL, at), config, digits, tmp_path)
    train(SMALL, config, digits, tmp_path)
    monkeypatch.setattr(training, "environment", lambda: {"machine": "of a reader"})
    train(SMALL, config, digits, tmp_path)
    assert environments() == [{"machine": 0}, {"machine": 1}]


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which processes in the background of a shell start without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_twice_interrupts_at_once_and_the_handler_is_given_back(digits, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def loss_fn(model, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    task = dataclasses.replace(SMALL, loss_fn=lambda m, b: loss_fn(m, b) if m.training else cross_entropy(m, b))
    with pytest.raises(KeyboardInterrupt) as caught:
        train(task, config_of(task, "sgd"), digits, tmp_path / "run")
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    train(SMALL, config_of(SMALL, "sgd"), digits, tmp_path / "run")


def test_training_works_outside_the_main_thread(digits):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(SMALL, config_of(SMALL, "sgd", epochs=1), digits)))
    thread.start()
    thread.join()
    assert len(runs[0].rows) == 2


def test_a_run_of_another_configuration_or_on_other_data_is_refused(digits, tmp_path):
    train(SMALL, config_of(SMALL, "sgd", epochs=1), digits, tmp_path)
    checkpoint = (tmp_path / files.CHECKPOINT).read_bytes()
    other = [
        (config_of(SMALL, "sgd", epochs=2), digits, "epochs 1, not 2"),
        (config_of(SMALL, "adam", epochs=1), digits, "optimizer 'sgd', not 'adam'"),
        (config_of(dataclasses.replace(SMALL, name="big"), "sgd", epochs=1), digits, "task 'small', not 'big'"),
        (config_of(SMALL, "sgd", epochs=1), dataclasses.replace(digits, digest="0"), "digest"),
    ]
    for config, data, message in other:
        with pytest.raises(UsageError, match=message):
            train(SMALL, config, data, tmp_path)
    assert (tmp_path / files.CHECKPOINT).read_bytes() == checkpoint


@pytest.mark.slow
def test_a_killed_run_is_never_broken(tmp_path):
    """SIGKILL at any moment leaves a run that goes on to the same end as one that was left alone."""
    command = [sys.executable, "-m", "newton_summary.cli", "train"]
    options = {"cwd": tmp_path, "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    fresh = ["digits", "--optimizer", "adam", "--epochs", "60", "--threads", "1"]
    subprocess.run([*command, *fresh, "--out", "whole"], check=True, **options)
    checkpoint = tmp_path / "killed" / files.CHECKPOINT
    process = subprocess.Popen([*command, *fresh, "--out", "killed"], **options)
    kills = 0
    for delay in (0.0, 0.1, 0.23):
        deadline = time.monotonic() + 60
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay)
        kills += process.poll() is None
        process.kill()
        process.wait()
        files.load_checkpoint(tmp_path / "killed")
        process = subprocess.Popen([*command, "--resume", "killed"], **options)
    assert process.wait(120) == 0
    assert kills
    ends = [torch.load(tmp_path / name / files.CHECKPOINT) for name in ("whole", "killed")]
    for name, tensor in ends[0]["model"].items():
        assert torch.equal(tensor, ends[1]["model"][name])
    assert len(ends[1]["rows"]) == 61


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_unwritable_folder_is_named(digits, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write .*file/run/checkpoint.pt.*--out"):
        train(SMALL, config_of(SMALL, "sgd", epochs=1), digits, tmp_path / "file" / "run")


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match="there is no run in"):
        files.load_checkpoint(tmp_path)
    (tmp_path / files.CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(UsageError, match="cannot be read"):
        files.load_checkpoint(tmp_path)
    torch.save({"weights": 1}, tmp_path / files.CHECKPOINT)
    with pytest.raises(UsageError, match="not a checkpoint"):
        files.load_checkpoint(tmp_path)


def test_fresh_folders_are_numbered(tmp_path):
    names = []
    for _ in range(3):
        folder = files.fresh_folder(tmp_path / "run")
        folder.mkdir()
        names.append(folder.name)
    assert names == ["run", "run-2", "run-3"]


# Tasks and optimizers -------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UsageError, match="'mnist': choose one of digits, mlp-mnist, lenet-cifar10, vgg-cifar10"):
        get_task("mnist")
    with pytest.raises(UsageError, match="'tiny': choose one of quick, hours, full"):
        get_task("digits", "tiny")
    with pytest.raises(UsageError, match="'lion': choose one of adam, sgd, kfac, newton-summary"):
        config_of(SMALL, "lion")
    with pytest.raises(UsageError, match="adam has no option 'damping'; it has none"):
        config_of(SMALL, "adam", options={"damping": 1.0})
    with pytest.raises(UsageError, match="kfac has no option 'momentum'; it has damping"):
        config_of(SMALL, "kfac", options={"momentum": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "above 0"),
        ({"lr": math.nan}, "above 0"),
        ({"epochs": 0}, "at least 1"),
        ({"seed": -1}, "least 0"),
        ({"seed": 2**63}, "less than 2"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        config_of(SMALL, "sgd", **options)


def test_rates_are_the_tasks_or_the_optimizers_own():
    assert default_rate(SMALL, "sgd") == 0.1
    assert default_rate(SMALL, "adam") == OPTIMIZERS["adam"].lr
    assert (
        default_rate(SMALL, "newton-summary") == NewtonSummary(SMALL.make_model(0), cross_entropy).param_groups[0]["lr"]
    )
    assert all(
        set(task.rates) <= set(OPTIMIZERS) - {"newton-summary", "newton-summary-constant"} for task in TASKS.values()
    )
    assert config_of(SMALL, "kfac").options == dict(OPTIMIZERS["kfac"].options)
    chosen = dataclasses.replace(SMALL, options={"kfac": {"damping": 3.0}})
    assert config_of(chosen, "kfac").options == {"damping": 3.0}
    assert config_of(chosen, "kfac", options={"damping": 1.0}).options == {"damping": 1.0}


def test_the_best_weights_are_those_of_the_lowest_validation_loss(digits, tmp_path):
    for lr in (1.0, 1.5, 2.0, 3.0):  # rounding decides which of them is worse in the end than on the way
        config = config_of(SMALL, "sgd", lr=lr, epochs=6)
        folder = tmp_path / str(lr)
        folder.mkdir()
        run = train(SMALL, config, digits, folder, watched=False)
        best = min(range(len(run.rows)), key=lambda i: run.rows[i].validation_loss)
        if 0 < best < 6:
            break
    assert 0 < best < 6  # else the test tells nothing
    expected = train(SMALL, dataclasses.replace(config, epochs=best), digits).model.state_dict()
    again = train(SMALL, config, digits, folder, watched=False)
    for found in (run.best, again.best):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((folder / "interactions.json").read_text())["snapshots"] == []
