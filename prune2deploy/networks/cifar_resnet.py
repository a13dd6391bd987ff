"""Residual networks for small images (He et al., CVPR 2016, section 4.2).

Parameter names are those of akamaster/pytorch_resnet_cifar10 (zero-padded shortcuts, ``linear``) and of
IntelLabs/distiller (projection shortcuts, ``fc``), so their checkpoints load.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.networks.init import initialise


class ZeroPad(nn.Module):
    """A shortcut without weights: every second pixel, zero channels on both sides.

    Of a narrow network it holds which of its input's channels it takes; no state dict has them.
    """

    taken: Tensor | None

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = extra, extra, stride
        self.register_buffer("taken", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, before + C + after, H / stride, W / stride]."""
        step = self.stride
        x = x[:, :, ::step, ::step]
        if self.taken is not None:
            x = x.index_select(1, self.taken)
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def narrow_channels(self, kept_in: Sequence[int], kept_out: Sequence[int]) -> None:
        """Work on the channels that are left: the kept old indices of the input's and of the output's, in order."""
        places = {old + self.before: new for new, old in enumerate(kept_in)}
        taken = [places[old] for old in kept_out if old in places]
        self.before = sum(old < self.before for old in kept_out)
        self.after = len(kept_out) - self.before - len(taken)
        self.taken = None if taken == list(range(len(kept_in))) else torch.tensor(taken, dtype=torch.long)


def zero_pad_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the shortcut of option A."""
    return ZeroPad((out_channels - in_channels) // 2, stride)


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the shortcut of option B."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


Shortcut = Callable[[int, int, int], nn.Module]


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels and stride == 1
        self.downsample = nn.Identity() if same else shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class CifarResNet(nn.Module):
    """A stem, three stages of blocks, global average, and one linear layer called ``head``."""

    def __init__(
        self,
        *,
        blocks: int,
        shortcut: Shortcut,
        head: str,
        num_classes: int,
        in_channels: int,
        widths: Sequence[int] = (16, 32, 64),
        strides: Sequence[int] = (1, 2, 2),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        before = widths[0]
        for width, stride in zip(widths, strides, strict=True):
            first = Block(before, width, stride, shortcut)
            stages.append(nn.Sequential(first, *(Block(width, width, 1, shortcut) for _ in range(blocks - 1))))
            before = width
        self.layer1, self.layer2, self.layer3 = stages
        self.head = head
        self.add_module(head, nn.Linear(before, num_classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.get_submodule(self.head)(x.mean((2, 3)))
        return logits


def _zero(depth: int, num_classes: int, in_channels: int) -> CifarResNet:
    return CifarResNet(
        blocks=(depth - 2) // 6,
        shortcut=zero_pad_shortcut,
        head="linear",
        num_classes=num_classes,
        in_channels=in_channels,
    )


def _projection(depth: int, num_classes: int, in_channels: int) -> CifarResNet:
    return CifarResNet(
        blocks=(depth - 2) // 6,
        shortcut=projection_shortcut,
        head="fc",
        num_classes=num_classes,
        in_channels=in_channels,
    )


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-20, 0.27 M parameters, 40.6 MMACs at 32x32."""
    return _zero(20, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-32, 0.46 M parameters, 68.9 MMACs at 32x32."""
    return _zero(32, num_classes, in_channels)


def resnet44(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-44, 0.66 M parameters, 97.2 MMACs at 32x32."""
    return _zero(44, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-56, 0.85 M parameters, 125.5 MMACs at 32x32."""
    return _zero(56, num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-110, 1.7 M parameters, 253 MMACs at 32x32."""
    return _zero(110, num_classes, in_channels)


def resnet20_proj(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-20 with projection shortcuts."""
    return _projection(20, num_classes, in_channels)


def resnet32_proj(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-32 with projection shortcuts."""
    return _projection(32, num_classes, in_channels)


def resnet44_proj(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-44 with projection shortcuts."""
    return _projection(44, num_classes, in_channels)


def resnet56_proj(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-56 with projection shortcuts."""
    return _projection(56, num_classes, in_channels)


def resnet110_proj(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-110 with projection shortcuts."""
    return _projection(110, num_classes, in_channels)


def resnet_digits(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Return ResNet-14 for 8x8 images: the second stage keeps their resolution, 4.7 MMACs."""
    return CifarResNet(
        blocks=2,
        shortcut=projection_shortcut,
        head="fc",
        num_classes=num_classes,
        in_channels=in_channels,
        strides=(1, 1, 2),
    )
