"""A batch that is broken, or explodes, costs a few steps and never the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from newton_summary.sharding import is_sharded, local

_LONGEST = 3.0  # what is usual
_COUNTED = 30.0  # times what is usual, at most
_MEMORY = 0.99
_HOST = "cpu"  # where to read a number costs nothing


class GradientGuard:
    """Shortens the gradients of a step, all together, to three times their usual norm; sets them to zero if not finite.

    A direction with a memory, such as Adam's, would keep a gradient that is far too long, or no number, for hundreds of
    steps, or for ever.  Late in training most of the loss is in a few samples, and a batch that has one of them must
    not take the step along which no loss was ever looked at.  The usual norm is a moving average, in which no norm
    counts for more than 30 times the average: where gradients have grown for good, it follows in a few steps.

    Nothing is read from an accelerator.

    Attributes:
        usual: the average of the norms of the gradients, on their device; ``None`` before the first step.
    """

    def __init__(self) -> None:
        self.usual: Tensor | None = None

    def apply(self, parameters: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Looks at the gradients of these parameters, all together, and overwrites them where they are too long.

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
        known, finite = usual > 0, norm.isfinite()  # nothing is known before the first gradient
        share = torch.where(known, _LONGEST * usual / norm, 1.0).clamp(max=1.0)
        on_host = norm.device.type == _HOST
        if not on_host or (finite and share < 1):
            torch._foreach_mul_(parts, share)
        if not on_host or not finite:
            for part in parts:
                part.masked_fill_(~finite, 0.0)
        counted = torch.lerp(torch.minimum(norm, _COUNTED * usual), usual, _MEMORY)
        self.usual = torch.where(finite, torch.where(known, counted, norm), usual)


def _values(gradient: Tensor) -> Tensor:
    """What is stored of a gradient on this process: its shard, the values of a sparse one, or all of it."""
    part = local(gradient)
    return part._values() if part.is_sparse else part
