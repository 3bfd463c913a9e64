"""Steps without torch's label for profilers, where no profiler looks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import optimizer as of_torch

_Step = TypeVar("_Step", bound=Callable[..., Any])


def unlabelled(step: _Step) -> _Step:
    """An optimizer's step, in what torch puts around it only where something is hooked or a profiler looks.

    Torch puts a loop over hooks and a label for profilers around every step of every optimizer.  On a small network,
    whose time goes into calls, that is a tenth of a training step, mostly for nothing.
    """
    labelled = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def either(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (labelled if is_profiled() or _has_hooks(self) else step)(self, *args, **kwargs)

    either.hooked = True  # type: ignore[attr-defined]  # torch puts nothing around it, then
    return either  # type: ignore[return-value]


def is_profiled() -> bool:
    """Whether a profiler of torch's is at work."""
    return bool(torch._C._autograd._profiler_enabled())


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or of_torch._global_optimizer_pre_hooks or of_torch._global_optimizer_post_hooks)
