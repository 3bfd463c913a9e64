"""What the README shows is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_learns(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    model, loss_fn, x, y = (names[name] for name in ("model", "loss_fn", "x", "y"))
    assert loss_fn(model, (x, y)).item() < 0.3
    assert set(names["optimizer"].rates) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert "0.weight" in capsys.readouterr().out


def test_what_the_readme_points_to_exists() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
