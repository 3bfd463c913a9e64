"""What the README, the quick start and CONTRIBUTING show is run as it stands there; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from newton_summary.measure import rules

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_is_one_screen() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 100


def run(page: Path) -> dict[str, object]:
    """The names that a page's blocks leave, run from top to bottom."""
    names: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
    return names


def mean_loss(names) -> float:
    loss_fn, model, batches = (names[name] for name in ("loss_fn", "model", "batches"))
    return sum(loss_fn(model, batch).item() for batch in batches) / len(batches)


def test_the_readme_looks_finds_and_trains(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    look, find, train = blocks(README)
    assert "summarize" in look
    assert "suggest_rates" in find
    assert "NewtonSummary" in train
    names = run(README)
    assert (tmp_path / "interactions.png").stat().st_size > 5000
    assert names["summary"].hessian.shape == (6, 6)
    assert mean_loss(names) < 0.1
    assert set(names["optimizer"].rates) == {name for name, _ in names["model"].named_parameters()}
    assert "Suggested learning rates" in capsys.readouterr().out


def test_the_quick_start_is_quick_and_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "quickstart.md"
    first = [line for line in blocks(page)[0].splitlines() if line.strip()]
    assert len(first) + 1 < 10, "with the line that installs it"
    names = run(page)
    for picture in ("interactions.png", "correlations.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    assert names["summary"].names == ("0", "3")
    assert "factors on the learning rates" in capsys.readouterr().out


def test_what_contributing_shows_passes_the_suite(monkeypatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    names: dict[str, object] = {}
    found = blocks(CONTRIBUTING)
    assert len(found) == 3
    for block in found:
        assert "check_" in block
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)


PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", ROOT / "experiments" / "README.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_points_to_exists(page) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", text)
    missing = []
    for target, anchor in targets:
        where = (page.parent / target).resolve()
        if where.parent.name == "gallery":  # made by make docs, of examples/
            where = ROOT / "examples" / f"{where.stem}.py"
        elif where.name in ("changelog.md", "contributing.md"):
            where = ROOT / where.name.upper().replace(".MD", ".md")
        headings = re.findall(r"^#+ (.+)$", where.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        is_on_the_site = ROOT / "results" not in where.parents or where.suffix in (".md", ".png", ".svg")
        if not where.exists() or (anchor and anchor not in slugs) or not is_on_the_site:
            missing.append(f"{target}#{anchor}")
    assert not missing
