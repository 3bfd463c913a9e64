"""Models whose parameters are spread over processes by ``torch.distributed.fsdp.fully_shard``: whole for a measurement.

Steps, directions and their memories are computed on the shards, as any optimizer's are.  A derivative needs every
parameter: each process measures on its own samples, and gathers the parameters and the direction of a module that is
sharded by itself when operations come to it, one such module at a time (:mod:`newton_summary.parallel.paging`).
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from newton_summary.parallel.paging import Block, Page, Pages
from newton_summary.partition import Partition

UNSHARDED = "load its weights, such as a checkpoint's, into a model that is not sharded"
"""What cures a refusal of :func:`check_whole` where nothing else does."""

_PLAIN = (Tensor, nn.Parameter)
_Whole: TypeAlias = tuple[Partition, list[Tensor]]


@contextlib.contextmanager
def gathered(model: nn.Module, partition: Partition, direction: Sequence[Tensor]) -> Iterator[_Whole]:
    """A block in which a sharded model is an ordinary one, with whole parameters; every process must enter it.

    Args:
        model: the module itself; it is left as it was.  Where nothing is sharded, nothing happens.
        partition: of its parameters.
        direction: one tensor for each parameter of the partition.

    Returns:
        The partition over the whole parameters, and the whole direction.

    Raises:
        ValueError: parameters are sharded by something else than ``fully_shard``.
    """
    if not any(is_sharded(p) for p in model.parameters()):
        yield partition, list(direction)
        return
    _check_plain_inside(model)
    blocks = _Blocks(model)
    whole = {p: nn.Parameter(blocks.whole(p, "parameters", p), p.requires_grad) for p in model.parameters()}
    along = [blocks.whole(u, "direction", p) for u, p in zip(direction, partition.parameters, strict=False)]
    over_whole = copy.copy(partition)
    over_whole.parameters = tuple(whole[p] for p in partition.parameters)
    with _swapped(model, whole), _without_hooks(model), blocks.pages():
        yield over_whole, along


@contextlib.contextmanager
def measurable(model: nn.Module, partition: Partition, direction: Sequence[Tensor]) -> Iterator[_Whole]:
    """A block to measure in: :func:`gathered`, and in full precision, whatever the training uses."""
    with (
        torch.autocast(partition.device.type, enabled=False),
        gathered(model, partition, direction) as whole,
    ):
        yield whole


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``; asked without importing them, which takes long."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "full_tensor")  # which takes longer to find missing


def check_whole(partition: Partition, what: str, cure: str) -> None:
    """Raises where a parameter is sharded, for what computes in one process.

    Args:
        partition: of the parameters.
        what: needs them whole.
        cure: what to do instead.
    """
    for name, parameter in zip(partition.parameter_names, partition.parameters, strict=True):
        if is_sharded(parameter):
            raise ValueError(f"parameter {name!r} is sharded, and {what} needs it whole in this process: {cure}")


def check_all_or_none(parameters: Mapping[str, Tensor]) -> None:
    """Raises where some parameters are sharded and others are not: no kernel takes both at once.

    Args:
        parameters: by name.

    Raises:
        ValueError: there are both.
    """
    of_kind = {is_sharded(p): name for name, p in parameters.items()}
    if len(of_kind) > 1:
        raise ValueError(
            f"parameter {of_kind[True]!r} is sharded, and {of_kind[False]!r} is not: apply fully_shard to the whole "
            "model in the end, too, and without ignored_params"
        )


def place_of(parameters: Iterable[Tensor]) -> dict[str, list[int]] | None:
    """Which part of sharded parameters this process has, and of how many; nothing where they are whole.

    Processes that are copies of each other have the same.
    """
    for p in parameters:
        if is_sharded(p):
            mesh, placements = _mesh(p), cast(Any, p).placements
            at = zip(mesh.get_coordinate() or (), placements, strict=False)
            return {"part": [number for number, how in at if not how.is_replicate()], "of": list(mesh.shape)}
    return None


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which every process has a part."""
    whole: Tensor = cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor
    return whole


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory."""
    part: Tensor = cast(Any, tensor).to_local() if is_sharded(tensor) else tensor
    return part


def copy_parts(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensors into others, of sharded ones this process's parts: torch has no such operation for the whole."""
    torch._foreach_copy_([local(t) for t in targets], [local(s) for s in sources])


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, split as a parameter is."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


