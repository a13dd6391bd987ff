"""What happens to pixels on their way into a network: augmentation, then normalisation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prune2deploy.errors import InputError


def augment(images: Tensor, generator: torch.Generator, *, flip: bool, pad: int) -> Tensor:
    """Shift every image by up to ``pad`` pixels each way, zeros moving in, and mirror a random half of them.

    Args:
        images: float [B, C, H, W], before normalisation, so that zero is black.
        generator: a CPU generator; the same state gives the same result on every device.
        flip: whether images may be mirrored.
        pad: largest shift in pixels; 0 shifts nothing.

    Returns:
        float [B, C, H, W], its own memory.
    """
    batch, _, height, width = images.shape
    return moved(images, *draw_moves(batch, height, width, generator, flip=flip, pad=pad), pad=pad)


def draw_moves(
    batch: int, height: int, width: int, generator: torch.Generator, *, flip: bool, pad: int
) -> tuple[Tensor, Tensor]:
    """Return where each pixel of a batch comes from in the padded images: rows, int64 [B, H], and columns [B, W].

    To be drawn for a whole batch where several processes share it, so that every image moves as in one process.
    """
    shifts = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(batch, width)
    if flip:
        columns = torch.where(mirrored, columns.flip(1), columns)
    return torch.arange(height) + shifts[0], columns + shifts[1]


def moved(images: Tensor, rows: Tensor, columns: Tensor, *, pad: int) -> Tensor:
    """Return float images [B, C, H, W] moved as `draw_moves` drew it for each of them."""
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    down, across = rows[:, :, None].to(images.device), columns[:, None, :].to(images.device)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    return padded.permute(0, 2, 3, 1)[samples, down, across].permute(0, 3, 1, 2)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(images - mean) / std`` per channel; uint8 images are first scaled to [0, 1].

    Raises:
        InputError: if there is not one mean and one positive standard deviation per channel (a single one serves all).
    """
    channels = images.shape[1]
    for what, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise InputError(f"{what} has {len(values)} values for images of {channels} channels; give one per channel")
    if min(std) <= 0:
        raise InputError(f"std {list(std)} must be above 0 in every channel")
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    shape = (1, -1, 1, 1)
    return (scaled - scaled.new_tensor(mean).view(shape)) / scaled.new_tensor(std).view(shape)
