"""The processes that tests run in: what kills one is told, and started anew once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Died, Ranks


def total() -> float:
    number = torch.ones(1)
    dist.all_reduce(number)
    return float(number)


def dies(marker: str, again: bool) -> float:
    """A sum over the processes; the second one is killed, the first time or each time."""
    if dist.get_rank() == 1 and (again or not Path(marker).exists()):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return total()


@pytest.mark.slow
def test_a_process_that_dies_once_is_started_anew_and_one_that_dies_each_time_is_told(tmp_path, capfd) -> None:
    ranks = Ranks(2)
    try:
        assert ranks.run(total) == [2.0, 2.0]
        assert ranks.run(dies, str(tmp_path / "once"), False) == [2.0, 2.0]
        told = capfd.readouterr().err
        assert "exit codes [None, -11]" in told
        assert "in dies" in told
        with pytest.raises(Died, match="exit codes"):
            ranks.run(dies, str(tmp_path / "twice"), True)
    finally:
        ranks.close()
