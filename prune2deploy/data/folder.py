"""Folders of images, one per class, as ImageNet is kept: ``DIR/train/CLASS/*.jpg`` and ``DIR/val/CLASS/*.jpg``."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prune2deploy.data.base import Data, split_off
from prune2deploy.errors import InputError, one_line

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_TEST_FOLDERS = ("test", "val")
_DEFAULT_SIZE = 224
_CROP_SHARE = 224 / 256
"""The centre crop's share of the resized image's shorter side, as ImageNet figures have it."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Images that are decoded when they are asked for.

    Attributes:
        paths: the files.
        labels: int64 [N].
        size: height and width in pixels that they are brought to.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` as uint8 [B, 3, size, size], decoded on several threads."""
        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(self._decode, indices.tolist()))
        if not pixels:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

    def _decode(self, index: int) -> np.ndarray:
        """Return one image [size, size, 3]: the shorter side resized, then the centre."""
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                shorter = round(self.size / _CROP_SHARE)
                scale = shorter / min(image.size)
                wide, high = (max(shorter, round(side * scale)) for side in image.size)
                resized = image.convert("RGB").resize((wide, high), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"'{path}' is not a whole image ({one_line(error, 120)}); mend or remove it") from error
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        return np.asarray(resized.crop((left, top, left + self.size, top + self.size)))


def load(name: str, directory: Path, *, seed: int, holdout: float, image_size: int | None) -> Data:
    """Return the images under ``directory``; classes are the subfolders of ``train``, in alphabetical order.

    Figures are taken on ``test`` where it has class folders, else on ``val``. No image is read yet.

    Raises:
        InputError: if a folder is missing or without images, or the test classes are not among the training classes.
    """
    size = image_size or _DEFAULT_SIZE
    if not directory.is_dir():
        raise InputError(f"'{directory}' is not a folder; give one that holds train/CLASS/*.jpg and val/CLASS/*.jpg")
    train_folder = directory / "train"
    class_names = _classes_in(train_folder)
    if not class_names:
        raise InputError(
            f"'{directory}' has no class folders in train/; it must hold train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    test_folder = next((directory / part for part in _TEST_FOLDERS if _classes_in(directory / part)), None)
    if test_folder is None:
        raise InputError(f"'{directory}' has no class folders in test/ or val/; it must hold val/CLASS/*.jpg")
    strange = sorted(set(_classes_in(test_folder)) - set(class_names))
    if strange:
        raise InputError(
            f"'{test_folder}' has the class '{strange[0]}', which '{train_folder}' has not; rename or remove it"
        )
    train, held_out = split_off(_split(train_folder, class_names, size), holdout, seed)
    return Data(
        name=name,
        train=train,
        holdout=held_out,
        test=_split(test_folder, class_names, size),
        num_classes=len(class_names),
        class_names=class_names,
        mean=_MEAN,
        std=_STD,
        in_channels=3,
        image_size=size,
        pad=size // 8,
    )


def _classes_in(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    return tuple(sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")))


def _split(folder: Path, class_names: tuple[str, ...], size: int) -> FolderSplit:
    """Return the images of a folder, by class and then by name."""
    found = [
        (path, label)
        for label, class_name in enumerate(class_names)
        for path in sorted((folder / class_name).glob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise InputError(f"'{folder}' has no images in its class folders; images end in {', '.join(sorted(_SUFFIXES))}")
    paths, labels = zip(*found, strict=True)
    return FolderSplit(paths, torch.tensor(labels, dtype=torch.int64), size)
