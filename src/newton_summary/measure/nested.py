"""Summaries by nested backward passes: any order, any model that autograd differentiates (docs/method.md, section 1).

This is the yardstick: simple, general, and about S^(d-1) backward passes for a derivative of order d.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary.measure.autograd import (
    forgetful,
    has_kinks,
    once_differentiable,
    own_derivatives,
    scaled_by_frequency,
    signature,
)
from newton_summary.measure.batches import batch_size
from newton_summary.measure.differences import Differences, differences_of, is_exact, mismatch, rates
from newton_summary.measure.graph import first_line
from newton_summary.measure.loss import Loss, check_dependence
from newton_summary.measure.own_gradient import check_apart
from newton_summary.measure.record import Refusal
from newton_summary.partition import Partition
from newton_summary.summary import Summary

_TORCHS = (RuntimeError, NotImplementedError, TypeError, IndexError, AttributeError, AssertionError)
"""What torch raises where a backward pass cannot be differentiated."""


class _Lacking(Refusal):
    """Why autograd cannot differentiate a loss that the forward engine may know."""


class NestedEngine:
    """Derivatives as gradients of gradients.

    D^(d+1)[…, s] is the gradient of the scalar D^(d)[…] with respect to the tensors of group s, dotted with the
    direction there.  Only index tuples in sorted order are computed, because the tensors are symmetric.

    A new sequence of autograd's functions is held to that symmetry.  Where some of them are not torch's own, or work on
    sparse tensors, second derivatives are held to differences of the gradient: these have been wrong without a word.

    Args:
        doubted: whether those of every new sequence are, and third derivatives with them.
    """

    def __init__(self, doubted: bool = False) -> None:
        self.doubted = doubted
        self._checked: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is unpickled, checks anew."""
        return NestedEngine, (self.doubted,)

    def measure(
        self, loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], order: int, third: str
    ) -> Summary:
        """The summary of one batch.

        Args:
            loss: the loss and its model.
            batch: what the loss is measured on.
            partition: S groups.
            direction: one tensor for each parameter of the partition.
            order: the highest order.
            third: ``"diagonal"`` or ``"full"``.  Above order 3 it is always in full.

        Raises:
            ValueError: the loss does not depend on the parameters.
            Refusal: autograd does not know a derivative, or leaves terms out.
        """
        check_apart(partition)
        try:
            tensors = self._tensors(loss, batch, partition, direction, order, third)
        except _Lacking as refusal:
            if self.doubted or order > 3:  # the forward engine has refused, or does not go so far
                raise
            raise Refusal(f"{refusal}, or try engine='forward', which has derivatives of its own") from refusal
        first_orders = dict(zip(("loss", "gradient", "hessian", "third"), tensors, strict=False))
        first_orders.setdefault("gradient", torch.zeros(len(partition), device=partition.device))
        return Summary(
            **first_orders, names=partition.names, higher=tuple(tensors[4:]), weight=float(batch_size(batch))
        )

    def _tensors(
        self, loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], order: int, third: str
    ) -> list[Tensor]:
        """The loss and its derivatives, by order."""
        with loss.undisturbed() as rewind:
            with loss.evaluated(batch, differentiable=True) as value:
                nesting = _Nesting(partition, direction, order, third == "diagonal")
                known = self._checked.setdefault(loss.model, set())
                made = _Made(value, order, known, self.doubted)
                try:
                    tensors = nesting.run(value, made.is_checked, made.is_doubted)
                except Refusal:
                    if bool(value.isfinite()):
                        raise
                    return [value.detach(), *(torch.full_like(t, torch.nan) for t in nesting.tensors[1:])]
            if made.is_checked:
                made.check(nesting, lambda degree: differences_of(loss, batch, partition, direction, rewind, degree))
                known.add(made.key)
        return tensors


