"""What rehearsed advice is worth when it is acted on: the study "acting" of benchmarks/monitor.py.

Eight small networks, after 100 and 300 steps of Adam, in five settings: as tuned, one layer ten times too fast or too
slow, all ten times too fast or too slow.  In each, 200 more steps on other batches: at the rates as they are, at those
that ``Monitor.rehearse`` advises, and at every one of a grid.  Cases stay in results/monitor-acting.jsonl, and what is
there is not run again.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jsonl
import numpy as np
import torch
from clock import Clock, results_of
from torch import Tensor, nn
from torch.nn import functional

import newton_summary as ns
from newton_summary_experiments import data
from newton_summary_experiments.models import initialised, lenet, mlp
from newton_summary_experiments.suite import Block, Residual, seeded, text
from newton_summary_experiments.tasks import cross_entropy

CASES = Path(__file__).parents[1] / "results" / "monitor-acting.jsonl"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""That Adam is tuned over, for as many steps as a case has at most."""

MOMENTS, AFTER, OFF = (100, 300), 200, 10.0
SETTINGS = ("tuned", "layer too fast", "layer too slow", "all too fast", "all too slow")
GRID = (0.1, 0.3, 3.0, 10.0)
"""Factors of the oracle: on all rates, and on that of the layer that is off."""

WORSE, GAP = 1.05, 0.05
"""A case is lost where acting ends above this multiple; there is a gap where the oracle ends this share lower."""


