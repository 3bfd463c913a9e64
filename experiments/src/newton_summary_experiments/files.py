"""What a run leaves in its folder.  Every file is whole at any time: it is written aside and then renamed.

The checkpoint is the truth; ``metrics.jsonl`` is written from it, so that a run which was killed between the two files
still continues from a consistent state.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from newton_summary.errors import UsageError
from newton_summary.report.files import write_atomically, write_text
from newton_summary.report.records import METRICS, PLAN

__all__ = [
    "CHECKPOINT",
    "METRICS",
    "PLAN",
    "fresh_folder",
    "load_checkpoint",
    "make_folder",
    "save_checkpoint",
    "write_atomically",
    "write_metrics",
    "write_text",
]

CHECKPOINT = "checkpoint.pt"


def make_folder(folder: Path) -> None:
    """Makes a folder that files can be written into: to be called before anything long is computed for it.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot write to {folder} ({reason}): choose another folder with --out") from error


def write_metrics(folder: Path, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes ``metrics.jsonl``: configuration and versions in its first line, then a line for each epoch."""
    lines = [json.dumps(line, allow_nan=False, ensure_ascii=False) for line in (header, *rows)]
    write_text(folder / METRICS, "\n".join(lines) + "\n")


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes a run's whole state."""
    write_atomically(folder / CHECKPOINT, lambda temporary: torch.save(dict(state), temporary))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Reads what :func:`save_checkpoint` wrote.

    Raises:
        UsageError: there is no run in the folder, or its checkpoint cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise UsageError(f"there is no run in {folder}: {path} does not exist")
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UsageError(f"the checkpoint {path} cannot be read ({type(error).__name__}): start a new run") from error
    if not isinstance(state, dict) or "config" not in state:
        raise UsageError(f"{path} is not a checkpoint of newton-summary train")
    return state


def fresh_folder(wanted: Path) -> Path:
    """A folder that does not exist: the wanted one, or ``wanted-2``, ``wanted-3`` and so on."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
