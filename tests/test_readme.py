"""What the README and CONTRIBUTING show is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from newton_summary.measure import rules

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_has_ten_lines_runs_and_learns(capsys) -> None:
    train, look = blocks(README)
    assert len([line for line in train.splitlines() if line.strip()]) == 10
    names: dict[str, object] = {}
    exec(compile(train, "README.md", "exec"), names)
    model, loss_fn, batches = (names[name] for name in ("model", "loss_fn", "batches"))
    assert sum(loss_fn(model, batch).item() for batch in batches) / len(batches) < 0.1
    assert set(names["optimizer"].rates) == {"all"}
    exec(compile(look, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "all" in printed
    assert "torch.float64" in printed


def test_what_contributing_shows_passes_the_suite(monkeypatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    names: dict[str, object] = {}
    found = blocks(CONTRIBUTING)
    assert len(found) == 3
    for block in found:
        assert "check_" in block
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=lambda page: page.name)
def test_what_a_page_points_to_exists(page) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    made = "docs/gallery/"  # by make docs, of examples/
    paths = [t.replace(made, "examples/").removesuffix(".md") + ".py" if t.startswith(made) else t for t in targets]
    assert [path for path in paths if not (ROOT / path).exists()] == []
