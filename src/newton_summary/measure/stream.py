"""An endless stream of batches with a randomness of its own."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from newton_summary._checks import check_batches, check_count
from newton_summary.measure.attributes import generator_rewind, generators_behind, reseed
from newton_summary.measure.batches import to_device
from newton_summary.measure.loss import preserved_randomness


class BatchStream:
    """Batches from an iterable, over and over, that leaves the user's loop and random states untouched.

    A ``DataLoader`` is read through its dataset and its collate function, in this process.  Over a map-style dataset
    it follows a copy of the loader's batch sampler that draws from a generator of the stream's own; a sequential order
    is replaced by a random one, so that the stream is independent of the training loop.  Every pass is seeded by its
    number: the position in the stream is two integers, and resuming is exact.  For other iterables a resumed stream
    skips what it had read, which is exact where the iterable repeats itself.

    A loader of a class that iterates in a way of its own, such as one that transforms its batches, is iterated in that
    way: a shallow copy of it, without workers, with the samplers described above.  Accelerate's loaders count as the
    loaders that they were made of.

    Several processes share the samples of every batch of a map-style dataset: all draw the same batch, and each loads
    its part.  Where the sampler gives every process samples of its own (torch's ``DistributedSampler`` and its kind),
    and with other iterables, each measures on the whole of its own batches.

    Args:
        data: an iterable of batches that can be iterated more than once.
        seed: fixes the order; not negative.
        rank: the number of this process.
        count: the number of processes.
        what: the name of the argument that the data is, for errors.

    Raises:
        TypeError: it is no iterable.
        ValueError: the iterable is empty, can be read only once, or is a single batch.

    Example:
        >>> loader = DataLoader(torch.arange(10.0), batch_size=5)
        >>> stream = BatchStream(loader)
        >>> [len(stream.next(torch.device("cpu"))) for _ in range(3)]
        [5, 5, 5]
        >>> stream.state_dict()
        {'seed': 0, 'epoch': 1, 'position': 1}
    """

    def __init__(
        self, data: Iterable[Any], seed: int = 0, rank: int = 0, count: int = 1, what: str = "curvature_data"
    ) -> None:
        if isinstance(data, Iterator):
            raise ValueError(f"{what} is a one-shot {type(data).__name__}: pass a DataLoader or a list of batches")
        check_batches(what, data)
        check_count("seed", seed, least=0)
        self.data, self._what = data, what
        self.seed = int(seed)
        self.rank, self.count = rank, count
        self.epoch, self.position = 0, 0
        self._batches: Iterator[Any] | None = None
        self._generators: list[Any] = []  # those that the data owns
        samples: Any = data.dataset if isinstance(data, DataLoader) else data
        if is_sized(samples) and len(samples) == 0:
            raise ValueError(f"{what} is empty: it must have batches from the beginning")

    def next(self, device: torch.device, rewind: Callable[[], None] | None = None) -> Any:
        """The next batch, on this device.

        Args:
            device: where tensors in the batch should be.
            rewind: restores the random states, where a block around this call has saved them; else they are saved here.

        Raises:
            ValueError: a whole pass over the data gives no batch.
        """
        if self._batches is None:
            self._generators = generators_behind(self.data)
        rewind_generators = generator_rewind(self._generators)
        try:
            with preserved_randomness() if rewind is None else contextlib.nullcontext():
                batch = self._advance()
        finally:
            rewind_generators()
        if rewind is not None:
            rewind()
        return to_device(batch, device)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where :meth:`state_dict` was taken."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._batches = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchStream:
        """A stream at the same position over the same data, which is shared."""
        twin = BatchStream(self.data, self.seed, self.rank, self.count, self._what)
        twin.load_state_dict(self.state_dict())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Without the pass that is under way, which cannot be pickled: it is opened again where it was."""
        return {**vars(self), "_batches": None, "_generators": []}

    def _advance(self) -> Any:
        batch = self._read()
        if batch is _END:
            self._batches = None
            if self.position == 0:
                again = " again: it can be read only once, or has been emptied since" if self.epoch else ""
                raise ValueError(
                    f"{self._what} is empty{again}: a pass over it gave no batch; pass a DataLoader, a list of "
                    "batches, or an object that gives them anew each time it is iterated"
                )
            self.epoch, self.position = self.epoch + 1, 0
            return self._advance()
        self.position += 1
        return batch

    def _read(self) -> Any:
        """The next batch of a pass; an error of the data's ends the pass, for those who go on all the same."""
        try:
            if self._batches is None:
                self._batches = self._open(self.position)
            self._reseed(self.position)
            return next(self._batches, _END)
        except Exception as error:
            error.add_note(
                f"raised by {self._what}, of which batch {self.position} of pass {self.epoch} was read, in this "
                "process and apart from the training loop"
            )
            self.epoch, self.position, self._batches = self.epoch + 1, 0, None
            raise

    def _reseed(self, position: int) -> None:
        """Makes what a dataset draws (augmentations), of whatever generator, a function of the position."""
        seed = self._seed_at(position)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (datasets draw from the legacy state)
        torch.default_generator.manual_seed(seed)
        for generator in self._generators:
            reseed(generator, seed)

    def _seed_at(self, position: int) -> int:
        return int(np.random.SeedSequence((self.seed, self.epoch, position)).generate_state(1)[0])

    def _open(self, skip: int) -> Iterator[Any]:
        """A new pass over the data, from its batch number ``skip``; of a map-style set, no skipped batch is loaded."""
        loader = self.data if _is_map_style(self.data) and not _iterates_its_own_way(self.data) else None
        self._reseed(0)
        source = iter(self._own_loader() if loader is None else self._indices(loader))
        for position in range(skip):
            self._reseed(position)
            next(source, None)
        return source if loader is None else (_fetch(loader, self._own(loader, index)) for index in source)

    def _own(self, loader: DataLoader[Any], batch: Any) -> Any:
        """This process's part of the indices of a batch; all, where there are fewer than processes."""
        samplers = _layers(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
        shared = any(hasattr(layer, name) for layer in samplers for name in ("num_replicas", "num_processes"))
        if shared or not isinstance(batch, list | tuple) or len(batch) < self.count:
            return batch
        return batch[self.rank * len(batch) // self.count : (self.rank + 1) * len(batch) // self.count]

    def _indices(self, loader: DataLoader[Any]) -> Iterable[Any]:
        """The indices of every batch of a pass, in an order that is a function of the seed and the epoch."""
        seed = self._seed_at(0)
        batches: Any = loader.batch_sampler
        sampler: Any = batches.sampler if type(batches) is BatchSampler else loader.sampler if batches is None else None
        if not isinstance(sampler, SequentialSampler):
            return cast(Iterable[Any], _reseeded_copy(sampler if batches is None else batches, loader.dataset, seed))
        order = RandomSampler(sampler.data_source, generator=torch.Generator().manual_seed(seed))
        return order if batches is None else BatchSampler(order, batches.batch_size, batches.drop_last)

    def _own_loader(self) -> Iterable[Any]:
        """What is iterated for a pass: a loader that shares neither workers nor generators with the user's."""
        loader = self.data
        if not isinstance(loader, DataLoader):
            return loader
        seed = self._seed_at(0)
        generator = torch.Generator().manual_seed(seed)
        if not _iterates_its_own_way(loader):
            return DataLoader(
                loader.dataset,
                batch_size=loader.batch_size,
                drop_last=loader.drop_last,
                collate_fn=loader.collate_fn,
                generator=generator,
            )
        if DataLoader not in type(loader).__mro__:  # it only stands for one, and may hold it anywhere
            return loader
        twin = copy.copy(loader)  # torch's attributes cannot be set one by one
        vars(twin).update({key: _reseeded(value, seed) for key, value in vars(loader).items()})
        vars(twin).update(_ALONE, generator=generator)
        if _is_map_style(loader):
            indices = self._indices(loader)
            vars(twin)["sampler" if loader.batch_sampler is None else "batch_sampler"] = indices
            vars(twin)["sampler"] = getattr(indices, "sampler", twin.sampler)
        return twin


_END = object()

_ALONE = {
    "num_workers": 0,
    "prefetch_factor": None,
    "persistent_workers": False,
    "pin_memory": False,
    "timeout": 0,
    "worker_init_fn": None,
    "_DataLoader__multiprocessing_context": None,
    "_iterator": None,
}
"""What a loader that loads in this process has, by the names of torch's own attributes."""


def _reseeded_copy(sampler: Any, dataset: Any, seed: int) -> Any:
    """A copy of a sampler, or of a batch sampler around one, that draws from generators of its own."""
    memo: dict[int, Any] = {id(dataset): dataset}
    for value in (value for layer in _layers(sampler) for value in getattr(layer, "__dict__", {}).values()):
        own = value if isinstance(value, Dataset) else _reseeded(value, seed)
        if own is not value or isinstance(value, Dataset):
            memo[id(value)] = own
    twin = copy.deepcopy(sampler, memo)
    for layer in _layers(twin):
        if hasattr(layer, "set_epoch"):  # torch's DistributedSampler and its kind
            layer.set_epoch(seed)
    return twin


def _reseeded(value: Any, seed: int) -> Any:
    """Another generator of the same kind with this seed; anything else as it is."""
    if isinstance(value, torch.Generator):
        return torch.Generator().manual_seed(seed)
    if isinstance(value, np.random.Generator):
        return np.random.default_rng(seed)
    return type(value)(seed) if isinstance(value, np.random.RandomState | random.Random) else value


def _layers(sampler: Any) -> tuple[Any, ...]:
    """A sampler, and those inside it, as accelerate's share of a batch sampler has two."""
    layers = [sampler]
    for name in ("sampler", "batch_sampler"):
        if isinstance(getattr(sampler, name, None), Iterable):
            layers += _layers(getattr(sampler, name))
    return tuple(layers)


def _iterates_its_own_way(loader: DataLoader[Any]) -> bool:
    """Whether its class makes iterators in another way than torch's, and does something to the batches there, perhaps.

    Those of accelerate move batches to the device, which is done here, and count for the training loop that they are
    in, which must not happen here.
    """
    kinds = type(loader).__mro__
    # accelerate's are no subclasses: they give the class of the loader that they hold as theirs
    above = kinds[: kinds.index(DataLoader)] if DataLoader in kinds else kinds
    return any(
        kind.__module__.partition(".")[0] != "accelerate" and {"__iter__", "_get_iterator"} & vars(kind).keys()
        for kind in above
    )


def kept(batches: Iterable[Any], most: int) -> Iterable[Any]:
    """Batches that can be read over and over: of a one-shot iterator, which may have no end, the first ones."""
    return list(islice(batches, most)) if isinstance(batches, Iterator) else batches


def is_sized(data: Any) -> TypeGuard[Sized]:
    """Whether ``len(data)`` works: a loader over an iterable-style dataset has the method, but often no length."""
    try:
        len(data)
    except TypeError:
        return False
    return True


def _is_map_style(data: Any) -> TypeGuard[DataLoader[Any]]:
    return isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)


def _fetch(loader: DataLoader[Any], index: Any) -> Any:
    """What a loader's worker does for one batch of indices."""
    dataset = loader.dataset
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[index])
    if loader.collate_fn is default_collate and isinstance(index, list) and index:
        dataset, index = _behind_subsets(dataset, index)
        if type(dataset) is TensorDataset and all(_is_plain(t) for t in dataset.tensors):
            rows = torch.as_tensor(index)  # sample by sample, a large batch takes longer than a training step
            return [t[rows] for t in dataset.tensors]
    get_many = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(get_many(index) if get_many else [dataset[i] for i in index])


def _behind_subsets(dataset: Any, index: Sequence[int]) -> tuple[Any, Sequence[int]]:
    """What parts of a set are parts of, and where their samples are in it."""
    while type(dataset) is Subset:
        dataset, index = dataset.dataset, [dataset.indices[i] for i in index]
    return dataset, index


def _is_plain(tensor: Tensor) -> bool:
    """Whether rows of a tensor are what its samples are stacked to."""
    return type(tensor) is Tensor and tensor.layout is torch.strided
