"""The paper's figures, drawn for print: what they show is in docs/reproduction.md.

Colours are those of Okabe and Ito and two colour maps that can be told apart with every common kind of colour
blindness; every figure comes as PNG and as PDF.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from newton_summary.plots.parts import SERIES, Axes, Figure, colormaps, draw_matrix, is_bias, layer, quiet
from newton_summary.report.records import Row
from newton_summary.summary import Summary
from newton_summary_experiments.analysis import inverse, layers_of, unit_diagonal
from newton_summary_experiments.costs import StepCost
from newton_summary_experiments.files import write_atomically

_LINES = (
    (SERIES[0], "-", 1.2),
    (SERIES[5], "--", 1.2),
    (SERIES[2], "-.", 1.2),
    (SERIES[1], ":", 1.8),
    (SERIES[6], "-", 1.6),
)
"""Colour, style and width of each optimizer's line, in their order."""

_MOST_NAMES = 30


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as PNG and PDF.

    Raises:
        UsageError: it cannot be written.
    """
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    for path in paths:
        write_atomically(path, partial(_write, figure, path.suffix[1:]))
    return paths


def _write(figure: Figure, kind: str, path: Path) -> None:
    if kind == "png":
        figure.savefig(path, format=kind, dpi=110, metadata={"Software": None}, pil_kwargs={"optimize": True})
    else:
        figure.savefig(path, format=kind, metadata={"CreationDate": None})


# Interactions (figures 1, 2 and 5) ------------------------------------------------------------------------------------


def heatmaps(moments: Mapping[str, Summary], title: str) -> Figure:
    """H̄ and H̄⁻¹ in blocks, weights first, a row for each moment of the training; each panel on its own scale."""
    figure = Figure(figsize=(7.2, 3.35 * len(moments)), layout="constrained")
    panels = figure.subplots(len(moments), 2, squeeze=False)
    for (name, summary), row in zip(moments.items(), panels, strict=True):
        order, names = _by_kind(summary)
        for ax, matrix, symbol, unit in (
            (row[0], summary.tensor(2), "H̄", "loss"),
            (row[1], inverse(summary.tensor(2)), "H̄⁻¹", "1 / loss"),
        ):
            draw_matrix(ax, matrix[order][:, order], names, unit)
            _name_groups(ax, names)
            _mark_blocks(ax, summary)
            ax.set_title(f"{symbol}, {name}", fontsize=9, pad=14)
    figure.suptitle(title, fontsize=11)
    return figure


def normalised_heatmaps(moments: Mapping[str, Summary], title: str) -> Figure:
    """H̄ and H̄⁻¹ scaled to a unit diagonal, all on one linear scale, so that they can be compared."""
    figure = Figure(figsize=(7.2, 3.2 * len(moments)), layout="constrained")
    panels = figure.subplots(len(moments), 2, squeeze=False)
    image = None
    for (name, summary), row in zip(moments.items(), panels, strict=True):
        order, names = _by_kind(summary)
        for ax, matrix, symbol in ((row[0], summary.tensor(2), "H̄"), (row[1], inverse(summary.tensor(2)), "H̄⁻¹")):
            values = unit_diagonal(matrix)[order][:, order]
            image = ax.imshow(values.numpy(), cmap=colormaps["RdBu_r"], vmin=-1, vmax=1, interpolation="nearest")
            _name_groups(ax, names)
            _mark_blocks(ax, summary)
            ax.set_title(f"{symbol}, {name}", fontsize=9, pad=14)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, shrink=0.6, extend="both")
    bar.set_label("entry / √|product of the diagonal entries|", fontsize=8)
    bar.ax.tick_params(which="both", labelsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def _by_kind(summary: Summary) -> tuple[list[int], list[str]]:
    """The order that puts weights before biases, and the names of layers in it."""
    order = sorted(range(len(summary)), key=lambda i: is_bias(summary.names[i]))
    return order, [layer(summary.names[i]) for i in order]


def _name_groups(ax: Axes, names: Sequence[str]) -> None:
    stride = -(-len(names) // _MOST_NAMES)
    places = range(0, len(names), stride)
    size = max(4.0, min(8.0, 130 / len(places)))
    ax.set_xticks(places, [names[i] for i in places], rotation=90, fontsize=size)
    ax.set_yticks(places, [names[i] for i in places], fontsize=size)
    ax.tick_params(length=2)


def _mark_blocks(ax: Axes, summary: Summary) -> None:
    """Lines between weights and biases, and their names above and beside."""
    weights, count = sum(not is_bias(name) for name in summary.names), len(summary)
    ax.axhline(weights - 0.5, color="black", linewidth=0.8)
    ax.axvline(weights - 0.5, color="black", linewidth=0.8)
    for text, middle in (("weights", weights / 2 / count), ("biases", (weights + count) / 2 / count)):
        ax.annotate(text, (middle, 1.01), xycoords="axes fraction", ha="center", va="bottom", fontsize=7)
        ax.annotate(text, (1.01, 1 - middle), xycoords="axes fraction", va="center", fontsize=7, rotation=270)


# Rates (figures 3 and 6) ----------------------------------------------------------------------------------------------


_AS_GOOD_AS_ZERO = 1e-15  # moves weights by less than their rounding, unless gradients are huge


def _drawn(rate: float) -> float:
    """A rate as a point of a line; NaN, which interrupts it, where the rate is as good as 0."""
    return rate if rate > _AS_GOOD_AS_ZERO else math.nan


def _epochs(rows: Sequence[Row], among: Sequence[Sequence[Row]]) -> list[float]:
    """Epochs trained at each row, parts of one included; how long one is, is known from runs with a whole one."""
    length = min((row.step / row.epoch for run in among for row in run if row.epoch), default=1.0)
    return [row.step / length for row in rows]


def rates(histories: Mapping[str, Sequence[Row]], title: str) -> Figure:
    """Every group's rate over training: a row for each network, weights on the left, biases on the right, on one scale.

    Rates that are 0, or as good as that (those of a dead network fall without end), interrupt a line, and are marked at
    the foot of the panel.  Where every network has one rate alone, all are in one panel.
    """
    if all(len(row.rates) <= 1 for rows in histories.values() for row in rows):
        return _single_rates(histories, title)
    figure = Figure(figsize=(7.2, 2.3 * len(histories)), layout="constrained")
    panels = figure.subplots(len(histories), 2, squeeze=False, sharex="row", sharey="row")
    for (name, rows), pair in zip(histories.items(), panels, strict=True):
        known = [row for row in rows if row.rates]
        epochs = _epochs(known, [rows])
        groups = list(known[0].rates)
        layers = list(dict.fromkeys(layers_of(groups)))
        positive = [rate for row in known for rate in row.rates.values() if rate > _AS_GOOD_AS_ZERO]
        floor = 10 ** (math.log10(min(positive)) - 0.08 * (math.log10(max(positive) / min(positive)) + 1))
        kinds = {False: "weights", True: "biases"} if any(map(is_bias, groups)) else {False: "all parameters"}
        for ax, biases in zip(pair, (False, True), strict=True):
            if biases not in kinds:
                ax.set_visible(False)
                continue
            for group in (g for g in groups if is_bias(g) == biases):
                share = layers.index(layer(group)) / max(len(layers) - 1, 1)
                values = [_drawn(row.rates[group]) for row in known]
                zeros = [x for x, row in zip(epochs, known, strict=True) if row.rates[group] <= _AS_GOOD_AS_ZERO]
                label = layer(group) if len(layers) <= 10 or share in (0.0, 1.0) else None
                colour = colormaps["viridis"](0.9 * share)
                ax.plot(epochs, values, color=colour, linewidth=1.2, marker=".", markersize=3, label=label)
                ax.plot(zeros, [floor] * len(zeros), "|", color=colour, markersize=5)
            ax.axhline(floor, color="0.6", linewidth=0.6, linestyle=":")
            ax.annotate("0", (1.01, floor), xycoords=("axes fraction", "data"), fontsize=6, va="center")
            ax.set_yscale("log")
            quiet(ax)
            ax.tick_params(which="both", labelsize=7)
            ax.set_title(f"{name}: {kinds[biases]}", fontsize=9)
        pair[0].set_ylabel("rate η", fontsize=8)
        if len(kinds) > 1:
            pair[1].legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.04, 0.5))
    for ax in panels[-1]:
        ax.set_xlabel("epoch", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def _single_rates(histories: Mapping[str, Sequence[Row]], title: str) -> Figure:
    """The one rate of each network over training."""
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    ax = figure.subplots()
    for (name, rows), colour in zip(histories.items(), SERIES, strict=False):
        known = [row for row in rows if row.rates]
        x, y = _epochs(known, [rows]), [_drawn(rate) for row in known for rate in row.rates.values()]
        ax.plot(x, y, color=colour, linewidth=1.3, marker=".", markersize=4, label=name)
    ax.set_yscale("log")
    ax.set_xlabel("epoch", fontsize=8)
    ax.set_ylabel("rate η (a line is broken where it is 0)", fontsize=8)
    ax.tick_params(which="both", labelsize=7)
    quiet(ax)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    ax.set_title(title, fontsize=10)
    return figure


# Losses (figures 4 and 7) ---------------------------------------------------------------------------------------------


def losses(
    tasks: Mapping[str, Mapping[str, Sequence[Sequence[Row]]]],
    costs: Mapping[str, Mapping[str, StepCost]],
    labels: Mapping[str, str],
) -> Figure:
    """Training loss against epochs and processor time: medians, and the spread over seeds; × where runs diverged.

    Args:
        tasks: for each network the runs of each optimizer.
        costs: for each network the cost of a step of each.
        labels: what optimizers are called.
    """
    figure = Figure(figsize=(7.2, 2.3 * len(tasks) + 0.4), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for (name, optimizers), pair in zip(tasks.items(), panels, strict=True):
        every = [rows for runs in optimizers.values() for rows in runs]
        top = 1.6 * max(rows[0].train_loss or 1.0 for rows in every)
        for number, optimizer in enumerate(labels):
            runs, cost = optimizers.get(optimizer, []), costs[name].get(optimizer)
            if runs and cost is not None:
                epochs = [_epochs(rows, every) for rows in runs]
                _draw_losses(pair, runs, epochs, cost, _LINES[number], labels[optimizer], top)
        pair[0].set_ylabel(f"{name}\ntraining loss", fontsize=8)
        for ax in pair:
            ax.set_yscale("log")
            ax.set_ylim(top=top)
            quiet(ax)
            ax.tick_params(which="both", labelsize=7)
    panels[-1][0].set_xlabel("epoch", fontsize=8)
    panels[-1][1].set_xlabel("processor time of training, seconds", fontsize=8)
    lines = {
        line.get_label(): line for ax in panels[:, 0] for line in ax.get_lines() if line.get_label() in labels.values()
    }
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _draw_losses(
    pair: Sequence[Axes],
    runs: Sequence[Sequence[Row]],
    epochs: Sequence[Sequence[float]],
    cost: StepCost,
    line: tuple[str, str, float],
    label: str,
    top: float,
) -> None:
    colour, style, width = line
    length = max(len(rows) for rows in runs)
    whole = [rows for rows in runs if len(rows) == length]
    values = [[row.train_loss or math.nan for row in column] for column in zip(*whole, strict=True)]
    middle = [median(column) for column in values]
    low, high = [min(column) for column in values], [max(column) for column in values]
    seconds = [median(cost.seconds(row) for row in column) for column in zip(*whole, strict=True)]
    for ax, x in zip(pair, (max(epochs, key=len), seconds), strict=True):
        ax.plot(x, middle, style, color=colour, linewidth=width, label=label)
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for rows, places in zip(runs, epochs, strict=True):
        if rows[-1].diverged:
            known = [
                (x, row, row.train_loss) for x, row in zip(places, rows, strict=True) if row.train_loss is not None
            ]
            epoch, row, loss = known[-1]
            for ax, at in zip(pair, (epoch, cost.seconds(row)), strict=True):
                ax.plot([at], [min(loss, top)], "x", color=colour, markersize=7, clip_on=False)


# The invariance -------------------------------------------------------------------------------------------------------


def invariance(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Figure:
    """Batch losses in both parameterisations, a column for each method, and how far they are apart."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    panels = figure.subplots(2, len(curves), sharex=True, sharey="row", height_ratios=(3, 2), squeeze=False)
    for (name, (standard, other)), upper, lower in zip(curves.items(), panels[0], panels[1], strict=True):
        upper.plot(standard, color=SERIES[0], linewidth=1.2, label="standard")
        upper.plot(other, "--", color=SERIES[1], linewidth=1.2, label="NTK")
        apart = [max(abs(a - b) / a, 1e-17) for a, b in zip(standard, other, strict=True)]
        lower.plot(apart, color=SERIES[2], linewidth=1.0)
        upper.set_title(name, fontsize=9)
        lower.set_xlabel("step", fontsize=8)
        for ax in (upper, lower):
            ax.set_yscale("log")
            ax.tick_params(which="both", labelsize=7)
            quiet(ax)
    panels[0][0].set_ylabel("loss of the batch", fontsize=8)
    panels[1][0].set_ylabel("relative difference", fontsize=8)
    panels[0][0].legend(fontsize=7, frameon=False, loc="lower left")
    figure.suptitle(title, fontsize=11)
    return figure


# Costs (table 1) ------------------------------------------------------------------------------------------------------


def costs(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What a summary costs against S, for each order and engine, in gradients; a panel for each network size."""
    sizes = sorted({row["parameters"] for row in rows})
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for ax, size in zip(panels, sizes, strict=True):
        for order in (1, 2, 3):
            part = [row for row in rows if row["parameters"] == size and row["order"] == order]
            for engine, style in (("nested", "--"), ("forward", "-")):
                x, y = [row["groups"] for row in part], [row[engine] for row in part]
                ax.plot(x, y, style, marker="o", markersize=3, color=SERIES[order - 1], label=f"d = {order}, {engine}")
        ax.set_xscale("log")
        ax.set_yscale("log")
        groups = sorted({row["groups"] for row in rows})
        ax.set_xticks(groups, [str(count) for count in groups])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("groups S", fontsize=8)
        ax.set_title(f"P = {size:,}", fontsize=9)
        ax.tick_params(which="both", labelsize=7)
        quiet(ax)
    panels[0].set_ylabel("time, in gradients of the loss", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False)
    return figure
