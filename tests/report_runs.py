"""Runs for the tests of the report: real small ones, and one that was made up to be difficult."""

from __future__ import annotations

import torch

from newton_summary import Summary
from newton_summary.report.reading import Record
from newton_summary.report.records import Config, Row, Snapshot
from newton_summary_experiments.comparison import Plan, compare
from newton_summary_experiments.models import mlp
from newton_summary_experiments.tasks import TASKS, Task

SMALL = Task("small", lambda: mlp([64, 8, 10]), epochs=6, rates={"sgd": 0.1, "adam": 0.01})
EVIL = '<script>alert("1")</script>&"\'><b>'


def trained(folder):
    """A comparison in a folder, and its task's data."""
    data = SMALL.read()
    TASKS["small"] = SMALL
    try:
        compare(Plan("small", ("newton-summary", "adam"), (0,), 6, 1), data, folder)
    finally:
        del TASKS["small"]
    return folder


def made_up(groups: int, moments: int, optimizer: str = "adam", names=None) -> Record:
    """A run with as many groups and snapshots as wanted; H̄ is indefinite, and the second group was not moved."""
    generator = torch.Generator().manual_seed(groups)
    names = names or [f"transformer.layers.{i}.attention.weight" for i in range(groups)]
    parts = []
    for _ in range(3):
        root = torch.randn(groups, groups, generator=generator, dtype=torch.float64)
        gradient, third = torch.rand(2, groups, generator=generator, dtype=torch.float64)
        parts.append(Summary(1.0, gradient, root + root.T, third, tuple(names)).to_dict())
    return Record(
        config=Config("small", optimizer, 0.01, moments),
        data={"digest": "0", "train": 100, "validation": 10},
        environments=[{"torch": "2", "python": "3"}],
        rows=[Row(i, 10 * i, 1 / (1 + i), None, 0.5, i, 0.01, dict.fromkeys(names, 0.1)) for i in range(moments + 1)],
        sizes=dict.fromkeys(names, 1000),
        snapshots=[Snapshot(i, 10 * i, 0.1, parts, [names[1]]) for i in range(moments)],
    )
