"""The default optimizer: rates that are found while it trains (docs/method.md, section 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary._checks import check_count, check_not_negative
from newton_summary._warned import warn
from newton_summary.measure import Engine, LossFunction
from newton_summary.measure.together import OneOrSeveral, are_optimizers, members_of, together
from newton_summary.optim.backtracking import backtrack
from newton_summary.optim.clipping import GradientClipping
from newton_summary.optim.comparison import AverageComparison
from newton_summary.optim.directions import SOAP, Direction, forget, usual_rate
from newton_summary.optim.directions.affordable import SidesByCount
from newton_summary.optim.measured import MeasuredOptimizer
from newton_summary.optim.paper import PaperNewtonSummary
from newton_summary.optim.rates import AveragedRates
from newton_summary.optim.relative_rates import RelativeRates
from newton_summary.optim.samples import Samples
from newton_summary.optim.state import Part
from newton_summary.partition import Partition, one_for_each, resolve_partition
from newton_summary.solve import Status
from newton_summary.summary import Summary

_SMALL = 0.05  # λ_1 below which it is taken for a learning rate
_WAITING = 5  # steps from one measurement to the next, while none has given rates
_COMPARED_EVERY = 20  # steps
_MEASURED_EVERY = 100  # steps, where nothing else adapts the rates


class NewtonSummary(MeasuredOptimizer):
    """Steps θ ← θ − λ_1 η_s u for every group s, with nothing to tune.

    By default, in five lines:

    1. The *direction* u is Adam's with Nesterov's momentum, in the eigenbases of Kronecker factors for those sides of
       weight matrices where a count of operations finds that cheap (:class:`~newton_summary.optim.directions.SOAP`).
    2. Each tensor has a rate of its own.  All begin half way from 0.003 to a third of the best first step,
       and not above that step.
    3. Every 20 steps one gradient on a fresh batch, on the way from the weights to their average over the last twelfth
       of the run, tells what each tensor adds to the loss: if the weights are better, its steps become longer, else
       shorter, unless their noise costs next to nothing.
    4. In a given share of the run's steps so far a rate changes by a given factor: quickly at first.
    5. A gradient three times as long as usual is shortened; where the loss has risen, all rates become a quarter;
       weights that diverge go back to their average, too, and the momentum is forgotten.

    Training is the same when a constant is added to the loss, or when it is multiplied by one, ε aside.  It is used in
    the loop that you have: ``zero_grad()``, ``backward()``, ``step()``.

    Along a direction that has no usual rate, such as the gradient, the first rates of the groups are measured: the
    summary of the loss along u is computed on a batch of ``curvature_data``, and the rates are solved for, from exact
    second and third derivatives (:class:`~newton_summary.optim.rates.AveragedRates`); so they all are with
    ``compare_every=0``, and every so often with ``every=``.

    Beside what the direction remembers, a moving average of the weights is kept, which they are compared with and which
    is evaluated (:meth:`eval`), and a copy of it as it was at the last comparison.

    With several processes each measures on its own samples, and all take the same step (docs/distributed.md).

    Args:
        model: the module to train, or what ``DistributedDataParallel`` or ``torch.compile`` made of it.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        curvature_data: batches to measure on, iterated for ever by an independent sampler (see
            :class:`~newton_summary.measure.stream.BatchStream`): a ``DataLoader`` over the training set, or a list of
            batches. Without it, call :meth:`measure`, whose rates hold until the next one.
        partition: the groups, or the name of a constructor, such as ``"trivial"``, one rate for everything.  Default:
            one for each tensor; where the direction is that of several optimizers, one for each of these; where rates
            are only measured, one for all.  docs/research.md has what rates of their own are worth to groups.
        direction: ``"soap"``, ``"nadam"``, ``"adam"``, ``"momentum"``, ``"gradient"``, a ``torch.optim.Optimizer``
            over the same parameters whose own step it is, a list of several, such as Muon for matrices and AdamW for
            the rest, or a :class:`~newton_summary.optim.directions.Direction`.  Default: SOAP's, as far as it is cheap;
            without ``curvature_data`` NAdam's.
        lr: λ_1, dimensionless: a scale on all rates, for every ``lr_scheduler`` to work on.
        steps: the length of the training, if known: over its last quarter, λ_1 goes to 0.
        every: the number of steps between measurements.  Default: none once there are rates; 100 where there are no
            comparisons.
        compare_every: the number of steps between comparisons.  Default: 20; the first ones are closer.  With 0 there
            are none: rates are those that were measured, and λ_1 is ``lr``.
        regularization: λ_int, the weight of the cubic term.
        shrinkage: ρ, how strongly rates are drawn to the target (:func:`~newton_summary.solve.shrink`).
        target: ``"shared"``, one rate for all groups; or ``"invariant"``, which keeps training the same when groups are
            rescaled.
        averaging: the share of the past in the averages of the measurements, in the long run.
        engine: what measures: a name, or an :class:`~newton_summary.measure.Engine`.
        seed: fixes the sampler of ``curvature_data``.
        process_group: the processes whose measurements are averaged.  Default: those of the
            ``DistributedDataParallel`` module, or else of the default group, where one was initialised.
        look_every: the old name of ``compare_every``.

    Attributes:
        partition: the groups.
        summary: the last measurement, or ``None``.
        counts: how many measurements there were (``"measured"``), how many failed and left the rates as they were
            (``"failed"``), how many comparisons there were (``"compared"``), and how often rates were halved because
            the loss did not follow its model (``"halved"``).
        status: how the last solve ended.

    Raises:
        ValueError: an argument is out of range, the data is empty, one-shot or a single batch, the partition is of
            another model, parameters are on several devices, or the direction's optimizer holds other parameters.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> data = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(4)]
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean()
        >>> optimizer = NewtonSummary(model, loss_fn, curvature_data=data)
        >>> for batch in data:
        ...     optimizer.zero_grad()
        ...     loss_fn(model, batch).backward()
        ...     optimizer.step()
        >>> sorted(optimizer.rates)
        ['bias', 'weight']
    """

    rule: AveragedRates

    paper = PaperNewtonSummary
    """Makes an optimizer that follows Algorithm 1 of arXiv:2312.03885 to the letter."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        curvature_data: Iterable[Any] | None = None,
        partition: Partition | str | None = None,
        direction: str | OneOrSeveral | Direction | None = None,
        lr: float = 1.0,
        steps: int | None = None,
        every: int | None = None,
        compare_every: int | None = None,
        regularization: float = 1.0,
        shrinkage: float = 0.1,
        target: str = "shared",
        averaging: float = 0.9,
        engine: str | Engine = "auto",
        seed: int = 0,
        process_group: Any = None,
        look_every: int | None = None,
    ) -> None:
        if look_every is not None:
            warn("look_every is now compare_every", DeprecationWarning)
            compare_every = look_every
        if compare_every:
            check_count("compare_every", compare_every)
        if steps is not None:
            check_count("steps", steps)
        check_not_negative("lr", lr)
        _warn_of_small(lr)
        members = members_of(together(direction)) if are_optimizers(direction) else ()
        compares = curvature_data is not None and compare_every != 0
        own = Partition.canonical if compares else Partition.trivial
        groups = resolve_partition(partition, model, one_for_each(members, own))
        groups.check_is_of(model)
        options = {"engine": engine, "seed": seed, "process_group": process_group}
        samples = Samples(model, loss_fn, groups, curvature_data, **options)
        rule = AveragedRates(regularization, shrinkage, target, averaging, groups.precision)
        by_count = direction is None and compares
        if direction is None:
            direction = "soap" if by_count else "nadam"
        super().__init__(samples, rule, direction, lr=lr, every=every)
        self.steps = steps
        self.counts.update({"compared": 0, "halved": 0})
        self._clipping = GradientClipping()
        self._clipped = False  # whether the gradients of the step to come are
        self._sides = None
        if by_count and isinstance(self.direction, SOAP):
            self._sides = SidesByCount(self.direction, groups.parameters)
        every_steps = _COMPARED_EVERY if compare_every is None else int(compare_every)
        self._comparison = AverageComparison(samples, every_steps, self._sides) if compares else None
        usual = usual_rate(self.direction) if compares and target == "shared" else None
        self._relative = RelativeRates(
            None if usual is None else torch.full((len(groups),), usual, dtype=torch.float64)
        )
        self._publish_rates()

    # Rates ------------------------------------------------------------------------------------------------------------

    @property
    def factor(self) -> float:
        """What λ_1 is multiplied by in the next step: the schedule, where ``steps`` is known."""
        return 1.0 if self.steps is None else min(1.0, max(0.0, 4 - 4 * self._taken / self.steps))

    @property
    def compare_every(self) -> int:
        """The number of steps between comparisons; 0: there are none."""
        return 0 if self._comparison is None else self._comparison.cadence.every

    @property
    def look_every(self) -> int:
        """The old name of :attr:`compare_every`."""
        warn("look_every is now compare_every", DeprecationWarning)
        return self.compare_every

    @property
    def _eta(self) -> Tensor | None:
        """η: the rates as they were measured, or the relative rates at the scale that comparisons have found."""
        if self._comparison is None:
            return self.rule.rates
        if self._relative.value is None:
            return None
        return self._relative.value * torch.tensor(self._comparison.adaptation.scales, dtype=torch.float64)

    @property
    def _has_rates(self) -> bool:
        return (self.rule.rates if self._comparison is None else self._relative.value) is not None

    # One step ---------------------------------------------------------------------------------------------------------

    def _check_ready(self) -> None:
        if self._comparison is None:
            return
        self._comparison.average.check_kind(self.state)
        if self._comparison.average.is_in_place:
            raise RuntimeError("the model has averaged weights: call the optimizer's train() before its next step()")
        if self._comparison.is_evaluating:
            self._comparison.is_evaluating = False
            warn(
                "the optimizer's eval() was called, and not its train(): this time the weights were left as they were; "
                "once their average is better and takes their place, the next step() will be refused"
            )

    def _descend(self) -> None:
        if self._taken == 0 and self.defaults["lr"] >= _SMALL:  # what a schedule has made of it since
            _warn_of_small(max(self._scales(warm=True)))
        if self._taken == self.steps:
            warn(
                f"the {self.steps} steps of steps= were taken, and the rates have come down to 0: the run is over, and "
                "further steps move nothing; to train for longer, make the optimizer with a larger steps="
            )
        super()._descend()
        if self._comparison is not None:
            self._comparison.follow(self.state, self._taken + 1)

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the moving average of the weights in their place, if comparisons have found the loss lower there.

        For validation, and for a model that is kept; call :meth:`train` before the next step.  Training is the same
        whether this is ever called.  Running statistics of batch norms are averaged as the weights are, and go along.
        """
        if self._comparison is not None:
            self._comparison.show_average(self.state)

    @torch.no_grad()
    def train(self) -> None:
        """Puts the weights back that :meth:`eval` has taken out."""
        if self._comparison is not None:
            self._comparison.hide_average(self.state)

    def _prepare_gradients(self) -> None:
        """Shortens the gradients of this step where they are too long, once; by far too long, they may be a leap's."""
        if not self._clipped:
            is_broken = self._clipping.apply(self.partition.parameters, self._samples.processes.total)
            if is_broken and self._comparison is not None:
                self._comparison.cadence.hasten(self._taken)
        self._clipped = True

    def _forget_gradients(self) -> None:
        super()._forget_gradients()
        self._clipped = False

    def _is_time_to_measure(self) -> bool:
        """Whether the step to come is one that measures; before there are rates, every fifth does, at least."""
        if not self._has_rates:
            return self._taken % min(self.every or _WAITING, _WAITING) == 0
        every = self.every or (_MEASURED_EVERY if self._comparison is None else None)
        return every is not None and self._taken % every == 0

    def _take_in(self, batch: Any, partition: Partition, along: Sequence[Tensor]) -> Summary:
        """Measures, and takes the relative rates from it; before there are any, backtracks."""
        summary = super()._take_in(batch, partition, along)
        if self.status is Status.SOLVED and self._relative.value is None:
            self._backtrack(summary, batch, partition, along)
        if self._comparison is not None and self.status is Status.SOLVED:
            self._relative.follow(self.rule)
        return summary

    def _backtrack(self, summary: Summary, batch: Any, partition: Partition, along: Sequence[Tensor]) -> None:
        """Halves the rates until the loss follows its model where a warm-up leads: any do at its tiny steps."""
        scales, precision = self._scales_of_groups(warm=True), self.partition.precision
        loss_after = partial(self._samples.loss_after, batch=batch, partition=partition, along=along)
        self.counts["halved"] += backtrack(self.rule, scales, summary, loss_after, precision)

    def _adapt(self) -> None:
        """Compares, where it is time to; where that fails, in the user's code, it is still to be done.

        After the last of the steps that were told, weights stand still, and comparisons would only let scales grow.
        """
        if self._comparison is None or self._taken < self._comparison.cadence.due or not self.factor:
            return
        before = self._comparison.cadence.state_dict()
        try:
            self._compare(self._comparison)
        except BaseException:
            self._comparison.cadence.load_state_dict(before)
            raise
        self._publish_rates()

    def _compare(self, comparison: AverageComparison) -> None:
        """Compares, and finds where the rates begin before the first step."""
        begins = comparison.cadence.due == 0
        goes_back = comparison.run(self.state, self._taken)
        self.counts["compared"] += 1
        if goes_back:
            forget(self.direction, self.partition.parameters, self.state)
        if begins and self._relative.value is not None:
            comparison.begin(self._current_direction(), self._relative.value)

    def _current_direction(self) -> dict[Tensor, Tensor]:
        """The direction of this step; the sides of its factors are chosen before it is first computed."""
        if self._pending is None:
            self._adapt()
        return super()._current_direction()

    # State ------------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; raises as :meth:`MeasuredOptimizer.load_state_dict` does."""
        super().load_state_dict(state_dict)
        if self._comparison is not None:
            numbers, parameters = (
                chain.from_iterable(group["params"] for group in groups)
                for groups in (state_dict["param_groups"], self.param_groups)
            )
            saved = {p: state_dict["state"].get(n, {}) for n, p in zip(numbers, parameters, strict=True)}
            self._comparison.average.restore_digits(self.state, saved)

    def _parts(self) -> dict[str, Part | None]:
        """What remembers something, by name."""
        own: dict[str, Part | None] = {"clipping": self._clipping, "relative": self._relative}
        return {**super()._parts(), **own, "comparison": self._comparison, "sides": self._sides}


def _warn_of_small(lr: float) -> None:
    """Warns where λ_1 is so small that it is taken for a learning rate."""
    if 0 < lr < _SMALL:
        warn(
            f"lr={lr:g} makes every step {1 / lr:.0f} times shorter than what is measured: it is a scale without "
            "units, usually 1, and not a learning rate as Adam has it; leave it out, and let a schedule go up to 1"
        )
