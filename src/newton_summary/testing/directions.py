"""A direction against its contract: what it may read, what it must leave alone, and that it can be resumed."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from newton_summary.optim import NewtonSummary
from newton_summary.optim.directions import Direction, Groups, State, resolve

MakeDirection: TypeAlias = Callable[[list[nn.Parameter]], str | torch.optim.Optimizer | Direction]

_MEMBERS = ("defaults", "update", "unit", "state_dict", "load_state_dict")
_STEPS = 6


def check_direction(make: MakeDirection, *, seed: int = 0) -> None:
    """Holds a direction to its contract (:class:`~newton_summary.optim.directions.Direction`), in float32 and float64.

    - ``update`` gives one finite tensor for each parameter that has a gradient, and none for others, in the
      parameter's shape, type and device; it does not depend on how parameters are grouped.
    - It changes neither parameters nor gradients.
    - A successor that is given its state goes on bit for bit, after a checkpoint as ``torch.save`` writes it.
    - ``unit`` is a positive number.
    - A training with :class:`~newton_summary.NewtonSummary` along it, cut in two by a checkpoint, ends where one in
      one piece does.

    Args:
        make: makes the direction for a list of parameters, or whatever ``direction=`` takes.
        seed: fixes parameters and gradients.

    Raises:
        AssertionError: one of these does not hold; it says which.

    Example:
        >>> from newton_summary.optim.directions import Momentum
        >>> check_direction(lambda parameters: Momentum(0.5))
        >>> check_direction(lambda parameters: torch.optim.RMSprop(parameters, lr=0.01))
    """
    for dtype in (torch.float32, torch.float64):
        _check_members(resolve(make(_parameters(dtype, seed))))
        _check_updates(make, dtype, seed)
        _check_grouping(make, dtype, seed)
        _check_successor(make, dtype, seed)
    _check_training(make, seed)


class _Run:
    """A direction at work on a few parameters and random gradients, some of which are missing."""

    def __init__(self, make: MakeDirection, dtype: torch.dtype, seed: int, together: bool = False) -> None:
        self.parameters = _parameters(dtype, seed)
        self.direction = resolve(make(self.parameters))
        self.state: State = defaultdict(dict)
        members = [self.parameters] if together else [[p] for p in self.parameters]
        self.groups: Groups = [{"params": held, **self.direction.defaults} for held in members]
        self.generator = torch.Generator().manual_seed(seed + 1)

    def draw(self, number: int) -> None:
        """New gradients: the last parameter has none at first, the first one now and then, and none has in the 3rd."""
        for i, p in enumerate(self.parameters):
            new = torch.randn(p.shape, generator=self.generator, dtype=torch.float64).to(p.dtype)
            absent = number == 2 or (i == len(self.parameters) - 1 and number < 2) or (i == 0 and number == 4)
            p.grad = None if absent else new

    @torch.no_grad()
    def update(self) -> list[Tensor | None]:
        u = self.direction.update(self.groups, self.state)
        return [u[p].clone() if p in u else None for p in self.parameters]


def _check_members(direction: Direction) -> None:
    for member in _MEMBERS:
        _require(hasattr(direction, member), f"{type(direction).__name__} has no {member}")
    _require(isinstance(direction.defaults, dict), f"defaults must be a dictionary, got {direction.defaults!r}")


def _check_updates(make: MakeDirection, dtype: torch.dtype, seed: int) -> None:
    """What comes out of ``update``, and what it leaves alone."""
    run = _Run(make, dtype, seed)
    for number in range(_STEPS):
        run.draw(number)
        values = [p.detach().clone() for p in run.parameters]
        gradients = [None if p.grad is None else p.grad.clone() for p in run.parameters]
        with torch.no_grad():
            u = run.direction.update(run.groups, run.state)
        held = {id(p) for p in run.parameters}
        _require(all(id(p) in held for p in u), "update gave a direction for what is no parameter")
        for p, value, gradient in zip(run.parameters, values, gradients, strict=True):
            what = f"parameter of shape {tuple(p.shape)}"
            _require(torch.equal(p.detach(), value), f"update changed a {what}")
            unchanged = p.grad is None if gradient is None else p.grad is not None and torch.equal(p.grad, gradient)
            _require(unchanged, f"update changed the gradient of a {what}")
            _require((p in u) == (gradient is not None), f"a {what} {_wrong_presence(gradient)}")
            if p in u:
                _check_tensor(u[p], p, what)
            unit = run.direction.unit(p)
            _require(0 < unit < float("inf"), f"the unit of a {what} is {unit}: it must be positive")


def _wrong_presence(gradient: Tensor | None) -> str:
    return "without a gradient got a direction" if gradient is None else "with a gradient got no direction"


def _check_tensor(u: Tensor, p: nn.Parameter, what: str) -> None:
    same = u.shape == p.shape and u.dtype == p.dtype and u.device == p.device
    _require(
        same,
        f"the direction of a {what}, {p.dtype} on {p.device}, is {u.dtype} of shape {tuple(u.shape)} on {u.device}",
    )
    _require(not u.requires_grad, f"the direction of a {what} requires gradients: detach it")
    _require(bool(u.isfinite().all()), f"the direction of a {what} is not finite, though the gradients are")
    _require(u.data_ptr() != p.data_ptr(), f"the direction of a {what} is the parameter itself: give a copy")


def _check_grouping(make: MakeDirection, dtype: torch.dtype, seed: int) -> None:
    """Parameters in one group have the directions that they have in groups of their own."""
    apart, together = (_Run(make, dtype, seed, together) for together in (False, True))
    for number in range(_STEPS):
        apart.draw(number)
        together.draw(number)
        _require(_equal(apart.update(), together.update()), "the direction depends on how parameters are grouped")


def _check_successor(make: MakeDirection, dtype: torch.dtype, seed: int) -> None:
    """A direction made anew, with the state of the first, goes on as that does."""
    first, second = (_Run(make, dtype, seed) for _ in range(2))
    for number in range(_STEPS):
        first.draw(number)
        second.draw(number)
        expected = first.update()
        if number >= _STEPS // 2:
            what = f"a successor with the state of step {number} gives other directions: keep all memory in it"
            _require(_equal(second.update(), expected), what)
        if number == _STEPS // 2 - 1:
            second.direction.load_state_dict(_checkpoint(first.direction.state_dict()))
            states = _checkpoint([first.state.get(p, {}) for p in first.parameters])
            second.state = defaultdict(dict, dict(zip(second.parameters, states, strict=True)))


def _check_training(make: MakeDirection, seed: int) -> None:
    """The optimizer along this direction, in one piece and cut in two by a checkpoint."""
    whole, _ = _train(make, seed, steps=range(_STEPS))
    half, state = _train(make, seed, steps=range(_STEPS // 2))
    resumed, _ = _train(make, seed, steps=range(_STEPS // 2, _STEPS), start=(half, state))
    same = all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    _require(same, "a training that was resumed from a checkpoint ends elsewhere: keep all memory in the state")


def _train(
    make: MakeDirection, seed: int, steps: Iterable[int], start: tuple[list[Tensor], Any] | None = None
) -> tuple[list[Tensor], Any]:
    """Parameters and the optimizer's state after some steps."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    parameters = list(model.parameters())
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(torch.randn(p.shape, generator=generator) / 2 if start is None else start[0][i])
    generator.manual_seed(seed + 1)
    batches = [torch.randn(8, 5, generator=generator) for _ in range(_STEPS)]

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        result: Tensor = (model(batch[:, :3]) - batch[:, 3:]).square().mean()
        return result

    optimizer = NewtonSummary(model, loss_fn, curvature_data=batches, direction=make(parameters), every=2)
    if start is not None:
        optimizer.load_state_dict(start[1])
    for number in steps:
        optimizer.zero_grad()
        loss_fn(model, batches[number]).backward()
        optimizer.step()
    return [p.detach().clone() for p in parameters], _checkpoint(optimizer.state_dict())


def _parameters(dtype: torch.dtype, seed: int) -> list[nn.Parameter]:
    """Of several shapes, one of them not contiguous and one a scalar."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [nn.Parameter(t) for t in (normal(3, 2), normal(2, 4).t(), normal(5), normal())]


def _checkpoint(state: Any) -> Any:
    """A state as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _equal(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _require(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)
