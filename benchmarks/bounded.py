"""Rates that are not negative: the solver of this package beside scipy's L-BFGS-B, on the same problems (a minute).

Both minimise the cubic model of results/solvers.md's problems for η ≥ 0.  L-BFGS-B starts at 0 and stops where it can
do no more; it has the problem as it is, and in units in which every group's curvature is about 1, which this package's
solver finds for itself.  Written to results/bounded.md, with what decides between them.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy.optimize import minimize
from solvers import CASES, problem

from newton_summary.solve import bounded, secular
from newton_summary.solve.linear import Array, equilibrate
from newton_summary.solve.model import ACCEPTED_ERROR, Model

RESULTS = Path(__file__).parents[1] / "results" / "bounded.md"
SIZES = (10, 50, 200)
PROBLEMS = 40
LOWER = 1e-6  # the share of a decrease by which one minimum is called lower than another


def by_package(model: Model) -> Array:
    return bounded.minimise(model, bounded.Box(np.zeros(len(model)), np.full(len(model), np.inf)))[0]


def by_scipy(model: Model) -> Array:
    options = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 0.0, "gtol": 1e-14}
    found = minimize(
        lambda x: (-model.decrease(x), model.slope(x)),
        np.zeros(len(model)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * len(model),
        options=options,
    )
    return found.x


def in_units(model: Model) -> Array:
    units = equilibrate(np.abs(model.hessian) + np.diag(secular.guess(model) * model.cubic**2))
    return by_scipy(model.scaled(units)) * units


SOLVERS: dict[str, Callable[[Model], Array]] = {
    "this package": by_package,
    "L-BFGS-B": by_scipy,
    "L-BFGS-B in our units": in_units,
}


@dataclass(frozen=True)
class Outcome:
    """Of one solve: what the model falls by, how far the first-order conditions are missed, and processor time."""

    decrease: float
    error: float
    milliseconds: float


def outcome(solver: Callable[[Model], Array], model: Model) -> Outcome:
    start = time.process_time()
    x = solver(model)
    taken = 1e3 * (time.process_time() - start)
    slope = model.slope(x)
    held = (x <= 0) & (slope > 0)
    error = np.max(np.where(held, 0.0, np.abs(slope)) / model.magnitude(x))
    return Outcome(model.decrease(x), float(error), taken)


def row(name: str, runs: dict[str, list[Outcome]]) -> str:
    best = [max(outcomes, key=lambda o: o.decrease).decrease for outcomes in zip(*runs.values(), strict=True)]
    own = runs[name]
    lost = sum(o.decrease < (1 - LOWER) * lowest for o, lowest in zip(own, best, strict=True))
    missed = sum(o.error > ACCEPTED_ERROR for o in own)
    return f"{lost} | {missed} | {max(o.error for o in own):.0e} | {statistics.median(o.milliseconds for o in own):.1f}"


def main() -> None:
    lines = [
        "# Rates that are not negative: by this package, by L-BFGS-B",
        "",
        f"{PROBLEMS} random problems of each kind: on how many the other's minimum is lower (by {LOWER:.0e} of the",
        f"decrease), on how many the first-order conditions are missed by more than {ACCEPTED_ERROR:.0e} (of the terms",
        "that cancel in them; and the most), and the median processor time in milliseconds.",
        f"{platform.machine()}, numpy {np.__version__}, scipy {scipy.__version__}, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}. Written by `python benchmarks/bounded.py`.",
        "",
        "| groups | problem | solver | higher minimum | conditions missed | at most by | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for n in SIZES:
        for case, how in CASES.items():
            rng = np.random.default_rng(n)
            models = [Model.of(problem(rng, n, torch.device("cpu"), **how), 1.0) for _ in range(PROBLEMS)]
            for solver in SOLVERS.values():
                solver(models[0])  # what a first call imports is not timed
            runs = {name: [outcome(solver, model) for model in models] for name, solver in SOLVERS.items()}
            lines += [f"| {n} | {case} | {name} | {row(name, runs)} |" for name in SOLVERS]
            print(*lines[-3:], sep="\n", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
