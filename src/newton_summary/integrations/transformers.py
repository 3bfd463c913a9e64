"""Transformers: a callback that watches training through a monitor, or tells what the optimizer measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from newton_summary.integrations.news import News, Source
from newton_summary.measure import LossFunction
from newton_summary.optim import MeasuredOptimizer
from newton_summary.watch.monitor import Monitor

if TYPE_CHECKING:
    TrainerCallback = object
else:
    try:
        from transformers import TrainerCallback
    except ImportError as error:  # pragma: no cover - a test runs it in a process of its own
        raise ImportError("this needs transformers: pip install 'newton-summary[transformers]'") from error


def own_loss(model: Any, batch: Any) -> Tensor:
    """The loss that a model of transformers computes by itself, from a batch with labels, masks included."""
    loss: Tensor = model(**batch).loss
    return loss


_COUNT = "_newton_summary_monitors"  # how many of these callbacks have begun a training, in the trainer's state


def _place(args: Any, state: Any, number: int) -> Path:
    """Where this process's monitor is kept in the checkpoint of a step; each of several in a file of its own."""
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return folder / f"newton_summary_monitor_{args.process_index}{f'_{number}' if number else ''}.pt"


class MonitorCallback(TrainerCallback):
    """Logs how every group's learning rate should change.

    It puts a :class:`~newton_summary.Monitor` beside the trainer's optimizer and measures where it is time to, before
    the step, on gradients as the optimizer will use them.  Where a measurement fails it warns, and training goes on.
    Where the optimizer is a :class:`~newton_summary.NewtonSummary`, which measures by itself, it logs that optimizer's
    rates instead; the trainer evaluates and saves the weights as they are, not those of ``optimizer.eval()``.  A
    training that is resumed from a checkpoint of the trainer's output folder is watched as if it had not stopped.

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives a scalar.  Default: :func:`own_loss`.
        data: batches to measure on, read by an independent sampler
            (:class:`~newton_summary.measure.stream.BatchStream`).  Default: the trainer's training data.
        every: the number of steps between measurements.  Default: as a share of the time pays for, as in the monitor.
        repeats: how many batches a measurement takes.
        seed: fixes the sampler.
        log: takes a dictionary of numbers, and of the advice in words, ``"newton_summary/advice"``.  ``trainer.log``
            sends them wherever the trainer reports to.  Default: they are added to the trainer's ``state.log_history``
            alone.
        options: for the :class:`~newton_summary.Monitor`.

    Attributes:
        monitor: from the start of training, unless the optimizer measures by itself.
    """

    def __init__(
        self,
        loss_fn: LossFunction = own_loss,
        *,
        data: Iterable[Any] | None = None,
        every: int | None = None,
        repeats: int = 1,
        seed: int = 0,
        log: Callable[[dict[str, Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss_fn, self.data, self.every, self.repeats, self.seed = loss_fn, data, every, repeats, seed
        self.log, self.options = log, options
        self.monitor: Monitor | None = None
        self._news: News | None = None
        self._number = 0  # which of the callbacks that watch this training it is

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, train_dataloader: Any, **_: Any
    ) -> None:
        """Puts the monitor beside the optimizer."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
        self._number = getattr(state, _COUNT, 0)
        setattr(state, _COUNT, self._number + 1)
        source: Source
        if isinstance(optimizer, MeasuredOptimizer):
            source = optimizer
        else:
            monitor = Monitor(model, self.loss_fn, optimizer=optimizer, every=self.every, **self.options)
            data = train_dataloader if self.data is None else self.data
            source = self.monitor = monitor.attach(data, repeats=self.repeats, seed=self.seed)
            saved = _place(args, state, self._number)
            if saved.is_file():
                monitor.load_state_dict(torch.load(saved, weights_only=True))
        self._news = News(source)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Logs what is new."""
        measured = self._news.latest() if self._news is not None else None
        if measured is None or not state.is_world_process_zero:
            return
        if self.log is not None:
            self.log(measured.with_words)
        else:
            state.log_history.append({**measured.with_words, "epoch": state.epoch, "step": state.global_step})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Adds the monitor's state to the checkpoint."""
        if self.monitor is not None:
            place = _place(args, state, self._number)
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.monitor.state_dict(), place)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the monitor away; its advice and records stay."""
        if self.monitor is not None:
            self.monitor.close()
