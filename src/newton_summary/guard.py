"""A batch that is broken, or explodes, costs a step and never the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from newton_summary.sharding import is_sharded, local

_TIMES = 1000.0  # what is usual
_MEMORY = 0.99
_HOST = "cpu"  # where to read a number costs nothing


class GradientGuard:
    """Sets all gradients of a step to zero where their norm is not finite, or a thousand times the usual one.

    A direction with a memory, such as Adam's, would keep such a gradient for ever, or for thousands of steps.  With
    gradients of zero it goes on with what it remembers.  The usual norm is a moving average, in which no norm counts
    for more than a thousand times the average: where gradients have grown for good, it follows in a step or two.

    Nothing is read from an accelerator.

    Attributes:
        usual: the average of the norms of the gradients, on their device; ``None`` before the first step.
    """

    def __init__(self) -> None:
        self.usual: Tensor | None = None

    def apply(self, parameters: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Looks at the gradients of these parameters, all together, and overwrites them where they are refused.

        Args:
            parameters: those that are trained.
            total: sums a number over all processes, where each has a part of the gradients.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [_values(g) for g in gradients]
        if not parts:
            return
        exact = torch.promote_types(parts[0].dtype, torch.float32)
        square = torch.stack(torch._foreach_norm(parts, 2, dtype=exact)).square().sum()
        norm = (total(square) if any(is_sharded(g) for g in gradients) else square).sqrt()
        usual = torch.zeros_like(norm) if self.usual is None else self.usual.to(norm)
        most = torch.where(usual > 0, _TIMES * usual, torch.inf)  # nothing is known before the first gradient
        finite = norm.isfinite()
        refused = ~(finite & (norm <= most))
        if refused.device.type != _HOST or refused:
            for part in parts:
                part.masked_fill_(refused, 0.0)
        moved = torch.where(usual > 0, torch.lerp(torch.minimum(norm, most), usual, _MEMORY), norm)
        self.usual = torch.where(finite, moved, usual)


def _values(gradient: Tensor) -> Tensor:
    """What is stored of a gradient on this process: its shard, the values of a sparse one, or all of it."""
    part = local(gradient)
    return part._values() if part.is_sparse else part
