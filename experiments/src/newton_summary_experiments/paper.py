"""All experiments of the paper in one go: what is missing is run, then figures are drawn and tables written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from newton_summary.errors import UsageError
from newton_summary_experiments import claims, costs, figures, invariance, page, paper_figures, search
from newton_summary_experiments.data import first
from newton_summary_experiments.reproduction import DEFAULT, LABELS, NETWORKS, OPTIMIZERS, Reproduction
from newton_summary_experiments.search import PAPER
from newton_summary_experiments.tasks import get_task

INVARIANT = "mlp-mnist"
"""The task on which the invariance is shown."""

_INVARIANT_STEPS = 200
_FEW_ROUNDS = 3  # of steps that take a second
_TIMED = "lenet-cifar10"


def search_all(study: Reproduction, optimizers: Sequence[str], workers: int = 1) -> None:
    """Searches the hyperparameters of some optimizers on every task of the study, and keeps what is found."""
    plan = study.search_plan
    for name in study.tasks:
        for optimizer in optimizers:
            task, grid = study.task(name), plan.grid(name, optimizer)
            found = search.search(
                task,
                study.search_samples(name),
                optimizer,
                study.scratch / "search",
                grid,
                epochs=plan.epochs(name, optimizer, task.epochs),
                most_grids=plan.grids_at_most(len(grid)),
                workers=workers,
            )
            study.keep_search(found)


def run_all(study: Reproduction, optimizers: Sequence[str] = OPTIMIZERS) -> None:
    """Trains what has not been trained, and measures the interactions of one run of the paper's method on each task."""
    pairs = [(name, optimizer) for optimizer in optimizers for name in study.tasks]
    runs = [(*pair, seed) for pair in pairs for seed in study.seeds(*pair)]
    for name, optimizer, seed in tqdm(runs, desc="runs", disable=not study.progress):
        if optimizer == PAPER and seed == 0 and study.measured(f"interactions-{name}") is None:
            measure_interactions(study, name)
        study.run(name, optimizer, seed)


def measure_interactions(study: Reproduction, name: str) -> None:
    """H̄ over the recorded training images, along their gradient, at initialisation and at the best validation epoch."""
    run = study.train(name, PAPER, 0)
    task, data = study.task(name), study.samples(name)
    data = replace(data, train=first(data.train, task.evaluated))
    known = [row for row in run.rows if row.validation_loss is not None]
    best_row = min(known, key=lambda row: row.validation_loss or 0.0)
    initial = figures.measure_interactions(task, task.make_model(0), data)
    run.model.load_state_dict(run.best)
    best = figures.measure_interactions(task, run.model, data)
    content = {"epoch": best_row.epoch, "step": best_row.step, "initial": initial.to_dict(), "best": best.to_dict()}
    study.keep_measured(f"interactions-{name}", content)


def measure_all(study: Reproduction) -> None:
    """The costs of steps and of summaries, and the invariance, where they are not known."""

    def keep(name: str, measure: Callable[[], object]) -> None:
        if study.measured(name) is None:
            study.keep_measured(name, measure())

    for name in study.tasks:
        keep(f"costs-{name}", lambda name=name: _step_costs(study, name))  # type: ignore[misc]
    if study.budget != "quick":  # what follows depends on no budget
        return
    keep("summary-costs", lambda: [asdict(cost) for cost in costs.summary_costs()])
    if INVARIANT in study.tasks:
        keep("invariance", lambda: _invariance(study))
    if _TIMED in study.tasks:
        task = get_task(_TIMED)
        keep("full-batch", lambda: costs.full_batch_seconds(task, task.read(study.data)))


def _step_costs(study: Reproduction, name: str) -> dict[str, dict[str, float]]:
    ready = [optimizer for optimizer in OPTIMIZERS if optimizer == DEFAULT or (name, optimizer) in study.searches]
    configs = {optimizer: study.config(name, optimizer, 0) for optimizer in ready}
    rounds = _FEW_ROUNDS if study.budget == "hours" else costs.ROUNDS
    found = costs.step_costs(study.task(name), study.samples(name), configs, rounds)
    return {optimizer: asdict(cost) for optimizer, cost in found.items()}


def _invariance(study: Reproduction) -> dict[str, tuple[list[float], list[float]]]:
    task, data = study.task(INVARIANT), study.samples(INVARIANT)
    return {name: invariance.both_ways(task, data, make, _INVARIANT_STEPS) for name, make in invariance.METHODS.items()}


def draw_all(study: Reproduction, folder: Path) -> list[Path]:
    """Every figure, from what is kept."""
    drawn: list[Path] = []
    for name in study.tasks:
        found = {when: summary for when, (_, summary) in claims.moments(study, name).items()}
        if found:
            title = f"{NETWORKS[name]}, along the gradient over the training set"
            drawn += paper_figures.save(paper_figures.heatmaps(found, title), folder, f"interactions-{name}")
            normalised = paper_figures.normalised_heatmaps(found, f"{title}, scaled to a unit diagonal")
            drawn += paper_figures.save(normalised, folder, f"normalised-{name}")
    for optimizer, label in ((PAPER, "paper"), (DEFAULT, "default")):
        histories = {
            NETWORKS[name]: runs[0]
            for name in study.tasks
            if (runs := study.all_rows(name, optimizer)) and runs[0][-1].rates
        }
        if histories:
            figure = paper_figures.rates(histories, f"Learning rates, {LABELS[optimizer]}, seed 0")
            drawn += paper_figures.save(figure, folder, f"rates-{label}")
    every = {NETWORKS[n]: {o: study.all_rows(n, o) for o in OPTIMIZERS} for n in study.tasks}
    without = [name for name, optimizers in every.items() if not any(optimizers.values())]
    if without:
        raise UsageError(f"there are no runs of {', '.join(without)} to draw: run them, without --draw-only")
    known = {NETWORKS[name]: claims.costs(study, name) for name in study.tasks}
    drawn += paper_figures.save(paper_figures.losses(every, known, LABELS), folder, "losses")
    if study.measured("summary-costs"):
        drawn += paper_figures.save(paper_figures.costs(study.measured("summary-costs")), folder, "summary-costs")
    if study.measured("invariance"):
        title = f"{NETWORKS[INVARIANT]}: the same training in two parameterisations"
        drawn += paper_figures.save(paper_figures.invariance(study.measured("invariance"), title), folder, "invariance")
    return drawn


def reproduce(
    study: Reproduction, images: Path, document: Path | None, again: Sequence[str] = (), only_draw: bool = False
) -> list[Path]:
    """Runs what is missing, draws the figures, and rewrites the tables of the page.

    Args:
        study: what is known.
        images: the folder of the figures.
        document: the page.  ``None``: none is written.
        again: optimizers whose runs are deleted first.
        only_draw: whether nothing is run.

    Returns:
        What was written.

    Raises:
        UsageError: a search is missing, or data, or the page, or runs where nothing is run.
    """
    for optimizer in again:
        study.forget(optimizer)
    if not only_draw:
        run_all(study)
        measure_all(study)
    written = draw_all(study, images)
    if document is not None:
        page.rewrite(document, page.tables(study))
        written.append(document)
    return written
