"""The command line, as a user meets it: what it writes, what it says, and how it ends."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
import torch

import newton_summary
from newton_summary import Summary, cli
from newton_summary.measure.stream import BatchStream
from newton_summary_experiments import tasks
from newton_summary_experiments.data import MNIST
from newton_summary_experiments.models import mlp
from newton_summary_experiments.tasks import Task, cross_entropy

TINY = Task("tiny", lambda: mlp([64, 12, 10]), epochs=2)


@pytest.fixture(autouse=True)
def workplace(tmp_path, tmp_path_factory, monkeypatch):
    """An empty folder to work in, a tiny task, and no data files; caches, matplotlib's too, are elsewhere."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "tiny", TINY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("NEWTON_SUMMARY_DATA", raising=False)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Runs a command line: its exit code, output and errors."""

    def call(line):
        try:
            code = cli.main(line.split())
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def interrupt_after(monkeypatch, count):
    """Presses Ctrl-C in the training step with this number."""
    calls = [0]

    def loss_fn(model, batch):
        measures = torch.utils._python_dispatch._get_current_dispatch_mode_stack()  # measuring watches the operations
        trained = torch.is_grad_enabled() and not measures
        calls[0] += trained
        if trained and calls[0] == count:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(model, batch)

    monkeypatch.setitem(tasks.TASKS, "tiny", dataclasses.replace(TINY, loss_fn=loss_fn))


def test_the_entry_point_is_this_function():
    (script,) = entry_points(group="console_scripts", name="newton-summary")
    assert script.load() is cli.main


@pytest.mark.parametrize("command", ["", "demo", "train", "compare", "interactions", "data"])
def test_help_is_there(command, run):
    code, out, _ = run(f"{command} --help")
    assert code == 0
    assert "Exit codes" in out
    assert "130" in out


def test_the_version_is_told(run):
    assert run("--version")[:2] == (0, f"newton-summary {version('newton-summary')}\n")
    assert newton_summary.__version__ == version("newton-summary")
    with pytest.raises(AttributeError, match="no attribute 'versoin'"):
        _ = newton_summary.versoin


def test_letters_that_the_output_lacks_end_nothing():
    told = subprocess.run(
        [sys.executable, "-m", "newton_summary.cli", "interactions", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert b"over the training set" in told.stdout


def test_nobody_reading_the_output_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "newton_summary.cli", "data", "digits"]
    told = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert told.returncode == cli.UNREAD
    assert not told.stderr


def test_an_output_that_is_closed_is_no_error(monkeypatch, workplace):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["data", "digits"]) == 0


# train ----------------------------------------------------------------------------------------------------------------


def test_train_writes_a_run_and_says_where(run, workplace):
    code, out, err = run("train tiny --threads 1")
    assert code == 0
    assert files_under(workplace / "runs" / "tiny-newton-summary-seed0") == [
        "checkpoint.pt",
        "curves.png",
        "interactions.json",
        "metrics.jsonl",
        "rates.png",
    ]
    assert "runs/tiny-newton-summary-seed0/rates.png" in out
    assert "32/32" in err
    run("train tiny --threads 1")
    assert (workplace / "runs" / "tiny-newton-summary-seed0-2" / "metrics.jsonl").exists()


