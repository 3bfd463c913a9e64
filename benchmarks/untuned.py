"""NewtonSummary with nothing tuned, against optimizers whose learning rate was searched, on small problems.

    python benchmarks/untuned.py baselines     searches the baselines' rates (hours; resumable; committed)
    python benchmarks/untuned.py judge         runs ours, times a step of everyone, writes results/untuned/
    python benchmarks/untuned.py judge --quick     one seed of five cheap problems
    python benchmarks/untuned.py robust        batch sizes, periods of comparisons, initial weights (hours; resumable)

The nine problems are those on which the defaults were chosen; ``--suite held-out`` takes eleven others, which the
first edition of the default had not seen, and results/held-out/.  ``--problems`` and ``--forms`` choose.  A run is a
Record; what was run stays in *.jsonl there.  ``--device cuda`` trains ours and times everyone on an accelerator, and
keeps that in a folder cuda/ there; rivals' losses are those of the host, which has the same ones but for rounding.
Needs ``pip install 'newton-summary-experiments[benchmarks]'``.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING

import jsonl
import torch
from clock import Clock, add_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import newton_summary as ns
from newton_summary.optim.rates import AveragedRates
from newton_summary.solve import Status
from newton_summary_experiments.data import InMemory, as_it_is, shuffled
from newton_summary_experiments.held_out import HELD_OUT
from newton_summary_experiments.search import half_decade
from newton_summary_experiments.suite import PROBLEMS, Problem, Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parents[1] / "results"
SEEDS = (0, 1, 2)
POINTS = 8
CURVE_SAMPLES = 2000
ROUNDING = torch.finfo(torch.float32).eps  # of a loss

Maker = Callable[[nn.Module, float, int], torch.optim.Optimizer]  # from a model, a rate and the number of steps


# Suites ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """Problems that are judged together.

    Args:
        name: what the command line and the folder of its results call it.
        title: of its table.
        problems: by name.
        quick: which of them are cheap.
    """

    name: str
    title: str
    problems: dict[str, Problem]
    quick: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where its results are."""
        return RESULTS / self.name


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "untuned",
            "Nothing tuned, against tuned",
            PROBLEMS,
            quick=("digits", "mlp", "lenet", "logistic", "autoencoder"),
        ),
        Suite(
            "held-out",
            "Nothing tuned, against tuned, on eleven more problems",
            HELD_OUT,
            quick=("hinge", "factors", "friedman1", "friedman2", "cancer"),
        ),
    )
}


# Runs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One run: its loss over (a part of) the training set along the way, and at its end over the whole."""

    problem: str
    optimizer: str
    rate: float
    seed: int
    steps: list[int]
    curve: list[float]
    train: float
    validation: float
    initial: float
    marked: list[float] | None = None  # the training losses at earlier steps, where some were asked for
    measured: int = 0  # how often NewtonSummary measured
    compared: int = 0  # how often it compared

    @property
    def loss(self) -> float:
        """The final training loss; infinite where it is no number."""
        return self.train if math.isfinite(self.train) else math.inf


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module, samples: tuple[Tensor, Tensor], accuracy: bool = False) -> float:
    """The mean loss, or the accuracy, in eval mode."""
    training = model.training
    model.eval()
    total = 0.0
    for x, y in zip(samples[0].split(500), samples[1].split(500), strict=True):
        value = (model(x).argmax(-1) == y).float().mean() if accuracy else problem.loss_fn(model, (x, y))
        total += float(value) * len(y)
    model.train(training)
    return total / len(samples[1])


def on_device(problem: Problem, device: str) -> Problem:
    """The same problem with its model and samples on a device."""
    if device == "cpu":
        return problem

    @cache
    def read() -> Samples:
        found = problem.read()
        return Samples(*(tuple(t.to(device) for t in part) for part in (found.train, found.validation)))

    return replace(problem, build=lambda seed: problem.build(seed).to(device), read=read)


