"""Tensors whose memory is there only while operations look at it, one block of them at a time.

Where a model's parameters are spread over processes, a measurement is given whole ones without memory.  Every operation
of torch passes by here, forward, backward and in the rules of the engine alike: before one that looks at a tensor of a
block, or at a view of it, runs, the block is fetched, and what was fetched before is freed.  A freed tensor keeps its
identity, its shape and its views, so that nobody else has to know.

To fetch is to ask all processes for their parts.  They need not want the same at the same time: what one measures may
take another branch, or be checked once more.  So each says at every turn what it wants, or that it wants nothing for
now, and all give their parts of everything that anyone wants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from typing_extensions import override

from newton_summary._effects import effects_of

_PLAIN = (Tensor, nn.Parameter)
_NOTHING = -1  # what a process wants that needs no block for now


class Page:
    """A whole tensor that has memory only at times.

    Args:
        like: a tensor of its shape, type and device.
        part: what this process has of what it holds.
        gather: makes the whole of everyone's part; a collective.
        cut: of a tensor of its shape, a copy of the part that this process keeps.

    Attributes:
        whole: the tensor.
        cut: as given.
    """

    def __init__(
        self, like: Tensor, part: Tensor, gather: Callable[[Tensor], Tensor], cut: Callable[[Tensor], Tensor]
    ) -> None:
        self._part, self._gather, self.cut = part, gather, cut
        self._moved: Tensor | None = None
        self.whole = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._size = self.whole.untyped_storage().nbytes()
        self._seen = self.whole.data  # the same memory, and a version of its own: to be fetched is no change
        self.free()

    @property
    def memory(self) -> int:
        """What the tensor and all views of it have in common."""
        key: int = self.whole.untyped_storage()._cdata
        return key

    def fill(self, keep: bool) -> None:
        """Fetches what the tensor holds; for others alone, where it is not kept."""
        content = self._gather(self._part if self._moved is None else self._moved)
        if keep:
            self.whole.untyped_storage().resize_(self._size)
            self._seen.copy_(content)

    def keep_part(self) -> None:
        """Keeps this process's part of what was written into the tensor."""
        self._moved = self.cut(self.whole)

    def forget(self) -> None:
        """Goes back to what it held before that."""
        self._moved = None

    def free(self) -> None:
        """Gives the memory back."""
        self.whole.untyped_storage().resize_(0)


@dataclass
class Block:
    """Tensors that come and go together.

    Attributes:
        pages: the tensors.
        lane: blocks of one lane are there one at a time; parameters have one, their direction another.
        is_here: whether they have memory.
        is_written: whether something was written into them: they stay, unless all processes write the same.
    """

    pages: Sequence[Page]
    lane: str
    is_here: bool = field(default=False, init=False)
    is_written: bool = field(default=False, init=False)


