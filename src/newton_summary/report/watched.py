"""The page about a run that a monitor watched: what is wrong first, then the picture, then how it came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from newton_summary._html import sentence
from newton_summary.report import factors
from newton_summary.report.charts import Line, chart, legend
from newton_summary.report.moments import chooser, heatmap, thinned
from newton_summary.report.monitor_log import Entry, MonitorLog
from newton_summary.report.text import code, escape, folded, interval, number, percent, quiet, table, times
from newton_summary.watch.record import Record
from newton_summary.watch.words import DISTINCT, SHARED_NOISE, tells

_MOST_TOLD = 100
_MOST_MOMENTS = 60


def sections(log: MonitorLog) -> dict[str, tuple[str, str]]:
    """The parts of the page by their anchors: a title, and the content."""
    return {
        "advice": ("What is wrong", _advice(log)),
        "training": ("Over training", _training([entry.record for entry in log.entries])),
        "moments": ("Every measurement", _moments(log)),
        "file": ("What was read", _file(log)),
    }


# What is wrong --------------------------------------------------------------------------------------------------------


def _advice(log: MonitorLog) -> str:
    record = log.entries[-1].record
    return (
        f'<p class="headline">{_said(headline(record))}.</p>'
        f'<p class="note">{_source(record)}</p>'
        f'<div class="pair"><div>{factors.picture(record)}{_key(record)}</div>{_words(record)}</div>'
        + folded("Figures of every group", _figures(record))
    )


def _step(record: Record) -> int:
    """Of the step that was measured: the first one is 1, everywhere on the page."""
    return record.step + 1


def headline(record: Record) -> str:
    """The one sentence to read first; files of before it was written have words of groups alone."""
    return record.headline or next((words for words in record.words if words), "nothing stands out")


def _source(record: Record) -> str:
    count = f"from {record.batches} batch{'es' if record.batches != 1 else ''}, " if record.batches else ""
    part = f"the last one measured on {record.measured_on}, " if 0 < record.samples < record.available else ""
    return f"The advice before step {_step(record):,}, {count}{part}where the loss was {number(record.loss)}."


def _key(record: Record) -> str:
    """How to read the picture."""
    between = f"{percent(record.level, 0)} intervals" if not math.isnan(record.level) else "intervals"
    coloured = any(tells(words) for words in record.words)
    band = (
        f"The band reaches from {number(1 / DISTINCT, 2)} to {number(DISTINCT, 2)} times the middle of all factors: "
        "consecutive steps share noise that may explain so much. "
    )
    return (
        f'<p class="note">Dots with {between}. '
        + ("<strong>Coloured</strong>: what the advice speaks of. " if coloured else "")
        + "<strong>Grey</strong>: what one step cannot tell. "
        + (band if record.middle > 0 else "")
        + f"Dots to the right of 1× say little about all rates until they are beyond {number(SHARED_NOISE)}×: the best "
        "next step is longer than the best rate for many.</p>"
    )


def _words(record: Record) -> str:
    """All sentences but the one that stands above, where that is a sentence of its own."""
    rest = [words for words in record.sentences or record.words if words and words != headline(record)]
    listed = "".join(f"<li>{_said(words)}.</li>" for words in rest)
    return f'<div class="words"><p class="heading">In words</p><ul>{listed}</ul></div>' if rest else ""


def _figures(record: Record) -> str:
    level = "interval" if math.isnan(record.level) else f"{percent(record.level, 0)} interval"
    header = ("group", "learning rate", "alone", level, "jointly")
    rows = []
    for i, name in enumerate(record.names):
        cells = (
            code(name),
            number(record.learning_rates[i]),
            times(record.alone[i]),
            interval(record.low[i], record.high[i]),
            times(record.joint[i]),
        )
        rows.append(cells if tells(record.words[i]) else tuple(map(quiet, cells)))
    return table("Factors on the learning rates, for one step", header, rows, numbers=(1, 2, 3, 4))


# How it came ----------------------------------------------------------------------------------------------------------


def _training(records: Sequence[Record]) -> str:
    losses = Line("loss", [(_step(r), r.loss) for r in records], "var(--line0)")
    predicted = [(_step(r), r.predicted_decrease) for r in records]
    model = Line("predicted by the quadratic model", predicted, "var(--line3)", True)
    actual = Line("what the step did", [(_step(r), r.actual_decrease) for r in records], "var(--line0)")
    lines = _lines(records)
    loud = [line for line in lines if line.colour != _GREY]
    charts = (
        chart("Loss on the measured batches", "step", "loss", [losses], signed=True),
        chart("Factor on each group's learning rate", "step", "factor", lines),
        chart("Decrease of the loss in one step", "step", "decrease", [model, actual]),
    )
    note = "Gaps are factors of 0 or infinity, and steps that raised the loss."
    return (
        f'<div class="charts">{"".join(charts)}</div>{legend([*loud, model, actual])}<p class="note">{note}</p>'
        + _told(records)
    )


_GREY = "var(--quiet)"


def _lines(records: Sequence[Record]) -> list[Line]:
    """The factor of every group, of which in the end those are coloured that the advice then speaks of."""
    last = records[-1]
    loud = [name for name, words in zip(last.names, last.words, strict=True) if tells(words)][:6]
    colours = {name: f"var(--line{(i + 1) % 6})" for i, name in enumerate(loud)}
    order = sorted(range(len(last.names)), key=lambda i: last.names[i] in colours)  # the coloured ones on top
    return [
        Line(last.names[i], [(_step(r), r.alone[i]) for r in records], colours.get(last.names[i], _GREY)) for i in order
    ]


def _told(records: Sequence[Record]) -> str:
    """What was said first at each measurement; what was said again and again is one row."""
    spans = [list(span) for _, span in groupby(records, key=headline)]
    rows = [
        (
            f"{_step(span[0]):,}" + (f" – {_step(span[-1]):,}" if len(span) > 1 else ""),
            f'<span class="said">{_said(headline(span[0]))}</span>',
        )
        for span in spans[-_MOST_TOLD:]
    ]
    left = f'<p class="note">The last {_MOST_TOLD} of {len(spans)}.</p>' if len(spans) > _MOST_TOLD else ""
    return table("What was said first", ("before step", "sentence"), rows) + left


# Every measurement ----------------------------------------------------------------------------------------------------


def _moments(log: MonitorLog) -> str:
    chosen = thinned(log.entries, len(log.entries[-1].record.names), 1, most=_MOST_MOMENTS)
    content = "".join(_moment(entry) for entry in chosen)
    left = f"{len(chosen)} of {len(log.entries)} measurements, so that the page stays small."
    introduction = (
        "<p><strong>Red</strong> cells are pairs of groups that pull against each other: a step of one makes the best "
        "step of the other shorter. <strong>Blue</strong> cells are pairs that help each other. Along the diagonal −1 "
        "is a group whose own curvature is negative.</p>"
    )
    return (
        (introduction if any(entry.correlations for entry in chosen) else "")
        + chooser("Step", "measured", len(chosen), content)
        + (f'<p class="note">{left}</p>' if len(chosen) < len(log.entries) else "")
    )


def _moment(entry: Entry) -> str:
    record = entry.record
    label = f"{_step(record):,}"
    drawn = heatmap(entry.correlations) if entry.correlations else "<p>The interactions were not written.</p>"
    return (
        f'<section class="moment" data-label="{label}" aria-label="step {label}"><h4>Step {label}</h4>'
        f"<p>{_said(headline(record))}.</p>"
        f'<div class="pair"><div>{factors.picture(record)}</div><div>{drawn}</div></div></section>'
    )


# What was read --------------------------------------------------------------------------------------------------------


def _file(log: MonitorLog) -> str:
    first, last = log.entries[0].record, log.entries[-1].record
    facts = {
        "File": code(log.name),
        "Measurements": f"{len(log.entries):,}, before steps {_step(first):,} to {_step(last):,}",
        "Groups": f"{len(last.names)}",
        "Loss": f"{number(first.loss)} at first, {number(last.loss)} in the end",
    }
    notes = []
    if log.runs > 1:
        notes.append(
            f"The file has {log.runs} runs, each of which counts its steps from 0: this is number {log.number}. "
            f"{code('--number')} chooses another."
        )
    if log.cut_off:
        notes.append("The last line of the file is not whole, and was left out: the run was killed, or is still going.")
    listed = "".join(f"<div><dt>{escape(key)}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    return f'<dl class="facts">{listed}</dl>' + "".join(f"<p>{note}</p>" for note in notes)


def _said(words: str) -> str:
    """A sentence for the page, with a capital letter unless it begins with a name."""
    markup = sentence(words)
    return markup[:1].upper() + markup[1:]
