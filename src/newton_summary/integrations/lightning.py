"""Lightning: a callback that watches training through a monitor, or tells what the optimizer measures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from newton_summary.integrations.news import Measured, News, Source
from newton_summary.measure import LossFunction
from newton_summary.optim import MeasuredOptimizer
from newton_summary.watch.monitor import Monitor
from newton_summary.watch.record import TAG


def _callback_class() -> Any:
    """The base class of the Lightning that is in use: ``lightning`` and ``pytorch_lightning`` each have their own."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise ImportError("this needs Lightning: pip install 'newton-summary[lightning]'")


_TAKE_WORDS = ("CSVLogger", "WandbLogger")  # beside numbers in one dictionary; TensorBoard takes them as text

if TYPE_CHECKING:
    Callback = object
else:
    Callback = _callback_class()


class MonitorCallback(Callback):
    """Logs, to the trainer's loggers, how every group's learning rate should change, in numbers and in words.

    It puts a :class:`~newton_summary.Monitor` beside the module's optimizer and measures where it is time to, before
    the step, on gradients as the optimizer will use them.  Where a measurement fails it warns, and training goes on.
    Where the optimizer is a :class:`~newton_summary.NewtonSummary`, which measures by itself, it logs that optimizer's
    rates instead, and leaves the weights to you: to validate averaged ones, call ``optimizer.eval()`` in the module's
    ``on_validation_start`` and ``optimizer.train()`` in its ``on_validation_end``.  A training that is resumed from a
    checkpoint is watched as if it had not stopped.  There may be several callbacks, for other optimizers or partitions.

    Args:
        loss_fn: ``loss_fn(module, batch)`` gives a scalar.  It must not log: it is called while measuring.  Not needed
            with ``NewtonSummary``.
        data: batches to measure on, read by an independent sampler
            (:class:`~newton_summary.measure.stream.BatchStream`).  Default: the batch that is trained on.
        every: the number of steps between measurements.  Default: as a share of the time pays for, as in the monitor.
        repeats: how many batches of ``data`` a measurement takes.
        seed: fixes the sampler.
        images: whether loggers with TensorBoard's ``add_image`` get H̄ as an image.
        optimizer: the number of the optimizer, where the module has several; or the numbers of those that are watched
            together, such as ``(0, 1)`` for Muon and AdamW.
        options: for the :class:`~newton_summary.Monitor`.

    Attributes:
        monitor: from the start of training, unless the optimizer measures by itself.
    """

    def __init__(
        self,
        loss_fn: LossFunction | None = None,
        *,
        data: Iterable[Any] | None = None,
        every: int | None = None,
        repeats: int = 1,
        seed: int = 0,
        images: bool = True,
        optimizer: int | Sequence[int] = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss_fn, self.every, self.repeats, self.images = loss_fn, every, repeats, images
        self.options, self.numbers = options, [optimizer] if isinstance(optimizer, int) else list(optimizer)
        self.monitor: Monitor | None = None
        self.data, self.seed = data, seed
        self._news: News | None = None
        self._batch: Any = None
        self._state: dict[str, Any] | None = None  # of a training that is resumed, until it starts

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts the monitor beside the optimizer."""
        optimizers = [trainer.optimizers[number] for number in self.numbers]
        source: Source
        if isinstance(optimizers[0], MeasuredOptimizer):
            source = optimizers[0]
        elif self.loss_fn is None:
            raise ValueError("to watch an optimizer, MonitorCallback needs loss_fn(module, batch)")
        else:
            source = self.monitor = Monitor(
                pl_module, self.loss_fn, optimizer=optimizers, every=self.every, **self.options
            )
            if self._state is not None:
                self.monitor.load_state_dict(self._state)
                self._state = None
            if self.data is None:
                self.monitor._measure_within_steps(self._batch_at_hand)
            else:  # not before the trainer has started the other processes, of which each measures a part
                self.monitor.attach(self.data, repeats=self.repeats, seed=self.seed)
        self._news = News(source)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the batch at hand."""
        self._batch = batch

    def _batch_at_hand(self) -> list[Any]:
        """What to measure on, where there is no data."""
        return [self._batch]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs what is new."""
        self._batch = None
        measured = self._news.latest() if self._news is not None else None
        if measured is not None:
            for logger in trainer.loggers:
                self._log(logger, measured, trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Takes the monitor away; its advice and records stay."""
        if self.monitor is not None:
            self.monitor.close()

    @property
    def state_key(self) -> str:
        """What its state is found by in the trainer's checkpoints, where there are several callbacks."""
        partition = self.options.get("partition")
        own = {"optimizer": self.numbers, "every": self.every, "partition": getattr(partition, "names", partition)}
        return f"{type(self).__qualname__}{own}"

    def state_dict(self) -> dict[str, Any]:
        """What goes into the trainer's checkpoints."""
        return {"monitor": self._state if self.monitor is None else self.monitor.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint, once training starts."""
        self._state = state_dict["monitor"]

    def _log(self, logger: Any, measured: Measured, step: int) -> None:
        takes_words = any(base.__name__ in _TAKE_WORDS for base in type(logger).__mro__)
        logger.log_metrics(measured.with_words if takes_words else measured.scalars, step=step)
        if measured.sentences and hasattr(logger.experiment, "add_text"):
            logger.experiment.add_text(TAG, measured.text, step)
        summary = measured.summary
        if self.images and summary is not None and summary.is_finite() and hasattr(logger.experiment, "add_image"):
            from newton_summary.integrations.tensorboard import draw

            draw(logger.experiment, summary, step)
