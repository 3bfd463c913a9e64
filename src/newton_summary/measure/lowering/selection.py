"""Looking up, gathering and scattering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.lowering.table import CONSTANT, as_it_is, aten, lowers


@lowers(aten.copy.default)
def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape)


@lowers(aten.split_with_sizes.default)
def _split_with_sizes(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


@lowers(aten.split.Tensor)
def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    return [x.narrow(dim, s, min(size, x.shape[dim] - s)) for s in range(0, x.shape[dim], size)] or [x]


@lowers(aten.unbind.int)
def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, i) for i in range(x.shape[dim])]


@lowers(aten.embedding.default)
def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """Rows of a table; that of padding counts as a constant, as autograd has it."""
    if padding_idx < 0:
        return NotImplemented
    rows = as_it_is(aten.embedding.default, weight, indices, -1, scale_grad_by_freq)
    return torch.where((indices == padding_idx).unsqueeze(-1), CONSTANT(rows), rows)


@lowers(aten.masked_scatter.default)
def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The next entry of the source wherever the mask holds, as where images take their tokens' places in a text."""
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    mask = mask.expand(shape)
    number = (mask.flatten().cumsum(0) - 1).clamp(min=0)
    return torch.where(mask, source.flatten().index_select(0, number).view(shape), x) if source.numel() else x.clone()


@lowers(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """Sums (mode 0), means (1) or largest entries (2) of the rows of a table, bag by bag."""
    if scale_grad_by_freq:
        return NotImplemented  # its gradient is not a derivative
    options = (False, mode, False, None, include_last_offset, padding_idx)
    _, bag_of, sizes, winners = as_it_is(aten._embedding_bag.default, CONSTANT(weight), indices, offsets, *options)
    bags = len(offsets) - int(include_last_offset)
    starts = offsets[:bags]
    if mode == 2:
        empty = (sizes == 0)[:, None]
        return torch.where(empty, 0.0, weight.gather(0, torch.where(empty, 0, winners))), bag_of, sizes, winners
    number = torch.searchsorted(starts, torch.arange(len(indices), device=indices.device), right=True) - 1
    kept = (indices != padding_idx).to(weight.dtype)
    factor = kept if per_sample_weights is None else kept * per_sample_weights
    if mode == 1:
        count = kept.new_zeros(bags).index_add(0, number, kept).clamp_min(1.0)
        factor = factor / count.gather(0, number)
    rows = aten.embedding.default(weight, indices) * factor[:, None]
    return rows.new_zeros(bags, weight.shape[1]).index_add(0, number, rows), bag_of, sizes, winners


@lowers(aten._pack_padded_sequence.default)
def _pack_padded_sequence(x: Tensor, lengths: Tensor, batch_first: bool) -> Any:
    """The steps that are no padding, in the order of time."""
    _, sizes = as_it_is(aten._pack_padded_sequence.default, CONSTANT(x), lengths, batch_first)
    if batch_first:
        x = x.transpose(0, 1)
    kept = torch.arange(x.shape[0], device=lengths.device)[:, None] < lengths
    place = kept.flatten().nonzero().squeeze(1).to(x.device)
    return x.flatten(0, 1).index_select(0, place), sizes


@lowers(aten.scatter_reduce.two)
def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """What is scattered to one place is added, averaged, multiplied, or the largest or smallest of it taken."""
    if x.dim() == 0:
        return NotImplemented
    ones = torch.ones_like(index, dtype=x.dtype)
    source = source[tuple(slice(n) for n in index.shape)]
    counts = torch.zeros_like(x, dtype=x.dtype).scatter_add(dim, index, ones)
    if reduce == "prod":
        return _scattered_products(x, dim, index, source, counts > 0, include_self)
    start = x if include_self else torch.where(counts > 0, 0.0, x)
    if reduce == "sum":
        return start.scatter_add(dim, index, source)
    if reduce == "mean":
        counts = counts + 1 if include_self else counts.clamp_min(1)
        return start.scatter_add(dim, index, source) / counts
    fixed = CONSTANT(x), dim, index, CONSTANT(source), reduce
    result = as_it_is(aten.scatter_reduce.two, *fixed, include_self=include_self)
    wins = (CONSTANT(source) == result.gather(dim, index)).to(x.dtype)
    stays = (CONSTANT(x) == result).to(x.dtype) if include_self else (counts == 0).to(x.dtype)
    shares = stays.scatter_add(dim, index, wins).clamp_min(1)  # those that are equal share, as torch has it
    return (x * stays).scatter_add(dim, index, source * wins) / shares


def _scattered_products(
    x: Tensor, dim: int, index: Tensor, source: Tensor, is_met: Tensor, include_self: bool
) -> Tensor:
    """The products of all entries with one index: in their order, each takes in 1, 2, 4, … of those that follow."""
    index, order = index.sort(stable=True, dim=dim)
    source = source.gather(dim, order)
    length, reach = index.shape[dim], 1
    while reach < length:
        ahead, rest = length - reach, source.narrow(dim, length - reach, reach)
        is_same = index.narrow(dim, reach, ahead) == index.narrow(dim, 0, ahead)
        further = torch.where(is_same, source.narrow(dim, reach, ahead), 1.0)
        source = torch.cat([source.narrow(dim, 0, ahead) * further, rest], dim)
        reach *= 2
    is_first = torch.ones_like(index, dtype=torch.bool)
    if length > 1:
        is_first.narrow(dim, 1, length - 1).copy_(index.narrow(dim, 1, length - 1) != index.narrow(dim, 0, length - 1))
    products = torch.zeros_like(x).scatter_add(dim, index, torch.where(is_first, source, 0.0))
    return torch.where(is_met, products * x if include_self else products, x)


@lowers(aten.index_reduce.default)
def _index_reduce(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """The same, whole slices at a time."""
    if x.dim() == 0:
        return NotImplemented
    place = index.view(-1, *[1] * (x.dim() - 1 - dim % x.dim())).expand_as(source)
    return x.scatter_reduce(dim, place, source, reduce, include_self=include_self)


@lowers(aten.take.default)
def _take(x: Tensor, index: Tensor) -> Tensor:
    """Entries by their numbers among all, from the end where those are negative."""
    return x.reshape(-1).index_select(0, index.flatten() % x.numel()).reshape(index.shape)


@lowers(aten.segment_reduce.default)
def _segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
) -> Any:
    """Sums, means, products and extremes of the rows that follow one another, some of which may be none."""
    if offsets is not None:
        lengths = offsets.diff()
    if lengths is None or lengths.dim() != 1 or axis or initial is not None:
        return NotImplemented
    empty = as_it_is(aten.segment_reduce.default, CONSTANT(data[:0]), reduce, lengths=torch.zeros_like(lengths))
    number = torch.arange(len(lengths), device=data.device).repeat_interleave(lengths)
    place = number.view(-1, *[1] * (data.dim() - 1)).expand_as(data)
    kind = {"max": "amax", "min": "amin"}.get(reduce, reduce)
    result = torch.zeros_like(empty).scatter_reduce(0, place, data, kind, include_self=False)
    return torch.where((lengths == 0).view(-1, *[1] * (data.dim() - 1)), empty, result)
