"""Residual networks for ImageNet (He et al., CVPR 2016, table 1), with torchvision's parameter names."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.networks.init import initialise


class _Residual(nn.Module):
    """A block's shortcut: identity, or a 1x1 convolution with batch norm where the shape changes."""

    downsample: nn.Module | None

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            return x
        shortcut: Tensor = self.downsample(x)
        return shortcut


class BasicBlock(_Residual):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, width, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self._shortcut(x))


class Bottleneck(_Residual):
    """1x1 to narrow, 3x3 that strides (v1.5), 1x1 to widen by four."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, self.expansion * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, 4 * width, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self._shortcut(x))


class ResNet(nn.Module):
    """A 7x7 stem, a 3x3 maximum, four stages of blocks, global average, one linear layer."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], *, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        before = 64
        for width, stride, count in zip((64, 128, 256, 512), (1, 2, 2, 2), blocks, strict=True):
            stages.append(_stage(block, before, width, stride, count))
            before = block.expansion * width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, stride: int, count: int
) -> nn.Sequential:
    out_channels = block.expansion * width
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    first = block(in_channels, width, stride, downsample)
    return nn.Sequential(first, *(block(out_channels, width, 1, None) for _ in range(count - 1)))


def resnet18(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Return ResNet-18, 11.7 M parameters, 1.81 GMACs at 224x224."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels)


def resnet34(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Return ResNet-34, 21.8 M parameters, 3.66 GMACs at 224x224."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels)


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Return ResNet-50 v1.5, 25.6 M parameters, 4.09 GMACs at 224x224."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels)
