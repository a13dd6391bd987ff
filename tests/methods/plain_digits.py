"""A small plain network that learns the digits in seconds, with its groups, and what methods are held against."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from toy_groups import conv_layer, filters, member, norm_layer, norm_members, of, reader, span

from prune2deploy.apply import MaskKeeper, apply_masks
from prune2deploy.budget import Budget
from prune2deploy.cost import Cost, Term, Width
from prune2deploy.data import load_data
from prune2deploy.groups import Group, Groups
from prune2deploy.masks import widths
from prune2deploy.methods import load_method
from prune2deploy.train import Task, evaluate

WIDTHS = (16, 16, 32, 32)


class PlainDigits(nn.Module):
    """Four convolutions with norm and ReLU, a pool after the second, mean and linear, on images [B, 1, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        for index, (into, out) in enumerate(zip((1, *WIDTHS), WIDTHS, strict=False), 1):
            self.add_module(f"conv{index}", nn.Conv2d(into, out, 3, padding=1, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(out))
        self.fc = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(1, 5):
            x = self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(x)).relu()
            if index == 2:
                x = nn.functional.max_pool2d(x, 2)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def plain_groups() -> Groups:
    groups, layers, macs, parameters = [], [], [], []
    into = Width(1)
    for index, size in enumerate(WIDTHS, 1):
        conv, norm, after = f"conv{index}", f"bn{index}", f"conv{index + 1}" if index < 4 else "fc"
        own, all_ = of(**{conv: 1}), span(0, size)
        members = (*filters(conv, all_), *norm_members(norm, all_), reader(after, all_))
        groups.append(Group(conv, size, members, ("Relu",)))
        layers += [conv_layer(conv, own, into, norm=norm), norm_layer(norm, own)]
        macs.append(Term(conv, 9 * (64 if index < 3 else 16), (own, into)))
        parameters += [Term(conv, 9, (own, into)), Term(norm, 2, (own,))]
        into = own
    logits = (member("fc.weight", "filter", span(0, 10)), member("fc.bias", "bias", span(0, 10)))
    groups.append(Group("fc", 10, logits, (), kept_because="an output of the network"))
    layers.append(conv_layer("fc", of(fc=1), into, bias=True, op_type="Gemm"))
    macs.append(Term("fc", 1, (of(fc=1), into)))
    parameters += [Term("fc", 1, (of(fc=1), into)), Term("fc", 1, (of(fc=1),))]
    return Groups(tuple(groups), tuple(layers), Cost(tuple(macs), tuple(parameters)))


def digits_task(seed: int = 0) -> Task:
    data = load_data("digits")
    return Task(data, data.mean, data.std, seed=seed, settings={"precision": "fp32"})


def untrained(seed: int = 0) -> PlainDigits:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PlainDigits()


@cache
def _trained(epochs: int) -> PlainDigits:
    net = untrained()
    digits_task().train(net, epochs=epochs, lr=0.1, batch_size=64)
    return net


def trained(epochs: int = 8) -> PlainDigits:
    """Return a trained network, which is made once for all tests of a process."""
    return deepcopy(_trained(epochs))


def finetuned(net: nn.Module, keep: Mapping[str, np.ndarray], *, epochs: int = 2, lr: float = 0.02) -> float:
    """Return the top-1 accuracy on the test images of a copy that was masked and fine-tuned."""
    copy, groups, task = deepcopy(net), plain_groups(), digits_task()
    apply_masks(copy, groups, keep)
    if epochs:
        task.train(copy, epochs=epochs, lr=lr, batch_size=64, after_step=MaskKeeper(copy, groups, keep))
    return top1_of(copy)


def top1_of(net: nn.Module) -> float:
    """Return the top-1 accuracy on the test images."""
    task = digits_task()
    return float(evaluate(net, task.data.test, task.mean, task.std).top1)


def random_at(keep: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Return random masks of the same widths."""
    groups = plain_groups()
    budget = Budget(None, widths=widths(keep))
    return load_method("random", seed=seed).plan({}, groups, budget).keep
