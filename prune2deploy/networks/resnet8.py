"""ResNet-8 of the MLPerf Tiny benchmark, image classification (Banbury et al., 2021).

Converted from Keras: convolutions have biases, norms use epsilon 1e-3, and a 3x3 convolution of stride 2 pads right
and bottom only. Parameter names: ``stem``; ``c2a`` is the first convolution of block 2, ``b2a`` its norm, ``s2`` the
shortcut.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.networks.init import initialise


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class ResNet8(nn.Module):
    """A stem and three residual blocks of widths 16, 32, 64."""

    def __init__(self, *, num_classes: int, in_channels: int, width: int = 16) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(in_channels, width, 3, 1, 1), _norm(width)
        self.c1a, self.b1a = nn.Conv2d(width, width, 3, 1, 1), _norm(width)
        self.c1b, self.b1b = nn.Conv2d(width, width, 3, 1, 1), _norm(width)
        self.c2a, self.b2a = nn.Conv2d(width, 2 * width, 3, 2), _norm(2 * width)
        self.c2b, self.b2b = nn.Conv2d(2 * width, 2 * width, 3, 1, 1), _norm(2 * width)
        self.s2 = nn.Conv2d(width, 2 * width, 1, 2)
        self.c3a, self.b3a = nn.Conv2d(2 * width, 4 * width, 3, 2), _norm(4 * width)
        self.c3b, self.b3b = nn.Conv2d(4 * width, 4 * width, 3, 1, 1), _norm(4 * width)
        self.s3 = nn.Conv2d(2 * width, 4 * width, 1, 2)
        self.fc = nn.Linear(4 * width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        x = F.relu(self.stem_bn(self.stem(x)))
        y = F.relu(self.b1a(self.c1a(x)))
        x = F.relu(self.b1b(self.c1b(y)) + x)
        y = F.relu(self.b2a(self.c2a(_pad_end(x))))
        x = F.relu(self.b2b(self.c2b(y)) + self.s2(x))
        y = F.relu(self.b3a(self.c3a(_pad_end(x))))
        x = F.relu(self.b3b(self.c3b(y)) + self.s3(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _pad_end(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 0, 1))


def resnet8(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return ResNet-8, 78 k parameters, 12.5 MMACs at 32x32."""
    return ResNet8(num_classes=num_classes, in_channels=in_channels)
