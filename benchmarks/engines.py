"""What a measurement costs, in units of one forward and backward pass of the same loss, and how exact it is.

Run ``python benchmarks/engines.py [MODEL …] [--parts …]``.  It prints a line for each model and updates
results/engines.json and results/engines.md.  Everything is measured in a process of its own, with two threads; times
are medians of five (on a busy machine, ``--cpu`` takes processor time with one thread; with ``--device cuda``, events
are timed, and results are engines-cuda.*).  "counted" are the multiply-adds of matrix products and convolutions that
were executed, and so the floor where these dominate.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from clock import Clock, Peak, add_device, multiply_adds, results_of
from networks import MODELS, cross_entropy
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import ForwardEngine, Loss, NestedEngine
from newton_summary_experiments.models import mlp

LIMITS = {"bigmlp": 15.0, "vgg": 8.0, "lenet": 6.0, "mlp": 5.0, "gpt": 25.0, "resnet": 20.0}
CHAINS = ["depth5", "depth10", "depth20", "depth40"]
RESULTS = Path(__file__).parent.parent / "results"


class Problem:
    """A model, its batch, the gradient as direction, and the time that the gradient takes."""

    def __init__(self, name: str, clock: Clock) -> None:
        torch.manual_seed(0)
        self.clock = clock
        model, batch = MODELS[name]()
        self.model, self.batch = model.to(clock.device), tuple(t.to(clock.device) for t in batch)
        self.partition, self.loss = ns.Partition.canonical(self.model), Loss(cross_entropy, self.model)
        self.unit = clock.median(self.gradient)
        self.direction = [p.grad.clone() for p in self.model.parameters()]

    def gradient(self) -> None:
        self.model.zero_grad()
        cross_entropy(self.model, self.batch).backward()

    def measure(self, engine: Any, order: int = 3, third: str = "diagonal") -> ns.Summary:
        return engine.measure(self.loss, self.batch, self.partition, self.direction, order, third)


# Parts ----------------------------------------------------------------------------------------------------------------


def forward(problem: Problem) -> dict[str, float]:
    """Times, counted multiply-adds and memory of the forward engine."""
    engine = ForwardEngine()
    clock = problem.clock
    _load_all_code(engine, clock.device)
    peak = Peak(clock.device)
    problem.measure(engine)
    with peak:
        problem.measure(engine)
    third = clock.median(lambda: problem.measure(engine))
    unit = (problem.unit + clock.median(problem.gradient)) / 2
    hessian = clock.median(lambda: problem.measure(engine, 2))
    counts = [
        multiply_adds(f)
        for f in (problem.gradient, lambda: problem.measure(engine), lambda: problem.measure(engine, 2))
    ]
    return {
        "groups": len(problem.partition),
        "gradient ms": unit * 1e3,
        "third": third / unit,
        "hessian": hessian / unit,
        "counted third": counts[1] / counts[0],
        "counted hessian": counts[2] / counts[0],
        "gradient multiply-adds": counts[0],
        "of peak": counts[1] / third / clock.peak(),
        "memory": peak.largest,
    }


def nested(problem: Problem) -> dict[str, float]:
    """Time and memory of the nested engine."""
    engine = NestedEngine()
    _load_all_code(engine, problem.clock.device)
    with Peak(problem.clock.device) as peak:
        problem.measure(engine)
    return {"third": problem.clock.median(lambda: problem.measure(engine), 1) / problem.unit, "memory": peak.largest}


def full(problem: Problem) -> dict[str, float]:
    """All of the third order."""
    engine = ForwardEngine()
    problem.measure(engine)
    requests = [(3, "full", 2), (3, "diagonal", 5), (2, "diagonal", 5)]
    times = [problem.clock.median(lambda o=o, t=t: problem.measure(engine, o, t), n) for o, t, n in requests]
    return {"full": times[0] / problem.unit, "full/diagonal": times[0] / times[1], "full/hessian": times[0] / times[2]}


def accuracy(problem: Problem) -> dict[str, float]:
    """The worst error of an entry in both precisions, against nested differentiation (but for `last_norm`)."""
    single = problem.measure(ForwardEngine())
    exact = copy.copy(problem)
    exact.model = copy.deepcopy(problem.model).double()
    exact.batch = tuple(t.double() if t.is_floating_point() else t for t in problem.batch)
    exact.partition, exact.loss = ns.Partition.canonical(exact.model), Loss(cross_entropy, exact.model)
    exact.direction = [u.double() for u in problem.direction]
    expected, double = exact.measure(NestedEngine()), exact.measure(ForwardEngine())
    for name, value in last_norm(exact).items():
        expected.third[expected.names.index(name)] = value
    return {
        f"{name} {precision}": entry_error(getattr(got, name), getattr(expected, name))
        for precision, got in (("float64", double), ("float32", single))
        for name in ("hessian", "third")
    }


def last_norm(problem: Problem) -> dict[str, float]:
    """Third derivatives by the scale and shift of a last norm, where the logits come next.

    The logits are linear in them, so these are third cumulants of the logits' slopes under the softmax.  Nested
    differentiation cancels there.
    """
    if not hasattr(problem.model, "tokens"):
        return {}
    norm, table = problem.model.norm, problem.model.tokens.weight.detach()
    outputs: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, inputs, out: outputs.append(out.detach()))
    p = problem.model(problem.batch[0]).detach().softmax(-1)
    handle.remove()
    u = dict(zip(problem.partition.parameter_names, problem.direction, strict=True))
    moved = {"norm.weight": (outputs[0] - norm.bias.detach()) / norm.weight.detach() * u["norm.weight"]}
    moved["norm.bias"] = u["norm.bias"].expand_as(outputs[0])
    slopes = {name: rows @ table.T for name, rows in moved.items()}
    return {k: float((p * (d - (p * d).sum(-1, keepdim=True)) ** 3).sum(-1).mean()) for k, d in slopes.items()}


def entry_error(got: Tensor, expected: Tensor) -> float:
    """The largest error of an entry (i, j), relative to √(largest in row i · largest in row j).

    Groups whose largest entry is below 1e-12 of all count as if it were that: their derivatives are zero but for
    rounding.
    """
    largest = expected.abs().reshape(len(expected), -1).amax(1)
    largest = largest.clamp_min(1e-12 * float(largest.max()))
    scale = largest if expected.dim() == 1 else (largest[:, None] * largest).sqrt()
    return float(((got - expected).abs() / scale).max())


def curvlinops(problem: Problem) -> dict[str, float]:
    """H̄ as it can be had without this package: ``U.T @ (H @ U)``, a Hessian-vector product for each group."""
    operators = importlib.import_module("curvlinops")
    groups = range(len(problem.partition))
    parameters = list(problem.model.parameters())
    zeros = [torch.zeros_like(p) for p in parameters]

    def hessian() -> Tensor:
        h = operators.HessianLinearOperator(
            problem.model, _FlatCrossEntropy(), parameters, [problem.batch], check_deterministic=False
        )
        rows = []
        for i in groups:
            product = h @ [problem.direction[j] if i == j else zeros[j] for j in groups]
            rows.append([float((a * u).sum()) for a, u in zip(product, problem.direction, strict=True)])
        return torch.tensor(rows, dtype=torch.float64)

    expected = problem.measure(ForwardEngine(), 2).hessian
    return {"hessian": problem.clock.median(hessian, 1) / problem.unit, "agrees to": entry_error(hessian(), expected)}


class _FlatCrossEntropy(nn.CrossEntropyLoss):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().forward(logits.flatten(0, -2), labels.flatten())


def _load_all_code(engine: Any, device: torch.device) -> None:
    """Measures something tiny, so that code is not counted as memory."""
    tiny, few = mlp([4, 4, 3]).to(device), (torch.randn(5, 4, device=device), torch.randint(3, (5,), device=device))
    u = [p.detach() for p in tiny.parameters()]
    engine.measure(Loss(cross_entropy, tiny), few, ns.Partition.canonical(tiny), u, 3, "diagonal")


PARTS = {part.__name__: part for part in (forward, nested, full, accuracy, curvlinops)}


# The report -----------------------------------------------------------------------------------------------------------


def line(name: str, rows: dict[str, dict[str, float]]) -> str:
    """A model's row of the table."""
    own, other = rows["forward"], rows.get("nested", {})
    cells = [name, f"{own['groups']:.0f}", f"{own['gradient ms']:.1f}"]
    cells += [f"**{own['third']:.1f}**", f"{LIMITS[name]:.0f}" if name in LIMITS else "", f"{own['counted third']:.1f}"]
    cells += [f"{own['hessian']:.1f}", f"{own['counted hessian']:.1f}"]
    cells += [f"{other['third']:.1f}", f"{other['third'] / own['third']:.1f}"] if other else ["", ""]
    cells += [f"{own['memory']:.0f}", f"{other['memory']:.0f}" if other else ""]
    cells += [f"{own['of peak']:.2f}" if "of peak" in own else ""]
    return "| " + " | ".join(cells) + " |"


