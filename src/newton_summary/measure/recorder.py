"""The operations of one real evaluation of a loss, recorded as they run (docs/engine.md).

What is recorded is what happened: values that decide a branch, numbers from attributes, effects and random draws are
seen as they were, because the loss was called once, by itself, on real tensors.  Only operations on values that move
with the parameters are kept; everything else they use is a constant, known by its value.

A value is known by where it lies in memory.  Whether it moves is what autograd says: it requires a gradient, and comes
from a parameter.  Values made where gradients are off move only if autograd finds a gradient for them later, as the
results of a custom ``autograd.Function`` do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary._effects import Effects, effects_of
from newton_summary.measure.record import Leaf, Recording, ref
from newton_summary.measure.tracer import BESIDE, Tracer, overwritten
from newton_summary.measure.unwatched import as_unwatched

aten = torch.ops.aten


class Recorder(Tracer):
    """A block in which one evaluation of a loss is recorded.

    Args:
        parameters: the tensors that it is differentiated by.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._parameters: dict[int, int] = {}
        self._shared: set[int] = set()
        for number, parameter in enumerate(parameters):
            leaf = Leaf(self.new_slot(parameter), parameter, number)
            self.leaves.append(leaf)
            self._parameters[id(parameter)] = leaf.slot
            if parameter.layout is torch.strided:
                self._shared.add(parameter.untyped_storage()._cdata)
                self.name(parameter, leaf.slot)
        self._resolved: set[int] = set()
        self._views: set[int] = set()  # that were made since gradients were last on: leaves, for autograd
        self._statistics: set[int] = set()  # memory of means and deviations of norms, and of what is made of them
        self._apart: set[Any] = set()  # nodes of autograd that lead to no parameter
        self._towards: set[Any] = set()  # some that do

    @override
    def slot_of(self, tensor: Tensor) -> int | None:
        if id(tensor) in self._resolved:
            return self.find(tensor)
        if tensor.requires_grad:
            if tensor.is_leaf:
                known = self._parameters.get(id(tensor))
                moves = known is not None or id(tensor) in self._views
                return self.find(tensor) if moves and tensor.layout is torch.strided else known
            slot = self.find(tensor)
            if slot is None:
                if self._depends(tensor):
                    self.refuse(self._why_unknown(tensor))
            elif id(tensor) not in self._objects and not self._depends(tensor):
                return None  # a view of a leaf that shares its memory with what moves
            return slot
        return self.find(tensor) if not torch.is_grad_enabled() or self._is_statistic(tensor) else None

    def _is_statistic(self, tensor: Tensor) -> bool:
        """Whether a value moves though autograd does not say so."""
        if not self._statistics or tensor.layout is not torch.strided:
            return False
        return tensor.untyped_storage()._cdata in self._statistics

    def _depends(self, tensor: Tensor) -> bool:
        """Whether autograd leads from a value to a parameter."""
        nodes, seen = [tensor.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen or node in self._apart:
                continue
            seen.add(node)
            if node in self._towards or id(getattr(node, "variable", None)) in self._parameters:
                self._towards.add(tensor.grad_fn)
                return True
            nodes += [following for following, _ in node.next_functions]
        self._apart |= seen
        return False

    def _why_unknown(self, tensor: Tensor) -> str:
        """Why a value that comes from a parameter has not been recorded, and what to do about it."""
        shape = tuple(tensor.shape)
        if tensor.is_nested:
            return (
                f"a nested tensor of shape {shape} comes from a parameter, which cannot be recorded: use a dense one, "
                "padded, with a mask"
            )
        draw, _ = self._sloped.get(tensor.untyped_storage()._cdata, (None, None))
        if draw is not None:
            return (
                f"{draw} draws a tensor of shape {shape} from values that move, and torch has no second derivatives of "
                "such a draw: take a distribution that is drawn from noise of its own (LogNormal for Gamma, a softmax "
                "of Normal for Dirichlet, Kumaraswamy for Beta), or detach the draw (sample() for rsample())"
            )
        name = tensor.grad_fn.name() if tensor.grad_fn is not None else "?"
        return (
            f"a tensor of shape {shape} comes from a parameter by {name}, which cannot be recorded: compute it within "
            "the loss, by operations of torch"
        )

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._views and torch.is_grad_enabled():
            self._views.clear()
        if func is aten.detach.default:
            return func(*args)
        if func is aten._efficientzerotensor.default:
            return aten.zeros.default(*args, **kwargs)  # what is computed with the other is computed out of sight
        if isinstance(func, torch._ops.HigherOrderOperator):
            if self.moves((*args, *kwargs.values())):
                self.refuse(f"{func} calls functions that cannot be recorded: call one of them by if, or by a loop")
            return func(*args, **kwargs)
        effects = effects_of(func)
        if effects.writes and self._writes_aside(func, args, kwargs, effects):
            return self._run_aside(func, args, kwargs, effects)
        if self._may_move(args) or (kwargs and self._may_move(kwargs.values())):
            out = self.run(func, args, kwargs, effects)
            if torch.is_grad_enabled():
                self._note_unseen(func, args, kwargs, out)
            elif effects.shares:
                self._views.update(map(id, out if isinstance(out, list | tuple) else [out]))
            if func is aten.clone.default and (args[0].is_conj() or args[0].is_neg()):
                self._resolved.add(id(out))  # by torch, within an operation, where autograd does not look
            return out
        for tensor in effects.written(args, kwargs) if effects.writes else ():
            self.before_writing(tensor)
        out = as_unwatched(func, args, kwargs)
        if not effects.shares:
            self.claim(out)
        return out

    def _may_move(self, values: Iterable[Any]) -> bool:
        """Whether any of these arguments may move: whether autograd thinks so, or does not look."""
        if not torch.is_grad_enabled():
            return self.moves(values)
        for value in values:
            if isinstance(value, Tensor):
                known = value.requires_grad or id(value) in self._resolved or self._is_statistic(value)
                if known and self.slot_of(value) is not None:
                    return True
            elif isinstance(value, list | tuple) and self._may_move(value):
                return True
        return False

    def _note_unseen(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Notes results that move though autograd does not say so."""
        results: Iterable[Any] = ()
        if func in NORMALISATIONS:
            results = out[1:]
        elif self._statistics and not _require(args) and not _require(kwargs.values()):
            results = out if isinstance(out, list | tuple) else [out]
        strided = (r for r in results if isinstance(r, Tensor) and r.layout is torch.strided)
        self._statistics.update(r.untyped_storage()._cdata for r in strided)

    def _writes_aside(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], effects: Effects) -> bool:
        """Whether moving values are written where autograd does not look: through ``detach`` or without gradients."""
        if func in BESIDE:
            return False
        for tensor in effects.written(args, kwargs):
            if tensor.layout is not torch.strided:
                continue
            if self.memory_of(tensor) is None:
                if tensor.requires_grad and tensor.is_leaf and not torch.is_grad_enabled():
                    return True  # of a network beside the model, trained within the loss: a constant from now on
                continue
            if not torch.is_grad_enabled():
                return tensor.requires_grad or tensor.untyped_storage()._cdata in self._shared
            if not tensor.requires_grad and not self._is_statistic(tensor):
                if self.moves(args):
                    self.refuse(f"{func} writes moving values through a detached tensor of shape {tuple(tensor.shape)}")
                return True
        return False

    def _run_aside(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], effects: Effects) -> Any:
        written = list(effects.written(args, kwargs))
        known = []
        for tensor in written:
            self.before_writing(tensor)
            known.append(self.find(tensor))
        out = func(*args, **kwargs)
        for tensor, slot in zip(written, known, strict=True):
            if slot is not None:
                value = ref(self.constant(tensor.detach().clone()))
                self._written(tensor, self.put(overwritten, (ref(slot), value), (), tensor))
        return out

    def is_hooked(self) -> bool:
        """Whether a hook may change the gradient of a value."""
        return any(isinstance(v, Tensor) and v._backward_hooks for v in self.values.values())

    def finish(self, loss: Tensor) -> Recording:
        """What was recorded.

        Raises:
            Refusal: something happened that cannot be recorded.
        """
        result = self.slot_of(loss) if loss.requires_grad else None
        if self.refusal is not None:
            raise self.refusal
        return Recording(loss, self.records, self.leaves, result, self.values)


def _require(values: Iterable[Any]) -> bool:
    """Whether any of these arguments requires a gradient."""
    return any(
        value.requires_grad if isinstance(value, Tensor) else isinstance(value, list | tuple) and _require(value)
        for value in values
    )


NORMALISATIONS = {
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
    aten._batch_norm_with_update.default,
}
"""Operations whose further results move, though autograd takes them for constants; their backward passes read them."""
