"""Checks of arguments that several modules share."""

from __future__ import annotations

import math


def check_fraction(what: str, value: float) -> None:
    """Raises unless the value is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{what} must be in [0, 1), got {value}")


def check_positive(what: str, value: float) -> None:
    """Raises unless the value is a positive finite number."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{what} must be positive, got {value}")


def check_not_negative(what: str, value: float) -> None:
    """Raises unless the value is a finite number from 0 on."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{what} must not be negative, got {value}")
