"""What a loss costs, by a count of operations.  Nothing is timed, so that runs repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CALL = 450_000  # floating-point operations that take as long as a call of Python and torch: about 15 µs of a core
GRADIENT = 3  # its operations, in those of the loss; its calls, compiled ones, are as dear as the loss's own


class Price(TorchDispatchMode):
    """Counts what is dispatched in a block: calls, and the floating-point operations of products and convolutions.

    Args:
        formulas: of the operations that are counted.  Default: all that torch has.
    """

    def __init__(self, formulas: Mapping[Any, Callable[..., Any]] = flop_registry) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._formulas = formulas
        self.calls, self.operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = self._formulas.get(getattr(func, "_overloadpacket", None))
        self.calls += 1
        self.operations += 0 if count is None else int(count(*args, **kwargs, out_val=out))
        return out
