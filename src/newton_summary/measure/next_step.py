"""The step that another optimizer would take, without taking it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary.measure.loss import preserved_randomness
from newton_summary.measure.together import OneOrSeveral, members_of, take_step, together

OF_SCHEDULES = ("initial_lr", "max_lr", "min_lr")
"""The rates that schedulers keep in parameter groups: OneCycleLR goes by all, made anew with last_epoch, too."""


def next_step(optimizer: OneOrSeveral, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The step that an optimizer would take now, u = θ − θ', without taking it.

    Args:
        optimizer: any optimizer whose ``step()`` needs no closure, after ``backward()``; or several.  They are left as
            they are: copies take the step, without hooks.  Random numbers that it draws are those that the optimizer
            draws if it steps now.
        parameters: the tensors to give the step for.  Those that the optimizer does not hold get zeros.

    Raises:
        ValueError: no parameter has a gradient, or the step needs a closure.
    """
    optimizer = together(optimizer)
    check_needs_no_closure(optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.grad is None for p in held):
        raise ValueError("the optimizer's parameters have no gradients: call backward() before its step is measured")
    twin = {p: _twin_of(p) for p in held}
    with preserved_randomness({p.device for p in held}):  # what it draws is drawn again when the step is taken
        take_step(shadow_of(optimizer, {id(p): copied for p, copied in twin.items()}))
    return [p.detach() - twin[p].detach() if p in twin else torch.zeros_like(p.detach()) for p in parameters]


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer cannot step without evaluating the loss."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_needs_no_closure(optimizer: torch.optim.Optimizer) -> None:
    """Raises where an optimizer evaluates the loss in its step: nobody knows where it goes before it has gone."""
    for member in members_of(optimizer):
        if needs_closure(member):
            raise ValueError(
                f"{type(member).__name__} evaluates the loss in its step(closure), so its next step cannot be told: "
                "use an optimizer whose step() needs no closure"
            )


def rates_held(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """The learning rate of every tensor that an optimizer holds, by its identity; 0 where a group has none."""
    return {
        id(p): rate
        for group in optimizer.param_groups
        for rate in [rate_of(group) if "lr" in group else 0.0]
        for p in group["params"]
    }


def check_runs_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Raises where nobody would hear of an optimizer's steps.

    Raises:
        TypeError: its steps run no hooks.
    """
    step = type(optimizer).step
    if not getattr(step, "hooked", False) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        cure = f"watch the {type(inner).__name__} inside it" if inner is not None else "call that in its own"
        raise TypeError(
            f"{type(optimizer).__name__} runs no hooks, because its __init__ does not call that of "
            f"torch.optim.Optimizer, so a monitor would not hear of its steps: {cure}"
        )


def rate_of(group: dict[str, Any]) -> float:
    """The learning rate of a parameter group of an optimizer; 1 where it has none.

    Raises:
        ValueError: it is ``None``, as with optimizers that set it themselves.
    """
    rate = group.get("lr", 1.0)
    if rate is None:
        shapes = ", ".join(str(tuple(p.shape)) for p in group["params"][:3])
        raise ValueError(
            f"the learning rate of the parameter group with tensors of shapes {shapes} is None: the optimizer sets it "
            "by itself; give it one, lr=…, to be told by how much to change it"
        )
    return float(rate)


def shadow_of(optimizer: torch.optim.Optimizer, instead: Mapping[int, Any]) -> torch.optim.Optimizer:
    """A copy of an optimizer that nothing calls back: without hooks, and without what schedulers put around ``step``.

    Attributes are copied one by one: what ``__getstate__`` leaves out, as torch's own does, is there.

    Args:
        optimizer: any optimizer, and those within it.
        instead: what stands for objects in the copy, by their ``id``, such as other parameters for its parameters.
    """
    return _shadow(optimizer, dict(instead))


def _shadow(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    shadow = memo[id(optimizer)] = object.__new__(type(optimizer))
    for value in vars(optimizer).values():
        for inner in value if isinstance(value, list | tuple) else (value,):
            if isinstance(inner, torch.optim.Optimizer) and id(inner) not in memo:
                _shadow(inner, memo)
    memo.update({id(t): t.detach().clone() for t in _uncopyable(vars(optimizer).get("state"))})
    for key, value in vars(optimizer).items():
        if key.endswith("_hooks"):
            vars(shadow)[key] = type(value)()
        elif key != "step":  # schedulers patch it
            vars(shadow)[key] = _copied(optimizer, key, value, memo)
    for table in (vars(shadow).get("defaults", {}), *shadow.param_groups):
        if table.get("differentiable"):  # the same step, but nothing of it is differentiated
            table["differentiable"] = False
    return shadow


def _copied(optimizer: torch.optim.Optimizer, name: str, value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an attribute of an optimizer."""
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise TypeError(
            f"the step of {type(optimizer).__name__} is computed by a copy of it, and its attribute {name!r} cannot be "
            f"copied ({error}): use an optimizer that holds no such thing; in place of ZeroRedundancyOptimizer, shard "
            "the model with torch.distributed.fsdp.fully_shard"
        ) from error


def _uncopyable(state: Any) -> Iterator[Tensor]:
    """The tensors of an optimizer's state that torch does not copy deeply: those of subclasses, or with a graph."""
    if isinstance(state, Tensor):
        if not state.is_leaf or type(state) not in (Tensor, nn.Parameter):
            yield state
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _uncopyable(value)


def _twin_of(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    twin.grad = None if parameter.grad is None else parameter.grad.detach().clone()
    return twin
