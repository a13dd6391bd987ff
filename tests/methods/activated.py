"""Networks with all kinds of activations behind their norms, whose normal inputs make the norms' outputs normal."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.exporter import export_network
from prune2deploy.graph.groups import find_groups
from prune2deploy.groups import Groups

WIDTH = 8


class By(nn.Module):
    """A module of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


KNOWN: Mapping[str, tuple[nn.Module, str]] = {
    "relu": (nn.ReLU(), "Relu"),
    "relu6": (nn.ReLU6(), "Clip(0,6)"),
    "hardtanh": (nn.Hardtanh(-1, 2), "Clip(-1,2)"),
    "leaky_relu": (nn.LeakyReLU(0.1), "LeakyRelu(0.1)"),
    "sigmoid": (nn.Sigmoid(), "Sigmoid"),
    "hardsigmoid": (nn.Hardsigmoid(), "HardSigmoid(0.166667,0.5)"),
    "hardswish": (nn.Hardswish(), "HardSwish"),
    "tanh": (nn.Tanh(), "Tanh"),
    "elu": (nn.ELU(0.7), "Elu(0.7)"),
    "selu": (nn.SELU(), "Selu(1.67326,1.0507)"),
    "celu": (nn.CELU(0.5), "Celu(0.5)"),
    "gelu": (nn.GELU(), "Gelu"),
    "gelu_by_tanh": (nn.GELU(approximate="tanh"), "Gelu(tanh)"),
    "mish": (nn.Mish(), "Mish"),
    "softplus": (nn.Softplus(), "Softplus"),
    "silu": (nn.SiLU(), "Silu"),
    "silu_by_hand": (By(lambda x: torch.sigmoid(x) * x), "Silu"),
    "silu_as_quotient": (By(lambda x: x / (1 + torch.exp(-x))), "Silu"),
    "mish_by_hand": (By(lambda x: x * torch.tanh(F.softplus(x))), "Mish"),
    "hardswish_by_hand": (By(lambda x: x * F.relu6(x + 3) / 6), "HardSwish"),
    "hardswish_by_gate": (By(lambda x: x * F.hardsigmoid(x)), "HardSwish"),
    "hardsigmoid_by_hand": (By(lambda x: F.relu6(x + 3) / 6), "HardSigmoid(0.166667,0.5)"),
    "maximum": (By(lambda x: torch.maximum(x, torch.zeros(()))), "Relu"),
    "twice": (By(lambda x: F.relu(F.relu(x))), "Relu"),
    "halved": (By(lambda x: 0.5 * x - 0.25), "Affine(0.5,-0.25)"),
    "relu_of_halved": (By(lambda x: F.relu(0.5 * x - 0.25)), "Relu of Affine(0.5,-0.25)"),
    "tanh_of_relu": (By(lambda x: torch.tanh(F.relu(x))), "Tanh of Relu"),
}
"""Activations of which bn knows the moments, and what they are called."""

UNKNOWN: Mapping[str, tuple[nn.Module, str]] = {
    "prelu": (nn.PReLU(), "PRelu"),
    "prelu_by_channel": (nn.PReLU(WIDTH), "PRelu"),
    "softsign": (nn.Softsign(), "Abs-Add-Div"),
    "tanhshrink": (nn.Tanhshrink(), "Tanh-Sub"),
    "logsigmoid": (nn.LogSigmoid(), "Log of Sigmoid"),
    "softplus_of_beta": (nn.Softplus(beta=2.0), "Mul-Greater-Softplus-Div-Where"),
}
"""Others."""

ALL = {**KNOWN, **UNKNOWN}


def unit(channels: int, width: int = WIDTH) -> nn.Sequential:
    """Return a 1x1 convolution and its norm."""
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))


class Branches(nn.Module):
    """One branch for every activation: convolution, norm, activation, a convolution that reads it; all added up."""

    def __init__(self, activations: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.makers = nn.ModuleDict({name: unit(3) for name in activations})
        self.activations = nn.ModuleDict(dict(activations))
        self.readers = nn.ModuleDict({name: nn.Conv2d(WIDTH, 4, 1, bias=False) for name in activations})

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.readers[name](act(self.makers[name](x))) for name, act in self.activations.items())
        return torch.stack(list(branches)).sum(0)


def normal_norms(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network with norms of random scale and shift, and the statistics of a normal input of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
            if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
                module[1].running_var.copy_(module[0].weight.square().sum((1, 2, 3)))
    return net.eval()


@cache
def branches(fuse: bool) -> tuple[Branches, Groups]:
    """Return a network with a branch for every activation, and its groups."""
    net = Branches({name: module for name, (module, _) in ALL.items()})
    normal_norms(net)
    return net, exported_groups(net, fuse=fuse)


def maker(activation: str) -> str:
    """Return the id of a branch's group."""
    return f"makers.{activation}.0"


def exported_groups(net: nn.Module, *, fuse: bool = False, channels: int = 3) -> Groups:
    """Return the groups of a network on images [B, channels, 8, 8], by way of its export."""
    return find_groups(export_network(net, (torch.randn(2, channels, 8, 8),), fuse=fuse).model)
