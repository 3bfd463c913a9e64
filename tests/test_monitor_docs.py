"""docs/monitor.md runs as it stands, and its first picture takes fewer than ten lines."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "monitor.md"


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks[0].strip().splitlines()) + 1 < 10  # and the line with pip install
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
        if block is blocks[0]:
            assert (tmp_path / "interactions.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "factors on the learning rates" in printed
    assert "Suggested learning rates" in printed
