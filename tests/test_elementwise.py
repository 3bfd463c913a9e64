"""Closed derivatives of functions by entry, against nested differentiation of torch's own in double precision."""

from __future__ import annotations

import pytest
import torch

from newton_summary.measure.rules.call import Call
from newton_summary.measure.rules.elementwise import TABLE, nested

RANGES = {"acosh": (1.1, 3.0), "asin": (-0.9, 0.9), "acos": (-0.9, 0.9), "atanh": (-0.9, 0.9), "hardswish": (-5.0, 5.0)}
POSITIVE = {"log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "digamma", "pow"}
MORE = {"pow": (2.5,), "threshold": (0.3, 0.1), "clamp": (-0.5, 0.4), "clamp_min": (-0.5,), "clamp_max": (0.4,)}


def name_of(op) -> str:
    return op._schema.name.removeprefix("aten::")


@pytest.mark.parametrize("op", TABLE, ids=name_of)
def test_derivatives_by_entry(op) -> None:
    name = name_of(op)
    low, high = RANGES.get(name, (0.2, 2.5) if name in POSITIVE else (-2.5, 2.5))
    x = torch.linspace(low, high, 40, dtype=torch.float64)
    args = (x, *MORE.get(name, ()))
    call = Call(op, args, {}, op(*args), {})
    order = 1 if TABLE[op].piecewise_linear else 3
    for got, expected in zip(TABLE[op].derivatives(call, order), nested(call, order), strict=False):
        value = torch.zeros_like(x) if got is None else got
        torch.testing.assert_close(value.to(x.dtype), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("args", [(), (2.0,), (0.5, 3.0)])
def test_softplus_with_its_own_numbers(args) -> None:
    x = torch.linspace(-8, 8, 30, dtype=torch.float64)
    op = torch.ops.aten.softplus.default
    call = Call(op, (x, *args), {}, op(x, *args), {})
    for got, expected in zip(TABLE[op].derivatives(call, 3), nested(call, 3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
