"""Adam's step, and NAdam's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from newton_summary._checks import check_fraction
from newton_summary.optim.directions.base import Groups, State, Stateless, gradients_of

_FUSED = ("cpu", "cuda", "mps")  # devices, on which torch has Adam in one kernel


class Adam(Stateless):
    """Adam's step at a learning rate of 1: bias-corrected m / (√v + ε) (Kingma & Ba 2015, arXiv:1412.6980).

    Args:
        betas: the momenta of the gradient and of its square, each in [0, 1).
        eps: ε, in units of the gradient; 0 makes the direction invariant to a scaling of each group.
    """

    mean_key = "exp_avg"

    looks_ahead = False
    usual_rate = 3e-3
    """What a training begins with: entries of its step are at most about 1, whatever the units of the loss."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        for beta in betas:
            check_fraction("each of betas", beta)
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.defaults = {"betas": betas, "eps": eps}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """New tensors."""
        result: dict[Tensor, Tensor] = {}
        for alike, parameters, memories in for_one_kernel(groups, state, begin_memory):
            directions = self.directions(gradients_of(parameters), memories, alike)
            result.update(zip(parameters, directions, strict=True))
        return result

    def descend(self, groups: Groups, state: State, sizes: Mapping[Tensor, float]) -> None:
        """θ ← θ − size · u, as with the u of :meth:`update`, but in one kernel, and without tensors for u.

        Args:
            groups: the optimizer's.
            state: the optimizer's.
            sizes: of the step, for every parameter that has a gradient.
        """
        for alike, parameters, memories in for_one_kernel(groups, state, begin_memory, lambda p, _: sizes[p]):
            self.descend_alike(parameters, memories, alike)

    def descend_alike(self, parameters: list[Tensor], memories: list[dict[str, Any]], alike: Alike) -> None:
        """The same of parameters that one kernel can move."""
        gradients = gradients_of(parameters)
        laid_out = (p.stride() == m["exp_avg"].stride() for p, m in zip(parameters, memories, strict=True))
        if alike.eps > 0 and all(laid_out):
            self._move(parameters, gradients, memories, alike, alike.size)
        else:
            torch._foreach_sub_(parameters, self.directions(gradients, memories, alike), alpha=alike.size)

    def directions(self, gradients: list[Tensor], memories: list[dict[str, Any]], alike: Alike) -> list[Tensor]:
        """What a step leads to from zero, at a rate of −1: new tensors, shaped as the memories are."""
        directions = [torch.zeros_like(m["exp_avg"]) for m in memories]
        self._move(directions, gradients, memories, alike, -1.0)
        if alike.eps == 0:  # an entry that never had a gradient, or one too small to square, does not move
            for memory, direction in zip(memories, directions, strict=True):
                direction.masked_fill_(memory["exp_avg_sq"] == 0, 0.0)
        return directions

    def _move(
        self,
        places: list[Tensor],
        gradients: list[Tensor],
        memories: list[dict[str, Any]],
        alike: Alike,
        rate: float,
    ) -> None:
        """Moves these places by torch's Adam, in one kernel where there is one."""
        means, squares = ([m[key] for m in memories] for key in ("exp_avg", "exp_avg_sq"))
        gradients = [
            g if g.stride() == place.stride() else torch.empty_like(place).copy_(g)  # a kernel takes all for alike
            for place, g in zip(places, gradients, strict=True)
        ]
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


class Alike(NamedTuple):
    """What parameters have in common that Adam moves in one kernel."""

    dtype: torch.dtype
    betas: tuple[float, float]
    eps: float
    step: int
    size: float


def for_one_kernel(
    groups: Groups,
    state: State,
    begin: Callable[[Tensor, dict[str, Any]], None],
    size_of: Callable[[Tensor, dict[str, Any]], float] | None = None,
) -> Iterable[tuple[Alike, list[Tensor], list[dict[str, Any]]]]:
    """The parameters that have gradients, their memories at the next step, together where one kernel can move them.

    Args:
        groups: the optimizer's.
        state: the optimizer's.
        begin: fills the memory of a parameter before its first step.
        size_of: of the step, by the parameter and its memory.  Default: 1.
    """
    kernels: dict[tuple[Any, ...], tuple[list[Tensor], list[dict[str, Any]]]] = {}
    for group in groups:
        betas, eps = tuple(group["betas"]), group["eps"]
        for p in group["params"]:
            if p.grad is None:
                continue
            memory = state[p]
            if "step" not in memory:
                begin(p, memory)
            memory["step"] += 1
            key = p.dtype, betas, eps, memory["step"], 1.0 if size_of is None else size_of(p, memory)
            parameters, memories = kernels.setdefault(key, ([], []))
            parameters.append(p)
            memories.append(memory)
    return [(Alike(*key), *found) for key, found in kernels.items()]


def begin_memory(parameter: Tensor, memory: dict[str, Any]) -> None:
    """An empty memory: no step was taken, and no gradient seen."""
    memory["step"] = 0
    memory["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    memory["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def _by_torch(tensors: tuple[list[Tensor], ...], step: int, options: dict[str, Any]) -> None:
    """A step of torch's Adam on places, gradients, means and squares, of one dtype; complex ones as pairs of reals.

    Its kernel, which is no public name, is called by itself where it is there: for the six tensors of a small network
    it takes 9 µs, torch's function around it 57.
    """
    if tensors[0][0].is_complex():
        tensors = tuple([torch.view_as_real(t) for t in several] for several in tensors)
    places, gradients, means, squares = tensors
    device = places[0].device
    if device.type in _FUSED and hasattr(torch, "_fused_adam_"):
        steps = [torch.full((), float(step), dtype=torch.float32, device=device)] * len(places)
        torch._fused_adam_(places, gradients, means, squares, [], steps, **options)
    else:
        steps = [torch.full((), step - 1.0, dtype=torch.float32, device=device) for _ in places]  # which it counts on
        adam(places, gradients, means, squares, [], steps, **options)
