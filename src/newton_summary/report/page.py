"""The page: its sections in order, and the file that they become."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files as resources
from pathlib import Path
from string import Template

from newton_summary.errors import UsageError
from newton_summary.report import moments, watched
from newton_summary.report.charts import Line, chart, legend
from newton_summary.report.files import write_text
from newton_summary.report.monitor_log import MonitorLog, read_log
from newton_summary.report.reading import Record, read
from newton_summary.report.records import METRICS, Row
from newton_summary.report.text import code, escape, folded, number, percent, table

_MOST_ROWS = 200


def write(run: Path, path: Path | None = None, number: int | None = None) -> Path:
    """Writes the report of a run that a monitor watched, or of a run or a comparison of ``newton-summary``.

    Args:
        run: the file that ``Monitor(path=…)`` wrote, or the folder of ``newton-summary train`` or ``compare``.
        path: of the page.  Default: beside the file, with the ending ``.html``; ``report.html`` in the folder.
        number: of the run in a monitor's file to which several were appended, from 1.  Default: the last.

    Returns:
        The path.

    Raises:
        UsageError: there is no such run, a file is damaged, or the page cannot be written.
    """
    if run.is_file() and run.name != METRICS:
        content, place = render_log(read_log(run, number)), run.with_suffix(".html")
    elif number is not None:
        raise UsageError(f"a number is that of a run in the file of a Monitor, and {run} is none")
    else:
        folder = run.parent if run.is_file() else run
        content, place = render(read(folder)), folder / "report.html"
    place = path or place
    if place.exists() and run.is_file() and place.samefile(run):
        raise UsageError(f"the page would take the place of {run}: choose another one with --out")
    write_text(place, content)
    return place


def render_log(log: MonitorLog) -> str:
    """The page about a run that a monitor watched."""
    return _page(f"{log.name}: what the monitor says", watched.sections(log))


def render(runs: Sequence[Record]) -> str:
    """The page about some runs of one task.

    Args:
        runs: in the order in which they are shown.
    """
    task = runs[0].config.task
    names = list(dict.fromkeys(run.config.optimizer for run in runs))
    title = f"{task}: {names[0] if len(names) == 1 else f'{len(names)} optimizers side by side'}"
    sections = {
        "trained": ("What was trained", _trained(runs)),
        "curves": ("Curves", _curves(runs, names)),
        "interactions": ("Interactions and advice", _interactions(_first_of_each(runs))),
        "rates": ("Rates", _rates(_first_of_each(runs))),
        "environment": ("Environment", _environment(runs)),
    }
    return _page(title, sections)


def _page(title: str, sections: Mapping[str, tuple[str, str]]) -> str:
    """The page with a title and sections: by their anchors, each with its own title and its content."""
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_resource("page.html")).substitute(
        title=escape(title),
        style=_resource("page.css"),
        script=script,
        digest=digest,
        links="".join(f'<li><a href="#{key}">{name}</a></li>' for key, (name, _) in sections.items()),
        content="\n".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{name}</h2>\n{content}</section>'
            for key, (name, content) in sections.items()
        ),
        version=escape(version("newton-summary")),
    )


def _resource(name: str) -> str:
    return (resources("newton_summary.report") / name).read_text(encoding="utf-8")


def _first_of_each(runs: Sequence[Record]) -> list[Record]:
    """The first run of each optimizer."""
    return list({run.config.optimizer: run for run in reversed(runs)}.values())[::-1]


# Sections -------------------------------------------------------------------------------------------------------------


def _trained(runs: Sequence[Record]) -> str:
    first = runs[0]
    facts = {"Task": code(first.config.task)}
    sizes = next((run.sizes for run in runs if run.sizes), {})
    if sizes:
        facts["Model"] = f"{sum(sizes.values()):,} parameters in {len(sizes)} group{'s' if len(sizes) > 1 else ''}"
    data = first.data
    facts["Data"] = (
        f"{data.get('train', 0):,} samples to train on, {data.get('validation', 0):,} to validate; digest "
        f"{code(data.get('digest', '–'))}"
    )
    listed = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in facts.items())
    header = ("run", "rate", "training loss", "validation loss", "accuracy", "seconds", "state")
    rows = [
        (
            escape(run.label),
            number(run.config.lr),
            number(run.rows[-1].train_loss),
            number(run.rows[-1].validation_loss),
            percent(run.rows[-1].validation_accuracy),
            f"{run.rows[-1].seconds:.1f}",
            escape(run.state + _failures(run.rows[-1])),
        )
        for run in runs
    ]
    groups = [(code(name), f"{size:,}") for name, size in sizes.items()]
    return (
        f'<dl class="facts">{listed}</dl>'
        + table("Where each run ended", header, rows, numbers=(1, 2, 3, 4, 5))
        + '<p class="note">The rate is the learning rate; for newton-summary it is λ<sub>1</sub>, a scale without '
        "units on the rates that it measures. Seconds are those of training steps and measurements.</p>"
        + (
            folded("Groups of parameters", table("Groups", ("group", "parameters"), groups, numbers=(1,)))
            if sizes
            else ""
        )
    )


def _failures(row: Row) -> str:
    failed = row.counts.get("failed", 0)
    return f"; {failed} of {row.counts.get('measured', 0)} measurements failed" if failed else ""


def _curves(runs: Sequence[Record], names: Sequence[str]) -> str:
    colours = {name: f"var(--line{i % 6})" for i, name in enumerate(names)}

    def lines(x: str, y: str) -> list[Line]:
        return [
            Line(
                run.label,
                [(getattr(row, x), getattr(row, y)) for row in run.rows],
                colours[run.config.optimizer],
                ends_in_cross=run.rows[-1].diverged,
            )
            for run in runs
        ]

    charts = (
        chart("Training loss", "epoch", "loss", lines("epoch", "train_loss")),
        chart("Validation loss", "epoch", "loss", lines("epoch", "validation_loss")),
        chart("Training loss against time", "seconds of training", "loss", lines("seconds", "train_loss")),
    )
    keys = legend([Line(name, (), colours[name]) for name in names])
    return f'{keys}<div class="charts">{"".join(charts)}</div>{folded("Figures of every epoch", _epochs(runs))}'


def _epochs(runs: Sequence[Record]) -> str:
    header = ("run, epoch", "step", "training loss", "validation loss", "accuracy", "seconds", "rate")
    every = -(-sum(len(run.rows) for run in runs) // _MOST_ROWS)
    rows = [
        (
            f"{escape(run.label)}, epoch {row.epoch}",
            f"{row.step:,}",
            number(row.train_loss, 4),
            number(row.validation_loss, 4),
            percent(row.validation_accuracy),
            f"{row.seconds:.1f}",
            number(row.lr),
        )
        for run in runs
        for row in [*run.rows[:-1:every], run.rows[-1]]
    ]
    caption = "Every epoch" if every == 1 else f"Every {every} epochs"
    return table(caption, header, rows, numbers=range(1, 7))


def _interactions(runs: Sequence[Record]) -> str:
    watched = [run for run in runs if run.snapshots]
    if not watched:
        return "<p>These runs recorded no interactions.</p>"
    parts = [
        f"<h3>{escape(run.label)}</h3>{moments.slider(run, f'run{i}', len(watched))}" for i, run in enumerate(watched)
    ]
    return (
        "<p>At chosen epochs the loss was measured along the very step that the optimizer took (and along the gradient "
        "for groups that it left where they were). <strong>Red</strong> cells are pairs of groups that pull against "
        "each other: a step of one makes the best step of the other shorter. <strong>Blue</strong> cells are pairs "
        "that help each other. Along the diagonal −1 is a group whose own curvature is negative; beyond ±1 some joint "
        "step of two groups curves downwards.</p>"
        "<p>The advice has factors on the step of each group, and 1 leaves it as it is: <em>alone</em> is best while "
        "all others keep still, <em>jointly</em> counts the interactions. It is about one step, so compare groups with "
        "each other before you take the size of a factor at its word.</p>" + "".join(parts)
    )


def _rates(runs: Sequence[Record]) -> str:
    measured = [run for run in runs if any(row.rates for row in run.rows)]
    plain = [run for run in runs if run not in measured]
    words = "".join(
        f"<p>{escape(run.config.optimizer)} trains all groups with one learning rate, {number(run.rows[0].lr)}"
        f"{_changed(run)}.</p>"
        for run in plain
    )
    return words + "".join(_rates_of(run) for run in measured)


def _changed(run: Record) -> str:
    last = run.rows[-1].lr
    return "" if last == run.rows[0].lr else f" at first and {number(last)} in the end"


def _rates_of(run: Record) -> str:
    rows = [row for row in run.rows if row.rates]
    names = list(rows[0].rates)
    lines = [
        Line(
            name,
            [(row.step, row.rates.get(name)) for row in rows],
            f"oklch(var(--lightness) 0.13 {round(265 - 235 * i / max(len(names) - 1, 1)) % 360})",
            dashed=name.rpartition(".")[2] in ("bias", "biases"),
        )
        for i, name in enumerate(names)
    ]
    drawn = chart(f"{run.label}: rate of every group", "step", "rate η", lines, width=560)
    ends = [(code(name), number(rows[0].rates[name]), number(rows[-1].rates.get(name))) for name in names]
    listed = table("Rates", ("group", "after an epoch", "in the end"), ends, numbers=(1, 2))
    return (
        f'<div class="pair"><div>{drawn}{legend(lines)}</div><div>{listed}</div></div>'
        '<p class="note">λ<sub>1</sub> left out. Biases are dashed; a rate of 0 leaves a gap.</p>'
    )


def _environment(runs: Sequence[Record]) -> str:
    used: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        for environment in run.environments:
            used.setdefault(tuple((key, str(value)) for key, value in environment.items()), []).append(run.label)
    keys = list(dict.fromkeys(key for environment in used for key, _ in environment))
    rows = [
        (
            escape("all runs" if len(labels) == len(runs) else "; ".join(labels)),
            *(escape(dict(e).get(k, "–")) for k in keys),
        )
        for e, labels in used.items()
    ]
    return table("Versions and settings", ("runs", *map(escape, keys)), rows)
