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

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from newton_summary.measure.journal import effects_of

_PLAIN = (Tensor, nn.Parameter)
_NOTHING = -1  # what a process wants that needs no block for now


class Page:
    """A whole tensor that has memory only at times.

    Args:
        like: a tensor of its shape, type and device.
        fetch: gives what it holds, with the help of all processes.
        cut: of a tensor of its shape, a copy of the part that this process keeps.

    Attributes:
        whole: the tensor.
        cut: as given.
    """

    def __init__(self, like: Tensor, fetch: Callable[[], Tensor], cut: Callable[[Tensor], Tensor]) -> None:
        self.cut = cut
        self.whole = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._size = self.whole.untyped_storage().nbytes()
        self._seen = self.whole.data  # the same memory, and a version of its own: to be fetched is no change
        self._fetch = fetch
        self.free()

    @property
    def memory(self) -> int:
        """What the tensor and all views of it have in common."""
        key: int = self.whole.untyped_storage()._cdata
        return key

    def fill(self, keep: bool) -> None:
        """Fetches what the tensor holds; for others alone, where it is not kept."""
        content = self._fetch()
        if keep:
            self.whole.untyped_storage().resize_(self._size)
            self._seen.copy_(content)

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
        is_written: whether something was written into them: they stay from then on.
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
            if numbers:
                with torch.no_grad():
                    self._need(numbers)
                for number in self._numbers_of(effects_of(func).written(args, kwargs)):
                    self.blocks[number].is_written = True
        return func(*args, **kwargs)

    def settle(self) -> None:
        """Gives this process's parts to the others until no one wants any: before they tell each other other things."""
        while not self._is_broken and self._serve(_NOTHING):
            pass

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
                if block.lane == self.blocks[number].lane and other not in numbers and not block.is_written:
                    self._free(block)
            while not self.blocks[number].is_here:
                self._serve(number)

    def _serve(self, wanted: int) -> bool:
        """One turn; whether any process wants something."""
        try:
            wishes = sorted({number for number in self._exchange(wanted) if number != _NOTHING})
            for number in wishes:
                for page in self.blocks[number].pages:
                    page.fill(keep=number == wanted)
        except BaseException:
            self._is_broken = True
            raise
        if wanted in wishes:
            self.blocks[wanted].is_here = True
        return bool(wishes)

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


def is_active() -> bool:
    """Whether tensors come and go now."""
    return _CURRENT.get() is not None


def part_of(tensor: Tensor, value: Tensor) -> Tensor:
    """What this process keeps of a value of a tensor's shape: see :meth:`Pages.part_of`."""
    pages = _CURRENT.get()
    return value if pages is None else pages.part_of(tensor, value)


_CURRENT: ContextVar[Pages | None] = ContextVar("pages", default=None)

_LOOK_AT_NOTHING = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
