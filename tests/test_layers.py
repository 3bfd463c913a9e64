"""The house: data flows one way, so imports run downward only, without a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import newton_summary
import newton_summary_experiments

CORE = {"_checks", "_effects", "_frozen", "_html", "_uncompiled", "_warned", "errors", "partition", "summary"}
MAY_IMPORT: dict[str, set[str]] = {
    "_assignment": set(),
    "_checks": set(),
    "_effects": set(),
    "architecture": set(),
    "_frozen": {"_warned"},
    "_html": set(),
    "_uncompiled": set(),
    "_warned": set(),
    "errors": set(),
    "partition": {"_assignment", "_checks", "architecture"},
    "summary": {"_checks", "_html"},
    "parallel": CORE,
    "measure": CORE | {"parallel"},  # and no solver
    "solve": CORE,  # and no model
    "optim": CORE | {"parallel", "measure", "solve"},
    "watch": CORE | {"parallel", "measure", "solve", "optim"},
    "plots": CORE | {"solve", "watch"},
    "report": CORE | {"watch"},
    "integrations": CORE | {"measure", "optim", "watch", "plots"},
    "testing": CORE | {"measure", "solve", "optim"},
    "cli": CORE | {"report"},
}
"""For each folder and file of the package, which others it may import, wherever in a file it does."""

PACKAGES = {package.__name__: Path(package.__path__[0]) for package in (newton_summary, newton_summary_experiments)}


def modules() -> dict[str, Path]:
    """Every module of both packages."""
    return {
        ".".join((name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
        for name, root in PACKAGES.items()
        for path in sorted(root.rglob("*.py"))
    }


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, inside its functions too; what is for the type checker alone is left out."""
    known = modules()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            yield from parts
            if len(parts) < len(node.names):
                yield node.module
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"


GRAPH = {name: set(imports(path)) - {name} for name, path in modules().items()}


def layer(module: str) -> str:
    """The folder or file of the library that a module is in."""
    return module.split(".")[1]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_downward(name) -> None:
    own = {module: used for module, used in GRAPH.items() if module.split(".")[:2] == ["newton_summary", name]}
    assert own
    for module, used in own.items():
        wrong = {u for u in used if u == "newton_summary" or not u.startswith("newton_summary.")}
        wrong |= {u for u in used - wrong if layer(u) not in MAY_IMPORT[name] | {name}}
        assert not wrong, f"{module} may not import {', '.join(sorted(wrong))}"


def test_every_part_has_its_layer() -> None:
    assert {layer(m) for m in GRAPH if m.startswith("newton_summary.")} == set(MAY_IMPORT)


def test_there_is_no_circle() -> None:
    left = {module: set(used) for module, used in GRAPH.items()}
    while done := {module for module, used in left.items() if not used & set(left)}:
        left = {module: used for module, used in left.items() if module not in done}
    assert not left, f"these import each other, or what does: {', '.join(sorted(left))}"


def test_the_walk_sees_imports() -> None:
    """Else the tests above would pass on nothing."""
    assert "newton_summary.solve.cubic" in GRAPH["newton_summary.solve"]
    assert "newton_summary.report" in GRAPH["newton_summary.cli"]  # inside a function
    assert "newton_summary.plots" in GRAPH["newton_summary_experiments.figures"]
    assert "newton_summary.watch.monitor" not in GRAPH["newton_summary.plots.monitoring"]  # for types alone