class _Made:
    """What autograd made a loss of, and what is to be checked for that.

    Args:
        value: the loss.
        order: of the derivatives.
        known: what was checked before.
        doubted: whether derivatives are, whatever the loss is made of, as long as that is new.
    """

    def __init__(self, value: Tensor, order: int, known: set[Any], doubted: bool) -> None:
        functions = signature(value)
        self.key = functions, min(order, 3)
        own = own_derivatives(value)
        self.suspects = sorted({*own, *(name for name in functions if "Sparse" in name)})
        is_new = self.key not in known
        self.is_checked = order > 1 and (bool(own) or is_new)
        self.is_doubted = order > 1 and doubted and is_new
        self.is_smooth = not has_kinks(functions)

    def check(self, nesting: _Nesting, differences: Callable[[int], Differences]) -> None:
        """Holds higher derivatives to differences of the gradient, where that is the loss's own.

        Raises:
            Refusal: they are something else.
        """
        partition = nesting.partition
        if not (self.suspects or self.is_doubted) or (not is_exact(partition) and not self.is_smooth):
            return  # differences in single precision see the jumps of slopes as curvature
        rows = {2: nesting.tensors[2] @ nesting.rates}
        if self.is_smooth and nesting.third is not None:
            rows[3] = nesting.third
        wrong = mismatch(differences, nesting.tensors[1] * nesting.rates, rows)
        if wrong is not None:
            order, worst = wrong
            behind = f", behind {', '.join(self.suspects)}" if self.suspects else ""
            raise Refusal(
                f"autograd's {'second' if order == 2 else 'third'} derivatives for group {partition.names[worst]!r} "
                f"are not those of its gradient{behind}: compute the loss by operations of torch that it can "
                f"differentiate {'twice' if order == 2 else 'three times'}"
            )


def taylor(loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], order: int) -> list[float]:
    """The derivatives of t ↦ L(θ + t u) at t = 0, of orders 0 to ``order``, at one backward pass each.

    Each is the sum of all entries of the summary of that order.
    """
    single = Partition.trivial(loss.model)
    by_name = dict(zip(partition.parameter_names, direction, strict=True))
    along = [by_name[name] for name in single.parameter_names]
    summary = NestedEngine().measure(loss, batch, single, along, order, "full")
    return [summary.tensor(d).item() for d in range(order + 1)]


