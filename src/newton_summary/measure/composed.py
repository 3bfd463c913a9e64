"""Operations whose higher derivatives autograd gets silently wrong, composed from operations that it gets right.

The second backward pass of torch's batch, instance and layer normalisation takes the saved mean and deviation for
constants, so that third derivatives miss terms; that of weight normalisation does so with the saved norm, so that
second derivatives do.  First derivatives are right, and nothing is raised.  That of group normalisation ends the
process where data are in the order of channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from newton_summary.measure.half import wide


class Composed(TorchFunctionMode):
    """A block in which these operations are replaced by compositions with the same values and first derivatives."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls the function, or what stands for it."""
        kwargs = kwargs or {}
        composition = _COMPOSITIONS.get(func)
        if composition is None:
            return func(*args, **kwargs)
        with torch.no_grad():  # checks the arguments, updates running statistics, and knows the type under autocast
            original = func(*args, **kwargs)
        return _laid_out(composition(*args, **kwargs).to(original.dtype), original)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """A value with its dimensions in memory as another's: dropout draws in that order."""
    if x.stride() == like.stride():
        return x
    strides: tuple[int, ...] = like.stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        return _affine(_standardised(x, [0, *range(2, x.dim())], eps), weight, bias, 1)
    return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if use_input_stats:
        return _affine(_standardised(x, list(range(2, x.dim())), eps), weight, bias, 1)
    return F.instance_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    first = x.dim() - len(normalized_shape)
    return _affine(_standardised(x, list(range(first, x.dim())), eps), weight, bias, first)


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = _standardised(x.reshape(x.shape[0], num_groups, -1), [2], eps)
    return _affine(grouped.reshape(x.shape), weight, bias, 1)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _statistics_last(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with the arguments in the order of torch's inner functions, which end with a switch for cuDNN."""

    def reordered(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return norm(x, running_mean, running_var, weight, bias, training, momentum, eps)

    return reordered


def _standardised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    """A value minus its mean, divided by its deviation."""
    x = wide(x)
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, first: int) -> Tensor:
    """Scales and shifts along the dimensions from ``first`` on that the weight has."""

    def fitted(t: Tensor) -> Tensor:
        return t.view(*t.shape, *[1] * (x.dim() - first - t.dim()))

    x = x if weight is None else x * fitted(weight)
    return x if bias is None else x + fitted(bias)


_COMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.batch_norm: _statistics_last(_batch_norm),
    torch.instance_norm: _statistics_last(_instance_norm),
    torch.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch._weight_norm: _weight_norm,
}
