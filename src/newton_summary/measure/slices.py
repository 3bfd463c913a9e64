"""Batches in parts: slices of them, or some samples, and whether the loss of a batch is the mean over its parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from newton_summary._checks import check_count
from newton_summary.measure.batches import BatchSizes, SizeOf, batch_size, chosen, cut, fresh, section
from newton_summary.measure.loss import Loss, gradients_of


class Pieces:
    """Batches, or slices of them, with the number of their samples.

    Args:
        loss: what is measured.
        batches: the batches.
        slices: into how many parts each is cut.
        given: the number of samples, where it is given.
        progress: whether to show a bar.
    """

    def __init__(self, loss: Loss, batches: Iterable[Any], slices: int, given: SizeOf, progress: bool) -> None:
        self.batches, self.slices, self.given, self.progress = batches, slices, given, progress
        self._check = MeanCheck(loss, f"slices={slices}")

    def each(self, what: str) -> Iterator[tuple[Any, int]]:
        """Goes through all batches once."""
        sizes = BatchSizes(self.given)
        for batch in tqdm(self.batches, desc=what, leave=False) if self.progress else self.batches:
            size = sizes(batch)
            if self.slices == 1:
                yield fresh(batch), size
                continue
            check_count("batch_size", size)
            size = int(size)
            parts = cut(fresh(batch), self.slices, size)
            counts = [(i + 1) * size // len(parts) - i * size // len(parts) for i in range(len(parts))]
            self._check(batch, parts, counts, section(fresh(batch), 0, sum(counts[:2]), size))
            yield from zip(parts, counts, strict=True)


class MeanCheck:
    """Whether a batch is what it was cut into: its loss is the mean over its parts, each counted by its samples.

    Values are compared on the whole batch, without the memory that a gradient takes; gradients, which may differ
    where values do not (behind a last layer of zeros), on the first two parts together.  Dropout is left out.  Of
    later batches, values are compared: a mean over what samples have several of is that of the parts by chance.

    Args:
        loss: on a batch.
        asked: what was asked for, as errors name it.

    Attributes:
        is_possible: whether the loss can be compared; a random one cannot.
    """

    def __init__(self, loss: Loss, asked: str) -> None:
        self.loss, self.asked = loss, asked
        self.is_possible = True
        self._is_first = True
        self._differentiates = False  # whether the loss needs its own graph

    def __call__(self, batch: Any, parts: Sequence[Any], counts: Sequence[int], joint: Any) -> None:
        """Compares a batch with its parts.

        Args:
            batch: the whole.
            parts: those that it was cut into.
            counts: the number of samples in each.
            joint: the first two of them together.

        Raises:
            ValueError: the loss is not the mean, or cannot be computed on parts.
        """
        if not self.is_possible:
            return
        with self.loss.undisturbed() as rewind, _without_dropout(self.loss.model):
            whole = self._value(batch, rewind)
            if self._is_first and whole != self._value(batch):
                self.is_possible = False
                return
            try:
                values = [self._value(part, rewind) for part in parts]
                if self._is_first:
                    gradients = [self._gradient(part, rewind) for part in parts[:2]]
                    together = self._gradient(joint, rewind)
            except Exception as error:
                raise ValueError(
                    f"{self.asked}: the loss cannot be computed on slices along the first dimension "
                    f"({type(error).__name__}: {error}): pass smaller batches instead"
                ) from error
        mean = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
        if abs(mean - whole) > self._same * max(abs(whole), *(abs(v) for v in values)):
            raise ValueError(
                f"{self.asked}: the mean loss over slices along the first dimension is {mean:.6g}, that of the "
                f"batch {whole:.6g}: pass smaller batches instead"
            )
        if self._is_first:
            self._check_gradients(gradients, together, counts)
        self._is_first = False

    def _check_gradients(
        self, gradients: Sequence[Sequence[Tensor]], joint: Sequence[Tensor], counts: Sequence[int]
    ) -> None:
        """Raises where the gradient on some slices together is not the mean of theirs."""
        tolerance = 10 * self._same
        shares = [n / sum(counts[:2]) for n in counts[:2]]
        largest = max((float(g.abs().max()) for own in (*gradients, joint) for g in own if g.numel()), default=0.0)
        for number, expected in enumerate(joint):
            mean = sum((own[number] * share for own, share in zip(gradients, shares, strict=True)), 0 * expected)
            if expected.numel() and float((mean - expected).abs().max()) > tolerance * largest:
                name, shape = list(self.loss.model.named_parameters())[number][0], tuple(expected.shape)
                raise ValueError(
                    f"{self.asked}: the mean gradient over slices along the first dimension is not that of "
                    f"the batch, for parameter {name!r}, of shape {shape}: pass smaller batches instead"
                )

    @property
    def _same(self) -> float:
        """How close, relatively, losses are that differ by rounding."""
        coarsest = max((torch.finfo(p.dtype).eps for p in self.loss.model.parameters()), default=0.0)
        device = next((p.device.type for p in self.loss.model.parameters()), "cpu")
        if torch.is_autocast_enabled(device):
            coarsest = max(coarsest, torch.finfo(torch.get_autocast_dtype(device)).eps)
        return _SAME_AS[coarsest > 1e-10, coarsest > 1e-5]

    def _value(self, batch: Any, rewind: Callable[[], None] = lambda: None) -> float:
        """The loss without its graph; where it does not stand that, because it differentiates, with it."""
        rewind()
        if not self._differentiates:
            try:
                with torch.no_grad():
                    return self.loss.value(batch)
            except RuntimeError:
                self._differentiates = True
                rewind()
        return self.loss.value(batch)

    def _gradient(self, batch: Any, rewind: Callable[[], None]) -> list[Tensor]:
        """The gradient by all parameters, 0 where there is none."""
        rewind()
        parameters = list(self.loss.model.parameters())
        with self.loss.evaluated(batch) as value:
            gradients = gradients_of(value, parameters)
        return [
            torch.zeros_like(p) if g is None else g.detach().to_dense()
            for p, g in zip(parameters, gradients, strict=True)
        ]


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """A block in which torch's own layers drop nothing out."""
    switched = [m for m in model.modules() if isinstance(m, _DROPPING) and m.training]
    try:
        for module in switched:
            module.training = False
        yield
    finally:
        for module in switched:
            module.training = True


