"""What is to be done within ``optimizer.step()`` once the gradients of the step are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], do: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Does something now, or where a step has a closure, which computes its gradients, when that has run.

    An optimizer that calls its closure several times has it done after the first.

    Args:
        args: of the step, the optimizer first.
        kwargs: of the step.
        do: what is to be done.

    Returns:
        Other arguments for the step, where it has a closure: what a hook before it may give.

    Example:
        >>> _, kwargs = after_closure((None,), {"closure": lambda: print("gradients")}, lambda: print("measured"))
        >>> kwargs["closure"]()
        gradients
        measured
    """
    if not any(map(callable, (*args[1:], *kwargs.values()))):
        do()
        return None
    waiting = [do]

    def followed(value: Any) -> Any:
        def closure(*inner: Any, **named: Any) -> Any:
            result = value(*inner, **named)
            while waiting:
                waiting.pop()()
            return result

        return closure if callable(value) else value

    return (args[0], *map(followed, args[1:])), {name: followed(value) for name, value in kwargs.items()}
