"""Real processes that stay alive between tests: starting one costs seconds, asking it for something nothing."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds; what takes longer hangs


class Ranks:
    """So many processes in one group, over gloo."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(count):
            mine, theirs = context.Pipe()
            where = str(Path(self.folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, count, where, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function, *arguments, **options) -> list:
        """What ``function(*arguments)`` returns in every process, by rank.

        It must be importable by name.  Raises what it raised.
        """
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments, options)))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.close()
                raise AssertionError(f"rank {rank} gives no answer after {PATIENCE} s")
            results.append(pickle.loads(pipe.recv_bytes()))
        for rank, (worked, result) in enumerate(results):
            if not worked:
                raise AssertionError(f"rank {rank} failed\n{result}")
        return [result for _, result in results]

    def close(self) -> None:
        """Ends the processes, those that do not listen too."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, count: int, where: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{where}", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=PATIENCE / 2)
    )
    while True:
        try:
            function, arguments, options = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(*arguments, **options)
        except BaseException:  # what pytest raises is no Exception
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
