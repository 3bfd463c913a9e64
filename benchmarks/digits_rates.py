"""Search the learning rates that the digits task uses, and write results/digits-rates.md (about two minutes)."""

import sys
from pathlib import Path

from newton_summary_experiments.search import search
from newton_summary_experiments.tasks import get_task

RESULTS = Path(__file__).parents[1] / "results" / "digits-rates.md"
AROUND = {"adam": -5, "sgd": -2, "newton-summary-paper": -1}  # on the grid of half decades: 3e-3, 0.1, 0.3
JOURNAL = Path("runs") / "digits-rates"
SEEDS = 3


def main() -> None:
    task = get_task("digits")
    data = task.read()
    steps = len(data.train[1]) // task.batch_size
    lines = [
        "# Learning rates on digits",
        "",
        f"Training loss over the whole training set after {task.epochs} epochs of {steps} steps with batches",
        f"of {task.batch_size}, the median of {SEEDS} seeds. The grid of half decades was widened until the best rate",
        "(bold) had worse ones on both sides; inf: the run diverged.",
        "SGD has momentum 0.9. For newton-summary-paper the rate is λ_1, at λ_int = 1, halved on a plateau.",
        "newton-summary was not searched: it runs as it is.",
        "",
        "Written by `python benchmarks/digits_rates.py`.",
    ]
    for name in sys.argv[1:] or AROUND:
        grid = {"lr": (AROUND[name] - 1, AROUND[name] + 1)}
        found = search(task, data, name, JOURNAL, grid, SEEDS)
        lines += ["", f"## {name}", "", found.table()]
        if found.best["lr"] != task.rates[name]:
            print(f"{name}: best {found.best['lr']:g}, the task uses {task.rates[name]:g}", file=sys.stderr)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
