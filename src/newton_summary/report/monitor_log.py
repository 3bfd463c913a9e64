"""The file that a monitor writes, read back: a line of JSON for every measurement."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from newton_summary.errors import UsageError
from newton_summary.summary import Summary
from newton_summary.watch.record import RESUMED, Record


@dataclass(frozen=True)
class Entry:
    """A line of the file.

    Args:
        record: of the measurement.
        correlations: between the steps of the groups, as a summary whose H̄ they are; ``None`` where the line has none.
        resumed_at: for the first one of a training that was resumed, the step that it went on from.
    """

    record: Record
    correlations: Summary | None
    resumed_at: int | None = None


@dataclass(frozen=True)
class MonitorLog:
    """One run of a monitor.

    Args:
        name: of the file.
        entries: of the run, oldest first.
        number: of the run in the file, from 1.
        runs: how many runs the file has; a run begins where steps do not grow or groups change.
        cut_off: whether the last line of the file is not whole, and was left out.
    """

    name: str
    entries: list[Entry]
    number: int
    runs: int
    cut_off: bool


def read_log(path: Path, number: int | None = None) -> MonitorLog:
    """One run from a file that ``Monitor(path=…)`` wrote.

    Args:
        path: of the file.
        number: of the run in the file, from 1.  Default: the last.

    Raises:
        UsageError: the file cannot be read, has no records, is damaged, or has no such run.
    """
    entries, cut_off = _entries(path)
    runs = _runs(entries)
    chosen = len(runs) if number is None else number
    if not 1 <= chosen <= len(runs):
        counted = "1 run" if len(runs) == 1 else f"runs 1 to {len(runs)}"
        raise UsageError(f"{path} has no run {chosen}: it has {counted}")
    return MonitorLog(path.name, runs[chosen - 1], chosen, len(runs), cut_off)


def _entries(path: Path) -> tuple[list[Entry], bool]:
    """All records of a file, and whether its last line is not whole: it is being written, or a run was killed."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text ({error}): name the file of Monitor(path=…)") from error
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UsageError(
            f"{path} is empty: a Monitor writes a record when the step that it measured has been taken; train on for "
            "a while, or measure more often (every=)"
        )
    cut_off = not content.endswith("\n") and not _is_json(lines[-1][1])
    if cut_off and len(lines) == 1:
        raise UsageError(f"{path} has only the beginning of a record: train on until the monitor has written one")
    return [_entry(path, number, line) for number, line in (lines[:-1] if cut_off else lines)], cut_off


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _entry(path: Path, number: int, line: str) -> Entry:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UsageError(
            f"{path}, line {number} is not JSON ({error}): take the line out, or name the file of Monitor(path=…)"
        ) from error
    try:
        if not isinstance(values, dict):
            raise TypeError(f"a record was expected, not a {type(values).__name__}")
        record = Record.from_dict(values)
        return Entry(record, _correlations(record, values.get("correlations")), values.get(RESUMED))
    except KeyError as error:
        raise UsageError(
            f"{path}, line {number} is not a record of a Monitor, it has no {error.args[0]}: name the file of "
            "Monitor(path=…), or the folder that newton-summary train or compare wrote"
        ) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}, line {number} is damaged ({error}): take the line out") from error


def _correlations(record: Record, rows: Any) -> Summary | None:
    """A lower triangle of correlations, as a summary along steps in whose units H̄ has them."""
    if rows is None:
        return None
    if [len(row) for row in rows] != list(range(1, len(record.names) + 1)):
        raise ValueError(f"correlations that are no triangle of {len(record.names)} rows")
    size = len(rows)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i, row in enumerate(rows):
        matrix[i, : i + 1] = matrix[: i + 1, i] = torch.tensor(row, dtype=torch.float64)
    return Summary(torch.tensor(record.loss), torch.zeros(size), matrix, None, record.names)


def _runs(entries: list[Entry]) -> list[list[Entry]]:
    """The entries of each run: monitors that write to one file append to it, and each counts steps from 0.

    One that was resumed goes on with the run before it; what that had measured beyond the checkpoint is left out.
    """
    runs: list[list[Entry]] = []
    for entry in entries:
        record, last = entry.record, runs[-1][-1].record if runs else None
        if last is not None and entry.resumed_at is not None and record.names == last.names:
            runs[-1] = [earlier for earlier in runs[-1] if earlier.record.step < entry.resumed_at]
        elif last is None or record.step <= last.step or record.names != last.names:
            runs.append([])
        runs[-1].append(entry)
    return runs
