"""Some images of a split as a network takes them, batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune2deploy.data.base import Split
from prune2deploy.data.pixels import augment, normalise


@dataclass(frozen=True, eq=False)
class Batches:
    """Normalised images with their labels, at random but the same every time it is gone through.

    All batches have one size, so that each counts alike in an average over batches; what is left over is not used
    unless ``rest`` is wanted, as a last, smaller batch.

    Attributes:
        split: where they come from.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        batch_size: images at a time; all there are, where there are fewer.
        images: how many at most; by default all.
        seed: chooses the images and their order.
        device: where the batches are put.
        flip: whether images are mirrored at random, as in training.
        pad: by how many pixels images are shifted at random, as in training.
        rest: whether what is left over is used too.
    """

    split: Split
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int
    images: int | None = None
    seed: int = 0
    device: str | torch.device = "cpu"
    flip: bool = False
    pad: int = 0
    rest: bool = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, float32 [B, C, H, W], and labels, int64 [B]."""
        count = len(self.split) if self.images is None else min(self.images, len(self.split))
        size, place = min(self.batch_size, count), torch.device(self.device)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(self.split), generator=generator)[:count]
        for indices in torch.split(chosen[: count if self.rest else count - count % size], size):
            images = self.split.images(indices).to(place)
            if self.flip or self.pad:
                images = augment(images.float() / 255, generator, flip=self.flip, pad=self.pad)
            yield normalise(images, self.mean, self.std), self.split.labels[indices].to(place)