def test_train_takes_its_options(run, workplace):
    code, _, _ = run("train tiny --optimizer sgd --lr 0.05 --epochs 1 --seed 3 --out here --threads 1")
    assert code == 0
    header = json.loads((workplace / "here" / "metrics.jsonl").read_text().splitlines()[0])
    given = {"task": "tiny", "optimizer": "sgd", "lr": 0.05, "epochs": 1, "seed": 3}
    assert header["config"] == {**given, "options": {}, "budget": "full", "ntk": False}
    assert header["environments"][0]["threads"] == 1
    code, _, _ = run("train tiny --optimizer kfac --set damping=0.5 --budget quick --ntk --epochs 1 --out there")
    assert code == 2  # K-FAC does not know layers with a scale
    code, _, _ = run("train tiny --optimizer kfac --set damping=0.5 --budget quick --epochs 1 --out there")
    assert code == 0
    header = json.loads((workplace / "there" / "metrics.jsonl").read_text().splitlines()[0])
    assert header["config"]["options"] == {"damping": 0.5}
    assert header["config"]["budget"] == "quick"
    assert run("train tiny --optimizer sgd --ntk --epochs 1 --out scaled")[0] == 0
    header = json.loads((workplace / "scaled" / "metrics.jsonl").read_text().splitlines()[0])
    assert header["config"]["ntk"] is True
    assert run("train --resume scaled")[0] == 0
    assert run("interactions tiny --run scaled --out seen")[0] == 0


