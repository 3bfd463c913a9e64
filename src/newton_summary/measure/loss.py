"""A loss bound to a model, evaluated so that nothing of the user's changes."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from newton_summary.measure.attributes import Attributes, generator_rewind, owners
from newton_summary.measure.batches import described, fresh, kept
from newton_summary.measure.composed import Composed
from newton_summary.measure.journal import Journal, is_recurrent, watching
from newton_summary.parallel import paging
from newton_summary.partition import Partition, unwrap

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss_fn(model, batch)``: a scalar tensor, the mean over the samples of the batch."""


class Loss:
    """A loss function and the model that it is called with.

    Args:
        loss_fn: takes the model and a batch, gives a scalar.
        model: what ``torch.compile`` or ``DistributedDataParallel`` made of a module counts as that module.

    Raises:
        TypeError: the loss function is none, or takes other arguments.
    """

    def __init__(self, loss_fn: LossFunction, model: nn.Module) -> None:
        _check_takes_model_and_batch(loss_fn)
        self.loss_fn = loss_fn
        self.model = unwrap(model)

    @property
    def devices(self) -> set[torch.device]:
        """The accelerators that parameters of the model are on."""
        return {p.device for p in self.model.parameters() if p.device.type not in ("cpu", "meta")}

    def generator_rewind(self) -> Callable[[], None]:
        """A function that takes the generators of random numbers that the model or the loss owns back to here."""
        return generator_rewind(owners(self.model, self.loss_fn)[1])

    @contextlib.contextmanager
    def evaluated(self, batch: Any, journal: Journal | None = None, differentiable: bool = False) -> Iterator[Tensor]:
        """A block that begins with the loss on a batch, with its graph, and after which nothing has changed.

        The loss meets the model and its parameters themselves, and a batch with containers of its own.  What it
        overwrites stays so within the block, where the graph needs it.  Hooks on gradients of parameters are off, those
        of gradients that the loss itself takes, too.

        Args:
            batch: whatever the loss function takes.
            journal: watches the operations.
            differentiable: whether operations whose higher derivatives torch gets wrong are composed of others.

        Raises:
            ValueError: the loss is not a scalar.
        """
        if journal is None:
            journal = Journal()
            watched = journal if differentiable else watching(journal, self.model)  # fused kernels differentiate once
        else:
            watched = journal
        modules, objects = owners(self.model, self.loss_fn)
        attributes, own = Attributes(modules, objects), fresh(batch)
        restore_batch = kept(own)
        try:
            with without_hooks([p for m in modules for p in m._parameters.values() if p is not None]):
                with watched, Composed() if differentiable else contextlib.nullcontext():
                    value = scalar(self._of(own))
                yield value
        finally:
            attributes.restore()
            restore_batch()
            journal.undo()

    def _of(self, batch: Any) -> Any:
        """What the loss function gives; an error of its own says what it was called with."""
        try:
            return self.loss_fn(self.model, batch)
        except Exception as error:
            error.add_note(
                f"loss_fn(model, batch) was called with a {type(self.model).__name__} and {described(batch)}"
            )
            raise

    def value(self, batch: Any) -> float:
        """The loss on a batch, as a number; nothing changes but random states."""
        with self.evaluated(batch) as value:
            return value.item()

    def after_step(self, batch: Any, partition: Partition, along: Sequence[Tensor], sizes: Sequence[float]) -> float:
        """The loss at θ − U I η, where the S groups of a partition have moved along u by these step sizes."""
        factors = partition.spread(sizes)
        with self.movable(batch, partition) as (moved, loss):
            for p, u, f in zip(moved, along, factors, strict=True):
                p.sub_(u * f)
            return loss()

    @contextlib.contextmanager
    def movable(
        self, batch: Any, partition: Partition, rewind: Callable[[], None] | None = None, alike: bool = True
    ) -> Iterator[tuple[list[Tensor], LossHere]]:
        """A block in which the parameters of a partition may be moved in place; afterwards they hold what they held.

        It gives what they hold, and what computes the loss where they are, with the same random numbers each time.
        Gradients are on, as they are in training: a loss may differentiate by itself, or ask.  They move in
        their own memory, because the loss may know that by other tensors: views that were made before.

        Args:
            batch: whatever the loss function takes.
            partition: of the parameters that move.
            rewind: restores the random states, where a block around this one does; else they are saved here.
            alike: whether all processes that share these parameters move them, and in the same way.
        """
        before = [p.data for p in partition.parameters]
        content = [None if alike and paging.is_page(data) else data.clone() for data in before]
        moved = [
            c if c is not None and 0 in data.stride() else data for c, data in zip(content, before, strict=True)
        ]  # some are expanded
        with (
            self.undisturbed(differentiable=False, rewind=rewind) as rewind,
            paging.moving() if alike else contextlib.nullcontext(),
        ):
            try:
                for p, data in zip(partition.parameters, moved, strict=True):
                    p.data = data
                with torch.no_grad():
                    yield moved, LossHere(self, batch, partition.parameters, rewind)
            finally:
                for p, data, held in zip(partition.parameters, before, content, strict=True):
                    if held is not None and p.data_ptr() == data.data_ptr():
                        data.copy_(held)
                    p.data = data

    @contextlib.contextmanager
    def undisturbed(
        self, differentiable: bool = True, rewind: Callable[[], None] | None = None
    ) -> Iterator[Callable[[], None]]:
        """A block with gradients on, that leaves random states as they were.

        It gives a function that rewinds the random states to where the block began, those of generators too that the
        model or the loss owns.

        What ``torch.compile`` made runs uncompiled: it has no second derivatives, and would compile again.

        Args:
            differentiable: whether attention and recurrent layers use kernels that are differentiable twice.
            rewind: restores the random states, where a block around this one does; else they are saved here.
        """
        rewind_generators = self.generator_rewind()
        with (
            preserved_randomness(self.devices) if rewind is None else contextlib.nullcontext(rewind) as rewind,
            torch.inference_mode(False),
            torch.enable_grad(),
            differentiable_recurrence(self.model) if differentiable else contextlib.nullcontext(),
            _plain_scripts(self.model),
            _uncompiled(),
            _plain_checkpoints(),
            sdpa_kernel(SDPBackend.MATH) if differentiable else contextlib.nullcontext(),
        ):

            def rewind_all() -> None:
                rewind()
                rewind_generators()

            try:
                yield rewind_all
            finally:
                rewind_generators()