class _Blocks:
    """What is gathered together: all that belongs to the innermost module that ``fully_shard`` was applied to.

    Args:
        model: it has sharded parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mesh = next(_mesh(p) for p in model.parameters() if is_sharded(p))
        self._owner = _owners(model)
        self._members: defaultdict[tuple[str, nn.Module], list[Page]] = defaultdict(list)

    def whole(self, tensor: Tensor, lane: str, parameter: Tensor) -> Tensor:
        """The whole of a tensor that is split as a parameter is: gathered when it is looked at.

        What is spread over other processes than the first parameter is gathered at once, and stays.
        """
        tensor = tensor.detach()
        if not is_sharded(tensor) or _mesh(tensor) != self._mesh:
            return unsharded(tensor)
        page = Page(
            tensor, local(tensor), partial(_joined, tensor), lambda value: local(sharded_like(value, tensor)).clone()
        )
        self._members[lane, self._owner[parameter]].append(page)
        return page.whole

    def pages(self) -> Pages:
        """The block of code in which they come and go."""
        return Pages([Block(pages, lane) for (lane, _), pages in self._members.items()], self._exchange)

    def _exchange(self, number: int) -> list[int]:
        """What number each process gives."""
        numbers = torch.tensor([number], device=self._mesh.device_type)
        for dimension in range(self._mesh.ndim):
            parts = [torch.empty_like(numbers) for _ in range(self._mesh.size(dimension))]
            dist.all_gather(parts, numbers, group=self._mesh.get_group(dimension))
            numbers = torch.cat(parts)
        everyones: list[int] = numbers.tolist()
        return everyones


def _joined(like: Any, part: Tensor) -> Tensor:
    """The whole of everyone's part of a tensor that is split as another one is."""
    from torch.distributed.tensor import DTensor

    mesh, placements, shape, stride = like.device_mesh, like.placements, like.shape, like.stride()
    return unsharded(DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride))


def _mesh(tensor: Tensor) -> Any:
    """The processes that a sharded tensor is spread over."""
    return cast(Any, tensor).device_mesh


def _owners(model: nn.Module) -> dict[Tensor, nn.Module]:
    """For each parameter the innermost module around it that ``fully_shard`` was applied to."""
    from torch.distributed.fsdp import FSDPModule

    owners: dict[Tensor, nn.Module] = {}

    def visit(module: nn.Module, owner: nn.Module) -> None:
        owner = module if isinstance(module, FSDPModule) else owner
        for child in module.children():
            visit(child, owner)
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, owner)

    visit(model, model)
    return owners


@contextlib.contextmanager
def _swapped(model: nn.Module, whole: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    places = [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None
    ]
    try:
        for parameters, name, p in places:
            parameters[name] = whole[p]
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Takes the hooks off that gather, cast and free parameters around every forward pass."""
    tables = [table for m in model.modules() for table in (m._forward_pre_hooks, m._forward_hooks)]
    before = [dict(table) for table in tables]
    try:
        for table, hooks in zip(tables, before, strict=True):
            for key in [key for key, hook in hooks.items() if _origin(hook).startswith("torch.distributed.fsdp")]:
                del table[key]
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)


def _check_plain_inside(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if _origin(hook).startswith("torch.distributed.tensor"):
                raise ValueError(
                    f"module {name!r} computes on parts of tensors (tensor parallelism), which cannot be measured: "
                    "shard the model with torch.distributed.fsdp.fully_shard alone"
                )


def _origin(hook: object) -> str:
    return getattr(hook, "__module__", None) or ""
