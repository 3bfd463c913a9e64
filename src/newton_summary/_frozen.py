"""Parameters that are left out when something is made of a model, and come in later without its knowing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from newton_summary._warned import warn


class Frozen:
    """The frozen parameters of a model, and those that it does not have yet.

    Args:
        model: the module.
        who: who leaves them out, and what it does to the others.

    Example:
        >>> import warnings
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
        self._model = model
        self._known = list(model.parameters())
        self._parameters = {name: p for name, p in model.named_parameters() if not p.requires_grad}

    def warn(self) -> None:
        """Says, once, which of those that were frozen take gradients now."""
        found = [name for name, p in self._parameters.items() if p.requires_grad]
        self._say({name: self._parameters.pop(name) for name in found}, "frozen when that was made")

    def warn_of_new(self) -> None:
        """Says, once, which parameters the model has got, too; this goes through the model, and takes a while."""
        self.warn()
        known = {id(p) for p in self._known}
        new = {}
        for name, p in self._model.named_parameters():
            if id(p) in known:
                continue
            self._known.append(p)
            if p.requires_grad:
                new[name] = p
            else:
                self._parameters[name] = p
        self._say(new, "not in the model when that was made")

    def _say(self, found: Mapping[str, nn.Parameter], why: str) -> None:
        """One warning for all that are found at once, as where the body of a network thaws."""
        if not found:
            return
        name, *others = found
        are, it, was = (f" and {len(others)} more are", "them", "they were") if others else (" is", "it", "it was")
        warn(
            f"parameter {name!r}, of shape {tuple(found[name].shape)},{are} not {self.who}: {was} {why}; make a new "
            f"one to take {it} in"
        )
