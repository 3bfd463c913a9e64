"""The tables of docs/reproduction.md, and how they are put into it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median

from newton_summary.errors import UsageError
from newton_summary_experiments import analysis, claims
from newton_summary_experiments.files import write_text
from newton_summary_experiments.reproduction import (
    DEFAULT,
    LABELS,
    NETWORKS,
    OPTIMIZERS,
    SEARCHED,
    Reproduction,
)
from newton_summary_experiments.search import PAPER


def rewrite(path: Path, tables: Mapping[str, str]) -> None:
    """Puts each table between its markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        UsageError: the page is missing, or has no such markers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the page {path} ({error.strerror}): name it with --page") from error
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise UsageError(f"{path} has no place for {name}: put <!-- begin {name} --> and <!-- end {name} --> there")
        text = pattern.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)  # type: ignore[misc]
    write_text(path, text)


def tables(study: Reproduction) -> dict[str, str]:
    """All tables of the page that a budget changes, in Markdown; names of those of the paper's own size say so."""
    makers: dict[str, Callable[[Reproduction], str]] = {
        "setup": setup,
        "losses": losses,
        "times": times,
        "equal-time": equal_time,
        "hyperparameters": hyperparameters,
        "blocks": blocks,
        "rates": rates,
    }
    prefix = "" if study.budget == "quick" else f"{study.budget}-"
    found = {f"{prefix}{name}": make(study) for name, make in makers.items()}
    if study.budget == "quick":
        found["summary-costs"] = summary_costs(study)
    return {**found, "claims": claims.table(study)}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def setup(study: Reproduction) -> str:
    """What is trained."""
    rows = []
    for name in study.tasks:
        task, data = study.task(name), study.samples(name)
        model = task.make_model(0)
        count, size = len(data.train[1]), sum(p.numel() for p in model.parameters())
        steps = task.epochs * (count // task.batch_size)
        cells = (NETWORKS[name], task.network, f"{size:,}", str(len(task.partition(model))), f"{count:,}")
        rows.append((*cells, str(steps), str(len(study.seeds(name)))))
    return markdown(("", "network", "P", "S", "images", "steps", "seeds"), rows)


def losses(study: Reproduction) -> str:
    """The final losses: the median over seeds, and the worst."""
    rows = []
    for optimizer in OPTIMIZERS:
        cells = [LABELS[optimizer]]
        for name in study.tasks:
            final = [analysis.final_loss(rows) for rows in study.all_rows(name, optimizer)]
            accuracy = [rows[-1].validation_accuracy for rows in study.all_rows(name, optimizer)]
            diverged = sum(map(math.isinf, final))
            note = f", {diverged} of {len(final)} diverged" if diverged else ""
            planned = len(study.seeds(name, optimizer))
            note += f", {len(final)} of {planned} seeds" if len(final) < planned else ""
            if not final:
                cells.append("not run")
            else:
                cells.append(f"{median(final):.2e} ({max(final):.1e}){note}; {median(accuracy):.1%}")
        rows.append(cells)
    return markdown(("", *(NETWORKS[name] for name in study.tasks)), rows)


def times(study: Reproduction) -> str:
    """Seconds of an epoch."""
    rows = []
    for optimizer in OPTIMIZERS:
        cells = [LABELS[optimizer]]
        for name in study.tasks:
            seconds = claims.epoch_seconds(study, name, optimizer)
            adam = claims.epoch_seconds(study, name, "adam")
            cells.append(f"{seconds:.2f} ({seconds / adam:.1f})" if seconds and adam else "not measured")
        rows.append(cells)
    return markdown(("", *(NETWORKS[name] for name in study.tasks)), rows)


def equal_time(study: Reproduction) -> str:
    """The default against each other optimizer, when the faster of both has ended."""
    rows = []
    for name in study.tasks:
        cells = [NETWORKS[name]]
        for rival in SEARCHED:
            found = claims.at_equal_time(study, name, DEFAULT, rival)
            if found is None:
                cells.append("not run")
                continue
            seconds, ours, theirs = found
            ratio = ours / theirs
            cells.append(f"{ours:.2e} / {theirs:.2e} = {ratio:.2g}, after {seconds:.0f} s")
        rows.append(cells)
    footer = ["geometric mean of ratios"]
    for rival in SEARCHED:
        ratios = [
            found[1] / found[2]
            for name in study.tasks
            if (found := claims.at_equal_time(study, name, DEFAULT, rival)) and 0 < found[1] / found[2] < math.inf
        ]
        footer.append(f"{geometric_mean(ratios):.2g} (of {len(ratios)})" if ratios else "")
    return markdown(("", *(LABELS[rival] for rival in SEARCHED)), [*rows, footer])


def hyperparameters(study: Reproduction) -> str:
    """What the searches chose: the paper's table 2."""
    rows = []
    for optimizer in SEARCHED:
        cells = [LABELS[optimizer]]
        for name in study.tasks:
            search = study.searches.get((name, optimizer))
            if search is None:
                cells.append("not searched")
                continue
            symbols = {"lr": "λ_1" if optimizer == PAPER else "rate", "regularization": "λ_int", "damping": "damping"}
            chosen = ", ".join(f"{symbols[key]} {value:g}" for key, value in search.best.items())
            cells.append(f"{chosen}{' (edge)' if search.at_edge else ''}")
        rows.append(cells)
    rows.append([LABELS[DEFAULT], *["nothing set"] * len(study.tasks)])
    return markdown(("", *(NETWORKS[name] for name in study.tasks)), rows)


def blocks(study: Reproduction) -> str:
    """The share of the norm off the diagonal blocks."""
    rows = []
    for name in study.tasks:
        for moment, (_, summary) in claims.moments(study, name).items():
            layers = analysis.layers_of(summary.names)
            matrix = summary.tensor(2)
            pair = (matrix, analysis.inverse(matrix))
            raw = [f"{analysis.share_off_blocks(m, layers):.2f}" for m in pair]
            unit = [f"{analysis.share_off_blocks(analysis.unit_diagonal(m), layers):.2f}" for m in pair]
            rows.append((NETWORKS[name], moment, *raw, *unit))
    header = ("", "when", "H̄", "H̄⁻¹", "H̄, unit diagonal", "H̄⁻¹, unit diagonal")
    return markdown(header, rows)


def rates(study: Reproduction) -> str:
    """What the rates of the paper's method did."""
    rows = []
    for name in study.tasks:
        for optimizer in (PAPER, DEFAULT):
            runs = study.all_rows(name, optimizer)
            if not runs:
                continue
            ratio = analysis.over_training(runs, analysis.biases_to_weights)
            spread = analysis.over_training(runs, analysis.decades)
            zero = [sum(r == 0 for r in row.rates.values()) / len(row.rates) for x in runs for row in x if row.rates]
            cells = [f"{value:.1f}" if value is not None else "none" for value in (ratio, spread)]
            rows.append((NETWORKS[name], LABELS[optimizer], *cells, f"{sum(zero) / len(zero):.0%}"))
    return markdown(("", "", "rate of a bias / of its weight", "decades from smallest to largest", "rates of 0"), rows)


def summary_costs(study: Reproduction) -> str:
    """The paper's table 1, measured."""
    rows = []
    for row in study.measured("summary-costs") or []:
        size = f"{row['entries']:,}"
        full = f"{row['full']:.1e}"
        cells = (f"{row['parameters']:,}", str(row["groups"]), str(row["order"]), size, full)
        rows.append((*cells, f"{row['nested']:.1f}", f"{row['forward']:.1f}"))
    return markdown(("P", "S", "d", "entries of the summary", "of the full derivative", "nested", "forward"), rows)
