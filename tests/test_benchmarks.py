"""What the scripts of benchmarks/ share."""

from __future__ import annotations

import pytest
from studies import benchmark


@pytest.fixture(scope="module")
def jsonl():
    with benchmark("jsonl") as module:
        yield module


def test_rows_are_added_to_a_file_with_the_digits_asked_for(jsonl, tmp_path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    assert jsonl.read(path) == []
    row = {"name": "größer", "loss": 0.123456789, "curve": [1.0, 2 / 3], "seed": 123456789, "failed": None}
    jsonl.append(path, row)
    jsonl.append(path, row, digits=3)
    exact, short = jsonl.read(path)
    assert exact == row
    assert short == row | {"loss": 0.123, "curve": [1.0, 0.667]}, "whole numbers keep their digits"
    assert "größer" in path.read_text(encoding="utf-8")