def endless(problem: Problem, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from shuffled(problem.read().train, batch_size, seed, epoch)
        epoch += 1


def _mode(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Schedule-free optimizers have two points, and switch between them."""
    if callable(getattr(optimizer, name, None)):
        getattr(optimizer, name)()


def run(
    problem: Problem,
    name: str,
    make: Maker,
    rate: float,
    seed: int,
    steps: int | None = None,
    scale: float = 1.0,
    batch_size: int | None = None,
    marks: Sequence[int] = (),
) -> Record:
    """Trains a problem once."""
    torch.manual_seed(seed)
    steps = problem.steps if steps is None else steps
    samples = problem.read()
    part = tuple(t[:CURVE_SAMPLES] for t in samples.train)
    model = problem.make_model(seed, scale)
    optimizer = make(model, rate, steps)
    schedule = getattr(optimizer, "schedule", None)
    batches = endless(problem, seed, batch_size or problem.batch_size)
    stops = sorted({round(steps * (i + 1) / POINTS) for i in range(POINTS)})
    initial, curve = evaluate(problem, model, part), []
    marked: dict[int, float] = {}
    _mode(optimizer, "train")
    for number in range(1, steps + 1):
        optimizer.zero_grad()
        problem.loss_fn(model, next(batches)).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if number in marks:
            _mode(optimizer, "eval")
            marked[number] = evaluate(problem, model, samples.train)
            _mode(optimizer, "train")
        if number in stops:
            _mode(optimizer, "eval")
            curve.append(evaluate(problem, model, part))
            if number < steps:
                _mode(optimizer, "train")
            if not math.isfinite(curve[-1]):
                break
    validation = evaluate(problem, model, samples.validation, problem.score == "accuracy")
    train = evaluate(problem, model, samples.train) if math.isfinite(curve[-1]) else math.inf
    counts = optimizer.counts if isinstance(optimizer, ns.NewtonSummary) else {"measured": 0, "compared": 0}
    at_marks = [marked.get(mark, math.inf) for mark in marks] if marks else None
    found = (stops[: len(curve)], curve, train, validation, initial, at_marks, counts["measured"], counts["compared"])
    return Record(problem.name, name, rate, seed, *found)


# Optimizers -----------------------------------------------------------------------------------------------------------


def cosine(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    optimizer.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return optimizer


def nadam(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
    """The direction of the default at a constant rate: so large a decay gives Nesterov's momentum its full size."""
    return torch.optim.NAdam(model.parameters(), rate, betas=(0.9, 0.99), momentum_decay=1e3)


def prodigy(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(model.parameters(), lr=rate)


def schedule_free(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(model.parameters(), lr=rate)


def d_adapt(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(model.parameters(), lr=rate)


def soap(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=rate, weight_decay=0.0)


TUNED: dict[str, Maker] = {
    "adam": lambda model, rate, steps: torch.optim.Adam(model.parameters(), rate),
    "adamw-cosine": cosine,
    "sgd": lambda model, rate, steps: torch.optim.SGD(model.parameters(), rate, momentum=0.9),
    "nadam": nadam,
}
THREE = ("adam", "adamw-cosine", "sgd")
BEST = "best of the first three"
AROUND = {"adam": -5, "adamw-cosine": -5, "sgd": -3, "nadam": -5}  # on the grid of half decades: 3e-3, 3e-3, 3e-2, 3e-3
UNTUNED: dict[str, tuple[Maker, float]] = {
    "prodigy": (prodigy, 1.0),
    "schedule-free": (schedule_free, 0.0025),
    "d-adapt": (d_adapt, 1.0),
    "soap": (soap, 0.003),
}
USUAL, USUAL_RATE = "adam, 1e-3", 1e-3  # Adam as it comes: runs of its own on the grid of the search
RIVALS = (*TUNED, USUAL, *UNTUNED)


# Baselines ------------------------------------------------------------------------------------------------------------


class Store:
    """Records in a file, one a line, so that what was run is never run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = [Record(**row) for row in jsonl.read(path)]

    def find(self, problem: str, optimizer: str, rate: float | None = None) -> list[Record]:
        found = (r for r in self.records if (r.problem, r.optimizer) == (problem, optimizer))
        return [r for r in found if rate is None or r.rate == rate]

    def get(self, problem: Problem, name: str, make: Maker, rate: float, seed: int, **options: object) -> Record:
        for record in self.find(problem.name, name, rate):
            if record.seed == seed:
                return record
        record = run(problem, name, make, rate, seed, **options)
        self.records.append(record)
        jsonl.append(self.path, asdict(record), digits=5)
        return record

    def rates(self, problem: str, optimizer: str, seeds: int) -> dict[float, float]:
        """The median loss of each rate that was run with at least so many seeds."""
        found = {r.rate: [s.loss for s in self.find(problem, optimizer, r.rate)] for r in self.find(problem, optimizer)}
        return {rate: median(losses) for rate, losses in sorted(found.items()) if len(losses) >= seeds}

    def best(self, problem: str, optimizer: str) -> list[Record]:
        """The records of the best rate."""
        medians = self.rates(problem, optimizer, len(SEEDS))
        return self.find(problem, optimizer, min(medians, key=lambda rate: medians[rate]))


def search(store: Store, problem: Problem, name: str) -> None:
    """One seed over ever more rates until the best has worse ones on both sides; then all seeds for those three."""
    make, around = TUNED[name], AROUND[name]
    for seeds in ((SEEDS[0],), SEEDS):
        tried: dict[int, float] = {}
        while True:
            best = min(tried, key=lambda number: (tried[number], number)) if tried else around  # all infinite: go down
            missing = [number for number in (best, best - 1, best + 1) if number not in tried]
            if not missing:
                around = best
                break
            for number in missing:
                runs = [store.get(problem, name, make, half_decade(number), seed) for seed in seeds]
                tried[number] = median(r.loss for r in runs)


def baselines(store: Store, problems: Sequence[Problem]) -> None:
    for problem in tqdm(problems, desc="problems"):
        for name in TUNED:
            search(store, problem, name)
        for name, (make, rate) in {"adam": (TUNED["adam"], USUAL_RATE), **UNTUNED}.items():
            for seed in SEEDS:
                store.get(problem, name, make, rate, seed)


# Ours -----------------------------------------------------------------------------------------------------------------


class DiagonalRates(AveragedRates):
    """The default rule without interactions: only the diagonal of H̄ is looked at."""

    def update(self, summary: ns.Summary) -> Status:
        return super().update(replace(summary, hessian=torch.diag(summary.hessian.diagonal())))


def ours(problem: Problem, seed: int, form: str = "default", batch_size: int | None = None, **further: object) -> Maker:
    """NewtonSummary as it comes, or another form of it."""

    def make(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
        train = InMemory(problem.read().train)
        loader = DataLoader(train, batch_size or problem.batch_size, shuffle=True, drop_last=True, collate_fn=as_it_is)
        known = {"steps": steps} if form in SCHEDULED else {}
        options = {"curvature_data": loader, "seed": seed, **FORMS[form], **known, **further}
        optimizer = ns.NewtonSummary(model, problem.loss_fn, **options)
        if form == "diagonal":
            rule = optimizer.rule
            optimizer.rule = DiagonalRates(rule.regularization, rule.shrinkage, rule.target, rule.average.momentum)
        return optimizer

    return make


FORMS: dict[str, dict[str, object]] = {
    "default": {},
    "steps": {},
    "along nadam": {"direction": "nadam"},
    "each tensor": {"partition": "canonical"},
    "diagonal": {"partition": "canonical"},
    "no third order": {"partition": "canonical", "regularization": 0.0},
    "invariant": {"partition": "canonical", "target": "invariant"},
}
SCHEDULED = ("steps",)  # what knows the length of the run


# Time -----------------------------------------------------------------------------------------------------------------


FUSED = "adam, fused"  # torch's other implementation of Adam, which takes the same steps
BLOCK = 20  # steps that are timed together
ROUNDS, PATIENCE = (3, 30), 15  # turns of each, and the seconds that they should fill: small steps need many


def fused_adam(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), rate, fused=True)


def step_times(problem: Problem, clock: Clock) -> dict[str, float]:
    """Seconds of a step of every optimizer, its batch included: medians of blocks of steps, which take turns.

    The first block of a run is that of an optimizer that was just made: it has all that a first step has to do, and
    comparisons are more frequent in it.  Both kinds count by their share of the problem's steps.  It is processor time:
    what else the machine does is no part of it.  On an accelerator it is the clock's, and a turn of all, in which
    kernels are loaded, goes before.
    """
    untuned = {name: make for name, (make, _) in UNTUNED.items()}
    makers = {**TUNED, **untuned, FUSED: fused_adam, "ours": ours(problem, 0)}
    first: dict[str, list[float]] = {name: [] for name in makers}
    later: dict[str, list[float]] = {name: [] for name in makers}
    rounds = ROUNDS[0]
    for turn in tqdm(range(ROUNDS[1]), desc=f"{problem.name}: times", leave=False):
        if turn == rounds:
            break
        began = time.perf_counter()
        for name, make in makers.items():
            model, batches = problem.make_model(0), endless(problem, 0, problem.batch_size)
            start = clock.now()
            optimizer = make(model, 1e-4, problem.steps)
            _mode(optimizer, "train")
            for seconds in (first[name], later[name]):
                for batch in islice(batches, BLOCK):
                    optimizer.zero_grad()
                    problem.loss_fn(model, batch).backward()
                    optimizer.step()
                seconds.append((clock.now() - start) / BLOCK)
                start = clock.now()
        if turn == 0:
            rounds = min(max(round(PATIENCE / (time.perf_counter() - began)), ROUNDS[0]), ROUNDS[1])
            if clock.device.type == "cuda":
                for seconds in (*first.values(), *later.values()):
                    seconds.clear()
    share = BLOCK / problem.steps
    return {name: share * median(first[name]) + (1 - share) * median(later[name]) for name in makers}


def overheads_of(problem: Problem, folder: Path, clock: Clock) -> dict[str, float]:
    """The processor time of our run, against everyone's of as many steps; kept for a judge that is resumed."""
    path = folder / "overheads.json"
    known: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if problem.name not in known:
        seconds = step_times(problem, clock)
        known[problem.name] = {name: round(seconds["ours"] / seconds[name], 3) for name in (*TUNED, FUSED, *UNTUNED)}
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known[problem.name]


# The judge ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One problem: everyone's final training loss and score, medians over seeds, and the price of our steps."""

    problem: str
    score: str
    overheads: dict[str, float]  # of our run's processor time, against everyone's of as many steps
    loss: dict[str, float]  # ours at the processor time of Adam's run
    at_time_of: dict[str, dict[str, float]]  # the loss of each form of ours, at the processor time of each rival's run
    equal_epochs: dict[str, float]
    scores: dict[str, float]
    rates: dict[str, float]
    reached: dict[str, float | None]  # processor time to the tuned Adam's final loss, in its runs; None: not reached
    seeds: dict[str, int]  # of the medians
    stopped: dict[str, float]  # everyone's loss at the processor time of Adam's run, at the latest


def judge(
    problem: Problem, baseline: Store, own: Store, forms: Sequence[str], seeds: Sequence[int], clock: Clock
) -> Verdict:
    """Runs ours and compares."""
    overheads = overheads_of(problem, own.path.parent, clock)
    price = {**overheads, USUAL: overheads["adam"]}
    mark_of = {name: min(round(problem.steps / price[name]), problem.steps) for name in RIVALS}
    marks = sorted(set(mark_of.values()))
    loss, at_time_of, epochs, scores, rates, runs = {}, {}, {}, {}, {}, {}
    for name in RIVALS:
        if name in TUNED:
            records = baseline.best(problem.name, name)
        elif name == USUAL:
            records = baseline.find(problem.name, "adam", USUAL_RATE)
        else:
            records = baseline.find(problem.name, name)
        rates[name], runs[name] = records[0].rate, records
        loss[name] = epochs[name] = median(r.loss for r in records)
        scores[name] = median(r.validation for r in records)
    for form in forms:
        options = {"steps": mark_of["adam"]} if form in SCHEDULED else {"marks": marks}
        records = [own.get(problem, form, ours(problem, seed, form), 0.0, seed, **options) for seed in seeds]
        epochs[form] = median(r.loss for r in records)
        at_mark = dict.fromkeys(marks, epochs[form])
        if form not in SCHEDULED:
            at_mark = {m: median(r.marked[i] for r in records) for i, m in enumerate(marks)}
        at_time_of[form] = {name: at_mark[mark] for name, mark in mark_of.items()}
        loss[form] = at_time_of[form]["adam"]
        scores[form] = median(r.validation for r in records)
        runs[form] = records
    target = median(r.curve[-1] for r in runs["adam"])
    cost = {name: 1.0 if name in forms else 1 / price[name] for name in runs}  # of a step, in ours
    reached = {name: time_to(target, found, cost[name] * price["adam"]) for name, found in runs.items()}
    seeds_of = {name: len(found) for name, found in runs.items()}
    stopped = {name: at_time(1.0, runs[name], cost[name] * price["adam"]) for name in RIVALS}
    stopped |= {form: loss[form] for form in forms}
    return Verdict(
        problem.name, problem.score, overheads, loss, at_time_of, epochs, scores, rates, reached, seeds_of, stopped
    )


def time_to(target: float, records: Sequence[Record], cost: float) -> float | None:
    """When the median curve of some runs is at a loss, as a share of a run whose steps cost 1; None if it is never."""
    curves = [[*r.curve, *[math.inf] * (POINTS - len(r.curve))] for r in records]
    reached = (i for i in range(POINTS) if median(curve[i] for curve in curves) <= target)
    return next((cost * (i + 1) / POINTS for i in reached), None)


def at_time(time: float, records: Sequence[Record], cost: float) -> float:
    """The median loss of some runs at a time, as a share of a run whose steps cost 1; between points, logarithmically.

    A run that is over by then counts as it ended.
    """
    if cost <= time:
        return median(r.loss for r in records)
    place = POINTS * time / cost  # in points of the curve, the first of which is after an eighth of the run
    before, share = int(place), place - int(place)
    losses = []
    for record in records:
        if not math.isfinite(record.loss):
            losses.append(math.inf)
            continue
        curve = [record.initial, *record.curve]
        low, high = (_floored(curve[i]) for i in (before, before + 1))
        whole = _floored(record.loss) / _floored(record.curve[-1])  # the curve is over a part of the training set
        losses.append(low ** (1 - share) * high**share * whole)
    return median(losses)


def ratio(verdict: Verdict, form: str, rivals: Sequence[str], of_time: bool) -> float:
    """Our loss against that of the best of some rivals, after its own processor time or after as many epochs."""
    rival = min(rivals, key=lambda name: verdict.loss[name])
    own = verdict.at_time_of[form][rival] if of_time else verdict.equal_epochs[form]
    return _floored(own) / _floored(verdict.loss[rival])


def _floored(loss: float) -> float:
    """Below the rounding of float32 a loss is as good as the next."""
    return max(loss, ROUNDING)


def clipped(ratios: Sequence[float]) -> float:
    """The geometric mean of ratios, each no further from 1 than a factor of 3."""
    return geometric_mean(min(max(ratio, 1 / 3), 3.0) for ratio in ratios)


# Divergence -----------------------------------------------------------------------------------------------------------

BATCHES, SCALES = (1 / 3, 1.0, 5.0), (0.3, 1.0, 3.0)  # of batches in units of the problem's own, of initial weights


def failure(record: Record) -> str:
    """How a run failed, or an empty string: by the whole curve, whose points are an eighth of the run apart.

    Below the rounding of float32, which is where some runs get, a loss is as good as the next.
    """
    if len(record.curve) < POINTS or not math.isfinite(record.loss):
        return "not finite"
    if record.curve[-1] > record.initial / 2:
        return "above half the initial loss"
    best = _floored(min(record.curve))
    return "above 3 × its best" if record.curve[-1] > 3 * best else ""


@dataclass(frozen=True)
class Setting:
    """A problem with a batch size and a scale of its initial weights."""

    problem: Problem
    batch: int
    scale: float

    @property
    def names(self) -> tuple[str, str]:
        """What is run at it: ours and the tuned Adam."""
        return f"ours, {self.batch}, × {self.scale:g}", f"adam, {self.batch}, × {self.scale:g}"


def settings(problems: Sequence[Problem], batches: Sequence[float] = BATCHES) -> list[Setting]:
    """Problem by problem, small batches first."""
    return [Setting(p, round(b * p.batch_size), s) for p in problems for b in batches for s in SCALES]


def robust(problems: Sequence[Problem], baseline: Store, own: Store) -> None:
    """Runs the grid, all problems on small batches first, and the tuned Adam at the settings where a run has failed."""
    grid = [(s, seed) for batch in BATCHES for seed in SEEDS for s in settings(problems, [batch])]
    for setting, seed in tqdm(grid, desc="settings"):
        problem = setting.problem
        options = {"scale": setting.scale, "batch_size": setting.batch}
        name, adam = setting.names
        run = own.get(problem, name, ours(problem, seed, batch_size=setting.batch), 0.0, seed, **options)
        if failure(run):
            rate = baseline.best(problem.name, "adam")[0].rate
            for other in SEEDS:
                own.get(problem, adam, TUNED["adam"], rate, other, **options)


def robust_table(own: Store, problems: Sequence[Problem]) -> str:
    """What failed, of all that was run."""
    lines = [
        "# Runs that must not diverge",
        "",
        "How many runs failed, of one for each seed. Failed: a loss that is not finite, or ends above half the initial",
        "one, or above three times the run's best (over eight points along the run; what is below the rounding of",
        "float32, 1.2e-7, counts as that). Beside ours the tuned Adam at the same batch and initial weights, where",
        "a run of ours has failed. Batches are a third, one and five times the problem's own. Written by",
        "`python benchmarks/untuned.py robust`, which goes on where it was stopped; “–” was not run.",
        "",
        "| problem | batch | weights × | ours | Adam |",
        "|---|---|---|---|---|",
    ]
    runs = failed = alone = 0
    for setting in settings(problems):
        kinds, adam = ([failure(r) for r in own.find(setting.problem.name, name)] for name in setting.names)
        if not kinds:
            continue
        runs, failed = runs + len(kinds), failed + sum(map(bool, kinds))
        alone += 0 if any(adam) else sum(map(bool, kinds))
        cells = f"{_failures(kinds)} | {_failures(adam)}"
        lines.append(f"| {setting.problem.name} | {setting.batch} | {setting.scale:g} | {cells} |")
    total = f"Of {runs} runs of ours {failed} failed, {alone} of them where no run of the tuned Adam does."
    return "\n".join([*lines, "", total]) + "\n"


def _failures(kinds: Sequence[str]) -> str:
    """How many runs failed, and how, of those that there are."""
    counts = {kind: kinds.count(kind) for kind in kinds if kind}
    return ", ".join(f"{n} of {len(kinds)} {kind}" for kind, n in counts.items()) or (
        f"0 of {len(kinds)}" if kinds else "–"
    )


# Tables and pictures --------------------------------------------------------------------------------------------------


def table(verdicts: Sequence[Verdict], forms: Sequence[str], suite: Suite) -> str:
    names = [*RIVALS, *forms]
    lines = [
        f"# {suite.title}",
        "",
        "Final training loss over the whole training set in eval mode, medians of seeds. The rates of Adam, AdamW with",
        "a cosine schedule, SGD with momentum and NAdam (β = 0.9, 0.99: the direction of the default, at a constant",
        "rate) were searched for every problem over half decades (in brackets); Adam at 1e-3, Prodigy, Schedule-Free",
        "AdamW, D-Adapt Adam and SOAP run at their default rates. Ours (from “default” on) has nothing set, and stops",
        "at the processor time of Adam's run: after 1/overhead of the steps. “steps” knows the length of the run, as",
        "the cosine schedule does. Overheads are against torch's Adam as it comes, in brackets with `fused=True`.",
        f"Written by `python benchmarks/untuned.py judge --suite {suite.name}`.",
        "",
        "| problem | overhead | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 2),
    ]
    for v in verdicts:
        few = {n: f", {v.seeds[n]} of {len(SEEDS)} seeds" * (v.seeds[n] < len(SEEDS)) for n in names}
        cells = [f"{v.loss[n]:.3g}" + (f" ({v.rates[n]:g})" if n in TUNED else "") + few[n] for n in names]
        lines.append(f"| {v.problem} | {v.overheads['adam']:.2f} ({v.overheads[FUSED]:.2f}) | {' | '.join(cells)} |")
    for title in ("equal processor time", "equal epochs"):
        timed = title == "equal processor time"
        lines += ["", f"## Ratios of losses at {title}", ""]
        lines += [
            "Geometric means over the problems, each ratio clipped to [1/3, 3]; the worst problem in brackets. Losses",
            "below the rounding of float32, 1.2e-7, count as that.",
            *(
                ["The processor time is that of each rival's own run; ours never takes more steps than the rival."]
                * timed
            ),
            "",
        ]
        lines += ["| ours | " + " | ".join([*RIVALS, BEST]) + " |"]
        lines += ["|" + "---|" * (len(RIVALS) + 2)]
        for form in forms:
            cells = []
            for rivals in [[n] for n in RIVALS] + [THREE]:
                ratios = [ratio(v, form, rivals, timed) for v in verdicts]
                cells.append(f"{clipped(ratios):.2f} ({max(ratios):.2f})")
            lines.append(f"| {form} | {' | '.join(cells)} |")
    lines += ["", "## Ratios of losses where all stop at the processor time of Adam's run", ""]
    lines += ["A rival whose steps take longer has then taken fewer; one whose steps take less ends its run.", ""]
    lines += ["| ours | " + " | ".join(RIVALS) + " |", "|" + "---|" * (len(RIVALS) + 1)]
    for form in forms:
        ratios = {n: [_floored(v.stopped[form]) / _floored(v.stopped[n]) for v in verdicts] for n in RIVALS}
        lines.append(f"| {form} | {' | '.join(f'{clipped(r):.2f} ({max(r):.2f})' for r in ratios.values())} |")
    lines += ["", "## Validation", "", "Accuracy; of problems in italics the loss.", ""]
    lines += ["| problem | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for v in verdicts:
        name = v.problem if v.score == "accuracy" else f"*{v.problem}*"
        lines.append(f"| {name} | {' | '.join(f'{v.scores[n]:.4g}' for n in names)} |")
    lines += ["", "## Processor time to the tuned Adam's final loss", ""]
    lines += ["In runs of the tuned Adam; curves are looked at every eighth of a run. “–”: not reached.", ""]
    lines += ["| problem | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for v in verdicts:
        cells = ["–" if v.reached[n] is None else f"{v.reached[n]:.2f}" for n in names]
        lines.append(f"| {v.problem} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def profiles(verdicts: Sequence[Verdict], names: Sequence[str], path: Path) -> None:
    """Which share of the problems each optimizer solves to within a factor of the best: in loss, and in time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    of_loss, of_time = figure.subplots(1, 2)
    for name in names:
        style = {"color": "black", "linewidth": 2.5} if name in FORMS else {"linewidth": 1.2}
        style |= {"linestyle": "--" if name in SCHEDULED else "-", "where": "post", "label": name}
        best = [_floored(min(v.stopped[n] for n in names)) for v in verdicts]
        _curve(of_loss, [_floored(v.stopped[name]) / least for v, least in zip(verdicts, best, strict=True)], style)
        soonest = [min((t for n in names if (t := v.reached[n]) is not None), default=None) for v in verdicts]
        times = [(v.reached[name], of) for v, of in zip(verdicts, soonest, strict=True)]
        _curve(of_time, [t / of if t is not None and of is not None else math.inf for t, of in times], style)
    of_loss.set(ylabel="share of problems", xlabel="training loss at the processor time of Adam's run / the best one")
    of_time.set(xlabel="processor time to the tuned Adam's loss / the shortest one")
    for axes, ticks in ((of_loss, (1, 2, 5, 10, 30)), (of_time, (1, 2, 4, 8))):
        axes.set(xscale="log", xlim=(1, ticks[-1]), ylim=(0, 1.02))
        axes.set_xticks(ticks, labels=[f"{tick}×" for tick in ticks])
        axes.set_xticks([], minor=True)
    figure.legend(*of_loss.get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def _curve(axes: Axes, ratios: Sequence[float], style: dict[str, object]) -> None:
    """The share of the ratios up to each."""
    shares = [(i + 1) / len(ratios) for i in range(len(ratios))]
    axes.step([1, *sorted(ratios)], [0, *shares], **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["baselines", "judge", "robust"])
    parser.add_argument("--suite", choices=list(SUITES), default="untuned", help="where the problems are from")
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="of the suite; default: all")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--quick", action="store_true", help="one seed of five cheap problems")
    parser.add_argument("--resume", action="store_true", help="keep the runs of ours that are there")
    add_device(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suite = SUITES[arguments.suite]
    names = arguments.problems or list(suite.problems)
    if unknown := sorted(set(names) - set(suite.problems)):
        parser.error(f"{', '.join(unknown)}: not in the suite {suite.name}, which has {', '.join(suite.problems)}")
    baseline = Store(suite.folder / "baselines.jsonl")
    problems = [
        on_device(suite.problems[name], arguments.device)
        for name in names
        if not arguments.quick or name in suite.quick
    ]
    results = suite.folder if arguments.device == "cpu" else suite.folder / arguments.device
    results.mkdir(parents=True, exist_ok=True)
    if arguments.command == "baselines":
        baselines(baseline, problems)
        return
    if arguments.command == "robust":
        path = results / "robust.jsonl"
        robust(problems, baseline, Store(path))
        text = robust_table(Store(path), list(suite.problems.values()))  # with what others have run meanwhile
        print(text)
        (results / "robust.md").write_text(text, encoding="utf-8")
        return
    folder = Path(tempfile.mkdtemp()) if arguments.quick else results
    path = folder / "ours.jsonl"
    if not arguments.resume:
        path.unlink(missing_ok=True)
        (folder / "overheads.json").unlink(missing_ok=True)
    own, seeds = Store(path), SEEDS[:1] if arguments.quick else SEEDS
    clock = Clock(arguments.device, processor=True)
    verdicts = [judge(p, baseline, own, arguments.forms, seeds, clock) for p in tqdm(problems, desc="problems")]
    text = table(verdicts, arguments.forms, suite)
    if arguments.device != "cpu":
        text = text.replace("processor time", f"time on {clock.name}").replace(
            "Processor time", f"Time on {clock.name}"
        )
    print(text)
    if not arguments.quick:
        (results / f"{suite.name}.md").write_text(text, encoding="utf-8")
        (results / "verdicts.json").write_text(json.dumps([asdict(v) for v in verdicts], indent=1), encoding="utf-8")
        shown = [*RIVALS, *(f for f in arguments.forms if f in ("default", "steps"))]
        profiles(verdicts, shown, results / "profile.png")


if __name__ == "__main__":
    main()
