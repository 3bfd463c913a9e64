"""The best hyperparameters of an optimizer on a task, on grids of half decades, by Optuna.

A search goes through a grid (Optuna's ``GridSampler``), and through a larger one while the best lies at its edge.  Its
trials are kept in a journal file as they end: a search that was stopped, even killed, goes on from there, and several
processes may work on it together.  A run that diverges is pruned.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from newton_summary.errors import UsageError
from newton_summary_experiments.data import Data
from newton_summary_experiments.files import make_folder
from newton_summary_experiments.tasks import Task, get_task
from newton_summary_experiments.training import Trainer, config_of

if TYPE_CHECKING:
    import optuna

Grid: TypeAlias = Mapping[str, tuple[int, int]]
"""For each hyperparameter the numbers of its first and last value, as for :func:`half_decade`; ``lr`` comes first."""

Point: TypeAlias = tuple[float, ...]
"""A value for each hyperparameter of a grid, in its order."""

JOURNAL = "journal.log"

PAPER = "newton-summary-paper"

GRIDS: dict[str, Grid] = {
    "adam": {"lr": (-7, -5)},
    "sgd": {"lr": (-4, -2)},
    "kfac": {"lr": (-6, -4), "damping": (-3, -1)},
    PAPER: {"lr": (-2, 0), "regularization": (0, 2)},
}
"""Where the search of each optimizer starts, unless told otherwise; λ_1 is called lr, λ_int regularization."""

MOST_GRIDS = {1: 6, 2: 3}
"""How many grids are gone through at most, by the number of hyperparameters."""


@dataclass(frozen=True)
class Search:
    """What came out of a search.

    Args:
        task: its name.
        optimizer: its name.
        names: of the hyperparameters.
        losses: for each point, in ascending order, the median of the final training losses; infinite where it diverged.
        epochs: the length of the runs.
        seeds: how many runs there were at each point.
        at_edge: whether the best lies at the edge of what was tried.
    """

    task: str
    optimizer: str
    names: tuple[str, ...]
    losses: dict[Point, float]
    epochs: int
    seeds: int
    at_edge: bool

    @property
    def best(self) -> dict[str, float]:
        """The point with the lowest loss."""
        best: Point = min(self.losses, key=lambda point: self.losses[point])
        return dict(zip(self.names, best, strict=True))

    def table(self) -> str:
        """The losses in Markdown, the best in bold: a row for each rate, a column for each other hyperparameter."""
        best = tuple(self.best.values())
        rates = sorted({point[0] for point in self.losses})
        columns: list[Point] = sorted({point[1:] for point in self.losses})
        heads = [f"{self.names[1]} {values[0]:g}" if values else "training loss" for values in columns]
        lines = [f"| lr | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for rate in rates:
            points: list[Point] = [(rate, *values) for values in columns]
            losses = {point: self.losses.get(point) for point in points}
            cells = ["" if v is None else f"**{v:.3g}**" if p == best else f"{v:.3g}" for p, v in losses.items()]
            lines.append(f"| {rate:g} | {' | '.join(cells)} |")
        return "\n".join(lines)


def half_decade(number: int) -> float:
    """The value with this number on a grid of half decades: 0.1, 0.3, 1, 3 for −2, −1, 0, 1."""
    decade, half = divmod(number, 2)
    return float(f"{3 if half else 1}e{decade}")


def search(
    task: Task,
    data: Data,
    optimizer: str,
    folder: Path,
    grid: Grid | None = None,
    seeds: int = 1,
    epochs: int | None = None,
    *,
    most_grids: int | None = None,
    workers: int = 1,
) -> Search:
    """Trains at every point of a grid, and of larger ones until the best lies inside.

    Args:
        task: what to train.
        data: its data.
        optimizer: the optimizer's name.
        folder: where the journal is kept.  A search that is in it goes on; several may share it.
        grid: the first grid.  Default: that of :data:`GRIDS`.
        seeds: how many runs there are at each point.
        epochs: how long to train.  Default: as long as the task does.
        most_grids: how many grids there are at most.  Default: that of :data:`MOST_GRIDS`.
        workers: processes.  With more than one the task is looked up by its name, and its data in the usual places.

    Raises:
        UsageError: the optimizer has no grid, or the folder cannot be written.
        ImportError: Optuna is not installed.
    """
    grid = GRIDS.get(optimizer) if grid is None else grid
    if not grid:
        raise UsageError(f"{optimizer} is not searched: choose one of {', '.join(GRIDS)}")
    make_folder(folder)
    length = task.epochs if epochs is None else epochs
    known: dict[Point, float] = {}
    for number in range(MOST_GRIDS[len(grid)] if most_grids is None else most_grids):
        name = f"{task.name} {task.budget} {optimizer} epochs {length} seeds {seeds} grid {number}"
        stage = _Stage(task, data, optimizer, folder, name, grid, seeds, length, known)
        known |= stage.go_through(workers)
        larger = _widened(grid, min(known, key=lambda point: known[point]))
        if larger == grid:
            break
        grid = larger
    best: Point = min(known, key=lambda point: known[point])
    at_edge = any(value in (min(c), max(c)) for value, c in zip(best, zip(*known, strict=True), strict=True))
    ordered = {point: known[point] for point in sorted(known)}
    return Search(task.name, optimizer, tuple(grid), ordered, length, seeds, at_edge)


@dataclass(frozen=True)
class _Stage:
    """One grid of a search: an Optuna study."""

    task: Task
    data: Data
    optimizer: str
    folder: Path
    name: str
    grid: Grid
    seeds: int
    epochs: int
    known: Mapping[Point, float]

    def go_through(self, workers: int) -> dict[Point, float]:
        """The loss at every point."""
        self.study()  # makes it, before several processes ask for it
        if workers > 1:
            _share(self, workers)
        self.work()
        self.repeat_failed()
        return self.found()

    def study(self) -> optuna.Study:
        """The study, with what earlier processes and other ones did."""
        library = _import_optuna()
        journal = library.storages.journal.JournalFileBackend(str(self.folder / JOURNAL))
        study: optuna.Study = library.create_study(
            storage=library.storages.JournalStorage(journal),
            sampler=library.samplers.GridSampler(self.values, seed=0),
            study_name=self.name,
            load_if_exists=True,
        )
        return study

    def work(self) -> None:
        """Takes points that nobody took until none is left, those of processes that were killed included."""
        study = self.study()
        while not _is_exhausted(study):
            study.optimize(self.objective, n_trials=1)

    def repeat_failed(self) -> None:
        """Runs again what an error or Ctrl-C ended, which the sampler takes for done."""
        study, found = self.study(), self.found()
        for point in product(*self.values.values()):
            if point not in found:
                study.enqueue_trial(dict(zip(self.grid, point, strict=True)))
                study.optimize(self.objective, n_trials=1)

    @property
    def values(self) -> dict[str, list[float]]:
        """The values of each hyperparameter."""
        return {name: [half_decade(n) for n in range(low, high + 1)] for name, (low, high) in self.grid.items()}

    def objective(self, trial: optuna.Trial) -> float:
        """The median of the losses at a point; raises where a run diverged."""
        values = {name: trial.suggest_categorical(name, choices) for name, choices in self.values.items()}
        point = tuple(values.values())
        loss = self.known[point] if point in self.known else self._train(trial, values)
        if math.isinf(loss):
            raise _import_optuna().TrialPruned
        return loss

    def _train(self, trial: optuna.Trial, values: dict[str, float]) -> float:
        losses = []
        for seed in range(self.seeds):
            options = {name: value for name, value in values.items() if name != "lr"}
            config = config_of(self.task, self.optimizer, values["lr"], self.epochs, seed, options)
            trainer = Trainer(self.task, config, self.data)
            trainer.record()
            while not trainer.finished:
                whole = trainer.take_step()
                if not whole or (trainer.position == 0 and trainer.epoch in (1, self.epochs)):
                    trainer.record(exploded=not whole)
                    trial.report(_last_loss(trainer), seed * self.epochs + trainer.epoch)
            losses.append(_last_loss(trainer))
        return median(losses)

    def found(self) -> dict[Point, float]:
        """What the study knows: infinity for pruned trials."""
        trials = (t for t in self.study().trials if t.state.is_finished())
        ended = [t for t in trials if t.state.name in ("COMPLETE", "PRUNED")]
        return {
            tuple(t.params[name] for name in self.grid): math.inf if t.state.name == "PRUNED" else float(t.value or 0.0)
            for t in ended
        }


def _last_loss(trainer: Trainer) -> float:
    """The training loss that was recorded last; infinite where the run diverged."""
    loss = trainer.rows[-1].train_loss
    return math.inf if trainer.diverged or loss is None else loss


def _is_exhausted(study: optuna.Study) -> bool:
    """Whether every point has an end."""
    sampler: optuna.samplers.GridSampler = study.sampler  # type: ignore[assignment]
    return sampler.is_exhausted(study)


def _widened(grid: Grid, best: Point) -> dict[str, tuple[int, int]]:
    """The grid with one more value on each side at which the best lies."""
    larger = {}
    for (name, (low, high)), value in zip(grid.items(), best, strict=True):
        larger[name] = (low - (value == half_decade(low)), high + (value == half_decade(high)))
    return larger


def _share(stage: _Stage, workers: int) -> None:
    """Lets processes of their own do the work; what one of them leaves undone is done by the caller."""
    context = multiprocessing.get_context("spawn")
    arguments = (stage.task.name, stage.task.budget, stage.optimizer, stage.folder, stage.name, dict(stage.grid))
    rest = (stage.seeds, stage.epochs, dict(stage.known), torch.get_num_threads())
    processes = [context.Process(target=_work, args=(*arguments, *rest)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _work(
    task_name: str,
    budget: str,
    optimizer: str,
    folder: Path,
    name: str,
    grid: Grid,
    seeds: int,
    epochs: int,
    known: Mapping[Point, float],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    task = get_task(task_name, budget)
    _Stage(task, task.read(), optimizer, folder, name, grid, seeds, epochs, known).work()


def _import_optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError as error:
        raise ImportError("searching needs Optuna: pip install 'newton-summary-experiments[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
