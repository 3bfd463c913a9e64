"""What is shipped: the wheel in an environment with nothing but what the core needs, and what the files say of it.

The new environment takes torch and what else the core requires from this one, by links, and nothing more: extras are
missing there, and pip finds no requirement of the wheel's that is not met.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXPERIMENTS = tomllib.loads((ROOT / "experiments" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = {"dev", "zoo", "docs"}  # extras that nothing in the package imports

EXTRAS = {
    "plots": "ns.Summary(loss=1.0, gradient=[1.0], hessian=[[1.0]]).plot()",
    "frames": """
        model = torch.nn.Linear(1, 1)
        ns.Monitor(model, lambda m, b: m(b).mean(), optimizer=torch.optim.SGD(model.parameters(), lr=1.0)).to_frame()
        """,
    "experiments": "from newton_summary.cli import main; raise SystemExit(main(['train', 'digits', '--epochs', '1']))",
    "tensorboard": "import newton_summary.integrations.tensorboard",
    "lightning": "import newton_summary.integrations.lightning",
    "transformers": "import newton_summary.integrations.transformers",
}
"""Something that needs an extra, and fails without it."""


# Importing ------------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_that_takes_long() -> None:
    code = """
        import sys
        import torch
        before = set(sys.modules)
        import newton_summary
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
        print(*sorted(name for name in set(sys.modules) - before if name.startswith("newton_summary.")))
        """
    packages, modules = run([sys.executable, "-c", textwrap.dedent(code)]).stdout.splitlines()
    slow = {"scipy", "matplotlib", "pandas", "sklearn", "mpmath", "sympy", "tensorboard", "lightning", "transformers"}
    assert not slow & set(packages.split())
    assert "newton_summary.solve.secular" in modules
    for part in ("testing", "plots", "integrations", "report", "cli"):
        assert f"newton_summary.{part}" not in modules.split()
    assert "newton_summary_experiments" not in packages.split()


# The wheel ------------------------------------------------------------------------------------------------------------


def run(command: list[str], cwd: Path | None = None, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """A command that sees nothing of this checkout and of the environment's own settings of Python."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expect, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def required(names: list[str]) -> set[str]:
    """The distributions that these need, themselves included, with the extras that are asked for."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        asked = waiting.pop()
        for extra in {"", *asked.extras} - {extra for name, extra in found if name == asked.name}:
            found.add((asked.name, extra))
            needed = map(Requirement, importlib.metadata.requires(asked.name) or [])
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)])
    return folder


@pytest.fixture(scope="module")
def experiments(dist) -> Path:
    """The wheel of the package beside it."""
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist / "beside"), str(ROOT / "experiments")])
    (wheel,) = (dist / "beside").glob("*.whl")
    return wheel


def environment(folder: Path, names: list[str], wheel: Path) -> str:
    """The interpreter of a new environment with what these distributions need, and the wheel."""
    linked = folder / "linked"
    linked.mkdir()
    for name in required(names):
        distribution = importlib.metadata.distribution(name)
        assert distribution.files is not None
        for entry in {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (linked / entry).exists():
                (linked / entry).symlink_to(Path(str(distribution.locate_file(entry))))
    venv.create(folder / "venv", symlinks=True)
    interpreter = folder / "venv" / "bin" / "python"
    library = folder / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (library / "linked.pth").write_text(f"{linked}\n")
    run([sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-index", "--quiet", str(wheel)])
    return str(interpreter)


CORE = [Requirement(text).name for text in PROJECT["dependencies"]]


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory) -> str:
    """The interpreter of an environment into which the wheel was installed."""
    (wheel,) = dist.glob("*.whl")
    return environment(tmp_path_factory.mktemp("environment"), CORE, wheel)


@pytest.fixture(scope="module")
def newcomer(dist, tmp_path_factory) -> str:
    """The same with the extra for pictures."""
    (wheel,) = dist.glob("*.whl")
    return environment(tmp_path_factory.mktemp("newcomer"), [*CORE, "matplotlib"], wheel)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_licence(dist) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "newton_summary/py.typed" in names
    tracked = (
        run(["git", "ls-files", "src/newton_summary"], cwd=ROOT).stdout.split() if (ROOT / ".git").exists() else []
    )
    assert {name.removeprefix("src/") for name in tracked if (ROOT / name).exists()} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0] for name in names} == {
        "newton_summary",
        f"newton_summary-{PROJECT['version']}.dist-info",
    }
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        kept = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "docs/method.md", "results/solvers.md"} <= kept


@pytest.mark.slow
def test_a_newcomer_sees_a_heatmap_in_under_ten_lines(newcomer, tmp_path) -> None:
    first = blocks("docs/quickstart.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) + 1 < 10, "with the line that installs it"
    (tmp_path / "first.py").write_text(first)
    run([newcomer, "-W", "error", "first.py"], cwd=tmp_path)
    assert (tmp_path / "interactions.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_readme_runs_from_the_wheel_alone(newcomer, tmp_path) -> None:
    (tmp_path / "example.py").write_text(
        "\n".join([*blocks("README.md"), "import sys", "print(ns.__file__, 'pandas' in sys.modules)"])
    )
    printed = run([newcomer, "-W", "error", "example.py"], cwd=tmp_path).stdout
    assert "'0.weight': " in printed, "the rates of the tensors"
    where, pandas = printed.splitlines()[-1].split()
    assert Path(where).is_relative_to(Path(newcomer).parents[1])
    assert pandas == "False"
    for extra in ("pandas", "sklearn"):
        run([newcomer, "-c", f"import {extra}"], cwd=tmp_path, expect=1)
    command = Path(newcomer).parent / "newton-summary"
    assert "report" in run([str(command), "--help"], cwd=tmp_path).stdout


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_package_beside_it_adds_its_commands(python, experiments, tmp_path) -> None:
    names = zipfile.ZipFile(experiments).namelist()
    tracked = {path.name for path in (ROOT / "experiments" / "src" / "newton_summary_experiments").glob("*.py")}
    assert {f"newton_summary_experiments/{name}" for name in tracked} <= set(names)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--quiet"]
        run([*command, "--target", folder, str(experiments)])
        code = "import sys; from newton_summary.cli import main; sys.exit(main(['--help']))"
        added = f"import sys; sys.path.append({folder!r}); {code}"
        assert "interactions" not in run([python, "-c", code], cwd=tmp_path).stdout
        for extra in ("matplotlib", "sklearn"):
            run([python, "-c", f"import {extra}"], cwd=tmp_path, expect=1)
        assert "interactions" in run([python, "-c", added], cwd=tmp_path).stdout


def test_both_packages_have_one_version() -> None:
    assert EXPERIMENTS["version"] == PROJECT["version"]


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_names_the_pip_command(python, extra, tmp_path) -> None:
    code = f"import torch\nimport newton_summary as ns\n{textwrap.dedent(EXTRAS[extra])}"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert f"pip install 'newton-summary[{extra}]'" in last, done.stderr


def test_every_extra_is_tested() -> None:
    assert set(PROJECT["optional-dependencies"]) - TOOLS == set(EXTRAS)


# What the files say ---------------------------------------------------------------------------------------------------


def test_the_citation_is_complete_and_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what the format requires
    assert cited["cff-version"] == "1.2.0"
    assert cited["authors"] == [{"name": "The newton-summary authors"}]
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["identifiers"][0]["value"] == "arXiv:2312.03885"


def test_the_changelog_has_a_part_for_what_comes_and_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", text, re.MULTILINE)
    assert parts[0] == "Unreleased"
    assert len(parts) == 1 or parts[1] == PROJECT["version"]
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
