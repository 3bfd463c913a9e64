"""Where the direction u comes from: the gradient, momentum, Adam, or any ``torch.optim.Optimizer``.

A direction reads ``.grad`` and hyperparameters from an optimizer's groups, and keeps its memory in the optimizer's
state for each parameter, as torch's own optimizers do.  The step of group s is then −λ_1 η_s u.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from newton_summary._checks import check_fraction
from newton_summary.sharding import local

Groups = list[dict[str, Any]]
State = defaultdict[Tensor, Any]


class Direction(Protocol):
    """What gives u at each step."""

    defaults: dict[str, Any]
    """Hyperparameters, which become entries of the optimizer's groups, where schedulers find them."""

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """The direction for every parameter that has a gradient; called once a step, after ``backward()``."""
        ...

    def unit(self, parameter: Tensor) -> float:
        """The learning rate that a rate of 1 stands for."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is remembered outside the optimizer's state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        ...


class _Stateless:
    """A direction whose memory is all in the optimizer's state."""

    defaults: dict[str, Any]

    def unit(self, parameter: Tensor) -> float:
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Gradient(_Stateless):
    """u = g, the gradient of the last batch."""

    def __init__(self) -> None:
        self.defaults = {}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """The gradients as they are."""
        return {p: p.grad for group in groups for p in group["params"] if p.grad is not None}


class Momentum(_Stateless):
    """u ← μ u + (1 − μ) g, and u = g at the first step (docs/method.md, section 2).

    Args:
        momentum: μ, in [0, 1).
    """

    def __init__(self, momentum: float = 0.9) -> None:
        check_fraction("momentum", momentum)
        self.defaults = {"momentum": momentum}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """The averages, which the caller must not write to."""
        for (momentum,), parameters in _buckets(groups, "momentum"):
            gradients = _gradients(parameters)
            for p, g in zip(parameters, gradients, strict=True):
                if "momentum" not in state[p]:
                    state[p]["momentum"] = g.clone(memory_format=torch.preserve_format)
            torch._foreach_lerp_([state[p]["momentum"] for p in parameters], gradients, 1 - momentum)
        return {p: state[p]["momentum"] for group in groups for p in group["params"] if p.grad is not None}


class Adam(_Stateless):
    """Adam's step at a learning rate of 1: bias-corrected m / (√v + ε) (Kingma & Ba 2015, arXiv:1412.6980).

    Args:
        betas: the momenta of the gradient and of its square, each in [0, 1).
        eps: ε, in units of the gradient; 0 makes the direction invariant to a scaling of each group.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        for beta in betas:
            check_fraction("each of betas", beta)
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.defaults = {"betas": betas, "eps": eps}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """New tensors."""
        result: dict[Tensor, Tensor] = {}
        for (betas, eps), parameters in _buckets(groups, "betas", "eps"):
            memories = [_adam_memory(p, state[p]) for p in parameters]
            gradients = _gradients(parameters)
            means, squares = [m["exp_avg"] for m in memories], [m["exp_avg_sq"] for m in memories]
            torch._foreach_lerp_(means, gradients, 1 - betas[0])
            torch._foreach_mul_(squares, betas[1])
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - betas[1])
            for memory in memories:
                memory["step"] += 1
            roots = [math.sqrt(1 - betas[1] ** m["step"]) for m in memories]
            scales = torch._foreach_sqrt(squares)
            torch._foreach_add_(scales, [eps * root for root in roots])
            directions = torch._foreach_div(means, scales)
            corrections = [root / (1 - betas[0] ** m["step"]) for root, m in zip(roots, memories, strict=True)]
            torch._foreach_mul_(directions, corrections)
            if eps == 0:  # an entry that never had a gradient, or one too small to square, does not move
                for direction, scale in zip(directions, scales, strict=True):
                    direction.masked_fill_(scale == 0, 0.0)
            result |= dict(zip(parameters, directions, strict=True))
        return result


class StepOf:
    """The step that another optimizer takes, its weight decay and learning rates included: a rate of 1 repeats it.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose ``step()`` needs no closure.  Do not step it yourself.

    Raises:
        ValueError: it needs one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{type(optimizer).__name__} evaluates the loss in its step, so it gives no direction")
        self.optimizer = optimizer
        self.defaults: dict[str, Any] = {}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """New tensors, u = θ − θ'."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return {}
        before = [p.detach().clone() for p in parameters]
        self.optimizer.step()
        steps = torch._foreach_sub(before, [p.detach() for p in parameters])
        torch._foreach_copy_([local(p.detach()) for p in parameters], [local(b) for b in before])
        return dict(zip(parameters, steps, strict=True))

    def unit(self, parameter: Tensor) -> float:
        """That optimizer's learning rate for this parameter."""
        for group in self.optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return float(group.get("lr", 1.0))
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """That optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """That optimizer's."""
        self.optimizer.load_state_dict(state)


