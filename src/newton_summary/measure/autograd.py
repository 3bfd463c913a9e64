"""What the graph that autograd made of a value tells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def nodes(*values: Tensor | None) -> Iterator[Any]:
    """Every function that autograd would go through from some values, once."""
    waiting, seen = [v.grad_fn for v in values if v is not None], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def own_derivatives(loss: Tensor) -> list[str]:
    """The functions whose backward passes are not torch's own, by name."""
    return [type(node).__name__ for node in nodes(loss) if not _is_torchs(node)]


def _is_torchs(node: Any) -> bool:
    name = type(node).__name__
    return not (
        isinstance(node, torch.autograd.function.BackwardCFunction)
        or name in ("CppFunction", "CompiledFunctionBackward")
        or "Differentiable" in name
    )


def once_differentiable(*values: Tensor | None) -> list[str]:
    """The functions behind some values whose backward pass is marked ``once_differentiable``, by name.

    Autograd takes what such a pass computes for a constant: further derivatives lack terms, mostly without a word.
    """
    return [type(node).__name__ for node in nodes(*values) if _is_once_differentiable(node)]


def _is_once_differentiable(node: Any) -> bool:
    backward = getattr(getattr(type(node), "_forward_cls", None), "backward", None)
    code = getattr(backward, "__code__", None)
    return code is not None and code.co_qualname == "once_differentiable.<locals>.wrapper"


_NORMALISATIONS = ("NativeLayerNorm", "NativeBatchNorm", "BatchNormWithUpdate")


def forgetful(value: Tensor) -> list[str]:
    """Normalisations behind a value whose third derivatives lack terms, because they were called past what composes."""
    found = (node for node in nodes(value) if type(node).__name__.startswith(_NORMALISATIONS))
    return [type(node).__name__ for node in found if getattr(node, "_saved_training", True)]


def scaled_by_frequency(value: Tensor) -> list[str]:
    """The functions behind a value whose gradients are divided by how often a row was looked up, by name."""
    return [type(node).__name__ for node in nodes(value) if getattr(node, "_saved_scale_grad_by_freq", False)]


def signature(value: Tensor) -> tuple[str, ...]:
    """The functions that autograd would go through from a value, by name, in its order."""
    return tuple(type(node).__name__ for node in nodes(value))


_KINKS = re.compile(
    "Relu|Prelu|Elu|Abs|Clamp|Max|Min|Threshold|Hard|Where|Sort|Topk|Median|Kthvalue|Quantile|Amax|Amin|L1|Huber|Margin"
    "|Norm|Round|Floor|Ceil|Sign|Remainder|Fmod|Grid|Softshrink"
)


def has_kinks(functions: tuple[str, ...]) -> bool:
    """Whether some of these functions may have slopes that jump."""
    return any(_KINKS.search(name) for name in functions)
