"""Optimizers side by side on one task, each from the same weights and in the same order of data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from newton_summary.errors import UsageError
from newton_summary.report.records import Config
from newton_summary_experiments import figures, files
from newton_summary_experiments.data import Data
from newton_summary_experiments.tasks import Task, get_task
from newton_summary_experiments.training import Run, config_of, train


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Args:
        task: the task's name.
        optimizers: their names.
        seeds: one run of every optimizer for each.
        epochs: how long to train.
        threads: that torch computes with.
        budget: of the task.
    """

    task: str
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    threads: int
    budget: str = "full"

    def configs(self) -> list[Config]:
        """The runs.

        Raises:
            UsageError: a name is unknown, or a number out of range.
        """
        task = get_task(self.task, self.budget)
        return [
            config_of(task, name, epochs=self.epochs, seed=seed)
            for seed in dict.fromkeys(self.seeds)
            for name in dict.fromkeys(self.optimizers)
        ]

    def save(self, folder: Path) -> None:
        """Writes the plan into the comparison's folder."""
        files.write_text(folder / files.PLAN, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> Plan:
        """Reads it.

        Raises:
            UsageError: the folder holds no comparison.
        """
        try:
            values = json.loads((folder / files.PLAN).read_text(encoding="utf-8"))
            values |= {key: tuple(values[key]) for key in ("optimizers", "seeds")}
            return Plan(**values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"there is no comparison in {folder}: {files.PLAN} is missing or damaged") from error


def run_folder(folder: Path, config: Config) -> Path:
    """Where a comparison keeps one of its runs."""
    return folder / f"{config.optimizer}-seed{config.seed}"


def compare(plan: Plan, data: Data, folder: Path, *, progress: bool = False) -> list[Run]:
    """Trains every run of a plan; those that are finished are read, those that were interrupted go on.

    Raises:
        UsageError: the folder cannot be written.
        Interrupted: Ctrl-C was pressed.
    """
    configs = plan.configs()
    plan.save(folder)
    task = get_task(plan.task, plan.budget)
    return [train(task, config, data, run_folder(folder, config), progress=progress) for config in configs]


def report(task: Task, runs: Sequence[Run], data: Data, folder: Path, *, progress: bool = False) -> list[Path]:
    """Writes a comparison's table and pictures: their paths.

    ``interactions.png`` shows the network that every run starts from, with the first seed.
    """
    files.write_text(folder / "table.md", table(runs) + "\n")
    seed = runs[0].config.seed
    summary = figures.measure_interactions(task, task.make_model(seed), data, progress=progress)
    title = f"{task.name} at initialisation, seed {seed}, along the gradient over the training set"
    drawn = [
        figures.draw_curves(runs, folder),
        figures.draw_interactions(summary, title, folder),
        figures.draw_rates(runs, folder),
    ]
    metrics = [run_folder(folder, run.config) / files.METRICS for run in runs]
    return [folder / "table.md", *(path for path in drawn if path), *metrics]


def table(runs: Sequence[Run]) -> str:
    """A row for each optimizer, in Markdown: the median over seeds, and the worst where there are several."""
    header = ("optimizer", "rate", "training loss", "validation accuracy", "seconds", "diverged")
    rows = [header]
    for name in dict.fromkeys(run.config.optimizer for run in runs):
        mine = [run for run in runs if run.config.optimizer == name]
        last = [run.rows[-1] for run in mine]
        losses = [float("inf") if row.train_loss is None else row.train_loss for row in last]
        rows.append(
            (
                name,
                f"{mine[0].config.lr:g}",
                _over_seeds(losses, max, ".2e"),
                _over_seeds([100 * row.validation_accuracy for row in last], min, ".1f", " %"),
                f"{median(row.seconds for row in last):.1f}",
                "no" if not any(run.diverged for run in mine) else f"{sum(r.diverged for r in mine)} of {len(mine)}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _over_seeds(values: Sequence[float], worst: Callable[[Sequence[float]], float], spec: str, unit: str = "") -> str:
    """The median, and the worst in brackets where there are several."""
    text = f"{median(values):{spec}}{unit}"
    return text if len(values) == 1 else f"{text} (worst {worst(values):{spec}}{unit})"
