"""A measurement's cost now, and at an earlier revision of this repository, in turns on the same machine.

Run ``python benchmarks/beside.py REVISION [MODEL …]``.  Each revision runs its own ``benchmarks/engines.py`` in a
process of its own, several times in alternation.  It prints the medians, and writes results/beside.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from clock import add_device, results_of
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
MODELS = ["mlp", "lenet", "vgg", "resnet", "bigmlp", "gpt"]
FIGURES = {"all three": "third", "up to H̄": "hessian", "MB": "memory"}


def measure(tree: Path, model: str, device: str) -> dict[str, float]:
    """What a revision's own benchmark says of a model: costs in gradients, and the peak in megabytes."""
    paths = [str(tree / "src"), str(tree / "experiments" / "src")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(tree / "benchmarks" / "engines.py"), model, "--parts", "forward", "--cpu"]
    command += ["--device", device] if device != "cpu" else []  # which the oldest revisions do not know
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(results_of(tree / "results" / "engines.json", device).read_text(encoding="utf-8"))
    row: dict[str, float] = found["models"][model]["forward"]
    return row


def table(revision: str, rounds: int, found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Medians over rounds: before, now, and their quotient."""
    lines = ["# The engine now, and at an earlier revision", ""]
    lines += [
        f"`python benchmarks/beside.py {revision}`, torch {torch.__version__}; processor time, one thread; medians"
    ]
    lines += [f"of {rounds} rounds in which both were measured in turn.  Costs are in gradients, memory in megabytes:"]
    lines += ["before, now, now / before.", ""]
    lines += [f"| model | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 1) + "|"]
    for model, both in found.items():
        cells = []
        for figure in FIGURES.values():
            before, now = (statistics.median(row[figure] for row in both[name]) for name in ("before", "now"))
            cells.append(f"{before:.3g}, {now:.3g}, **{now / before:.2f}**")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="any name that git knows")
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for name, revision in (("before", chosen.revision), ("now", "HEAD")):  # copies: their results are not kept
            trees[name] = Path(folder) / name
            subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(trees[name])], check=True)
            subprocess.run(["git", "checkout", "--quiet", "--detach", revision], cwd=trees[name], check=True)
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        for model in tqdm(chosen.models):
            found[model] = {name: [] for name in trees}
            for _ in range(chosen.rounds):
                for name, tree in trees.items():
                    found[model][name].append(measure(tree, model, chosen.device))
    text = table(chosen.revision, chosen.rounds, found)
    print(text)
    results_of(ROOT / "results" / "beside.md", chosen.device).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
