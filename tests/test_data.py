"""Data sets: found, checked, split, normalised, shuffled and fetched; all on small files made here."""

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from newton_summary.errors import UsageError
from newton_summary_experiments import data
from newton_summary_experiments.data import CIFAR10, MNIST, InMemory, as_it_is, shuffled

REAL_FILES = os.environ.get("NEWTON_SUMMARY_DATA", "data")
SOURCES = {"mnist": MNIST, "cifar10": CIFAR10}


def arrays(source, count=230, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (count, *source.shape), dtype=np.uint8),
        "y_train": rng.integers(0, 10, count, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (20, *source.shape), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 20, dtype=np.uint8),
    }


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data folder but those that a test makes."""
    monkeypatch.delenv("NEWTON_SUMMARY_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Preparing ------------------------------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_and_normalised():
    digits = data.digits()
    assert digits.train[0].shape == (1600, 1, 8, 8)
    assert digits.validation[0].shape == (197, 1, 8, 8)
    assert digits.train[0].dtype == torch.float32
    assert digits.train[1].dtype == torch.int64
    assert abs(digits.train[0].double().mean()) < 1e-6
    assert abs(digits.train[0].double().var(correction=0) - 1) < 1e-5
    every = torch.cat([digits.train[1], digits.validation[1]])
    assert every.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # known of this data set
    assert torch.equal(digits.train[0], data.digits().train[0])


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_is_split_and_normalised(name, tmp_path):
    source = SOURCES[name]
    made = arrays(source)
    np.savez_compressed(tmp_path / f"{name}.npz", **made)
    got = data.read(source, tmp_path)
    channels = 3 if name == "cifar10" else 1
    pixels = source.shape[-2:]
    assert got.train[0].shape == (200, channels, *pixels)
    assert got.validation[0].shape == (30, channels, *pixels)
    # Undo the normalisation by a least-squares line for each channel: the images must be the file's, each just once.
    raw = made["x_train"].reshape(230, channels, -1)
    x = torch.cat([got.train[0], got.validation[0]]).reshape(230, channels, -1).double().numpy()
    y = torch.cat([got.train[1], got.validation[1]]).numpy()
    spread, centre = raw.std(axis=(0, 2)), raw.mean(axis=(0, 2))
    restored = np.empty_like(x)
    for c in range(channels):
        restored[:, c] = x[:, c] * (np.ptp(raw[:, c]) / np.ptp(x[:, c]))
        restored[:, c] += raw[:, c].min() - restored[:, c].min()
        assert abs(x[:200, c].mean()) < 1e-5
        assert abs(x[:200, c].std() - 1) < 1e-5
        assert abs(np.ptp(raw[:, c]) / np.ptp(x[:, c]) - spread[c]) < 0.05 * spread[c]
        assert 0 < centre[c] < 255
    flat = np.rint(restored).reshape(230, -1)
    rows = {raw[i].tobytes(): int(made["y_train"][i]) for i in range(230)}
    found = [flat[i].astype(np.uint8).reshape(raw[i].shape).tobytes() for i in range(230)]
    assert len(set(found)) == 230
    assert [rows[key] for key in found] == y.tolist()


def test_the_digest_tells_data_sets_apart(tmp_path):
    digests = set()
    for seed in (0, 0, 1):
        np.savez(tmp_path / "mnist.npz", **arrays(MNIST, seed=seed))
        digests.add(data.read(MNIST, tmp_path).digest)
    assert len(digests) == 2


# Finding --------------------------------------------------------------------------------------------------------------


def test_places_in_order(tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "newton-summary"
    assert data.folders() == [cache]
    monkeypatch.setenv("NEWTON_SUMMARY_DATA", str(tmp_path / "named"))
    assert data.folders() == [tmp_path / "named", cache]
    assert data.folders(tmp_path / "given") == [tmp_path / "given"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data.folders()[-1] == tmp_path / "home" / ".cache" / "newton-summary"


def test_the_first_place_and_the_first_name_win(tmp_path, monkeypatch):
    cache, named = tmp_path / "cache" / "newton-summary", tmp_path / "named"
    for folder in (cache, named):
        folder.mkdir(parents=True)
    monkeypatch.setenv("NEWTON_SUMMARY_DATA", str(named))
    (cache / "cifar10.npz").touch()
    assert data.locate(CIFAR10) == cache / "cifar10.npz"
    (named / "cifar10_small.npz").touch()
    assert data.locate(CIFAR10) == named / "cifar10_small.npz"
    (named / "cifar10.npz").touch()
    assert data.locate(CIFAR10) == named / "cifar10.npz"


def test_a_missing_file_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NEWTON_SUMMARY_DATA", str(tmp_path / "named"))
    with pytest.raises(UsageError) as caught:
        data.read(CIFAR10)
    text = str(caught.value)
    for expected in (
        str(tmp_path / "named" / "cifar10.npz"),
        str(tmp_path / "named" / "cifar10_small.npz"),
        str(tmp_path / "cache" / "newton-summary" / "cifar10.npz"),
        "N×3×32×32",
        "--data",
        "NEWTON_SUMMARY_DATA",
        "--fetch",
    ):
        assert expected in text


FAULTS = {
    "a key is missing": (lambda a: a.pop("y_test"), "y_test is missing"),
    "another type": (lambda a: a.update(x_train=a["x_train"].astype(np.float32)), "x_train is float32, not uint8"),
    "another shape": (lambda a: a.update(x_train=a["x_train"][:, :-1]), r"x_train has shape \(230, 27, 28\)"),
    "a scalar": (lambda a: a.update(x_test=np.uint8(3)), r"x_test has shape \(\)"),
    "too few classes": (lambda a: a.update(y_train=a["y_train"][:-1]), r"y_train has shape \(229,\), not \(230,\)"),
    "an unknown class": (lambda a: a.update(y_test=a["y_test"] + np.uint8(10)), "y_test has class 1"),
    "too few images": (
        lambda a: a.update(x_train=a["x_train"][:50], y_train=a["y_train"][:50]),
        "x_train has 50 images; at least 200",
    ),
    "objects": (lambda a: a.update(x_train=np.array([None] * 230)), "truncated, or no .npz file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_named_with_its_fault(fault, tmp_path):
    spoil, message = FAULTS[fault]
    made = arrays(MNIST)
    spoil(made)
    np.savez(tmp_path / "mnist.npz", **made)
    with pytest.raises(UsageError, match=message) as caught:
        data.read(MNIST, tmp_path)
    assert str(tmp_path / "mnist.npz") in str(caught.value)
    assert "--data" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
def test_a_truncated_file_is_named(keep, tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **arrays(MNIST))
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(UsageError, match="truncated"):
        data.read(MNIST, tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **arrays(MNIST))
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"truncated, or no \.npz"):
        data.read(MNIST, tmp_path)


def test_another_array_file_is_named(tmp_path):
    with (tmp_path / "mnist.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UsageError, match=r"truncated, or no \.npz"):
        data.read(MNIST, tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_the_real_files(name):
    try:
        got = data.read(SOURCES[name], Path(REAL_FILES))
    except UsageError as error:
        pytest.skip(f"set NEWTON_SUMMARY_DATA to a folder with the real files: {str(error).splitlines()[0]}")
    assert len(got.train[1]) >= 10_000
    assert got.train[1].bincount().min() > 0.08 * len(got.train[1])
    per_channel = got.train[0].transpose(0, 1).flatten(1).double()
    assert (per_channel.mean(1).abs() < 1e-4).all()
    assert ((per_channel.std(1) - 1).abs() < 1e-3).all()


# Batches --------------------------------------------------------------------------------------------------------------


def numbered(count=25):
    return torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count)


def test_an_epoch_has_every_sample_once_and_no_short_batch():
    batches = list(shuffled(numbered(), 6, seed=0, epoch=0))
    assert [len(y) for _, y in batches] == [6, 6, 6, 6]
    seen = torch.cat([y for _, y in batches]).tolist()
    assert len(set(seen)) == 24
    assert seen != sorted(seen)
    for x, y in batches:
        assert torch.equal(x[:, 0], y.float())


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        torch.rand(3)
        return tuple(torch.cat([y for _, y in shuffled(numbered(), 5, seed, epoch)]).tolist())

    assert order(0, 0) == order(0, 0)
    assert len({order(s, e) for s in range(3) for e in range(3)}) == 9
    before = torch.get_rng_state()
    next(shuffled(numbered(), 5, 0, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_can_be_entered_at_any_batch():
    whole = [y.tolist() for _, y in shuffled(numbered(), 5, 3, 2)]
    for start in range(6):
        assert [y.tolist() for _, y in shuffled(numbered(), 5, 3, 2, start)] == whole[start:]


def test_in_memory_gives_what_a_tensor_dataset_gives():
    def batches(dataset, **options):
        loader = DataLoader(dataset, 6, shuffle=True, generator=torch.Generator().manual_seed(1), **options)
        return [(x.tolist(), y.tolist()) for x, y in loader]

    ours = batches(InMemory(numbered()), collate_fn=as_it_is)
    assert ours == batches(torch.utils.data.TensorDataset(*numbered()))
    assert len(InMemory(numbered())) == 25
    assert InMemory(numbered())[3][1] == 3


# Fetching -------------------------------------------------------------------------------------------------------------


def fake_hub(source, made):
    """A package ``datasets`` whose hub holds these arrays, as images with channels last."""

    def load_dataset(name, split):
        assert name == source.hub[0]
        x = made[f"x_{split}"]
        pictures = list(np.moveaxis(x, 1, 3) if x.ndim == 4 else x)
        return {source.hub[1]: pictures, "label": made[f"y_{split}"].tolist()}

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    return module


@pytest.mark.parametrize("name", SOURCES)
def test_fetching_writes_the_file_that_is_read(name, tmp_path, monkeypatch):
    source, made = SOURCES[name], arrays(SOURCES[name])
    monkeypatch.setitem(sys.modules, "datasets", fake_hub(source, made))
    path = data.fetch(source)
    assert path == tmp_path / "cache" / "newton-summary" / f"{name}.npz"
    loaded = data.load(source, path)
    for key, value in made.items():
        np.testing.assert_array_equal(loaded[key], value)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_fetching_checks_what_came(monkeypatch):
    made = arrays(MNIST)
    made["y_train"] = made["y_train"] + np.uint8(20)
    monkeypatch.setitem(sys.modules, "datasets", fake_hub(MNIST, made))
    with pytest.raises(UsageError, match="y_train has class 2"):
        data.fetch(MNIST)
    assert not data.folders()[0].exists()


def test_fetching_without_a_network_says_so(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route to host")

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    message = (
        r"ylecun/mnist cannot be fetched \(ConnectionError: no route to host\): is there a network\?\nPut mnist.npz"
    )
    with pytest.raises(UsageError, match=message):
        data.fetch(MNIST)
    assert not data.folders()[0].exists()


def test_missing_packages_are_named_with_their_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        data.fetch(MNIST)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'newton-summary\[experiments\]'"):
        data.digits()
