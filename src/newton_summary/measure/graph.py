"""A loss as a list of tensor operations, traced once for each shape of the inputs (docs/engine.md).

Tracing has three stages.  The first records what the loss function calls, above autograd, so that ``detach`` and
``torch.no_grad()`` are seen.  The second breaks composite operations up and marks constants.  The third turns
operations in place into functional ones and lowers the fused ones (``lowering``).  A traced graph may be wrong where a
loss does unusual things; whoever uses one compares it with the loss itself (``forward``).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from newton_summary.measure.arena import Layout
from newton_summary.measure.lowering import CONSTANT, attention, bernoulli, lowerings

aten = torch.ops.aten


class Refusal(Exception):
    """Why a loss cannot be measured by this engine: an operation, and what is the matter with it."""


@dataclass(frozen=True, slots=True)
class Ref:
    """The place of a value among all values of a graph."""

    slot: int


@dataclass(slots=True)
class Instruction:
    """One operation: what is called, with which arguments, and where the result goes."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    reads: tuple[int, ...]
    nested: bool
    last_use: tuple[int, ...] = ()

    def arguments(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with the values in place of the references."""
        if self.nested:
            return tuple(_fill(a, values) for a in self.args)
        return tuple(values[a.slot] if type(a) is Ref else a for a in self.args)


@dataclass(slots=True)
class Graph:
    """A loss as a list of operations.

    Attributes:
        instructions: in an order in which they can run.
        inputs: the slots of the inputs: parameters, further tensors of the model, tensors of the batch.
        constants: slots of tensors that the loss function captured.
        result: the slot of the loss.
        slots: how many values there are.
        draws: whether it draws random numbers.
        plan: what each operation does to tangents, once that is known.
        coarse: whether some values are of half precision.
        kinked: whether some operation has a slope that jumps.
        widest: the bytes of its largest value.
        layouts: where tangents lie in memory, for each kind of request.
    """

    instructions: list[Instruction]
    inputs: list[int]
    constants: list[tuple[int, Tensor]]
    result: int
    slots: int
    draws: bool = False
    plan: list[Any] | None = None
    coarse: bool = False
    kinked: bool = False
    widest: int = 0
    layouts: dict[Any, Layout] = field(default_factory=dict)

    def run(self, inputs: Sequence[Tensor], instead: Mapping[Any, Callable[..., Any]] | None = None) -> list[Any]:
        """Every value, by slot.  Differentiable with respect to the inputs.

        Args:
            inputs: the arguments of the traced function.
            instead: what to call in place of some operations.
        """
        replaced = instead or {}
        values: list[Any] = [None] * self.slots
        for slot, tensor in zip(self.inputs, inputs, strict=True):
            values[slot] = tensor
        for slot, tensor in self.constants:
            values[slot] = tensor
        for step in self.instructions:
            if step.op is CONSTANT:
                values[step.out] = values[step.reads[0]].detach()
            else:
                values[step.out] = replaced.get(step.op, step.op)(*step.arguments(values), **step.kwargs)
        return values


def trace(function: Callable[..., Tensor], inputs: Sequence[Tensor], above_autograd: bool) -> Graph:
    """Traces a function of tensors.

    Args:
        function: takes the inputs, gives a scalar.
        inputs: its arguments; those that require gradients are differentiated.
        above_autograd: whether to record above autograd, where ``detach`` and ``no_grad`` are seen.  A loss that
            itself differentiates can only be recorded below it, where every ``detach`` is taken for an artefact.

    Raises:
        Refusal: the function cannot be traced.
    """
    try:
        with _quiet():
            calls = make_fx(function, pre_dispatch=above_autograd, record_module_stack=False)(*inputs)
            plain = [tensor.detach() for tensor in inputs]
            marked = make_fx(_Marking(calls, above_autograd).run)(*plain)
            lowered = make_fx(torch.func.functionalize(marked), decomposition_table=lowerings())(*plain)
    except Exception as error:
        raise Refusal(f"tracing failed with {type(error).__name__}: {first_line(error)}") from error
    return _compile(lowered)


class _Marking(fx.Interpreter):
    """Runs recorded calls, with detached values and those computed without gradients marked as constants."""

    def __init__(self, module: fx.GraphModule, trust_detach: bool) -> None:
        super().__init__(module)
        self.trust_detach = trust_detach
        self.gradients = True

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            self.gradients = bool(args[0])
            return None
        if target in (aten.detach.default, aten.detach_.default):
            return CONSTANT(args[0]) if self.trust_detach else args[0].view_as(args[0])
        if target is aten.scaled_dot_product_attention.default:
            result = attention(*args, **kwargs)
        else:
            result = super().call_function(target, args, kwargs)
        if self.gradients or _in_place(target):
            return result
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: CONSTANT(t) if t.is_floating_point() else t, result)


def _in_place(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def _compile(module: fx.GraphModule) -> Graph:
    """A traced module as a list of instructions, without what the loss does not need."""
    nodes = list(module.graph.nodes)
    needed = _needed(nodes)
    slot: dict[fx.Node, int] = {node: i for i, node in enumerate(n for n in nodes if n in needed)}
    instructions: list[Instruction] = []
    inputs: list[int] = []
    constants: list[tuple[int, Tensor]] = []
    result = -1
    for node in nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            inputs.append(slot[node])
        elif node.op == "get_attr":
            constants.append((slot[node], _attribute(module, str(node.target)).detach()))
        elif node.op == "output":
            result = slot[_output(node)]
        else:
            instructions.append(_instruction(node, slot))
    draws = any(_draws(node.target) for node in needed)
    graph = Graph(instructions, inputs, constants, result, len(slot), draws)
    _mark_last_uses(graph)
    return graph


def _needed(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes that the result depends on, the inputs, and random draws (which move the random state)."""
    needed: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op in ("output", "placeholder") or _draws(node.target) or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return needed


def _draws(op: Any) -> bool:
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def _instruction(node: fx.Node, slot: dict[fx.Node, int]) -> Instruction:
    args, kwargs = _normalised(node)

    def refer(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: Ref(slot[n]))  # type: ignore[arg-type, return-value]

    template = tuple(refer(a) for a in args)
    nested = any(isinstance(a, list | tuple) for a in template)
    template = tuple(list(a) if isinstance(a, fx.immutable_collections.immutable_list) else a for a in template)
    plain = {key: refer(value) for key, value in kwargs.items()}
    if any(isinstance(value, Ref) for value in plain.values()):
        raise Refusal(f"{node.target} takes a tensor by a keyword only")
    op = bernoulli if node.target is aten.bernoulli.p else node.target
    return Instruction(op, template, plain, slot[node], tuple(slot[n] for n in node.all_input_nodes), nested)


def _normalised(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with those that can stand by position put there."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if isinstance(node.target, torch._ops.OpOverload):
        for argument in node.target._schema.arguments[len(args) :]:
            if argument.kwarg_only or argument.name not in kwargs:
                break
            args.append(kwargs.pop(argument.name))
    return tuple(args), kwargs


def _mark_last_uses(graph: Graph) -> None:
    seen = {graph.result}
    for step in reversed(graph.instructions):
        step.last_use = tuple(s for s in (*step.reads, step.out) if s not in seen)
        seen.update(step.last_use)


def _output(node: fx.Node) -> fx.Node:
    (value,) = node.args
    while isinstance(value, list | tuple):
        (value,) = value
    assert isinstance(value, fx.Node)
    return value


def _attribute(module: torch.nn.Module, path: str) -> Tensor:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    if not isinstance(value, Tensor):
        raise Refusal(f"the loss captured a {type(value).__name__} that cannot be recorded")
    return value


def _fill(argument: Any, values: Sequence[Any]) -> Any:
    if type(argument) is Ref:
        return values[argument.slot]
    if isinstance(argument, list | tuple):
        return [_fill(a, values) for a in argument]
    return argument


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of torch's own doings, which no user can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
