"""Time the solvers on random problems of 10, 50 and 200 groups, and write results/solvers.md (about half a minute).

Run it with OMP_NUM_THREADS=1: at these sizes threads cost more than they bring.  With ``--device cuda`` summaries are
on the device, and so the way to the host, where they are solved, is timed too: results/solvers-cuda.md.
"""

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from clock import Clock, add_device, results_of

from newton_summary import Summary
from newton_summary.solve import Step, cubic, line_search, newton, ridge, shrink

RESULTS = Path(__file__).parents[1] / "results" / "solvers.md"
SIZES = (10, 50, 200)
PROBLEMS = 40


def problem(
    rng: np.random.Generator, n: int, device: torch.device, *, definite: bool, flat: bool, hard: bool
) -> Summary:
    """Third derivatives over 6 decades, or none; in the hard case ḡ has no part along the lowest curvature."""
    a = rng.standard_normal((n, n))
    k = a @ a.T / n + 1e-3 * np.eye(n) if definite else (a + a.T) / np.sqrt(n)
    b, d = rng.standard_normal(n), 10 ** rng.uniform(-1, 1, n)
    if hard:
        lowest = np.linalg.eigh(k)[1][:, 0]
        b = (b - lowest * (lowest @ b)) * 0.01
    parts = {"gradient": b * d, "hessian": k * np.outer(d, d), "third": np.zeros(n) if flat else d**3}
    return Summary(loss=1.0, **{name: torch.as_tensor(part, device=device) for name, part in parts.items()})


CASES = {
    "positive definite": {"definite": True, "flat": False, "hard": False},
    "indefinite": {"definite": False, "flat": False, "hard": False},
    "hard case": {"definite": False, "flat": False, "hard": True},
    "no third derivative": {"definite": True, "flat": True, "hard": False},
}
SOLVERS: dict[str, Callable[[Summary], Step]] = {
    "newton": newton,
    "ridge": lambda s: ridge(s, 1.0),
    "cubic": cubic,
    "cubic, η ≥ 0": lambda s: cubic(s, nonnegative=True),
    "shrink, cubic, line search": lambda s: line_search(s, cubic(shrink(s, 1.0))),
}


def milliseconds(solver: Callable[[Summary], Step], problems: list[Summary], clock: Clock) -> list[float]:
    """Of each solve, the quickest of three."""
    result = []
    for summary in problems:
        times = []
        for _ in range(3):
            start = clock.now()
            step = solver(summary)
            times.append(1e3 * (clock.now() - start))
        if not step.ok:
            raise RuntimeError(f"a problem was not solved: {step.status.value}")
        result.append(min(times))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    clock = Clock(parser.parse_args().device)
    where = "the host" if clock.device.type == "cpu" else clock.name
    lines = [
        "# Time of a solve",
        "",
        f"Milliseconds, median (largest) of {PROBLEMS} random problems, from a summary on {where} to the step.",
        f"{platform.machine()}, numpy {np.__version__}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}.",
        "Written by `python benchmarks/solvers.py`.",
        "",
        "| solver | problem | " + " | ".join(f"{n} groups" for n in SIZES) + " |",
        "|" + "---|" * (2 + len(SIZES)),
    ]
    for name, solver in SOLVERS.items():
        for case, how in CASES.items():
            row = []
            for n in SIZES:
                rng = np.random.default_rng(n)
                times = milliseconds(solver, [problem(rng, n, clock.device, **how) for _ in range(PROBLEMS)], clock)
                row.append(f"{statistics.median(times):.2f} ({max(times):.2f})")
            lines.append(f"| {name} | {case} | " + " | ".join(row) + " |")
    RESULTS.parent.mkdir(exist_ok=True)
    results_of(RESULTS, clock.device.type).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
