"""Algorithm 1 of arXiv:2312.03885, to the letter (docs/method.md, section 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from newton_summary.measure import Engine, LossFunction
from newton_summary.optim.directions import Direction, Momentum
from newton_summary.optim.measured import MeasuredOptimizer
from newton_summary.optim.rates import PaperRates
from newton_summary.optim.samples import Samples
from newton_summary.partition import Partition, default_partition, resolve_partition


class PaperNewtonSummary(MeasuredOptimizer):
    """The published algorithm: every p_H steps, the rates of one measurement, averaged with those before.

    Made by :meth:`NewtonSummary.paper <newton_summary.NewtonSummary.paper>`.  Its last line, reducing λ_1 on a plateau
    of the training loss, is torch's own ``ReduceLROnPlateau(optimizer, factor=0.5, patience=2)``, stepped every few
    epochs.

    It has no guard against groups on which the loss does not depend, such as a bias before a batch norm: their rates
    are ratios of roundings.  Freeze them.

    Args:
        model: the module to train.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        curvature_data: the second, independent sampler's data.
        partition: the groups.  Default: one for each tensor, coarser above 100 tensors.
        lr: λ_1, to be searched (the authors: 0.03 to 1).
        regularization: λ_int, to be searched (the authors: 1, 3, 10).
        every: p_H.
        momentum: μ_g, of the gradients; 1 − 1/p_H is recommended.
        rate_momentum: μ_η, of the rates.
        direction: something else than the averaged gradient.
        engine: what measures.
        seed: fixes the second sampler.
        process_group: the processes whose measurements are averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        curvature_data: Iterable[Any] | None = None,
        partition: Partition | str | None = None,
        lr: float = 0.3,
        regularization: float = 1.0,
        every: int = 10,
        momentum: float = 0.9,
        rate_momentum: float = 0.5,
        direction: str | torch.optim.Optimizer | Direction | None = None,
        engine: str | Engine = "auto",
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        groups = resolve_partition(partition, model, default_partition)
        groups.check_is_of(model)
        options = {"engine": engine, "seed": seed, "process_group": process_group}
        samples = Samples(model, loss_fn, groups, curvature_data, **options)
        chosen = Momentum(momentum) if direction is None else direction
        super().__init__(samples, PaperRates(regularization, rate_momentum), chosen, lr=lr, every=every)
