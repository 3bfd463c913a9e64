"""The example under ``torchrun``: what happens when a process is killed, and how the run goes on."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import PATIENCE, Ranks
from test_distributed import here, loss_fn, make_data, make_model

import newton_summary as ns

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "ddp.py"
EPOCHS = 4  # of 20 steps


def launch(*arguments, alone: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs a script in two processes, or alone; raises if it hangs."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *([] if alone else torchrun), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)


def parameters(checkpoint: Path) -> list[torch.Tensor]:
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["epoch"] == EPOCHS
    return list(saved["model"].values())


OPTIONS = ["--epochs", EPOCHS, "--timeout", 40, "--checkpoint"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The checkpoint of a run that nothing happened to."""
    checkpoint = tmp_path_factory.mktemp("whole") / "run.pt"
    done = launch(EXAMPLE, *OPTIONS, checkpoint)
    assert done.returncode == 0, done.stderr
    return checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_which_then_resumes_to_the_same_result(tmp_path, victim, whole) -> None:
    stopped = tmp_path / "stopped.pt"
    killed = launch(HERE / "killed.py", victim, 47, EXAMPLE, *OPTIONS, stopped)
    assert killed.returncode != 0
    assert re.search(rf"rank\s+: {victim} \(local_rank: {victim}\)\s+exitcode\s+: -9", killed.stderr)
    assert "SIGKILL" in killed.stderr
    assert torch.load(stopped, weights_only=True)["epoch"] == 2

    resumed = launch(EXAMPLE, *OPTIONS, stopped)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 3:" in resumed.stdout
    assert "epoch 2:" not in resumed.stdout
    for p, q in zip(parameters(whole), parameters(stopped), strict=True):
        assert torch.equal(p, q)


def measure_for_ever() -> None:
    optimizer = ns.NewtonSummary(make_model(), loss_fn)
    loss_fn(optimizer._samples.loss.model, make_data(20)).backward()
    while True:
        optimizer.measure(make_data(20))


@pytest.mark.slow
def test_without_torchrun_the_others_stop_with_an_error() -> None:
    ranks = Ranks(2)
    try:
        ranks.run(here)
        for pipe in ranks.pipes:
            pipe.send_bytes(pickle.dumps((measure_for_ever, (), {})))
        assert not ranks.pipes[0].poll(2), "it stopped by itself"
        ranks.processes[1].kill()
        assert ranks.pipes[0].poll(PATIENCE), "it hangs"
        worked, report = pickle.loads(ranks.pipes[0].recv_bytes())
    finally:
        ranks.close()
    assert not worked
    assert "process 0 of 2 could not average a measurement: another one is gone" in report


@pytest.mark.slow
def test_the_example_runs_alone_and_goes_on_with_what_two_began(tmp_path) -> None:
    checkpoint = tmp_path / "run.pt"
    assert launch(EXAMPLE, "--epochs", 2, "--checkpoint", checkpoint).returncode == 0
    alone = launch(EXAMPLE, "--epochs", EPOCHS, "--checkpoint", checkpoint, alone=True)
    assert alone.returncode == 0, alone.stderr
    losses = [float(loss) for loss in re.findall(r"epoch \d+: the loss is (\S+)", alone.stdout)]
    assert len(losses) == EPOCHS - 2
    assert losses[-1] < 0.3
    assert len(parameters(checkpoint)) == 6
