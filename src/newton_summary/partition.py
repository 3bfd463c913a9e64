"""Partitions of a model's parameters into named groups (``docs/method.md``, section 1).

A partition is stored as a function from parameter entries to groups: for each tensor either one group, when the tensor
belongs to it as a whole, or a tensor of group numbers of the same shape.  Groups are therefore disjoint and complete by
construction, and every part of a tensor that can be indexed can be a group.
"""

from __future__ import annotations

import fnmatch
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary import architecture
from newton_summary._assignment import Assignment, Label, Part

_ROWS_SHOWN = 40
_MOST_GROUPS = 100  # of the default partition


class Partition:
    """A split of a model's trainable parameters into S named groups (docs/method.md, section 1).

    Frozen parameters (``requires_grad=False``) are left out and tied parameters count once.  Groups keep the order in
    which they are given, tensors the order of ``model.named_parameters()``.  Whatever takes a partition also takes the
    name of a constructor that needs nothing but the model, such as ``"by_kind"``.

    Args:
        groups: the name of each group and what is in it: parameters, parameter names, or parts of parameters, given as
            a pair of a parameter and an index into it.
        model: the module whose parameters are split.

    Attributes:
        names: the names of the groups, S of them.
        parameters: the tensors that are split, in the model's order.
        parameter_names: their names in the model.
        labels: for each tensor the number of its group, or an int64 tensor of its shape with a group for each entry.

    Raises:
        ValueError: an entry is in two groups or in none, a name is unknown, a group is empty, or a parameter is frozen.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> partition = Partition({"first": ["0.weight", "0.bias"], "last": ["2.weight", "2.bias"]}, model)
        >>> partition.names, partition.sizes
        (('first', 'last'), (15, 8))
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    parameter_names: tuple[str, ...]
    labels: tuple[Label, ...]

    def __init__(self, groups: Mapping[str, Iterable[str | nn.Parameter | Part]], model: nn.Module) -> None:
        named = trainable_parameters(model)
        self.names = tuple(groups)
        self.parameter_names = tuple(named)
        self.parameters = tuple(named.values())
        every = dict(unwrap(model).named_parameters(remove_duplicate=False))
        self.labels = Assignment(named, every).assign(groups)

    # Builders ---------------------------------------------------------------------------------------------------------

    @classmethod
    def trivial(cls, model: nn.Module) -> Partition:
        """One group with every parameter in it: the step is Cauchy's steepest descent."""
        return cls({"all": list(trainable_parameters(model))}, model)

    @classmethod
    def canonical(cls, model: nn.Module) -> Partition:
        """One group for each tensor, named as in the model."""
        return cls({name: [name] for name in trainable_parameters(model)}, model)

    @classmethod
    def discrete(cls, model: nn.Module) -> Partition:
        """One group for each scalar: the summary is the Hessian itself.  For small models."""
        partition = cls.trivial(model)
        names: list[str] = []
        labels: list[Label] = []
        for name, parameter in zip(partition.parameter_names, partition.parameters, strict=True):
            first = len(names)
            labels.append(torch.arange(first, first + parameter.numel()).view(parameter.shape))
            names += [_entry_name(name, index) for index in _indices(parameter.shape)]
        partition.names, partition.labels = tuple(names), tuple(labels)
        return partition

    @classmethod
    def by_kind(cls, model: nn.Module) -> Partition:
        """Weights, biases and others, such as normalisation scales; kinds that the model lacks are left out."""
        return cls(_gather((kind_of(name, p), name) for name, p in trainable_parameters(model).items()), model)

    @classmethod
    def by_module(cls, model: nn.Module, depth: int | None = None) -> Partition:
        """One group for each submodule, ``depth`` names deep; parameters above that depth are groups by themselves.

        Args:
            model: the module whose parameters are split.
            depth: how many names deep.  Default: 1, or where one submodule has all parameters, such as what a trainer's
                module wraps, as many as it takes to have several groups.

        Raises:
            ValueError: ``depth`` is below 1.
        """
        if depth is not None and depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        names = trainable_parameters(model)
        deepest = max(_owner(name).count(".") for name in names) + 1
        for names_deep in range(1, deepest + 1) if depth is None else [depth]:
            groups = _gather((".".join(_owner(name).split(".")[:names_deep]) or name, name) for name in names)
            if len(groups) > 1:
                break
        return cls(groups, model)

    @classmethod
    def by_optimizer(
        cls, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rest: str = "not trained"
    ) -> Partition:
        """One group for each optimizer, named after its class: what one rate each decides.

        Args:
            model: the module whose parameters are split.
            optimizers: over different parameters.  Classes that are there twice are numbered.
            rest: the name of a last group for what none of them holds; it is left out when nothing remains.

        Raises:
            ValueError: an optimizer holds no trainable parameter of the model.

        Example:
            >>> model = nn.Linear(3, 2)
            >>> optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias])]
            >>> Partition.by_optimizer(model, optimizers).names
            ('SGD', 'Adam')
        """
        kinds = [type(optimizer).__name__ for optimizer in optimizers]
        names = [
            kind if kinds.count(kind) == 1 else f"{kind} {kinds[: place + 1].count(kind)}"
            for place, kind in enumerate(kinds)
        ]
        holder = {
            id(p): name
            for name, optimizer in zip(names, optimizers, strict=True)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        groups: dict[str, list[str]] = {name: [] for name in [*names, rest]}
        for name, parameter in trainable_parameters(model).items():
            groups[holder.get(id(parameter), rest)].append(name)
        for name in names:
            if not groups[name]:
                raise ValueError(f"{name} holds no trainable parameter of this model: make it from model.parameters()")
        return cls({name: members for name, members in groups.items() if members}, model)

    @classmethod
    def chunks(cls, model: nn.Module, count: int) -> Partition:
        """``count`` chunks of consecutive layers, each split into its weights (all but biases) and its biases.

        A layer is a module that owns trainable parameters.  Chunks are as even as can be, the first one the largest.

        Raises:
            ValueError: ``count`` is below 1 or above the number of layers.
        """
        named = trainable_parameters(model)
        layers = list(dict.fromkeys(_owner(name) for name in named))
        if not 1 <= count <= len(layers):
            raise ValueError(f"cannot split {len(layers)} layers into {count} chunks: choose 1 to {len(layers)}")
        chunk_of = {layer: i * count // len(layers) for i, layer in enumerate(layers)}
        pairs = [
            (f"chunk{chunk_of[_owner(name)] + 1}.{'biases' if kind_of(name, p) == 'biases' else 'weights'}", name)
            for name, p in named.items()
        ]
        return cls(_gather(pairs), model)

    @classmethod
    def from_patterns(
        cls, model: nn.Module, patterns: Mapping[str, str | Sequence[str]], rest: str | None = None
    ) -> Partition:
        """Groups by shell-style patterns on parameter names; a parameter goes to the first group that it matches.

        Args:
            model: the module whose parameters are split.
            patterns: the name of each group and its pattern, or several, such as
                ``{"attention": "*.attn.*", "ends": ["embedding.*", "head.*"]}``.
            rest: the name of a last group for what no pattern matches.  It is left out when nothing remains.

        Raises:
            ValueError: a group's patterns match nothing that an earlier one left, or a parameter matches none and
                ``rest`` is not given.
        """
        groups: dict[str, list[str]] = {name: [] for name in patterns}
        left: list[str] = []
        for name in trainable_parameters(model):
            matching = (groups[group] for group, patterns_of in patterns.items() if _matches(name, patterns_of))
            next(matching, left).append(name)
        for group, members in groups.items():
            if not members:
                raise ValueError(
                    f"group {group!r} is empty: {patterns[group]!r} matches no trainable parameter that an "
                    f"earlier pattern left{_why_not_matched(model, patterns[group])}"
                )
        if left and rest is None:
            raise ValueError(f"no pattern matches parameter {left[0]!r}: pass rest='name of a group for what remains'")
        if left and rest is not None:
            groups.setdefault(rest, []).extend(left)
        return cls(groups, model)

    # Parts of architectures -------------------------------------------------------------------------------------------

    @classmethod
    def heads(cls, model: nn.Module, rest: str | None = "rest") -> Partition:
        """One group for each attention head: its queries, keys, values, and its inputs of the output projection.

        Projections may be separate or fused, as those of torch, transformers, diffusers and timm are.  Where several
        heads share keys and values (grouped queries), these are groups by themselves.

        Args:
            model: the module whose parameters are split.
            rest: the name of a last group for everything else; ``None`` makes a group of each other tensor.

        Raises:
            ValueError: there is no attention that is known, or its heads do not divide its projections.

        Example:
            >>> layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)
            >>> Partition.heads(layer).names
            ('self_attn.head0', 'self_attn.head1', 'rest')
        """
        return cls._of_parts(model, architecture.heads, rest)

    @classmethod
    def experts(cls, model: nn.Module, rest: str | None = "rest") -> Partition:
        """One group for each expert of every layer: lists of modules, or stacked weights, named ``experts``.

        Args:
            model: the module whose parameters are split.
            rest: as in :meth:`heads`.

        Raises:
            ValueError: there are none.
        """
        return cls._of_parts(model, architecture.experts, rest)

    @classmethod
    def channels(cls, model: nn.Module, layer: str, rest: str | None = None) -> Partition:
        """One group for each output channel of a layer, with its entry of the bias.

        Args:
            model: the module whose parameters are split.
            layer: the name of a submodule with a weight whose first dimension is that of its outputs; or of a
                transposed convolution.
            rest: as in :meth:`heads`.

        Raises:
            ValueError: the layer has no trainable weight.
        """
        return cls._of_parts(model, lambda own, trainable: architecture.channels(own, layer, trainable), rest)

    @classmethod
    def by_frequency(
        cls, model: nn.Module, table: str, counts: Tensor, bins: int = 4, rest: str | None = None
    ) -> Partition:
        """Groups of the rows of an embedding, of about as many occurrences each, the most frequent rows first.

        Args:
            model: the module whose parameters are split.
            table: the name of the embedding's weight.
            counts: how often each row is looked up, such as ``torch.bincount(tokens, minlength=rows)``.
            bins: how many groups; fewer where single rows are very frequent, and one more for rows without occurrences.
            rest: as in :meth:`heads`.

        Raises:
            ValueError: the table is unknown, or counts do not fit it.
        """
        return cls._of_parts(model, lambda _, trainable: architecture.frequencies(table, counts, bins, trainable), rest)

    @classmethod
    def _of_parts(
        cls, model: nn.Module, find: Callable[[nn.Module, Mapping[str, Tensor]], architecture.Groups], rest: str | None
    ) -> Partition:
        model, trainable = unwrap(model), trainable_parameters(model)
        return cls(architecture.completed(find(model, trainable), trainable, rest), model)

    # Reading ----------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of scalars in each group, S numbers."""
        counts = [0] * len(self)
        for label, parameter in zip(self.labels, self.parameters, strict=True):
            if isinstance(label, int):
                counts[label] += parameter.numel()
            else:
                for group, count in zip(*(t.tolist() for t in label.unique(return_counts=True)), strict=True):
                    counts[group] += count
        return tuple(counts)

    @cached_property
    def groups_of(self) -> tuple[tuple[int, ...], ...]:
        """For each tensor the numbers of the groups that hold some of it, in ascending order."""
        return tuple((label,) if isinstance(label, int) else tuple(label.unique().tolist()) for label in self.labels)

    @property
    def tensors_of(self) -> tuple[tuple[int, ...], ...]:
        """For each group the positions of the tensors that it holds, or holds some of."""
        members: list[list[int]] = [[] for _ in self.names]
        for position, groups in enumerate(self.groups_of):
            for group in groups:
                members[group].append(position)
        return tuple(tuple(m) for m in members)

    @property
    def device(self) -> torch.device:
        """The device of the parameters.

        Raises:
            ValueError: they are on several devices.
        """
        first = self.parameters[0]
        for name, parameter in zip(self.parameter_names, self.parameters, strict=True):
            if parameter.device != first.device:
                raise ValueError(
                    f"parameter {name!r} is on {parameter.device}, {self.parameter_names[0]!r} on {first.device}: "
                    "move the model to one device"
                )
        return first.device

    def check_is_of(self, model: nn.Module) -> None:
        """Raises unless these are parameters of this model, all on one device, and hold something.

        Raises:
            ValueError: a parameter is not the model's, or on another device than the first one, or on ``meta``.
        """
        own = dict(unwrap(model).named_parameters(remove_duplicate=False))
        for name, parameter in zip(self.parameter_names, self.parameters, strict=True):
            if own.get(name) is not parameter:
                raise ValueError(
                    f"parameter {name!r} of the partition is not in this model: make the partition from it"
                )
        if self.device.type == "meta":
            raise ValueError(
                f"parameter {self.parameter_names[0]!r} is on meta, where it holds nothing: model.to_empty(device=…), "
                "and initialise it, or load its weights"
            )

    @property
    def precision(self) -> float:
        """The relative rounding of the parameters' type; of the coarsest one, where there are several."""
        return max(torch.finfo(p.dtype).eps for p in self.parameters)

    def __repr__(self) -> str:
        rows = [("group", "tensors", "scalars")]
        rows += [
            (name, str(len(tensors)), f"{size:,}")
            for name, tensors, size in zip(self.names, self.tensors_of, self.sizes, strict=True)
        ]
        hidden = len(rows) - 1 - _ROWS_SHOWN
        rows = rows[: _ROWS_SHOWN + 1]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"Partition of {sum(self.sizes):,} scalars into {len(self)} group{'s' if len(self) != 1 else ''}"]
        lines += [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        if hidden > 0:
            lines.append(f"  … and {hidden} more")
        return "\n".join(lines)

    # Using ------------------------------------------------------------------------------------------------------------

    def reduce(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The sum of the entries of each group (Iᵀ v): ``tensors`` in parameter order to a vector (S,) in float64.

        ``None`` stands for zeros.  Differentiable.
        """
        return torch.stack(self.sums(tensors))

    def sums(self, tensors: Iterable[Tensor | None]) -> list[Tensor]:
        """What :meth:`reduce` gives, as S scalars.

        Each has a graph of its own: a backward pass from one of them does not run through the graphs of all.
        """
        found: list[list[Tensor]] = [[] for _ in range(len(self))]
        for label, groups, tensor in zip(self.labels, self.groups_of, tensors, strict=True):
            if tensor is None:
                continue
            if isinstance(label, int):
                found[label].append(tensor.sum(dtype=torch.float64))
            else:
                zeros = torch.zeros(len(self), dtype=torch.float64, device=tensor.device)
                parts = zeros.index_add(0, label.to(tensor.device).flatten(), tensor.flatten().to(torch.float64))
                for group in groups:
                    found[group].append(parts[group])
        nothing = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        return [functools.reduce(operator.add, parts) if parts else nothing for parts in found]

    def dot(self, left: Iterable[Tensor | None], right: Iterable[Tensor]) -> list[Tensor]:
        """The inner product of two vectors of parameters, group by group: S scalars.  ``None`` stands for zeros.

        One product of two tensors is there at a time, in single precision at least.  Complex numbers count as pairs of
        real ones.
        """
        return self.sums(
            None if a is None else products(a, b) if isinstance(label, Tensor) else _partial_sums(a, b)
            for label, a, b in zip(self.labels, left, right, strict=True)
        )

    def spread(self, values: Sequence[float]) -> list[float | Tensor]:
        """One number for each group (S) to one factor for each tensor (I v): a number, or a tensor of its shape.

        Args:
            values: S numbers on the host.
        """
        return [
            values[label]
            if isinstance(label, int)
            else torch.tensor(values, dtype=torch.float64)[label.cpu()].to(p.device, p.dtype)
            for label, p in zip(self.labels, self.parameters, strict=True)
        ]

    def param_groups(self) -> list[dict[str, Any]]:
        """The groups as a ``torch.optim.Optimizer`` takes them: dictionaries with ``name`` and ``params``.

        A tensor that is split between groups stands there once, in a group of its own that bears the tensor's name.
        """
        whole: dict[str, list[nn.Parameter]] = {}
        for label, name, parameter in zip(self.labels, self.parameter_names, self.parameters, strict=True):
            whole.setdefault(self.names[label] if isinstance(label, int) else name, []).append(parameter)
        order = {name: i for i, name in enumerate(self.names)}
        return [{"name": name, "params": whole[name]} for name in sorted(whole, key=lambda n: order.get(n, len(order)))]


_BY_NAME: dict[str, Callable[[nn.Module], Partition]] = {
    "trivial": Partition.trivial,
    "canonical": Partition.canonical,
    "discrete": Partition.discrete,
    "by_kind": Partition.by_kind,
    "by_module": Partition.by_module,
    "heads": Partition.heads,
    "experts": Partition.experts,
}


def resolve_partition(
    partition: Partition | str | None,
    model: nn.Module,
    default: Callable[[nn.Module], Partition] = Partition.canonical,
) -> Partition:
    """A partition of a model, given as such or by the name of a constructor that needs nothing but the model.

    Args:
        partition: the partition, its name, or ``None`` for the default.
        model: the model.
        default: makes the default partition.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is something else.
    """
    if partition is None:
        return default(model)
    if isinstance(partition, Partition):
        return partition
    if not isinstance(partition, str):
        raise TypeError(
            f"partition must be a Partition, such as Partition.canonical(model), or one of the names "
            f"{', '.join(_BY_NAME)}; got {type(partition).__name__}"
        )
    if partition not in _BY_NAME:
        raise ValueError(f"unknown partition {partition!r}: choose one of {', '.join(_BY_NAME)}, or make a Partition")
    return _BY_NAME[partition](model)


def default_partition(model: nn.Module) -> Partition:
    """One group for each tensor; by modules, as fine as 100 groups allow, where there are more tensors than that."""
    partition = Partition.canonical(model)
    depth = max(name.count(".") for name in partition.parameter_names)
    while len(partition) > _MOST_GROUPS and depth > 0:
        partition = Partition.by_module(model, depth)
        depth -= 1
    if len(partition) <= _MOST_GROUPS:
        return partition
    layers = {_owner(name) for name in partition.parameter_names}
    return Partition.chunks(model, min(len(layers), _MOST_GROUPS // 2))


def one_for_each(
    optimizers: Sequence[torch.optim.Optimizer], otherwise: Callable[[nn.Module], Partition] = default_partition
) -> Callable[[nn.Module], Partition]:
    """What makes the default partition beside optimizers: of several each has a group; beside one, as otherwise."""
    return (lambda model: Partition.by_optimizer(model, optimizers)) if len(optimizers) > 1 else otherwise


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a name matches a pattern, or one of several."""
    several = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in several)


def _why_not_matched(model: nn.Module, patterns: str | Sequence[str]) -> str:
    """Why patterns match nothing that is trained, where they match the name of something that is frozen, or tied."""
    first: dict[int, str] = {}
    for name, p in unwrap(model).named_parameters(remove_duplicate=False):
        known_as = first.setdefault(id(p), name)
        if _matches(name, patterns) and not p.requires_grad:
            return f"; {name!r} is frozen"
        if _matches(name, patterns) and known_as != name:
            return f"; {name!r} is tied to {known_as!r}, and goes by that name"
    return ""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that require gradients, by name; tied ones once, under their first name.

    Those without entries are left out.

    Raises:
        ValueError: there are none.
    """
    named = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad and p.numel()}
    if not named:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameters: every requires_grad is False, or none exist"
        )
    return named


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself, where ``model`` is what ``torch.compile`` or ``DistributedDataParallel`` made of it.

    Raises:
        TypeError: it is no module, or one whose parameters are hidden.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: pass the model itself, not its parameters"
        )
    if type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError("FullyShardedDataParallel hides a model's parameters: use torch.distributed.fsdp.fully_shard")
    inner = getattr(model, "_orig_mod", None)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = model.module
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def kind_of(name: str, parameter: Tensor) -> str:
    """``"biases"``, ``"weights"`` (two or more dimensions) or ``"others"`` (scales, scalars)."""
    if "bias" in name.rpartition(".")[2]:
        return "biases"
    return "weights" if parameter.dim() >= 2 else "others"


def products(a: Tensor, b: Tensor) -> Tensor:
    """What sums to the inner product of two tensors; complex numbers count as pairs of real ones."""
    if not a.dtype == b.dtype == torch.float32:
        a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))  # half precision has few numbers
    return (a.conj() * b).real if a.is_complex() or b.is_complex() else a * b


PIECE = 1 << 17  # entries that a processor's cache holds: what is made of them is never written to memory


def _partial_sums(a: Tensor, b: Tensor) -> Tensor:
    """What sums to the inner product of two tensors, in whatever pieces."""
    if a.numel() <= 2 * PIECE or a.device.type != "cpu":
        return products(a, b)
    is_plain = all(
        type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.requires_grad for t in (a, b)
    )
    if not is_plain:
        return products(a, b)
    pairs = zip(a.reshape(-1).split(PIECE), b.reshape(-1).split(PIECE), strict=True)
    return torch.stack([products(x, y).sum(dtype=torch.float64) for x, y in pairs])


def _gather(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Pairs of a group and a parameter to a dictionary of lists, in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for group, parameter in pairs:
        groups.setdefault(group, []).append(parameter)
    return groups


def _owner(name: str) -> str:
    """The name of the module that owns a parameter."""
    return name.rpartition(".")[0]


def _indices(shape: torch.Size) -> list[list[int]]:
    """Every index of a tensor of this shape, in memory order."""
    return torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape)).tolist() if shape else [[]]


def _entry_name(name: str, index: list[int]) -> str:
    return f"{name}[{', '.join(map(str, index))}]" if index else name
