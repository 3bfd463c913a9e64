"""What runs have left in their folders, read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newton_summary.errors import UsageError
from newton_summary.report.records import INTERACTIONS, METRICS, PLAN, Config, Row, Snapshot


@dataclass(frozen=True)
class Record:
    """A run, as its files tell it.

    Args:
        config: what it was told to do.
        data: what identifies its data.
        environments: versions and settings, the last one last.
        rows: one for each epoch, the start included.
        sizes: the number of parameters in each group; empty for a run without interactions.
        snapshots: its interactions at chosen epochs.
    """

    config: Config
    data: dict[str, Any]
    environments: list[dict[str, Any]]
    rows: list[Row]
    sizes: dict[str, int]
    snapshots: list[Snapshot]

    @property
    def label(self) -> str:
        """What tells it from the other runs of a comparison."""
        return f"{self.config.optimizer}, seed {self.config.seed}"

    @property
    def state(self) -> str:
        """How it ended."""
        last = self.rows[-1]
        if last.diverged:
            return f"diverged at step {last.step}"
        return "done" if last.epoch >= self.config.epochs else f"{last.epoch} of {self.config.epochs} epochs"


def read(folder: Path) -> list[Record]:
    """The run in a folder, or the runs of the comparison in it, in the order in which they were asked for.

    Raises:
        UsageError: there is neither, or a file is damaged.
    """
    if (folder / METRICS).is_file():
        return [_read_run(folder)]
    found = [_read_run(path.parent) for path in sorted(folder.glob(f"*/{METRICS}"))]
    if not found:
        raise UsageError(
            f"there is no run in {folder}: name a folder that newton-summary train or compare wrote, or the file of "
            "Monitor(path=…)"
        )
    order = _asked_for(folder)
    return sorted(found, key=lambda run: (order.get(run.config.optimizer, len(order)), run.config.seed))


def _read_run(folder: Path) -> Record:
    path = folder / METRICS
    sizes, looks = read_interactions(folder)
    cure = f"write it anew by newton-summary train --resume {folder}, or train the run again"
    try:
        header, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        record = Record(
            config=Config(**header["config"]),
            data=dict(header["data"]),
            environments=[dict(environment) for environment in header["environments"]],
            rows=[Row(**row) for row in rows],
            sizes=sizes,
            snapshots=looks,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}): {cure}") from error
    if not (record.rows and record.environments):
        raise UsageError(f"{path} is damaged (nothing is recorded): {cure}")
    return record


def _asked_for(folder: Path) -> dict[str, int]:
    """The place of each optimizer in a comparison's plan, where there is one."""
    try:
        names = json.loads((folder / PLAN).read_text(encoding="utf-8"))["optimizers"]
        return {str(name): place for place, name in enumerate(names)}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def read_interactions(folder: Path) -> tuple[dict[str, int], list[Snapshot]]:
    """The number of parameters in each group of a run, and its snapshots; nothing where it has no such file.

    Raises:
        UsageError: the file is damaged.
    """
    path = folder / INTERACTIONS
    if not path.is_file():
        return {}, []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        snapshots = [Snapshot(**values) for values in content["snapshots"]]
        for snapshot in snapshots:
            snapshot.summaries()
        return dict(content["groups"]), snapshots
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}): delete it, or train the run again") from error
