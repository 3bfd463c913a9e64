"""The summary of a loss's derivatives according to a partition: plain data (``docs/method.md``, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from newton_summary._checks import check_not_negative
from newton_summary._html import Cell, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMAT = 1


_MOST_SHOWN = 40  # groups whose interactions a notebook shows one by one


@dataclass(frozen=True, eq=False)
class Summary:
    """Derivatives of φ(η) = L(θ + U I η) at η = 0, where I sorts the parameters into S groups and U scales them by u.

    Every entry is the sum, over parameters of the groups that it names, of a derivative of the loss times the
    direction's entries there: in units of the loss (docs/method.md, section 1).  Tensors are float64 and stay on the
    device where they were measured.

    Args:
        loss: the loss L(θ), a scalar.
        gradient: ḡ = φ'(0), shape (S,).
        hessian: H̄ = φ''(0), shape (S, S), symmetric; ``None`` where only the first order was measured.
        third: φ'''(0), shape (S, S, S), or its diagonal alone, shape (S,); ``None`` where it was not measured.
        names: the S names of the groups.  Default: their numbers.
        higher: derivatives of order 4 and up, each in full.
        weight: the number of samples that were averaged: what the summary counts in a sum of summaries.

    Raises:
        ValueError: a shape does not fit the number of groups, two groups have one name, or the weight is negative.

    Example:
        >>> summary = Summary(loss=1.0, gradient=[1.0, 0.5], hessian=[[2.0, 0.1], [0.1, 1.0]], names=["body", "head"])
        >>> summary.merge({"all": ["body", "head"]}).hessian
        tensor([[3.2000]], dtype=torch.float64)
    """

    loss: Tensor
    gradient: Tensor
    hessian: Tensor | None = None
    third: Tensor | None = None
    names: tuple[str, ...] = ()
    higher: tuple[Tensor, ...] = ()
    weight: float = 1.0

    plot: ClassVar[Callable[..., Axes]]
    """``plot(ax=None)``: H̄ as a heatmap, signed; needs the extra ``plots``.  Returns the axes."""

    def __post_init__(self) -> None:
        convert = {name: _double(getattr(self, name)) for name in ("loss", "gradient", "hessian", "third")}
        gradient = convert["gradient"]
        if gradient is None or gradient.dim() != 1:
            got = "None" if gradient is None else f"shape {tuple(gradient.shape)}"
            raise ValueError(f"gradient must be a vector with an entry for each group, got {got}")
        names = tuple(self.names) or tuple(map(str, range(len(gradient))))
        check_not_negative("weight", self.weight)
        own = {"names": names, "higher": tuple(map(_double, self.higher)), "weight": float(self.weight)}
        for name, value in {**convert, **own}.items():
            object.__setattr__(self, name, value)
        _check_shapes(self)

    def __len__(self) -> int:
        return len(self.names)

    def tensor(self, order: int) -> Tensor:
        """The derivative of this order in full, shape (S,) * order.

        Raises:
            ValueError: it was not measured, or only its diagonal was.
        """
        everything = (self.loss, self.gradient, self.hessian, self.third, *self.higher)
        value = everything[order] if 0 <= order < len(everything) else None
        if value is None:
            raise ValueError(f"order {order} was not measured: summarize(..., order={order})")
        if value.dim() != order:
            raise ValueError("only the diagonal of the third order was measured: summarize(..., third='full')")
        return value

    @property
    def third_diagonal(self) -> Tensor | None:
        """The entries D^(3)[s, s, s], shape (S,), or ``None`` where the third order was not measured."""
        if self.third is None or self.third.dim() == 1:
            return self.third
        return torch.einsum("sss->s", self.third)

    # Algebra ----------------------------------------------------------------------------------------------------------

    def __add__(self, other: Summary) -> Summary:
        """The sum of losses over one partition and direction: every derivative adds, and so do the weights."""
        if not isinstance(other, Summary):
            return NotImplemented
        self._check_adds(other)
        sums = {key: value + other._tensors()[key] for key, value in self._tensors().items()}
        return self._with(sums, weight=self.weight + other.weight)

    def _check_adds(self, other: Summary) -> None:
        if self.names != other.names:
            raise ValueError(f"summaries of different groups do not add: {self.names} and {other.names}")
        if len(self._tensors()) != len(other._tensors()) or any(
            a.shape != other._tensors()[key].shape for key, a in self._tensors().items()
        ):
            raise ValueError("summaries of different orders do not add: measure both with the same order and third")

    def __mul__(self, factor: float) -> Summary:
        """The summary of the loss times a number; :meth:`scale` takes one for each group's direction."""
        if not hasattr(factor, "__float__") or getattr(factor, "shape", ()) != ():
            return NotImplemented
        return self._with({key: value * factor for key, value in self._tensors().items()})

    __rmul__ = __mul__

    def __radd__(self, other: object) -> Summary:
        """What Python's ``sum`` begins with: 0 and a summary."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    @staticmethod
    def mean(summaries: Iterable[Summary]) -> Summary:
        """The mean of summaries, each counted by its weight: the summary of a mean loss from those of its batches.

        Raises:
            ValueError: there are none, or all their weights are 0.
        """
        summaries = list(summaries)
        if not summaries:
            raise ValueError("the mean of no summaries is undefined")
        first, *others = summaries
        for other in others:
            first._check_adds(other)
        total = sum(s.weight for s in summaries)
        if not total > 0:
            raise ValueError("the mean of summaries whose weights are all 0 is undefined")
        rows = [
            summary._tensors() for summary in summaries
        ]  # summed as they are: making summaries of them takes longer
        means = {key: rows[0][key] * (first.weight / total) for key in rows[0]}
        for row, other in zip(rows[1:], others, strict=True):
            for key, mean in means.items():
                mean += row[key] * (other.weight / total)
        return first._with(means, weight=total)

    def scale(self, factors: Tensor | Sequence[float]) -> Summary:
        """The summary along a direction scaled by one factor for each group, shape (S,)."""
        a = torch.as_tensor(factors, dtype=torch.float64, device=self.gradient.device)
        if a.shape != self.gradient.shape:
            raise ValueError(f"scale takes {len(self)} factors, one for each group, got shape {tuple(a.shape)}")
        scaled: dict[str, Tensor] = {}
        for key, value in self._tensors().items():
            if key == "third" and value.dim() == 1:
                scaled[key] = value * a**3
                continue
            for axis in range(value.dim()):
                value = value * a.view(-1, *[1] * (value.dim() - 1 - axis))
            scaled[key] = value
        return self._with(scaled)

    def merge(self, groups: Mapping[str, Sequence[str]]) -> Summary:
        """The summary of a coarser partition: entries of merged groups add.

        Args:
            groups: the name of each new group and the names of the old ones in it.  Each old one is in just one.

        Returns:
            A summary with ``len(groups)`` groups.  Where only the diagonal of the third order is known and a new group
            has several old ones, its ``third`` is ``None``: that sum needs the entries off the diagonal.

        Raises:
            ValueError: a group is unknown, missing, or in two new groups; or a new group is empty.
        """
        new: dict[str, int] = {}
        for i, (group, members) in enumerate(groups.items()):
            if not members:
                raise ValueError(f"merged group {group!r} is empty")
            for name in members:
                if name not in self.names:
                    raise ValueError(f"no group is called {name!r}: the groups are {', '.join(self.names)}")
                if name in new:
                    raise ValueError(f"group {name!r} is merged twice")
                new[name] = i
        for name in self.names:
            if name not in new:
                raise ValueError(f"group {name!r} is in none of the merged groups")
        index = torch.tensor([new[name] for name in self.names], device=self.gradient.device)
        merged: dict[str, Tensor] = {}
        for key, value in self._tensors().items():
            if key == "third" and value.dim() == 1 and len(groups) < len(self):
                continue
            for axis in range(value.dim()):
                shape = [*value.shape[:axis], len(groups), *value.shape[axis + 1 :]]
                value = value.new_zeros(shape).index_add(axis, index, value)
            merged[key] = value
        return self._with({"third": None, **merged}, names=tuple(groups))

    # Moving and keeping -----------------------------------------------------------------------------------------------

    def correlations(self) -> Tensor:
        """H̄_ij / √|H̄_ii H̄_jj|, shape (S, S): the interactions of groups, free of the lengths of their directions.

        Beyond ±1 only where H̄ is not positive semidefinite; 0 where a diagonal entry is 0, NaN where one is NaN.
        """
        hessian = self.tensor(2)
        scale = hessian.diagonal().abs().sqrt()
        product = scale * scale[:, None]
        return torch.where(product == 0, 0.0, hessian / product)

    def _repr_html_(self) -> str:
        """A table for notebooks: H̄ as correlations, red where two groups do the same work, blue where they help."""
        small = len(self) <= _MOST_SHOWN
        rows = [[Cell(name), Cell(f"{g:.3g}")] for name, g in zip(self.names, self.gradient.tolist(), strict=True)]
        header = ["group", "slope ḡ"]
        if self.hessian is not None:
            shades = self.correlations().nan_to_num().tolist()
            for i, (row, values) in enumerate(zip(rows, self.hessian.tolist(), strict=True)):
                shown = range(len(self)) if small else [i]
                row += [Cell(f"{values[j]:.3g}", shade=shades[i][j] if small else 0.0) for j in shown]
            header += [f"H̄ {name}" for name in self.names] if small else ["H̄ of it alone"]
        return table(f"Summary of {len(self)} group{'s' * (len(self) != 1)}, loss {float(self.loss):.4g}", header, rows)

    def cpu(self) -> Summary:
        """The same on the host, moved there in one transfer."""
        return self if self.gradient.device.type == "cpu" else self.unpack(self.pack().cpu())

    def pack(self) -> Tensor:
        """Every number in one vector, without names and weight."""
        return torch.cat([value.flatten() for value in self._tensors().values()])

    def unpack(self, packed: Tensor) -> Summary:
        """The inverse of :meth:`pack`: the same groups, orders and weight with other numbers."""
        tensors = self._tensors()
        parts = packed.split([value.numel() for value in tensors.values()])
        return self._with({key: part.view(tensors[key].shape) for key, part in zip(tensors, parts, strict=True)})

    def is_finite(self) -> bool:
        """Whether every number in it is finite."""
        return all(bool(value.isfinite().all()) for value in self.cpu()._tensors().values())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, fit for JSON."""
        values = {key: value.tolist() for key, value in self.cpu()._tensors().items()}
        return {"format": _FORMAT, "names": list(self.names), "weight": self.weight, **values}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Summary:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: the data is of another format.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"not a summary of format {_FORMAT}: it is a {type(data).__name__}")
        if data.get("format") != _FORMAT:
            raise ValueError(f"not a summary of format {_FORMAT}: it has keys {sorted(map(str, data))}")
        higher = sorted((k for k in data if k.startswith("order")), key=lambda k: int(k.removeprefix("order")))
        return Summary(
            **{key: data[key] for key in ("loss", "gradient", "hessian", "third") if key in data},
            names=tuple(data["names"]),
            higher=tuple(data[key] for key in higher),
            weight=data["weight"],
        )

    def save(self, path: str | Path) -> None:
        """Writes the summary to a file that :meth:`load` reads."""
        torch.save({"format": _FORMAT, "names": self.names, "weight": self.weight, **self.cpu()._tensors()}, path)

    @staticmethod
    def load(path: str | Path) -> Summary:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            data = torch.load(path, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch.load raises errors of many kinds for a foreign file
            raise ValueError(f"{path} is not a summary: {error}") from error
        return Summary.from_dict(data)

    def _tensors(self) -> dict[str, Tensor]:
        """What was measured, by the names of :meth:`to_dict`."""
        named = {key: getattr(self, key) for key in ("loss", "gradient", "hessian", "third")}
        named |= {f"order{4 + i}": value for i, value in enumerate(self.higher)}
        return {key: value for key, value in named.items() if value is not None}

    def _with(self, tensors: Mapping[str, Tensor | None], **changes: Any) -> Summary:
        """The same groups and weight, or other ones, with other tensors."""
        higher = tuple(value for key, value in tensors.items() if key.startswith("order"))
        low = {key: value for key, value in tensors.items() if not key.startswith("order")}
        return replace(self, higher=higher, **low, **changes)  # type: ignore[arg-type]


def _double(value: Any) -> Tensor | None:
    """A copy without a graph: what a caller goes on to write into is not the summary's."""
    return None if value is None else torch.as_tensor(value, dtype=torch.float64).detach().clone()


def _check_shapes(summary: Summary) -> None:
    size = len(summary.gradient)
    allowed: dict[str, set[tuple[int, ...]]] = {
        "loss": {()},
        "gradient": {(size,)},
        "hessian": {(size, size)},
        "third": {(size,), (size, size, size)},
        **{f"order{4 + i}": {(size,) * (4 + i)} for i in range(len(summary.higher))},
    }
    for key, value in summary._tensors().items():
        if tuple(value.shape) not in allowed[key]:
            expected = " or ".join(map(str, sorted(allowed[key])))
            raise ValueError(f"{key} has shape {tuple(value.shape)}; {size} groups need {expected}")
    if not all(isinstance(name, str) for name in summary.names):
        raise TypeError(f"the names of groups must be text, got {summary.names}")
    if len(summary.names) != size:
        raise ValueError(f"{len(summary.names)} names for {size} groups")
    if len(set(summary.names)) != size:
        raise ValueError("two groups have the same name")
