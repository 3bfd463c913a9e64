"""Checks of arguments that several modules share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def _check_number(what: str, value: object) -> None:
    """Raises unless the value is a number, which what a configuration file has as text is not."""
    if not hasattr(value, "__float__") or math.prod(getattr(value, "shape", ())) != 1:
        raise TypeError(f"{what} must be a number, got {value!r}, of type {type(value).__name__}")


def check_fraction(what: str, value: float) -> None:
    """Raises unless the value is in [0, 1)."""
    _check_number(what, value)
    if not 0 <= value < 1:
        raise ValueError(f"{what} must be in [0, 1), got {value}")


def check_positive(what: str, value: float) -> None:
    """Raises unless the value is a positive finite number."""
    _check_number(what, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{what} must be positive, got {value}")


def check_count(what: str, value: int, least: int = 1) -> None:
    """Raises unless the value is a whole number from ``least`` on."""
    _check_number(what, value)
    if not (least <= value < math.inf and value == int(value)):
        raise ValueError(f"{what} must be a whole number from {least} on, got {value}")


def check_not_negative(what: str, value: float) -> None:
    """Raises unless the value is a finite number from 0 on."""
    _check_number(what, value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{what} must not be negative, got {value}")


def check_batches(what: str, batches: Any) -> None:
    """Raises where one batch, or a data set of single samples, stands in the place of an iterable of batches."""
    is_pair = isinstance(batches, tuple) and batches and all(isinstance(item, Tensor) for item in batches)
    if is_pair or isinstance(batches, Tensor | Mapping):
        raise ValueError(f"{what} must be an iterable of batches, got one {type(batches).__name__}: pass [batch]")
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"{what} must be an iterable of batches, got {type(batches).__name__}: pass a list of batches, or of a "
            "data set a DataLoader"
        )


def check_memory(memory: float | None) -> float | None:
    """A number of bytes, if one is given; raises unless it is positive and finite."""
    if memory is not None:
        check_positive("memory", memory)
    return memory
