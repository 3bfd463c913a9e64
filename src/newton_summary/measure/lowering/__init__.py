"""Fused operations written as simpler ones, which the rules know (docs/engine.md)."""

from __future__ import annotations

from newton_summary.measure.lowering import (
    algebra,
    arithmetic,
    attention,
    complex_numbers,
    losses,
    normalisation,
    quantisation,
    sampling,
    selection,
)
from newton_summary.measure.lowering.squares import square_of
from newton_summary.measure.lowering.table import CONSTANT, Lowering, lowering_of

__all__ = [
    "CONSTANT",
    "Lowering",
    "algebra",
    "arithmetic",
    "attention",
    "complex_numbers",
    "losses",
    "lowering_of",
    "normalisation",
    "quantisation",
    "sampling",
    "selection",
    "square_of",
]
