"""Parts of architectures as groups: attention heads, experts, output channels, rows of an embedding by frequency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Groups: TypeAlias = dict[str, list[Any]]
"""The name of each group and its parts: parameter names, or pairs of one and an index."""

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
_FUSED = ("in_proj", "c_attn", "qkv_proj", "qkv", "Wqkv", "query_key_value")
_INTERLEAVED = ("query_key_value",)  # queries, keys and values of one head lie together
_INTERLEAVED_IN = ("GPTBigCodeAttention", "MiniMaxLightningAttention")  # modules where they do, whatever the name
_OF_NO_KNOWN_ORDER = ("CodeGenAttention",)  # queries, values and keys of a quarter of the heads lie together
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "out_lin", "to_out.0", "Wo", "proj", "dense", "o")
_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


@dataclass(frozen=True)
class _Projection:
    """A linear layer, of which some outputs or inputs belong to a head.

    Args:
        weight: the name of its weight.
        bias: the name of its bias.
        shape: that of the weight.
        is_transposed: whether the weight's first dimension is that of the inputs.
    """

    weight: str
    bias: str
    shape: tuple[int, ...]
    is_transposed: bool

    @property
    def outputs(self) -> int:
        return self.shape[1] if self.is_transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[0] if self.is_transposed else self.shape[1]

    def parts(self, some: slice, outputs: bool = True) -> list[Any]:
        """What belongs to some of its outputs, or of its inputs."""
        along_first = outputs != self.is_transposed
        weight = (self.weight, some if along_first else (slice(None), some))
        return [weight, (self.bias, some)] if outputs else [weight]


def heads(model: nn.Module, trainable: Mapping[str, Tensor]) -> Groups:
    """A group for each attention head: its queries, keys, values, and its columns of the output projection.

    Where several heads share keys and values (grouped queries), these are groups by themselves.

    Args:
        model: the module that is looked through.
        trainable: the parameters that groups may hold, by name.

    Raises:
        ValueError: there is no attention that is known, or its heads do not divide its projections.
    """
    groups: Groups = {}
    for name, module in model.named_modules():
        for group, parts in _heads_of(model, name, module):
            held = [part for part in parts if part[0] in trainable]
            if held:
                groups.setdefault(group, []).extend(held)
    if not groups:
        known = ", ".join((*_FUSED, *("/".join(names) for names in _SEPARATE)))
        raise ValueError(
            f"{type(model).__name__} has no attention whose projections are known ({known}): name each head's parts "
            "in Partition(groups, model)"
        )
    return groups


def _heads_of(model: nn.Module, name: str, module: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """The groups of one attention module, part by part; nothing for other modules."""
    path = f"{name}." if name else ""
    separate = next((names for names in _SEPARATE if all(_linear(module, n) for n in names)), None)
    fused = next((n for n in _FUSED if _linear(module, n)), None)
    if separate is None and fused is None:
        return
    output = next((p for n in _OUTPUTS if (p := _projection(module, path, n))), None)
    if output is None:  # BERT's lies beside
        outer = name.rpartition(".")[0]
        beside = model.get_submodule(outer)
        output = _projection(beside, f"{outer}." if outer else "", "output.dense")
    if separate is not None:
        projections = [p for n in separate if (p := _projection(module, path, n))]
        queries, keys = projections[0].outputs, projections[1].outputs
    else:
        assert fused is not None
        one = _projection(module, path, fused)
        assert one is not None
        projections = [one] * 3
        queries = one.outputs // 3 if output is None else output.inputs
        keys = (one.outputs - queries) // 2
    kind_of_module = type(module).__name__
    width, told = _width(module, queries), name or kind_of_module
    if not width or queries % width or keys % width:
        raise ValueError(f"{told}: {queries} outputs for queries and {keys} for keys are not a whole number of heads")
    is_shared = keys != queries
    interleaves = fused in _INTERLEAVED or (kind_of_module in _INTERLEAVED_IN and not is_shared)
    if kind_of_module in _OF_NO_KNOWN_ORDER or (is_shared and interleaves):
        whose = "where heads share keys and values" if is_shared else f"in a {kind_of_module}"
        raise ValueError(
            f"{told}: {whose}, {fused} has no order that is known: name each head's parts in Partition(groups, model)"
        )
    for number, (projection, rows) in enumerate(zip(projections, (queries, keys, keys), strict=True)):
        for head in range(rows // width):
            start = head * width
            if interleaves:
                start = (3 * head + number) * width
            elif fused is not None:
                start += (0, queries, queries + keys)[number]
            kind = "kv" if is_shared and number else "head"
            yield f"{path}{kind}{head}", projection.parts(slice(start, start + width))
    if output is not None:
        for head in range(queries // width):
            yield f"{path}head{head}", output.parts(slice(head * width, (head + 1) * width), outputs=False)


def _linear(module: nn.Module, name: str) -> bool:
    return _projection(module, "", name) is not None


def _projection(module: nn.Module, path: str, name: str) -> _Projection | None:
    """A linear layer by its name within a module, if there is one."""
    if name == "in_proj":  # torch's own attention holds it itself
        weight = module._parameters.get("in_proj_weight")
        if weight is None:
            return None
        return _Projection(f"{path}in_proj_weight", f"{path}in_proj_bias", tuple(weight.shape), False)
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return None
    weight = layer._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    return _Projection(
        f"{path}{name}.weight", f"{path}{name}.bias", tuple(weight.shape), type(layer).__name__ == "Conv1D"
    )


def _width(module: nn.Module, queries: int) -> int | None:
    """The width of a head, as an attention module or its configuration says it."""
    for holder in (module, getattr(module, "config", None)):
        for name in _WIDTHS:
            if isinstance(width := getattr(holder, name, None), int):
                return width
        for name in _COUNTS:
            if isinstance(count := getattr(holder, name, None), int) and count > 0:
                return None if queries % count else queries // count
    return None


def experts(model: nn.Module, trainable: Mapping[str, Tensor]) -> Groups:
    """A group for each expert of every layer: of modules named ``experts`` that are lists, or hold stacked weights.

    Raises:
        ValueError: there are none.
    """
    groups: Groups = {}
    for name, parameter in trainable.items():
        before, found, after = f".{name}".rpartition(".experts.")
        if not found:
            continue
        path, first = f"{before}.experts".lstrip("."), after.split(".")[0]
        if first.isdigit():
            groups.setdefault(f"{path}.{first}", []).append(name)
        elif parameter.dim() > 1:
            for expert in range(len(parameter)):
                groups.setdefault(f"{path}.{expert}", []).append((name, expert))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameters below a module named 'experts'")
    return groups


def channels(model: nn.Module, layer: str, trainable: Mapping[str, Tensor]) -> Groups:
    """A group for each output of a layer: a slice of its weight along the first dimension, and an entry of its bias.

    A transposed convolution has its outputs along the second one, those of each of its groups in rows of their own.

    Raises:
        ValueError: the layer has no trainable weight.
    """
    weight = trainable.get(f"{layer}.weight")
    if weight is None:
        raise ValueError(f"no trainable weight {f'{layer}.weight'!r}: give the name of a layer that has one")
    names = [f"{layer}.weight", *([f"{layer}.bias"] if f"{layer}.bias" in trainable else [])]
    module = dict(model.named_modules()).get(layer)
    if not isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return {f"{layer}.channel{i}": [(name, i) for name in names] for i in range(len(weight))}
    rows, outputs = len(weight) // module.groups, weight.shape[1]
    groups: Groups = {}
    for i in range(module.groups * outputs):
        start = i // outputs * rows
        place = (slice(start, start + rows), i % outputs)
        groups[f"{layer}.channel{i}"] = [(names[0], place), *((name, i) for name in names[1:])]
    return groups


def frequencies(table: str, counts: Tensor, bins: int, trainable: Mapping[str, Tensor]) -> Groups:
    """Groups of the rows of a table, of about as many occurrences each, the most frequent rows first.

    Rows that never occur are a group by themselves.

    Raises:
        ValueError: the table is unknown, there is not one count for each row, or all counts are zero.
    """
    weight = trainable.get(table)
    if weight is None:
        meant = f"{table}.weight"
        raise ValueError(f"no trainable parameter {table!r}{f': is it {meant!r}?' * (meant in trainable)}")
    counts = torch.as_tensor(counts)  # or a list, or numpy's
    if counts.shape != weight.shape[:1]:
        raise ValueError(f"{table!r} has {len(weight)} rows, but counts have shape {tuple(counts.shape)}")
    counts = counts.double().cpu()
    total = float(counts.sum())
    if not (0 < total < float("inf") and (counts >= 0).all() and bins >= 1):
        raise ValueError(
            f"counts must not be negative nor all zero, and bins be at least 1; got a sum of {total} and {bins} bins"
        )
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    number = (before / total * bins).long().clamp(max=bins - 1)
    groups: Groups = {}
    for rank in number[counts[order] > 0].unique().tolist():
        rows = order[(number == rank) & (counts[order] > 0)]
        groups[f"{table}.frequency{len(groups) + 1}"] = [(table, torch.sort(rows).values)]
    unseen = (counts == 0).nonzero().flatten()
    if len(unseen):
        groups[f"{table}.unseen"] = [(table, unseen)]
    return groups


def completed(groups: Groups, trainable: Mapping[str, Tensor], rest: str | None) -> Groups:
    """The same with what no group holds: one more group of this name, or one for each tensor."""
    held = {part if isinstance(part, str) else part[0] for parts in groups.values() for part in parts}
    left = [name for name in trainable if name not in held]
    if rest is None:
        return groups | {name: [name] for name in left}
    return groups | ({rest: [*groups.get(rest, []), *left]} if left else {})
