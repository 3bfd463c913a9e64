"""What an optimizer measures on: a model, its loss, and batches, shared by all processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary.measure import Engine, Loss, LossFunction, resolve_engine
from newton_summary.measure.batches import batch_size
from newton_summary.measure.stream import BatchStream
from newton_summary.parallel.processes import Processes
from newton_summary.parallel.sharding import check_all_or_none, measurable
from newton_summary.partition import Partition
from newton_summary.summary import Summary


class Samples:
    """A loss of a model on samples, and how it changes along a direction; every process adds its own samples.

    Args:
        model: what is trained, or what ``DistributedDataParallel`` or ``torch.compile`` made of it.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        partition: the groups.
        data: batches, iterated for ever by an independent sampler; ``None`` where batches come from the user alone.
        engine: what measures: a name, or an :class:`~newton_summary.measure.Engine`.
        seed: fixes the sampler.
        process_group: the processes whose measurements are averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        partition: Partition,
        data: Iterable[Any] | None = None,
        *,
        engine: str | Engine = "auto",
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        check_all_or_none(dict(zip(partition.parameter_names, partition.parameters, strict=True)))
        self.partition = partition
        self.processes = Processes(model, process_group)
        self.engine = resolve_engine(engine)
        self.loss = Loss(loss_fn, model)
        among = self.processes
        self.stream = None if data is None else BatchStream(data, seed, among.rank, among.count)

    def next(self, rewind: Callable[[], None] | None = None) -> Any:
        """The next batch of the stream, on the model's device; see :meth:`.BatchStream.next`."""
        assert self.stream is not None
        return self.stream.next(self.partition.device, rewind)

    @contextlib.contextmanager
    def along(self, u: Mapping[Tensor, Tensor]) -> Iterator[tuple[Partition, Sequence[Tensor]]]:
        """A block with whole parameters, where they are sharded, in full precision, whatever the training uses.

        It gives the partition over them, and the direction, 0 where u has none.
        """
        direction = [u[p] if p in u else torch.zeros_like(p) for p in self.partition.parameters]
        with self.whole(direction) as whole:
            yield whole

    @contextlib.contextmanager
    def whole(self, beside: Sequence[Tensor] = ()) -> Iterator[tuple[Partition, list[Tensor]]]:
        """The same block with other tensors of the parameters' shapes, or with none."""
        with measurable(self.loss.model, self.partition, beside) as whole:
            yield whole

    def summary(self, batch: Any, partition: Partition, along: Sequence[Tensor]) -> Summary:
        """The measurement on all processes' batches together."""
        part = self.engine.measure(self.loss, batch, partition, along, 3, "diagonal")
        return self.processes.average([part], along)[0]

    def loss_after(self, eta: Tensor, batch: Any, partition: Partition, along: Sequence[Tensor]) -> float:
        """The loss on all processes' batches after a step of these rates."""
        return self.mean(self.loss.after_step(batch, partition, along, eta.tolist()), batch_size(batch))

    def mean(self, number: float, samples: int = 1) -> float:
        """The mean of a number over all processes, by the samples of each."""
        return self.means([number], samples)[0]

    def means(self, numbers: Sequence[float], samples: int = 1) -> list[float]:
        """The means of numbers over all processes, by the samples of each."""
        return self.processes.mean(numbers, [samples] * len(numbers), self.partition.device)
