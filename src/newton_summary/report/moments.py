"""What a run's snapshots show: a heatmap, the strongest interactions and the advice at each of them, under a slider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from newton_summary._html import sentence
from newton_summary.report.reading import Record
from newton_summary.report.records import Snapshot
from newton_summary.report.text import code, escape, interval, number, percent, signed, table, times
from newton_summary.summary import Summary
from newton_summary.watch.advice import Advice, advise, correlations
from newton_summary.watch.words import UNMOVED

Moment = TypeVar("Moment")

_MOST_NUMBERED = 12
_MOST_PAIRS = 10
_MOST_ADVISED = 40
_MOST_CELLS = 80_000
_STRONG = 81  # percent: from here on light text on a dark cell reads better, or dark on light in dark mode
_SCALE = (
    '<div class="scale"><span>−1: help</span><span class="bar" aria-hidden="true"></span><span>+1: against</span></div>'
)


def slider(run: Record, key: str, runs: int) -> str:
    """The moments of a run, one at a time where scripts work, and all of them elsewhere.

    Args:
        run: with snapshots.
        key: an identifier within the page.
        runs: how many runs share the page: heatmaps of many groups are shown at fewer moments.
    """
    chosen = thinned(run.snapshots, len(run.sizes), runs)
    shown = "".join(_moment(run, snapshot) for snapshot in chosen)
    recorded = len(run.snapshots)
    left = f"{len(chosen)} of {recorded} moments that were recorded, so that the page stays small."
    return chooser("Epoch", key, len(chosen), shown) + (f'<p class="note">{left}</p>' if len(chosen) < recorded else "")


def chooser(title: str, key: str, count: int, moments: str) -> str:
    """A slider that shows one of some sections at a time, at first the last; where scripts do not work, all are there.

    Args:
        title: of what the slider chooses.
        key: an identifier within the page.
        count: of the sections.
        moments: the sections, each with a ``data-label``.
    """
    return (
        f'<div class="chooser" hidden><label for="{key}">{title}</label>'
        f'<input type="range" id="{key}" min="0" max="{count - 1}" step="1" value="{count - 1}" '
        f'data-moments="{key}-moments"><output for="{key}"></output></div><div id="{key}-moments">{moments}</div>'
    )


def thinned(moments: Sequence[Moment], groups: int, runs: int, most: int | None = None) -> list[Moment]:
    """As many moments as fit into a page of a reasonable size, evenly, the last always among them.

    Args:
        moments: in their order.
        groups: of which each has a heatmap.
        runs: that share the page.
        most: moments, in any case.
    """
    most = len(moments) if most is None else most
    count = max(1, min(len(moments), most, _MOST_CELLS // max(groups**2 * runs, 1)))
    places = [round(i * (len(moments) - 1) / (count - 1)) for i in range(count)] if count > 1 else [-1]
    return [moments[place] for place in places]


def when(run: Record, snapshot: Snapshot) -> str:
    """The moment of a snapshot, in words."""
    if snapshot.step == 0:
        return "0: the first step"
    name = f"{snapshot.epoch} of {run.config.epochs}"
    return f"{name}: the last step" if snapshot.epoch == run.config.epochs else f"{name}: step {snapshot.step + 1:,}"


def _moment(run: Record, snapshot: Snapshot) -> str:
    mean, along = Summary.mean(snapshot.summaries()), snapshot.along_the_step()
    advice = advise(along)
    label = when(run, snapshot)
    return (
        f'<section class="moment" data-label="{escape(label)}" aria-label="epoch {escape(label)}">'
        f'<h4>Epoch {escape(label)}</h4><div class="pair"><div>{heatmap(mean)}</div>'
        f"<div>{_strongest(mean)}</div></div>{_advice(advice, snapshot.still)}"
        f'<p class="note">Loss {number(mean.loss.item())} on {mean.weight:,.0f} training samples drawn for this '
        f"measurement. The step {_change(snapshot.actual_decrease, 'lowered', 'raised')}; its quadratic model says "
        f"that it {_change(advice.predicted_decrease, 'lowers', 'raises')}.</p></section>"
    )


def _change(decrease: float, down: str, up: str) -> str:
    return f"{down if decrease >= 0 else up} it by {number(abs(decrease))}"


def heatmap(summary: Summary) -> str:
    """H̄ as correlations, a table whose cells are coloured; with numbers in them where there are few groups."""
    matrix = correlations(summary)
    values = matrix.tolist()
    numbered = len(summary) <= _MOST_NUMBERED
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in summary.names)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(_cell(value, numbered) for value in row)}</tr>\n'
        for name, row in zip(summary.names, values, strict=True)
    )
    kind = "heatmap" if numbered else "heatmap dense"
    caption = "Interactions: H̄ as correlations"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table class="{kind}">'
        f"<caption>{caption}</caption><thead><tr><td></td>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>{_SCALE}"
    )


def _cell(value: float, numbered: bool) -> str:
    """A coloured cell, with its number in it or shown by the pointer."""
    share = min(round(100 * abs(value)), 100)
    kind = ("n" if value < 0 else "") + ("s" if share > _STRONG else "")
    start, shown = f"<td{f' class={kind}' if kind else ''} style=--v:{share}%", signed(value).removeprefix("+")
    return f"{start}>{shown}</td>" if numbered else f"{start} title={shown}></td>"


def _strongest(summary: Summary) -> str:
    """The pairs that interact most, with their entries of H̄."""
    if len(summary) < 2:
        return "<p>One group has nothing to interact with.</p>"
    matrix, hessian = correlations(summary), summary.tensor(2)
    rows, columns = torch.triu_indices(len(summary), len(summary), offset=1)
    order = matrix[rows, columns].abs().argsort(descending=True, stable=True)[:_MOST_PAIRS].tolist()
    found = [(int(rows[i]), int(columns[i])) for i in order]
    return table(
        "Strongest interactions",
        ("groups", "correlation", "H̄", "they"),
        [
            (
                f"{code(summary.names[i])} {code(summary.names[j])}",
                signed(float(matrix[i, j])),
                number(float(hessian[i, j])),
                _meaning(float(matrix[i, j])),
            )
            for i, j in found
        ],
        numbers=(1, 2),
    )


def _meaning(correlation: float) -> str:
    if abs(correlation) < 0.1:
        return "hardly interact"
    return "pull against each other" if correlation > 0 else "help each other"


def _advice(advice: Advice, still: Sequence[str]) -> str:
    """Factors on the step that was taken; of very many groups those that differ most from the rest."""
    groups = advice.ranked()[:_MOST_ADVISED] if len(advice) > _MOST_ADVISED else advice.groups
    rows = [
        (code(g.name), "not moved", "–", "–")
        if g.name in still
        else (code(g.name), times(g.alone), interval(g.low, g.high), times(g.joint))
        for g in groups
    ]
    header = ("group", "alone", f"{percent(advice.level, 0)} interval", "jointly")
    listed = table("Advice: factors on the step of each group", header, rows, numbers=(1, 2, 3))
    said = [sentence(words) for words in advice.sentences() if not words.endswith(UNMOVED)]  # the table says so
    words = (
        f"<ul>{''.join(f'<li>{one}</li>' for one in said[:_MOST_PAIRS])}</ul>" if said else "<p>Nothing stands out.</p>"
    )
    return f'<div class="pair"><div>{listed}</div><div class="words"><p class="heading">In words</p>{words}</div></div>'
