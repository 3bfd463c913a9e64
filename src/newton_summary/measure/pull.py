"""All of the third order: the tangents of adjoints, pulled backwards through a graph (docs/engine.md)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.rules import Call, Groups, Rule, Sums
from newton_summary.measure.rules.jets import rows_of
from newton_summary.measure.tape import moves, refusing, results_of


@dataclass(slots=True)
class Curved:
    """A curved operation with its tangents and adjoint."""

    call: Call
    rule: Rule
    adjoint: Any

    def results(self) -> list[Tensor]:
        """Its differentiable results."""
        out = self.call.out
        return [o for o in results_of(out) if moves(o)]


def pull(calls: list[Curved], groups: Groups, sums: Sums) -> None:
    """Pulls the tangents of all adjoints through the graph, some groups at a time, and adds what they give.

    The adjoint of every argument of a curved operation gains v̄ · f''[ẋ_i, ·] as group i's rate moves; from there these
    rows go backward as gradients do, all in one batched backward pass.
    """
    arguments: list[Tensor] = []
    sources: list[tuple[Groups, Tensor]] = []
    with torch.no_grad():
        for curved in calls:
            if curved.adjoint is not None and curved.call.bent:
                with refusing(curved.call, curved.rule):
                    found = curved.rule.sources(curved.call, curved.adjoint)
                for place, source in found.items():
                    if place in curved.call.bent:
                        arguments.append(curved.call.argument(place))
                        sources.append(source)
    results = [out for curved in calls for out in curved.results()]
    size = max(sum(out.numel() for out in results), 1)
    step = max(1, _PULLED // size)
    for start in range(0, len(groups), step):
        some = groups[start : start + step]
        rows = iter(_adjoint_tangents(arguments, [_chosen(s, some) for s in sources], results))
        with torch.no_grad():
            for curved in calls:
                several = [next(rows) if moves(o) else None for o in results_of(curved.call.out)]
                moving = several[0] if isinstance(curved.call.out, Tensor) else several
                if all(m is None for m in several):
                    moving = None
                with refusing(curved.call, curved.rule):
                    curved.rule.add_third(curved.call, curved.adjoint, moving, some, sums)


_PULLED = 1 << 26  # entries of adjoint tangents that are held at a time


def _adjoint_tangents(arguments: list[Tensor], sources: list[Tensor], results: list[Tensor]) -> Sequence[Tensor | None]:
    """The backward pass of many rows at once."""
    if not arguments:
        return [None] * len(results)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return torch.autograd.grad(
            arguments, results, sources, retain_graph=True, allow_unused=True, is_grads_batched=True
        )


def _chosen(source: tuple[Groups, Tensor], groups: Groups) -> Tensor:
    """The rows of some groups, zero where there are none."""
    own, rows = source
    if own == groups:
        return rows
    result = rows.new_zeros((len(groups), *rows.shape[1:]))
    both = tuple(g for g in groups if g in own)
    if both:
        result[rows_of(groups, both)] = rows[rows_of(own, both)]
    return result