# Networks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A network that takes milliseconds a step."""

    name: str
    make: Callable[[int], nn.Module]
    samples: tuple[Tensor, Tensor]
    loss_fn: ns.measure.LossFunction
    batch_size: int

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.samples[1]), generator=generator)
            for index in order.split(self.batch_size)[: len(order) // self.batch_size]:
                yield self.samples[0][index], self.samples[1][index]

    def on(self, device: torch.device) -> Small:
        """The same on a device."""
        x, y = self.samples
        return replace(self, make=lambda seed: self.make(seed).to(device), samples=(x.to(device), y.to(device)))

    @torch.no_grad()
    def full_loss(self, model: nn.Module, most: int = 1000, at_once: int = 250) -> float:
        """The mean loss of the first thousand samples, in the mode that the model is trained in."""
        x, y = (t[:most] for t in self.samples)
        parts = zip(x.split(at_once), y.split(at_once), strict=True)
        return float(
            np.average([float(self.loss_fn(model, b)) for b in parts], weights=[len(p) for p in x.split(at_once)])
        )


class Recurrent(nn.Module):
    """Next characters by an LSTM."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.token, self.layer = nn.Embedding(65, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 65)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.token(x))[0])


class Padded(nn.Module):
    """Next characters by torch's own transformer, of texts of many lengths."""

    PAD, IGNORED = 65, -100

    def __init__(self, width: int = 32, length: int = 24) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(66, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 65)

    def forward(self, x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        hidden = self.token(x) + self.position.weight[: x.shape[1]]
        return self.head(self.layers(hidden, mask=later, src_key_padding_mask=x == self.PAD))


class Patches(nn.Module):
    """A vision transformer on digits of 8 × 8 pixels, in sixteen patches."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch, self.position = nn.Linear(4, width), nn.Embedding(16, width)
        self.blocks, self.norm = nn.Sequential(Block(width, 4), Block(width, 4)), nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.head(self.norm(self.blocks(self.patch(patches) + self.position.weight)).mean(1))


def next_character(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=Padded.IGNORED)


def reconstruction(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[0].flatten(1)).square().mean()


def _characters(length: int, padded: bool = False, count: int = 4000) -> tuple[Tensor, Tensor]:
    codes = text().train[0].flatten()[: count * length + 1]
    x, y = codes[:-1].view(-1, length).clone(), codes[1:].view(-1, length).clone()
    if padded:
        lengths = torch.randint(length // 4, length + 1, (count, 1), generator=torch.Generator().manual_seed(0))
        beyond = torch.arange(length) >= lengths
        x[beyond], y[beyond] = Padded.PAD, Padded.IGNORED
    return x, y


def _convolutions() -> nn.Sequential:
    stem = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(
        *stem, Residual(8, 16, 2), Residual(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def _fine_tuned() -> Small:
    """An MLP that has learned the digits below 5, and gets a fresh head for the others."""
    x, y = data.digits().train
    old, new = (x[y < 5], y[y < 5]), (x[y >= 5], y[y >= 5] - 5)

    def make(seed: int) -> nn.Module:
        model = initialised(lambda: mlp([64, 96, 64, 32, 5]), seed)
        small = Small("pretraining", make, old, cross_entropy, 32)
        train(small, model, adam(model, dict.fromkeys(layers_of(model), 3e-3)), small.batches(seed), 200)
        head = list(model.children())[-1]
        torch.nn.init.normal_(head.weight, 0.0, 1 / math.sqrt(head.in_features))
        torch.nn.init.zeros_(head.bias)
        return model

    return Small(
        "MLP, fine-tuned with a fresh head", lambda seed: seeded(lambda: make(seed))(seed), new, cross_entropy, 16
    )


def networks() -> list[Small]:
    digits, (images, classes) = data.digits().train, data.read(data.CIFAR10).train
    cifar = images[:3000], classes[:3000]
    autoencoder = lambda: mlp([64, 48, 8, 48, 64])  # noqa: E731
    return [
        Small(
            "digits MLP", lambda seed: initialised(lambda: mlp([64, 128, 64, 32, 10]), seed), digits, cross_entropy, 50
        ),
        Small("LeNet, CIFAR-10", lambda seed: initialised(lenet, seed), cifar, cross_entropy, 10),
        Small("convolutions with batch norm, digits", seeded(_convolutions), digits, cross_entropy, 32),
        Small("LSTM, characters", seeded(Recurrent), _characters(24), next_character, 8),
        Small("transformer with padding, characters", seeded(Padded), _characters(24, padded=True), next_character, 8),
        Small("vision transformer, digits", seeded(Patches), digits, cross_entropy, 16),
        Small("autoencoder, digits", lambda seed: initialised(autoencoder, seed), digits, reconstruction, 32),
        _fine_tuned(),
    ]


# Training -------------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each module that has some of its own."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(p)
    return layers


def adam(model: nn.Module, rates: dict[str, float]) -> torch.optim.Adam:
    return torch.optim.Adam({"params": p, "lr": rates[name], "name": name} for name, p in layers_of(model).items())


def take_steps(
    loss_fn: ns.measure.LossFunction,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, next(batches)).backward()
        optimizer.step()


def train(
    network: Small,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
) -> float:
    """The loss over the samples after so many steps; infinite where it is not finite."""
    take_steps(network.loss_fn, model, optimizer, batches, steps)
    loss = network.full_loss(model)
    return loss if math.isfinite(loss) else math.inf


def tuned(network: Small) -> float:
    """The rate of a sweep at which Adam ends lowest."""

    def end(rate: float) -> float:
        model = network.make(0)
        optimizer = adam(model, dict.fromkeys(layers_of(model), rate))
        return train(network, model, optimizer, network.batches(1), max(MOMENTS) + AFTER)

    return min(RATES, key=end)


# Cases ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A moment of training with rates that may be off, and what came of acting on it.

    Args:
        network: its name.
        moment: the steps taken before.
        setting: what is off.
        layer: the layer that is off; in the other settings, one for the oracle to change.
        left: the loss after 200 steps more at the rates as they are.
        acted: at the advised rates.
        oracle: the lowest at any of the grid.
        best: the factors that it had.
        words: the advice.
        seconds: of processor time (on an accelerator, of the clock) for the rehearsal, and of the 200 steps.
    """

    network: str
    moment: int
    setting: str
    layer: str
    left: float
    acted: float
    oracle: float
    best: str
    words: str
    seconds: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.acted / self.left if math.isfinite(self.acted) else math.inf

    @property
    def has_gap(self) -> bool:
        return self.setting != "tuned" and self.oracle < (1 - GAP) * self.left

    @property
    def closed(self) -> float:
        """The share of the gap to the oracle that acting closes."""
        return (self.left - self.acted) / (self.left - self.oracle)


def run(network: Small, rate: float, moment: int, setting: str, clock: Clock) -> Case:
    number = MOMENTS.index(moment) * len(SETTINGS) + SETTINGS.index(setting)
    seed = 1000 * (number + 1)
    model = network.make(seed)
    layers = list(layers_of(model))
    layer = str(np.random.default_rng(seed).choice(layers))
    off = OFF if setting.endswith("fast") else 1 / OFF
    wrong = {"layer": [layer], "all": layers}.get(setting.split()[0], [])
    optimizer = adam(model, {name: rate * (off if name in wrong else 1.0) for name in layers})
    train(network, model, optimizer, network.batches(seed), moment)
    partition = ns.Partition({name: list(ps) for name, ps in layers_of(model).items()}, model)
    monitor = ns.Monitor(model, network.loss_fn, optimizer=optimizer, partition=partition)
    start = clock.now()
    advice = monitor.rehearse(_Batches(network, seed + 1))
    rehearsed = clock.now() - start

    def after(factors: dict[str, float]) -> float:
        twin = copy.deepcopy(model)
        other = adam(twin, dict.fromkeys(layers, rate))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in other.param_groups:
            group["lr"] *= factors.get(group["name"], 1.0)
        return train(network, twin, other, network.batches(seed + 2), AFTER)

    start = clock.now()
    left = after({})
    taken = clock.now() - start
    grid = {f"all × {f:g}": after(dict.fromkeys(layers, f)) for f in GRID}
    grid |= {f"{layer} × {f:g}": after({layer: f}) for f in GRID}
    grid["as they are"] = left
    acted = left if advice.leaves else after(advice.factors)
    best = min(grid, key=grid.__getitem__)
    return Case(network.name, moment, setting, layer, left, acted, grid[best], best, advice.words, (rehearsed, taken))


@dataclass(frozen=True)
class _Batches:
    """A pass over the samples, as often as one is asked for."""

    network: Small
    seed: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.network.batches(self.seed)
        return (next(batches) for _ in range(len(self.network.samples[1]) // self.network.batch_size))


def cases(clock: Clock) -> list[Case]:
    """All, of which those that are still missing are run."""
    path = results_of(CASES, clock.device.type)
    rows = jsonl.read(path)
    rates = {row["network"]: row["rate"] for row in rows if "rate" in row}
    done = {(c.network, c.moment, c.setting): c for c in (Case(**row) for row in rows if "rate" not in row)}
    for network in (small.on(clock.device) for small in networks()):
        if network.name not in rates:
            rates[network.name] = tuned(network)
            jsonl.append(path, {"network": network.name, "rate": rates[network.name]})
        for moment in MOMENTS:
            for setting in SETTINGS:
                if (network.name, moment, setting) not in done:
                    case = done[network.name, moment, setting] = run(
                        network, rates[network.name], moment, setting, clock
                    )
                    jsonl.append(path, asdict(case))
                    print(
                        f"{case.ratio:.3f} {case.left:.4g} → {case.acted:.4g}, oracle {case.oracle:.4g}",
                        case,
                        flush=True,
                    )
    return list(done.values())


# The page -------------------------------------------------------------------------------------------------------------


def study(clock: Clock) -> list[str]:
    """The section of results/monitor.md."""
    found = cases(clock)
    lost = [case for case in found if case.ratio > WORSE]
    gaps = [case for case in found if case.has_gap]
    names = list(dict.fromkeys(case.network for case in found))
    grid = ", ".join(f"{factor:g}" for factor in GRID)
    return [
        "## Acting on rehearsed advice",
        "",
        *_filled(
            f"`Monitor.rehearse` as it comes (trials of 40 steps), in {len(found)} cases: {len(names)} small networks, "
            f"after {MOMENTS[0]} and {MOMENTS[1]} steps of Adam with one rate a layer: as tuned (the best of a sweep "
            f"by half decades), a layer drawn at random {OFF:g} × too fast or too slow from the start, or all of them. "
            f"Then {AFTER} steps on other batches, and the loss over the first thousand samples: at the rates as they "
            f"are, at the advised ones, and at every one of a grid, all rates or the layer's × {grid}, whose lowest is "
            "the oracle. It is told which layer is off; the advice is not. One seed a case. The rule was chosen on the "
            "digits MLP, the fine-tuned one and the autoencoder, with results of an earlier rule seen on the one with "
            "batch norm and the LSTM; the two transformers and LeNet had no part in it."
        ),
        "",
        *_filled(
            f"Acting ends above {WORSE:g} × not acting in {len(lost)} of {len(found)} cases. Where something was off "
            f"and the oracle ends {GAP:.0%} lower, acting closes at least half of the gap in {_halved(gaps)} of "
            f"{len(gaps)} (median share: {_share(gaps)}; above 100 %, acting ends below the oracle)."
        ),
        "",
        "| setting | cases | left alone | acted / left, median | worst | oracle / left, median | gaps | halved |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(setting, own) for setting in SETTINGS if (own := [case for case in found if case.setting == setting])),
        "",
        "Cost: the rehearsal's processor time, in steps of training.",
        "",
        "| network | left alone | acted / left, median | worst | oracle / left, median | gaps | halved | steps |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, [case for case in found if case.network == name], cost=True) for name in names),
        "",
        *(["Where acting ended worse:", ""] if lost else []),
        *(_told(case) for case in sorted(lost, key=lambda case: -case.ratio)),
    ]


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, 118)


def _told(case: Case) -> str:
    where = f"{case.network}, after {case.moment}, {case.setting} (`{case.layer}`)"
    return f"- {where}: {case.ratio:.2f} × {case.left:.3g}. Told: {case.words}"


def _row(name: str, own: list[Case], cost: bool = False) -> str:
    gaps = [case for case in own if case.has_gap]
    first = [name] if cost else [name, str(len(own))]
    numbers = [
        str(sum(case.acted == case.left for case in own)),
        f"{np.median([case.ratio for case in own]):.2f}",
        f"{max(case.ratio for case in own):.2f}",
        f"{np.median([case.oracle / case.left for case in own]):.2f}",
        str(len(gaps)),
        str(_halved(gaps)),
    ]
    steps = [f"{AFTER * np.median([case.seconds[0] / case.seconds[1] for case in own]):.0f}"] if cost else []
    return f"| {' | '.join([*first, *numbers, *steps])} |"


def _halved(gaps: list[Case]) -> int:
    return sum(case.closed >= 0.5 for case in gaps)


def _share(gaps: list[Case]) -> str:
    return f"{np.median([case.closed for case in gaps]):.0%}" if gaps else "–"
