"""Data sets in memory: found, checked, split and normalised.

Images come from scikit-learn (digits) or from ``.npz`` files with the keys ``x_train``, ``y_train``, ``x_test`` and
``y_test``, in uint8.  Of the training images, nine tenths (rounded down to whole hundreds) are trained on and the
others validate; the split is random with a seed of its own, and so the same for every run.  Inputs are shifted and
scaled to mean 0 and variance 1, for each channel, by the figures of the part that is trained on.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from newton_summary.errors import UsageError

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images, shape (B, C, H, W) in float32, and their classes, shape (B,) in int64."""

Array: TypeAlias = NDArray[np.uint8]

VARIABLE = "NEWTON_SUMMARY_DATA"
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_SPLIT_SEED = 20231206


@dataclass(frozen=True)
class Source:
    """A data set in an ``.npz`` file.

    Args:
        name: what it is called.
        files: the names under which it is looked for, in this order.
        shape: the shape of one image in the file.
        hub: its name on the Hugging Face hub, and the name of its column of images there.
        classes: how many there are.
    """

    name: str
    files: tuple[str, ...]
    shape: tuple[int, ...]
    hub: tuple[str, str]
    classes: int = 10


MNIST = Source("MNIST", ("mnist.npz",), (28, 28), ("ylecun/mnist", "image"))
CIFAR10 = Source("CIFAR-10", ("cifar10.npz", "cifar10_small.npz"), (3, 32, 32), ("uoft-cs/cifar10", "img"))


@dataclass(frozen=True)
class Data:
    """A data set ready for training.

    Args:
        train: the images and classes that are trained on.
        validation: those that are kept aside.
        origin: where they come from.
        digest: tells this data set from others.
    """

    train: Batch
    validation: Batch
    origin: str
    digest: str

    @property
    def device(self) -> torch.device:
        """Where the images are; models are trained there."""
        return self.train[0].device

    def to(self, device: torch.device | str) -> Data:
        """The same on another device."""
        train = self.train[0].to(device), self.train[1].to(device)
        validation = self.validation[0].to(device), self.validation[1].to(device)
        return replace(self, train=train, validation=validation)

    def describe(self) -> dict[str, Any]:
        """What identifies the data, for a run's record."""
        return {"digest": self.digest, "train": len(self.train[1]), "validation": len(self.validation[1])}


def first(data: Batch, count: int | None) -> Batch:
    """The first samples; all of them where no number is given."""
    images, classes = data
    return images[:count], classes[:count]


class InMemory(Dataset[Batch]):
    """A map-style data set over tensors that fetches a whole batch at once.  Use it with ``collate_fn=as_it_is``."""

    def __init__(self, data: Batch) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data[1])

    def __getitem__(self, index: int) -> Batch:
        return self.data[0][index], self.data[1][index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices, device=self.data[0].device)
        return self.data[0].index_select(0, chosen), self.data[1].index_select(0, chosen)


def as_it_is(batch: Any) -> Any:
    """The collate function of :class:`InMemory`."""
    return batch


def shuffled(data: Batch, size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
    """The batches of one epoch from the one with number ``start`` on, in an order that seed and epoch alone decide.

    A last batch that would be smaller is left out.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    order = torch.randperm(len(data[1]), generator=generator)
    for number in range(start, len(order) // size):
        chosen = order[number * size : (number + 1) * size]
        yield data[0][chosen], data[1][chosen]


# Reading --------------------------------------------------------------------------------------------------------------


def digits() -> Data:
    """scikit-learn's handwritten digits: 1,797 images of 8 × 8 pixels, which come inside that package.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("digits need scikit-learn: pip install 'newton-summary[experiments]'") from error
    images, classes = load_digits(return_X_y=True)
    return _prepare(images.astype(np.uint8).reshape(-1, 8, 8), classes.astype(np.uint8), "scikit-learn's digits")


def read(source: Source, folder: Path | None = None) -> Data:
    """A data set from its file.

    Args:
        source: which one.
        folder: where to look for the file.  Default: :func:`folders`.

    Raises:
        UsageError: the file is missing, truncated, or holds something else.
    """
    path = locate(source, folder)
    arrays = load(source, path)
    return _prepare(arrays["x_train"], arrays["y_train"], str(path))


def folders(folder: Path | None = None) -> list[Path]:
    """Where data files are looked for, first come first served.

    That is ``folder`` alone where it is given, else the folder that the variable ``NEWTON_SUMMARY_DATA`` names, if any,
    and then the user's cache.
    """
    if folder is not None:
        return [folder]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "newton-summary"
    named = os.environ.get(VARIABLE)
    return [Path(named), cache] if named else [cache]


def locate(source: Source, folder: Path | None = None) -> Path:
    """The file of a data set.

    Raises:
        UsageError: there is none; the message lists where it was looked for and says how to get it.
    """
    places = [place / name for place in folders(folder) for name in source.files]
    for path in places:
        if path.is_file():
            return path
    listed = "\n".join(f"  {path}" for path in places)
    raise UsageError(f"{source.name} is not there. Looked for\n{listed}\n{cure(source)}")


def cure(source: Source) -> str:
    """How to get a data set's file."""
    shape = "×".join(map(str, ("N", *source.shape)))
    return (
        f"Put {source.files[0]} there (keys {', '.join(_KEYS)}; uint8; images {shape}), or name its folder with --data "
        f"or {VARIABLE}.\nWhere there is a network: pip install datasets, then newton-summary data TASK --fetch"
    )


def load(source: Source, path: Path) -> dict[str, Array]:
    """The arrays of a data file, by the keys ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    Raises:
        UsageError: the file is truncated or is no ``.npz``, or an array is missing, of another type or shape, or has
            classes that do not exist.
    """
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream):  # numpy leaves a broken file open
            stream.seek(0)
            file = np.load(stream, allow_pickle=False)
            arrays = {key: file[key] for key in _KEYS if key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} is truncated, or no .npz file ({error})\n{cure(source)}") from error
    fault = _fault(source, arrays)
    if fault:
        raise UsageError(f"{path} is not the {source.name} that was expected: {fault}\n{cure(source)}")
    return arrays


