"""Writes docs/zoo.md: every architecture of the zoo in every variant, how exact it is measured, and at what price.

Run ``python tests/zoo_table.py [--only exact|prices] [NAME …]``; with either it replaces those lines only.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from studies import benchmark
from test_zoo import REFUSED, some_groups
from torch import Tensor
from zoo_models import ZOO, doubled, make, variants
from zoo_reference import by_differences, direction_of, error, gradients, seeded

import newton_summary as ns
from newton_summary.measure import ForwardEngine
from newton_summary.measure.price import Price

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"

HEAD = """# Architectures

What the forward engine measures exactly, and at what price. Written by `python tests/zoo_table.py`; the tests hold
every line to it (`make test` a few of them, `make test-slow` all).

## Exact

Each model is the real code of its library in a small configuration, with random weights, in float64 and without the
casts to single precision that it makes. Every variant is measured: with and without `attention_mask`, `sdpa` and
eager attention, in training and evaluation, where a model has them. **Errors** are the largest difference of an entry
from the reference, in units of the largest entry. The reference is central differences of gradients, which need
nothing of the engine but the loss; nested differentiation stands for them where slopes jump (ReLU, choices of
experts, boxes matched to objects), or where something moves and counts as a constant (spectral norm).

| model | variants | tensors | error of H̄ | of the third order | reference |
|---|---|---|---|---|---|
"""

PRICES = """
## Prices

The same models at widths, lengths and batches that people have (transformers 768 wide, most with 126 tokens;
convolutions with 64 to 256 channels), still of a few layers, in float32, in at most 24 groups. Prices are in gradients
(a forward and a backward pass of the same loss), processor time on one thread, medians; **counted** are the
multiply-adds of products, convolutions and attention that run, in the same unit, and **calls** the operations of torch.
"First" is the first measurement, with the third order; it also records the loss and checks it against autograd, and
against differences where autograd has no second derivatives. Prices above 1.6 times what is counted are of networks
with few products: where a step is mostly gathers, normalisations and curves (graphs, spectra, embeddings, many channels
of small convolutions), or calls (a product for each step of time). One is refused in single precision, for rounding,
and measured by nested passes.
`results/large.md` has whole language models.

"""
COLUMNS = """| model | parameters | groups | gradient, ms | ḡ, H̄ | counted | calls | third, too | counted | calls \
| first |
|---|---|---|---|---|---|---|---|---|---|---|
"""

REFUSALS = """
## Refusals

| model | why |
|---|---|
"""


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


def exact_row(name: str) -> str:
    """How exact one architecture is measured, over all its variants."""
    found = [errors(name, options) for options in variants(name)]
    worst = [max(e[i] for e in found) for i in (0, 1)]
    tensors = len(ns.Partition.canonical(make(name)[0]))
    reference = "nested" if ZOO[name].kinked else "differences"
    return _row(name, len(found), tensors, *(f"{e:.0e}" for e in worst), reference)


class Priced:
    """An architecture at its size in float32, and what is done to it."""

    def __init__(self, name: str) -> None:
        model, loss_fn, batch = make(name, size=ZOO[name].size)
        self.model, self.batch = model.float(), _single(batch)
        self.loss_fn = getattr(loss_fn, "__wrapped__", loss_fn)  # with the casts that the model makes
        self.partition, self.engine = some_groups(self.model, 24), ForwardEngine()
        self.direction = [torch.randn_like(p) for p in self.partition.parameters]

    def gradient(self) -> object:
        return gradients(self.loss_fn(self.model, self.batch), self.partition.parameters)

    def measure(self, order: int) -> ns.Summary:
        given = {"partition": self.partition, "direction": self.direction, "order": order, "engine": self.engine}
        return ns.summarize(self.loss_fn, self.model, [self.batch], **given)


def _single(value: Any) -> Any:
    """A batch in single precision."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.float64 else value
    if isinstance(value, dict):
        return {key: _single(v) for key, v in value.items()}
    return type(value)(map(_single, value)) if isinstance(value, tuple | list) else value


