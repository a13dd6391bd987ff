"""The built-in networks, by name; reading the table imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NetworkInfo:
    """What is known of a built-in network before it is built.

    Attributes:
        name: what the user types.
        build: ``module:function`` of the builder, which takes ``num_classes`` and ``in_channels``.
        description: one sentence.
        input_shape: default input of one sample, [C, H, W].
        num_classes: default number of classes.
        paper: where the architecture was published.
    """

    name: str
    build: str
    description: str
    input_shape: tuple[int, int, int]
    num_classes: int
    paper: str


_RESNET = "He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016"
_VGG = "Simonyan, Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015"
_MOBILENET_V2 = "Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018"
_MLPERF_TINY = "Banbury et al., MLPerf Tiny Benchmark, NeurIPS Datasets and Benchmarks 2021"

_CIFAR = ((3, 32, 32), 10)
_IMAGENET = ((3, 224, 224), 1000)
_DIGITS = ((1, 8, 8), 10)

_FAMILY = "prune2deploy.networks"
_ZERO = "CIFAR ResNet whose widening shortcuts take every second pixel and pad channels with zeros (option A)"
_PROJECTION = "CIFAR ResNet whose widening shortcuts are 1x1 convolutions with batch norm"

_ROWS = (
    ("resnet20", "cifar_resnet:resnet20", _ZERO, _CIFAR, _RESNET),
    ("resnet32", "cifar_resnet:resnet32", _ZERO, _CIFAR, _RESNET),
    ("resnet44", "cifar_resnet:resnet44", _ZERO, _CIFAR, _RESNET),
    ("resnet56", "cifar_resnet:resnet56", _ZERO, _CIFAR, _RESNET),
    ("resnet110", "cifar_resnet:resnet110", _ZERO, _CIFAR, _RESNET),
    ("resnet20_proj", "cifar_resnet:resnet20_proj", _PROJECTION, _CIFAR, _RESNET),
    ("resnet32_proj", "cifar_resnet:resnet32_proj", _PROJECTION, _CIFAR, _RESNET),
    ("resnet44_proj", "cifar_resnet:resnet44_proj", _PROJECTION, _CIFAR, _RESNET),
    ("resnet56_proj", "cifar_resnet:resnet56_proj", _PROJECTION, _CIFAR, _RESNET),
    ("resnet110_proj", "cifar_resnet:resnet110_proj", _PROJECTION, _CIFAR, _RESNET),
    ("resnet8", "resnet8:resnet8", "ResNet-8 of MLPerf Tiny: biased convolutions, 1x1 shortcuts", _CIFAR, _MLPERF_TINY),
    (
        "resnet_digits",
        "cifar_resnet:resnet_digits",
        "ResNet-14 for 8x8 digits: trains in a minute on one core, for a first run",
        _DIGITS,
        _RESNET,
    ),
    ("vgg16_bn", "vgg:vgg16_bn", "VGG-16 for CIFAR: thirteen convolutions with batch norm, one linear", _CIFAR, _VGG),
    (
        "mobilenetv2_cifar",
        "mobilenetv2:mobilenetv2_cifar",
        "MobileNetV2 for CIFAR: the first two halvings of the resolution left out",
        _CIFAR,
        _MOBILENET_V2,
    ),
    ("resnet18", "resnet:resnet18", "ImageNet ResNet-18, two convolutions a block", _IMAGENET, _RESNET),
    ("resnet34", "resnet:resnet34", "ImageNet ResNet-34, two convolutions a block", _IMAGENET, _RESNET),
    (
        "resnet50",
        "resnet:resnet50",
        "ImageNet ResNet-50 v1.5: bottlenecks that stride in their 3x3 convolution",
        _IMAGENET,
        _RESNET,
    ),
    (
        "mobilenetv2",
        "mobilenetv2:mobilenetv2",
        "ImageNet MobileNetV2: inverted residuals, depthwise convolutions, ReLU6",
        _IMAGENET,
        _MOBILENET_V2,
    ),
)

NETWORKS: dict[str, NetworkInfo] = {
    name: NetworkInfo(name, f"{_FAMILY}.{build}", description, shape, num_classes, paper)
    for name, build, description, (shape, num_classes), paper in _ROWS
}
"""Every built-in network, by name."""
