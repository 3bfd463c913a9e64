"""What operations overwrite, noted so that it can be undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter  # nothing public keeps a version
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from typing_extensions import override

from newton_summary._effects import effects_of
from newton_summary.measure.unwatched import as_unwatched

_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


class Journal(TorchDispatchMode):
    """A block whose operations may overwrite tensors from outside, until :meth:`undo`.

    Everything that the operations of torch write is seen here: running statistics, tables that are renormalised in
    place, a batch that is divided in place, whoever holds them.
    """

    supports_higher_order_operators = True  # those that call functions, such as torch.cond

    @classmethod
    @override
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first use imports torch's compiler, which takes a second

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._versions: list[Any] = []

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        effects = effects_of(func)
        if effects.writes:
            for tensor in effects.written(args, kwargs or {}):
                self.protect(tensor)
        out = as_unwatched(func, args, kwargs or {})
        if not effects.shares:
            self.claim(out)
        return out

    def claim(self, out: Any) -> None:
        """Notes that the memory of these results was made within the block."""
        for tensor in (out,) if isinstance(out, Tensor) else out if isinstance(out, list | tuple) else ():
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._own.add(tensor.untyped_storage()._cdata)

    def protect(self, tensor: Tensor) -> None:
        """Keeps what a tensor from outside holds, before it is overwritten for the first time."""
        if tensor.layout is not torch.strided:
            return
        memory = tensor.untyped_storage()
        if memory._cdata in self._own or memory._cdata in self._before:
            return
        alias = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(memory)
        self._before[memory._cdata] = (alias, alias.clone())
        self._versions.append(_unsafe_preserve_version_counter(tensor))

    def undo(self) -> None:
        """Gives tensors from outside back what they held, bit for bit; to be called outside the block.

        Their versions go back, too: a graph of the user's that saved them is as good as before.
        """
        for alias, content in self._before.values():
            alias.copy_(content)
        for version in self._versions:
            version.__exit__()
        self._before.clear()
        self._versions.clear()


class WholeRecurrences(TorchFunctionMode):
    """A block in which recurrent layers run as in training, where a journal would see them taken apart.

    One call of them is some hundred operations where a mode watches, and takes four times as long.  They overwrite
    nothing from outside.

    Args:
        journal: what watches; any other mode that does so goes on watching.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _RECURRENT or _get_current_dispatch_mode() is not self._journal:
            return func(*args, **kwargs)
        with _pop_mode_temporarily():
            out = func(*args, **kwargs)
        self._journal.claim(out)
        return out


@contextlib.contextmanager
def watching(journal: Journal, model: nn.Module) -> Iterator[None]:
    """A block that a journal watches, in which recurrent layers of the model, if there are any, run as in training."""
    with journal, WholeRecurrences(journal) if is_recurrent(model) else contextlib.nullcontext():
        yield


def is_recurrent(model: nn.Module) -> bool:
    """Whether a model has recurrent layers of torch's."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())
