"""What a direction is, and what directions share.

A direction reads ``.grad`` and hyperparameters from an optimizer's groups, and keeps its memory in the optimizer's
state for each parameter, as torch's own optimizers do.  The step of group s is then −λ_1 η_s u.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

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


def usual_rate(direction: Direction) -> float | None:
    """The length, in units of the direction, that training begins with; ``None`` where it has to be measured."""
    rate: float | None = getattr(direction, "usual_rate", None)
    return rate


class Stateless:
    """A direction whose memory is all in the optimizer's state."""

    defaults: dict[str, Any]
    mean_key = ""
    """Under which name the mean of a parameter's gradients is remembered."""

    def mean_of(self, parameter: Tensor, state: State) -> Tensor | None:
        """What is remembered of the mean of a parameter's gradients, if anything is."""
        mean: Tensor | None = state.get(parameter, {}).get(self.mean_key)
        return mean

    def unit(self, parameter: Tensor) -> float:
        """1: its step is that of a learning rate of 1."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def buckets(groups: Groups, *keys: str) -> Iterable[tuple[tuple[Any, ...], list[Tensor]]]:
    """The parameters that have gradients, together where their groups agree on these hyperparameters."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for group in groups:
        values = tuple(tuple(group[key]) if key == "betas" else group[key] for key in keys)
        buckets.setdefault(values, []).extend(p for p in group["params"] if p.grad is not None)
    return [(values, parameters) for values, parameters in buckets.items() if parameters]


def forget(direction: Direction, parameters: Iterable[Tensor], state: State) -> None:
    """Sets the gradients, and what a direction remembers of their mean, to 0: they led from where the weights are back.

    The squares stay.  They hold steps back for as long as they remember, which is what one wants after a divergence.
    """
    mean_of: Callable[[Tensor, State], Tensor | None]
    mean_of = getattr(direction, "mean_of", lambda parameter, state: None)  # a direction of one's own may have none
    for p in parameters:
        for tensor in (p.grad, mean_of(p, state)):
            if tensor is not None:
                tensor.zero_()


def gradients_of(parameters: list[Tensor]) -> list[Tensor]:
    """The gradients of these parameters.

    Raises:
        ValueError: one is sparse.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        if gradient.is_sparse:
            raise ValueError(
                f"a parameter of shape {tuple(gradient.shape)} has sparse gradients, which need a direction of their "
                "own: pass a torch.optim.SparseAdam, or make the layer with sparse=False"
            )
    return gradients
