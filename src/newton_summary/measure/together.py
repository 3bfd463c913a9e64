"""Several optimizers that train one model, such as Muon for matrices and AdamW for the rest, taken as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch

OneOrSeveral: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
"""An optimizer, or several that hold different parameters and step one after another."""


class Together(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters as one: its step is all their steps.

    It is made by :func:`together`, for measuring and rehearsing; hooks and schedulers stay on the members.

    Attributes:
        members: the optimizers.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = tuple(members)  # and no call of torch's: groups and state are the members'

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all members, in their order: a new list of the groups themselves."""
        return [group for member in self.members for group in member.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes every member's step."""
        for member in self.members:
            take_step(member)

    def __repr__(self) -> str:
        return " and ".join(repr(member) for member in self.members)


def together(optimizer: OneOrSeveral) -> torch.optim.Optimizer:
    """One optimizer as it is, and several as one.

    Raises:
        TypeError: something in the list is no optimizer.
        ValueError: the list is empty, or two of them hold the same parameter.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    members = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    if not members:
        raise ValueError("the list of optimizers is empty: give one optimizer, or several over different parameters")
    for member in members:
        if not isinstance(member, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {type(member).__name__}")
    holder: dict[int, torch.optim.Optimizer] = {}
    for member in members:
        for p in (p for group in member.param_groups for p in group["params"]):
            other = holder.setdefault(id(p), member)
            if other is not member:
                raise ValueError(
                    f"{type(other).__name__} and {type(member).__name__} both hold a parameter of shape "
                    f"{tuple(p.shape)}: give each parameter to one optimizer"
                )
    return members[0] if len(members) == 1 else Together(members)


def are_optimizers(value: Any) -> TypeGuard[OneOrSeveral]:
    """Whether something is an optimizer, or a list of them and of nothing else."""
    several = isinstance(value, list | tuple) and len(value) > 0
    return all(isinstance(one, torch.optim.Optimizer) for one in (value if several else [value]))


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Calls ``step()`` without torch's wrapper, which calls the hooks, those of all optimizers too."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    step(optimizer)


def members_of(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers that :func:`together` took as one; of any other optimizer, itself."""
    return optimizer.members if isinstance(optimizer, Together) else (optimizer,)
