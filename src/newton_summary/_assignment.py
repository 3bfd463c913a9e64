"""What a user says of groups, checked and turned into labels: the group of each tensor, or of each of its entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Label: TypeAlias = int | Tensor
"""The group of a whole tensor, or the group of each of its entries (int64, of the tensor's shape)."""

Part: TypeAlias = tuple[str | nn.Parameter, Any]
"""Some entries of a parameter: the parameter, and any index that ``tensor[index]`` takes."""

_UNASSIGNED = -1


class Assignment:
    """What is assigned to which group so far.

    Args:
        named: the parameters to assign, by name.
        every: all parameters of the model by all of their names, tied and frozen ones, too.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], every: Mapping[str, nn.Parameter]) -> None:
        position = {id(p): i for i, p in enumerate(named.values())}
        self.names = list(named)
        self.by_name = {name: position.get(id(p)) for name, p in every.items()}
        self.by_id = {id(p): position.get(id(p)) for p in every.values()}
        self.shapes = [p.shape for p in named.values()]
        # one for each entry would take four times the memory of a model in half precision
        self.labels: list[Label] = [_UNASSIGNED] * len(named)

    def assign(self, groups: Mapping[str, Iterable[str | nn.Parameter | Part]]) -> tuple[Label, ...]:
        """The label of every parameter.

        Raises:
            ValueError: an entry is in two groups or in none, a name is unknown, a group is empty, or a parameter is
                frozen.
            TypeError: a group or a member is of the wrong kind.
        """
        if not isinstance(groups, Mapping):
            raise TypeError(
                "groups must say by the name of each group what is in it, such as {'body': ['0.weight', '0.bias']}, "
                f"got {type(groups).__name__}"
            )
        for number, (group, members) in enumerate(groups.items()):
            if not isinstance(group, str):
                raise TypeError(f"the name of a group must be text, got {group!r}, of type {type(group).__name__}")
            if isinstance(members, str | Tensor) or not isinstance(members, Iterable):
                raise TypeError(f"group {group!r} is {type(members).__name__}, not a list of parameters or their names")
            count = sum(self._put(number, group, member, list(groups)) for member in members)
            if not count:
                raise ValueError(f"group {group!r} is empty: leave it out or give it parameters")
        for name, shape, label in zip(self.names, self.shapes, self.labels, strict=True):
            missing = int((torch.as_tensor(label) == _UNASSIGNED).sum())
            if missing:
                count = shape.numel()
                share = "" if isinstance(label, int) or missing == count else f" with {missing} of its {count} entries"
                raise ValueError(f"parameter {name!r} {_told(shape)}{share} in no group: add it to one, or freeze it")
        return tuple(self.labels)

    def _put(self, number: int, group: str, member: str | nn.Parameter | Part, names: list[str]) -> int:
        if isinstance(member, tuple) and len(member) != 2:
            raise TypeError(
                f"group {group!r} holds a tuple of {len(member)}: a part is a parameter and one index into it"
            )
        parameter, index = member if isinstance(member, tuple) else (member, ...)
        if not isinstance(parameter, str | Tensor):
            raise TypeError(f"group {group!r} holds a {type(parameter).__name__}: give parameters or their names")
        position = self._position(group, parameter)
        label, shape = self.labels[position], self.shapes[position]
        if isinstance(label, int) and not isinstance(member, tuple):
            self._check_free(position, label, group, names)
            self.labels[position] = number
            return shape.numel()
        if isinstance(label, int):
            label = self.labels[position] = torch.full(shape, label)
        try:
            taken = label[index]
        except (IndexError, TypeError, ValueError) as error:  # torch's, of what it has not and of what it does not take
            raise ValueError(
                f"group {group!r}: no such part of parameter {self.names[position]!r}, of shape {tuple(shape)}: {error}"
            ) from error
        if taken.numel():
            self._check_free(position, int(taken.max()), group, names)
        label[index] = number
        return int(taken.numel())

    def _check_free(self, position: int, taken: int, group: str, names: list[str]) -> None:
        if taken == _UNASSIGNED:
            return
        what, other = f"parameter {self.names[position]!r} {_told(self.shapes[position])}", names[taken]
        where = f"twice in group {group!r}" if other == group else f"in two groups, {other!r} and {group!r}"
        raise ValueError(f"{what} {where}")

    def _position(self, group: str, parameter: str | nn.Parameter) -> int:
        table: Mapping[Any, int | None] = self.by_name if isinstance(parameter, str) else self.by_id
        key = parameter if isinstance(parameter, str) else id(parameter)
        what = repr(parameter) if isinstance(parameter, str) else f"of shape {tuple(parameter.shape)}"
        if key not in table:
            known = ", ".join(self.names[:6]) + (", …" if len(self.names) > 6 else "")
            raise ValueError(f"group {group!r}: the model has no parameter {what}; it has {known}")
        position = table[key]
        if position is None:
            raise ValueError(
                f"group {group!r}: parameter {what} is frozen (requires_grad=False) or empty: leave it out"
            )
        return position


def _told(shape: torch.Size) -> str:
    return f"of shape {tuple(shape)} is"
