"""One training run: its steps, its record, and how it stops and goes on."""

from __future__ import annotations

import contextlib
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from newton_summary.errors import UsageError
from newton_summary.optim import MeasuredOptimizer
from newton_summary.report.records import Config, Row, Snapshot
from newton_summary_experiments import files, snapshots
from newton_summary_experiments.data import Batch, Data, first, shuffled
from newton_summary_experiments.optimizers import (
    CHECK_EVERY,
    MakesGradients,
    Setting,
    default_options,
    default_rate,
    get_recipe,
)
from newton_summary_experiments.snapshots import Watcher
from newton_summary_experiments.tasks import Task

_DIVERGED = 10.0
_EVALUATION_BATCH = 500


def config_of(
    task: Task,
    optimizer: str,
    lr: float | None = None,
    epochs: int | None = None,
    seed: int = 0,
    options: Mapping[str, float] | None = None,
) -> Config:
    """A configuration with the task's own values for what is not given.

    Raises:
        UsageError: a value is out of range, or the optimizer or one of its options is unknown.
    """
    rate = default_rate(task, optimizer) if lr is None else lr
    known = default_options(task, optimizer)
    unknown = set(options or {}) - set(known)
    if unknown:
        listed = ", ".join(known) or "none"
        raise UsageError(f"{optimizer} has no option {min(unknown)!r}; it has {listed}")
    length = task.epochs if epochs is None else epochs
    return Config(task.name, optimizer, rate, length, seed, {**known, **(options or {})}, task.budget, task.ntk)


@dataclass(frozen=True)
class Run:
    """A run's record.

    Args:
        config: what it was told to do.
        rows: one for each epoch, the start included.
        model: as it was at the end.
        best: its state at the end of the epoch with the lowest validation loss.
    """

    config: Config
    rows: list[Row]
    model: nn.Module
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether training ended early because its loss exploded."""
        return self.rows[-1].diverged


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the step in progress was finished and everything written."""


def train(
    task: Task,
    config: Config,
    data: Data,
    folder: Path | None = None,
    *,
    progress: bool = False,
    watched: bool = True,
) -> Run:
    """Trains, or goes on where a run in the folder stopped.

    Args:
        task: model, loss and batch size.
        config: optimizer, rate, epochs and seed.
        data: what to train on.
        folder: where metrics, interactions and a checkpoint are written at the end of every epoch.  A checkpoint in it
            is continued, bit for bit.  ``None``: nothing is written, and no interactions are measured.
        progress: whether to show a bar over the steps.
        watched: whether interactions are measured for the folder.

    Raises:
        UsageError: the folder holds a run of another configuration or on other data, or cannot be written.
        Interrupted: Ctrl-C was pressed.
    """
    trainer = Trainer(task, config, data, watched=watched and folder is not None)
    if folder is not None and (folder / files.CHECKPOINT).exists():
        trainer.load_state_dict(files.load_checkpoint(folder), folder)
    if not trainer.rows:
        trainer.record()
    trainer.save(folder)
    label = f"{config.optimizer}, seed {config.seed}"
    bar = tqdm(total=trainer.steps, initial=trainer.taken, desc=label, unit="step", disable=not progress)
    with _ctrl_c() as pressed, bar:
        while not trainer.finished:
            if pressed.is_set():
                trainer.save(folder)
                raise Interrupted
            trainer.step()
            bar.update()
            if trainer.is_recorded or trainer.diverged:
                trainer.save(folder)
                bar.set_postfix_str(f"training loss {_shown(trainer.rows[-1].train_loss)}", refresh=False)
    if pressed.is_set():
        raise Interrupted
    return Run(config, trainer.rows, trainer.model, trainer.best)


