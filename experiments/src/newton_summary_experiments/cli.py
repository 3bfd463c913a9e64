"""What this package adds to ``newton-summary``: demo, train, compare, interactions, search, figures, data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from newton_summary.cli import INTERRUPTED, Commands, add_command, tell_paths
from newton_summary.errors import UsageError
from newton_summary.report.records import INTERACTIONS, Config
from newton_summary_experiments import data as datasets
from newton_summary_experiments import files
from newton_summary_experiments.optimizers import OPTIMIZERS
from newton_summary_experiments.tasks import BUDGETS, TASKS, Task, get_task
from newton_summary_experiments.training import Interrupted, Run, config_of, train

if TYPE_CHECKING:
    from newton_summary_experiments.data import Data
    from newton_summary_experiments.reproduction import Reproduction

_RUNS = Path("runs")
_RESULTS = Path("results/reproduction")
_OPTIMIZER = "optimizer of the paper's experiments here"


# Commands -------------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from newton_summary_experiments import figures

    config, folder = _resumed_run(options) if options.resume else _new_run(options)
    task = get_task(config.task, config.budget, config.ntk)
    try:
        run = train(task, config, _read(task, options), folder, progress=True)
    except Interrupted:
        print(f"\nInterrupted; nothing is lost. Go on with: newton-summary train --resume {folder}", file=sys.stderr)
        return INTERRUPTED
    last = run.rows[-1]
    loss = "not finite" if last.train_loss is None else f"{last.train_loss:.3g}"
    print(f"training loss {loss}, validation accuracy {last.validation_accuracy:.1%}, {last.seconds:.1f} s of training")
    _tell_failures([run])
    drawn = [figures.draw_curves([run], folder), figures.draw_rates([run], folder)]
    written = [folder / name for name in (files.METRICS, INTERACTIONS, files.CHECKPOINT)]
    tell_paths([*written, *(path for path in drawn if path)])
    _tell_report(folder)
    if run.diverged:
        print(f"newton-summary: the run diverged at step {last.step}: try a smaller --lr", file=sys.stderr)
    return int(run.diverged)


def _compare(options: argparse.Namespace) -> int:
    from newton_summary_experiments.comparison import Plan, compare, report, table

    if options.resume:
        folder, plan = options.resume, Plan.load(options.resume)
        _refuse_changes(options, {"task": plan.task, "optimizers": list(plan.optimizers), "seeds": list(plan.seeds)})
        _refuse_changes(options, {"epochs": plan.epochs, "budget": plan.budget})
        _set_threads(options.threads or plan.threads)
    else:
        task = get_task(_required_task(options), options.budget or "full")
        _set_threads(options.threads or task.threads)
        chosen = tuple(options.optimizers or ("adam", "sgd", "newton-summary"))
        epochs = task.epochs if options.epochs is None else options.epochs
        plan = Plan(task.name, chosen, tuple(options.seeds or (0,)), epochs, torch.get_num_threads(), task.budget)
        plan.configs()
        folder = _new_folder(options.out, f"compare-{task.name}")
    task = get_task(plan.task, plan.budget)
    data = _read(task, options)
    try:
        runs = compare(plan, data, folder, progress=True)
    except Interrupted:
        print(f"\nInterrupted; nothing is lost. Go on with: newton-summary compare --resume {folder}", file=sys.stderr)
        return INTERRUPTED
    paths = report(task, runs, data, folder, progress=True)
    print(f"\n{table(runs)}\n")
    _tell_failures(runs)
    tell_paths(paths)
    _tell_report(folder)
    return 0


def _interactions(options: argparse.Namespace) -> int:
    from newton_summary_experiments import figures

    state = files.load_checkpoint(options.run) if options.run else None
    budget = options.budget or ("full" if state is None else state["config"].get("budget", "full"))
    task = get_task(options.task, budget, state is not None and state["config"].get("ntk", False))
    if state is not None and state["config"]["task"] != task.name:
        raise UsageError(f"{options.run} holds a run of task {state['config']['task']!r}, not {task.name!r}")
    _set_threads(options.threads or task.threads)
    data = _read(task, options)
    model, when = task.make_model(options.seed), f"at initialisation, seed {options.seed}"
    if state is not None:
        model.load_state_dict(state["model"])
        when = f"after {len(state['rows']) - 1} epochs of {state['config']['optimizer']}"
    folder = _new_folder(options.out, f"interactions-{task.name}")
    files.make_folder(folder)
    summary = figures.measure_interactions(task, model, data, progress=True)
    files.write_atomically(folder / "summary.pt", summary.save)
    title = f"{task.name} {when}, along the gradient over the training set"
    tell_paths([figures.draw_interactions(summary, title, folder), folder / "summary.pt"])
    return 0


def _search(options: argparse.Namespace) -> int:
    from newton_summary_experiments import paper
    from newton_summary_experiments.reproduction import SEARCHED

    chosen = _of_these(options.optimizers, SEARCHED, _OPTIMIZER) or SEARCHED
    torch.set_num_threads(options.threads or 1)
    study = _study(options, options.tasks)
    for name in chosen:
        paper.search_all(study, [name], options.workers)
        for task in study.tasks:
            found = study.searches[task, name]
            edge = ", at the edge of what was tried" if found.at_edge else ""
            values = ", ".join(f"{key} {value:g}" for key, value in found.best.items())
            print(f"{task}, {name}: {values}; training loss {min(found.losses.values()):.3g}{edge}")
    tell_paths([study.folder / "search.csv", study.folder / "search.md"])
    return 0


def _figures(options: argparse.Namespace) -> int:
    from newton_summary_experiments import paper, reproduction

    again = _of_these(options.again, reproduction.OPTIMIZERS, _OPTIMIZER)
    if again and options.draw_only:
        raise UsageError("--again deletes runs so that they are run once more: leave out --draw-only")
    torch.set_num_threads(options.threads or 1)
    study = _study(options, options.tasks)
    images = options.images or study.folder / "figures"
    tell_paths(paper.reproduce(study, images, options.page, again, options.draw_only))
    return 0


def _study(options: argparse.Namespace, tasks: Sequence[str]) -> Reproduction:
    from newton_summary_experiments.reproduction import TASKS as OF_THE_PAPER
    from newton_summary_experiments.reproduction import Reproduction

    runs, chosen = _RUNS / "reproduction", _of_these(tasks, OF_THE_PAPER, "task of the paper") or OF_THE_PAPER
    torch.set_flush_denormal(options.budget == "hours")  # ELUs far below 0 make denormals: steps of up to six times
    return Reproduction(options.budget, options.results, runs, options.data, chosen, True, _device(options))


def _demo(options: argparse.Namespace) -> int:
    from newton_summary_experiments import demo

    _set_threads(options.threads or get_task("digits").threads)
    folder = _new_folder(options.out, "demo")
    files.make_folder(folder)
    try:
        paths = demo.run(folder, lambda text: print(text, flush=True))
    except Interrupted:
        print(f"\nInterrupted; what is done is in {folder}", file=sys.stderr)
        return INTERRUPTED
    tell_paths(paths)
    _tell_report(folder)
    return 0


def _data(options: argparse.Namespace) -> int:
    task = get_task(options.task)
    if options.fetch and task.source is not None:
        print(f"wrote {datasets.fetch(task.source, options.data)}")
    found = task.read(options.data)
    shape = "×".join(map(str, found.train[0].shape[1:]))
    print(f"{task.name}: {found.origin}")
    print(
        f"images {shape}, {len(found.train[1]):,} to train on, {len(found.validation[1]):,} to validate; no fault found"
    )
    return 0


# Parts ----------------------------------------------------------------------------------------------------------------


def _new_run(options: argparse.Namespace) -> tuple[Config, Path]:
    task = get_task(_required_task(options), options.budget or "full", bool(options.ntk))
    optimizer = options.optimizer or "newton-summary"
    config = config_of(task, optimizer, options.lr, options.epochs, options.seed or 0, dict(options.set or ()))
    _set_threads(options.threads or task.threads)
    return config, _new_folder(options.out, f"{task.name}-{optimizer}-seed{config.seed}")


def _resumed_run(options: argparse.Namespace) -> tuple[Config, Path]:
    state = files.load_checkpoint(options.resume)
    config = Config(**state["config"])
    keys = ("task", "optimizer", "lr", "epochs", "seed", "budget", "ntk")
    _refuse_changes(options, {key: getattr(config, key) for key in keys})
    _set_threads(options.threads or state["environments"][-1]["threads"])
    return config, options.resume


def _refuse_changes(options: argparse.Namespace, recorded: dict[str, object]) -> None:
    """Raises where an option says something else than the run that is to go on."""
    if options.out is not None:
        raise UsageError("--resume goes on in the run's own folder: leave out --out")
    for key, value in recorded.items():
        given = getattr(options, key)
        if given is not None and given != value:
            raise UsageError(f"{options.resume} was started with {key} {value}, not {given}: resume it as it was")


def _required_task(options: argparse.Namespace) -> str:
    if options.task is None:
        raise UsageError(f"name a task: {', '.join(TASKS)}; or a run to go on with: --resume RUN")
    return str(options.task)


def _of_these(given: Sequence[str] | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    """What the user names, each of which must be known."""
    for name in given or ():
        if name not in known:
            raise UsageError(f"{name!r} is no {what}: choose from {', '.join(known)}")
    return tuple(given or ())


def _new_folder(wanted: Path | None, name: str) -> Path:
    """The folder that the user wants, which must be empty; or a numbered one under runs/."""
    if wanted is None:
        return files.fresh_folder(_RUNS / name)
    if wanted.is_dir() and any(wanted.iterdir()):
        raise UsageError(f"{wanted} is not empty: choose another folder, or go on with its run by --resume {wanted}")
    return wanted


def _read(task: Task, options: argparse.Namespace) -> Data:
    """The data of a task, where it is computed with."""
    return task.read(options.data).to(_device(options))


def _device(options: argparse.Namespace) -> str:
    """The device that the user wants, which must be there."""
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"device {options.device!r} cannot be used ({reason}): leave out --device") from error
    return str(options.device)


def _set_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)


def _tell_failures(runs: Sequence[Run]) -> None:
    """Says what the measurements of each run came to, where some failed."""
    for run in runs:
        counts = run.rows[-1].counts
        if counts.get("failed"):
            print(
                f"{run.config.optimizer}, seed {run.config.seed}: {counts['failed']} of {counts['measured']} "
                "measurements failed; the rates stayed as they were"
            )


def _tell_report(folder: Path) -> None:
    print(f"for a web page about it: newton-summary report {folder}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number, at least 1, got {text!r}")
    return int(text)


def _assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, got {text!r}") from None


def add_commands(commands: Commands) -> None:
    """Adds the commands to the subparsers of ``newton-summary``."""
    names, tasks = ", ".join(OPTIMIZERS), ", ".join(TASKS)

    def add_plain(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        return add_command(commands, name, run, text)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, optional: bool) -> argparse.ArgumentParser:
        command = add_plain(name, run, text)
        command.add_argument("task", metavar="TASK", nargs="?" if optional else None, help=tasks)
        add_data(command)
        return command

    def add_data(command: argparse.ArgumentParser) -> None:
        command.add_argument("--data", type=Path, metavar="DIR", help="the folder of the data files")

    def add_budget(command: argparse.ArgumentParser) -> None:
        text = "the paper's sizes, its networks for a few epochs, or smaller ones (default: full)"
        command.add_argument("--budget", choices=BUDGETS, help=text)

    def add_study(command: argparse.ArgumentParser) -> None:
        command.add_argument("tasks", metavar="TASK", nargs="*", help="the paper's tasks (default: all five)")
        add_data(command)
        text = "the paper's sizes, its networks for a few epochs, or smaller ones (default: quick)"
        command.add_argument("--budget", choices=BUDGETS, default="quick", help=text)
        text = "where results are kept; what is there is not computed again (default: results/reproduction)"
        command.add_argument("--results", type=Path, metavar="DIR", default=_RESULTS, help=text)
        command.add_argument("--threads", type=_positive, metavar="N", help="torch computes with (default: 1)")
        add_device(command)

    def add_computing(command: argparse.ArgumentParser, where: str) -> None:
        command.add_argument("--out", type=Path, metavar="DIR", help=f"an empty or new folder (default: {where})")
        command.add_argument("--threads", type=_positive, metavar="N", help="torch computes with (default: the task's)")
        add_device(command)

    def add_device(command: argparse.ArgumentParser) -> None:
        command.add_argument("--device", default="cpu", metavar="NAME", help="where to compute: cuda, … (default: cpu)")

    first = add_plain("demo", _demo, "What is unique here, on handwritten digits, within a minute.")
    add_computing(first, "runs/demo, numbered if it exists")

    one = add("train", _train, "One training run: metrics, a checkpoint every epoch, figures.", True)
    one.add_argument("--optimizer", metavar="NAME", help=f"{names} (default: newton-summary)")
    one.add_argument("--lr", type=float, help="learning rate; λ_1 for newton-summary (default: the task's)")
    one.add_argument("--epochs", type=int, metavar="N", help="how long to train (default: the task's)")
    one.add_argument("--seed", type=int, metavar="N", help="of weights and order of data (default: 0)")
    one.add_argument("--set", nargs="+", type=_assignment, metavar="NAME=NUMBER", help="other hyperparameters: damping")
    one.add_argument("--ntk", action="store_true", default=None, help="weights in the NTK parameterisation")
    add_budget(one)
    one.add_argument("--resume", type=Path, metavar="RUN", help="the folder of a run to go on with, bit for bit")
    add_computing(one, "runs/TASK-OPTIMIZER-seedN, numbered if it exists")

    many = add("compare", _compare, "Optimizers side by side: a table, curves, rates, interactions.", True)
    many.add_argument("--optimizers", nargs="+", metavar="NAME", help=f"{names} (default: adam sgd newton-summary)")
    many.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="one run of each optimizer for each (default: 0)"
    )
    many.add_argument("--epochs", type=int, metavar="N", help="how long to train (default: the task's)")
    add_budget(many)
    many.add_argument("--resume", type=Path, metavar="DIR", help="the folder of a comparison to complete")
    add_computing(many, "runs/compare-TASK, numbered if it exists")

    heat = add("interactions", _interactions, "How the groups interact: H̄ and H̄⁻¹ over the training set.", False)
    heat.add_argument("--run", type=Path, metavar="RUN", help="measure a run's network, not the initial one")
    add_budget(heat)
    heat.add_argument("--seed", type=int, default=0, metavar="N", help="of the initial weights (default: 0)")
    add_computing(heat, "runs/interactions-TASK, numbered if it exists")

    grid = add_plain("search", _search, "The best hyperparameters on grids; goes on where it was stopped.")
    add_study(grid)
    text = "adam, sgd, kfac, newton-summary-paper (default: all)"
    grid.add_argument("--optimizers", nargs="+", metavar="NAME", help=text)
    grid.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes (default: 1)")

    draw = add_plain(
        "figures", _figures, "The paper's figures and tables: runs what is missing, then draws and writes."
    )
    add_study(draw)
    draw.add_argument("--images", type=Path, metavar="DIR", help="where figures go (default: in the results)")
    draw.add_argument("--page", type=Path, metavar="FILE", help="the page whose tables are rewritten (default: none)")
    draw.add_argument("--again", nargs="+", metavar="NAME", help="optimizers whose runs are deleted first")
    draw.add_argument("--draw-only", action="store_true", help="run nothing: only draw, and write the tables")

    check = add("data", _data, "Says where a task's data is, and checks it.", False)
    check.add_argument("--fetch", action="store_true", help="get it through the package datasets first")
