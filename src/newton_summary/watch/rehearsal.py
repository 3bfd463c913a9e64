"""Training a model for a while, and then as if it had never been trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter  # nothing public keeps a version

from newton_summary.measure import Loss
from newton_summary.measure.attributes import Attributes, owners
from newton_summary.measure.batches import kept, map_tensors
from newton_summary.measure.journal import Journal, watching
from newton_summary.measure.loss import check_dependence, gradients_of, scalar, without_hooks
from newton_summary.measure.next_step import shadow_of
from newton_summary.measure.stream import BatchStream
from newton_summary.measure.together import members_of, take_step


class Rehearsal:
    """The model itself in training, by a shadow of its optimizer that has a group for each tensor.

    It is made by :func:`rehearsal`.

    Attributes:
        optimizer: the shadow: it holds the user's parameters, and a copy of everything else.
    """

    def __init__(
        self, loss: Loss, optimizer: torch.optim.Optimizer, parameters: list[Tensor], journal: Journal
    ) -> None:
        self.loss, self.optimizer = loss, optimizer
        self._parameters, self._journal = parameters, journal
        options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for member in members_of(optimizer):
            held = {id(p) for group in member.param_groups for p in group["params"]}
            own = [{**options[id(p)], "params": [p], "lr": 1.0} for p in parameters if id(p) in held]
            member.param_groups[:] = own  # in place: an optimizer within the optimizer may share the list

    def set_rates(self, rates: Mapping[Tensor, float]) -> None:
        """The learning rate of every tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["params"][0]]

    def next(self, stream: BatchStream, device: torch.device) -> Any:
        """The next batch of a stream.  What it draws is drawn in this training, after which states are put back."""
        return stream.next(device, rewind=_nothing)

    def backward(self, batch: Any) -> float:
        """Computes gradients on a batch, and gives the loss.

        What a forward pass changes stays changed, as in training; the batch does not.
        """
        restore_batch = kept(batch)
        try:
            with without_hooks(self._parameters):
                with watching(self._journal, self.loss.model):
                    value = scalar(self.loss.loss_fn(self.loss.model, map_tensors(batch, _copy)))
                gradients = gradients_of(value, self._parameters)
            check_dependence(gradients)
        finally:
            restore_batch()
        for p, gradient in zip(self._parameters, gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()  # which may be a view, of another one even
        return float(value.detach())

    def step(self) -> None:
        """Takes the shadow's step."""
        take_step(self.optimizer)


class Learning:
    """Which tensors learn in a training, looked at after every ``backward()``.

    Args:
        parameters: the tensors that are trained.
        steps: the length of the training.
    """

    def __init__(self, parameters: Iterable[Tensor], steps: int) -> None:
        self._parameters, self._half, self._looks = list(parameters), steps // 2, 0
        self._learnt: set[Tensor] = set()  # at first
        self._silent: set[Tensor] = set()  # those of them that have had no gradient in the second half

    @property
    def died(self) -> bool:
        """Whether a tensor that learnt at first did not in the second half, while others went on.

        So it is with the weights before units that are always off.  Where none learns any more the loss is 0, as of
        margins that are kept.
        """
        return 0 < len(self._silent) < len(self._learnt)

    def look(self) -> None:
        """Notes whose gradient is not 0; a sparse one counts as such."""
        self._looks += 1
        if self._looks == 1:
            self._learnt = self._silent = self._moved(self._parameters)
        if self._looks > self._half:
            self._silent = self._silent - self._moved(self._silent)

    @staticmethod
    def _moved(parameters: Iterable[Tensor]) -> set[Tensor]:
        gradients = ((p, p.grad) for p in parameters if p.grad is not None)
        return {p for p, gradient in gradients if gradient.layout is not torch.strided or gradient.any()}


def _nothing() -> None:
    """There is nothing to be done."""


def _copy(tensor: Tensor) -> Tensor:
    """A tensor of the same content; one that gets gradients of its own, where this one does."""
    if tensor.requires_grad and tensor.is_leaf:
        return tensor.detach().clone().requires_grad_()
    return tensor.clone()


@contextlib.contextmanager
def rehearsal(loss: Loss, optimizer: torch.optim.Optimizer, parameters: list[Tensor], seed: int) -> Iterator[Rehearsal]:
    """A block in which a model may be trained, and after which everything is as it was, however it ends.

    Parameters, gradients, buffers, attributes of modules, random states, the optimizer, bit for bit.  The model is not
    copied: some refuse to be.

    Args:
        loss: the loss and its model.
        optimizer: any optimizer whose ``step()`` needs no closure; no hook of it is called.
        parameters: the tensors to train, all of them in the optimizer.
        seed: fixes the random numbers that are drawn within.
    """
    model = loss.model
    held = list({id(p): p for p in (*parameters, *(q for g in optimizer.param_groups for q in g["params"]))}.values())
    kept = {id(p): p for p in held} | {id(module): module for module in model.modules()}
    shadow = shadow_of(optimizer, kept | {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    before, gradients = [p.detach().clone() for p in held], [p.grad for p in held]
    attributes, journal = Attributes(*owners(model, loss.loss_fn)), Journal()
    with _unsafe_preserve_version_counter(tuple(held)), loss.undisturbed(differentiable=False):
        try:
            for p in held:
                p.grad = None
            _seed(seed, loss.devices)
            yield Rehearsal(loss, shadow, parameters, journal)
        finally:
            attributes.restore()
            journal.undo()
            with torch.no_grad():
                for p, content, gradient in zip(held, before, gradients, strict=True):
                    p.copy_(content)
                    p.grad = gradient


def _seed(seed: int, devices: Iterable[torch.device]) -> None:
    """Seeds the generators of the host and of these devices: torch's own function seeds all that there ever will be."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        module = torch.get_device_module(device)
        with module.device(device) if hasattr(module, "device") else contextlib.nullcontext():
            module.manual_seed(seed)
