"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the official binary and Python files, and lossless WebP sheets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prune2deploy.data.base import Data, TensorSplit, split_off
from prune2deploy.data.unpickle import read_pickled_dict
from prune2deploy.errors import InputError, one_line

_SIZE = 32
_PIXELS = 3 * _SIZE * _SIZE

Arrays = tuple[np.ndarray, np.ndarray]
"""uint8 pixels [N, 3, 32, 32] and int64 labels [N]."""


@dataclass(frozen=True)
class _Layout:
    """One way that a data set lies on disk.

    Attributes:
        folder: name of the folder that the official archive unpacks to, or "".
        train: names of the training files, in order.
        test: name of the test file.
        also: files that are needed besides.
        read: reads one of them.
    """

    folder: str
    train: tuple[str, ...]
    test: str
    read: "Callable[[Path, _Set], Arrays]"
    also: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, *self.also)

    def missing_in(self, folder: Path) -> list[str]:
        return [file for file in self.files if not (folder / file).is_file()]


@dataclass(frozen=True)
class _Set:
    """What sets CIFAR-10 and CIFAR-100 apart; ``label_bytes`` counts those before an image, the last is the label."""

    name: str
    num_classes: int
    label_bytes: int
    label_key: bytes
    names_key: bytes
    names_files: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layouts: tuple[_Layout, ...]


def load_cifar10(name: str, directory: Path, *, seed: int, holdout: float) -> Data:
    """Return CIFAR-10 from a folder that holds it in one of its formats."""
    return _load(_CIFAR10, name, directory, seed, holdout)


def load_cifar100(name: str, directory: Path, *, seed: int, holdout: float) -> Data:
    """Return CIFAR-100 (its 100 fine classes) from a folder that holds it in one of its formats."""
    return _load(_CIFAR100, name, directory, seed, holdout)


def _load(known: _Set, name: str, directory: Path, seed: int, holdout: float) -> Data:
    folder, layout = _find(known, directory)
    parts = [layout.read(folder / file, known) for file in layout.train]
    train = _split(np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts]))
    kept, held_out = split_off(train, holdout, seed)
    return Data(
        name=name,
        train=kept,
        holdout=held_out,
        test=_split(*layout.read(folder / layout.test, known)),
        num_classes=known.num_classes,
        class_names=_class_names(known, folder),
        mean=known.mean,
        std=known.std,
        in_channels=3,
        image_size=_SIZE,
    )


def _split(pixels: np.ndarray, labels: np.ndarray) -> TensorSplit:
    return TensorSplit(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels))


def _find(known: _Set, directory: Path) -> tuple[Path, _Layout]:
    """Return the folder that holds the files, and their layout; the archive's own subfolder is looked into too."""
    if not directory.is_dir():
        raise InputError(f"'{directory}' is not a folder; give the one that holds {known.name}, as {known.name}:DIR")
    places = [(folder, layout) for layout in known.layouts for folder in (directory, directory / layout.folder)]
    for folder, layout in places:
        if not layout.missing_in(folder):
            return folder, layout
    for folder, layout in places:
        missing = layout.missing_in(folder)
        if len(missing) < len(layout.files):
            raise InputError(f"'{folder}' holds {known.name} in part: {', '.join(missing)} is missing; unpack it again")
    wanted = "; or ".join(", ".join(layout.files) for layout in known.layouts)
    raise InputError(f"'{directory}' does not hold {known.name}; looked there and in its archive's folder for {wanted}")


def _class_names(known: _Set, folder: Path) -> tuple[str, ...]:
    """Return the names that lie beside the images, or numbers where there are none."""
    for file in known.names_files:
        path = folder / file
        if path.is_file():
            names = _NAME_READERS[path.suffix](path, known)
            if len(names) == known.num_classes:
                return tuple(names)
    return tuple(str(index) for index in range(known.num_classes))


def _names_of_text(path: Path, _: _Set) -> list[str]:
    return path.read_text(errors="replace").split()


def _names_of_pickle(path: Path, known: _Set) -> list[str]:
    names = read_pickled_dict(path).get(known.names_key, [])
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _names_of_labels(path: Path, _: _Set) -> list[str]:
    return [str(name) for name in _archive(path)["class_names"]]


