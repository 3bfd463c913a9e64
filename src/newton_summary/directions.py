"""Where the direction u comes from: the gradient, momentum, Adam, or any ``torch.optim.Optimizer``.

A direction reads ``.grad`` and hyperparameters from an optimizer's groups, and keeps its memory in the optimizer's
state for each parameter, as torch's own optimizers do.  The step of group s is then −λ_1 η_s u.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from newton_summary._checks import check_fraction
from newton_summary.sharding import local

Groups = list[dict[str, Any]]
State = defaultdict[Tensor, Any]

_FUSED = ("cpu", "cuda", "mps")  # devices, on which torch has Adam in one kernel


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

    looks_ahead = False

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        for beta in betas:
            check_fraction("each of betas", beta)
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.defaults = {"betas": betas, "eps": eps}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """New tensors."""
        result: dict[Tensor, Tensor] = {}
        for alike, parameters in _for_one_kernel(groups, state):
            result |= dict(zip(parameters, self._directions(parameters, state, alike), strict=True))
        return result

    def descend(self, groups: Groups, state: State, sizes: Mapping[Tensor, float]) -> None:
        """θ ← θ − size · u, as with the u of :meth:`update`, but in one kernel, and without tensors for u.

        Args:
            groups: the optimizer's.
            state: the optimizer's.
            sizes: of the step, for every parameter that has a gradient.
        """
        for alike, parameters in _for_one_kernel(groups, state, sizes):
            if alike.eps > 0 and all(p.stride() == state[p]["exp_avg"].stride() for p in parameters):
                self._move(parameters, parameters, state, alike, alike.size)
            else:
                torch._foreach_sub_(parameters, self._directions(parameters, state, alike), alpha=alike.size)

    def _directions(self, parameters: list[Tensor], state: State, alike: _Alike) -> list[Tensor]:
        """What a step leads to from zero, at a rate of −1."""
        directions = [torch.zeros_like(state[p]["exp_avg"]) for p in parameters]
        self._move(directions, parameters, state, alike, -1.0)
        if alike.eps == 0:  # an entry that never had a gradient, or one too small to square, does not move
            for p, direction in zip(parameters, directions, strict=True):
                direction.masked_fill_(state[p]["exp_avg_sq"] == 0, 0.0)
        return directions

    def _move(self, places: list[Tensor], parameters: list[Tensor], state: State, alike: _Alike, rate: float) -> None:
        """Moves these places by torch's Adam, in one kernel where there is one."""
        means, squares = ([state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq"))
        gradients = [_laid_out_as(place, g) for place, g in zip(places, _gradients(parameters), strict=True)]
        beta = beta1 = alike.betas[0]
        if self.looks_ahead:  # with β² for β, the mean becomes β² m + (1 − β²) g, which is Nesterov's step from m
            beta, rate = beta1**2, rate * (1 - beta1 ** (2 * alike.step)) / (1 - beta1 ** (alike.step + 1))
        options = {"lr": rate, "beta1": beta, "beta2": alike.betas[1], "eps": alike.eps, "weight_decay": 0.0}
        _by_torch((places, gradients, means, squares), alike.step, {**options, "amsgrad": False, "maximize": False})
        if self.looks_ahead and beta1 > 0:  # on to β m + (1 − β) g
            torch._foreach_lerp_(means, gradients, 1 - 1 / beta1)


class NAdam(Adam):
    """Adam's step with Nesterov's momentum: β_1 m + (1 − β_1) g in the place of m (Dozat 2016).

    The newest gradient counts for nearly twice as much as in Adam's step, which damps the oscillation of long steps;
    and with a shorter memory of the squares, the direction keeps its size while gradients shrink.  The rates that are
    measured along it are therefore longer, and hold for longer: docs/research.md has what both are worth.

    Args:
        betas: the momenta of the gradient and of its square, each in [0, 1).
        eps: ε, in units of the gradient; 0 makes the direction invariant to a scaling of each group.
    """

    looks_ahead = True

    def __init__(self, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8) -> None:
        super().__init__(betas, eps)


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
    """A direction by its name, ``"gradient"``, ``"momentum"``, ``"adam"`` or ``"nadam"``, or around an optimizer.

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
    named: dict[str, type[Direction]] = {
        "gradient": Gradient,
        "momentum": Momentum,
        "adam": Adam,
        "nadam": NAdam,
    }
    if direction not in named:
        raise ValueError(
            f"unknown direction {direction!r}: choose one of {', '.join(named)}, or pass a torch.optim.Optimizer"
        )
    return named[direction]()


def descends(direction: Direction) -> TypeGuard[Adam]:
    """Whether a direction can take its step by itself; a subclass that gives another one cannot."""
    return isinstance(direction, Adam) and type(direction).update is Adam.update


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


class _Alike(NamedTuple):
    """What parameters have in common that Adam moves in one kernel."""

    dtype: torch.dtype
    betas: tuple[float, float]
    eps: float
    step: int
    size: float


def _for_one_kernel(
    groups: Groups, state: State, sizes: Mapping[Tensor, float] | None = None
) -> Iterable[tuple[_Alike, list[Tensor]]]:
    """The parameters that have gradients, their memories at the next step, together where one kernel can move them."""
    kernels: defaultdict[_Alike, list[Tensor]] = defaultdict(list)
    for (betas, eps), parameters in _buckets(groups, "betas", "eps"):
        for p in parameters:
            step = _adam_memory(p, state[p])["step"]
            kernels[_Alike(p.dtype, betas, eps, step, 1.0 if sizes is None else sizes[p])].append(p)
    return kernels.items()


def _by_torch(tensors: tuple[list[Tensor], ...], step: int, options: dict[str, Any]) -> None:
    """A step of torch's Adam on places, gradients, means and squares, of one dtype.

    Its kernel is called by itself, because torch's function around it takes longer than the step of a small network.
    """
    places, gradients, means, squares = tensors
    device = places[0].device
    if device.type in _FUSED:
        steps = [torch.full((), float(step), device=device)] * len(places)
        torch._fused_adam_(places, gradients, means, squares, [], steps, **options)
    else:
        steps = [torch.full((), step - 1.0, device=device) for _ in places]  # which it counts on
        adam(places, gradients, means, squares, [], steps, **options)


def _adam_memory(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The memory of a parameter, at its next step."""
    if "step" not in state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    state["step"] += 1
    return state


def _laid_out_as(like: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with these strides: fused kernels take them for those of all their tensors."""
    return gradient if gradient.stride() == like.stride() else torch.empty_like(like).copy_(gradient)


def _twin_of(parameter: nn.Parameter) -> nn.Parameter:
    twin = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    twin.grad = None if parameter.grad is None else parameter.grad.clone()
    return twin