class _Nesting:
    """One recursion over sorted index tuples."""

    def __init__(self, partition: Partition, direction: Sequence[Tensor], order: int, diagonal: bool) -> None:
        self.partition, self.direction = partition, direction
        self.order = order
        self.diagonal = diagonal and order == 3
        self.groups_of = partition.groups_of
        size, device = len(partition), partition.parameters[0].device
        self.tensors = [torch.zeros((size,) * d, dtype=torch.float64, device=device) for d in range(order + 1)]
        if self.diagonal:
            self.tensors[3] = torch.zeros(size, dtype=torch.float64, device=device)
        self.rates = torch.tensor(rates(len(partition)), dtype=torch.float64, device=device)
        self.third: Tensor | None = None

    def run(self, value: Tensor, checked: bool = False, doubted: bool = False) -> list[Tensor]:
        """All tensors, from the loss on.

        Args:
            value: the loss.
            checked: whether the second order is held to be symmetric.
            doubted: whether the third is found along a line, too.
        """
        self.tensors[0] = value.detach().to(torch.float64)
        self._checked = doubted or (checked and len(self.partition) > 1)
        self._thirds = doubted and self.order > 2
        if self.order > 1:
            _check_not_scaled(value)
            if self.order > 2:
                _check_remembered(value)
        if self.order > 0:
            self._descend(value, ())
        return self.tensors

    def _check_along(self, row: Sequence[Tensor]) -> None:
        """Holds sums of columns to those of rows: what has no symmetric second derivatives is no gradient.

        The third derivatives by each group, along the line twice, are kept.

        Args:
            row: the first derivatives, with their graph.
        """
        columns = self._derivatives_along(row)
        if columns is None:
            return
        sums, rows = torch.stack(columns).detach(), self.tensors[2] @ self.rates
        size = self.tensors[2].abs().sum(1).max()
        excess = (sums - rows).abs()
        if bool(excess.isfinite().all()) and bool(
            excess.max() > (1e-6 if is_exact(self.partition) else 5e-2) * size + 1e-12
        ):
            worst = self.partition.names[int(excess.argmax())]
            raise Refusal(
                f"what autograd gives for group {worst!r} is the gradient of nothing: its second derivatives are not "
                "symmetric, as where hooks change gradients, or entries are written twice"
            )
        thirds = self._derivatives_along(columns) if self._thirds else None
        self.third = None if thirds is None else torch.stack(thirds).detach()

    def _derivatives_along(self, row: Sequence[Tensor]) -> list[Tensor] | None:
        """The derivatives by each group of the sum of some numbers, each times its group's rate."""
        moving = [r * rate for r, rate in zip(row, self.rates, strict=True) if r.requires_grad]
        if not moving:
            return None
        total = torch.stack(moving).sum()
        return self.partition.dot(self._gradients(total, range(len(self.partition)), True), self.direction)

    def _descend(self, scalar: Tensor, prefix: tuple[int, ...]) -> None:
        """Differentiates the entry with index ``prefix``, and then what comes out, up to the last order."""
        depth = len(prefix) + 1
        last = depth == self.order
        first = prefix[-1] if prefix else 0
        only_diagonal = self.diagonal and depth == 3
        groups = range(first, first + 1 if only_diagonal else len(self.partition))
        if not last and len(set(prefix)) < 2:
            _check_differentiable(scalar, depth + 1)
        gradients = self._gradients(scalar, groups, not last)
        if not prefix:
            check_dependence(gradients)
        row = self.partition.dot(gradients, self.direction)
        if only_diagonal:
            self.tensors[3][first] = row[first].detach()
            return
        for group in range(first, len(self.partition)):
            index = (*prefix, group)
            for symmetric in set(permutations(index)):
                self.tensors[depth][symmetric] = row[group].detach()
            if not last and not (self.diagonal and depth == 2 and group != first):
                self._descend(row[group], index)
        if not prefix and not last and self._checked:
            self._check_along(row)

    def _gradients(self, scalar: Tensor, groups: range, keep_graph: bool) -> list[Tensor | None]:
        """The gradients of a scalar with respect to the tensors of these groups; ``None`` for all other tensors."""
        chosen = [i for i, members in enumerate(self.groups_of) if any(g in groups for g in members)]
        parameters = self.partition.parameters
        chosen = [i for i in chosen if parameters[i].requires_grad]
        results: list[Tensor | None] = [None] * len(parameters)
        if scalar.requires_grad and chosen:
            try:
                gradients = torch.autograd.grad(
                    scalar, [parameters[i] for i in chosen], None, True, keep_graph, allow_unused=True
                )
            except torch.OutOfMemoryError:
                raise
            except _TORCHS as error:
                raise _Lacking(
                    f"autograd lacks a derivative, {first_line(error)}: compute the loss without this operation"
                ) from error
            for i, gradient in zip(chosen, gradients, strict=True):
                results[i] = gradient
        return results


def _check_not_scaled(value: Tensor) -> None:
    """Raises where gradients of a loss are none."""
    scaled = scaled_by_frequency(value)
    if scaled:
        raise Refusal(
            f"scale_grad_by_freq=True makes of {scaled[0]} no derivative: set it to False where the loss is measured"
        )


def _check_remembered(value: Tensor) -> None:
    """Raises where third derivatives of a loss would lack terms."""
    names = forgetful(value)
    if names:
        raise _Lacking(
            f"third derivatives behind {names[0]} lack terms in autograd: normalise by a module or function of torch.nn"
        )


def _check_differentiable(scalar: Tensor, order: int) -> None:
    """Raises where the next derivative would lack terms."""
    names = once_differentiable(scalar)
    if names:
        raise _Lacking(
            f"derivatives of order {order} are unknown to autograd behind {', '.join(sorted(set(names)))}, whose "
            "backward pass is marked once_differentiable: use a function that can be differentiated twice"
        )
