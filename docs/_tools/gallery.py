"""The parts of the site that are made while it is built: gallery pages, the changelog, and pages of figures.

A gallery page is an example that was run: text from its docstring and its cells (`# %%`), the code, what it printed,
and the pictures that it saved.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@dataclass
class Cell:
    """A part of an example.

    Args:
        text: Markdown.
        code: what is run.
        line: of the code in the file, from 1.
        output: what it printed.
        pictures: what it saved, by file name.
    """

    text: str
    code: str
    line: int
    output: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)


def read(path: Path) -> tuple[str, str, list[Cell]]:
    """An example's title, its introduction, and its cells."""
    head, *parts = path.read_text(encoding="utf-8").split("# %%\n")
    title, _, introduction = head.strip().strip('"').strip().partition("\n\n")
    cells, line = [], head.count("\n") + 1
    for part in parts:
        lines = part.split("\n")
        count = next((i for i, text in enumerate(lines) if not text.startswith("# ")), len(lines))
        text = " ".join(text.removeprefix("# ") for text in lines[:count])
        cells.append(Cell(text, "\n".join(lines[count:]), line + 1 + count))
        line += 1 + part.count("\n")
    return title, introduction, cells


def run(path: Path) -> tuple[str, str, list[Cell], dict[str, Any]]:
    """An example's title, introduction and cells with what they gave, and the names that it leaves."""
    title, introduction, cells = read(path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        for cell in cells:
            code = compile("\n" * (cell.line - 1) + cell.code, str(path), "exec")
            printed, before = io.StringIO(), set(os.listdir("."))
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            cell.output = printed.getvalue()
            new = sorted(set(os.listdir(".")) - before)
            cell.pictures = {name: Path(name).read_bytes() for name in new}
    return title, introduction, cells, names


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    home = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(home)


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of an example that was run, and its pictures by file name."""
    title, introduction, cells, _ = run(path)
    pieces, pictures = [f"# {title}", introduction], {}
    for cell in cells:
        code = re.sub(r"  # noqa.*", "", cell.code).strip("\n")
        pieces += [cell.text, f"```python\n{code}\n```"]
        if cell.output.strip():
            pieces.append(f'```text title="It prints"\n{cell.output.rstrip()}\n```')
        for name, content in cell.pictures.items():
            pictures[f"{path.stem}-{name}"] = content
            pieces.append(f"![{title}: {Path(name).stem}]({path.stem}-{name})")
    pieces.append(f"The whole of it is `examples/{path.name}`.")
    return "\n\n".join(pieces) + "\n", pictures


# What mkdocs calls --------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Gives every page in `docs/` and in `results/` a place in the navigation, also those that it does not name."""
    places = {title: pages for item in config["nav"] for title, pages in item.items() if isinstance(pages, list)}
    named = {page for pages in places.values() for item in pages for page in _pages(item)}
    places["How it works"] += [{_title(p): p.name} for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in named]
    places["Figures"] += [{_title(ROOT / name): name} for name in _results() if name.endswith(".md")]
    return config


def _pages(item: Any) -> list[str]:
    """The pages of an item of the navigation, which may have no title of its own."""
    return [item] if isinstance(item, str) else list(item.values())


def _title(path: Path) -> str:
    """The first heading of a page."""
    return path.read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0]


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made of files outside this folder."""
    from mkdocs.structure.files import File

    made: dict[str, str | bytes] = {"changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
    made["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    made |= {name: (ROOT / name).read_bytes() for name in _results()}
    for name in _gallery(config["nav"]):
        text, pictures = page(EXAMPLES / f"{Path(name).stem}.py")
        made[name] = text
        made |= {f"gallery/{picture}": content for picture, content in pictures.items()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links as they are on the site, where pages from the root lie beside the others; an anchor for each title."""
    name = page.file.src_uri.removesuffix(".md").replace("/", "-")
    markdown = re.sub(r"\A# (.+)", rf"# \1 {{#page-{name}}}", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?(results/)", r"](\1", markdown)
    if page.file.src_uri in ("changelog.md", "contributing.md"):
        markdown = markdown.replace("](docs/", "](")
        for name in ("CHANGELOG", "CONTRIBUTING"):
            markdown = markdown.replace(f"]({name}.md", f"]({name.lower()}.md")
    return markdown


def _results() -> list[str]:
    """Pages of figures and their pictures."""
    found = sorted((ROOT / "results").rglob("*"))
    return [path.relative_to(ROOT).as_posix() for path in found if path.suffix in (".md", ".png", ".svg")]


def _gallery(nav: Any) -> list[str]:
    """The gallery pages in the navigation."""
    if isinstance(nav, str):
        return [nav] if nav.startswith("gallery/") else []
    return [name for item in (nav.values() if isinstance(nav, dict) else nav) for name in _gallery(item)]