def test_train_goes_on_after_ctrl_c(run, workplace, monkeypatch):
    run("train tiny --optimizer adam --threads 1 --out whole")
    interrupt_after(monkeypatch, 20)
    code, _, err = run("train tiny --optimizer adam --threads 1 --out stopped")
    assert code == 130
    assert "newton-summary train --resume stopped" in err
    monkeypatch.setitem(tasks.TASKS, "tiny", TINY)
    torch.set_num_threads(2)
    code, _, _ = run("train --resume stopped")
    assert code == 0
    assert torch.get_num_threads() == 1  # as the run was started
    whole, stopped = (torch.load(workplace / name / "checkpoint.pt")["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_diverged_run_has_an_exit_code_of_its_own(run):
    code, out, err = run("train tiny --optimizer sgd --lr 1e30 --threads 1")
    assert code == 1
    assert "diverged at step" in err
    assert "wrote" in out


def test_failed_measurements_are_reported(run, monkeypatch):
    def spoiled(stream, *given):
        images, classes = read(stream, *given)
        return (images, classes) if stream.position == 1 else (images * torch.nan, classes)

    read = BatchStream.next
    monkeypatch.setattr(BatchStream, "next", spoiled)
    code, out, _ = run("train tiny --optimizer newton-summary-paper --lr 0.01 --threads 1")
    assert code == 0
    assert "newton-summary-paper, seed 0: 3 of 4 measurements failed; the rates stayed as they were" in out


MISTAKES = {
    "train mnist": "unknown task 'mnist': choose one of digits, mlp-mnist, lenet-cifar10",
    "train": "name a task: digits",
    "train tiny --optimizer lion": "unknown optimizer 'lion': choose one of adam, sgd, kfac, newton-summary",
    "train tiny --lr 0": "learning rate must be above 0",
    "train tiny --optimizer kfac --set damping=-1": "damping must be a number that is not negative, got -1.0",
    "train tiny --optimizer kfac --set damping=0": "damping must be above 0",
    "train tiny --optimizer newton-summary-paper --set regularization=nan": "regularization must be a number",
    "train tiny --epochs 0": "epochs must be at least 1",
    "train tiny --threads 0": "must be a number, at least 1, got '0'",
    "train --resume nowhere": "there is no run in nowhere",
    "train mlp-mnist": "Looked for",
    "train tiny --out occupied": "occupied is not empty",
    "train tiny --out occupied/file/run": "cannot write occupied/file/run/checkpoint.pt",
    "train digits --resume run": "run was started with task tiny, not digits",
    "train --resume run --optimizer sgd": "run was started with optimizer adam, not sgd",
    "train --resume run --epochs 5": "run was started with epochs 1, not 5",
    "train --resume run --out other": "leave out --out",
    "train tiny --device nowhere": "device 'nowhere' cannot be used",
    "compare tiny --optimizers adam lion": "unknown optimizer 'lion'",
    "compare --resume run": "there is no comparison in run",
    "interactions": "TASK",
    "interactions nothing": "unknown task",
    "interactions mlp-mnist --run run": "holds a run of task 'tiny', not 'mlp-mnist'",
    "interactions digits --run run": "holds a run of task 'tiny', not 'digits'",
    "interactions tiny --run nowhere": "there is no run in nowhere",
    "data nothing": "unknown task",
    "data mlp-mnist --data nowhere": "nowhere/mnist.npz",
    "search mlp-mnist --optimizers lion": "'lion' is no optimizer of the paper's experiments here: choose from adam",
    "figures --again lion": "'lion' is no optimizer",
    "figures --again adam --draw-only": "leave out --draw-only",
    "fly": "invalid choice",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_explained_and_nothing_is_lost(line, run, workplace):
    (workplace / "occupied").mkdir()
    (workplace / "occupied" / "file").write_text("mine")
    if " run" in line:
        run("train tiny --optimizer adam --epochs 1 --out run --threads 1")
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    code, out, err = run(line)
    assert code == 2
    assert MISTAKES[line] in err
    assert not out
    assert {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()} == before


def test_a_missing_extra_is_named(run, monkeypatch):

    for name in list(sys.modules):
        if name.startswith(("newton_summary.plots", "newton_summary_experiments.figures")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("newton_summary.plots", raising=False)
    monkeypatch.delattr("newton_summary_experiments.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("train tiny")
    assert code == 2
    assert "pip install 'newton-summary[plots]'" in err


# compare --------------------------------------------------------------------------------------------------------------


def test_compare_ends_with_a_table_and_the_paths(run, workplace):
    code, out, _ = run("compare tiny --optimizers adam sgd newton-summary --seeds 0 1 --threads 1")
    assert code == 0
    folder = workplace / "runs" / "compare-tiny"
    written = files_under(folder)
    for name in ("curves.png", "interactions.png", "rates.png", "table.md", "comparison.json"):
        assert name in written
    for name in ("adam-seed0", "sgd-seed1", "newton-summary-seed1"):
        assert f"{name}/metrics.jsonl" in written
        assert f"runs/compare-tiny/{name}/metrics.jsonl" in out
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        "optimizer",
        "rate",
        "training loss",
        "validation accuracy",
        "seconds",
        "diverged",
    ]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["adam", "sgd", "newton-summary"]
    assert len({len(line) for line in table}) == 1
    assert (folder / "table.md").read_text().splitlines() == table
    rows = [json.loads(line) for line in (folder / "adam-seed0" / "metrics.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (folder / "adam-seed1" / "metrics.jsonl").read_text().splitlines()]
    losses = [rows[-1]["train_loss"], other[-1]["train_loss"]]
    assert f"{sum(losses) / 2:.2e} (worst {max(losses):.2e})" in table[2]


def test_compare_goes_on_where_it_was_interrupted(run, workplace, monkeypatch):
    interrupt_after(monkeypatch, 40)
    code, _, err = run("compare tiny --optimizers adam sgd --threads 1 --out both")
    assert code == 130
    assert "newton-summary compare --resume both" in err
    first = (workplace / "both" / "adam-seed0" / "checkpoint.pt").read_bytes()
    monkeypatch.setitem(tasks.TASKS, "tiny", TINY)
    code, _, err = run("compare --resume both --optimizers adam")
    assert code == 2
    assert "was started with optimizers ['adam', 'sgd']" in err
    code, out, _ = run("compare --resume both")
    assert code == 0
    run("compare tiny --optimizers adam sgd --threads 1 --out whole")
    for name in ("adam-seed0", "sgd-seed0"):
        ends = [torch.load(workplace / parent / name / "checkpoint.pt")["model"] for parent in ("both", "whole")]
        assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
    assert torch.load(workplace / "both" / "adam-seed0" / "checkpoint.pt")["place"] == _place(first, workplace)
    assert "rates.png" not in out


def _place(checkpoint, folder):
    (folder / "copy.pt").write_bytes(checkpoint)
    return torch.load(folder / "copy.pt")["place"]


def test_a_run_that_diverged_is_in_the_table(run, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "tiny", dataclasses.replace(TINY, rates={"sgd": 1e30}))
    code, out, _ = run("compare tiny --optimizers adam sgd --threads 1")
    assert code == 0
    adam, sgd = [line.split("|") for line in out.splitlines() if line.startswith("|")][2:]
    assert adam[6].strip() == "no"
    assert sgd[6].strip() == "1 of 1"


# interactions and data ------------------------------------------------------------------------------------------------


def test_interactions_look_where_they_will_write_before_they_measure(run, workplace, monkeypatch):
    (workplace / "file").write_text("")
    monkeypatch.setattr("newton_summary_experiments.figures.measure_interactions", None)
    code, _, err = run("interactions tiny --out file/inside")
    assert code == 2
    assert "cannot write to file/inside (Not a directory): choose another folder with --out" in err


def test_interactions_at_the_start_and_of_a_run(run, workplace):
    code, out, _ = run("interactions tiny --threads 1 --out start")
    assert code == 0
    assert "start/interactions.png" in out
    run("train tiny --optimizer adam --out run --threads 1")
    assert run("interactions tiny --run run --threads 1")[0] == 0
    first = Summary.load(workplace / "start" / "summary.pt")
    last = Summary.load(workplace / "runs" / "interactions-tiny" / "summary.pt")
    assert first.names == last.names == tuple(name for name, _ in TINY.make_model(0).named_parameters())
    assert last.loss < first.loss
    assert first.weight == 1600
    # The sum of all entries is the second derivative along the gradient of the whole training set.
    model, data = TINY.make_model(0).double(), TINY.read()
    batch = data.train[0].double(), data.train[1]
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(cross_entropy(model, batch), parameters, create_graph=True)
    along = [g.detach() for g in gradients]
    slope = sum((g * u).sum() for g, u in zip(gradients, along, strict=True))
    products = torch.autograd.grad(slope, parameters)
    curvature = sum((p * u).sum() for p, u in zip(products, along, strict=True))
    assert first.hessian.sum().item() == pytest.approx(curvature.item(), rel=1e-4)


def test_data_says_what_is_there(run, workplace, monkeypatch):
    code, out, _ = run("data digits")
    assert code == 0
    assert "scikit-learn" in out
    assert "1,600 to train on, 197 to validate" in out
    from test_data import arrays, fake_hub

    monkeypatch.setitem(__import__("sys").modules, "datasets", fake_hub(MNIST, arrays(MNIST)))
    code, out, _ = run("data mlp-mnist --fetch --data here")
    assert code == 0
    assert "wrote here/mnist.npz" in out
    assert "200 to train on, 30 to validate" in out
    (workplace / "here" / "mnist.npz").write_bytes(b"PK")
    code, _, err = run("data mlp-mnist --data here")
    assert code == 2
    assert "here/mnist.npz is truncated" in err


# demo -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_shows_interactions_rates_and_a_training(run, workplace):
    code, out, err = run("demo --threads 1")
    assert code == 0
    assert [line[:6] for line in out.splitlines() if " of 3: " in line] == ["1 of 3", "2 of 3", "3 of 3"]
    assert "Suggested learning rates" in out
    assert "| newton-summary |" in out
    folder = workplace / "runs" / "demo"
    assert {"layers.png", "interactions.png", "curves.png", "rates.png", "table.md"} <= {
        p.name for p in folder.iterdir()
    }
    assert "newton-summary, seed 0" in err


# Without the package beside it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["demo", "train digits", "compare --help", "interactions", "search", "figures", "data x"]
)
def test_a_command_of_the_experiments_says_what_to_install(command, run, monkeypatch):
    monkeypatch.setattr(cli, "entry_points", lambda group: ())
    code, _, err = run(command)
    assert code == 2
    assert "pip install 'newton-summary[experiments]'" in err
    assert run("report --help")[0] == 0
    code, _, err = run("trian digits")
    assert code == 2
    assert "invalid choice" in err
