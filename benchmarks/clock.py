"""Time, memory and speed of a device, for all benchmarks."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

import torch


class Clock:
    """Seconds that work takes: by events on an accelerator, whose queue is emptied before and after; else by a timer.

    Args:
        device: where the work is done.
        processor: whether time of the processor is taken on a host, which other work on the machine changes little.
    """

    def __init__(self, device: str | torch.device = "cpu", processor: bool = False) -> None:
        self.device = torch.device(device)
        self._timer = time.process_time if processor else time.perf_counter

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self.device.type != "cuda":
            start = self._timer()
            function()
            return self._timer() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        first.record()
        function()
        last.record()
        torch.cuda.synchronize(self.device)
        return float(first.elapsed_time(last)) / 1e3

    def median(self, function: Callable[[], object], repeats: int = 5, warm_up: int = 1) -> float:
        """The median of several calls, after some that do not count."""
        for _ in range(warm_up):
            function()
        return statistics.median(self.once(function) for _ in range(repeats))

    def least(self, function: Callable[[], object], repeats: int = 3, warm_up: int = 1) -> float:
        """The quickest of several calls, after some that do not count."""
        for _ in range(warm_up):
            function()
        return min(self.once(function) for _ in range(repeats))

    def memory(self) -> float:
        """The most bytes that the device (on a host, this process) ever held."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return 1e3 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def peak(self, dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
        """Multiply-adds a second of one large matrix product, which is what can be had here."""
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return size**3 / self.least(lambda: a @ b)
