"""Time, memory and speed of a device, for all benchmarks."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _Products(TorchDispatchMode):
    """Counts multiply-adds of matrix products, convolutions and attention as they run.

    ``FlopCounterMode`` does so with hooks on modules; a loss whose gradients have hooks is measured with a check more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out) / 2
        return out


def multiply_adds(function: Callable[[], object]) -> float:
    """The multiply-adds of products that a call executes."""
    with _Products() as counter:
        function()
    return counter.total


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
