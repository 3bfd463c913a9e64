"""What is unique here, within a minute: interactions, rates for Adam, and a training with nothing to tune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from newton_summary import plots, suggest_rates, summarize
from newton_summary_experiments import figures
from newton_summary_experiments.comparison import Plan, compare, report, table
from newton_summary_experiments.data import InMemory, as_it_is
from newton_summary_experiments.tasks import get_task

_OPTIMIZERS = ("adam", "sgd", "newton-summary")
_BATCHES = 8  # that interactions are measured on
_RATE = 1e-3  # torch's default for Adam
_WARM = 50  # steps of Adam before its interactions are measured


def run(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Shows the three things on scikit-learn's handwritten digits.

    Args:
        folder: where pictures and runs are written.
        say: tells the user what is happening, and what came of it.

    Returns:
        The paths of what was written.

    Raises:
        UsageError: the folder cannot be written.
        Interrupted: Ctrl-C was pressed.
    """
    task = get_task("digits")
    data = task.read(None)
    loader = DataLoader(
        InMemory(data.train), task.batch_size, shuffle=True, collate_fn=as_it_is, generator=torch.Generator()
    )
    model = task.make_model(0)
    adam = torch.optim.Adam(model.parameters(), lr=_RATE)

    say("1 of 3: how the layers of a small network on handwritten digits interact in its loss, along Adam's steps")
    batches = list(loader)
    for batch in (batches * _WARM)[:_WARM]:
        adam.zero_grad()
        task.loss_fn(model, batch).backward()
        adam.step()
    summary = summarize(task.loss_fn, model, batches[:_BATCHES], direction=adam)
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    plots.correlations(summary, figure.subplots(), f"How tensors interact, after {_WARM} steps of Adam")
    looked = figures.save(figure, folder / "layers.png")
    say(f"    drawn: {looked}")

    say(f"2 of 3: a learning rate for each of them, in the place of Adam's {_RATE:g}; short trainings try them out")
    say(str(suggest_rates(task.loss_fn, model, loader, adam, steps=task.epochs * len(loader))))

    say("3 of 3: training; Adam and SGD have the best rates of a search, newton-summary is told none")
    plan = Plan(task.name, _OPTIMIZERS, (0,), task.epochs, torch.get_num_threads(), task.budget)
    runs = compare(plan, data, folder, progress=True)
    say(f"\n{table(runs)}\n")
    return [looked, *report(task, runs, data, folder)]
