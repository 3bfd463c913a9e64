"""Checkpoints: what the parts of an optimizer remember, as one dictionary beside torch's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

KEY = "newton_summary"
"""Where it stands in an optimizer's ``state_dict``."""


class Part(Protocol):
    """What remembers something."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, in plain numbers and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        ...


def packed(parts: Mapping[str, Part | None]) -> dict[str, Any]:
    """What the parts remember, by their names; ``None`` for one that an optimizer lacks."""
    return {name: None if part is None else part.state_dict() for name, part in parts.items()}


def unpack(parts: Mapping[str, Part | None], saved: Mapping[str, Any]) -> None:
    """Gives the parts back what :func:`packed` took, where both sides have them."""
    for name, part in parts.items():
        if part is not None and saved.get(name) is not None:
            part.load_state_dict(saved[name])


def check_parts(parts: Mapping[str, Part | None], saved: Mapping[str, Any]) -> None:
    """Raises where what :func:`packed` took is not of such parts.

    A position in a stream of batches is left out where there is no stream, or it was saved without one.

    Raises:
        ValueError: one side lacks another part: rates would not be those that were saved.
    """
    for name, part in parts.items():
        if (part is None) != (saved.get(name) is None) and name != "stream":
            has, lacks = ("the state", "this optimizer") if part is None else ("this optimizer", "the state")
            raise ValueError(
                f"{has} has a {name!r}, {lacks} has none, so rates would be others: make the optimizer as the one that "
                "was saved, with or without curvature_data, with the same compare_every, and direction given or not"
            )


def check_groups(state: Mapping[str, Any], names: list[str]) -> None:
    """Raises ``ValueError`` where a state dictionary is of other parameter groups than those of these names."""
    saved = [group.get("name") for group in state["param_groups"]]
    if saved != names:
        raise ValueError(f"the state is of other groups, {saved}: make the optimizer with the same partition")


def check_shapes(saved: Sequence[Sequence[int]], parameters: Mapping[str, Tensor]) -> None:
    """Raises where a state dictionary is of a model with other parameters.

    Args:
        saved: their shapes, in the model's order; none in a state that an older version has saved.
        parameters: those of this optimizer's model, by name.

    Raises:
        ValueError: there are more or fewer, or one has another shape.
    """
    cure = "make the model as the one that was saved, with the same parameters frozen"
    if saved and len(saved) != len(parameters):
        raise ValueError(f"the state is of {len(saved)} parameters, this optimizer trains {len(parameters)}: {cure}")
    for shape, (name, parameter) in zip(saved, parameters.items(), strict=False):
        if tuple(shape) != tuple(parameter.shape):
            raise ValueError(
                f"the state is of another model: parameter {name!r} has shape {tuple(parameter.shape)} here, and "
                f"{tuple(shape)} there; {cure}"
            )


def check_place(saved: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> None:
    """Raises where a state dictionary is of another part of a sharded model than this process has.

    Args:
        saved: which part of how many it is of, as :func:`~newton_summary.parallel.sharding.place_of` tells.
        here: the same of this process.

    Raises:
        ValueError: they differ.
    """
    if saved != here:
        raise ValueError(
            f"the state is of {_of_place(saved)}, and this process has {_of_place(here)}: save one in each process, "
            "and load it in the process of the same number, of as many"
        )


def _of_place(place: Mapping[str, Any] | None) -> str:
    return "a whole model" if place is None else f"part {place['part']} of {place['of']} of a sharded model"


def check_fits(state: Mapping[str, Any], kinds: list[str]) -> None:
    """Raises where a state dictionary is not of an optimizer like this one.

    Args:
        state: the whole of it.
        kinds: the types of what the optimizer is made of.

    Raises:
        ValueError: it is of another kind of optimizer, or of another rule or direction.
    """
    if not isinstance(state, Mapping) or KEY not in state:
        raise ValueError(
            "the state is not that of a NewtonSummary optimizer: give what its state_dict() returned, not the state of "
            "a model, nor of another optimizer, nor what torch.distributed.checkpoint makes of it, which is a part"
        )
    if any(isinstance(number, str) for number in state["state"]):
        raise ValueError(
            "torch.distributed.checkpoint has loaded only a part of this state, for not all of it are tensors: keep "
            "it by torch.save(optimizer.state_dict(), path), in each process where the model is sharded"
        )
    if state[KEY]["kinds"] != kinds:
        raise ValueError(
            f"the state is of an optimizer made of {', '.join(state[KEY]['kinds'])}, this one is made of "
            f"{', '.join(kinds)}: make it as it was made, with the same direction="
        )
