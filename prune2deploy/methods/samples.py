"""Samples of what a layer reads and gives: its inputs at some positions, and the windows behind some outputs."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def columns(owner: "nn.Module", values: "Tensor") -> "Tensor":
    """Return what a module reads as [images, inputs, positions]; a 1x1 convolution skips what its stride does."""
    from torch import nn

    if isinstance(owner, nn.Linear):
        return values.reshape(len(values), -1, values.shape[-1]).transpose(1, 2)
    sizes, strides = getattr(owner, "kernel_size", ()), getattr(owner, "stride", ())
    if sizes and all(size == 1 for size in sizes) and not getattr(owner, "transposed", False):
        values = values[(slice(None), slice(None), *(slice(None, None, stride) for stride in strides))]
    return values.flatten(2)


def some_positions(found: "Tensor", count: int, generator: "torch.Generator") -> "Tensor":
    """Return [images * positions, inputs] of [images, inputs, positions]: all, or ``count`` random ones per image."""
    import torch

    images, inputs, positions = found.shape
    if 0 < count < positions:
        chosen = torch.randint(positions, (images, 1, count), generator=generator).to(found.device)
        found = found.gather(2, chosen.expand(images, inputs, count))
    return found.transpose(1, 2).reshape(-1, inputs)


def positioned(owner: "nn.Module", output: "Tensor") -> "Tensor":
    """Return what a convolution or linear layer gives as [images, positions, outputs]."""
    from torch import nn

    if isinstance(owner, nn.Linear):
        return output.reshape(len(output), -1, output.shape[-1])
    return output.flatten(2).transpose(1, 2)


def take(values: "Tensor", chosen: "Tensor") -> "Tensor":
    """Return some positions, [images * positions, ...], of [images, positions, ...]; ``chosen`` is as in `windows`."""
    shape = (*chosen.shape, *values.shape[2:])
    index = chosen.view(*chosen.shape, *[1] * (values.ndim - 2)).expand(shape)
    return values.detach().gather(1, index).flatten(0, 1)


def output_sizes(owner: Any, values: "Tensor") -> tuple[int, ...]:
    """Return the sizes of what a convolution gives, without images and channels, for its input."""
    kernel, stride, dilation = _geometry(owner)
    return tuple(
        (int(size) + sum(pad) - step * (taps - 1) - 1) // jump + 1
        for size, pad, taps, jump, step in zip(values.shape[2:], _pads(owner), kernel, stride, dilation, strict=True)
    )


def windows(owner: "nn.Module", values: "Tensor", chosen: "Tensor") -> "Tensor":
    """Return what makes some outputs of a module: [images, positions, inputs, taps].

    Args:
        owner: a convolution, or a linear layer (which has one tap).
        values: its input.
        chosen: int64 [images, positions]: flat indices of outputs.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    if isinstance(owner, nn.Linear):
        flat = values.reshape(len(values), -1, values.shape[-1])
        return flat.gather(1, chosen[:, :, None].expand(-1, -1, flat.shape[2]))[..., None]
    kernel, stride, dilation = _geometry(owner)
    mode = getattr(owner, "padding_mode", "zeros")
    pads = [one for pair in reversed(_pads(owner)) for one in pair]
    padded = F.pad(values, pads, mode="constant" if mode == "zeros" else mode) if any(pads) else values
    places, rest, step = torch.zeros_like(chosen)[:, :, None], chosen, 1
    outputs = output_sizes(owner, values)
    for axis in reversed(range(len(kernel))):  # from the axis whose neighbours lie side by side
        taps = torch.arange(kernel[axis], device=chosen.device) * dilation[axis]
        along = (rest % outputs[axis])[:, :, None] * stride[axis] + taps  # [images, positions, taps of the axis]
        places = (along[..., :, None] * step + places[..., None, :]).flatten(2)
        rest, step = rest // outputs[axis], step * int(padded.shape[2 + axis])
    images, positions, count = places.shape
    flat = padded.flatten(2)
    found = flat.gather(2, places.view(images, 1, -1).expand(-1, flat.shape[1], -1))
    return found.view(images, flat.shape[1], positions, count).transpose(1, 2)


def some_windows(owner: "nn.Module", values: "Tensor", count: int, generator: "torch.Generator") -> "Tensor":
    """Return a convolution's `windows`, [images * positions, inputs, taps]: all, or ``count`` random ones per image."""
    import torch

    positions = math.prod(output_sizes(owner, values))
    if 0 < count < positions:
        chosen = torch.randint(positions, (len(values), count), generator=generator)
    else:
        chosen = torch.arange(positions).expand(len(values), positions)
    return windows(owner, values, chosen.to(values.device)).flatten(0, 1)


def _geometry(owner: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return tuple(owner.kernel_size), tuple(owner.stride), tuple(owner.dilation)


def _pads(owner: Any) -> list[tuple[int, int]]:
    """Return the padding before and after, for each spatial axis."""
    if owner.padding == "valid":
        return [(0, 0)] * len(owner.kernel_size)
    if owner.padding == "same":
        totals = [d * (k - 1) for k, d in zip(owner.kernel_size, owner.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(pad, pad) for pad in owner.padding]