def _check_takes_model_and_batch(loss_fn: object) -> None:
    """Raises unless this can be called with a model and a batch, as far as that can be told."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of the model and a batch, got {type(loss_fn).__name__}")
    named: Any = loss_fn if inspect.isroutine(loss_fn) or inspect.isclass(loss_fn) else type(loss_fn)
    if named.__module__ in ("torch.nn.functional", "torch.nn.modules.loss"):
        raise TypeError(
            f"loss_fn must be a function of the model and a batch, got {named.__name__}, one of outputs and targets: "
            "pass lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    try:
        signature = inspect.signature(loss_fn)
    except (ValueError, TypeError):  # some are written in C
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(f"loss_fn must be a function of the model and a batch, got {signature}: {error}") from None


@contextlib.contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Takes the hooks off that change or watch gradients of these leaves: the loss's own derivatives are wanted."""
    hooked: list[tuple[Any, Any]] = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    try:
        for p, _ in hooked:
            p._backward_hooks = None
        yield
    finally:
        for p, hooks in hooked:
            p._backward_hooks = hooks


class LossHere:
    """The loss on one batch where the parameters are by now, with the same random numbers each time.

    Args:
        loss: the loss and its model.
        batch: whatever it takes.
        parameters: by which :meth:`gradient` differentiates.
        rewind: restores the random states.
    """

    def __init__(self, loss: Loss, batch: Any, parameters: Sequence[Tensor], rewind: Callable[[], None]) -> None:
        self._loss, self._batch, self._parameters, self._rewind = loss, batch, parameters, rewind

    @torch.enable_grad()
    def __call__(self) -> float:
        """The loss."""
        self._rewind()
        with paging.standing():
            return self._loss.value(self._batch)

    @torch.enable_grad()
    def gradient(self) -> tuple[float, list[Tensor | None]]:
        """The loss, and its gradient by each parameter; nothing for those that it does not depend on."""
        self._rewind()
        with paging.standing(), self._loss.evaluated(self._batch) as value:
            return value.item(), gradients_of(value, self._parameters)


