"""Suggested rates for a trained body with a fresh head, against layer-wise decay: writes results/finetuning.md.

    python benchmarks/finetuning.py            two tasks, three seeds: about half an hour on one core

Two networks are trained, lose their heads, and learn something else: a residual network the other five classes of
CIFAR-10, a transformer other plays of Shakespeare.  AdamW trains them at the rates of ``suggest_rates``, which is told
the number of steps, for every tensor and for all together; and at every pair of a sweep: the head's rate, and the
factor by which the rate falls from each layer to the one before it, 1 being one rate for all.  Runs stay in
results/finetuning.jsonl, and what is there is not run again.  With ``--device cuda``: results/finetuning-cuda.*.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import jsonl
import torch
from acting import Small, next_character, take_steps
from clock import Clock, add_device, results_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from untuned import RESULTS, evaluate

import newton_summary as ns
from newton_summary_experiments import data
from newton_summary_experiments.suite import Block, Residual, seeded, text
from newton_summary_experiments.tasks import cross_entropy

SEEDS = (0, 1, 2)
HEAD_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DECAYS = (1.0, 0.95, 0.85, 0.75, 0.65)
BEFORE, STEPS, BATCH = 600, 300, 32
SUGGESTED = {"suggested": None, "suggested, one rate": "trivial"}  # and the partition
BEFORE_RATE = 3e-3  # of Adam, before the head is fresh

Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What a body is trained on, and what it is then fine-tuned on.

    Args:
        name: of the table.
        make: an untrained model; its children are its layers, from the input to the head.
        before: samples for the body.
        after: samples to fine-tune on.
        held: samples of the same kind, to validate on.
        loss_fn: the loss.
        classes: that the fresh head has.
    """

    name: str
    make: Callable[[], nn.Sequential]
    before: Samples
    after: Samples
    held: Samples
    loss_fn: ns.measure.LossFunction
    classes: int

    def on(self, device: torch.device) -> Task:
        """The same with its samples on a device."""
        parts = {name: getattr(self, name) for name in ("before", "after", "held")}
        return replace(self, **{name: tuple(t.to(device) for t in part) for name, part in parts.items()})


class Characters(nn.Module):
    """Characters and their places as vectors."""

    def __init__(self, width: int, length: int, characters: int = 65) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, width), nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.place.weight[: x.shape[1]]