class Trainer:
    """The state of a run: model, optimizer, place in the data, and the record so far.

    Args:
        task: model, loss and batch size.
        config: optimizer, rate, epochs and seed.
        data: what to train on.
        watched: whether interactions are measured at chosen epochs, which changes nothing of the training.
    """

    def __init__(self, task: Task, config: Config, data: Data, *, watched: bool = False) -> None:
        self.task, self.config, self.data = task, config, data
        self.steps_per_epoch = len(data.train[1]) // task.batch_size
        self.steps = config.epochs * self.steps_per_epoch
        self.model = task.make_model(config.seed).to(data.device)
        recipe = get_recipe(config.optimizer)
        self.optimizer = recipe.make(
            Setting(task, data, self.model, config.lr, self.steps, config.seed, config.options)
        )
        self.plateau = (
            torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=2)
            if recipe.plateau
            else None
        )
        self.epoch, self.position, self.seconds = 0, 0, 0.0
        self.rows: list[Row] = []
        self.snapshots: list[Snapshot] = []
        self.best: dict[str, Tensor] = {}
        self._watcher = Watcher(task, data, self.model, config.seed) if watched else None
        self.environments = [environment()]
        self._batches: Iterator[Batch] | None = None

    @property
    def taken(self) -> int:
        """Steps taken so far."""
        return self.epoch * self.steps_per_epoch + self.position

    @property
    def diverged(self) -> bool:
        """Whether the loss exploded."""
        return bool(self.rows) and self.rows[-1].diverged

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.diverged or self.epoch >= self.config.epochs

    @property
    def is_recorded(self) -> bool:
        """Whether this is a place where losses are recorded: the end of an epoch, or of a part of one."""
        return self.position % -(-self.steps_per_epoch // self.task.records) == 0

    def step(self) -> None:
        """One step of the optimizer; where losses are recorded also the evaluation."""
        chosen = snapshots.is_chosen(self.config.epochs, self.steps_per_epoch, self.taken)
        watcher = None if chosen is None else self._watcher
        if watcher is not None:
            watcher.remember(self.model)
        finite = self.take_step()
        if watcher is not None and chosen is not None and finite:
            found = watcher.look(self.model, epoch=chosen, step=self.taken - 1)
            self.snapshots += [found] if found else []
        if not finite or self.is_recorded:
            self.record(exploded=not finite)

    def take_step(self) -> bool:
        """One step of the optimizer, without more; whether the loss of its batch was finite."""
        if self._batches is None:
            seed, size = self.config.seed, self.task.batch_size
            self._batches = shuffled(self.data.train, size, seed, self.epoch, self.position)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        finite = self._make_gradients(next(self._batches))
        if finite:
            self.optimizer.step()
            self.position += 1
        self.seconds += time.perf_counter() - start
        if self.position == self.steps_per_epoch:
            self.epoch, self.position, self._batches = self.epoch + 1, 0, None
        return finite

    def _make_gradients(self, batch: Batch) -> bool:
        """The gradients of a batch, where its loss is finite; whether it is."""
        if isinstance(self.optimizer, MakesGradients):
            return math.isfinite(self.optimizer.backward(batch).item())
        loss = self.task.loss_fn(self.model, batch)
        finite = math.isfinite(loss.item())
        if finite:
            loss.backward()
        return finite

    def record(self, exploded: bool = False) -> None:
        """Evaluates the model, at the average of its weights where the optimizer has a better one, and adds a row."""
        newton = self.optimizer if isinstance(self.optimizer, MeasuredOptimizer) else None
        if newton is not None:
            newton.eval()
        train, validation = (first(part, self.task.evaluated) for part in (self.data.train, self.data.validation))
        train_loss = mean_loss(self.task, self.model, train)
        validation_loss, accuracy = evaluate(self.task, self.model, validation)
        start = self.rows[0].train_loss if self.rows else train_loss
        exploded |= not math.isfinite(train_loss) or (start is not None and train_loss > _DIVERGED * start)
        if self.plateau is not None and self.epoch and self.position == 0 and self.epoch % CHECK_EVERY == 0:
            self.plateau.step(train_loss)
        self.rows.append(
            Row(
                epoch=self.epoch,
                step=self.taken,
                train_loss=_finite(train_loss),
                validation_loss=_finite(validation_loss),
                validation_accuracy=accuracy,
                seconds=self.seconds,
                lr=float(self.optimizer.param_groups[0]["lr"]),
                rates=dict(newton.measured_rates) if newton else {},
                counts=dict(getattr(self.optimizer, "counts", {})),
                diverged=exploded,
            )
        )
        earlier = [row.validation_loss for row in self.rows[:-1] if row.validation_loss is not None]
        if math.isfinite(validation_loss) and validation_loss < min(earlier, default=math.inf):
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        if newton is not None and not self.finished:
            newton.train()

    # Keeping ----------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | None) -> None:
        """Writes the checkpoint, the metrics and the interactions."""
        if folder is not None:
            files.save_checkpoint(folder, self.state_dict())
            header = {"config": asdict(self.config), "data": self.data.describe(), "environments": self.environments}
            files.write_metrics(folder, header, map(asdict, self.rows))
            partition = self.task.partition(self.model)
            snapshots.write(folder, dict(zip(partition.names, partition.sizes, strict=True)), self.snapshots)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "config": asdict(self.config),
            "data": self.data.describe(),
            "environments": self.environments,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
            "place": (self.epoch, self.position, self.seconds),
            "rows": [asdict(row) for row in self.rows],
            "best": self.best,
            "snapshots": [asdict(snapshot) for snapshot in self.snapshots],
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """The inverse of :meth:`state_dict`, read from a folder.

        Raises:
            UsageError: the state is of another run.
        """
        for what, own in (("config", asdict(self.config)), ("data", self.data.describe())):
            for key, value in own.items():
                if state[what].get(key, value) != value:
                    raise UsageError(
                        f"{folder} holds a run with {key} {state[what].get(key)!r}, not {value!r}: resume it as it was "
                        "started, or choose another folder with --out"
                    )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.epoch, self.position, self.seconds = state["place"]
        self.rows = [Row(**row) for row in state["rows"]]
        self.best = dict(state.get("best", {}))
        self.snapshots = [Snapshot(**values) for values in state.get("snapshots", [])]
        before = state["environments"]
        self.environments = before if self.finished or before[-1] == environment() else [*before, environment()]
        torch.set_rng_state(state["random"])


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, data: Batch) -> tuple[float, float]:
    """The mean loss of a model in eval mode, and the share of images whose class it gets right."""
    was_training = model.training
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in _parts(data))
    model.train(was_training)
    return mean_loss(task, model, data), right / len(data[1])


@torch.no_grad()
def mean_loss(task: Task, model: nn.Module, data: Batch) -> float:
    """The mean loss of a model in eval mode."""
    was_training = model.training
    model.eval()
    total = sum(task.loss_fn(model, part).item() * len(part[1]) for part in _parts(data))
    model.train(was_training)
    return total / len(data[1])


def _parts(data: Batch) -> Iterator[Batch]:
    return zip(*(part.split(_EVALUATION_BATCH) for part in data), strict=True)


def environment() -> dict[str, Any]:
    """The versions and settings that a run's numbers may depend on."""
    return {
        "newton-summary": version("newton-summary"),
        "torch": str(torch.__version__),  # a plain string, that checkpoints can hold
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """A block in which the first Ctrl-C sets an event, and a second one interrupts at once.

    Outside the main thread, where signals cannot be handled, Ctrl-C stays what it is.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _finite(value: float | Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
