"""Real processes that stay alive between tests: starting one costs seconds, asking it for something nothing."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import pickle
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = 120  # seconds; what takes longer hangs


class Ranks:
    """So many processes in one group, over gloo."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(self._count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._count, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of what is read
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function, *arguments, **options) -> list:
        """What ``function(*arguments)`` returns in every process, by rank.

        It must be importable by name.  Raises what it raised.

        Where a process is killed by a signal, all are started anew, and it is called once more: gloo's own thread has
        crashed within malloc in one suite of some forty, and neither valgrind nor AddressSanitizer find what is wrong.
        What the function itself is to blame for kills its process again.
        """
        message = pickle.dumps((function, arguments, options))
        try:
            results = self._ask(message)
        except Died as death:
            print(death, file=sys.stderr)
            self.close()
            self._start()
            results = self._ask(message)
        for rank, (worked, result) in enumerate(results):
            if not worked:
                raise AssertionError(f"rank {rank} failed\n{result}")
        return [result for _, result in results]

    def _ask(self, message: bytes) -> list:
        results = []
        with self._alive():
            for pipe in self.pipes:
                pipe.send_bytes(message)
        for rank, pipe in enumerate(self.pipes):
            with self._alive():
                if not pipe.poll(PATIENCE):
                    self.close()
                    raise AssertionError(f"rank {rank} gives no answer after {PATIENCE} s")
                results.append(pickle.loads(pipe.recv_bytes()))
        return results

    @contextlib.contextmanager
    def _alive(self):
        """A block that talks to the processes, and tells what those that died last did."""
        try:
            yield
        except (EOFError, OSError) as error:
            for process in self.processes:
                process.join(1)
            last = [path.read_text() for path in sorted(Path(self.folder.name).glob("last words *"))]
            codes = [process.exitcode for process in self.processes]
            raise Died("\n".join([f"a rank has died; exit codes {codes}", *last])) from error

    def close(self) -> None:
        """Ends the processes, those that do not listen too."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()
            process.join()
        self.folder.cleanup()


class Died(Exception):
    """A process is gone."""


def _serve(rank: int, count: int, folder: str, pipe) -> None:
    torch.set_num_threads(1)
    last_words = (Path(folder) / f"last words {rank}").open("w")
    faulthandler.enable(last_words)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=count, timeout=datetime.timedelta(seconds=PATIENCE / 2)
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
