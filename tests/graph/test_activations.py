"""Activations of groups: what channels pass, and as what function of their norm they are read, from real exports."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods.activated import ALL, WIDTH, branches, exported_groups, maker, unit
from onnx.helper import make_node as node
from torch import Tensor, nn

from graph.small import graph, weights
from prune2deploy.graph.groups import find_groups
from prune2deploy.groups import Group, Groups


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("activation", ALL)
def test_an_exported_activation_is_told_by_its_name(activation: str, fuse: bool) -> None:
    group = branches(fuse)[1][maker(activation)]
    name = ALL[activation][1]
    assert (group.activations, group.read_as) == ((name,), (name,))


class Gated(nn.Module):
    """Convolution, norm, ReLU, a gate, a convolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.maker, self.reader = unit(3), nn.Conv2d(WIDTH, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(WIDTH, 2, 1), nn.Conv2d(2, WIDTH, 1)
        self.attend = nn.Conv2d(3, 1, 1)
        self.second = unit(3)
        self.kind = kind

    def gate(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind == "one map for all channels":
            return torch.sigmoid(self.attend(x))
        if self.kind == "a sigmoid of another layer":
            return torch.sigmoid(self.second(x))
        excited = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        if self.kind == "expanded":
            return torch.sigmoid(excited.flatten(1)).view(-1, WIDTH, 1, 1).expand_as(y)
        return {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid, "tanh": torch.tanh}[self.kind](excited)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.maker(x))
        return self.reader(self.gate(x, y) * y)


class Pooled(nn.Module):
    """Several networks side by side; their outputs are averaged over the image and put in a row."""

    def __init__(self, nets: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, net in nets.items():
            self.add_module(name, net)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x).mean((2, 3)) for net in self.children()], 1)


def passed(group: Group) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    return group.activations, group.read_as


SQUEEZES = ["sigmoid", "hardsigmoid", "tanh", "expanded"]
OTHER_GATES = ["one map for all channels", "a sigmoid of another layer"]


@cache
def gates() -> Groups:
    return exported_groups(Pooled({kind: Gated(kind) for kind in SQUEEZES + OTHER_GATES}))


@pytest.mark.parametrize("kind", SQUEEZES)
def test_the_gate_of_a_squeeze_and_excitation_is_not_the_activation_of_what_it_multiplies(kind: str) -> None:
    assert passed(gates()[f"{kind}.maker.0"]) == (("Relu",), ("Relu", "Gated(Relu)"))
    assert gates()[f"{kind}.squeeze"].read_as == ("Silu",)


@pytest.mark.parametrize("kind", OTHER_GATES)
def test_another_gate_is_none_either(kind: str) -> None:
    assert passed(gates()[f"{kind}.maker.0"]) == (("Relu",), ("Gated(Relu)",))


class Wired(nn.Module):
    """A group whose channels take the ways that the tests below are named after."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.maker, self.other, self.reader = unit(3), unit(WIDTH), nn.Conv2d(WIDTH, 4, 1)
        self.deep = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH), nn.BatchNorm2d(WIDTH))
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.maker
        y = self.maker(x)
        if self.way == "norm behind":
            return self.reader(norm(F.relu(conv(x))))
        if self.way == "depthwise":
            return self.reader(self.deep(F.silu(y)))
        if self.way == "depthwise without norm":
            return self.reader(self.deep[0](F.silu(y)))
        if self.way == "two readers":
            return self.reader(F.hardswish(y)) + self.reader(y)
        if self.way == "sum before":
            z = F.silu(y)
            return self.reader(F.silu(z + self.other(z)))
        if self.way == "sum behind":
            z = F.silu(y)
            return self.reader(z + F.silu(self.other(z)))
        if self.way == "linear sum":
            return self.reader(y + self.other(y))
        if self.way == "pooled":
            return self.reader(F.max_pool2d(F.gelu(y), 2))
        if self.way == "concatenated":
            return self.reader(torch.cat([F.gelu(y)[:, :4], F.gelu(y)[:, 4:]], 1))
        assert self.way == "scaled"
        return self.reader(F.relu(y) * self.scale)


WAYS = {
    "norm behind": (("Relu",), ("Identity",)),
    "depthwise": (("Silu",), ("Identity",)),
    "depthwise without norm": (("Silu",), ("Silu",)),
    "two readers": (("HardSwish",), ("HardSwish", "Identity")),
    "sum before": (("Silu",), ("Silu",)),
    "sum behind": (("Silu",), ("Silu",)),
    "linear sum": ((), ("Identity",)),
    "pooled": (("Gelu",), ("Gelu",)),
    "concatenated": (("Gelu",), ("Gelu",)),
    "scaled": (("Relu",), ("Gated(Relu)",)),
}


@cache
def ways() -> Groups:
    return exported_groups(Pooled({way: Wired(way) for way in WAYS}))


@pytest.mark.parametrize("way", WAYS)
def test_channels_are_read_as_what_lies_between_their_norm_and_the_reader(way: str) -> None:
    assert passed(ways()[f"{way}.maker.0"]) == WAYS[way]


def test_parts_of_a_concatenation_are_read_as_their_own_functions() -> None:
    nodes = [
        node("Conv", ["x", "left.weight"], ["a"]),
        node("Softplus", ["a"], ["b"]),
        node("Conv", ["x", "right.weight"], ["c"]),
        node("Concat", ["b", "c"], ["d"], axis=1),
        node("Tanh", ["d"], ["e"]),
        node("Conv", ["e", "head.weight"], ["y"]),
    ]
    constants = {
        "left.weight": weights(3, 3, 1, 1),
        "right.weight": weights(5, 3, 1, 1),
        "head.weight": weights(2, 8, 1, 1),
    }
    groups = find_groups(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6]}))
    assert passed(groups["left"]) == (("Softplus", "Tanh"), ("Tanh of Softplus",))
    assert passed(groups["right"]) == (("Tanh",), ("Tanh",))


@pytest.mark.parametrize("limits", [(0.0, 6.0), (-2.0, np.inf)])
def test_a_clip_is_told_by_its_bounds(limits: tuple[float, float]) -> None:
    nodes = [
        node("Conv", ["x", "c.weight"], ["a"]),
        node("Clip", ["a", "low", "high"], ["b"]),
        node("Conv", ["b", "d.weight"], ["y"]),
    ]
    bounds = {"low": np.float32(limits[0]), "high": np.float32(limits[1])}
    constants = {"c.weight": weights(4, 3, 1, 1), "d.weight": weights(2, 4, 1, 1)}
    groups = find_groups(graph(nodes, constants | bounds, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6]}))
    assert groups["c"].read_as == ("Clip({:g},{:g})".format(*limits),)
