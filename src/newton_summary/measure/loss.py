"""A loss bound to a model, evaluated so that nothing of the user's changes."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from newton_summary.partition import unwrap

LossFunction: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss_fn(model, batch)``: a scalar tensor, the mean over the samples of the batch."""


class Loss:
    """A loss function and the model that it is called with.

    Args:
        loss_fn: takes the model and a batch, gives a scalar.  It must reach the parameters through that model.
        model: what ``torch.compile`` made of a module counts as that module.
    """

    def __init__(self, loss_fn: LossFunction, model: nn.Module) -> None:
        self.loss_fn = loss_fn
        self.model = unwrap(model)
        self._module = _AsModule(loss_fn, self.model)

    def __call__(self, batch: Any, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss on a batch, with some tensors of the model replaced, and every other buffer replaced by a copy.

        Args:
            batch: whatever the loss function takes.
            parameters: tensors by the names of parameters or buffers; the model's own stand for those not given.

        Raises:
            ValueError: the loss is not a scalar.
        """
        replaced = self._replacements(parameters or {})
        value = torch.func.functional_call(self._module, replaced, (batch,), tie_weights=False)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss must be a scalar tensor, got {got}: reduce it, for example by .mean()")
        return value.reshape(())

    def _replacements(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stands in every place of every module, each module once.

        Of a module that a model holds under two names, ``functional_call`` by itself restores only the first place.
        """
        own: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        own |= self.model.named_buffers(remove_duplicate=False)
        by_identity = {id(own[name]): tensor for name, tensor in given.items()}
        for buffer in self._module.buffers():
            if id(buffer) not in by_identity:
                by_identity[id(buffer)] = buffer.clone()
        places: dict[str, Tensor] = {}
        for prefix, module in self._module.named_modules():
            places |= module.named_parameters(prefix, recurse=False, remove_duplicate=False)
            places |= module.named_buffers(prefix, recurse=False, remove_duplicate=False)
        return {place: by_identity[id(t)] for place, t in places.items() if id(t) in by_identity}

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A block with gradients on, that leaves random states as they were and uses twice differentiable kernels.

        What ``torch.compile`` made runs uncompiled: it has no second derivatives.
        """
        devices = {p.device for p in self.model.parameters() if p.device.type not in ("cpu", "meta")}
        with (
            preserved_randomness(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            _differentiable_recurrence(self.model),
            _uncompiled(),
        ):
            yield


class _AsModule(nn.Module):
    """The loss as a module over the model, so that ``functional_call`` can replace the model's tensors."""

    def __init__(self, loss_fn: LossFunction, model: nn.Module) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


@contextlib.contextmanager
def preserved_randomness(devices: set[torch.device] | None = None) -> Iterator[None]:
    """Restores the random states of torch (on the host and on these devices), numpy and Python afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (the user's legacy state)
    accelerators = [device for device in devices or () if device.type != "cpu"]
    kind = accelerators[0].type if accelerators else "cuda"
    try:
        with torch.random.fork_rng(devices=accelerators, device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def _differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Switches the fused recurrent kernels off, which have no second derivatives, where the model has such layers."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    backends: tuple[Any, ...] = (
        torch.backends.mkldnn,
        torch.backends.cudnn,
    )  # their flags() would touch more than this one switch
    before = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Switches ``torch.compile`` off, where it was ever used."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def check_dependence(gradients: Iterable[Tensor | None]) -> None:
    """Raises where a loss has no gradient: ``None`` for every parameter."""
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "the loss does not depend on the parameters: compute it with the model that the loss function is given"
        )


def batch_size(batch: Any) -> int:
    """The number of samples in a batch: the first dimension of the first tensor in it that has one, else 1."""
    for leaf in pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    return 1
