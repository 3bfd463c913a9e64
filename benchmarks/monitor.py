"""What the monitor's advice is worth: writes results/monitor.md (about an hour on one core).

Studies, each by itself with ``python benchmarks/monitor.py NAME``: ranking, coverage, cost, acting.  With ``--device
cuda``: results/monitor-cuda.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import Clock, add_device, results_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import newton_summary as ns
from newton_summary.watch.advice import advise, alone
from newton_summary_experiments import data
from newton_summary_experiments.models import initialised, lenet, mlp
from newton_summary_experiments.suite import Block
from newton_summary_experiments.tasks import cross_entropy

RESULTS = Path(__file__).parents[1] / "results" / "monitor.md"
CASES = 50
OFF = 30.0


# Networks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A model, its data and how long it is trained."""

    name: str
    make: Callable[[int], nn.Module]
    samples: tuple[torch.Tensor, torch.Tensor]
    loss_fn: ns.measure.LossFunction
    batch_size: int
    steps: int

    def loader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.samples), self.batch_size, shuffle=True, drop_last=True)

    def on(self, device: torch.device) -> Network:
        """The same on a device."""
        x, y = self.samples
        return replace(self, make=lambda seed: self.make(seed).to(device), samples=(x.to(device), y.to(device)))

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.samples[1]), generator=generator)
            for index in order.split(self.batch_size)[: len(order) // self.batch_size]:
                yield self.samples[0][index], self.samples[1][index]


class Characters(nn.Module):
    """A character transformer."""

    def __init__(self, characters: int, width: int, length: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 1 / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.token(x) + self.position.weight[: x.shape[1]]))).flatten(0, 1)


def next_character(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1].flatten())


def digits() -> Network:
    make = lambda seed: initialised(lambda: mlp([64, 128, 64, 32, 10]), seed)  # noqa: E731
    return Network("digits MLP", make, data.digits().train, cross_entropy, 100, 640)


def cifar() -> Network:
    images, classes = data.read(data.CIFAR10).train
    samples = images[:4000], classes[:4000]
    return Network("LeNet, 4,000 of CIFAR-10", lambda seed: initialised(lenet, seed), samples, cross_entropy, 100, 480)


def characters(width: int = 48, length: int = 32, count: int = 8000) -> Network:
    path = next(p for p in (folder / "tinyshakespeare.txt" for folder in data.folders()) if p.exists())
    text = path.read_text(encoding="utf-8")
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([index[c] for c in text[: count * length + 1]])

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Characters(len(index), width, length)

    samples = codes[:-1].view(-1, length), codes[1:].view(-1, length)
    return Network(f"character transformer, width {width}", make, samples, next_character, 32, 600)


# Studies --------------------------------------------------------------------------------------------------------------


def rank_one(
    network: Network, seed: int, uniform: float | None = None, steps: int = 50
) -> tuple[str, float, ns.Monitor]:
    """Training with one layer's rate 30 times too large or too small; the layer, the factor and the monitor.

    All other layers train at suggested rates, or at a uniform one.
    """
    draw = np.random.default_rng(seed)
    model = network.make(seed)
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()))
    wrong, factor = str(draw.choice(layers)), float(draw.choice([OFF, 1 / OFF]))
    if uniform is None:
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        rates = ns.suggest_rates(network.loss_fn, model, network.loader(), adam, seed=seed).rates
    else:
        rates = {name: uniform for name, _ in model.named_parameters()}
    optimizer = torch.optim.Adam(
        {"params": [p], "lr": rates[name] * (factor if name.startswith(wrong + ".") else 1.0)}
        for name, p in model.named_parameters()
    )
    monitor = ns.Monitor(
        model, network.loss_fn, optimizer=optimizer, partition=ns.Partition.by_module(model, depth=3), every=5
    ).attach(network.loader(), repeats=2, seed=seed)
    batches = network.batches(seed + 100)
    for _ in range(steps):
        optimizer.zero_grad()
        network.loss_fn(model, next(batches)).backward()
        optimizer.step()
    return wrong, factor, monitor


def ranking(clock: Clock) -> list[str]:
    lines = [
        "## Which layer is off?",
        "",
        f"{CASES} seeded cases: a layer drawn at random gets a learning rate {OFF:g} times too large or too small (a",
        "coin decides), Adam trains for 50 steps, and the monitor, attached with every=5 and two independent batches",
        "a measurement, ranks the layers at the end. The other layers have suggested rates; in the last row they have",
        "one uniform rate, 0.01, the best of a sweep, at which layers differ tenfold in what they need to begin with.",
        "",
        "| network | other layers | first, of all | too small | too large |",
        "|---|---|---|---|---|",
    ]
    for network, uniform in ((digits().on(clock.device), None), (digits().on(clock.device), 1e-2)):
        hits: dict[bool, list[bool]] = {True: [], False: []}
        for seed in range(CASES):
            wrong, factor, monitor = rank_one(network, seed, uniform)
            assert monitor.advice is not None
            hits[factor > 1].append(monitor.advice.ranked()[0].name == wrong)
        small, large = hits[False], hits[True]
        rest = "suggested" if uniform is None else f"uniform, {uniform:g}"
        lines.append(
            f"| {network.name} | {rest} | {sum(small) + sum(large)} of {CASES} | {sum(small)} of {len(small)} | "
            f"{sum(large)} of {len(large)} |"
        )
    return lines


REPEATS = (3, 5, 10)


