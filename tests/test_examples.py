"""The examples of the gallery run, and what their pages are made of; what their text says of the results holds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "_tools" / "gallery.py")
gallery = sys.modules["gallery"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gallery)


def printed(cells) -> str:
    return "".join(cell.output for cell in cells)


def look(cells, names) -> None:
    assert names["after"].loss < 0.1 * names["before"].loss
    assert len(re.findall(r"^\d\.\w+ +slope", printed(cells), re.MULTILINE)) == 8
    assert names["layers"].names == ("first", "second", "third", "last")


def adamw_rates(cells, names) -> None:
    assert min(names["suggested"].rates.values()) > 1e-3
    assert "too small" in printed(cells)
    last = {name: sum(losses[-36:]) for name, losses in names["runs"].items()}
    assert last["suggested"] < last["1e-3 everywhere, torch's default"] < last["1e-4 everywhere"]


def train(cells, names) -> None:
    assert float(names["right"]) > 0.95
    assert names["optimizer"].counts["compared"] > 10
    assert len({rates[-100] for rates in names["history"].values()}) > 1


def pinn(cells, names) -> None:
    last = {name: sum(losses[-50:]) for name, losses in names["runs"].items()}
    assert last["newton-summary"] < last["Adam, 1e-3"]  # torch's default rate


def transformer(cells, names) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+) in the last 30", printed(cells))]
    assert len(losses) == 4
    assert losses[3] < losses[0]  # nothing tuned against AdamW at torch's default rate


def own_partition(cells, names) -> None:
    assert names["loss"].item() < 0.3  # of one batch
    assert "in no group: add it to one" in printed(cells)


def own_solver(cells, names) -> None:
    assert "with the groups in other units the step is" in printed(cells)
    assert "passed" in printed(cells)
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+) after", printed(cells))]
    assert len(losses) == 2
    assert max(losses) < 0.1


def layers(cells, names) -> None:
    assert names["monitor"].summary.loss < 2.5
    between = names["plots"].matrices.correlations_of(names["monitor"].summary)
    where = names["partition"].names.index
    assert all(between[where(f"{b} mlp in"), where(f"{b} mlp out")] > 0.4 for b in range(1, 5))
    assert "next to the other groups" in printed(cells)


def heads(cells, names) -> None:
    assert names["summary"].loss < 2.9
    assert len(names["partition"]) == 17
    assert names["within"] > names["across"] > 0


def batch_norm(cells, names) -> None:
    assert all(summary.loss < 0.2 for summary in names["summaries"].values())
    assert names["neighbours"]["with batch norm"] < names["neighbours"]["without"] - 0.1
    between = {name: names["plots"].matrices.correlations_of(s) for name, s in names["summaries"].items()}
    last, head = between["with batch norm"], between["without"]
    assert head[-2, -1] > 0.7  # the last convolution and the head
    assert abs(last[-3, -1]) < 0.3
    assert last[-2, -1] > 0.5  # the last batch norm and the head


def lora(cells, names) -> None:
    assert names["monitor"].summary.loss < 3.5
    first = {group.name: group for group in names["first"].groups}
    assert len(first) == 16
    assert all(("does not move" in group.words) == name.endswith("A") for name, group in first.items())
    assert names["within"] > 2 * names["across"] > 0
    overlap = [a.high >= b.low and b.high >= a.low for a, b in zip(*[iter(names["advice"].groups)] * 2, strict=True)]
    assert sum(overlap) > len(overlap) / 2


EXAMPLES = {
    "layers": (layers, 1),
    "heads": (heads, 1),
    "batch_norm": (batch_norm, 1),
    "lora": (lora, 1),
    "look": (look, 3),
    "adamw_rates": (adamw_rates, 1),
    "train": (train, 1),
    "pinn": (pinn, 1),
    "transformer": (transformer, 1),
    "own_partition": (own_partition, 1),
    "own_solver": (own_solver, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_does_what_it_says(name) -> None:
    check, pictures = EXAMPLES[name]
    _, _, cells, names = gallery.run(ROOT / "examples" / f"{name}.py")
    check(cells, names)
    drawn = [picture for cell in cells for picture in cell.pictures.values()]
    assert len(drawn) == pictures
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in drawn)


def test_every_example_in_the_gallery_is_tested() -> None:
    shown = re.findall(r"gallery/(\w+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(EXAMPLES)


EXAMPLE = '''"""A title

An introduction.
"""

# %%
# Some *text*
# in two lines.
print("one")

# %%
from pathlib import Path  # noqa: E402

Path("dot.png").write_bytes(b"picture")
# %%
# More.
answer = 42
'''


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(EXAMPLE)
    return path


def test_a_page_has_text_code_output_and_pictures(example) -> None:
    text, pictures = gallery.page(example)
    assert pictures == {"small-dot.png": b"picture"}
    assert text == (
        "# A title\n\nAn introduction.\n\nSome *text* in two lines.\n\n```python\nprint(\"one\")\n```\n\n"
        "```text title=\"It prints\"\none\n```\n\n\n\n"
        "```python\nfrom pathlib import Path\n\nPath(\"dot.png\").write_bytes(b\"picture\")\n```\n\n"
        "![A title: dot](small-dot.png)\n\nMore.\n\n```python\nanswer = 42\n```\n\n"
        "The whole of it is `examples/small.py`.\n"
    )  # fmt: skip


def test_an_error_in_an_example_names_its_line(example) -> None:
    example.write_text(EXAMPLE.replace("answer = 42", "answer = 1 / 0"))
    with pytest.raises(ZeroDivisionError) as caught:
        gallery.run(example)
    assert caught.traceback[-1].lineno + 1 == 17
