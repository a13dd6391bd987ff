"""One network, whichever exporter wrote it: the same widths."""

import io
import warnings
from collections.abc import Callable

import onnx
import pytest
import torch
from torch import nn

from graph.small import copy_of
from prune2deploy.exporter import export_network
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.verify import verify


class Block(nn.Module):
    """A padded depthwise inverted residual with squeeze and excitation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, 4, 1), nn.ReLU(), nn.Conv2d(4, hidden, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        return x + self.project(y * self.squeeze(y))


class Net(nn.Module):
    """Residual blocks, a concatenation of uneven parts, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 16), Block(8, 12))
        self.left, self.right = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Sequential(nn.Linear(12 * 4 * 4, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        x = self.pool(torch.cat([torch.relu(self.left(x)), torch.sigmoid(self.right(x))], 1))
        return self.head(x.view(x.size(0), -1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        for block, dead in zip(net.blocks, ([1, 5, 6], [0, 11]), strict=True):
            for conv, norm in (block.expand[:2], block.depthwise[:2]):
                for parameter in (conv.weight, norm.weight, norm.bias):
                    parameter[dead] = 0
        net.right.weight.copy_(net.left.weight)  # equal tensors, which the legacy exporter stores once
        net.right.bias.copy_(net.left.bias)
        net.left.weight[[0, 3]] = 0
        net.left.bias[[0, 3]] = 0
        net.right.weight[5] = 0
        net.head[0].weight[7] = 0
    return net


def dynamo(net: nn.Module, fuse: bool) -> onnx.ModelProto:
    return export_network(net, [torch.randn(2, 3, 8, 8)], fuse=fuse).model


def legacy(net: nn.Module, opset: int) -> onnx.ModelProto:
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(2, 3, 8, 8),),
            data,
            dynamo=False,
            opset_version=opset,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
        )
    return onnx.load_from_string(data.getvalue())


FORMS: dict[str, Callable[[nn.Module], onnx.ModelProto]] = {
    "dynamo, optimised": lambda net: dynamo(net, True),
    "dynamo, norms apart": lambda net: dynamo(net, False),
    "legacy, opset 17": lambda net: legacy(net, 17),
    "legacy, opset 13": lambda net: legacy(net, 13),
    "legacy, opset 11": lambda net: legacy(net, 11),
    "legacy, opset 9": lambda net: legacy(net, 9),
}


def widths(model: onnx.ModelProto) -> list[tuple[int, int]]:
    slimmed = remove_dead_channels(copy_of(model))
    verify(model.SerializeToString(), slimmed.model.SerializeToString(), shapes={"input": (2, 3, 8, 8)})
    assert slimmed.opaque == {}
    return sorted((row.before, row.after) for row in slimmed.layers if row.kind == "linear")


def test_every_exporter_gives_the_same_widths(net: nn.Module) -> None:
    found = {name: widths(make(net)) for name, make in FORMS.items()}
    first = found["dynamo, optimised"]
    assert {name: one for name, one in found.items() if one != first} == {}
    assert sum(before - after for before, after in first) >= 3 * 3 + 2 * 3 + 4


def test_equal_weights_that_share_an_initializer_are_cut_apart() -> None:
    """Two convolutions of one weight whose readers need different channels."""
    conv = [nn.Conv2d(3, 6, 1, bias=False) for _ in range(2)]
    with torch.no_grad():
        conv[1].weight.copy_(conv[0].weight)

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv
            self.c, self.d = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.a(x))) + self.d(torch.tanh(self.b(x)))

    net = Twins().eval()
    with torch.no_grad():
        net.c.weight[:, :3] = 0
        net.d.weight[:, 4:] = 0
    model = legacy(net, 17)
    names = [name for item in model.graph.node if item.op_type == "Conv" for name in item.input[1:2]]
    assert len(set(names)) < 4 or any(item.op_type == "Identity" for item in model.graph.node)
    assert widths(model) == sorted([(6, 3), (6, 4), (2, 2), (2, 2)])
