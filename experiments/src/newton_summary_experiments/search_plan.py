"""How long a trial of a search is, and where searches start, at each budget of the paper's experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from newton_summary_experiments import search
from newton_summary_experiments.search import PAPER, Grid

_Shares: TypeAlias = Mapping[str | tuple[str, str], int]
_Grids: TypeAlias = Mapping[str, Mapping[str, Grid]]

_SHARE = 3  # of a run, which is the length of a trial where nothing else is said

_NARROW: _Grids = {
    "mlp-mnist": {"sgd": {"lr": (-3, -1)}, "kfac": {"lr": (-5, -3), "damping": (-4, -2)}},
    "lenet-cifar10": {
        "adam": {"lr": (-6, -4)},
        "sgd": {"lr": (-5, -3)},
        "kfac": {"lr": (-5, -3), "damping": (-4, -2)},
    },
    "vgg-cifar10": {"sgd": {"lr": (-5, -3)}},
    "bigmlp-cifar10": {
        "adam": {"lr": (-8, -6)},
        "sgd": {"lr": (-6, -4)},
        "kfac": {"lr": (-7, -5), "damping": (-2, 0)},
    },
    "vbigmlp-cifar10": {
        "adam": {"lr": (-8, -6)},
        "sgd": {"lr": (-8, -6)},
        "kfac": {"lr": (-7, -5), "damping": (-2, 0)},
    },
}

_WIDE: _Grids = {
    "vgg-cifar10": {
        "adam": {"lr": (-8, -6)},
        "sgd": {"lr": (-6, -4)},
        "kfac": {"lr": (-7, -6), "damping": (-3, -2)},
        PAPER: {"lr": (-1, 0), "regularization": (3, 4)},
    },
    "bigmlp-cifar10": {
        "adam": {"lr": (-10, -8)},
        "sgd": {"lr": (-8, -6)},
        "kfac": {"lr": (-7, -6), "damping": (-2, -1)},
        PAPER: {"lr": (-1, 0), "regularization": (3, 4)},
    },
}
"""Around what was best for the narrow ones, rates no larger."""


@dataclass(frozen=True)
class SearchPlan:
    """How hyperparameters are searched at a budget.

    Args:
        shares: which part of a run a trial is, for networks, optimizers or both; a third for those not named.
        images: how many a trial trains on, for a single epoch, where a whole one would take too long.
        grids: where searches start, by network and optimizer; else at :data:`~newton_summary_experiments.search.GRIDS`.
        most_grids: how many grids are gone through at most, by the number of hyperparameters; else
            :data:`~newton_summary_experiments.search.MOST_GRIDS`.
    """

    shares: _Shares = field(default_factory=dict)
    images: int | None = None
    grids: _Grids = field(default_factory=lambda: _NARROW)
    most_grids: Mapping[int, int] | None = None

    def epochs(self, task: str, optimizer: str, of: int) -> int:
        """The length of a trial, where a run has so many epochs."""
        if self.images is not None:
            return 1
        share = self.shares.get((task, optimizer), self.shares.get(task, self.shares.get(optimizer, _SHARE)))
        return max(of // share, 1)

    def grid(self, task: str, optimizer: str) -> Grid:
        """Where a search starts."""
        return self.grids.get(task, {}).get(optimizer, search.GRIDS[optimizer])

    def grids_at_most(self, count: int) -> int:
        """How many grids a search of so many hyperparameters goes through at most."""
        return (search.MOST_GRIDS if self.most_grids is None else self.most_grids)[count]


PLANS = {
    "quick": SearchPlan({"mlp-mnist": 2, "lenet-cifar10": 2}),
    "hours": SearchPlan(images=10_000, grids=_WIDE, most_grids={1: 2, 2: 1}),
    "full": SearchPlan({"kfac": 10, PAPER: 10, ("mlp-mnist", "adam"): 1}),  # whose best two are a tie after a third
}
"""By budget."""
