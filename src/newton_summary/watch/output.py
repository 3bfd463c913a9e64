"""Where a monitor's records go: a file, a writer of scalars, a frame."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from newton_summary._warned import warn
from newton_summary.summary import Summary
from newton_summary.watch.advice import correlations
from newton_summary.watch.record import RESUMED, TAG, Record, markdown


class Writer(Protocol):
    """What scalars are written to, such as a TensorBoard ``SummaryWriter``.

    Where it has ``add_text(tag, text, step)``, too, it gets the advice in words.
    """

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Takes one number."""
        ...


def check_path(path: Path | None) -> None:
    """Makes the folders above a file that records are to go to.

    Raises:
        ValueError: nothing can be written there.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"path={str(path)!r}: its folder cannot be made ({_cause(error)})") from error
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder: name a file in it, such as run.jsonl")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"path={str(path)!r} cannot be written: name a file in a folder of yours")


def check_writer(writer: Any) -> None:
    """Raises unless a writer, if one is given, takes scalars.

    Raises:
        TypeError: it has no ``add_scalar``, as the name of a folder has not.
    """
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            f"writer must have add_scalar(tag, value, step), such as a SummaryWriter of TensorBoard, got {writer!r}"
        )


class Output:
    """Gives records away.  None of what fails there is an error: a training goes on without."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def write(
        self, record: Record, summary: Summary, path: Path | None, writer: Writer | None, resumed_at: int | None = None
    ) -> None:
        """Appends a record to a file, with the correlations of its measurement, and gives it to a writer.

        The writer takes scalars, and words where it has ``add_text``.  The first record of a training that was resumed
        says after which step: those of later steps, before it in the file, were of what was lost.
        """
        if path is not None:
            line = {**record.to_dict(), "correlations": _lower_triangle(correlations(summary))}
            line |= {} if resumed_at is None else {RESUMED: resumed_at}
            text = json.dumps(line, ensure_ascii=False) + "\n"
            self._attempt(lambda: _append(path, text), str(path))
        if writer is not None:
            self._attempt(lambda: _give(record, writer), f"its writer, a {type(writer).__name__}")

    def _attempt(self, put: Callable[[], None], where: str) -> None:
        """Warns once of each place that takes nothing; what comes later is tried again: a disk may have room then."""
        try:
            put()
        except Exception as error:
            if where not in self._told:
                self._told.add(where)
                warn(
                    f"the Monitor cannot write to {where} ({_cause(error)}): training goes on, and monitor.records "
                    "has what is not written"
                )


def _append(path: Path, text: str) -> None:
    """Appends a line as a whole, or nothing: the next one must not follow half of one."""
    whole = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            if path.is_file():
                os.truncate(path, whole)
        raise


def _give(record: Record, writer: Writer) -> None:
    for tag, value in record.scalars().items():
        writer.add_scalar(tag, value, record.step)
    if hasattr(writer, "add_text"):
        writer.add_text(TAG, markdown(record.sentences), record.step)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"


def frame_of(records: Iterable[Record]) -> Any:
    """Records as a ``pandas.DataFrame``, one row for each record and group.

    Raises:
        ImportError: pandas is missing.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("to_frame() needs pandas: pip install 'newton-summary[frames]'") from error
    columns = ("learning_rates", "alone", "low", "high", "joint", "words")
    rows = [
        {
            "step": record.step,
            "group": name,
            **{key.removesuffix("s") if key != "words" else key: getattr(record, key)[i] for key in columns},
            "samples": record.samples,
            "loss": record.loss,
            "predicted_decrease": record.predicted_decrease,
            "actual_decrease": record.actual_decrease,
        }
        for record in records
        for i, name in enumerate(record.names)
    ]
    return pandas.DataFrame(rows)


def _lower_triangle(matrix: Tensor) -> list[list[float]]:
    """The rows of a symmetric matrix, each up to the diagonal, to three decimals."""
    return [[round(value, 3) for value in row[: i + 1]] for i, row in enumerate(matrix.tolist())]