def cover_one(network: Network, seed: int, size: int = 32) -> dict[int, tuple[list[bool], list[float]]]:
    """For 3, 5 and 10 batches: whether each group's interval covers the value of all samples; ratios of finite ends."""
    draw = np.random.default_rng(seed)
    model = network.make(seed)
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=1e-3), network.batches(seed + 100)
    for step in range(int(draw.integers(0, 200)) + 1):
        if step:
            optimizer.step()
        optimizer.zero_grad()
        network.loss_fn(model, next(batches)).backward()
    x, y = network.samples
    chosen = torch.from_numpy(draw.permutation(len(y))[: max(REPEATS) * size]).split(size)
    parts = [ns.summarize(network.loss_fn, model, [(x[i], y[i])], direction=optimizer) for i in chosen]
    whole = list(zip(x.split(400), y.split(400), strict=True))
    truth = alone(ns.summarize(network.loss_fn, model, whole, direction=optimizer)).tolist()
    result = {}
    for repeats in REPEATS:
        groups = advise(parts[:repeats]).groups
        covered = [g.low <= value <= g.high for g, value in zip(groups, truth, strict=True)]
        result[repeats] = covered, [g.high / g.low for g in groups if 0 < g.low < g.high < math.inf]
    return result


def coverage(clock: Clock) -> list[str]:
    lines = [
        "## Do the intervals hold?",
        "",
        f"{CASES} seeded cases: Adam at 1e-3 for up to 200 steps, then 90 % intervals for every tensor's factor from",
        "a few batches of 32 samples, against the value of all samples along the same step. Ratio: the interval's",
        "upper end over its lower, the median where both are positive and finite, as they are in so many cases.",
        "",
        "| network | batches | intervals | cover | ratio | finite |",
        "|---|---|---|---|---|---|",
    ]
    for network in (digits().on(clock.device), cifar().on(clock.device)):
        cases = [cover_one(network, seed) for seed in range(CASES)]
        for repeats in REPEATS:
            covered = [hit for case in cases for hit in case[repeats][0]]
            ratios = [ratio for case in cases for ratio in case[repeats][1]]
            lines.append(
                f"| {network.name} | {repeats} | {len(covered)} | {np.mean(covered):.1%} | {np.median(ratios):.1f} | "
                f"{len(ratios) / len(covered):.0%} |"
            )
    return lines


STEPS = 3000


def cost_of(network: Any, steps: int, clock: Clock) -> str:
    """A row of the table of costs: a training beside a monitor at its defaults."""
    network = network.on(clock.device)
    model = network.make(0)
    optimizer, batches = torch.optim.Adam(model.parameters(), lr=1e-3), network.batches(0)
    monitor = ns.Monitor(model, network.loss_fn, optimizer=optimizer)

    def step(watched: bool = True) -> None:
        batch = next(batches)
        optimizer.zero_grad()
        network.loss_fn(model, batch).backward()
        if watched:
            monitor.step(batch)
        optimizer.step()

    if clock.device.type == "cuda":
        step(watched=False)  # loads kernels, which is no part of a first measurement
    plain, measured = [], []
    for _ in range(steps):
        before = monitor.counts["measured"]
        taken = clock.once(step)
        (measured if monitor.counts["measured"] > before else plain).append(taken)
    usual = float(np.median(plain))
    first, *later = (taken / usual - 1 for taken in measured)
    record = monitor.records[-1]
    return (
        f"| {network.name} | {len(monitor.partition)} | {1e3 * usual:.1f} | {first:.0f} | "
        f"{f'{np.median(later):.0f}' if later else '–'} | {len(measured)} | {record.samples} of {record.available} | "
        f"{(first + sum(later)) / steps:.1%} |"
    )


def cost(clock: Clock) -> list[str]:
    from acting import networks  # beside this script

    timer = "one core, processor time" if clock.device.type == "cpu" else f"{clock.name}, time between events"
    return [
        "## What it costs",
        "",
        f"Adam for {STEPS:,} steps beside a monitor at its defaults, {timer}: the eight networks of the",
        f"last section and, for {STEPS // 3:,} steps, two with larger batches. A step is a forward and a backward",
        "pass and Adam's update, the median. First: the first measurement, which records the graph, in steps; later:",
        "the others, the median; each with its advice and the loss after the step. Samples: of a batch, at the end.",
        "Share: of all measurements, the first included, in the time of all steps.",
        "",
        "| network | S | step, ms | first, steps | later, steps | measured | samples | share |",
        "|---|---|---|---|---|---|---|---|",
        *(cost_of(network, STEPS, clock) for network in networks()),
        *(cost_of(network, STEPS // 3, clock) for network in (cifar(), characters(64, 64, 2000))),
    ]


def acting(clock: Clock) -> list[str]:
    from acting import study  # beside this script

    return study(clock)


STUDIES = {"ranking": ranking, "coverage": coverage, "cost": cost, "acting": acting}


def write(section: str, path: Path) -> None:
    """Puts a section into a page of results, in place of an older one of the same title."""
    path.parent.mkdir(exist_ok=True)
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = {part.split("\n")[0]: part.strip() for part in ("\n" + page).split("\n## ")[1:]}
    title = section.removeprefix("## ").split("\n")[0]
    sections[title] = section.removeprefix("## ")
    text = "# The monitor\n\nWritten by `python benchmarks/monitor.py`.\n\n"
    path.write_text(text + "\n\n".join(f"## {part}" for part in sections.values()) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="NAME", help="default: all")
    add_device(parser)
    given = parser.parse_args()
    if unknown := sorted(set(given.studies) - set(STUDIES)):
        parser.error(f"no study {unknown[0]!r}: choose from {', '.join(STUDIES)}")
    torch.set_num_threads(1)
    for name in given.studies or list(STUDIES):
        section = "\n".join(STUDIES[name](Clock(given.device, processor=True)))
        print(section, "\n", flush=True)
        write(section, results_of(RESULTS, given.device))


if __name__ == "__main__":
    main()