class Pages(TorchDispatchMode):
    """A block of code in which tensors have memory while they are looked at.

    Args:
        blocks: the same in every process, in the same order.
        exchange: gives what all processes want, of what this one wants; all must call it, and wait for each other.
    """

    supports_higher_order_operators = True

    @classmethod
    @override
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first use imports torch's compiler, which takes a second

    def __init__(self, blocks: Sequence[Block], exchange: Callable[[int], Sequence[int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocks = blocks
        self._exchange = exchange
        self._is_broken = False
        self._are_moving = self._may_move = False
        self._number = {page.memory: n for n, block in enumerate(blocks) for page in block.pages}
        self._page = {page.memory: page for block in blocks for page in block.pages}

    @override
    def __enter__(self) -> Pages:
        self._token = _CURRENT.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _CURRENT.reset(self._token)
        try:
            self.settle()
        finally:
            for block in self.blocks:
                self._free(block)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _LOOK_AT_NOTHING:
            numbers = list(dict.fromkeys(self._numbers_of((*args, *kwargs.values()))))
            if len(numbers) > 1 and _is_for_each(func) and len(args[0]) > 1:
                return self._for_each(func, types, args, kwargs)
            if numbers:
                with torch.no_grad():
                    self._need(numbers)
                for number in self._numbers_of(effects_of(func).written(args, kwargs)):
                    self.blocks[number].is_written = True
        return func(*args, **kwargs)

    def _for_each(self, func: Any, types: Any, args: Sequence[Any], kwargs: Any) -> Any:
        """Takes an operation on many tensors one tensor at a time."""
        count = len(args[0])
        results: list[Any] = []
        for n in range(count):
            own = [a[n : n + 1] if isinstance(a, list | tuple) and len(a) == count else a for a in args]
            results += self.__torch_dispatch__(func, types, tuple(own), kwargs) or ()
        return results or None

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """A block in which all processes write the same into tensors, part by part; then these hold what they held."""
        self.settle()
        self._are_moving = self._may_move = True
        try:
            yield
        finally:
            self.settle()
            self._are_moving = self._may_move = False
            for block in self.blocks:
                if block.is_written:
                    block.is_written = False
                    self._free(block)
                for page in block.pages:
                    page.forget()

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """A block within :meth:`moving` in which what is written is this process's own affair: a loss is evaluated."""
        if not self._may_move:
            yield
            return
        self.settle()
        for block in self.blocks:
            self._keep_parts(block)
        self._are_moving = False
        try:
            yield
        finally:
            self.settle()
            self._are_moving = True

    def settle(self) -> None:
        """Gives this process's parts to the others until no one wants any: before they tell each other other things."""
        while not self._is_broken and self._serve(_NOTHING):
            pass

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor looks at one that comes and goes."""
        return tensor.untyped_storage()._cdata in self._number

    def part_of(self, tensor: Tensor, value: Tensor) -> Tensor:
        """This process's part of a value of a tensor's shape, such as a gradient; all of it, where the tensor stays."""
        page = self._page.get(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else None
        return value if page is None or value.layout is not torch.strided else page.cut(value)

    def _numbers_of(self, values: Any) -> Iterator[int]:
        """The blocks that some arguments look at."""
        for value in values:
            if type(value) in _PLAIN:
                if value.layout is torch.strided:
                    number = self._number.get(value.untyped_storage()._cdata)
                    if number is not None:
                        yield number
            elif isinstance(value, list | tuple):
                yield from self._numbers_of(value)

    def _need(self, numbers: Sequence[int]) -> None:
        """Makes these blocks be here, and others of their lanes not."""
        for number in numbers:
            if self.blocks[number].is_here:
                continue
            for other, block in enumerate(self.blocks):
                if block.lane == self.blocks[number].lane and other not in numbers:
                    self._keep_parts(block)
                    if not block.is_written:
                        self._free(block)
            while not self.blocks[number].is_here:
                self._serve(number)

    def _serve(self, wanted: int) -> bool:
        """One turn; whether any process wants something."""
        is_watching = _get_current_dispatch_mode() is self
        try:
            with _pop_mode_temporarily() if is_watching else contextlib.nullcontext():  # collectives are not its affair
                wishes = self._exchanged(wanted)
        except BaseException:
            self._is_broken = True
            raise
        if wanted in wishes:
            self.blocks[wanted].is_here = True
        return bool(wishes)

    def _exchanged(self, wanted: int) -> list[int]:
        """What any process wants, now that all have given their parts of it."""
        wishes = sorted({number for number in self._exchange(wanted) if number != _NOTHING})
        for number in wishes:
            self._keep_parts(self.blocks[number])
            for page in self.blocks[number].pages:
                page.fill(keep=number == wanted)
        return wishes

    def _keep_parts(self, block: Block) -> None:
        """Keeps of what was written what this process keeps of tensors, where the others do likewise."""
        if block.is_written and self._are_moving:
            for page in block.pages:
                page.keep_part()
            block.is_written = False

    @staticmethod
    def _free(block: Block) -> None:
        if block.is_here:
            for page in block.pages:
                page.free()
        block.is_here = False


def settle() -> None:
    """What every process does before it tells the others anything else: see :meth:`Pages.settle`."""
    pages = _CURRENT.get()
    if pages is not None:
        pages.settle()


@contextlib.contextmanager
def moving() -> Iterator[None]:
    """A block in which tensors are moved alike in all processes: see :meth:`Pages.moving`."""
    pages = _CURRENT.get()
    with contextlib.nullcontext() if pages is None else pages.moving():
        yield


@contextlib.contextmanager
def standing() -> Iterator[None]:
    """A block in which they are not: see :meth:`Pages.standing`."""
    pages = _CURRENT.get()
    with contextlib.nullcontext() if pages is None else pages.standing():
        yield


def is_page(tensor: Tensor) -> bool:
    """Whether a tensor comes and goes."""
    pages = _CURRENT.get()
    return pages is not None and tensor.layout is torch.strided and pages.has(tensor)


def is_active() -> bool:
    """Whether tensors come and go now."""
    return _CURRENT.get() is not None


def part_of(tensor: Tensor, value: Tensor) -> Tensor:
    """What this process keeps of a value of a tensor's shape: see :meth:`Pages.part_of`."""
    pages = _CURRENT.get()
    return value if pages is None else pages.part_of(tensor, value)


_CURRENT: ContextVar[Pages | None] = ContextVar("pages", default=None)


def _is_for_each(op: Any) -> bool:
    return isinstance(op, torch._ops.OpOverload) and op._schema.name.startswith("aten::_foreach_")


_LOOK_AT_NOTHING = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
