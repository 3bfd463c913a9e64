"""What suggested learning rates are worth, and what they cost: writes results/suggestion.md (15 minutes, one core).

    python benchmarks/suggestion.py                    the twenty problems of benchmarks/untuned.py
    python benchmarks/suggestion.py --problems digits gru
    python benchmarks/suggestion.py --pair             two optimizers (benchmarks/pair.py), and the page anew

Adam trains with the rates suggested for its tensors, from an optimizer whose rate was 30 times too small or too large,
as a seed decides, and is compared with Adam at the best uniform rate of the committed searches.  What was run is kept
in results/suggestion.jsonl, and not run again.  With ``--device cuda``: results/suggestion-cuda.*.
"""

from __future__ import annotations

import argparse
import math
from statistics import geometric_mean, median

import jsonl
import pair
import torch
from clock import Clock, add_device, results_of
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from untuned import RESULTS, SUITES, Problem, Store, on_device, run

import newton_summary as ns
from newton_summary.watch.lr_finder import SuggestedRates
from newton_summary_experiments.data import InMemory, as_it_is

SEEDS = (0, 1, 2)
OFF = 30.0
STORE = RESULTS / "suggestion.jsonl"


def suggest(problem: Problem, model: nn.Module, seed: int) -> SuggestedRates:
    """For an Adam whose rate is far off."""
    loader = DataLoader(
        InMemory(problem.read().train), problem.batch_size, shuffle=True, drop_last=True, collate_fn=as_it_is
    )
    adam = torch.optim.Adam(model.parameters(), lr=1e-3 * OFF ** (1 if seed % 2 else -1))
    return ns.suggest_rates(problem.loss_fn, model, loader, adam, steps=problem.steps, seed=seed)


def case(problem: Problem, seed: int, clock: Clock) -> dict[str, float]:
    """One suggestion, and the training with it."""
    spent: dict[str, float] = {}

    def make(model: nn.Module, rate: float, steps: int) -> torch.optim.Optimizer:
        start = clock.now()
        suggested = suggest(problem, model, seed)
        spent["suggestion"], spent["began"] = clock.now() - start, clock.now()
        spent["trials"], spent["mean"] = len(suggested.trials), geometric_mean(suggested.rates.values())
        return torch.optim.Adam(suggested.param_groups)

    record = run(problem, "suggested", make, 0.0, seed)
    training = clock.now() - spent["began"]
    return {
        "loss": record.loss,
        "share": spent["suggestion"] / training,
        "trials": spent["trials"],
        "mean": spent["mean"],
    }


def row(problem: Problem, searched: dict[float, float], cases: list[dict[str, float]]) -> tuple[str, float, float]:
    """A line of the table, and the ratios of losses to the best one's: ours, and half a decade off, the better way.

    Args:
        problem: which one.
        searched: the loss of each uniform rate, by half decades, in order, the best with worse ones on both sides.
        cases: our runs.
    """
    best = min(searched, key=lambda rate: searched[rate])
    uniform, ours = searched[best], median(c["loss"] for c in cases)
    ratio = ours / uniform if uniform > 0 else math.nan
    place = list(searched).index(best)
    lower, higher = (list(searched.values())[place + way] / uniform for way in (-1, 1))
    rates = f"{median(c['mean'] for c in cases):.2g}"
    share = f"{median(c['share'] for c in cases):.0%}"
    cells = (
        problem.name,
        f"{best:g}",
        rates,
        f"{uniform:.3g}",
        f"{ours:.3g}",
        f"{ratio:.2f}",
        f"{lower:.3g}, {higher:.3g}",
        share,
        str(len(cases)),
    )
    return f"| {' | '.join(cells)} |", ratio, min(lower, higher)


def within(ratios: list[float]) -> str:
    """How many are at most a little more than 1."""
    return ", ".join(f"{sum(r <= bound for r in ratios)} at most {bound:g}" for bound in (1.05, 1.15, 2.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--pair", action="store_true", help="run what is missing of the study of two optimizers alone")
    add_device(parser)
    given = parser.parse_args()
    chosen, store = [] if given.pair else given.problems, results_of(STORE, given.device)
    torch.set_num_threads(1)
    clock = Clock(given.device, processor=True)
    torch.optim.Adam(nn.Linear(1, 1).parameters())  # the first optimizer of a process imports torch's compiler
    if given.pair:
        pair.run(clock)
    known = {(r["problem"], r["seed"]): r for r in jsonl.read(store)}
    every = [(suite, p) for suite in SUITES.values() for p in suite.problems.values()]
    todo = [(p, seed) for seed in SEEDS for _, p in every if chosen is None or p.name in chosen]
    for problem, seed in tqdm(todo, desc="suggestions"):
        if (problem.name, seed) not in known:
            found = {"problem": problem.name, "seed": seed, **case(on_device(problem, given.device), seed, clock)}
            known[problem.name, seed] = found
            jsonl.append(store, found, digits=4)
    text = [
        "# Suggested learning rates",
        "",
        "Adam at the rates that `suggest_rates(…, steps=…)` gives each tensor, against Adam at the best uniform rate",
        "of a search by half decades: training loss at the end, medians of seeds. The rates are suggested to an",
        "optimizer whose rate is 30 times off 1e-3, up or down. Rates: the geometric mean of those suggested. Time: of",
        "the suggestion, first measurement included, as a share of the training. Written by",
        "`python benchmarks/suggestion.py`.",
        "Half a decade off: the same ratio for the uniform rates next to the best one in the search, lower and higher.",
        "",
        "| problem | best uniform rate | suggested | its loss | our loss | ratio | half a decade off | time | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ratios, misses = [], []
    for suite, problem in every:
        cases = [r for (name, _), r in known.items() if name == problem.name]
        if cases:
            searched = Store(suite.folder / "baselines.jsonl").rates(problem.name, "adam", len(SEEDS))
            line, ratio, miss = row(problem, searched, cases)
            text.append(line)
            ratios.append(ratio)
            misses.append(miss)
    text += ["", f"Median ratio {median(ratios):.2f}; of {len(ratios)} ratios {within(ratios)}."]
    text += [f"Half a decade off, the better way: median {median(misses):.2f}; {within(misses)}."]
    text += pair.section(clock)
    results_of(RESULTS / "suggestion.md", given.device).write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
