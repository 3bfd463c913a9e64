"""TensorBoard: scalars for each group, the advice in words, and H̄ as an image, of what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.hooks import RemovableHandle

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:  # pragma: no cover - a test runs it in a process of its own
    raise ImportError("this needs tensorboard: pip install 'newton-summary[tensorboard]'") from error

from newton_summary._warned import warn
from newton_summary.integrations.news import Measured, News, Source
from newton_summary.summary import Summary
from newton_summary.watch.record import TAG


class TensorBoard:
    """Logs every measurement of a monitor, and all new rates of a :class:`~newton_summary.NewtonSummary` optimizer.

    Args:
        writer: a ``SummaryWriter``, or the folder of a new one.
        images: whether to draw H̄ and its correlations at every measurement, which takes about a third of a second.

    Example:
        >>> import torch, newton_summary as ns
        >>> model = torch.nn.Linear(4, 1)
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean()
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> monitor = ns.Monitor(model, loss_fn, optimizer=optimizer, every=10)
        >>> with TensorBoard("logs") as board:
        ...     _ = board.attach(monitor)
        ...     for _ in range(20):
        ...         batch = torch.randn(8, 4), torch.randn(8, 1)
        ...         optimizer.zero_grad()
        ...         loss_fn(model, batch).backward()
        ...         _ = monitor.step(batch)
        ...         optimizer.step()
    """

    def __init__(self, writer: SummaryWriter | str | Path, *, images: bool = True) -> None:
        self._own = isinstance(writer, str | Path)
        self.writer: Any = SummaryWriter(str(writer)) if isinstance(writer, str | Path) else writer
        self.images = images
        self._hooks: list[RemovableHandle] = []
        self._has_warned = False

    def attach(self, source: Source) -> TensorBoard:
        """From now on, logs by itself what the source measures, after each step of the optimizer that it watches.

        Where that fails, as on a full disk or without matplotlib, it warns once, and training goes on.

        Raises:
            TypeError: the source does not measure.
        """
        news = News(source)

        def after_step(*_: Any) -> None:
            measured = news.latest()
            if measured is None:
                return
            try:
                self.log(measured)
            except Exception as error:
                self._warn_once(f"{type(error).__name__}: {error}")

        self._hooks += [optimizer.register_step_post_hook(after_step) for optimizer in news.optimizers]
        return self

    def _warn_once(self, cause: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(f"TensorBoard was not told all of what was measured, training goes on; this was {cause}")

    def log(self, measured: Measured) -> None:
        """Logs a measurement, or new rates."""
        for tag, value in measured.scalars.items():
            self.writer.add_scalar(tag, value, measured.step)
        if measured.sentences:
            self.writer.add_text(TAG, measured.text, measured.step)
        if self.images and measured.summary is not None and measured.summary.is_finite():
            draw(self.writer, measured.summary, measured.step)

    def close(self) -> None:
        """Takes its hooks off, and closes a writer that it opened."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._own:
            self.writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def draw(writer: Any, summary: Summary, step: int) -> None:
    """Adds two images to a ``SummaryWriter``: H̄, and H̄ as correlations.  Needs the extra ``plots``."""
    from newton_summary import plots

    for tag, picture in (("hessian", plots.heatmap), ("correlations", plots.correlations)):
        image = _pixels(picture(summary).figure)
        writer.add_image(f"newton_summary/{tag}", image, step, dataformats="HWC")


def _pixels(figure: Any) -> NDArray[np.uint8]:
    """A matplotlib figure as an image, shape (height, width, 3); without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
