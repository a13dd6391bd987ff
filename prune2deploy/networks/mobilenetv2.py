"""MobileNetV2 (Sandler et al., CVPR 2018, table 2), with torchvision's parameter names.

The CIFAR form leaves out the first two halvings of the resolution; its names are those of
chenyaofo/pytorch-cifar-models.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from prune2deploy.networks.init import initialise

_STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""Expansion factor, output width and number of blocks of each stage."""

_IMAGENET_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)
_CIFAR_STRIDES = (1, 1, 1, 2, 2, 1, 2, 1)
"""Stride of the stem, then of the first block of each stage."""


def _conv_norm_relu6(in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """1x1 to widen (left out at expansion 1), 3x3 depthwise, linear 1x1 to narrow; a shortcut where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_norm_relu6(in_channels, hidden, 1)]
        layers += [
            _conv_norm_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """A stem, seven stages of inverted residuals, a 1x1 convolution to 1280, global average, one linear layer."""

    def __init__(self, strides: Sequence[int], *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        before, last = 32, 1280
        layers: list[nn.Module] = [_conv_norm_relu6(in_channels, before, 3, strides[0])]
        for (expansion, width, count), stride in zip(_STAGES, strides[1:], strict=True):
            for index in range(count):
                layers.append(InvertedResidual(before, width, stride if index == 0 else 1, expansion))
                before = width
        layers.append(_conv_norm_relu6(before, last, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def mobilenetv2(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Return MobileNetV2, 3.5 M parameters, 301 MMACs at 224x224."""
    return MobileNetV2(_IMAGENET_STRIDES, num_classes=num_classes, in_channels=in_channels)


def mobilenetv2_cifar(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return MobileNetV2 for CIFAR, 2.2 M parameters, 88 MMACs at 32x32."""
    return MobileNetV2(_CIFAR_STRIDES, num_classes=num_classes, in_channels=in_channels)
