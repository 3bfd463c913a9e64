"""The experiments of the paper: what is run, where it is kept, and how it goes on (docs/method.md, section 4).

Small results are kept in a folder that is committed: a metrics file for each run that ended, the tables of searches,
the costs of steps, the interactions.  What is there is not computed again.  Checkpoints of runs that go on lie
elsewhere, and are deleted when their run has ended.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from newton_summary.errors import UsageError
from newton_summary.report.records import Config, Row
from newton_summary_experiments import files
from newton_summary_experiments.data import Data, first
from newton_summary_experiments.search import PAPER, Point, Search
from newton_summary_experiments.search_plan import PLANS, SearchPlan
from newton_summary_experiments.tasks import Task, get_task
from newton_summary_experiments.training import Run, config_of, train

DEFAULT = "newton-summary-constant"
SEARCHED = ("adam", "sgd", "kfac", PAPER)
OPTIMIZERS = (*SEARCHED, DEFAULT)

LABELS = {
    "adam": "Adam",
    "sgd": "SGD, momentum",
    "kfac": "K-FAC",
    PAPER: "NewtonSummary, paper mode",
    DEFAULT: "NewtonSummary, default",
}
NETWORKS = {
    "mlp-mnist": "MLP",
    "lenet-cifar10": "LeNet",
    "vgg-cifar10": "VGG-11'",
    "bigmlp-cifar10": "BigMLP",
    "vbigmlp-cifar10": "VBigMLP",
}
TASKS = tuple(NETWORKS)

SEEDS = {"mlp-mnist": 5, "lenet-cifar10": 5}
FEWER_SEEDS = {"quick": 2, "hours": 1, "full": 1}
"""How many runs there are for each task and optimizer; for all others than those of :data:`SEEDS`."""

MOST_SEEDS = {("full", "kfac"): 2}
"""At most so many where runs of an optimizer take too long for five of them."""

_TABLE = ("task", "optimizer", "epochs", "seeds", "at_edge", "lr", "option", "value", "loss")


@dataclass(frozen=True)
class Reproduction:
    """All experiments at one budget, and what is known of them.

    Args:
        budget: one of :data:`~newton_summary_experiments.tasks.BUDGETS`.
        results: the folder of what is kept; it has a folder for each budget.
        runs: the folder of checkpoints and of the journals of searches.
        data: the folder of the data files.  Default: the usual places.
        tasks: their names.
        progress: whether to show a bar for each run.
        device: where networks are trained.
    """

    budget: str
    results: Path
    runs: Path
    data: Path | None = None
    tasks: Sequence[str] = TASKS
    progress: bool = False
    device: str = "cpu"
    _read: dict[str, Data] = field(default_factory=dict, repr=False, init=False)

    @property
    def folder(self) -> Path:
        """Where the results of this budget are."""
        return self.results / self.budget

    @property
    def scratch(self) -> Path:
        """Where checkpoints and journals of this budget are."""
        return self.runs / self.budget

    def at(self, budget: str) -> Reproduction:
        """The same experiments at a budget: those of the tasks that something is known of there."""
        if budget == self.budget:
            return self
        every = replace(self, budget=budget, tasks=TASKS)
        known = {task for task, _ in every.searches}
        return replace(every, tasks=tuple(name for name in TASKS if name in known))

    def task(self, name: str) -> Task:
        """A task at this budget."""
        return get_task(name, self.budget)

    def samples(self, name: str) -> Data:
        """The data of a task, read once."""
        if name not in self._read:
            self._read[name] = self.task(name).read(self.data).to(self.device)
        return self._read[name]

    def seeds(self, name: str, optimizer: str = "") -> range:
        """The seeds of a task's runs, with an optimizer."""
        count = SEEDS.get(name, FEWER_SEEDS[self.budget])
        return range(min(count, MOST_SEEDS.get((self.budget, optimizer), count)))

    # Searches ---------------------------------------------------------------------------------------------------------

    @property
    def search_plan(self) -> SearchPlan:
        """How searches are done at this budget."""
        return PLANS[self.budget]

    def search_samples(self, name: str) -> Data:
        """What a trial trains on."""
        data = self.samples(name)
        return replace(data, train=first(data.train, self.search_plan.images))

    @cached_property
    def searches(self) -> dict[tuple[str, str], Search]:
        """What the searches that are kept found, for each task and optimizer."""
        path = self.folder / "search.csv"
        if not path.is_file():
            return {}
        found: dict[tuple[str, str], dict[str, Any]] = {}
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                names = ("lr", row["option"]) if row["option"] else ("lr",)
                point: Point = tuple(float(row[key]) for key in ("lr", "value") if row[key])
                key = (row["task"], row["optimizer"])
                known = found.setdefault(key, {"names": names, "losses": {}})
                known["losses"][point] = float(row["loss"])
                known |= {"epochs": int(row["epochs"]), "seeds": int(row["seeds"]), "at_edge": row["at_edge"] == "yes"}
        return {(task, optimizer): Search(task, optimizer, **known) for (task, optimizer), known in found.items()}

    def keep_search(self, found: Search) -> None:
        """Adds a search to those that are kept, in place of an earlier one of the same task and optimizer."""
        self.__dict__.pop("searches", None)  # another process may have kept others meanwhile
        self.searches[found.task, found.optimizer] = found
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_TABLE)
        for (task, optimizer), one in sorted(self.searches.items(), key=_in_order):
            for point, loss in one.losses.items():
                option = (one.names[1], f"{point[1]:g}") if len(point) > 1 else ("", "")
                edge = "yes" if one.at_edge else "no"
                writer.writerow((task, optimizer, one.epochs, one.seeds, edge, f"{point[0]:g}", *option, f"{loss:.5g}"))
        files.write_text(self.folder / "search.csv", file.getvalue())
        files.write_text(self.folder / "search.md", self._search_page())

    def _search_page(self) -> str:
        lines = [
            "# Searches of the paper's experiments",
            "",
            f"Training loss over the whole training set at the end, budget {self.budget}; inf: the run",
            "diverged. The best is bold. Written by `newton-summary search`.",
        ]
        for (task, optimizer), one in sorted(self.searches.items(), key=_in_order):
            title = f"## {NETWORKS.get(task, task)}, {LABELS.get(optimizer, optimizer)}"
            images = self.search_plan.images
            length = f"{one.epochs} epochs" if images is None else f"An epoch of {images:,} images"
            runs = f"{length}, {one.seeds} seed{'s' if one.seeds > 1 else ''}"
            edge = "; the best lies at the edge of what was tried" if one.at_edge else ""
            lines += ["", title, "", f"{runs}{edge}.", "", one.table()]
        return "\n".join(lines) + "\n"

    # Runs -------------------------------------------------------------------------------------------------------------

    def config(self, name: str, optimizer: str, seed: int) -> Config:
        """A run, with the best hyperparameters of the search.

        Raises:
            UsageError: the optimizer is searched, and was not yet on this task.
        """
        task = self.task(name)
        if optimizer not in SEARCHED:
            return config_of(task, optimizer, seed=seed)
        if (name, optimizer) not in self.searches:
            raise UsageError(
                f"{optimizer} was not searched on {name} yet: "
                f"newton-summary search {name} --optimizers {optimizer} --budget {self.budget}"
            )
        best = self.searches[name, optimizer].best
        return config_of(task, optimizer, best.pop("lr"), seed=seed, options=best)

    def metrics(self, name: str, optimizer: str, seed: int) -> Path:
        """The file of a run that ended."""
        return self.folder / "runs" / name / f"{optimizer}-seed{seed}.jsonl"

    def rows(self, name: str, optimizer: str, seed: int) -> list[Row]:
        """A run that ended; nothing where it did not, or was one of other hyperparameters."""
        path = self.metrics(name, optimizer, seed)
        if not path.is_file():
            return []
        header, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [Row(**row) for row in rows] if header["config"] == asdict(self.config(name, optimizer, seed)) else []

    def all_rows(self, name: str, optimizer: str) -> list[list[Row]]:
        """The runs of all seeds that ended."""
        found = (self.rows(name, optimizer, seed) for seed in self.seeds(name, optimizer))
        return [rows for rows in found if rows]

    def run(self, name: str, optimizer: str, seed: int) -> list[Row]:
        """Trains, unless the run has ended before."""
        return self.rows(name, optimizer, seed) or self.train(name, optimizer, seed).rows

    def train(self, name: str, optimizer: str, seed: int) -> Run:
        """Trains, from where an earlier process stopped, and keeps the metrics."""
        config, folder = self.config(name, optimizer, seed), self.scratch / name / f"{optimizer}-seed{seed}"
        if (folder / files.CHECKPOINT).exists() and files.load_checkpoint(folder)["config"] != asdict(config):
            shutil.rmtree(folder)
        task, data = self.task(name), self.samples(name)
        run = train(task, config, data, folder, progress=self.progress, watched=False)
        lines = (folder / files.METRICS).read_text(encoding="utf-8").splitlines()
        files.write_text(self.metrics(name, optimizer, seed), "\n".join(map(_short, lines)) + "\n")
        shutil.rmtree(folder)
        return run

    def forget(self, optimizer: str) -> None:
        """Deletes every run of an optimizer, whole or begun, and the costs of all steps."""
        for name in self.tasks:
            for seed in self.seeds(name, optimizer):
                self.metrics(name, optimizer, seed).unlink(missing_ok=True)
                shutil.rmtree(self.scratch / name / f"{optimizer}-seed{seed}", ignore_errors=True)
        for name in self.tasks:
            self.forget_measured(f"costs-{name}")

    # Other measurements -----------------------------------------------------------------------------------------------

    def measured(self, name: str) -> Any:
        """A result of another kind by its name, or ``None``."""
        path = self.folder / "measured" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep_measured(self, name: str, content: Any) -> None:
        """Keeps one."""
        text = json.dumps(_rounded(content), allow_nan=False, ensure_ascii=False)
        files.write_text(self.folder / "measured" / f"{name}.json", text + "\n")

    def forget_measured(self, name: str) -> None:
        """Deletes one."""
        (self.folder / "measured" / f"{name}.json").unlink(missing_ok=True)


def _in_order(item: tuple[tuple[str, str], Search]) -> tuple[int, int]:
    (task, optimizer), _ = item
    return (TASKS.index(task) if task in TASKS else len(TASKS), OPTIMIZERS.index(optimizer))


def _short(line: str) -> str:
    """A line of metrics with numbers of seven digits."""
    return json.dumps(_rounded(json.loads(line)), allow_nan=False, ensure_ascii=False)


def _rounded(value: Any, digits: int = 7) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part, digits) for part in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
