"""Rates suggested to two optimizers, Muon and AdamW, against a sweep of pairs: a section of results/suggestion.md.

    python benchmarks/suggestion.py --pair     what is missing is run (a quarter of an hour on one core)

A small character transformer: torch's Muon iterates in bfloat16, which is slow on processors without instructions for
it, so that matrices are narrow and trainings short.  What was run stays in results/suggestion-pair.jsonl.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import jsonl
import torch
from clock import Clock, results_of
from monitor import Network, characters
from torch import nn
from tqdm import tqdm

import newton_summary as ns

STORE = Path(__file__).parents[1] / "results" / "suggestion-pair.jsonl"
STEPS, LAST, EVERY = 300, 5, 10
MUON = tuple(0.02 * 2.0**k for k in range(-3, 4))
ADAMW = tuple(0.01 * 2.0**k for k in range(-3, 4))
STARTS = ((0.02 / 30, 0.01 * 30), (0.02 * 30, 0.01 / 30), (0.02 / 30, 0.01 / 30), (0.02 * 30, 0.01 * 30))
PAIRS = {"suggested": STARTS, "swept": tuple(itertools.product(MUON, ADAMW))}
SEEDS = (0, 1)


def network() -> Network:
    return characters(width=32, length=24, count=4000)


def optimizers(model: nn.Module, muon: float, adamw: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, head, biases and normalisations."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks")]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [torch.optim.Muon(matrices, lr=muon), torch.optim.AdamW(rest, lr=adamw)]


@torch.no_grad()
def loss_of(net: Network, model: nn.Module, most: int = 1000) -> float:
    x, y = net.samples
    return float(net.loss_fn(model, (x[:most], y[:most])))


def train(net: Network, model: nn.Module, members: Sequence[torch.optim.Optimizer], seed: int) -> float:
    """The loss over the first thousand samples, the median of the last five times it is looked at."""
    batches, losses = net.batches(seed), []
    for step in range(1, STEPS + 1):
        for member in members:
            member.zero_grad()
        net.loss_fn(model, next(batches)).backward()
        for member in members:
            member.step()
        if step > STEPS - LAST * EVERY and step % EVERY == 0:
            losses.append(loss_of(net, model))
    return median(losses)


def swept(net: Network, clock: Clock, muon: float, adamw: float, seed: int) -> dict[str, Any]:
    model = net.make(seed)
    start = clock.now()
    loss = train(net, model, optimizers(model, muon, adamw), seed)
    return {"loss": loss, "seconds": clock.now() - start}


def suggested(net: Network, clock: Clock, muon: float, adamw: float, seed: int) -> dict[str, Any]:
    """Rates suggested to a pair whose own are thirty times off, and the training with them."""
    model, generator = net.make(seed), torch.Generator().manual_seed(100 + seed)
    data = torch.utils.data.TensorDataset(*net.samples)
    loader = torch.utils.data.DataLoader(data, net.batch_size, shuffle=True, drop_last=True, generator=generator)
    start = clock.now()
    found = ns.suggest_rates(net.loss_fn, model, loader, optimizers(model, muon, adamw), steps=STEPS, seed=seed)
    spent = clock.now() - start
    first, second = found.by_optimizer
    loss = train(net, model, [torch.optim.Muon(first), torch.optim.AdamW(second)], seed)
    return {"loss": loss, "seconds": spent, "rates": [found.rates["Muon"], found.rates["AdamW"]]}


def run(clock: Clock) -> None:
    """What is missing in the store."""
    net, path = network().on(clock.device), results_of(STORE, clock.device.type)
    jobs = [(kind, muon, adamw, seed) for seed in SEEDS for kind, pairs in PAIRS.items() for muon, adamw in pairs]
    for kind, *rates, seed in tqdm(jobs, desc="pairs"):
        muon, adamw = (float(f"{rate:.4g}") for rate in rates)
        row = {"kind": kind, "seed": seed, "muon": muon, "adamw": adamw}
        if not any(row.items() <= known.items() for known in jsonl.read(path)):
            work = suggested if kind == "suggested" else swept
            jsonl.append(path, {**row, **work(net, clock, muon, adamw, seed)}, digits=4)


def section(clock: Clock) -> list[str]:
    """Of the page: nothing where nothing was run."""
    rows = jsonl.read(results_of(STORE, clock.device.type))
    seeds = sorted({row["seed"] for row in rows if row["kind"] == "suggested"})
    if not seeds:
        return []
    lines = [
        "",
        "## Two optimizers",
        "",
        "A character transformer of width 32, Muon for the matrices of its blocks and AdamW for the rest,",
        f"{STEPS} steps. A sweep of {len(MUON)} × {len(ADAMW)} pairs of rates, a factor of 2 apart, and",
        "`suggest_rates(…, [muon, adamw])` from rates 30 times off, each up or down. Loss: over the first thousand",
        "samples, the median of the last five times it is looked at, ten steps apart. Time: of the suggestion, as a",
        "share of the sweep's. Written by `python benchmarks/suggestion.py --pair`.",
        "",
        "| seed | best pair of the sweep | its loss | started from | suggested | its loss | ratio | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for seed in seeds:
        sweep = [row for row in rows if row["kind"] == "swept" and row["seed"] == seed]
        if len(sweep) < len(MUON) * len(ADAMW):
            continue
        best, total = min(sweep, key=lambda row: row["loss"]), sum(row["seconds"] for row in sweep)
        for row in (row for row in rows if row["kind"] == "suggested" and row["seed"] == seed):
            ratios.append(row["loss"] / best["loss"])
            cells = (
                str(seed),
                f"{best['muon']:.2g}, {best['adamw']:.2g}",
                f"{best['loss']:.4f}",
                f"{row['muon']:.2g}, {row['adamw']:.2g}",
                f"{row['rates'][0]:.2g}, {row['rates'][1]:.2g}",
                f"{row['loss']:.4f}",
                f"{ratios[-1]:.3f}",
                f"{row['seconds'] / total:.1%}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    if ratios:
        lines += ["", f"Ratio: {geometric_mean(ratios):.3f} in the mean, {max(ratios):.3f} at worst."]
    return lines
