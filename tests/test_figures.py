"""The figures of the README and of docs/results.md are those of results/: rounded, and none of an earlier run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AT_ADAMS_TIME = "## Ratios of losses where all stop at the processor time of Adam's run"
AT_EQUAL_EPOCHS = "## Ratios of losses at equal epochs"
RIVALS = {  # what the pages call them, and the tables
    "Adam, best rate of a search": "adam",
    "NAdam": "nadam",
    "AdamW with a cosine schedule": "adamw-cosine",
    "SGD with momentum": "sgd",
    "Adam at 1e-3": "adam, 1e-3",
    "Prodigy": "prodigy",
    "Schedule-Free AdamW": "schedule-free",
    "D-Adapt Adam": "d-adapt",
    "SOAP": "soap",
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def ratios(suite: str, section: str, form: str = "default") -> dict[str, list[float]]:
    """By rival the geometric mean and the worst ratio, as a suite's page has them."""
    lines = (ROOT / "results" / suite / f"{suite}.md").read_text().partition(section)[2].splitlines()
    header, _, *rows = [line for line in lines[: lines.index("", 6) + 1] if line.startswith("|")]
    row = next(cells(row) for row in rows if cells(row)[0] == form)
    return {name: numbers(cell) for name, cell in zip(cells(header)[1:], row[1:], strict=True)}


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*", cell)]


def agree(written: str, found: list[float]) -> bool:
    """Whether what is written is what was found, rounded to as many digits as it has."""
    texts = re.findall(r"\d+\.?\d*", written)
    return len(texts) == len(found) and all(
        abs(float(text) - number) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) + 1e-9
        for text, number in zip(texts, found, strict=True)
    )


def rows_of(page: str, start: str) -> dict[str, list[str]]:
    """The rows of the table that begins so, by their first cells, in full."""
    lines = (ROOT / page).read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(start))
    end = next(n for n, line in enumerate(lines[first:], first) if not line.startswith("|"))
    return {name: rest for name, *rest in map(cells, lines[first + 2 : end])}


@pytest.mark.parametrize(
    ("page", "start", "columns"),
    [
        ("README.md", "| against |", [("untuned", AT_ADAMS_TIME), ("held-out", AT_ADAMS_TIME)]),
        (
            "docs/results.md",
            "| against |",
            [(suite, section) for suite in ("untuned", "held-out") for section in (AT_ADAMS_TIME, AT_EQUAL_EPOCHS)],
        ),
    ],
)
def test_ratios_to_the_rivals_are_those_of_the_judge(page, start, columns) -> None:
    rows = {name: row for name, row in rows_of(page, start).items() if "steps=" not in name}
    assert len(rows) == len(RIVALS)
    for name, row in rows.items():
        rival = next(key for title, key in RIVALS.items() if name.startswith(title))
        for written, (suite, section) in zip(row, columns, strict=True):
            assert agree(written, ratios(suite, section)[rival]), f"{page}: {name}, {suite}: {written}"


def test_what_the_length_is_worth_is_that_of_the_judge() -> None:
    row = next(row for name, row in rows_of("README.md", "| against |").items() if "steps=" in name)
    for written, suite in zip(row, ("untuned", "held-out"), strict=True):
        assert agree(written, ratios(suite, AT_ADAMS_TIME, "steps")["adam"]), f"{suite}: {written}"


def test_a_figure_that_is_rounded_otherwise_is_seen() -> None:
    assert agree("0.49 (**1.1**)", [0.49, 1.07])
    assert not agree("0.49 (1.1)", [0.48, 1.07])
    assert not agree("0.49 (1.1)", [0.49, 1.16])
