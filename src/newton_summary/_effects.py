"""What operators of torch do besides computing: what they overwrite, share and draw."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Effects:
    """What an operation does besides computing.

    Attributes:
        positions: the positions of the arguments that it overwrites.
        names: the names of those that it takes by keyword only.
        shares: whether its results look at the memory of its arguments.
        draws: whether it draws random numbers.
        forgets: whether its results depend on nothing but the shapes of its arguments.
        turns: whether it changes nothing but how its argument looks at its memory.
        writes: whether it overwrites anything.
    """

    positions: tuple[int, ...]
    names: tuple[str, ...]
    shares: bool
    draws: bool
    forgets: bool
    turns: bool
    writes: bool

    def written(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        """The tensors that a call overwrites."""
        values = [args[i] for i in self.positions if i < len(args)] + [kwargs.get(name) for name in self.names]
        for value in values:
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor):
                    yield tensor


STATISTICS = {  # they update running statistics, which their schemas do not say
    aten.native_batch_norm.default: (3, 4),
    aten.cudnn_batch_norm.default: (3, 4),
    aten.miopen_batch_norm.default: (3, 4),
}
_UNDRAWN = {aten._scaled_dot_product_flash_attention_for_cpu.default}  # said to draw, but takes no dropout
_SHARING = {aten._unsafe_view.default, aten.lift.default, aten.lift_fresh.default, aten.resolve_conj.default}


@functools.cache
def effects_of(op: Any) -> Effects:
    """What an operator of torch does besides computing, as its schema says."""
    if not isinstance(op, torch._ops.OpOverload):
        return Effects((), (), True, False, False, False, False)
    arguments, positions, names = op._schema.arguments, [], []
    for i, argument in enumerate(arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if argument.kwarg_only:
                names.append(argument.name)
            else:
                positions.append(i)
    shares = op in _SHARING or any(r.alias_info is not None for r in op._schema.returns)
    draws = torch.Tag.nondeterministic_seeded in op.tags and op not in _UNDRAWN
    name = op._schema.name
    forgets = not positions and not names and (name.endswith("_like") or name.startswith("aten::new_"))
    positions += STATISTICS.get(op, ())
    turns, writes = torch.Tag.inplace_view in op.tags, bool(positions or names)
    return Effects(tuple(positions), tuple(names), shares, draws, forgets, turns, writes)
