"""VGG-16 with batch norm for 32x32 images (Simonyan, Zisserman, ICLR 2015; norms after Ioffe, Szegedy, ICML 2015).

Parameter names are those of kuangliu/pytorch-cifar.
"""

from torch import Tensor, nn

from prune2deploy.networks.init import initialise

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of the convolutions between two poolings."""


class VGG(nn.Module):
    """Stages of convolution, batch norm and ReLU, each ended by a 2x2 maximum; one linear layer."""

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for stage in _STAGES:
            for width in stage:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, 32, 32] to logits [B, classes]."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Return VGG-16 for CIFAR, 14.7 M parameters, 313 MMACs at 32x32."""
    return VGG(num_classes=num_classes, in_channels=in_channels)
