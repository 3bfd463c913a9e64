"""A batch that is broken, or explodes, costs a few steps and never the run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary.parallel.sharding import is_sharded, local

_LONGEST = 3.0  # times what is usual
_BROKEN = 1000.0  # times what is usual
_COUNTED = 100.0  # times what is usual, at most
_MEMORY = 0.99
_HOST = "cpu"  # where to read a number costs nothing


class GradientClipping:
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
        usual: the averages of the norms of the gradients, one for each parameter, 0 for one that had none yet: numbers
            on the host, a tensor on an accelerator.
    """

    def __init__(self) -> None:
        self.usual: Sequence[float] | Tensor = ()

    def apply(self, parameters: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> bool:
        """Looks at the gradients of these parameters, all together, and overwrites them where they are too long.

        Args:
            parameters: those that are trained, the same in every step.
            total: sums numbers over all processes, where each has a part of the gradients.

        Returns:
            Whether they count as zero now; on an accelerator, where nothing is read, never.
        """
        gradients = [p.grad for p in parameters]
        present = [g for g in gradients if g is not None]
        if not present:
            return False
        parts = [_values(g) for g in present]
        exact = functools.reduce(torch.promote_types, {part.dtype for part in parts}, torch.float32)
        norms = torch.stack(torch._foreach_norm(parts, 2, dtype=exact))
        if len(present) < len(gradients):
            here = torch.tensor([n for n, g in enumerate(gradients) if g is not None], device=norms.device)
            norms = norms.new_zeros(len(gradients)).index_copy(0, here, norms)
        if any(map(is_sharded, present)):
            norms = total(norms.square()).sqrt()
        if norms.device.type == _HOST:
            share, self.usual = _follow(norms.tolist(), list(self.usual) or [0.0] * len(norms))
            if share == 0:
                for part in parts:
                    part.zero_()
            elif share < 1:
                torch._foreach_mul_(parts, share)
            return share == 0
        usual = torch.as_tensor(self.usual).to(norms) if len(self.usual) else torch.zeros_like(norms)
        shares, self.usual = _follow_on_device(norms, usual)
        torch._foreach_mul_(parts, shares)
        for part in parts:
            part.masked_fill_(shares == 0, 0.0)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"usual": [float(usual) for usual in self.usual]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.usual = state["usual"]


def _follow(norms: list[float], usual: list[float]) -> tuple[float, list[float]]:
    """What gradients of these norms are multiplied by, and what is usual now.

    In plain numbers, because twenty calls with small tensors take as long as a step of a small network.
    """
    if not all(map(math.isfinite, norms)):
        return 0.0, usual
    lengths = sorted([n / u for n, u in zip(norms, usual, strict=True) if n > 0 and u > 0])
    length = lengths[(len(lengths) - 1) // 2] if lengths else 0.0  # nothing is known before the first gradient
    share = 0.0 if length > _BROKEN else _LONGEST / length if length > _LONGEST else 1.0
    return share, [
        u if n == 0 else n if u == 0 else _MEMORY * u + (1 - _MEMORY) * min(n, _COUNTED * u)
        for n, u in zip(norms, usual, strict=True)
    ]


def _follow_on_device(norms: Tensor, usual: Tensor) -> tuple[Tensor, Tensor]:
    """The same, without reading a number from the device."""
    finite, known = norms.isfinite().all(), usual > 0
    length = torch.where(known & (norms > 0), norms / usual, torch.nan).nanmedian()
    share = torch.where(length > _LONGEST, _LONGEST / length, 1.0)
    moved = torch.where(known, torch.lerp(torch.minimum(norms, _COUNTED * usual), usual, _MEMORY), norms)
    share = torch.where(finite & ~(length > _BROKEN), share, 0.0)
    return share, torch.where(finite & (norms > 0), moved, usual)


def _values(gradient: Tensor) -> Tensor:
    """What is stored of a gradient on this process, in real numbers: its shard, the values of a sparse one, or all."""
    if type(gradient) is not Tensor or gradient.layout is not torch.strided:
        gradient = local(gradient)
        gradient = gradient._values() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
