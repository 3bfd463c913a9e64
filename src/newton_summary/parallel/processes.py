"""Several processes that measure together: each its own part of the samples, all with the same result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from newton_summary.parallel.paging import settle
from newton_summary.parallel.sharding import unsharded
from newton_summary.partition import unwrap
from newton_summary.summary import Summary

_SAME = 1e-3  # directions whose marks are this close, relatively, differ by rounding


class Processes:
    """The processes that train one model together, as ``torchrun`` starts them; in a plain script, this one alone.

    Args:
        model: the module that is trained, or what ``DistributedDataParallel`` made of it.
        group: those whose measurements are averaged.  Default: the group of the ``DistributedDataParallel`` module, or
            else the default group, where one was initialised.

    Attributes:
        rank: the number of this process among them, from 0.
        count: how many there are.

    Raises:
        ValueError: this process is not in the group; or there are several, and the model has a ``SyncBatchNorm``.

    Example:
        >>> Processes(nn.Linear(2, 1)).count
        1
    """

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        wrapper = getattr(model, "_orig_mod", model)  # inside what torch.compile made
        self._wrapper = wrapper if isinstance(wrapper, nn.parallel.DistributedDataParallel) else None
        if group is None and self._wrapper is not None:
            group = self._wrapper.process_group
        self._join(group)
        if self.rank < 0:
            raise ValueError("this process is not in process_group: pass the group that it trains with")
        if self.count > 1:
            _check_no_exchange(unwrap(model))

    def _join(self, group: Any) -> None:
        self._group = group
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if started else 0
        self.count = dist.get_world_size(group) if started else 1

    def average(self, summaries: Sequence[Summary], along: Sequence[Tensor]) -> list[Summary]:
        """The summaries over the samples of all processes, on the host, from those over the samples of each.

        One all-reduce, of S² + 2S + 3 numbers for each summary: the loss, ḡ, H̄ and the diagonal of the third order,
        weighted by the number of samples, that number, and a mark of the direction, which must be the same in all.
        What is not finite anywhere is so everywhere afterwards.

        Args:
            summaries: as many in every process, of the same groups and orders.
            along: their direction, or this process's part of it.

        Raises:
            RuntimeError: the processes have different directions; or another one is gone, or did not come within the
                group's timeout; or the wrapper's ``join()`` is in use, within which processes stop at different steps.
        """
        if self.count == 1:
            return [summary.cpu() for summary in summaries]
        mark = _mark(along)
        rows = self._weighted_means([torch.cat([s.pack(), mark]) for s in summaries], [s.weight for s in summaries])
        for mean, _ in rows:
            self.check_alike(float(mark), float(mean[-1]))
        return [
            replace(summary.unpack(mean[:-1]), weight=float(weight))
            for summary, (mean, weight) in zip(summaries, rows, strict=True)
        ]

    def mark(self, direction: Sequence[Tensor]) -> float:
        """A number that two directions hardly share."""
        return float(_mark(direction))

    def check_alike(self, mark: float, mean: float) -> None:
        """Raises where the mean of a mark over the processes is not that of this one.

        Raises:
            RuntimeError: it is not.
        """
        if abs(mean - mark) > _SAME * mark:
            raise RuntimeError(
                f"process {self.rank} of {self.count} steps in another direction than the others: train through a "
                "DistributedDataParallel module, which averages gradients, or pass a process_group of its own to each"
            )

    def mean(self, values: Sequence[float], weights: Sequence[float], device: torch.device) -> list[float]:
        """Weighted means of numbers over all processes, in one all-reduce."""
        if self.count == 1:
            return list(values)
        numbers = [torch.tensor([value], dtype=torch.float64, device=device) for value in values]
        return [float(mean) for mean, _ in self._weighted_means(numbers, weights)]

    def total(self, number: Tensor) -> Tensor:
        """The sum of a number over all processes, in place, on its device."""
        if self.count > 1:
            self._check_all_come()
            settle()
            dist.all_reduce(number, group=self._group)
        return number

    def _check_all_come(self) -> None:
        """Raises where the wrapper answers for processes that have stopped: it knows nothing of measurements."""
        if self._wrapper is not None and self._wrapper._join_config.enable:
            raise RuntimeError(
                "within DistributedDataParallel's join() processes take different numbers of steps, and all must "
                "measure together: give every process as many batches, as DistributedSampler does, and leave out join()"
            )

    def _weighted_means(self, vectors: Sequence[Tensor], weights: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """For each vector its mean over the processes, and the sum of its weights, on the host."""
        self._check_all_come()
        rows = torch.stack([torch.cat([w * v, v.new_tensor([w])]) for v, w in zip(vectors, weights, strict=True)])
        settle()
        try:
            dist.all_reduce(rows, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.count} could not average a measurement: another one is gone, which "
                "torchrun's report names, or it did not measure: every process must take every step"
            ) from error
        return [(row[:-1] / row[-1], row[-1]) for row in rows.cpu().unbind()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        """The same: process groups cannot be copied."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: what is unpickled belongs to the default group of the process that it finds itself in."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._wrapper = None
        self._join(None)


def _mark(direction: Sequence[Tensor]) -> Tensor:
    """A number that two directions hardly share, shape (1,): their lengths, and sums that see every sign and place."""
    marks = []
    for u in map(unsharded, direction):
        waves = torch.arange(u.numel(), dtype=torch.float32, device=u.device).cos_()
        marks.append((u.float().norm() + (u.float().flatten() @ waves).abs()).double())
    return torch.stack(marks).sum().reshape(1)


def _check_no_exchange(model: nn.Module) -> None:
    """Raises where a layer exchanges statistics with other processes in its forward pass."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"module {name!r} is a SyncBatchNorm, which has no second derivatives across processes: use a "
                "BatchNorm, whose statistics are those of each process"
            )
