"""Operations whose gradient is that of what they compute for some data only.

An entry that is written twice gets the gradient of both writers, and a matrix of which one triangle is read is taken
for symmetric, or triangular.  Whether that is so differs from batch to batch, and from direction to direction: what
was found for one says nothing of the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.graph import Graph, fill
from newton_summary.measure.own_gradient import NoDerivative
from newton_summary.measure.record import Record, Recording, Refusal

aten = torch.ops.aten

_READ_ONE_TRIANGLE = {
    aten._linalg_eigh.default,
    aten.linalg_cholesky_ex.default,
    aten.cholesky.default,
    aten.cholesky_solve.default,
    aten.cholesky_inverse.default,
    aten.linalg_pinv.atol_rtol_tensor,
}


def reads_one_triangle(graph: Graph) -> bool:
    """Whether an operation reads one triangle of a matrix."""
    return any(i.op in _READ_ONE_TRIANGLE for i in graph.instructions)


def written_twice(recording: Recording) -> Record | None:
    """The first recorded operation that writes an entry twice, with values that move."""
    for record in recording.records:
        if record.op in _WRITES:
            args, kwargs = fill(record.args, recording.values), dict(record.kwargs)
            entries, source = _WRITES[record.op](*args, **{k: fill(v, recording.values) for k, v in kwargs.items()})
            if source.requires_grad and entries is not None and _has_equal(entries):
                return record
    return None


@contextlib.contextmanager
def written_once(twice: Record | None) -> Iterator[None]:
    """A block whose refusals are final where an operation has written an entry twice.

    Nested passes would have autograd's gradient, which counts both writers, and no graph to find differences of.
    """
    try:
        yield
    except NoDerivative:
        raise
    except Refusal as refusal:
        if twice is None:
            raise
        raise NoDerivative(
            f"{twice.op}, of shape {twice.shape}, writes an entry twice, and autograd's gradient counts both: write "
            f"each once, or accumulate ({refusal})"
        ) from refusal


def _has_equal(entries: Tensor) -> bool:
    """Whether two along the first axis are the same."""
    return bool((entries.sort(0)[0].diff(dim=0) == 0).any())


def _by_index_put(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> tuple[Tensor | None, Tensor]:
    numbers = [i for i in indices if isinstance(i, Tensor) and i.dtype not in (torch.bool, torch.uint8)]
    if accumulate or not numbers or len(numbers) < sum(i is not None for i in indices):  # masks name each entry once
        return None, values
    lengths = [n for n, i in zip(x.shape, indices, strict=False) if i is not None]
    place = torch.zeros((), dtype=torch.long, device=x.device)
    for n, i in zip(lengths, torch.broadcast_tensors(*numbers), strict=True):
        place = place * n + i.long() % n
    return place.flatten(), values


def _by_index(x: Tensor, dim: int, index: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    return index.flatten() % x.shape[dim] if x.dim() else index.flatten(), source


def _by_scatter(x: Tensor, dim: int, index: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    return index.movedim(dim, 0) if index.dim() else index.flatten(), source


def _by_put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> tuple[Tensor | None, Tensor]:
    return None if accumulate else index.flatten() % max(x.numel(), 1), source


_WRITES: dict[Any, Callable[..., tuple[Tensor | None, Tensor]]] = {
    aten.index_put.default: _by_index_put,
    aten.index_copy.default: _by_index,
    aten.index_fill.int_Tensor: _by_index,
    aten.scatter.src: _by_scatter,
    aten.put.default: _by_put,
}
"""What finds, of an operation's arguments, which entries are written, along the first axis, and with what."""
