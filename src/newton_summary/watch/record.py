"""What a monitor remembers of a measurement, as plain numbers and words, and how that is read back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

TAG = "newton_summary/advice"
"""The tag of the advice in words, wherever numbers and words are logged together."""

RESUMED = "resumed_at"
"""Beside the first record of a resumed training in a file: the number of steps that it went on from."""


@dataclass(frozen=True)
class Record:
    """One measurement, as plain numbers; one entry for each group in every tuple but ``sentences``.

    Args:
        step: the number of the optimizer's steps before it, since the monitor was made; those of before a training
            was resumed included, where the monitor was, too.
        loss: on the measured batches, before the step.
        predicted_decrease: of that loss by the optimizer's step, in the quadratic model of these very batches.
        actual_decrease: of that loss, on these batches and with the same random numbers; NaN until the step was taken.
        names: of the groups.
        learning_rates: the optimizer's; NaN for a group that it does not hold.
        alone: the advised factors on them, each group by itself.
        low: the lower ends of their intervals; NaN where a single batch was measured.
        high: the upper ends.
        joint: the advised factors when all groups change together; NaN where that has no solution.
        words: what there is to say of each group; empty where that is nothing.
        headline: the one sentence to read first.
        sentences: all that there is to say, as :meth:`~newton_summary.watch.advice.Advice.sentences` has it.
        middle: the median factor of the groups along which the loss falls.
        batches: how many the advice was made of.
        level: the confidence of the intervals.
        samples: how many were measured, in all batches and processes; 0 where batches were taken whole, as asked for.
        available: how many samples those batches had.
    """

    step: int
    loss: float
    predicted_decrease: float
    actual_decrease: float
    names: tuple[str, ...]
    learning_rates: tuple[float, ...]
    alone: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    joint: tuple[float, ...]
    words: tuple[str, ...]
    headline: str = ""
    sentences: tuple[str, ...] = ()
    middle: float = math.nan
    batches: int = 0
    level: float = math.nan
    samples: int = 0
    available: int = 0

    @property
    def measured_on(self) -> str:
        """Which part of the batches was measured, in words; nothing where that was not a question."""
        if not self.samples:
            return ""
        return f"{self.samples} of {self.available} samples" if self.samples < self.available else "whole batches"

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON: ``None`` stands for what is infinite or unknown."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """The record that :meth:`to_dict` made this of; other keys are left aside.

        A factor of ``None`` is infinite, but for a joint one, which then has no solution, and for both ends of the
        intervals of a single batch: where the number of batches is not there, one of which no group has a lower one.

        Raises:
            KeyError: something is missing.
            TypeError: something is of the wrong kind.
            ValueError: there are no groups, or not as many entries as groups.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        required = [field.name for field in fields(cls) if field.default is MISSING]
        missing = [key for key in required if key not in values]
        if missing:
            raise KeyError(", ".join(missing))
        known = {key: _read(value, kinds[key]) for key, value in values.items() if key in kinds}
        for key in required:
            if kinds[key].startswith("tuple") and len(known[key]) != max(len(known["names"]), 1):
                raise ValueError(f"{len(known[key])} entries in {key!r} for {len(known['names'])} groups")
        is_single = known.get("batches", 0) < 2 and all(math.isnan(low) for low in known["low"])
        unlimited = ("alone",) if is_single else ("alone", "low", "high")
        for key in unlimited:
            known[key] = tuple(math.inf if math.isnan(value) else value for value in known[key])
        return cls(**known)

    def scalars(self) -> dict[str, float]:
        """What loggers take: the decreases and every group's factors, by tags, as far as they are finite."""
        scalars = {f"newton_summary/{key}": getattr(self, key) for key in ("predicted_decrease", "actual_decrease")}
        scalars |= {"newton_summary/samples": float(self.samples)} if self.samples else {}
        for key in ("alone", "joint"):
            scalars |= {f"newton_summary/{key}/{n}": v for n, v in zip(self.names, getattr(self, key), strict=True)}
        return {tag: value for tag, value in scalars.items() if math.isfinite(value)}


def markdown(sentences: Sequence[str]) -> str:
    """Sentences as a list, for loggers that take text: names stand between backticks already."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any, kind: str) -> Any:
    """What stands in JSON, as a field of this kind; ``None`` becomes NaN."""
    if kind.startswith("tuple"):
        if not isinstance(value, list):
            raise TypeError(f"a list was expected, not {value!r}")
        return tuple(_read(item, kind.removeprefix("tuple[").removesuffix(", ...]")) for item in value)
    if kind == "str":
        if not isinstance(value, str):
            raise TypeError(f"a text was expected, not {value!r}")
        return value
    if value is None and kind == "float":
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a number was expected, not {value!r}")
    return int(value) if kind == "int" else float(value)
