"""A measurement's cost now, and at an earlier revision of this repository, in turns on the same machine.

Run ``python benchmarks/beside.py REVISION [MODEL …]``.  Each revision runs its own ``benchmarks/engines.py`` in a
process of its own, several times in alternation.  It prints the medians, and writes results/beside.md and beside.json.
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


def table(revision: str, found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Before, now, and their quotient."""
    lines = [
        "# The engine now, and at an earlier revision",
        "",
        f"`python benchmarks/beside.py {revision}`, torch {torch.__version__}; processor time, one thread; medians",
        "of rounds in which both were measured in turn.  Costs are in gradients, memory in megabytes: before, now,",
        "now / before.",
        "",
        f"| model | {' | '.join(FIGURES)} |",
        "|---" * (len(FIGURES) + 1) + "|",
    ]
    for model, both in found.items():
        pairs = [(both["before"][figure], both["now"][figure]) for figure in FIGURES.values()]
        lines.append(f"| {model} | {' | '.join(f'{a:.3g}, {b:.3g}, **{b / a:.2f}**' for a, b in pairs)} |")
    return "\n".join(lines) + "\n"


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of every figure."""
    return {figure: statistics.median(row[figure] for row in rows) for figure in FIGURES.values()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="any name that git knows")
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    chosen = parser.parse_args()
    path = results_of(ROOT / "results" / "beside.json", chosen.device)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = {chosen.revision: known.get(chosen.revision, {})}  # of one revision: models that are not run again stay
    with tempfile.TemporaryDirectory() as folder:
        trees = {}
        for name, revision in (("before", chosen.revision), ("now", "HEAD")):  # copies: their results are not kept
            trees[name] = Path(folder) / name
            subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(trees[name])], check=True)
            subprocess.run(["git", "checkout", "--quiet", "--detach", revision], cwd=trees[name], check=True)
        for model in tqdm(chosen.models):
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            for _ in range(chosen.rounds):
                for name, tree in trees.items():
                    rows[name].append(measure(tree, model, chosen.device))
            known[chosen.revision][model] = {name: median(measured) for name, measured in rows.items()}
    ordered = {model: known[chosen.revision][model] for model in MODELS if model in known[chosen.revision]}
    path.write_text(json.dumps({chosen.revision: ordered}, indent=1) + "\n", encoding="utf-8")
    text = table(chosen.revision, ordered)
    print(text)
    path.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
