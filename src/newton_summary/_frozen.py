"""Parameters that are frozen when something is made of a model, and may be unfrozen later without its knowing."""

from __future__ import annotations

import warnings

from torch import nn


class Frozen:
    """The frozen parameters of a model.

    Args:
        model: the module.
        who: who leaves them out, and what it does to the others.

    Example:
        >>> model = nn.Linear(2, 1).requires_grad_(False)
        >>> frozen = Frozen(model, "trained by this optimizer")
        >>> _ = model.bias.requires_grad_(True)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     frozen.warn()
        ...     frozen.warn()
        >>> print(*(f"{str(warning.message)[:107]} ..." for warning in caught))
        parameter 'bias', of shape (1,), is not trained by this optimizer: it was frozen when that was made; make a ...
    """

    def __init__(self, model: nn.Module, who: str) -> None:
        self.who = who
        self._parameters = {name: p for name, p in model.named_parameters() if not p.requires_grad}

    def warn(self) -> None:
        """Says, once, which of them take gradients now."""
        found = [name for name, p in self._parameters.items() if p.requires_grad]
        for name in found:
            shape = tuple(self._parameters.pop(name).shape)
            warnings.warn(
                f"parameter {name!r}, of shape {shape}, is not {self.who}: it was frozen when that was made; make a "
                "new one to take it in",
                stacklevel=5,
            )
