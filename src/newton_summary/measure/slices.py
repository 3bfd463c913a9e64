"""Batches cut along their first dimension, to bound memory; and whether what was cut is the same loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from newton_summary.measure.batches import BatchSizes, SizeOf, cut, fresh, section
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
        self.loss, self.batches, self.slices, self.given, self.progress = loss, batches, slices, given, progress
        self._is_first = True
        self._is_checkable = True  # a random loss is not
        self._differentiates = False  # whether the loss needs its own graph

    def each(self, what: str) -> Iterator[tuple[Any, int]]:
        """Goes through all batches once."""
        sizes = BatchSizes(self.given)
        for batch in tqdm(self.batches, desc=what, leave=False) if self.progress else self.batches:
            size = sizes(batch)
            if self.slices == 1:
                yield fresh(batch), size
                continue
            parts = cut(fresh(batch), self.slices, size)
            counts = [(i + 1) * size // len(parts) - i * size // len(parts) for i in range(len(parts))]
            if self._is_checkable:
                self._check(batch, parts, counts)
            yield from zip(parts, counts, strict=True)

    def _check(self, batch: Any, parts: Sequence[Any], counts: Sequence[int]) -> None:
        """Raises where a batch is not what was cut: its loss is not the mean over its slices.

        Values are compared on the whole batch, without the memory that a gradient takes; gradients, which may differ
        where values do not (behind a last layer of zeros), on the first two slices together.  Dropout is left out.  Of
        later batches, values are compared: a mean over what samples have several of is that of its slices by chance.
        """
        with self.loss.undisturbed() as rewind, _without_dropout(self.loss.model):
            whole = self._value(batch, rewind)
            if self._is_first and whole != self._value(batch):
                self._is_checkable = False
                return  # there is nothing to compare
            try:
                values = [self._value(part, rewind) for part in parts]
                if self._is_first:
                    gradients = [self._gradient(part, rewind) for part in parts[:2]]
                    joint = self._gradient(section(fresh(batch), 0, sum(counts[:2]), sum(counts)), rewind)
            except Exception as error:
                raise ValueError(
                    f"slices={self.slices}: the loss cannot be computed on slices along the first dimension "
                    f"({type(error).__name__}: {error}): pass smaller batches instead"
                ) from error
        mean = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
        if abs(mean - whole) > self._same * max(abs(whole), *(abs(v) for v in values)):
            raise ValueError(
                f"slices={self.slices}: the mean loss over slices along the first dimension is {mean:.6g}, that of the "
                f"batch {whole:.6g}: pass smaller batches instead"
            )
        if self._is_first:
            self._check_gradients(gradients, joint, counts)
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
                    f"slices={self.slices}: the mean gradient over slices along the first dimension is not that of "
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
