"""Runs for the tests of the report: real small ones, and one that was made up to be difficult."""

from __future__ import annotations

from dataclasses import replace

import torch

from newton_summary import Summary
from newton_summary.report.monitor_log import Entry, MonitorLog
from newton_summary.report.reading import Record
from newton_summary.report.records import Config, Row, Snapshot
from newton_summary.watch import record
from newton_summary.watch.advice import advise, correlations
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


def watched(groups: int, count: int, names=None) -> MonitorLog:
    """What a monitor would have written of a run, with groups of which some stand out."""
    generator = torch.Generator().manual_seed(groups)
    names = tuple(names or [f"transformer.layers.{i}.attention.weight" for i in range(groups)])
    root = torch.randn(groups, groups, generator=generator, dtype=torch.float64)
    gradient = 10 ** (4 * torch.rand(groups, generator=generator, dtype=torch.float64))
    hessian = root @ root.T / groups + torch.eye(groups)
    parts = [Summary(1.0, gradient * (1 + e), hessian, None, names) for e in (-0.1, 0.0, 0.1)]
    advice = advise(parts)
    first = record.Record(
        step=0,
        loss=1.0,
        predicted_decrease=advice.predicted_decrease,
        actual_decrease=0.1,
        names=names,
        learning_rates=(0.1,) * groups,
        **{key: tuple(getattr(g, key) for g in advice.groups) for key in ("alone", "low", "high", "joint", "words")},
        headline=advice.headline,
        sentences=tuple(advice.sentences()),
        middle=advice.middle,
        batches=3,
        level=0.9,
    )
    between = Summary(1.0, torch.zeros(groups), correlations(parts[1]), None, names)
    records = (replace(first, step=10 * i, loss=1 / (1 + i)) for i in range(count))
    return MonitorLog("run.jsonl", [Entry(found, between) for found in records], 1, 1, False)