def counts(work: Priced) -> dict[int, tuple[float, float]]:
    """Products and calls of a measurement of each order, in those of a gradient: nothing is timed."""
    with benchmark("clock") as clock:
        formulas = clock.FORMULAS

    def counted(function: Callable[[], object]) -> Price:
        with Price(formulas) as price:
            function()
        return price

    gradient, found = counted(work.gradient), {}
    for order in (2, 3):
        work.measure(order)  # the first one has more to do
        price = counted(lambda order=order: work.measure(order))
        found[order] = (price.operations / max(gradient.operations, 1), price.calls / gradient.calls)
    return found


def price_row(name: str, rounds: int = 3) -> str:
    """What one architecture costs, each time against gradients taken beside it."""
    work = Priced(name)

    def seconds(function: Callable[[], object], repeats: int = 1) -> float:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return statistics.median(times)

    work.gradient()
    first = seconds(lambda: work.measure(3)) / seconds(work.gradient, 5)
    count = counts(work)
    timed = [
        (seconds(work.gradient, 5), *(seconds(lambda o=o: work.measure(o)) for o in (2, 3))) for _ in range(rounds)
    ]
    cells: list[object] = []
    for place, order in enumerate((2, 3), 1):
        price = statistics.median(times[place] / times[0] for times in timed)
        products, calls = count[order]
        cells += [f"{price:.1f}", f"{products:.1f}" if products else "–", f"{calls:.0f}"]
    passes = 1e3 * statistics.median(times[0] for times in timed)
    parameters = sum(p.numel() for p in work.partition.parameters)
    return _row(name, f"{parameters:,}", len(work.partition), f"{passes:.3g}", *cells, f"{first:.0f}")


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


VERDICT = "At most 1.6 times what is counted, in both orders: "


def cells_of(line: str) -> list[str]:
    """The cells of a row."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def verdict(rows: list[str]) -> str:
    """How many prices are near what is counted, and which are not."""

    def near(row: list[str]) -> bool:
        return all(row[i + 1] != "–" and float(row[i]) <= 1.6 * float(row[i + 1]) for i in (4, 7))

    priced = [row for row in map(cells_of, rows) if len(row) == 11 and row[0] in ZOO]
    far = [row[0] for row in priced if not near(row)]
    return f"{VERDICT}{len(priced) - len(far)} of {len(priced)}; not {', '.join(far)}." if far else f"{VERDICT}all."


def row_of(name: str, section: str) -> list[str]:
    """The cells that a section of the page, "Exact" or "Prices", has of an architecture."""
    text = PAGE.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return cells_of(found)


KINDS: dict[str, Callable[[str], str]] = {"exact": exact_row, "prices": price_row}


def known_rows() -> dict[str, dict[str, str]]:
    """The rows of the page as it is, of each kind, by architecture."""
    exact, _, rest = PAGE.read_text().partition("\n## Prices\n")
    parts = {"exact": exact, "prices": rest.partition("\n## ")[0]}
    return {
        kind: {cells_of(line)[0]: line for line in text.splitlines() if line.startswith("|")}
        for kind, text in parts.items()
    }


def page(rows: dict[str, dict[str, str]]) -> str:
    """All of it."""
    exact, prices = ([found[name] for name in ZOO if name in found] for found in (rows["exact"], rows["prices"]))
    refusals = [_row(name, reason) for name, reason in REFUSED.items()]
    text = HEAD + "\n".join(exact) + "\n" + PRICES + COLUMNS + "\n".join(prices) + f"\n\n{verdict(prices)}\n"
    return text + (REFUSALS + "\n".join(refusals) + "\n" if refusals else "")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures (default: all)")
    parser.add_argument("--only", choices=KINDS, help="which of the two tables")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = known_rows()
    for kind in [options.only] if options.only else KINDS:
        for name in options.names or [n for n in ZOO if n not in REFUSED]:
            try:
                rows[kind][name] = KINDS[kind](name)
            except Exception as failure:
                rows[kind][name] = _row(name, f"{type(failure).__name__}: {str(failure)[:200]}")
            print(rows[kind][name], flush=True)
            PAGE.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
