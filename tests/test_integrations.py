"""The package without its optional companions: the core works, and what misses one names the cure."""

from __future__ import annotations

import subprocess
import sys

COMPANIONS = ("tensorboard", "lightning", "pytorch_lightning", "transformers", "matplotlib", "pandas", "sklearn")

CODE = f"""
import importlib, sys
for name in {COMPANIONS}:
    sys.modules[name] = None
import newton_summary, newton_summary.report, newton_summary.cli, newton_summary.integrations.news
for name in ("tensorboard", "lightning", "transformers"):
    try:
        importlib.import_module("newton_summary.integrations." + name)
    except ImportError as error:
        print(error)
model = newton_summary.optim.newton_summary.nn.Linear(2, 1)
print(newton_summary.summarize(lambda m, b: m(b).square().mean(), model, [model.weight.detach()]).names)
"""


def test_the_core_needs_none_of_them_and_a_missing_one_is_named():
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "this needs tensorboard: pip install 'newton-summary[tensorboard]'",
        "this needs Lightning: pip install 'newton-summary[lightning]'",
        "this needs transformers: pip install 'newton-summary[transformers]'",
        "('weight', 'bias')",
    ]


def test_the_package_loads_none_of_them():
    code = f"import sys, newton_summary; print([name for name in {COMPANIONS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
