"""K-FAC, the baseline with curvature: what the library ASDL computes, as an optimizer of torch.

ASDL (``asdfghjkl`` on the package index, imported as ``asdl``) was chosen over ``singd`` because it is K-FAC itself,
with the Fisher matrix of the model's own predictions, where ``singd`` is a variant without inverses on the empirical
Fisher.  In short trials on the networks of the experiments its steps also took less time (44 ms against 88 on the MLP,
32 against 52 on VBigMLP), and its loss fell further.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from newton_summary.measure import preserved_randomness
from newton_summary_experiments.data import Batch

_LEAST_WEIGHT = 0.05


class KFAC(torch.optim.SGD):
    """SGD with momentum on gradients multiplied by the inverse of a Kronecker-factored Fisher matrix.

    The loss is the mean cross-entropy.  Factors are measured every ``every`` steps with one sample of each image's
    predicted classes, and averaged with weights 1/k down to 0.05 for the k-th measurement, as in K-FAC's first paper
    (arXiv:1503.05671); ASDL splits the damping between both factors.  Use it in the loop
    ``loss = optimizer.backward(batch)``, ``optimizer.step()``.

    Args:
        model: a classifier of linear and convolutional layers.
        lr: the learning rate.
        damping: added to the Fisher matrix before it is inverted.
        batch_size: samples in a batch.
        seed: decides the samples of predicted classes.
        every: steps between two measurements of the factors.

    Attributes:
        counts: how many times the factors were measured (``"measured"``).

    Raises:
        ImportError: ASDL is not installed.
    """

    def __init__(
        self, model: nn.Module, lr: float, damping: float, batch_size: int, seed: int = 0, every: int = 10
    ) -> None:
        super().__init__(model.parameters(), lr, momentum=0.9)
        self.every, self.seed = every, seed
        self.counts = {"measured": 0}
        self._model = model
        self._maker = _maker(model, damping, batch_size, every)

    def backward(self, batch: Batch) -> Tensor:
        """Sets the gradients to those of K-FAC; returns the loss, which is not finite where training exploded."""
        step = self._maker.state["step"]
        if step % self.every == 0:
            self.counts["measured"] += 1
            self._maker.config.ema_decay = max(1 / self.counts["measured"], _LEAST_WEIGHT)
        images, classes = batch
        logits = self._maker.setup_model_call(self._model, images)
        self._maker.setup_loss_call(functional.cross_entropy, logits, classes)
        with preserved_randomness({images.device}), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # ASDL's hooks are of an older kind
            torch.manual_seed(self.seed * 1_000_003 + step)
            try:
                _, loss = self._maker.forward_and_backward()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the factors cannot be inverted
                loss = images.new_tensor(math.nan)
            except (ValueError, RuntimeError):  # classes cannot be drawn; which it is depends on a switch of torch's
                with torch.no_grad():
                    if self._model(images).isfinite().all():
                        raise
                loss = images.new_tensor(math.nan)
        found: Tensor = loss.detach()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Momentum, factors, their inverses, and the step."""
        factors = {
            name: [module.fisher.kron.A, module.fisher.kron.B, module.fisher.kron.A_inv, module.fisher.kron.B_inv]
            for name, module in self._model.named_modules()
            if hasattr(module, "fisher")
        }
        own = {"step": self._maker.state["step"], "counts": dict(self.counts), "factors": factors}
        return {**super().state_dict(), "kfac": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        from asdl.symmatrix import Kron, SymMatrix

        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kfac"})
        own = state_dict["kfac"]
        self._maker.state["step"], self.counts = own["step"], dict(own["counts"])
        for name, factors in own["factors"].items():
            module: Any = self._model.get_submodule(name)
            module.fisher = SymMatrix(kron=Kron(*factors))


def _maker(model: nn.Module, damping: float, batch_size: int, every: int) -> Any:
    """What makes ASDL's gradients."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script
            from asdl.precondition import KfacGradientMaker, PreconditioningConfig, natural_gradient
    except ImportError as error:
        raise ImportError("the optimizer kfac needs ASDL: pip install 'newton-summary-experiments[kfac]'") from error
    if not torch.cuda.is_available():  # ASDL marks ranges for CUDA's profiler, which a build without CUDA refuses
        natural_gradient.nvtx = _NoProfiler
    config = PreconditioningConfig(
        data_size=batch_size,
        damping=damping,
        preconditioner_upd_interval=every,
        curvature_upd_interval=every,
        ema_decay=1.0,
    )
    return KfacGradientMaker(model, config)


class _NoProfiler:
    @staticmethod
    def range(message: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()