def _fault(source: Source, arrays: dict[str, Array]) -> str:
    """What is wrong with a file's arrays: nothing, or the first thing found."""
    for key in _KEYS:
        if key not in arrays:
            return f"{key} is missing"
        if arrays[key].dtype != np.uint8:
            return f"{key} is {arrays[key].dtype}, not uint8"
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        wanted = (len(x), *source.shape) if x.ndim else source.shape
        if x.shape != wanted:
            return f"x_{part} has shape {x.shape}, not {('N', *source.shape)}"
        if y.shape != (len(x),):
            return f"y_{part} has shape {y.shape}, not ({len(x)},) for {len(x)} images"
        if len(y) and int(y.max()) >= source.classes:
            return f"y_{part} has class {int(y.max())}; there are {source.classes}, from 0"
    if len(arrays["x_train"]) < 200:
        return f"x_train has {len(arrays['x_train'])} images; at least 200 are needed"
    return ""


def _prepare(images: Array, classes: Array, origin: str) -> Data:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED)).numpy()
    count = len(images) * 9 // 10 // 100 * 100
    if images.ndim == 3:
        images = images[:, None]
    x, y = torch.from_numpy(images[order]).float(), torch.from_numpy(classes[order]).long()
    axes = (0, 2, 3)
    mean = x[:count].mean(axes, keepdim=True)
    x -= mean
    x /= x[:count].square().mean(axes, keepdim=True).sqrt().clamp_min(1e-8)
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes() + classes.tobytes()).hexdigest()[:16]
    return Data((x[:count], y[:count]), (x[count:], y[count:]), origin, digest)


# Getting --------------------------------------------------------------------------------------------------------------


def fetch(source: Source, folder: Path | None = None) -> Path:
    """Writes a data set's file from the Hugging Face hub, through the package ``datasets``.

    Args:
        source: which data set.
        folder: where the file goes.  Default: the first of :func:`folders`.

    Raises:
        UsageError: ``datasets`` is not installed, nothing can be fetched, or what came is not this data set.
    """
    from newton_summary_experiments.files import write_atomically

    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ImportError as error:
        raise UsageError("fetching needs the package datasets: pip install datasets") from error
    name, column = source.hub
    arrays: dict[str, Array] = {}
    for part in ("train", "test"):
        try:
            rows = load_dataset(name, split=part)
        except Exception as error:  # no network, no such data set, no room …: it raises errors of many kinds
            raise UsageError(
                f"{name} cannot be fetched ({type(error).__name__}: {error}): is there a network?\n{cure(source)}"
            ) from error
        pictures = np.stack([np.asarray(picture, dtype=np.uint8) for picture in rows[column]])
        arrays[f"x_{part}"] = np.moveaxis(pictures, 3, 1) if pictures.ndim == 4 else pictures
        arrays[f"y_{part}"] = np.asarray(rows["label"], dtype=np.uint8)
    fault = _fault(source, arrays)
    if fault:
        raise UsageError(f"what {name} holds is not the {source.name} that was expected: {fault}")
    path = folders(folder)[0] / source.files[0]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            x_train, y_train, x_test, y_test = (arrays[key] for key in _KEYS)
            np.savez_compressed(file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)

    write_atomically(path, write)
    return path
