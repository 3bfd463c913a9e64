"""Time, memory and speed of a device, for all benchmarks; and how a device is asked for on the command line.

The processor's time says nothing of an accelerator, which works while the processor waits, or runs ahead.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, flop_registry

from newton_summary.measure.price import Price

aten = torch.ops.aten


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    """Each of the two gradients takes what the convolution takes; torch's formula forgets groups for the weight's."""
    transposed, mask = rest[4], rest[7]
    return sum(mask[:2]) * int(conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed))


def _recurrent(x: Tensor, inner: Tensor, hidden: Tensor, *rest: Any, out_val: Any = None) -> int:
    """A layer of an LSTM by oneDNN: at each step, products with two matrices."""
    return 2 * int(x.shape[:-1].numel()) * int(inner.numel() + hidden.numel())


FORMULAS = flop_registry | {  # and what torch's table leaves out, or has wrongly
    aten.convolution_backward: _convolution_backward,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: lambda *args, **kwargs: 2 * _recurrent(*args, **kwargs),
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


def multiply_adds(function: Callable[[], object]) -> float:
    """The multiply-adds of matrix products, convolutions and attention that a call executes.

    ``FlopCounterMode`` counts with hooks on modules; a loss whose gradients have hooks is measured with a check more.
    """
    with Price(FORMULAS) as price:
        function()
    return price.operations / 2


def add_device(parser: argparse.ArgumentParser) -> None:
    """Gives a script the option ``--device``."""
    parser.add_argument("--device", type=_device, default="cpu", metavar="cpu|cuda", help="where the work is done")


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name!r} is neither cpu nor cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device here")
    return name


def results_of(path: Path, device: str) -> Path:
    """Where figures of a device are kept: those of the host as they are named, others beside them."""
    return path if device == "cpu" else path.with_stem(f"{path.stem}-{device}")


class Clock:
    """Seconds that work takes: by events on an accelerator, whose queue is emptied before and after; else by a timer.

    Args:
        device: where the work is done; its peak of memory is counted from here on.
        processor: whether time of the processor is taken on a host, which other work on the machine changes little.
    """

    def __init__(self, device: str | torch.device = "cpu", processor: bool = False) -> None:
        self.device = torch.device(device)
        self._timer = time.process_time if processor and self.device.type == "cpu" else time.perf_counter
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> float:
        """Seconds since some moment, for what is not one call: on an accelerator, once its queue is empty."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._timer()

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

    @property
    def name(self) -> str:
        """Of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def memory(self) -> float:
        """The most bytes that the device held since the clock was made; on a host, this process since it began."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        return 1e3 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def peak(self, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
        """Multiply-adds a second of one large matrix product, which is what can be had here."""
        size = size or (2048 if self.device.type == "cpu" else 8192)
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return size**3 / self.least(lambda: a @ b)


class Peak:
    """The most memory held within a block, above what was held before anything was measured, in MB."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.start = self._now()

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what earlier measurements have freed
        self.largest, self.done = 0.0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.largest = torch.cuda.max_memory_allocated(self.device) / 1e6 - self.start
            return
        self.largest = max(self.largest, self._now() - self.start)  # a busy machine may never have let it look
        self.done = True
        self.thread.join()

    def _watch(self) -> None:
        while not self.done:
            self.largest = max(self.largest, self._now() - self.start)
            time.sleep(0.001)

    def _now(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / 1e6
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
