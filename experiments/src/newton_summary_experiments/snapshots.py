"""What a run remembers of its interactions: measurements along the very steps that its optimizer took, now and then."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from newton_summary.measure import Loss, preserved_randomness, resolve_engine
from newton_summary.report.records import INTERACTIONS, Snapshot
from newton_summary.summary import Summary
from newton_summary_experiments import files
from newton_summary_experiments.data import Batch, Data
from newton_summary_experiments.tasks import Task

_BATCHES = 5


def chosen_epochs(epochs: int) -> list[int]:
    """The epochs before which a run looks at its interactions: 0, 1, 2, 5, 10, 20, 50 and so on, below the last.

    Example:
        >>> chosen_epochs(12)
        [0, 1, 2, 5, 10]
    """
    numbers = (mantissa * 10**power for power in range(len(str(epochs))) for mantissa in (1, 2, 5))
    return [0, *(number for number in numbers if number < epochs)]


def is_chosen(epochs: int, steps_per_epoch: int, taken: int) -> int | None:
    """The epoch that a snapshot at this step stands for, or ``None`` where none is made.

    Args:
        epochs: of the run.
        steps_per_epoch: steps in each.
        taken: steps taken so far.

    Example:
        >>> [is_chosen(3, 10, taken) for taken in (0, 5, 10, 29)]
        [0, None, 1, 3]
    """
    epoch, position = divmod(taken, steps_per_epoch)
    if position == 0 and epoch in chosen_epochs(epochs):
        return epoch
    return epochs if taken == epochs * steps_per_epoch - 1 else None


class Watcher:
    """Measures along the steps that an optimizer took; nothing of the model that is trained is changed.

    Args:
        task: the loss, the groups and the size of a batch.
        data: what batches are drawn from.
        model: that is trained.
        seed: of the run; with the epoch it decides the batches.
    """

    def __init__(self, task: Task, data: Data, model: nn.Module, seed: int) -> None:
        self.task, self.data, self.seed = task, data, seed
        self.model = copy.deepcopy(model)  # one for all snapshots: the engine traces a model once
        self.partition = task.partition(self.model)

    def remember(self, model: nn.Module) -> None:
        """To be called before the step."""
        self.model.load_state_dict(model.state_dict())

    def look(self, model: nn.Module, *, epoch: int, step: int) -> Snapshot | None:
        """Measures, after the step.

        Args:
            model: after the step, with the gradients that it was computed from.
            epoch: that the snapshot stands for.
            step: steps taken before this one.

        Returns:
            The snapshot; ``None`` where a number in it is not finite.
        """
        direction, still = self._step_to(model)
        batches = _batches(self.task, self.data, self.seed, epoch)
        engine, loss, later = (
            resolve_engine("auto"),
            Loss(self.task.loss_fn, self.model),
            Loss(self.task.loss_fn, model),
        )
        with torch.no_grad(), preserved_randomness({self.partition.device}):
            parts = [engine.measure(loss, batch, self.partition, direction, 3, "diagonal").cpu() for batch in batches]
        with later.undisturbed():
            losses = [later.value(batch) for batch in batches]
        weights = [part.weight for part in parts]
        after = sum(w * value for w, value in zip(weights, losses, strict=True)) / sum(weights)
        decrease = Summary.mean(parts).loss.item() - after
        if not (math.isfinite(decrease) and all(part.is_finite() for part in parts)):
            return None
        return Snapshot(epoch, step, decrease, [part.to_dict() for part in parts], still)

    def _step_to(self, model: nn.Module) -> tuple[list[Tensor], list[str]]:
        """θ − θ', with gradients for the groups where that is 0, and their names."""
        parameters = dict(model.named_parameters())
        after = [parameters[name] for name in self.partition.parameter_names]
        step = [old.detach() - new.detach() for old, new in zip(self.partition.parameters, after, strict=True)]
        still = []
        for name, tensors in zip(self.partition.names, self.partition.tensors_of, strict=True):
            if not any(bool(step[i].any()) for i in tensors):
                still.append(name)
                for i in tensors:
                    gradient = after[i].grad
                    step[i] = step[i] if gradient is None else gradient.detach()
        return step, still


def _batches(task: Task, data: Data, seed: int, epoch: int) -> list[Batch]:
    """Batches without a common sample, in an order that has nothing to do with that of training."""
    images, classes = data.train
    entropy = int(np.random.SeedSequence((seed, epoch, len(classes))).generate_state(1)[0])
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(entropy))
    chosen = order[: _BATCHES * task.batch_size].split(task.batch_size)
    return [(images[index], classes[index]) for index in chosen]


# Keeping --------------------------------------------------------------------------------------------------------------


def write(folder: Path, sizes: Mapping[str, int], snapshots: Sequence[Snapshot]) -> None:
    """Writes ``interactions.json``: the number of parameters in each group, and the snapshots.

    Raises:
        UsageError: it cannot be written.
    """
    content = {"groups": dict(sizes), "snapshots": [asdict(snapshot) for snapshot in snapshots]}
    files.write_text(folder / INTERACTIONS, json.dumps(content, allow_nan=False, ensure_ascii=False) + "\n")