_NAME_READERS: dict[str, Callable[[Path, _Set], list[str]]] = {
    ".txt": _names_of_text,
    ".meta": _names_of_pickle,
    "": _names_of_pickle,
    ".npz": _names_of_labels,
}


def _checked(pixels: np.ndarray, labels: np.ndarray, path: Path, known: _Set) -> Arrays:
    if len(pixels) == 0 or len(pixels) != len(labels):
        raise InputError(f"'{path}' holds {len(pixels)} images and {len(labels)} labels; fetch it again")
    if labels.min() < 0 or labels.max() >= known.num_classes:
        raise InputError(f"'{path}' holds a label outside 0..{known.num_classes - 1}, so it is not {known.name}")
    return pixels.reshape(-1, 3, _SIZE, _SIZE), labels.astype(np.int64)


def _read_binary(path: Path, known: _Set) -> Arrays:
    """Read records of one or two label bytes and 3,072 bytes of red, green and blue planes."""
    record = known.label_bytes + _PIXELS
    data = np.fromfile(path, dtype=np.uint8)
    if len(data) % record:
        raise InputError(f"'{path}' has {len(data)} bytes, not a multiple of {record}: it was cut off; fetch it again")
    records = data.reshape(-1, record)
    return _checked(records[:, known.label_bytes :], records[:, known.label_bytes - 1], path, known)


def _read_pickle(path: Path, known: _Set) -> Arrays:
    """Read a Python batch: a dict of ``data`` uint8 [N, 3072] and a list of labels."""
    batch = read_pickled_dict(path)
    try:
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[known.label_key])
    except (KeyError, ValueError) as error:
        raise InputError(f"'{path}' is not a batch of {known.name}: {one_line(error)} is missing in it") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or labels.dtype.kind not in "iu":
        raise InputError(
            f"'{path}' is not a batch of {known.name}: uint8 data [N, {_PIXELS}] and integer labels are wanted"
        )
    return _checked(pixels, labels, path, known)


def _read_sheet(path: Path, known: _Set) -> Arrays:
    """Read a lossless WebP sheet of 100 x 100 tiles; its labels lie beside it in ``labels.npz``."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            grid = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"'{path}' is not a whole WebP image ({one_line(error, 120)}); fetch it again") from error
    if grid.shape != (100 * _SIZE, 100 * _SIZE, 3):
        raise InputError(f"'{path}' has {grid.shape[1]}x{grid.shape[0]} pixels, but a sheet has 3200x3200")
    tiles = grid.reshape(100, _SIZE, 100, _SIZE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, _SIZE, _SIZE)
    part, _, number = path.stem.partition("_")
    labels = _archive(path.parent / "labels.npz")[part]
    if number:
        labels = labels[(int(number) - 1) * len(tiles) :][: len(tiles)]
    return _checked(tiles, labels, path, known)


def _archive(path: Path) -> dict[str, np.ndarray]:
    wanted = ("train", "test", "class_names")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {key: archive[key] for key in wanted}
    except Exception as error:
        raise InputError(
            f"'{path}' does not hold {', '.join(wanted)} ({one_line(error, 120)}); fetch it again"
        ) from error


def _batches(suffix: str) -> tuple[tuple[str, ...], str]:
    return tuple(f"data_batch_{index}{suffix}" for index in range(1, 6)), f"test_batch{suffix}"


_CIFAR10 = _Set(
    name="cifar10",
    num_classes=10,
    label_bytes=1,
    label_key=b"labels",
    names_key=b"label_names",
    names_files=("batches.meta.txt", "batches.meta", "labels.npz"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    layouts=(
        _Layout("cifar-10-batches-bin", *_batches(".bin"), _read_binary),
        _Layout("cifar-10-batches-py", *_batches(""), _read_pickle),
        _Layout("", tuple(f"train_{index}.webp" for index in range(1, 6)), "test.webp", _read_sheet, ("labels.npz",)),
    ),
)
_CIFAR100 = _Set(
    name="cifar100",
    num_classes=100,
    label_bytes=2,
    label_key=b"fine_labels",
    names_key=b"fine_label_names",
    names_files=("fine_label_names.txt", "meta"),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    layouts=(
        _Layout("cifar-100-binary", ("train.bin",), "test.bin", _read_binary),
        _Layout("cifar-100-python", ("train",), "test", _read_pickle),
    ),
)
