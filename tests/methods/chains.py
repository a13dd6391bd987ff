"""Plain chains of convolutions with their groups, gated as FBS gates them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_groups import (
    conv_layer,
    filters,
    norm_layer,
    norm_members,
    randomise,
    reader,
    span,
)

from prune2deploy.apply import weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.cost import Cost, Term, Width
from prune2deploy.groups import Group, Groups
from prune2deploy.methods.base import Context
from prune2deploy.methods.fbs import FBS, State
from prune2deploy.train.boosting import Boosted, boosted_layers

HALF = Budget(Target("macs", 0.5))


class Chain(nn.Module):
    """3x3 convolutions, each with norm and ReLU, a global average, and a linear layer."""

    def __init__(self, layers: list["Step"], inputs: int, classes: int = 10) -> None:
        super().__init__()
        before = [inputs, *(step.width for step in layers)]
        self.convs = nn.ModuleList(
            nn.Conv2d(size, step.width, 3, step.stride, step.padding, bias=False)
            for size, step in zip(before, layers, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(step.width) for step in layers)
        self.fc = nn.Linear(before[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Step:
    """A convolution of a chain, and how many rows its output has."""

    width: int
    rows: int
    stride: int = 1
    padding: int = 1


def chain_groups(layers: list[Step], inputs: int, classes: int = 10) -> Groups:
    names = [f"convs.{index}" for index in range(len(layers))]
    readers = [*names[1:], "fc"]
    forms = [Width(inputs), *(Width(0, ((name, 1),)) for name in names)]
    groups = [
        Group(
            name,
            step.width,
            (
                *filters(name, span(0, step.width)),
                *norm_members(f"norms.{index}", span(0, step.width)),
                reader(readers[index], span(0, step.width)),
            ),
            ("Relu",),
        )
        for index, (name, step) in enumerate(zip(names, layers, strict=True))
    ]
    rows: list[Any] = []
    for index, name in enumerate(names):
        rows += [
            conv_layer(name, forms[index + 1], forms[index], norm=f"norms.{index}"),
            norm_layer(f"norms.{index}", forms[index + 1]),
        ]
    rows.append(conv_layer("fc", Width(classes), forms[-1], bias=True, op_type="Gemm"))
    macs = [
        Term(name, 9 * step.rows**2, (forms[index + 1], forms[index]))
        for index, (name, step) in enumerate(zip(names, layers, strict=True))
    ]
    return Groups(tuple(groups), tuple(rows), Cost((*macs, Term("fc", 1, (Width(classes), forms[-1]))), ()))


SMALL = [Step(12, 8), Step(16, 4, stride=2), Step(16, 4)]


def small(seed: int = 0) -> tuple[nn.Module, Groups]:
    """Return a chain on images [B, 3, 8, 8] in float64, and its groups."""
    return randomise(Chain(SMALL, 3), seed).double(), chain_groups(SMALL, 3)


def images(count: int = 6, channels: int = 3, seed: int = 3) -> Tensor:
    return torch.randn((count, channels, 8, 8), generator=torch.Generator().manual_seed(seed)).double()


def batches(x: Tensor, size: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.arange(len(part)) % 5) for part in x.split(size)]


def gated(
    net: nn.Module, groups: Groups, method: FBS | None = None, budget: Budget = HALF
) -> tuple[dict[str, Boosted], State]:
    """Gate a network in place and lower it to its last density, without training."""
    method = method or FBS(predictor="kaiming")
    state = method.prepare(net, groups, budget)
    for epoch in range(method.training(state)["epochs"]):
        method.epoch_end(state, epoch)
    return boosted_layers(net), state


def planned(net: nn.Module, groups: Groups, state: State, x: Tensor, method: FBS | None = None) -> dict[str, Any]:
    context = Context(net, batches(x), batches(x), state)
    return (method or FBS()).plan(weights_of(net), groups, HALF, context).report
