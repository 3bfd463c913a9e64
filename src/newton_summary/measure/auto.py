"""The fast engine where it works, the general one elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from newton_summary._warned import warn
from newton_summary.measure.forward import ForwardEngine
from newton_summary.measure.graph import first_line
from newton_summary.measure.loss import Loss
from newton_summary.measure.nested import NestedEngine
from newton_summary.measure.own_gradient import NoDerivative
from newton_summary.measure.record import Refusal
from newton_summary.partition import Partition
from newton_summary.summary import Summary


class AutoEngine:
    """The forward engine, and nested differentiation for what that refuses, with one warning for each model.

    What nested passes give in its place is held to differences of the gradient, once for each new sequence of
    autograd's functions: forward may have refused because two ways disagree.  What no engine can measure, because
    autograd's gradient is not that of the loss, is refused at once.

    Source: docs/engine.md.
    """

    def __init__(self, forward: ForwardEngine | None = None) -> None:
        self.forward = ForwardEngine() if forward is None else forward
        self.nested = NestedEngine(doubted=True)
        self._warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()

    def within(self, memory: float | None) -> AutoEngine:
        """The same engine, with the same graphs, and a budget of memory for the forward engine."""
        other = AutoEngine(self.forward.within(memory))
        other.nested = self.nested
        other._warned = self._warned
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, warns anew."""
        return AutoEngine, (self.forward,)

    def measure(
        self, loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], order: int, third: str
    ) -> Summary:
        """The summary of one batch, by the first engine that can.

        Raises:
            Refusal: neither can; both reasons are named.
        """
        if order not in (2, 3):  # the first is one gradient
            return self.nested.measure(loss, batch, partition, direction, order, third)
        try:
            return self.forward.measure(loss, batch, partition, direction, order, third)
        except NoDerivative:
            raise
        except Refusal as refusal:
            reason = str(refusal)
        try:
            summary = self.nested.measure(loss, batch, partition, direction, order, third)
        except (RuntimeError, Refusal) as error:
            if not isinstance(error, Refusal) and reason.endswith(first_line(error)):
                raise  # the loss itself failed
            raise Refusal(f"no engine can measure this loss; forward: {reason}; nested: {first_line(error)}") from error
        known = self._warned.setdefault(loss.model, set())
        if reason not in known:
            known.add(reason)
            warn(f"measured by nested differentiation, which is slower: {reason}")
        return summary


FORWARD = ForwardEngine()
"""Shared by everyone who asks for an engine by name, so that graphs are traced once."""

NESTED = NestedEngine()
"""The same, for nested passes by themselves."""

AUTO = AutoEngine(FORWARD)
