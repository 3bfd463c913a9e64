"""A monitor beside any optimizer: which groups' learning rates are off, and by how much.  It changes nothing."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from newton_summary._checks import check_count, check_fraction, check_not_negative, check_positive
from newton_summary._frozen import Frozen
from newton_summary._uncompiled import uncompiled
from newton_summary._warned import warn
from newton_summary.measure import Engine, Loss, LossFunction, preserved_randomness, resolve_engine
from newton_summary.measure.batches import batch_size
from newton_summary.measure.next_step import check_needs_no_closure, check_runs_hooks, next_step, rate_of
from newton_summary.measure.price import Price
from newton_summary.measure.slices import RandomSamples
from newton_summary.measure.stream import BatchStream
from newton_summary.measure.together import OneOrSeveral, members_of, together
from newton_summary.optim import MeasuredOptimizer
from newton_summary.optim.held_gradients import HeldGradients
from newton_summary.parallel.processes import Processes
from newton_summary.parallel.sharding import measurable
from newton_summary.partition import Partition, one_for_each, resolve_partition
from newton_summary.summary import Summary
from newton_summary.watch.advice import Advice, advise
from newton_summary.watch.cadence import Affordable, Cadence, Fixed
from newton_summary.watch.closures import after_closure
from newton_summary.watch.measured import Counts, Measured, Randomness, record_of
from newton_summary.watch.output import Output, Writer, check_path, check_writer, frame_of
from newton_summary.watch.progress import Progress
from newton_summary.watch.record import Record
from newton_summary.watch.rehearsed_advice import RehearsedAdvice, rehearse
from newton_summary.watch.step_taken import StepTaken, compared

logger = logging.getLogger(__name__)

_PATIENCE = 3  # failures in a row: one may be a batch's, or that of a moment without memory
_ANOTHER_STEP = "another step"  # than was measured, which is warned of


class Monitor:
    """Measures along an optimizer's own next step, and says by what factor each group's learning rate should change.

    In a loop that you have, call :meth:`step` between ``backward()`` and ``optimizer.step()``; or call :meth:`attach`
    once and change nothing.  Training with a monitor is the same, bit for bit, as without: parameters, gradients,
    buffers, the optimizer's state and all random states stay as they are (docs/monitor.md).

    Advice is made of the last ``window`` batches that were measured (:func:`~newton_summary.watch.advice.advise`): each
    batch along the step of its own time, in units of the learning rates of now.  A batch that the gradient was
    computed on is too optimistic about descent along that gradient: measure on batches of an independent sampler where
    batches are small and the gradient is mostly noise.  :meth:`attach` does.  Where the loss is no lower than at the
    first measurement, beyond what batches differ by, it says so, and never that the rates are right.

    A monitor ends no training: where :meth:`step`, or a measurement within ``optimizer.step()``, fails, it warns and
    tries again when it is next time to; after three failures in a row it measures no more.  :meth:`measure` raises.
    Where a record cannot be written, it warns once, and ``records`` has it.

    :meth:`state_dict` goes into the training's checkpoint, so that a resumed training is watched as if it had not
    stopped: steps are counted on, and advice is made of what was measured before, too.

    By default it measures as often, and on as many samples of a batch, as a ``share`` of the training's time pays for
    (:class:`~newton_summary.watch.cadence.Affordable`).  With ``every`` nothing depends on time, and advice repeats.

    With several processes each measures on its own samples, all get the same advice, and the first one writes
    (docs/distributed.md).

    Args:
        model: the module that is trained, or what ``DistributedDataParallel`` or ``torch.compile`` made of it.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar, the mean over the batch.
        optimizer: any ``torch.optim.Optimizer`` whose ``step()`` needs no closure; or several, such as Muon for
            matrices and AdamW for the rest, over different parameters.  A step is then one of each.
        partition: the groups, or the name of a constructor.  Default: one for each tensor, coarser above 100 tensors;
            with several optimizers, one for each of them.
        every: the number of steps between measurements.  Default: what the share pays for, a hundred or more.
        samples: how many samples of each batch are measured, drawn at random.  Default: all with ``every``, else as
            many as the share pays for, at least eight; a batch whose loss is not the mean over its samples, because
            of batch normalisation or of padding, is then measured whole, and more rarely.
        share: of the training's time, for measuring; without meaning where ``every`` is given.
        writer: takes scalars by ``add_scalar(tag, value, step)``, and words by ``add_text`` where it has that.
        path: a file to which every record is appended, one JSON object a line, with the correlations of the groups'
            steps; ``newton-summary report`` makes a page of it.  Folders above it are made.
        window: how many batches the advice is made of.
        history: how many records are kept.
        level: the confidence of the advice's intervals.
        regularization: λ_int, the weight of the cubic term.
        engine: what measures: a name, or an :class:`~newton_summary.measure.Engine`.
        memory: the bytes that a measurement may take, as in :func:`~newton_summary.summarize`.
        process_group: the processes whose measurements are averaged.  Default: those of the
            ``DistributedDataParallel`` module, or else of the default group, where one was initialised.

    Attributes:
        optimizer: what is watched; of several, one that stands for all of them.
        optimizers: the optimizers.
        advice: the last advice, or ``None``.
        summary: the last measurement, the mean over its batches, or ``None``.
        records: the history, oldest first.
        counts: how many measurements there were (``"measured"``), and how many were not finite and left the advice as
            it was (``"failed"``); how many raised an error (``"errors"``); ``"disabled"`` is 1 where three in a row
            did, and none followed.

    Raises:
        ValueError: an argument is out of range, the partition is of another model, the optimizer holds no parameter of
            the model, has no learning rate, or evaluates the loss in its step; ``path`` is a folder, or cannot be
            written.
        TypeError: the optimizer is a :class:`~newton_summary.NewtonSummary`, which measures by itself, or of a class
            that runs no hooks; the writer takes no scalars.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean()
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> monitor = Monitor(model, loss_fn, optimizer=optimizer, every=10)
        >>> for _ in range(30):
        ...     batch = torch.randn(16, 4), torch.randn(16, 1)
        ...     optimizer.zero_grad()
        ...     loss_fn(model, batch).backward()
        ...     _ = monitor.step(batch)
        ...     optimizer.step()
        >>> monitor.advice.batches, len(monitor.records)
        (3, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        optimizer: OneOrSeveral,
        partition: Partition | str | None = None,
        every: int | None = None,
        samples: int | None = None,
        share: float = 0.05,
        writer: Writer | None = None,
        path: str | Path | None = None,
        window: int = 20,
        history: int = 1000,
        level: float = 0.9,
        regularization: float = 1.0,
        engine: str | Engine = "auto",
        memory: float | None = None,
        process_group: Any = None,
    ) -> None:
        counts = {"every": every, "samples": samples, "window": window, "history": history}
        for what, value in counts.items():
            if value is not None:
                check_count(what, value)
        for what, part in (("share", share), ("level", level)):
            check_fraction(what, part)
            check_positive(what, part)
        check_not_negative("regularization", regularization)
        window, history = int(window), int(history)  # numpy's whole numbers are none to a deque, nor in a checkpoint
        every, samples = (None if count is None else int(count) for count in (every, samples))
        check_writer(writer)
        self.optimizer = together(optimizer)
        self.optimizers = members_of(self.optimizer)
        for member in self.optimizers:
            if isinstance(member, MeasuredOptimizer):
                raise TypeError("NewtonSummary measures by itself: read optimizer.summary and optimizer.rates")
            check_runs_hooks(member)
        check_needs_no_closure(self.optimizer)
        self.partition = resolve_partition(partition, model, one_for_each(self.optimizers))
        self.partition.check_is_of(model)
        self.every, self.level, self.regularization = every, float(level), float(regularization)
        self.cadence: Cadence = (
            Affordable(float(share), samples, self.partition.device) if every is None else Fixed(every, samples)
        )
        self.writer, self.path = writer, None if path is None else Path(path)
        self._output = Output()
        self.engine = resolve_engine(engine, memory)
        self.advice: Advice | None = None
        self.summary: Summary | None = None
        self.records: deque[Record] = deque(maxlen=history)
        self.counts = Counter({"measured": 0, "failed": 0})
        self._errors = 0  # in a row
        self._told: set[str] = set()  # what was warned of
        self._unheard = 0  # measurements since the last step, but the first
        self._not_finite = 0  # measurements in a row
        self._loss = Loss(loss_fn, model)
        self._frozen = Frozen(self._loss.model, "measured by this Monitor")
        self._processes = Processes(model, process_group)
        if self._processes.rank == 0:
            check_path(self.path)
        self._counts_samples = every is None or samples is not None
        self._samples = RandomSamples(self._loss, self._processes.rank)
        self._window: deque[tuple[Summary, Tensor]] = deque(maxlen=window)
        self._progress = Progress(window)
        self._stream: BatchStream | None = None
        self._stream_state: dict[str, int] | None = None  # where a resumed one goes on, until it is attached
        self._resumed_at: int | None = None  # until that is written
        self._taken = 0
        self._stepped: set[int] = set()  # which of several optimizers have stepped in this round
        self._bare: set[int] = set()  # which had no gradients when it was measured within the first one's step
        self._awaiting: Measured | None = None
        self._used = HeldGradients(())  # by a step that was taken
        self._repeats = 1
        self._batches: Callable[[], list[Any]] | None = None  # what is measured on within steps
        self._hooks: list[RemovableHandle] = []
        self._attached: list[RemovableHandle] = []
        self._listen()
        if all(math.isnan(rate) for rate in self._learning_rates().tolist()):
            raise ValueError("the optimizer holds no parameter of this model: make it from model.parameters()")

    # Measuring --------------------------------------------------------------------------------------------------------

    @uncompiled
    def step(self, batch: Any) -> Advice | None:
        """Call it at every step, between ``backward()`` and ``optimizer.step()``; it measures where it is time to.

        With a gradient scaler, unscale the gradients first, and clip them first, if they are clipped: where the step
        that is then taken is another than was measured, by a factor of three, it warns once.

        Args:
            batch: what to measure on, if it is time to.

        Returns:
            New advice where it was measured, else ``None``.  Where there are no gradients nothing is: it says so once.
            Nor is a step measured in which all learning rates are 0, as in the first of many a warm-up.
        """
        if self._stepped:  # and the others of several optimizers did not step
            self._end_of_step()
        if not self._is_due():
            return None
        if not _has_gradients(self.optimizer):
            self._warn_of_no_gradients()
            return None
        if not self.counts["measured"] and self._used.have_all_of(self._all_held()):
            self._warn_once(
                "used gradients",
                f"the Monitor measures along gradients that step {self._taken} has used already: call monitor.step() "
                "between backward() and optimizer.step()",
            )
        if self._awaiting is not None and not self._hears_of_steps():
            return None
        return self._attempt(lambda: [batch])

    def attach(self, batches: Iterable[Any], *, repeats: int = 1, seed: int = 0) -> Monitor:
        """From now on, measures by itself within ``optimizer.step()``, just before the step is taken.

        Attached once more, it measures on the new batches alone.

        Gradients are then what the optimizer will use: clipped and unscaled, and of ``optimizer.step(closure)`` those
        that the closure computes.  It measures before the first of several optimizers steps; with a gradient scaler,
        unscale the gradients of all of them before.

        Args:
            batches: what to measure on, iterated for ever by an independent sampler
                (:class:`~newton_summary.measure.stream.BatchStream`): a ``DataLoader`` or a list of batches.
            repeats: how many batches a measurement takes.
            seed: fixes the sampler.

        Returns:
            The monitor.

        Raises:
            ValueError: the data is empty or one-shot, or the number of repeats is not positive.
            TypeError: it is no iterable.
        """
        check_count("repeats", repeats)
        stream = BatchStream(batches, seed, self._processes.rank, self._processes.count, "batches")
        if self._stream_state is not None:
            stream.load_state_dict(self._stream_state)
            self._stream_state = None
        self._stream, self._repeats = stream, repeats
        self._measure_within_steps(self._of_stream)
        return self

    def _of_stream(self) -> list[Any]:
        """The next batches of what it is attached to."""
        assert self._stream is not None
        return [self._stream.next(self.partition.device) for _ in range(self._repeats)]

    def _listen(self) -> None:
        """Hears of the optimizers' steps from now on."""
        self._hooks = [member.register_step_pre_hook(self._before_step) for member in self.optimizers]
        self._hooks += [member.register_step_post_hook(self._after_step) for member in self.optimizers]

    def _measure_within_steps(self, batches: Callable[[], list[Any]]) -> None:
        """From now on, measures within the optimizers' steps, as soon as the gradients are there."""

        def measure() -> None:
            if _has_gradients(self.optimizer):
                self._bare = {id(member) for member in self.optimizers if not _has_gradients(member)}
                self._attempt(batches)

        @uncompiled
        def before_step(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            return after_closure(args, kwargs, measure) if not self._stepped and self._is_due() else None

        self._batches = batches
        for hook in self._attached:
            hook.remove()
        self._attached = [member.register_step_pre_hook(before_step) for member in self.optimizers]

    def close(self) -> None:
        """Takes the monitor's hooks off the optimizer and writes what is not yet written.

        From then on :meth:`step` does nothing; :meth:`measure` still measures.
        """
        for hook in (*self._hooks, *self._attached):
            hook.remove()
        self._hooks.clear()
        self._attached.clear()
        self._write_last()

    def _is_due(self) -> bool:
        is_watching = bool(self._hooks) and not self.counts["disabled"]  # closed, it does not hear of steps
        return is_watching and self.cadence.is_due(self._taken) and self._moves()

    def _moves(self) -> bool:
        """Whether some learning rate is not 0, as all are in the first step of a warm-up, which so says nothing."""
        return any(bool(group.get("lr", 1.0) != 0) for group in self.optimizer.param_groups)

    def _all_held(self) -> list[Tensor]:
        """What the optimizers hold, be it of this model or not."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _warn_of_no_gradients(self) -> None:
        self._warn_once(
            "no gradients",
            f"the Monitor measured nothing before step {self._taken + 1}, for there are no gradients: call "
            "backward() before monitor.step()",
        )

    def _warn_once(self, of: str, message: str) -> None:
        if of not in self._told:
            self._told.add(of)
            warn(message)

    def _hears_of_steps(self) -> bool:
        """Whether some optimizer may step yet: not where it has measured several times since the last one did."""
        self._unheard += 1
        if self._unheard == _PATIENCE:
            names = " or ".join(dict.fromkeys(type(member).__name__ for member in self.optimizers))
            self._warn_once(
                "silence",
                f"the Monitor has measured {_PATIENCE} times since a step of {names}: call monitor.step() once for "
                "each step, after the last backward() where gradients are accumulated, and give the Monitor the "
                "optimizer that takes the steps",
            )
        return self._unheard < _PATIENCE

    def _attempt(self, batches: Callable[[], list[Any]]) -> Advice | None:
        """Measures; what fails is a measurement, in all processes, and not the training."""
        error: Exception | None = None
        measured: Measured | None = None
        with self.cadence.spending():
            try:
                measured = self._measured(batches(), self._counts_samples)
            except Exception as raised:
                error = raised
            if self._fails_anywhere(error is not None) or measured is None:
                self._fail(error)
                return None
            self.cadence.has_measured(self._taken, measured.counts.samples / len(measured.batches))
            try:
                return self._take_in(measured)
            except Exception as raised:  # alike in all processes: they know the same of all
                self._fail(raised)
                return None

    def _taken_of(self, batches: Sequence[Any]) -> tuple[list[Any], list[int]]:
        """As many samples of each batch as the cadence takes, and their numbers."""
        some = []
        for batch in batches:
            size = batch_size(batch)
            try:
                count = self.cadence.samples_of(size, lambda: self._count(batches[0]))
                some.append(self._samples.of(batch, count))
            except Exception:
                if not self.cadence.takes_whole():
                    raise
                some.append((batch, size))
        return [batch for batch, _ in some], [count for _, count in some]

    def _count(self, batch: Any) -> Price:
        """Counts the operations of one evaluation of the loss."""
        price = Price()
        with self._loss.undisturbed(), price:
            self._loss.value(batch)
        return price

    def _fails_anywhere(self, fails: bool) -> bool:
        """Whether this process failed, or another one: all must go on in the same way."""
        return self._mean_of([float(fails)])[0] > 0

    def _mean_of(self, numbers: Sequence[float]) -> list[float]:
        """Means over all processes."""
        return self._processes.mean(numbers, [1.0] * len(numbers), self.partition.device)

    def _fail(self, error: Exception | None) -> None:
        """Says what failed, where nothing did before, and measures no more after some failures in a row."""
        self._awaiting = None
        self._errors += 1
        self.counts["errors"] += 1
        self.cadence.has_measured(self._taken, 0.0)
        if self._errors == _PATIENCE:
            self.counts["disabled"] = 1
        if self._errors == 1:
            cause = "in another process" if error is None else f"{type(error).__name__}: {error}"
            warn(
                f"a measurement of the Monitor before step {self._taken + 1} failed, training goes on; after "
                f"{_PATIENCE} failures in a row it measures no more; this one was {cause}"
            )

    @uncompiled
    @torch.no_grad()
    def measure(self, batches: Iterable[Any]) -> Advice | None:
        """Measures now, after ``backward()``, on batches of your choice, whatever ``every`` says.

        Returns:
            New advice; ``None`` where the measurement was not finite, or all learning rates are 0.

        Raises:
            ValueError: there are no gradients, or no batches.
        """
        if not self._moves():
            return None
        return self._take_in(self._measured(list(batches)))

    def rehearse(
        self,
        batches: Iterable[Any],
        *,
        steps: int = 40,
        seed: int = 0,
        before_step: Callable[[], Any] | None = None,
    ) -> RehearsedAdvice:
        """Factors on the learning rates that were tried out, so that they hold when they are acted on.

        The model is trained by a shadow of the optimizer, from where it stands and on the same batches every time, with
        all rates × 3 and ÷ 3, and so with the two groups that promise most.  A change is accepted where both the
        training loss and the loss at averaged weights are lower than without it, one of them by 1.8 standard errors,
        and where a larger rate leaves room for a still larger one; then changes are tried on top of it.  What was found
        must be better once more, on other batches and for twice as long.  Otherwise the advice is to leave the rates as
        they are.

        Call it between two steps of the training.  It takes the time of some 12 × ``steps`` steps where nothing
        is changed, and of 45 × and more where something is (results/monitor.md).  Afterwards everything is as it was.

        Args:
            batches: training batches: a ``DataLoader`` or a list.  They are read over and over where they are few, and
                it warns where they are no more than steps: trials are then judged on what they were trained on.
            steps: the length of each trial, at least 8; advice holds for some times that.
            seed: fixes the order of the batches.
            before_step: what your loop does between ``backward()`` and ``optimizer.step()``, such as clipping
                gradients.

        Raises:
            ValueError: there are no batches, or one; a tensor is split between groups; no learning rate is above 0;
                trials are too short; several processes train together.

        Example:
            >>> model = nn.Linear(4, 1)
            >>> batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(12, 16, 4)]
            >>> def loss_fn(model, batch):
            ...     return (model(batch[0]) - batch[1]).square().mean()
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
            >>> advice = Monitor(model, loss_fn, optimizer=optimizer, partition="trivial").rehearse(batches, steps=10)
            >>> advice.apply(optimizer)
            >>> optimizer.param_groups[0]["lr"] > 1e-3
            True
        """
        if self._processes.count > 1:
            raise ValueError(
                f"rehearse() trains in one process, and this is one of {self._processes.count}: rehearse in a plain "
                "script, from a checkpoint"
            )
        self._frozen.warn_of_new()
        return rehearse(
            self._loss, self.optimizer, self.partition, batches, steps=steps, seed=seed, before_step=before_step
        )

    @torch.no_grad()
    def _measured(self, batches: Sequence[Any], cuts: bool = False) -> Measured:
        """Measures on this process's batches, or on some samples of each."""
        self._frozen.warn_of_new()
        device = self.partition.device
        randomness = Randomness(device, self._loss.generator_rewind())
        if not batches:
            raise ValueError("there are no batches to measure on")
        u = next_step(self.optimizer, self.partition.parameters)
        with preserved_randomness({device}), measurable(self._loss.model, self.partition, u) as (partition, along):
            available = [batch_size(batch) for batch in batches]
            taken, sizes = self._taken_of(batches) if cuts else (batches, available)
            own = [
                replace(self.engine.measure(self._loss, batch, partition, along, 3, "diagonal"), weight=float(size))
                for batch, size in zip(taken, sizes, strict=True)
            ]
        counts = Counts(sum(sizes), sum(available)) if self._counts_samples else Counts()
        step = StepTaken(self.optimizers, self.partition.parameters, u)
        return Measured(own, u, taken, randomness, counts, step)

    @torch.no_grad()
    def _take_in(self, measured: Measured) -> Advice | None:
        """Advice from what all processes have measured."""
        self._write_last()
        parts = self._processes.average(measured.own, measured.along)
        self.summary = mean = Summary.mean(parts)
        self.counts["measured"] += 1
        if not mean.is_finite():
            self.counts["failed"] += 1
            self._not_finite += 1
            logger.info(
                "measurement before step %d is not finite: look for it in the data or the rates", self._taken + 1
            )
            return None
        self._not_finite = 0
        rates = self._learning_rates()
        self._take_into_window(parts, rates)
        self._progress.add(mean.loss.item(), self._taken)
        self.advice = self._advice_at(rates)
        self._progress.hear(self.advice.overall, self._taken)
        self.records.append(record_of(self._taken, mean, rates, self.advice, self._in_all(measured.counts)))
        self._awaiting = measured
        return self.advice

    def _take_into_window(self, parts: Sequence[Summary], rates: Tensor) -> None:
        """Adds summaries, and leaves out those of steps in which a group stood still that moves now.

        They know nothing of its factor, and would pass for batches on which it changes nothing.
        """
        moving = torch.nan_to_num(rates)
        moving[self._frozen_groups()] = 0.0
        stood_still = [bool(((moving != 0) & (then == 0)).any()) for _, then in self._window]
        kept = [entry for entry, still in zip(self._window, stood_still, strict=True) if not still]
        self._window.clear()
        self._window.extend([*kept, *((part, moving) for part in parts)])

    def _advice_at(self, rates: Tensor) -> Advice:
        """Advice from all that the window holds."""
        return advise(
            self._in_todays_units(rates),
            regularization=self.regularization,
            level=self.level,
            stalled=self._progress.words(),
        )

    def _in_all(self, counts: Counts) -> Counts:
        """The numbers of samples in all processes."""
        means = self._mean_of([float(counts.samples), float(counts.available)])
        return Counts(*(round(self._processes.count * mean) for mean in means))

    def _in_todays_units(self, rates: Tensor) -> list[Summary]:
        """The window's summaries along steps as long as they would be at the present learning rates."""
        factors = [torch.nan_to_num(rates / then, nan=1.0, posinf=1.0, neginf=1.0) for _, then in self._window]
        frozen = self._frozen_groups()
        for factor in factors:
            factor[frozen] = 0.0  # what they were before they were frozen is no matter any more
        return [
            part if bool((factor == 1).all()) else part.scale(factor)
            for (part, _), factor in zip(self._window, factors, strict=True)
        ]

    def _frozen_groups(self) -> list[int]:
        """The groups none of whose tensors takes gradients now."""
        parameters = self.partition.parameters
        return [
            s
            for s, tensors in enumerate(self.partition.tensors_of)
            if not any(parameters[i].requires_grad for i in tensors)
        ]

    def _learning_rates(self) -> Tensor:
        """The optimizer's learning rate for each group of the partition, that of its first tensor; shape (S,)."""
        by_parameter = {id(p): rate_of(group) for group in self.optimizer.param_groups for p in group["params"]}
        rates = [
            next((by_parameter[id(p)] for p in members if id(p) in by_parameter), math.nan)
            for members in ([self.partition.parameters[i] for i in tensors] for tensors in self.partition.tensors_of)
        ]
        return torch.tensor(rates, dtype=torch.float64)

    @property
    def is_waiting(self) -> bool:
        """Whether the last record's step is still to be taken, by some of the optimizers at least."""
        return self._awaiting is not None

    @uncompiled
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Where one of several optimizers steps again before the others have stepped, they do not step this time."""
        if id(optimizer) in self._stepped:
            self._end_of_step()

    @uncompiled
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._stepped.add(id(optimizer))
        if id(optimizer) in self._bare and _has_gradients(optimizer):
            self._warn_once(
                "gradients to come",
                f"{type(optimizer).__name__} had no gradients yet when another optimizer stepped, so the Monitor "
                "measured its tensors as if they stood still: let all optimizers step after backward(), not within it",
            )
        if not self.counts["measured"]:  # what is known of the first measurement holds for a loop
            self._used = HeldGradients(self._all_held())
        if len(self._stepped) == len(self.optimizers):
            self._end_of_step()

    def _end_of_step(self) -> None:
        """Counts the step."""
        self._taken += 1
        self._unheard = 0
        if self._not_finite >= _PATIENCE:  # one may be a batch's, or of a step that a gradient scaler skips
            self._warn_once(
                "not finite",
                f"the Monitor's last {_PATIENCE} measurements, up to that before step {self._taken}, were not finite: "
                "look for it in the data, or lower the learning rates; its advice knows nothing of them",
            )
        self._stepped.clear()
        self._bare.clear()
        if self._awaiting is not None:
            with self.cadence.spending():
                self._look_back(self._awaiting)
        if not self.counts["disabled"]:
            self.cadence.end_of_step(self._taken, self._mean_of)

    @torch.no_grad()
    def _look_back(self, waiting: Measured) -> None:
        """What the loss did on the batches that the last measurement was made on."""
        self._awaiting = None
        others: Sequence[tuple[int, float]] = ()
        weights, losses, error = [part.weight for part in waiting.own], [], None
        try:
            if _ANOTHER_STEP not in self._told:
                others = waiting.step.others()
            for batch in waiting.batches:
                with measurable(self._loss.model, self.partition, []), self._loss.undisturbed():
                    waiting.randomness.restore()
                    losses.append(self._loss.value(batch))
        except Exception as raised:
            error = raised
        if self._fails_anywhere(error is not None):
            self._fail(error)
            return
        self._errors = 0
        self._warn_of_another_step(others)
        total = sum(weights)
        own = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / total
        after = self._processes.mean([own], [total], self.partition.device)[0]
        self.records[-1] = replace(self.records[-1], actual_decrease=self.records[-1].loss - after)
        self._write(self.records[-1])

    def _warn_of_another_step(self, others: Sequence[tuple[int, float]]) -> None:
        """Says, once, which optimizer has not taken the step that was measured, if one has not."""
        for number, ratio in others[:1]:
            which = f"{type(self.optimizers[number]).__name__}{f' {number + 1}' * (len(self.optimizers) > 1)}"
            self._warn_once(
                _ANOTHER_STEP,
                f"step {self._taken} of {which} was {compared(ratio)} the one that the Monitor measured, so its advice "
                "is about another: gradients, rates or weights were changed after it had measured. With a gradient "
                "scaler, call scaler.unscale_(optimizer) for every optimizer before it measures, which is in "
                "monitor.step(), or attached when the first of them steps; clip, set rates and, with SAM, put weights "
                "back before that, too",
            )

    # Resuming ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training's monitor goes on from, fit for a checkpoint: plain values and a few tensors.

        Take it between two steps, as that of the optimizer.
        """
        return {
            "groups": list(self.partition.names),
            "taken": self._taken,
            "counts": dict(self.counts),
            "cadence": self.cadence.state_dict(),
            "samples": self._samples.state_dict(),
            "stream": self._stream_state if self._stream is None else self._stream.state_dict(),
            "progress": self._progress.state_dict(),
            "window": [(part.to_dict(), rates) for part, rates in self._window],
            "summary": None if self.summary is None else self.summary.to_dict(),
            "records": [record.to_dict() for record in self.records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.  Call it after the optimizer's own, whose rates advice refers to.

        Measurements that failed before count as forgotten: one that was silent after three of them tries again.

        Raises:
            ValueError: the state is of a monitor of other groups, or of something else.
        """
        if "groups" not in state or "taken" not in state:
            raise ValueError(
                f"this is no state of a Monitor: it has the entries {', '.join(map(repr, state)) or 'none'}"
            )
        if state["groups"] != list(self.partition.names):
            ours, theirs = ", ".join(self.partition.names[:3]), ", ".join(state["groups"][:3])
            raise ValueError(
                f"the state is of a monitor of {len(state['groups'])} groups ({theirs}, …), this one has "
                f"{len(self.partition)} ({ours}, …): make it with the same model, partition and optimizers"
            )
        self._taken = self._resumed_at = state["taken"]
        self._stepped.clear()
        self._awaiting, self._errors = None, 0
        self.counts = Counter({name: count for name, count in state["counts"].items() if name != "disabled"})
        self.cadence.load_state_dict(state["cadence"])
        self._samples.load_state_dict(state["samples"])
        self._progress.load_state_dict(state["progress"])
        if self._stream is None:
            self._stream_state = state["stream"]
        elif state["stream"] is not None:
            self._stream.load_state_dict(state["stream"])
        self._window.clear()
        self._window.extend((Summary.from_dict(part), rates) for part, rates in state["window"])
        self.records.clear()
        self.records.extend(map(Record.from_dict, state["records"]))
        self.summary = None if state["summary"] is None else Summary.from_dict(state["summary"])
        self.advice = self._advice_at(self._learning_rates()) if self._window else None

    def __getstate__(self) -> dict[str, Any]:
        """All but the hooks, which copies of optimizers have not; whether there are some."""
        return {**self.__dict__, "_hooks": bool(self._hooks), "_attached": bool(self._attached)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy watches the copies of the optimizers, as this one does these."""
        self.__dict__.update({**state, "_hooks": [], "_attached": []})
        if state["_hooks"]:
            self._listen()
        if state["_attached"] and self._batches is not None:
            self._measure_within_steps(self._batches)

    # Telling ----------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        names = " and ".join(type(member).__name__ for member in self.optimizers)
        watched = f"Monitor of {names}: {len(self.partition)} groups, {self.cadence}"
        failed = f", of which {self.counts['failed']}× not finite" if self.counts["failed"] else ""
        on = f", last on {self.records[-1].measured_on}" if self.records and self.records[-1].measured_on else ""
        advice = "no advice yet" if self.advice is None else repr(self.advice)
        silent = f", silent since {_PATIENCE} errors in a row" if self.counts["disabled"] else ""
        return f"{watched}, measured {self.counts['measured']}×{failed}{on}{silent}\n{advice}"

    def to_frame(self) -> Any:
        """The history as a ``pandas.DataFrame``, one row for each record and group.

        Raises:
            ImportError: pandas is missing.
        """
        return frame_of(self.records)

    def _write_last(self) -> None:
        """Writes a record whose step was never taken."""
        if self._awaiting is not None:
            self._awaiting = None
            self._write(self.records[-1])

    def _write(self, record: Record) -> None:
        if self._processes.rank == 0:
            assert self.summary is not None
            self._output.write(record, self.summary, self.path, self.writer, self._resumed_at)
        self._resumed_at = None


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
