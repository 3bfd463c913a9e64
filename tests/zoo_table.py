"""Writes docs/zoo.md: every architecture of the zoo in every variant, how exact it is measured, and at what price.

Run ``python tests/zoo_table.py [NAME …]``; with names it replaces their lines only.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from studies import benchmark
from test_zoo import REFUSED, some_groups
from zoo_models import ZOO, doubled, make, variants
from zoo_reference import by_differences, direction_of, error, gradients, seeded

import newton_summary as ns
from newton_summary.measure import ForwardEngine
from newton_summary.measure.price import Price

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"

HEAD = """# Architectures

What the forward engine measures exactly, and at what price. Written by `python tests/zoo_table.py`; the tests hold
every line to it (`make test` a few of them, `make test-slow` all).

Each model is the real code of its library in a small configuration, with random weights, in float64 and without the
casts to single precision that it makes. Every variant is measured: with and without `attention_mask`, `sdpa` and
eager attention, in training and evaluation, where a model has them. **Errors** are the largest difference of an entry
from the reference, in units of the largest entry. The reference is central differences of gradients, which need
nothing of the engine but the loss; nested differentiation stands for them where slopes jump (ReLU, choices of
experts, boxes matched to objects), or where something moves and counts as a constant (spectral norm). **Prices** are
in forward and backward passes of the same loss, for one group per tensor, in the usual variant; "first" is the first
measurement, which also checks a new loss against autograd. **Counted** are the multiply-adds of products,
convolutions and attention that run, in the same unit, and **calls** the operations of torch that do. On models as small
as these a call costs more than what it computes, so that prices follow neither count, and differ from run to run;
`results/large.md` has models of real size, whose prices are 1.0 to 1.2 times what is counted.

| model | variants | tensors | error of H̄ | of the third order | reference | ḡ, H̄ | with the third order | first \
| counted: ḡ, H̄ | with the third order | calls: ḡ, H̄ | with the third order |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""

REFUSALS = """
## Refusals

| model | why |
|---|---|
"""


def fastest(function: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def errors(name: str, options: dict[str, Any]) -> tuple[float, float]:
    """Of H̄ and of the third order's diagonal, in a few groups."""
    model, loss_fn, batch = make(name, **options)
    partition = some_groups(model, 6)
    direction = direction_of(partition)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return seeded(doubled(loss_fn), model, batch)

    def measured(engine: str) -> ns.Summary:
        return ns.summarize(loss, model, [batch], partition=partition, direction=direction, engine=engine)

    got = measured("forward")
    if ZOO[name].kinked:
        expected = measured("nested")
    else:
        expected = by_differences(doubled(loss_fn), model, batch, partition, direction)[0]
    assert got.hessian is not None
    assert got.third is not None
    assert expected.hessian is not None
    assert expected.third is not None
    return error(got.hessian, expected.hessian), error(got.third, expected.third)


def prices(name: str) -> tuple[int, float, float, float]:
    """The number of tensors, and the prices of H̄, of all with the third order, and of the first measurement."""
    model, loss_fn, batch = make(name)
    partition = ns.Partition.canonical(model)
    engine = ForwardEngine()

    def measure(order: int) -> ns.Summary:
        return ns.summarize(loss_fn, model, [batch], partition=partition, order=order, engine=engine)

    def gradient() -> object:
        return gradients(loss_fn(model, batch), partition.parameters)

    passes = fastest(gradient)
    start = time.perf_counter()
    measure(3)
    first = time.perf_counter() - start
    return len(partition), *(t / passes for t in (fastest(lambda: measure(2)), fastest(lambda: measure(3)), first))


def counts(name: str) -> list[float]:
    """Products, then calls, of H̄ and of all with the third order, in those of a gradient: nothing is timed."""
    model, loss_fn, batch = make(name)
    partition, engine = ns.Partition.canonical(model), ForwardEngine()
    direction = [torch.randn_like(p) for p in partition.parameters]

    def measure(order: int) -> ns.Summary:
        return ns.summarize(
            loss_fn, model, [batch], partition=partition, direction=direction, order=order, engine=engine
        )

    with benchmark("clock") as clock:
        formulas = clock.FORMULAS

    def counted(function: Callable[[], object]) -> Price:
        with Price(formulas) as price:
            function()
        return price

    gradient = counted(lambda: gradients(loss_fn(model, batch), partition.parameters))
    found = []
    for order in (2, 3):
        measure(order)  # the first one has more to do
        found.append(counted(lambda order=order: measure(order)))
    products = [price.operations / max(gradient.operations, 1) for price in found]
    return products + [price.calls / gradient.calls for price in found]


def counts_in_words(name: str) -> list[str]:
    """As the table has them; no products where a loss has next to none, or torch has no formula for them."""
    found = counts(name)
    return [f"{count:.0f}" if count else "–" for count in found]


def line(name: str) -> str:
    """The table's row of one architecture."""
    found = [errors(name, options) for options in variants(name)]
    worst = [max(e[i] for e in found) for i in (0, 1)]
    tensors, hessian, third, first = prices(name)
    reference = "nested" if ZOO[name].kinked else "differences"
    cells = [name, len(found), tensors, *(f"{e:.0e}" for e in worst), reference]
    timed = [f"{p:.0f}" for p in (hessian, third, first)]
    return "| " + " | ".join(map(str, [*cells, *timed, *counts_in_words(name)])) + " |"


VERDICT = "At most 1.6 times what is counted, in both orders: "


def verdict(lines: list[str]) -> str:
    """How many prices are near what is counted."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in rows if len(row) == 13 and row[0] in ZOO]
    near = [row for row in rows if all(row[9 + i] != "–" and int(row[6 + i]) <= 1.6 * int(row[9 + i]) for i in (0, 1))]
    return f"{VERDICT}{len(near)} of {len(rows)}."


def row_of(name: str) -> list[str]:
    """The cells that the page has of an architecture."""
    (found,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lines = []
    for name in names or [n for n in ZOO if n not in REFUSED]:
        try:
            lines.append(line(name))
        except Exception as failure:
            lines.append(f"| {name} | {type(failure).__name__}: {str(failure)[:200]} |")
        print(lines[-1], flush=True)
    if names:
        page = PAGE.read_text().splitlines()
        for new in lines:
            page = [new if old.startswith(new[: new.index("|", 1) + 1]) else old for old in page]
        PAGE.write_text("\n".join(verdict(page) if old.startswith(VERDICT) else old for old in page) + "\n")
    else:
        refusals = [f"| {name} | {reason} |" for name, reason in REFUSED.items()]
        end = f"\n\n{verdict(lines)}\n"
        PAGE.write_text(HEAD + "\n".join(lines) + end + (REFUSALS + "\n".join(refusals) + "\n" if refusals else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
