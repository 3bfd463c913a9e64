"""Adam's step in the eigenbases of Kronecker factors: SOAP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from newton_summary._checks import check_count, check_fraction
from newton_summary.optim.directions.adam import Adam, Alike, NAdam, begin_memory, for_one_kernel
from newton_summary.optim.directions.base import Groups, State, gradients_of
from newton_summary.parallel.sharding import is_sharded

_FACTORED = (torch.float32, torch.float64)  # dtypes that have matrix decompositions


class Sides(NamedTuple):
    """Which sides of a parameter's matrix have a factor."""

    out: bool
    into: bool


class Keys(NamedTuple):
    """Under which names the factor of a side is remembered, and the basis that it has."""

    factor: str
    basis: str


_TOGETHER = -1.0  # in the place of the size of a step: of those that one kernel finds
_LARGE = 1 << 15  # entries
_OUT, _INTO = Keys("factor_out", "basis_out"), Keys("factor_into", "basis_into")


class SOAP(NAdam):
    """NAdam in bases that decorrelate the gradient (Vyas et al. 2024, arXiv:2409.11321).

    A parameter is a matrix G of its first axis by all others.  Moving averages of G Gᵀ and Gᵀ G are its Kronecker
    factors (Gupta et al. 2018, arXiv:1802.09568), and Q_L, Q_R their eigenvectors.  NAdam works on Q_Lᵀ G Q_R, and what
    it gives is turned back.  Every few steps the bases follow the factors, by one step of orthogonal iteration from
    the old basis, and the mean and the squares turn with them.  A side without a factor has the identity for its
    basis; with none on either side, which is what vectors have, it is NAdam.

    A side of n costs 2 n² numbers of memory, and about 6.5 n² multiply-adds a step for each entry of the other side.

    Args:
        betas: the momenta of the gradient and of its square, each in [0, 1).
        eps: ε, in units of the gradient.
        factor_beta: the share of the past in the factors.
        refresh_every: the number of steps from one refresh of the bases to the next.
        largest: the longest side with a factor.
        sides: which sides have factors, for each parameter.  Default: all up to ``largest`` of what has two axes or
            more.  It is asked at a parameter's first step; later ones go on with what it has.  A parameter in half
            precision, a complex one, and one that is sharded over processes have none.

    Attributes:
        sides: as given.
    """

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        factor_beta: float = 0.95,
        refresh_every: int = 10,
        largest: int = 1024,
        sides: Mapping[Tensor, Sides] | None = None,
    ) -> None:
        super().__init__(betas, eps)
        check_fraction("factor_beta", factor_beta)
        check_count("refresh_every", refresh_every)
        check_count("largest", largest)
        self.factor_beta, self.refresh_every, self.largest = factor_beta, refresh_every, largest
        self.sides = sides

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """New tensors."""
        result: dict[Tensor, Tensor] = {}
        for alike, parameters, memories in for_one_kernel(groups, state, self._begin):
            result.update(zip(parameters, self._steps(parameters, memories, alike), strict=True))
        return result

    def descend(self, groups: Groups, state: State, sizes: Mapping[Tensor, float]) -> None:
        """θ ← θ − size · u, as with the u of :meth:`update`, but without tensors for u where they would be large."""

        def size_of_kernel(p: Tensor, memory: dict[str, Any]) -> float:
            is_alone = p.numel() >= _LARGE and not _is_factored(memory)  # a tensor for its step would take longer
            return sizes[p] if is_alone else _TOGETHER

        for alike, parameters, memories in for_one_kernel(groups, state, self._begin, size_of_kernel):
            if alike.size != _TOGETHER:
                self.descend_alike(parameters, memories, alike)
                continue
            for p, step in zip(parameters, self._steps(parameters, memories, alike), strict=True):
                p.sub_(step, alpha=sizes[p])

    def _steps(self, parameters: list[Tensor], memories: list[dict[str, Any]], alike: Alike) -> list[Tensor]:
        """The directions of parameters that one kernel can move."""
        gradients = gradients_of(parameters)
        factored = [number for number, memory in enumerate(memories) if _is_factored(memory)]
        for number in factored:
            gradients[number] = self._observe(gradients[number], memories[number])
        steps = self.directions(gradients, memories, alike)
        for number in factored:
            step, shape = _back(steps[number], memories[number]), parameters[number].shape
            steps[number] = step if len(shape) == 2 else step.view(shape)
            if alike.step % self.refresh_every == 0:
                _refresh(memories[number])
        return steps

    def sides_of(self, parameter: Tensor) -> Sides:
        """Which sides of a parameter have factors."""
        if parameter.dim() < 2 or parameter.numel() == 0 or parameter.dtype not in _FACTORED or is_sharded(parameter):
            return Sides(False, False)
        if self.sides is not None:
            return self.sides.get(parameter, Sides(False, False))
        return Sides(*(1 < n <= self.largest for n in matrix_shape(parameter)))

    def _begin(self, parameter: Tensor, memory: dict[str, Any]) -> None:
        """An empty memory: a matrix in the eigenbases where a side has a factor, else as Adam's."""
        sides = self.sides_of(parameter)
        if not any(sides):
            begin_memory(parameter, memory)
            return
        begin_memory(parameter.new_empty(matrix_shape(parameter)), memory)
        for keys, has_factor, length in zip((_OUT, _INTO), sides, matrix_shape(parameter), strict=True):
            if has_factor:
                memory[keys.factor] = parameter.new_zeros((length, length))

    def _observe(self, gradient: Tensor, memory: dict[str, Any]) -> Tensor:
        """Takes a gradient into the factors, and turns it into their bases."""
        matrix = turned = gradient if gradient.dim() == 2 else gradient.reshape(memory["exp_avg"].shape)
        transposed = matrix.T
        if _OUT.factor in memory:
            self._take_in(memory, _OUT, matrix, transposed)
            turned = torch.mm(memory[_OUT.basis].T, turned)
        if _INTO.factor in memory:
            self._take_in(memory, _INTO, transposed, matrix)
            turned = torch.mm(turned, memory[_INTO.basis])
        return turned

    def _take_in(self, memory: dict[str, Any], keys: Keys, left: Tensor, right: Tensor) -> None:
        """Takes a product of two matrices into a factor, whose first one tells its basis."""
        if keys.basis in memory:
            memory[keys.factor].addmm_(left, right, beta=self.factor_beta, alpha=1 - self.factor_beta)
        else:
            memory[keys.basis] = _eigenvectors(torch.mm(left, right, out=memory[keys.factor]))


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """The first axis, and all others together."""
    return parameter.shape[0], parameter[0].numel()


