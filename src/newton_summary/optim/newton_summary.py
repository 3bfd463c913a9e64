"""The optimizer: learning rates for groups of parameters, measured, and a pace (docs/method.md, section 2)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary._checks import check_count, check_not_negative
from newton_summary.measure import Engine, Loss, LossFunction, resolve_engine
from newton_summary.measure.batches import batch_size
from newton_summary.measure.loss import preserved_randomness
from newton_summary.measure.stream import BatchStream
from newton_summary.optim import directions
from newton_summary.optim.cadence import COMPARED, LOOKS, MEASUREMENTS, LookTimes, Price, affordable_period
from newton_summary.optim.clipping import GradientGuard
from newton_summary.optim.directions import Direction
from newton_summary.optim.line_search import Pace, share_of_average
from newton_summary.optim.parameter_update import Descent, by_parameter
from newton_summary.optim.rates import AveragedRates, PaperRates, RateRule
from newton_summary.parallel.processes import Processes
from newton_summary.parallel.sharding import measurable, unsharded
from newton_summary.partition import Partition, default_partition, resolve_partition
from newton_summary.solve import Status
from newton_summary.summary import Summary

logger = logging.getLogger(__name__)

_KEY = "newton_summary"
_MOST_HALVINGS = 40


class NewtonSummary(torch.optim.Optimizer):
    """Steps θ ← θ − λ_1 η_s u for every group s, with rates η that are measured.

    Now and then the summary of the loss along the direction u is measured on a batch of ``curvature_data``, and the
    rates are solved for, from exact second and third derivatives
    (:class:`~newton_summary.optim.rates.AveragedRates`): it tells the length of the first step, and how the rates of
    groups compare.  Every few steps a look at the loss along the step tells how long it may be now
    (:class:`~newton_summary.optim.line_search.Pace`).  There is nothing to tune.  It is used in the loop that you
    have: ``zero_grad()``, ``backward()``, ``step()``.  A gradient that is far longer than usual is shortened, one that
    is not finite counts as zero (:class:`~newton_summary.optim.clipping.GradientGuard`).

    Beside what the direction remembers, a copy of the weights is kept: their moving average.

    With several processes each measures on its own samples, and all take the same step (docs/distributed.md).

    Args:
        model: the module to train, or what ``DistributedDataParallel`` or ``torch.compile`` made of it.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        curvature_data: batches to measure on, iterated for ever by an independent sampler (see
            :class:`~newton_summary.measure.stream.BatchStream`): a ``DataLoader`` over the training set, or a list of
            batches. Without it, call :meth:`measure`, whose rates hold until the next one.
        partition: the groups, or the name of a constructor, such as ``"canonical"``.  Default: all parameters in one.
            docs/research.md has what rates of their own are worth to groups.
        direction: ``"nadam"``, ``"adam"``, ``"momentum"``, ``"gradient"``, a ``torch.optim.Optimizer`` over the same
            parameters whose own step it is, or a :class:`~newton_summary.optim.directions.Direction`.
        lr: λ_1, dimensionless: a scale on all rates, for every ``lr_scheduler`` to work on.  At 2 a step is as long as
            the quadratic model lets it be without going uphill, at 1 it is the best step of that model.  Between 2/3
            and 1.4 of it are used, by what the looks tell.
        steps: the length of the training, if known: over its last quarter, λ_1 goes to 0.
        every: the number of steps between measurements.  Default: from 20 to 200, as many as keep the time that they
            take small (:mod:`~newton_summary.optim.cadence`); with one group, only the first step measures.
        look_every: the number of steps between looks.  Default: from 5 to 20, in the same way, and a quarter of that in
            the first hundred steps.  The first ones, and those after a gradient that is far too long, are closer.
            With 0 there are none: rates are those that were measured, and λ_1 is ``lr``.
        regularization: λ_int, the weight of the cubic term.
        shrinkage: ρ, how strongly rates are drawn to the target (:func:`~newton_summary.solve.shrink`).
        target: ``"shared"``, one rate for all groups; or ``"invariant"``, which keeps training the same when groups are
            rescaled.
        averaging: the share of the past in the averages of the measurements, in the long run.
        engine: what measures: a name, or an :class:`~newton_summary.measure.Engine`.
        seed: fixes the sampler of ``curvature_data``.
        process_group: the processes whose measurements are averaged.  Default: those of the
            ``DistributedDataParallel`` module, or else of the default group, where one was initialised.

    Attributes:
        partition: the groups.
        summary: the last measurement, or ``None``.
        counts: how many measurements there were (``"measured"``), how many failed and left the rates as they were
            (``"failed"``), how many looks there were (``"looked"``), and how often rates were halved because the loss
            did not follow its model (``"halved"``).
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
        ['all']
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        curvature_data: Iterable[Any] | None = None,
        partition: Partition | str | None = None,
        direction: str | torch.optim.Optimizer | Direction = "nadam",
        lr: float = 1.5,
        steps: int | None = None,
        every: int | None = None,
        look_every: int | None = None,
        regularization: float = 1.0,
        shrinkage: float = 0.1,
        target: str = "shared",
        averaging: float = 0.9,
        engine: str | Engine = "auto",
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        partition = resolve_partition(partition, model, Partition.trivial)
        rule = AveragedRates(regularization, shrinkage, target, averaging, partition.precision)
        self._processes = Processes(model, process_group)
        periods = (every, look_every)
        self._set_up(model, loss_fn, curvature_data, partition, direction, lr, steps, periods, rule, engine, seed)

    @classmethod
    def paper(
        cls,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        curvature_data: Iterable[Any] | None = None,
        partition: Partition | str | None = None,
        lr: float = 0.3,
        regularization: float = 1.0,
        every: int = 10,
        momentum: float = 0.9,
        rate_momentum: float = 0.5,
        direction: str | torch.optim.Optimizer | Direction | None = None,
        engine: str | Engine = "auto",
        seed: int = 0,
        process_group: Any = None,
    ) -> NewtonSummary:
        """Algorithm 1 of arXiv:2312.03885, to the letter (docs/method.md, section 2).

        Its last line, reducing λ_1 on a plateau of the training loss, is torch's own
        ``ReduceLROnPlateau(optimizer, factor=0.5, patience=2)``, stepped every few epochs.

        It has no guard against groups on which the loss does not depend, such as a bias before a batch norm: their
        rates are ratios of roundings.  Freeze them.

        Args:
            model: the module to train.
            loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
            curvature_data: the second, independent sampler's data.
            partition: the groups.  Default: one for each tensor, coarser above 100 tensors.
            lr: λ_1, to be searched (the authors: 0.03 to 1).
            regularization: λ_int, to be searched (the authors: 1, 3, 10).
            every: p_H.
            momentum: μ_g, of the gradients; 1 − 1/p_H is recommended.
            rate_momentum: μ_η, of the rates.
            direction: something else than the averaged gradient.
            engine: what measures.
            seed: fixes the second sampler.
            process_group: the processes whose measurements are averaged.
        """
        optimizer = cls.__new__(cls)
        partition = resolve_partition(partition, model, default_partition)
        chosen = directions.Momentum(momentum) if direction is None else direction
        rule = PaperRates(regularization, rate_momentum)
        optimizer._processes = Processes(model, process_group)
        periods = (every, 0)
        optimizer._set_up(model, loss_fn, curvature_data, partition, chosen, lr, None, periods, rule, engine, seed)
        return optimizer

    def _set_up(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        curvature_data: Iterable[Any] | None,
        partition: Partition,
        direction: str | torch.optim.Optimizer | Direction,
        lr: float,
        steps: int | None,
        periods: tuple[int | None, int | None],
        rule: RateRule,
        engine: str | Engine,
        seed: int,
    ) -> None:
        check_not_negative("lr", lr)
        self.every, look_every = periods
        if self.every is not None:
            check_count("every", self.every)
        if look_every:
            check_count("look_every", look_every)
        if steps is not None:
            check_count("steps", steps)
        self.partition = partition
        self.partition.check_is_of(model)
        self.direction = directions.resolve(direction)
        self.steps = steps
        self.rule = rule
        self.engine = resolve_engine(engine)
        self.summary: Summary | None = None
        self.status: Status | None = None
        self.counts = Counter({"measured": 0, "failed": 0, "looked": 0, "halved": 0})
        self._loss = Loss(loss_fn, model)
        among = self._processes
        self._stream = None if curvature_data is None else BatchStream(curvature_data, seed, among.rank, among.count)
        self._taken = 0
        self._pending: dict[Tensor, Tensor] | None = None
        self._guard = GradientGuard() if rule.fidelity else None
        self._held = False  # whether the guard has seen the gradients of the step to come
        self._descent = Descent(self.partition, self.direction)
        self._proportions: Tensor | None = None
        self._looks = LookTimes(look_every, settles=look_every is None)
        self._pace = None if self._stream is None or look_every == 0 else Pace()
        self._averaged = False  # whether the model has the average, and the state its weights
        _check_same_parameters(self.direction, self.partition)
        super().__init__(self.partition.param_groups(), {"lr": lr, "rate": None, **self.direction.defaults})

    # The public face --------------------------------------------------------------------------------------------------

    @property
    def rates(self) -> dict[str, float]:
        """The current learning rate of each group, in the units of the direction's own optimizer, λ_1 left out.

        Empty before the first measurement.
        """
        rates = self._rates
        if rates is None:
            return {}
        units = [0.0] * len(self.partition)
        for parameter, groups in zip(self.partition.parameters, self.partition.groups_of, strict=True):
            for group in groups:
                units[group] = units[group] or self.direction.unit(parameter)
        return {n: r * u for n, r, u in zip(self.partition.names, rates.tolist(), units, strict=True)}

    @property
    def look_every(self) -> int | None:
        """The number of steps between looks; ``None`` before their price was counted."""
        return self._looks.every

    @property
    def _rates(self) -> Tensor | None:
        """η, shape (S,), in units of the direction: those of the measurements, at the present pace."""
        if self._pace is None:
            return self.rule.rates
        return None if self._proportions is None else self._proportions * self._pace.scale

    @property
    def _has_rates(self) -> bool:
        return (self.rule.rates if self._pace is None else self._proportions) is not None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step, and measures first where it is time to.

        Args:
            closure: computes the loss and calls ``backward()``, as for any torch optimizer.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: nothing was measured yet, and there is no ``curvature_data`` to measure on; or :meth:`eval`
                was called, and not :meth:`train`.
        """
        if self._averaged:
            raise RuntimeError("the model has averaged weights: call the optimizer's train() before its step()")
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if all(p.grad is None for p in self.partition.parameters):
            return value
        self._hold_gradients()
        if self._stream is not None and self._is_time_to_measure():
            self._measure(self._stream.next(self.partition.device), self._current_direction())
        if self._is_time_to_look():
            self._look(self._current_direction())
        if self.status is None:
            raise RuntimeError(
                "no rates yet: pass curvature_data, or call measure(batch) between backward() and the first step()"
            )
        self._descend()
        self._pending, self._held = None, False
        self._taken += 1
        return value

    @torch.no_grad()
    def measure(self, batch: Any) -> Summary:
        """Measures on a batch of your choice and solves for new rates, along the direction of the step to come.

        Call it between ``backward()`` and ``step()``; the rates hold until the next measurement.  Gradients must be as
        they will be used: summed over all micro-batches, averaged over processes, unscaled, clipped.  Where they are
        not finite, the measurement fails and the direction forgets them: a step may be skipped.

        Args:
            batch: with several processes, this one's part of the samples; every process must measure.

        Returns:
            The measurement, of all processes' samples.

        Raises:
            RuntimeError: there are no gradients.
        """
        if all(p.grad is None for p in self.partition.parameters):
            raise RuntimeError("no gradients to take a direction from: call backward() before measure()")
        gradients = directions.Gradient().update(self.param_groups, self.state)
        total = torch.stack([unsharded(g.sum(dtype=torch.float64)) for g in gradients.values()]).sum()
        return self._measure(batch, self._current_direction() if math.isfinite(float(total)) else gradients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and the direction that was computed of them if no step was taken."""
        self._pending, self._held = None, False
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the moving average of the weights in their place, if looks have found the loss to be lower there.

        For validation, and for a model that is kept; call :meth:`train` before the next step.  Training is the same
        whether this is ever called.  Buffers, such as the statistics of a batch norm, stay as they are.
        """
        if not self._averaged and self._pace is not None and self._pace.boldness.advantage > 0:
            self._exchange()

    @torch.no_grad()
    def train(self) -> None:
        """Puts the weights back that :meth:`eval` has taken out."""
        if self._averaged:
            self._exchange()

    def _exchange(self) -> None:
        self._averaged = not self._averaged
        for parameter, average in zip(self.partition.parameters, self._averaged_weights(), strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on exactly: torch's state, rates, averages, counters, the sampler's position."""
        own = {
            "kinds": self._kinds(),
            "taken": self._taken,
            "every": self.every,
            "looks": asdict(self._looks),
            "averaged": self._averaged,
            "guard": None if self._guard is None else self._guard.state_dict(),
            "counts": dict(self.counts),
            "status": None if self.status is None else self.status.name,
            "summary": None if self.summary is None else self.summary.to_dict(),
            "rule": self.rule.state_dict(),
            "proportions": None if self._proportions is None else self._proportions.tolist(),
            "pace": None if self._pace is None else self._pace.state_dict(),
            "direction": self.direction.state_dict(),
            "stream": None if self._stream is None else self._stream.state_dict(),
        }
        return {**super().state_dict(), _KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: the state is of another optimizer, of other groups, or of another rule or direction.
        """
        if _KEY not in state_dict:
            raise ValueError("the state is not that of a NewtonSummary optimizer")
        saved = [group.get("name") for group in state_dict["param_groups"]]
        if saved != [group["name"] for group in self.param_groups]:
            raise ValueError(f"the state is of other groups, {saved}: make the optimizer with the same partition")
        own = state_dict[_KEY]
        if own["kinds"] != self._kinds():
            raise ValueError(
                f"the state is of an optimizer made of {', '.join(own['kinds'])}, this one is made of "
                f"{', '.join(self._kinds())}: make it as it was made"
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != _KEY})
        self._taken, self.every, self._averaged = own["taken"], own["every"], own["averaged"]
        self._looks = LookTimes(**own["looks"])
        if self._guard is not None:
            self._guard.load_state_dict(own["guard"])
        self.counts = Counter(own["counts"])
        self.status = None if own["status"] is None else Status[own["status"]]
        self.summary = None if own["summary"] is None else Summary.from_dict(own["summary"])
        self.rule.load_state_dict(own["rule"])
        self._proportions = (
            None if own["proportions"] is None else torch.tensor(own["proportions"], dtype=torch.float64)
        )
        if self._pace is not None and own["pace"] is not None:
            self._pace.load_state_dict(own["pace"])
        self.direction.load_state_dict(own["direction"])
        if self._stream is not None and own["stream"] is not None:
            self._stream.load_state_dict(own["stream"])
        self._pending, self._held = None, False
        self._publish_rates()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses: groups come from the partition.

        Raises:
            RuntimeError: always, once the optimizer is made.
        """
        if len(self.param_groups) == len(self.partition.param_groups()):
            raise RuntimeError("groups come from the partition: make a new optimizer with one that has the parameters")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """All attributes, where torch keeps three: copies of this optimizer go on as it does."""
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # schedulers patch `step`

    def _kinds(self) -> list[str]:
        """What the parts of the state belong to."""
        inner = [self.direction.optimizer] if isinstance(self.direction, directions.StepOf) else []
        return [type(part).__name__ for part in (self.rule, self.direction, *inner)]

    # One step ---------------------------------------------------------------------------------------------------------

    def _current_direction(self) -> dict[Tensor, Tensor]:
        """The direction of this step, computed once for a measurement and the step after it."""
        if self._pending is None:
            self._hold_gradients()
            self._pending = self.direction.update(self.param_groups, self.state)
        return self._pending

    def _hold_gradients(self) -> None:
        """Shortens the gradients of this step where they are too long, once."""
        if self._guard is not None and not self._held:
            self._guard.apply(self.partition.parameters, self._processes.total)
        self._held = True

    def _is_alarmed(self) -> bool:
        """Whether a gradient was too long, as far as it was asked: at once where that costs nothing."""
        assert self._guard is not None
        alone = self._processes.count == 1
        if not (alone and self._guard.is_on_host) and self._taken % LOOKS.first != 0:
            return False
        alarm = self._guard.take_alarm()
        return alarm if alone else self._of_all(float(alarm)) > 0

    def _is_time_to_measure(self) -> bool:
        """Whether the step to come is one that measures; before there are rates, every fifth does, at least."""
        if not self._has_rates and self.rule.fidelity:
            return self._taken % min(self.every or LOOKS.first, LOOKS.first) == 0
        if self.every is not None:
            return self._taken % self.every == 0
        needed = self._pace is None or len(self.partition) > 1  # a single proportion stays what it is
        return needed and self._taken % MEASUREMENTS.first == 0

    def _is_time_to_look(self) -> bool:
        """Whether the step to come is one that looks; there must be rates."""
        if self._pace is None or self._proportions is None:
            return False
        return self._looks.is_due(self._taken, self._is_alarmed())

    def _measure(self, batch: Any, u: dict[Tensor, Tensor]) -> Summary:
        """Measures on all processes' batches together, in full precision whatever the training uses."""
        counting = self.every is None and self._stream is not None and self._has_rates
        with self._exactly(u) as (partition, along):
            with Price() if counting else contextlib.nullcontext() as price:
                part = self.engine.measure(self._loss, batch, partition, along, 3, "diagonal")
                self.summary = summary = self._processes.average([part], along)[0]
                self.status = self.rule.update(summary)
                self.counts["measured"] += 1
                if self.status is not Status.SOLVED:
                    self.counts["failed"] += 1
                    logger.info("measurement at step %d failed: %s", self._taken, self.status.value)
                elif self.rule.fidelity and self._proportions is None:  # else looks do it
                    self._hold_to_the_loss(summary, batch, partition, along)
            if price is not None:
                with Price() as evaluation:
                    self._loss.after_step(batch, partition, along, [0.0] * len(partition))
                self.every = round(self._of_all(affordable_period(price, evaluation, MEASUREMENTS)))
        if self._pace is not None and self.status is Status.SOLVED:
            self._take_proportions()
        self._publish_rates()
        return summary

    def _take_proportions(self) -> None:
        """Takes the proportions of the rates from those just measured, and leaves their size to the pace.

        The old and the new ones have the same curvature in the measured averages.
        """
        assert isinstance(self.rule, AveragedRates)
        rates, mean = self.rule.rates, self.rule.average.value
        if rates is None or mean is None or mean.hessian is None or not bool(torch.any(rates > 0)):
            return
        if self._proportions is None:
            self._proportions = rates
            return
        before, now = (float(eta @ mean.hessian @ eta) for eta in (self._proportions, rates))
        if before > 0 and now > 0:
            self._proportions = rates * math.sqrt(before / now)

    def _look(self, u: dict[Tensor, Tensor]) -> None:
        """Looks at the loss along the step to come, and sends the weights back to their average if it has exploded."""
        assert self._stream is not None
        average, gap = self._averaged_weights(), self._looks.gap(self._taken)
        counting = self.look_every is None
        with preserved_randomness(self._loss.devices) as rewind:
            batch = self._stream.next(self.partition.device, rewind)
            with self._exactly(u) as (partition, along), Price() if counting else contextlib.nullcontext() as price:
                now, returns = self._look_along(batch, partition, along, rewind)
                if counting:
                    with Price() as evaluation:  # which counts with the look, for what comparisons take
                        self._loss.after_step(batch, partition, along, [0.0] * len(partition))
        if returns:
            logger.info("the loss has exploded to %g at step %d: back to averaged weights", now, self._taken)
            torch._foreach_copy_([p.detach() for p in self.partition.parameters], average)
            self._looks.began = self._taken
        elif math.isfinite(now):
            torch._foreach_lerp_(average, list(self.partition.parameters), share_of_average(gap))
        self.counts["looked"] += 1
        if price is not None:
            self._looks.every = round(self._of_all(affordable_period(price, evaluation, LOOKS)))
        self._publish_rates()

    def _look_along(
        self, batch: Any, partition: Partition, along: Sequence[Tensor], rewind: Callable[[], None]
    ) -> tuple[float, bool]:
        """Shows the pace the loss along the step, and now and then at averaged weights.

        It gives the loss at the weights, and whether these should go back to their average.
        """
        assert self._pace is not None
        assert self._proportions is not None
        samples, gap = batch_size(batch), self._looks.gap(self._taken)
        steps = [v * f for v, f in zip(along, partition.spread(self._proportions.tolist()), strict=True)]
        with self._loss.movable(batch, partition, rewind) as (weights, loss):
            reached = 0.0

            def loss_after(size: float) -> float:
                nonlocal reached
                if size < reached:  # back to the start: a step that was far too long would leave its rounding
                    torch._foreach_copy_(weights, list(partition.parameters))
                    reached = 0.0
                if size > reached:
                    torch._foreach_sub_(weights, steps, alpha=size - reached)
                reached = size
                return self._of_all(loss(), samples)

            now = self._pace.look(loss_after, gap)
            suspicious = self._pace.may_have_exploded(now)
            if not suspicious and self.counts["looked"] % COMPARED != COMPARED - 1:
                return now, False
            torch._foreach_copy_(weights, [unsharded(a) for a in self._averaged_weights()])
            there = self._of_all(loss(), samples)
        if suspicious:
            return now, self._pace.retreats(there, now)
        self._pace.boldness.compare(there, now, COMPARED * gap)
        return now, False

    def _averaged_weights(self) -> list[Tensor]:
        """A moving average of the weights, in the optimizer's state."""
        for p in self.partition.parameters:
            if "average" not in self.state[p]:
                self.state[p]["average"] = p.detach().clone(memory_format=torch.preserve_format)
        return [self.state[p]["average"] for p in self.partition.parameters]

    @contextlib.contextmanager
    def _exactly(self, u: dict[Tensor, Tensor]) -> Iterator[tuple[Partition, Sequence[Tensor]]]:
        """A block with whole parameters, where they are sharded, in full precision, whatever the training uses.

        It gives the partition over them, and the direction, 0 where u has none.
        """
        direction = [u[p] if p in u else torch.zeros_like(p) for p in self.partition.parameters]
        with measurable(self._loss.model, self.partition, direction) as whole:
            yield whole

    def _of_all(self, number: float, samples: int = 1) -> float:
        """The mean of a number over all processes, by the samples of each."""
        return self._processes.mean([number], [samples], self.partition.device)[0]

    def _hold_to_the_loss(self, summary: Summary, batch: Any, partition: Partition, along: Sequence[Tensor]) -> None:
        """Halves the rates until the loss follows its quadratic model along the step, on the batch it was measured on.

        Both sides see the same samples, so that their noise cancels.  Rounding of the loss is no disagreement.  Where
        no length of step makes them agree, the loss is noise at this scale (half precision, or a randomness of its
        own), which says nothing of the rates: they stay as they were solved.
        """
        assert summary.hessian is not None
        assert self.rule.rates is not None
        rounding = 8 * self.partition.precision * abs(summary.loss.item())
        eta = self.rule.rates * self._scales_of_groups()
        for halvings in range(_MOST_HALVINGS):
            linear = -float(summary.gradient @ eta)
            quadratic = 0.5 * float(eta @ summary.hessian @ eta)
            actual = self._loss_after(eta, batch, partition, along) - summary.loss.item()
            if abs(actual - (linear + quadratic)) <= 0.5 * (abs(linear) + abs(quadratic)) + rounding:
                self.rule.scale(0.5**halvings)
                self.counts["halved"] += halvings
                return
            eta = eta / 2
        logger.info("the loss at step %d follows its model at no length of step: it is noise", self._taken)

    def _loss_after(self, eta: Tensor, batch: Any, partition: Partition, along: Sequence[Tensor]) -> float:
        """The loss on all processes' batches after a step of this length."""
        return self._of_all(self._loss.after_step(batch, partition, along, eta.tolist()), batch_size(batch))

    def _descend(self) -> None:
        """Steps; where nothing was measured along u, without a tensor for it."""
        if not self._has_rates:
            self._current_direction()  # which remembers this gradient
            return
        scales = self._scales_of_param_groups()
        if self._pending is None and self._descent.is_direct:
            self._descent.directly(self.param_groups, self.state, scales)
        else:
            self._descent.along(self._current_direction(), self.param_groups, scales)

    def _scales_of_param_groups(self) -> list[float]:
        """λ_1 for each of torch's groups: its ``lr``, times the boldness, and the schedule where there is one."""
        schedule = 1.0 if self.steps is None else min(1.0, max(0.0, 4 - 4 * self._taken / self.steps))
        factor = schedule if self._pace is None else schedule * self._pace.boldness.value
        return [float(group["lr"]) * factor for group in self.param_groups]

    def _scales_of_groups(self) -> Tensor:
        """λ_1 for each group of the partition, shape (S,); that of its first tensor."""
        scale = by_parameter(self.param_groups, self._scales_of_param_groups())
        scales = [scale[self.partition.parameters[tensors[0]]] for tensors in self.partition.tensors_of]
        return torch.tensor(scales, dtype=torch.float64)

    def _publish_rates(self) -> None:
        """Shows the rates in ``param_groups``, where loggers look."""
        rates = self._rates
        if rates is None:
            return
        self._descent.set_rates(rates)
        by_name = dict(zip(self.partition.names, rates.tolist(), strict=True))
        for group in self.param_groups:
            group["rate"] = by_name.get(group["name"])


def _check_same_parameters(direction: Direction, partition: Partition) -> None:
    """Raises where another optimizer's step is the direction, but not of the same parameters."""
    if not isinstance(direction, directions.StepOf):
        return
    held = {id(p) for group in direction.optimizer.param_groups for p in group["params"]}
    for name, parameter in zip(partition.parameter_names, partition.parameters, strict=True):
        if id(parameter) not in held:
            raise ValueError(
                f"the direction's optimizer does not hold parameter {name!r}, of shape {tuple(parameter.shape)}: "
                "give both the same parameters, or freeze it"
            )
