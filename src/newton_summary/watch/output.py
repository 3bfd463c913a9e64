"""Where a monitor's records go: a file, a writer of scalars, a frame."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from newton_summary.summary import Summary
from newton_summary.watch.advice import correlations
from newton_summary.watch.record import TAG, Record, markdown


class Writer(Protocol):
    """What scalars are written to, such as a TensorBoard ``SummaryWriter``.

    Where it has ``add_text(tag, text, step)``, too, it gets the advice in words.
    """

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Takes one number."""
        ...


def write(record: Record, summary: Summary, path: Path | None, writer: Writer | None) -> None:
    """Appends a record to a file, with the correlations of its measurement, and gives it to a writer."""
    if path is not None:
        line = {**record.to_dict(), "correlations": _lower_triangle(correlations(summary))}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if writer is not None:
        for tag, value in record.scalars().items():
            writer.add_scalar(tag, value, record.step)
        if hasattr(writer, "add_text"):
            writer.add_text(TAG, markdown(record.sentences), record.step)


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
