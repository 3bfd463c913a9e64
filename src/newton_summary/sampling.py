"""An endless stream of batches with a randomness of its own."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from newton_summary.measure.loss import preserved_randomness


class BatchStream:
    """Batches from an iterable, over and over, that leaves the user's loop and random states untouched.

    A ``DataLoader`` over a map-style dataset is read through its dataset, its batch sampler and its collate function,
    in this process; a sequential order is replaced by a random one, so that the stream is independent of the training
    loop. Every pass is seeded by its number: the position in the stream is two integers, and resuming is exact.  For
    other iterables a resumed stream skips what it had read, which is exact where the iterable repeats itself.

    Args:
        data: an iterable of batches that can be iterated more than once.
        seed: fixes the order.

    Raises:
        ValueError: the iterable is empty or can be read only once.
    """

    def __init__(self, data: Iterable[Any], seed: int = 0) -> None:
        if isinstance(data, Iterator):
            raise ValueError(
                f"curvature_data is a one-shot {type(data).__name__}: pass a DataLoader or a list of batches"
            )
        if not isinstance(data, Iterable):
            raise TypeError(f"curvature_data must be an iterable of batches, got {type(data).__name__}")
        self.data = data
        self.seed = seed
        self.epoch, self.position = 0, 0
        self._batches: Iterator[Any] | None = None
        samples: Any = data.dataset if _is_map_style(data) else data
        if isinstance(samples, Sized) and len(samples) == 0:
            raise ValueError("curvature_data is empty")

    def next(self, device: torch.device) -> Any:
        """The next batch, on this device.

        Raises:
            ValueError: a whole pass over the data gives no batch.
        """
        with preserved_randomness():
            batch = self._advance()
        return pytree.tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where :meth:`state_dict` was taken."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._batches = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchStream:
        """A stream at the same position over the same data, which is shared."""
        twin = BatchStream(self.data, self.seed)
        twin.load_state_dict(self.state_dict())
        return twin

    def _advance(self) -> Any:
        if self._batches is None:
            self._batches = self._open(self.position)
        self._reseed(self.position)
        batch = next(self._batches, _END)
        if batch is _END:
            if self.position == 0:
                raise ValueError("curvature_data is empty: a pass over it gave no batch")
            self.epoch, self.position, self._batches = self.epoch + 1, 0, None
            return self._advance()
        self.position += 1
        return batch

    def _reseed(self, position: int) -> None:
        """Makes what a dataset draws (augmentations) a function of the position in the stream."""
        seed = hash((self.seed, self.epoch, position)) % 2**32
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (datasets draw from the legacy state)
        torch.default_generator.manual_seed(seed)

    def _open(self, skip: int) -> Iterator[Any]:
        """A new pass over the data, from its batch number ``skip``; what is skipped of a map-style set is not loaded."""
        loader = self.data if _is_map_style(self.data) else None
        self._reseed(0)
        source = iter(self.data if loader is None else self._indices(loader))
        for position in range(skip):
            self._reseed(position)
            next(source, None)
        return source if loader is None else (_fetch(loader, index) for index in source)

    def _indices(self, loader: DataLoader[Any]) -> Iterable[Any]:
        """The indices of every batch of a pass, in an order that is a function of the seed and the epoch."""
        generator = torch.Generator().manual_seed(torch.default_generator.initial_seed())
        if isinstance(loader.sampler, SequentialSampler) and type(loader.batch_sampler) in (BatchSampler, type(None)):
            order = RandomSampler(loader.dataset, generator=generator)  # type: ignore[arg-type]
            return (
                order if loader.batch_sampler is None else BatchSampler(order, loader.batch_size or 1, loader.drop_last)
            )
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
        for owner in (sampler, loader.sampler):  # a copy draws from our generator, and leaves the user's where it is
            theirs = getattr(owner, "generator", None)
            if theirs is not None:
                memo[id(theirs)] = generator
        return copy.deepcopy(sampler, memo)


_END = object()


def _is_map_style(data: Any) -> TypeGuard[DataLoader[Any]]:
    return isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)


def _fetch(loader: DataLoader[Any], index: Any) -> Any:
    """What a loader's worker does for one batch of indices."""
    dataset = loader.dataset
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[index])
    get_many = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(get_many(index) if get_many else [dataset[i] for i in index])
