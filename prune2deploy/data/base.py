"""What data is: labelled uint8 images in three splits."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prune2deploy.errors import InputError


class Split(Protocol):
    """Labelled images that are read by index."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    @property
    def labels(self) -> Tensor:
        """The class of every image, int64 [N]."""
        ...

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` (int64 [B]) as uint8 [B, C, H, W]."""
        ...


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """Images in memory.

    Attributes:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` as uint8 [B, C, H, W]."""
        return self.pixels[indices]


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of another split, in the order of ``chosen`` (int64 [N])."""

    parent: Split
    chosen: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def labels(self) -> Tensor:
        """The class of every image, int64 [N]."""
        return self.parent.labels[self.chosen]

    def images(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` as uint8 [B, C, H, W]."""
        return self.parent.images(self.chosen[indices])


@dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Attributes:
        name: the spec it was loaded from.
        train: for training.
        holdout: a share of the training set that is not trained on, for choices.
        test: for final figures only.
        num_classes: number of classes.
        class_names: their names, in label order.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        in_channels: channels of an image.
        image_size: height and width of an image in pixels.
        flip: whether a mirrored image keeps its class, so that training may mirror it.
        pad: by how many pixels training may shift an image.
    """

    name: str
    train: Split
    holdout: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_channels: int
    image_size: int
    flip: bool = True
    pad: int = 4

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, H, W)."""
        return (self.in_channels, self.image_size, self.image_size)


def split_off(train: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Return the training set without a random share of it, and that share; each keeps the order of the whole.

    Raises:
        InputError: if the share is not between 0 and 1, or leaves one of the two without images.
    """
    count = round(share * len(train)) if 0 < share < 1 else 0
    if not 0 < count < len(train):
        raise InputError(
            f"a held-out share of {share:g} of {len(train)} training images leaves a split without images; "
            f"give one near 0.1"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Subset(train, order[count:].sort().values), Subset(train, order[:count].sort().values)
