"""The pictures of runs, drawn into their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from newton_summary import plots  # says how to get matplotlib where it is missing
from newton_summary.measure import summarize
from newton_summary.summary import Summary
from newton_summary_experiments.data import Data
from newton_summary_experiments.files import write_atomically
from newton_summary_experiments.tasks import Task
from newton_summary_experiments.training import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BATCH = 1000


def save(figure: Figure, path: Path) -> Path:
    """Writes a picture.

    Raises:
        UsageError: it cannot be written.
    """
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    return path


def draw_curves(runs: Sequence[Run], folder: Path) -> Path:
    """``curves.png``: the training loss of every run against epochs and seconds."""
    by_optimizer = {
        name: [[asdict(row) for row in run.rows] for run in runs if run.config.optimizer == name]
        for name in dict.fromkeys(run.config.optimizer for run in runs)
    }
    return save(plots.curves(by_optimizer, title=runs[0].config.task), folder / "curves.png")


def draw_rates(runs: Sequence[Run], folder: Path) -> Path | None:
    """``rates.png``: every group's rate at each epoch, a panel for each optimizer that has them, of its first run."""
    first = {run.config.optimizer: run for run in reversed(runs) if any(row.rates for row in run.rows)}
    if not first:
        return None
    figure, panels = plots.stack(len(first))
    for ax, run in zip(panels, reversed(first.values()), strict=True):
        rows = [row for row in run.rows if row.rates]
        history = {name: [row.rates[name] for row in rows] for name in rows[0].rates}
        title = f"{run.config.task}, {run.config.optimizer}, seed {run.config.seed}: learning rate of every group"
        plots.rates(history, ax, steps=[row.step for row in rows], title=title)
    return save(figure, folder / "rates.png")


def draw_interactions(summary: Summary, title: str, folder: Path) -> Path:
    """``interactions.png``: H̄ and H̄⁻¹ in blocks."""
    return save(plots.interactions(summary, title), folder / "interactions.png")


def measure_interactions(task: Task, model: nn.Module, data: Data, *, progress: bool = False) -> Summary:
    """H̄ of the loss over the whole training set, along its gradient (docs/method.md, section 4)."""
    model = model.to(data.device)
    batches = list(zip(*(part.split(_BATCH) for part in data.train), strict=True))
    return summarize(task.loss_fn, model, batches, partition=task.partition(model), order=2, progress=progress)
