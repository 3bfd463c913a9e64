"""The best constant learning rate of an optimizer on a task, by half decades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from newton_summary.experiments.data import Data
from newton_summary.experiments.errors import UsageError
from newton_summary.experiments.tasks import Task
from newton_summary.experiments.training import Config, train

_MOST_RATES = 13


@dataclass(frozen=True)
class Search:
    """What came out of a search.

    Args:
        optimizer: its name.
        losses: for each rate, in ascending order, the final training loss of each seed; infinite where it diverged.
    """

    optimizer: str
    losses: dict[float, list[float]]

    @property
    def best(self) -> float:
        """The rate with the lowest median."""
        return min(self.losses, key=lambda rate: median(self.losses[rate]))

    def table(self) -> str:
        """The losses in Markdown, the best rate in bold."""
        lines = ["| rate | median | every seed |", "|---|---|---|"]
        for rate, losses in self.losses.items():
            cells = (f"{rate:g}", f"{median(losses):.2e}", " ".join(f"{loss:.2e}" for loss in losses))
            lines.append(f"| {' | '.join(f'**{c}**' if rate == self.best else c for c in cells)} |")
        return "\n".join(lines)


def half_decade(number: int) -> float:
    """The rate with this number on a grid of half decades: 0.1, 0.3, 1, 3 for −2, −1, 0, 1."""
    decade, half = divmod(number, 2)
    return float(f"{3 if half else 1}e{decade}")


def search(
    task: Task,
    data: Data,
    optimizer: str,
    around: int,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    *,
    progress: bool = False,
) -> Search:
    """Trains with ever more rates of the grid, until the best has worse ones on both sides.

    Args:
        task: what to train.
        data: its data.
        optimizer: the optimizer's name.
        around: the number of the first rate tried, as for :func:`half_decade`.
        seeds: every rate is tried with each.
        epochs: how long to train.  Default: as long as the task does.
        progress: whether to show a bar for each run.

    Raises:
        UsageError: thirteen rates were tried, and the best is still at the edge.
    """
    tried: dict[int, list[float]] = {}
    candidates = [around - 1, around, around + 1]
    while candidates:
        for number in candidates:
            configs = [Config.of(task, optimizer, half_decade(number), epochs, seed) for seed in seeds]
            runs = [train(task, config, data, progress=progress) for config in configs]
            tried[number] = [_final_loss(run.rows[-1].train_loss, run.diverged) for run in runs]
        best = min(tried, key=lambda number: median(tried[number]))
        candidates = [number for number in (best - 1, best + 1) if number not in tried]
        if candidates and len(tried) >= _MOST_RATES:
            raise UsageError(f"{optimizer}: after {len(tried)} rates the best, {half_decade(best):g}, is at the edge")
    return Search(optimizer, {half_decade(number): tried[number] for number in sorted(tried)})


def _final_loss(loss: float | None, diverged: bool) -> float:
    return float("inf") if loss is None or diverged else loss
