"""What a measurement costs, in units of one forward and backward pass of the same loss.

Run ``python benchmarks/engines.py [MODEL …]``.  It prints a table and writes results/engines.json.  Every model is
measured in a process of its own, with two threads; times are medians of five (on a busy machine, ``--cpu`` takes
processor time with one thread).  "counted" are the multiply-adds of
matrix products and convolutions that were executed, and so the floor where these dominate.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import newton_summary as ns
from newton_summary.experiments.models import lenet, mlp
from newton_summary.measure import ForwardEngine, Loss, NestedEngine

LIMITS = {"bigmlp": 15.0, "vgg": 8.0, "lenet": 6.0, "mlp": 5.0, "gpt": 25.0, "resnet": 20.0}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def images(n):
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def vgg():
    layers, channels = [], 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ELU()] if width else [nn.MaxPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary=65, width=128, heads=4, layers=4, context=64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks, self.norm = nn.Sequential(*(Block(width, heads) for _ in range(layers))), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.blocks(self.tokens(x) + self.places.weight)) @ self.tokens.weight.T


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.skip = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else nn.Identity()

    def forward(self, x):
        return (self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())) + self.skip(x)).relu()


def resnet():
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]]] = {
    "bigmlp": lambda: (mlp([3072, *[1024] * 20, 10], nn.ELU), images(100)),
    "vgg": lambda: (vgg(), images(16)),
    "lenet": lambda: (lenet(), images(100)),
    "mlp": lambda: (mlp([784, 1024, 200, 100, 10]), (torch.randn(100, 784), torch.randint(10, (100,)))),
    "gpt": lambda: (GPT(), (torch.randint(65, (16, 64)), torch.randint(65, (16, 64)))),
    "resnet": lambda: (resnet(), images(32)),
}


def chain(depth: int):
    return mlp([1024] * depth + [10], nn.ELU), (torch.randn(100, 1024), torch.randint(10, (100,)))


MODELS |= {f"depth{depth}": lambda depth=depth: chain(depth) for depth in (5, 10, 20, 40)}


CLOCK = time.perf_counter


def median(function: Callable[[], object], repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = CLOCK()
        function()
        times.append(CLOCK() - start)
    return statistics.median(times)


class Peak:
    """The largest resident memory within a block, above what was resident before anything was measured, in MB."""

    def __init__(self) -> None:
        self.start = self._now()

    def __enter__(self) -> Peak:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what earlier measurements have freed
        self.largest, self.done = 0.0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.thread.join()

    def _watch(self) -> None:
        while not self.done:
            self.largest = max(self.largest, self._now() - self.start)
            time.sleep(0.001)

    @staticmethod
    def _now() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6


def measure_one(name: str, part: str, cpu: bool) -> dict[str, float]:
    """Times, counts or memory of one model; ``part`` is ``forward``, ``nested`` or ``full``."""
    global CLOCK
    CLOCK = time.process_time if cpu else time.perf_counter
    torch.manual_seed(0)
    torch.set_num_threads(1 if cpu else 2)
    model, batch = MODELS[name]()
    partition, loss = ns.Partition.canonical(model), Loss(cross_entropy, model)

    def gradient() -> None:
        model.zero_grad()
        cross_entropy(model, batch).backward()

    unit = median(gradient)
    u = [p.grad.clone() for p in model.parameters()]
    engine = NestedEngine() if part == "nested" else ForwardEngine()
    tiny, few = mlp([4, 4, 3]), (torch.randn(5, 4), torch.randint(3, (5,)))  # loads all code before memory counts
    engine.measure(Loss(cross_entropy, tiny), few, ns.Partition.canonical(tiny), list(tiny.parameters()), 3, "diagonal")
    peak = Peak()

    def run(order: int = 3, third: str = "diagonal") -> None:
        engine.measure(loss, batch, partition, u, order, third)

    result: dict[str, float] = {"groups": len(partition)}
    if part == "nested":
        with peak:
            run()
        return result | {"third": median(run, 1) / unit, "memory": peak.largest}
    run()
    if part == "full":
        times = [median(lambda: run(3, "full"), 2), median(run), median(lambda: run(2))]
        return result | {
            "full": times[0] / unit,
            "full/diagonal": times[0] / times[1],
            "full/hessian": times[0] / times[2],
        }
    with peak:
        run()
    third, unit2 = median(run), median(gradient)
    hessian = median(lambda: run(2))
    unit = (unit + unit2) / 2
    counts = [_count(gradient), _count(run), _count(lambda: run(2))]
    return result | {
        "gradient ms": unit * 1e3,
        "third": third / unit,
        "hessian": hessian / unit,
        "counted third": counts[1] / counts[0],
        "counted hessian": counts[2] / counts[0],
        "memory": peak.largest,
    }


def _count(function: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(LIMITS))
    parser.add_argument("--full", action="store_true", help="all of the third order, too")
    parser.add_argument("--without-nested", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="processor time with one thread, for a busy machine")
    parser.add_argument("--part", choices=["forward", "nested", "full"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measure_one(arguments.models[0], arguments.part, arguments.cpu)))
        return
    table = {}
    print("in gradients    S   all three (at most, counted)   up to H̄ (counted)   nested   speed-up   MB   nested MB")
    for name in arguments.models:
        parts = ["forward", *["nested"] * (not arguments.without_nested), *["full"] * arguments.full]
        rows = {part: _in_a_process(name, part, arguments.cpu) for part in parts}
        table[name] = rows
        own, nested = rows["forward"], rows.get("nested", {})
        line = f"{name:14} {own['groups']:3}   "
        line += f"{own['third']:6.1f} ({LIMITS.get(name, 0):4.0f}, {own['counted third']:4.1f})"
        line += f"             {own['hessian']:5.1f} ({own['counted hessian']:4.1f})"
        if nested:
            line += f"      {nested['third']:6.1f}  {nested['third'] / own['third']:6.1f}"
        print(line + f"    {own['memory']:5.0f}  {nested.get('memory', 0):5.0f}", flush=True)
        if "full" in rows:
            print(f"{'':17} full: {rows['full']}")
    path = Path(__file__).parent.parent / "results" / "engines.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"torch": torch.__version__, "threads": 1 if arguments.cpu else 2, "models": table}, indent=1) + "\n"
    )


def _in_a_process(name: str, part: str, cpu: bool) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, name, "--part", part, *["--cpu"] * cpu], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