_DROPPING = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)
_SAME_AS = {(False, False): 1e-5, (True, False): 1e-3, (True, True): 3e-2}
"""Where the coarsest type has double, single and half precision; a loss may use half precision by itself."""


class RandomSamples:
    """Some samples of each batch, drawn at random, which stand for all where the loss is the mean over samples.

    Random ones, because samples may lie in an order, by class or by length; and in the order of the batch, which a
    loss may count on, as packed sequences do.

    Args:
        loss: on a batch.
        seed: fixes which.

    Example:
        >>> batch = torch.arange(6.0)
        >>> some, count = RandomSamples(Loss(lambda model, x: x.mean(), nn.Linear(1, 1)), seed=1).of(batch, 9)
        >>> count, some is batch
        (6, True)
    """

    def __init__(self, loss: Loss, seed: int = 0) -> None:
        self._loss, self._generator = loss, torch.Generator().manual_seed(seed)
        self._check: MeanCheck | None = None

    def of(self, batch: Any, count: int) -> tuple[Any, int]:
        """So many samples of a batch, and their number; the batch itself where it has no more.

        Raises:
            ValueError: the loss on the batch is not the mean over its samples, or cannot be compared, being random.
        """
        size = batch_size(batch)
        if count >= size:
            return batch, size
        asked = f"samples={count}"
        self._check = check = self._check or MeanCheck(self._loss, asked)
        order = torch.randperm(size, generator=self._generator, device="cpu")
        some, others = (chosen(fresh(batch), part.sort().values, size) for part in (order[:count], order[count:]))
        check(batch, [some, others], [count, size - count], batch)
        if not check.is_possible:
            raise ValueError(f"{asked}: the loss is random, so that samples cannot be told to stand for the batch")
        return some, count

    def state_dict(self) -> dict[str, Tensor]:
        """Which samples come next."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._generator.set_state(state["generator"].cpu())
