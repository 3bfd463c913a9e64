"""Every example in a docstring of the package runs as it stands there."""

import doctest
import importlib
import pkgutil

import pytest

import newton_summary
import newton_summary_experiments
from newton_summary.measure import rules

MODULES = sorted(
    module.name
    for package in (newton_summary, newton_summary_experiments)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)


def documented(module_name):
    """The examples of a module, or a skip where it needs an extra that is not installed."""
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if (error.name or "").startswith("newton_summary"):
            raise
        pytest.skip(f"needs an extra: {error}")
    return module, [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))  # an example adds one
    _, tests = documented(name)
    for test in tests:
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        output = []
        runner.run(test, out=output.append)
        assert runner.summarize(verbose=False).failed == 0, "".join(output)


def test_there_are_examples():
    """Else the tests above would pass on nothing."""
    names = [test.name for m in ("partition", "summary", "measure") for test in documented(f"newton_summary.{m}")[1]]
    assert names == [
        "newton_summary.partition.Partition",
        "newton_summary.partition.Partition.by_optimizer",
        "newton_summary.partition.Partition.heads",
        "newton_summary.summary.Summary",
        "newton_summary.measure.summarize",
    ]
