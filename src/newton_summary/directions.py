"""Where the direction u comes from: gradients, momentum, Adam, or any ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def next_step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The step that an optimizer would take now, u = θ − θ', without taking it.

    Args:
        optimizer: any optimizer whose ``step()`` needs no closure, after ``backward()``.  It is left as it is.
        parameters: the tensors to give the step for.  Those that the optimizer does not hold get zeros.

    Raises:
        ValueError: no parameter has a gradient.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.grad is None for p in held):
        raise ValueError("the optimizer's parameters have no gradients: call backward() before its step is measured")
    twin = {p: _twin_of(p) for p in held}
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})  # schedulers patch `step`
    shadow._optimizer_step_pre_hooks, shadow._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    shadow.param_groups = [
        {**copy.deepcopy(_without_params(g)), "params": [twin[p] for p in g["params"]]} for g in optimizer.param_groups
    ]
    shadow.state = defaultdict(dict, {twin[p]: copy.deepcopy(s) for p, s in optimizer.state.items() if p in twin})
    shadow.step()
    return [(p - twin[p]).detach() if p in twin else torch.zeros_like(p) for p in parameters]


def _twin_of(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    twin.grad = None if parameter.grad is None else parameter.grad.clone()
    return twin


def _without_params(group: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in group.items() if key != "params"}