def resolve(direction: str | torch.optim.Optimizer | Direction) -> Direction:
    """A direction by its name, ``"gradient"``, ``"momentum"`` or ``"adam"``, or around an optimizer.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is something else.
    """
    if isinstance(direction, torch.optim.Optimizer):
        return StepOf(direction)
    if not isinstance(direction, str):
        if not hasattr(direction, "update") or not hasattr(direction, "defaults"):
            raise TypeError(
                f"direction must be a name, a torch.optim.Optimizer or a Direction, got {type(direction).__name__}"
            )
        return direction
    named: dict[str, type[Direction]] = {"gradient": Gradient, "momentum": Momentum, "adam": Adam}
    if direction not in named:
        raise ValueError(
            f"unknown direction {direction!r}: choose one of {', '.join(named)}, or pass a torch.optim.Optimizer"
        )
    return named[direction]()


def next_step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The step that an optimizer would take now, u = θ − θ', without taking it.

    Args:
        optimizer: any optimizer whose ``step()`` needs no closure, after ``backward()``.  It is left as it is: a copy
            takes the step, without hooks.
        parameters: the tensors to give the step for.  Those that the optimizer does not hold get zeros.

    Raises:
        ValueError: no parameter has a gradient.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if all(p.grad is None for p in held):
        raise ValueError("the optimizer's parameters have no gradients: call backward() before its step is measured")
    twin = {p: _twin_of(p) for p in held}
    memo: dict[int, Any] = {id(p): copied for p, copied in twin.items()}
    shadow = object.__new__(type(optimizer))
    for key, value in optimizer.__dict__.items():
        if key != "step" and not key.endswith("_hooks"):  # schedulers patch `step`
            shadow.__dict__[key] = copy.deepcopy(value, memo)
    step = type(optimizer).step
    if getattr(step, "hooked", False):  # torch's wrapper, which calls the hooks
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(shadow)
    return [p.detach() - twin[p].detach() if p in twin else torch.zeros_like(p.detach()) for p in parameters]


def _buckets(groups: Groups, *keys: str) -> Iterable[tuple[tuple[Any, ...], list[Tensor]]]:
    """The parameters that have gradients, together where their groups agree on these hyperparameters."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for group in groups:
        values = tuple(tuple(group[key]) if key == "betas" else group[key] for key in keys)
        buckets.setdefault(values, []).extend(p for p in group["params"] if p.grad is not None)
    return [(values, parameters) for values, parameters in buckets.items() if parameters]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        if gradient.is_sparse:
            raise ValueError(
                f"a parameter of shape {tuple(gradient.shape)} has sparse gradients, which need a direction of their "
                "own: pass a torch.optim.SparseAdam, or make the layer with sparse=False"
            )
    return gradients


def _adam_memory(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    if "step" not in state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def _twin_of(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    twin.grad = None if parameter.grad is None else parameter.grad.clone()
    return twin
