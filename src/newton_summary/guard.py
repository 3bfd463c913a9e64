"""A batch that is broken, or explodes, costs a few steps and never the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from newton_summary.sharding import is_sharded, local

_LONGEST = 3.0  # times what is usual
_BROKEN = 1000.0  # times what is usual
_COUNTED = 100.0  # times what is usual, at most
_MEMORY = 0.99
_HOST = "cpu"  # where to read a number costs nothing


class GradientGuard:
    """Shortens the gradients of a step, all together, to three times their usual length; a thousand times counts as 0.

    A direction with a memory, such as Adam's, would keep a gradient that is far too long, or no number, for hundreds of
    steps, or for ever.  Late in training most of the loss is in a few samples, and a batch that has one of them would
    take a step along which no loss was ever looked at.  With gradients of zero, a direction goes on with what it
    remembers.

    The length is the median, over the tensors, of the norm of a gradient in units of its usual norm: groups of
    parameters may have any units.  The usual norm is a moving average, in which none counts for more than a hundred
    times the average: where gradients have grown for good, it follows in a few steps.

    Nothing is read from an accelerator.

    Attributes:
        usual: the averages of the norms of the gradients, one for each parameter, 0 for one that had none yet, on their
            device; ``None`` before the first step.
    """

    def __init__(self) -> None:
        self.usual: Tensor | None = None

    def apply(self, parameters: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Looks at the gradients of these parameters, all together, and overwrites them where they are too long.

        Args:
            parameters: those that are trained, the same in every step.
            total: sums numbers over all processes, where each has a part of the gradients.
        """
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        parts = [_values(g) for g in gradients.values()]
        if not parts:
            return
        exact = torch.promote_types(parts[0].dtype, torch.float32)
        found = dict(zip(gradients, torch._foreach_norm(parts, 2, dtype=exact), strict=True))
        norms = torch.stack([found[p] if p in found else parts[0].new_zeros((), dtype=exact) for p in parameters])
        if any(is_sharded(g) for g in gradients.values()):
            norms = total(norms.square()).sqrt()
        usual = torch.zeros_like(norms) if self.usual is None else self.usual.to(norms)
        known = usual > 0  # nothing is, before the first gradient
        length = torch.where(known & (norms > 0), norms / usual, torch.nan).nanmedian()
        finite = norms.isfinite().all()
        refused = ~finite | (length > _BROKEN)
        on_host = norms.device.type == _HOST
        if not on_host or length > _LONGEST:
            torch._foreach_mul_(parts, torch.where(length > _LONGEST, _LONGEST / length, 1.0))
        if not on_host or refused:
            for part in parts:
                part.masked_fill_(refused, 0.0)
        moved = torch.where(known, torch.lerp(torch.minimum(norms, _COUNTED * usual), usual, _MEMORY), norms)
        self.usual = torch.where(finite & (norms > 0), moved, usual)


def _values(gradient: Tensor) -> Tensor:
    """What is stored of a gradient on this process: its shard, the values of a sparse one, or all of it."""
    part = local(gradient)
    return part._values() if part.is_sparse else part