TITLES = ["model", "S", "gradient ms", "all three", "at most", "counted", "up to H̄", "counted"]
TITLES += ["nested", "×", "MB", "nested MB", "of peak"]
HEADER = f"| {' | '.join(TITLES)} |\n" + "|---" * len(TITLES) + "|"


ACCURACY = """On the GPT-style model the third derivatives by the scale and shift of the last norm, 7e-13 of the largest
and less, are compared with third cumulants of the logits' slopes: nested differentiation cancels there (2e-4).
Memory of the first six models was measured again after tangents were laid closer together, nested too (but on
bigmlp); times and the chains were not."""


def report(saved: dict[str, Any]) -> str:
    """Everything that was measured, in Markdown."""
    models = saved["models"]
    seconds = "processor time, one thread" if saved["threads"] == 1 else f"wall clock, {saved['threads']} threads"
    if saved.get("device", "cpu") != "cpu":
        seconds = f"events on {saved['device']}"
    text = ["# The engines", "", f"`python benchmarks/engines.py`, torch {saved['torch']}; {seconds}.", ""]
    text += ["Costs are in gradients: forward and backward passes of the same loss.  *Counted* are multiply-adds of"]
    text += ["matrix products and convolutions in the same unit, the floor.  *MB* is the peak above what was resident."]
    text += ["", HEADER, *(line(name, rows) for name, rows in models.items() if "forward" in rows), ""]
    for title, part in (
        ("All of the third order", "full"),
        ("Largest error of an entry, against nested differentiation in double precision", "accuracy"),
        ("`U.T @ (H @ U)` by curvlinops, in gradients", "curvlinops"),
    ):
        found = {name: rows[part] for name, rows in models.items() if part in rows}
        if found:
            keys = list(next(iter(found.values())))
            text += [f"## {title}", "", f"| model | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
            text += [f"| {name} | {' | '.join(f'{row[k]:.3g}' for k in keys)} |" for name, row in found.items()]
            text += [""]
    if any("accuracy" in rows for rows in models.values()):
        text += [ACCURACY, ""]
    chains = {name: models[name]["forward"] for name in CHAINS if "forward" in models.get(name, {})}
    return "\n".join(text + (growth(chains) if len(chains) > 1 else []))


def growth(chains: dict[str, dict[str, float]]) -> list[str]:
    """How well one rate of multiply-adds explains the times of chains of different depths."""
    text = ["## Growth with depth", "", "Hidden layers of width 1024: seconds, and against one rate for all depths."]
    text += ["", "| model | S | all three, s | to the fit | up to H̄, s | to the fit |", "|---|---|---|---|---|---|"]
    columns = []
    for what in ("third", "hessian"):
        seconds = [row[what] * row["gradient ms"] / 1e3 for row in chains.values()]
        counts = [row[f"counted {what}"] * row["gradient multiply-adds"] for row in chains.values()]
        rate = math.exp(statistics.fmean(math.log(c / s) for c, s in zip(counts, seconds, strict=True)))
        columns += [seconds, [s * rate / c for c, s in zip(counts, seconds, strict=True)]]
    for (name, row), *cells in zip(chains.items(), *columns, strict=True):
        text.append(f"| {name} | {row['groups']:.0f} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return [*text, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(LIMITS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["forward", "nested"])
    parser.add_argument("--cpu", action="store_true", help="processor time with one thread, for a busy machine")
    add_device(parser)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    clock = Clock(arguments.device, processor=arguments.cpu)
    if arguments.inside:
        torch.set_num_threads(1 if arguments.cpu else 2)
        print(json.dumps(PARTS[arguments.parts[0]](Problem(arguments.models[0], clock))))
        return
    path = results_of(RESULTS / "engines.json", arguments.device)
    kind = {"torch": torch.__version__, "threads": 1 if arguments.cpu else 2}
    kind |= {"device": clock.name} if arguments.device != "cpu" else {}
    saved = json.loads(path.read_text()) if path.exists() else {}
    if {key: saved.get(key) for key in kind} != kind:
        saved = {**kind, "models": {}}
    print(HEADER)
    for name in arguments.models:
        rows = saved["models"].setdefault(name, {})
        for part in arguments.parts:
            if part == "curvlinops" and importlib.util.find_spec("curvlinops") is None:
                print("curvlinops-for-pytorch is missing: it wants torchvision, so give it an environment of its own")
                continue
            try:
                rows[part] = _in_a_process(name, part, arguments.device, arguments.cpu)
            except subprocess.CalledProcessError:
                if part != "curvlinops":
                    raise
                print(f"{name}: curvlinops fails, as it does on batch norm in training mode and on fused attention")
                continue
            print(f"{name} {part}: { {k: float(f'{v:.3g}') for k, v in rows[part].items()} }", flush=True)
        if "forward" in rows:
            print(line(name, rows), flush=True)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(saved, indent=1) + "\n")
        path.with_suffix(".md").write_text(report(saved))


def _in_a_process(name: str, part: str, device: str, cpu: bool) -> dict[str, float]:
    command = [sys.executable, __file__, name, "--inside", "--parts", part, "--device", device, *["--cpu"] * cpu]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