def _is_factored(memory: dict[str, Any]) -> bool:
    return _OUT.factor in memory or _INTO.factor in memory


def _eigenvectors(factor: Tensor) -> Tensor:
    """The columns that diagonalise a factor, the largest eigenvalues first, and the largest entry of each positive.

    Where the gradient has not been, all eigenvalues are 0, and rounding would choose among the bases; a little that
    differs from entry to entry chooses the one nearest to the entries themselves.
    """
    ramp = torch.linspace(1, 0, len(factor), dtype=torch.float32).to(factor)
    factor = (factor + torch.diag(_little(factor) * ramp)).nan_to_num()
    found: Tensor
    try:
        found = torch.linalg.eigh(factor)[1]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # single precision, where most of them are 0
        found = torch.linalg.eigh(factor.double())[1].to(factor.dtype)
    found = found.flip(1)
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    return (found * largest.sign()).contiguous()


def _little(factor: Tensor) -> Tensor:
    """An eigenvalue that is next to nothing, and far above rounding."""
    return math.sqrt(torch.finfo(factor.dtype).eps) * factor.diagonal().mean()


def _back(step: Tensor, memory: dict[str, Any]) -> Tensor:
    """From the bases to where the parameter is."""
    if _OUT.basis in memory:
        step = torch.mm(memory[_OUT.basis], step)
    return torch.mm(step, memory[_INTO.basis].T) if _INTO.basis in memory else step


def _refresh(memory: dict[str, Any]) -> None:
    """One step of orthogonal iteration, L Q = Q' R, with columns in the order of their eigenvalues.

    A little is added to all eigenvalues: where the gradient has not been, the basis stays as it is.
    The mean is turned with the basis; the squares, which have no direction, are only put in that order.

    What fades away, such as all that a unit that died has left, is set to 0 in time: products with subnormal numbers
    take a processor many times as long.
    """
    limits = torch.finfo(memory["exp_avg"].dtype)
    nothing = limits.tiny / limits.eps  # what fades from above that is no subnormal number at the next refresh
    for axis, keys in enumerate((_OUT, _INTO)):
        basis = memory.get(keys.basis)
        if basis is None:
            continue
        factor = memory[keys.factor] = functional.hardshrink(memory[keys.factor], nothing)
        image = (factor @ basis).addcmul_(basis, _little(factor))
        order = (basis * image).sum(0).argsort(descending=True)
        refreshed = torch.linalg.qr(image.index_select(1, order))[0]
        refreshed = functional.hardshrink(refreshed, limits.eps**2).contiguous()  # far below the rounding of a column
        turn = basis.T @ refreshed
        mean = memory["exp_avg"]
        memory["exp_avg"] = functional.hardshrink(turn.T @ mean if axis == 0 else mean @ turn, nothing)
        memory["exp_avg_sq"] = memory["exp_avg_sq"].index_select(axis, order)
        memory[keys.basis] = refreshed


def descends(direction: object) -> TypeGuard[Adam]:
    """Whether a direction can take its step by itself, in fewer kernels; a subclass that gives another one cannot."""
    return isinstance(direction, Adam) and type(direction).update in (Adam.update, SOAP.update)
