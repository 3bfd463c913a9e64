"""Docstrings as the site shows them: roles and mentions of pages become links, `Example:` a section of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

DOCS = Path(__file__).parents[1]

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)([\w.]+)`")
_METHOD = {1: "1-derivatives-according-to-a-partition", 2: "2-the-step", 3: "3-what-must-hold", 4: "4-the-experiments"}
_SOLVERS = {"cubic", "newton", "ridge", "line_search"}  # functions that have the names of their modules
_PAGES = {path.stem for path in DOCS.glob("*.md")}  # whose titles have anchors: on_page_markdown in gallery.py


class Links(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value, obj)


def rewritten(text: str, obj: griffe.Object) -> str:
    """A docstring with links."""
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*)Source:$", r"\1Note: Source", text, flags=re.MULTILINE)
    text = _ROLE.sub(lambda match: _link(match[1], match[2], obj), text)
    text = re.sub(
        r"`{0,2}docs/method\.md`{0,2}, section (\d)", lambda m: f"[method, section {m[1]}][{_METHOD[int(m[1])]}]", text
    )
    return re.sub(r"`{0,2}docs/(\w+)\.md`{0,2}", lambda m: f"[{m[1]}][page-{m[1]}]" if m[1] in _PAGES else m[0], text)


def _link(tilde: str, target: str, obj: griffe.Object) -> str:
    shown = target.rpartition(".")[2] if tilde else target
    if not target.startswith("newton_summary"):
        owner = obj if obj.is_class or obj.is_module else obj.parent
        members = owner.members if owner is not None else {}
        target = f"{owner.path}.{target}" if target in members else f"{obj.module.path}.{target}"
    if target.removeprefix("newton_summary.solve.") in _SOLVERS:
        target += f".{shown}"
    return f"[`{shown}`][{target}]"