def scalar(value: Any) -> Tensor:
    """What a loss function returned, without axes.

    Raises:
        ValueError: it is not one number.
    """
    if not isinstance(value, Tensor):
        holds = isinstance(value, Sequence | Mapping) or hasattr(value, "loss")
        cure = "return the loss out of it, and nothing else" if holds else "return the tensor itself, with its graph"
        raise ValueError(f"the loss must be a scalar tensor, got {type(value).__name__}: {cure}")
    if value.numel() != 1:
        raise ValueError(
            f"the loss must be a scalar tensor, got a tensor of shape {tuple(value.shape)}: reduce it, for example by "
            ".mean()"
        )
    if value.is_complex():
        raise ValueError("the loss must be a real number, got a complex one: take its real part, or its absolute value")
    return value.reshape(()) if value.dim() else value


@contextlib.contextmanager
def preserved_randomness(devices: set[torch.device] | None = None) -> Iterator[Callable[[], None]]:
    """Restores the random states of torch (on the host and on these devices), numpy and Python afterwards.

    It gives a function that does so at once.
    """
    python_state, host_state = random.getstate(), torch.get_rng_state()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  (the user's global generator)
    states = [
        (torch.get_device_module(device), device, torch.get_device_module(device).get_rng_state(device))
        for device in devices or ()
        if device.type != "cpu"
    ]

    def rewind() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(host_state)
        for module, device, state in states:
            module.set_rng_state(state, device)

    try:
        yield rewind
    finally:
        rewind()


@contextlib.contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Switches the fused recurrent kernels off, which have no second derivatives, where the model has such layers."""
    if not is_recurrent(model):
        yield
        return
    core: Any = torch._C  # flags() of torch.backends would touch more than these switches, which may be locked there
    switches = (
        (core._get_mkldnn_enabled(), core._set_mkldnn_enabled),
        (core._get_cudnn_enabled(), core._set_cudnn_enabled),
    )
    try:
        for _, switch in switches:
            switch(False)
        yield
    finally:
        for before, switch in switches:
            switch(before)


@contextlib.contextmanager
def _plain_scripts(model: nn.Module) -> Iterator[None]:
    """Runs scripts operation by operation: what their executor makes of several has one derivative of its own."""
    if not any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        yield
        return
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        yield


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Switches ``torch.compile`` off, where it was ever used."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _plain_checkpoints() -> Iterator[None]:
    """Runs checkpoints as plain calls.

    Torch differentiates reentrant ones only by ``backward()``, and only once; the others compute anew in the backward
    pass, where what stands in for some operations here is no longer in force.
    """
    module: Any = sys.modules.get("torch.utils.checkpoint")
    if module is None:
        yield
        return
    names = [name for name in _CHECKPOINTS if hasattr(module, name)]
    originals, own = [getattr(module, name) for name in names], vars(module.CheckpointFunction).get("apply")
    module.CheckpointFunction.apply = staticmethod(lambda run, preserve_rng_state, *args: run(*args))
    try:
        for name in names:
            setattr(module, name, _no_checkpoint)
        yield
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(module, name, original)
        if own is None:
            del module.CheckpointFunction.apply  # what it inherits is seen again
        else:  # of a block around this one
            module.CheckpointFunction.apply = own


_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
"""What torch makes checkpoints of that are not reentrant: until 2.13, and from 2.14 on."""


def _no_checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What torch drives around a checkpointed function: up to the call, and after it."""
    yield


def gradients_of(
    value: Tensor | Sequence[Tensor],
    parameters: Sequence[Tensor],
    create_graph: bool = False,
    along: Sequence[Tensor] | None = None,
) -> list[Tensor | None]:
    """The gradients of a loss by parameters; nothing for those that it does not depend on, or that were frozen then.

    One that the loss has frozen after its use, as adversaries do with each other, is a parameter of its graph still.

    Args:
        value: the loss; or several tensors, whose inner product with ``along`` is differentiated.
        parameters: by which.
        create_graph: whether the gradients can be differentiated again.
        along: constants.
    """
    if not parameters or (isinstance(value, Tensor) and not value.requires_grad):
        return [None] * len(parameters)
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        return list(torch.autograd.grad(value, parameters, along, allow_unused=True, create_graph=create_graph))
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            error.add_note("a loss function only gives the loss: does loss_fn call backward() itself?")
        raise
    finally:
        for p in frozen:
            p.requires_grad_(False)


def check_dependence(gradients: Iterable[Tensor | None]) -> None:
    """Raises where a loss has no gradient: ``None`` for every parameter."""
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "the loss does not depend on the parameters: compute it with the model that the loss function is given, "
            "and neither detach it nor switch gradients off"
        )
