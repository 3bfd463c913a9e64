"""What was run, one JSON object a line: it is never run again, and a run that is cut off loses nothing before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def append(path: Path, row: Mapping[str, Any], digits: int | None = None) -> None:
    """Adds a row to a file, with so many significant digits of its numbers and of those in its lists; default: all."""
    short = row if digits is None else {key: _short(value, digits) for key, value in row.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(short, ensure_ascii=False) + "\n")


def _short(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_short(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