def _residual() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    pooled = nn.Sequential(Residual(24, 48, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(stem, Residual(12, 12, 1), Residual(12, 24, 2), pooled, nn.Linear(48, 5))


def _transformer(width: int = 48, length: int = 32) -> nn.Sequential:
    blocks = [Block(width, 4) for _ in range(3)]
    return nn.Sequential(Characters(width, length), *blocks, nn.LayerNorm(width), nn.Linear(width, 65))


@cache
def tasks() -> tuple[Task, ...]:
    """Both."""
    (x, y), (x_held, y_held) = (data.read(data.CIFAR10).train, data.read(data.CIFAR10).validation)
    codes = text().train[0].flatten()
    plays = codes[: len(codes) // 32 * 32 - 32].view(-1, 32), codes[1 : len(codes) // 32 * 32 - 31].view(-1, 32)
    first, other, last = (
        tuple(t[part] for t in plays) for part in (slice(8000), slice(16000, 20000), slice(-1000, None))
    )
    return (
        Task(
            "residual network, five classes of CIFAR-10, then the other five",
            _residual,
            (x[y < 5], y[y < 5]),
            (x[y >= 5][:3000], y[y >= 5][:3000] - 5),
            (x_held[y_held >= 5], y_held[y_held >= 5] - 5),
            cross_entropy,
            5,
        ),
        Task("transformer, plays of Shakespeare, then others", _transformer, first, other, last, next_character, 65),
    )


def train(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples, seed: int, n: int) -> None:
    batches = Small(task.name, seeded(task.make), samples, task.loss_fn, BATCH).batches(seed)
    take_steps(task.loss_fn, model, optimizer, batches, n)


def pretrained(task: Task, seed: int) -> nn.Sequential:
    """A trained body with a fresh head."""
    device = task.before[0].device
    model = seeded(task.make)(seed).to(device)
    train(task, model, torch.optim.Adam(model.parameters(), BEFORE_RATE), task.before, seed, BEFORE)
    width = model[-1].in_features
    model[-1] = seeded(lambda: nn.Linear(width, task.classes))(seed + 100).to(device)
    return model


def decayed(model: nn.Sequential, rate: float, decay: float) -> list[dict[str, object]]:
    """A rate for each layer, from the head down."""
    layers = list(reversed([layer for layer in model if any(True for _ in layer.parameters())]))
    return [{"params": list(layer.parameters()), "lr": rate * decay**depth} for depth, layer in enumerate(layers)]


def runs_of(
    task: Task, seed: int, known: Callable[[str], bool], clock: Clock
) -> Iterator[tuple[str, dict[str, float]]]:
    """Whatever is not known yet, by name: one of those suggested, or the head's rate and the decay."""
    body = pretrained(task, seed)
    for name in (*SUGGESTED, *(f"{rate:g}, {decay:g}" for rate in HEAD_RATES for decay in DECAYS)):
        if known(name):
            continue
        model, start = copy.deepcopy(body), clock.now()
        if name in SUGGESTED:
            loader = DataLoader(TensorDataset(*task.after), BATCH, shuffle=True, drop_last=True)
            usual = torch.optim.AdamW(model.parameters(), 1e-3)
            options = {"steps": STEPS, "seed": seed, "partition": SUGGESTED[name]}
            groups = ns.suggest_rates(task.loss_fn, model, loader, usual, **options).param_groups
        else:
            groups = decayed(model, *map(float, name.split(", ")))
        found, start = clock.now() - start, clock.now()
        train(task, model, torch.optim.AdamW(groups), task.after, seed + 1, STEPS)
        trained = clock.now() - start
        losses = {"train": evaluate(task, model, task.after), "held": evaluate(task, model, task.held)}
        yield name, losses | {"share": found / trained}


def table(records: list[dict[str, object]]) -> str:
    lines = [
        "# Fine-tuning: suggested rates and layer-wise decay",
        "",
        f"A trained body with a fresh head, {STEPS} steps of AdamW in batches of {BATCH}. Losses are those at the end,",
        "over all that it was fine-tuned on and over what was held out, medians of seeds. “Best decay” and “one rate”",
        "are the best pair of head's rate and decay, and the best rate without a decay, of a sweep of "
        f"{len(HEAD_RATES)} × {len(DECAYS)}, each",
        "chosen by the loss of its own row. Suggested: for every tensor, and one rate for all of them; the loss, the",
        "ratio to that of the best decay, and the time that the suggestion took, as a share of the training's.",
        "Written by `python benchmarks/finetuning.py`.",
        "",
        "| task | loss | best decay | one rate | suggested for every tensor | suggested, one rate | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in tasks():
        of_task = [r for r in records if r["task"] == task.name]
        seeds = {r["seed"] for r in of_task}
        runs = {r["run"]: [q for q in of_task if q["run"] == r["run"]] for r in of_task}
        for which, shown in (("train", "training"), ("held", "held out")):
            medians = {name: median(r[which] for r in own) for name, own in runs.items()}
            ours = {name: medians.pop(name) for name in SUGGESTED}
            best = min(medians, key=lambda name: medians[name])
            uniform = min((name for name in medians if name.endswith(", 1")), key=lambda name: medians[name])
            cells = [f"{medians[best]:.3g} ({best.replace(', ', ' × ')})"]
            cells += [f"{medians[uniform]:.3g} ({uniform.removesuffix(', 1')})"]
            for name, loss in ours.items():
                share = median(r["share"] for r in runs[name])
                cells.append(f"{loss:.3g}, {loss / medians[best]:.2f}, {share:.0%}")
            lines.append(f"| {' | '.join([task.name, shown, *cells, str(len(seeds))])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    device = parser.parse_args().device
    clock = Clock(device, processor=True)
    torch.set_num_threads(1)
    torch.optim.Adam(nn.Linear(1, 1).parameters())  # the first optimizer of a process imports torch's compiler
    path = results_of(RESULTS / "finetuning.jsonl", device)
    runs = jsonl.read(path)
    for seed, task in tqdm([(seed, task) for seed in SEEDS for task in tasks()], desc="tasks"):
        done = {r["run"] for r in runs if (r["task"], r["seed"]) == (task.name, seed)}
        if len(done) == len(SUGGESTED) + len(HEAD_RATES) * len(DECAYS):
            continue
        for name, numbers in runs_of(task.on(clock.device), seed, done.__contains__, clock):
            jsonl.append(path, {"task": task.name, "seed": seed, "run": name, **numbers}, digits=4)
    text_of = table(jsonl.read(path))
    path.with_suffix(".md").write_text(text_of, encoding="utf-8")
    print(text_of)


if __name__ == "__main__":
    main()
