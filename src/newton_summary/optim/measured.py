"""The trunk of both optimizers: steps along a direction, with rates that a rule takes from measurements."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary._checks import check_count, check_not_negative
from newton_summary._frozen import Frozen
from newton_summary._uncompiled import uncompiled
from newton_summary.measure.together import OneOrSeveral
from newton_summary.optim import directions
from newton_summary.optim.directions import Direction
from newton_summary.optim.held_gradients import HeldGradients
from newton_summary.optim.parameter_update import ParameterUpdate, by_parameter
from newton_summary.optim.rates import RateRule
from newton_summary.optim.samples import Samples
from newton_summary.optim.state import (
    KEY,
    Part,
    check_fits,
    check_groups,
    check_parts,
    check_place,
    check_shapes,
    packed,
    unpack,
)
from newton_summary.optim.unlabelled import is_profiled, unlabelled
from newton_summary.parallel.sharding import place_of, unsharded
from newton_summary.partition import Partition
from newton_summary.solve import Status
from newton_summary.summary import Summary

logger = logging.getLogger(__name__)

_LOOK_FOR_NEW = 10  # every so many steps, parameters that the model has got since are looked for


class MeasuredOptimizer(torch.optim.Optimizer):
    """Steps θ ← θ − λ_1 η_s u for every group s, with rates η from a rule.

    Now and then the summary of the loss along the direction u is measured, and the rule takes rates from it.  What
    :class:`~newton_summary.NewtonSummary` and :class:`~newton_summary.optim.paper.PaperNewtonSummary` share.

    Args:
        samples: what is measured on.
        rule: what turns measurements into rates.
        direction: a name, a ``torch.optim.Optimizer``, several, or a
            :class:`~newton_summary.optim.directions.Direction`.
        lr: λ_1.
        every: the number of steps between measurements; ``None`` where a subclass decides.

    Attributes:
        partition: the groups.
        summary: the last measurement, or ``None``.
        counts: how many measurements there were (``"measured"``), and how many failed and left the rates as they were
            (``"failed"``).
        status: how the last solve ended.
    """

    def __init__(
        self,
        samples: Samples,
        rule: RateRule,
        direction: str | OneOrSeveral | Direction,
        *,
        lr: float,
        every: int | None,
    ) -> None:
        check_not_negative("lr", lr)
        if every is not None:
            check_count("every", every)
        self.partition = samples.partition
        self.direction = directions.resolve(direction)
        self.rule = rule
        self.every = None if every is None else int(every)  # numpy's numbers are none that torch loads
        self.summary: Summary | None = None
        self.status: Status | None = None
        self.counts = Counter({"measured": 0, "failed": 0})
        self._samples = samples
        self._update = ParameterUpdate(self.partition, self.direction)
        self._taken = 0
        self._pending: dict[Tensor, Tensor] | None = None  # the direction of the step to come
        self._held: HeldGradients | None = None  # what measure() has made it of
        self._frozen = Frozen(samples.loss.model, "trained by this optimizer")
        _check_same_parameters(self.direction, self.partition, samples.loss.model)
        lr = lr if isinstance(lr, Tensor) else float(lr)
        super().__init__(self.partition.param_groups(), {"lr": lr, "rate": None, **self.direction.defaults})

    # Rates ------------------------------------------------------------------------------------------------------------

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each group that the next step is taken with, in the units of the direction's optimizer.

        It is a product: λ_1, the group's ``lr``, times :attr:`factor`, times the group's entry of
        :attr:`measured_rates`.  Empty before the first measurement.  Where the next step begins with a measurement or
        a comparison, that may change it yet.  Where the direction's optimizer has several learning rates within a
        group, all are multiplied alike, and this is that of the group's first tensor.
        """
        scales = self._scales_of_groups().tolist()
        return {name: scale * rate for scale, (name, rate) in zip(scales, self.measured_rates.items(), strict=False)}

    @property
    def measured_rates(self) -> dict[str, float]:
        """The rate η_s of each group, in the same units, λ_1 and all that acts on it left out."""
        eta = self._eta
        if eta is None:
            return {}
        units = [0.0] * len(self.partition)
        for parameter, groups in zip(self.partition.parameters, self.partition.groups_of, strict=True):
            for group in groups:
                units[group] = units[group] or self.direction.unit(parameter)
        return {n: r * u for n, r, u in zip(self.partition.names, eta.tolist(), units, strict=True)}

    @property
    def factor(self) -> float:
        """What λ_1 is multiplied by in the next step."""
        return 1.0

    @property
    def _eta(self) -> Tensor | None:
        """η, shape (S,), in units of the direction."""
        return self.rule.rates

    @property
    def _has_rates(self) -> bool:
        return self.rule.rates is not None

    def _scales(self, *, warm: bool = False) -> list[float]:
        """λ_1 times :attr:`factor`, for each of torch's groups; ``warm``: as a scheduler's warm-up will make it."""
        factor = self.factor
        rates = [float(g["lr"]) for g in self.param_groups]
        if warm:  # as torch's schedulers note it, or else, where λ_1 is 0 as yet, as this optimizer was made
            ahead = [max(float(g.get(key, 0.0)) for key in ("initial_lr", "max_lr")) for g in self.param_groups]
            rates = [max(now, later) or self.defaults["lr"] for now, later in zip(rates, ahead, strict=True)]
        return [rate * factor for rate in rates]

    def _scales_of_groups(self, *, warm: bool = False) -> Tensor:
        """The same for each group of the partition, shape (S,); that of its first tensor."""
        scale = by_parameter(self.param_groups, self._scales(warm=warm))
        scales = [scale[self.partition.parameters[tensors[0]]] for tensors in self.partition.tensors_of]
        return torch.tensor(scales, dtype=torch.float64)

    def _publish_rates(self) -> None:
        """Shows the rates in ``param_groups``, where loggers look."""
        eta = self._eta
        if eta is None:
            return
        self._update.set_rates(eta)
        by_name = dict(zip(self.partition.names, eta.tolist(), strict=True))
        for group in self.param_groups:
            group["rate"] = by_name.get(group["name"])

    # One step ---------------------------------------------------------------------------------------------------------

    @unlabelled
    @uncompiled
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
        self._check_ready()
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        look = self._frozen.warn if self._taken % _LOOK_FOR_NEW else self._frozen.warn_of_new
        look()
        self._forget_stale_gradients()
        if any(p.grad is not None for p in self.partition.parameters):
            with self._in_full_precision():
                self._take_step()
        return value

    def _take_step(self) -> None:
        """A step by the gradients that are there."""
        self._prepare_gradients()
        self._adapt()
        if self._samples.stream is not None and self._is_time_to_measure():
            self._measure(self._samples.next(), self._current_direction())
        if self.status is None and not self._has_rates:
            raise RuntimeError(
                "no rates yet: pass curvature_data, or call measure(batch) between backward() and the first step()"
            )
        self._descend()
        self._forget_gradients()
        self._taken += 1

    def _in_full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """A block for products of matrices as precise as they are, where the training is stepped under autocast."""
        kind = self.partition.parameters[0].device.type
        if not torch.is_autocast_enabled(kind):
            return contextlib.nullcontext()
        return torch.autocast(kind, enabled=False)

    @uncompiled
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
            RuntimeError: there are no gradients; or :meth:`eval` was called, and not :meth:`train`.
        """
        self._check_ready()
        if all(p.grad is None for p in self.partition.parameters):
            raise RuntimeError("no gradients to take a direction from: call backward() before measure()")
        self._forget_stale_gradients()
        gradients = directions.Gradient().update(self.param_groups, self.state)
        total = torch.stack([unsharded(g.abs().sum(dtype=torch.float64)) for g in gradients.values()]).sum()
        with self._in_full_precision():
            summary = self._measure(batch, self._current_direction() if math.isfinite(float(total)) else gradients)
        self._held = HeldGradients(self.partition.parameters)
        return summary

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and the direction that was computed of them if no step was taken."""
        self._forget_gradients()
        if is_profiled() or not set_to_none:
            super().zero_grad(set_to_none)
            return
        for p in self.partition.parameters:  # torch's way takes five times as long
            p.grad = None

    def eval(self) -> None:
        """Puts better weights for validation in place, where an optimizer has some; this one has none."""

    def train(self) -> None:
        """Puts the weights back that :meth:`eval` has taken out."""

    def _check_ready(self) -> None:
        """Raises where no step can be taken now, and nothing measured for one."""

    def _is_time_to_measure(self) -> bool:
        """Whether the step to come is one that measures."""
        return self.every is not None and self._taken % self.every == 0

    def _prepare_gradients(self) -> None:
        """Changes the gradients of the step to come, before anything is made of them."""

    def _adapt(self) -> None:
        """Adapts what the step is taken with, before a measurement."""

    def _current_direction(self) -> dict[Tensor, Tensor]:
        """The direction of this step, computed once for a measurement and the step after it."""
        if self._pending is None:
            self._prepare_gradients()
            self._pending = self.direction.update(self.param_groups, self.state)
        return self._pending

    def _forget_gradients(self) -> None:
        """The next step has gradients of its own."""
        self._pending = self._held = None

    def _forget_stale_gradients(self) -> None:
        """Forgets what :meth:`measure` has made of gradients that are gone: a step was skipped."""
        if self._held is not None and not self._held.are_those_of(self.partition.parameters):
            self._forget_gradients()

    def _measure(self, batch: Any, u: dict[Tensor, Tensor]) -> Summary:
        """Measures, and publishes the rates that come of it."""
        with self._samples.along(u) as (partition, along):
            summary = self._take_in(batch, partition, along)
        self._publish_rates()
        return summary

    def _take_in(self, batch: Any, partition: Partition, along: Sequence[Tensor]) -> Summary:
        """Measures in the block to measure in, and gives the rule what was found."""
        self.summary = summary = self._samples.summary(batch, partition, along)
        self.status = self.rule.update(summary)
        self.counts["measured"] += 1
        if self.status is not Status.SOLVED:
            self.counts["failed"] += 1
            logger.info("measurement at step %d failed: %s", self._taken, self.status.value)
        return summary

    def _descend(self) -> None:
        """Steps; where nothing was measured along u, without a tensor for it."""
        if not self._has_rates:
            self._current_direction()  # which remembers this gradient
            return
        scales = self._scales()
        if self._pending is None and self._update.is_direct:
            self._update.directly(self.param_groups, self.state, scales)
        else:
            self._update.along(self._current_direction(), self.param_groups, scales)

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on exactly: torch's state, rates, averages, counters, the sampler's position."""
        own = {
            "kinds": self._kinds(),
            "shapes": [list(p.shape) for p in self.partition.parameters],
            "place": place_of(self.partition.parameters),
            "taken": self._taken,
            "every": self.every,
            "counts": dict(self.counts),
            "status": None if self.status is None else self.status.name,
            "summary": None if self.summary is None else self.summary.to_dict(),
            "parts": packed(self._parts()),
        }
        return {**super().state_dict(), KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            ValueError: the state is of another optimizer or model, of other groups, or of another rule or direction.
        """
        check_fits(state_dict, self._kinds())
        own = state_dict[KEY]
        named = zip(self.partition.parameter_names, self.partition.parameters, strict=True)
        check_shapes(own.get("shapes", ()), dict(named))
        check_place(own.get("place"), place_of(self.partition.parameters))
        check_parts(self._parts(), own["parts"])
        check_groups(state_dict, [group["name"] for group in self.param_groups])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        self._taken, self.every, self.counts = own["taken"], own["every"], Counter(own["counts"])
        self.status = None if own["status"] is None else Status[own["status"]]
        self.summary = None if own["summary"] is None else Summary.from_dict(own["summary"])
        unpack(self._parts(), own["parts"])
        self._forget_gradients()
        self._publish_rates()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses: groups come from the partition.

        Raises:
            RuntimeError: always, once the optimizer is made.
        """
        if len(self.param_groups) == len(self.partition.param_groups()):
            raise RuntimeError(
                "groups come from the partition of the model: make a new optimizer once the model has these parameters"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """All attributes, where torch keeps three: copies of this optimizer go on as it does."""
        own = {key: value for key, value in self.__dict__.items() if key != "step"}  # schedulers patch `step`
        return {**own, "_held": None}

    def _parts(self) -> dict[str, Part | None]:
        """What remembers something, by name."""
        return {"rule": self.rule, "direction": self.direction, "stream": self._samples.stream}

    def _kinds(self) -> list[str]:
        """What the parts of the state belong to."""
        inner = self.direction.optimizers if isinstance(self.direction, directions.StepOf) else ()
        return [type(part).__name__ for part in (self.rule, self.direction, *inner)]


def _check_same_parameters(direction: Direction, partition: Partition, model: nn.Module) -> None:
    """Raises where another optimizer's step is the direction, but not of the same parameters."""
    if not isinstance(direction, directions.StepOf):
        return
    in_model = {id(p) for p in model.parameters()}
    held = {id(p): p for group in direction.param_groups for p in group["params"]}
    for number, parameter in held.items():
        if number not in in_model:
            raise ValueError(
                f"the direction's optimizer holds a parameter of shape {tuple(parameter.shape)} that is not the "
                "model's, and would not move: make it a part of the model, or give it an optimizer of its own"
            )
    for name, parameter in zip(partition.parameter_names, partition.parameters, strict=True):
        if id(parameter) not in held:
            raise ValueError(
                f"the direction's optimizer does not hold parameter {name!r}, of shape {tuple(parameter.shape)}: "
                "give both the same parameters, pass a list with another optimizer for it, or freeze it"
            )
