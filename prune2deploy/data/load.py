"""Data from its spec, such as ``digits`` or ``cifar10:DIR``."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from prune2deploy.data import cifar, digits, folder
from prune2deploy.data.base import Data, Split
from prune2deploy.errors import InputError
from prune2deploy.networks.factory import call_factory, is_factory


@dataclass(frozen=True)
class _Options:
    """How to split and size the images."""

    seed: int
    holdout: float
    image_size: int | None


def load_data(spec: str, *, seed: int = 0, holdout: float = 0.1, image_size: int | None = None) -> Data:
    """Return a data set.

    Args:
        spec: ``digits`` (bundled with scikit-learn), ``cifar10:DIR``, ``cifar100:DIR``, ``imagefolder:DIR``, or
            ``path/to/file.py:function`` whose function returns a `Data`; the function is given ``seed``, ``holdout``
            and ``image_size`` if its signature has them.
        seed: chooses the held-out images.
        holdout: their share of the training set, above 0 and below 1.
        image_size: height and width in pixels; only folders of images have a choice.

    Raises:
        InputError: if the data is unknown, not there, or damaged.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"the image size is {image_size}, but must be 1 or more")
    options = _Options(seed, holdout, image_size)
    if is_factory(spec):
        return _from_file(spec, options)
    kind, _, directory = spec.partition(":")
    if kind not in _KINDS:
        close = get_close_matches(kind, _KINDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"unknown data '{spec}'; {hint}there are {', '.join(_SPECS)}")
    data = _KINDS[kind](spec, directory, options)
    if image_size not in (None, data.image_size):
        raise InputError(
            f"'{kind}' has images of {data.image_size}x{data.image_size}, not {image_size}; leave the image size out"
        )
    return data


def _digits(spec: str, directory: str, options: _Options) -> Data:
    if directory:
        raise InputError(f"'{spec}' names a folder, but the digits come with scikit-learn; write digits")
    return digits.load(spec, seed=options.seed, holdout=options.holdout)


def _cifar10(spec: str, directory: str, options: _Options) -> Data:
    return cifar.load_cifar10(spec, _folder(spec, directory), seed=options.seed, holdout=options.holdout)


def _cifar100(spec: str, directory: str, options: _Options) -> Data:
    return cifar.load_cifar100(spec, _folder(spec, directory), seed=options.seed, holdout=options.holdout)


def _imagefolder(spec: str, directory: str, options: _Options) -> Data:
    place = _folder(spec, directory)
    return folder.load(spec, place, seed=options.seed, holdout=options.holdout, image_size=options.image_size)


_KINDS: dict[str, Callable[[str, str, _Options], Data]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "imagefolder": _imagefolder,
}
_SPECS = ("digits", "cifar10:DIR", "cifar100:DIR", "imagefolder:DIR", "path/to/file.py:function")


def _folder(spec: str, directory: str) -> Path:
    if not directory:
        raise InputError(f"'{spec}' names no folder; write {spec.rstrip(':')}:DIR")
    return Path(directory).expanduser()


def _from_file(spec: str, options: _Options) -> Data:
    result, _ = call_factory(spec, wanted="a prune2deploy.data.Data", options=vars(options))
    if not isinstance(result, Data):
        raise InputError(f"'{spec}' returned a {type(result).__name__}, but a prune2deploy.data.Data is wanted")
    for part in ("train", "holdout", "test"):
        _require_usable(getattr(result, part), result, f"'{spec}', {part}")
    return result


def _require_usable(split: Split, data: Data, where: str) -> None:
    """Check one split of a user's data, on its first image."""
    if len(split) == 0:
        raise InputError(f"{where}: no images")
    labels = split.labels
    if labels.dtype != torch.int64 or labels.shape != (len(split),):
        raise InputError(f"{where}: labels are {labels.dtype} {list(labels.shape)}; int64 [{len(split)}] is wanted")
    if int(labels.min()) < 0 or int(labels.max()) >= data.num_classes:
        raise InputError(
            f"{where}: labels lie outside 0..{data.num_classes - 1}, the {data.num_classes} classes it names"
        )
    image = split.images(torch.zeros(1, dtype=torch.int64))
    if image.dtype != torch.uint8 or tuple(image.shape) != (1, *data.input_shape):
        wanted = [1, *data.input_shape]
        raise InputError(f"{where}: images are {image.dtype} {list(image.shape)}; torch.uint8 {wanted} is wanted")
