"""Rounded widths keep the budget, and lie near the widths that they would have without rounding, in whole networks."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
from toy_groups import conv_layer

from prune2deploy.budget import Ranking, Target, choose_widths, masks_to_budget, share
from prune2deploy.climb import distance
from prune2deploy.cost import Cost, Term, Width
from prune2deploy.groups import Group, Groups, Layer
from prune2deploy.masks import widths as widths_of
from prune2deploy.rounding import Ladders, build_ladders


class Network:
    """Groups of a network that is written down layer by layer."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.layers: list[Layer] = []
        self.terms: list[Term] = []

    def group(self, name: str, size: int) -> Width:
        self.sizes[name] = size
        return Width(0, ((name, 1),))

    def conv(self, out: Width, into: Width, weights: int, pixels: int, *, depthwise: bool = False) -> Width:
        """Add a convolution with so many weights per pair of channels, at so many places."""
        name = f"conv{len(self.layers)}"
        self.layers.append(conv_layer(name, out, into))
        self.terms.append(Term(name, weights * pixels, (out,) if depthwise else (out, into)))
        return out

    def groups(self) -> Groups:
        groups = tuple(Group(name, size, (), ()) for name, size in self.sizes.items())
        return Groups(groups, tuple(self.layers), Cost(tuple(self.terms), ()))


def plus(*widths: Width) -> Width:
    return Width(sum(width.constant for width in widths), tuple(term for width in widths for term in width.terms))


def head(net: Network, classes: int, into: Width) -> Groups:
    net.terms.append(Term("fc", classes, (into,)))
    return net.groups()


def resnet56() -> Groups:
    """For 32x32 images, with padded shortcuts: later trunks carry the channels of earlier ones."""
    net = Network()
    trunk = x = net.conv(net.group("trunk1", 16), Width(3), 9, 32 * 32)
    for stage, (size, added) in enumerate(((32, 0), (16, 16), (8, 32)), 1):
        if added:
            trunk = plus(x, net.group(f"trunk{stage}", added))
        for block in range(9):
            inner = net.conv(net.group(f"stage{stage}.{block}", 8 * 2**stage), x, 9, size**2)
            x = net.conv(trunk, inner, 9, size**2)
    return head(net, 10, x)


def resnet18() -> Groups:
    """For 224x224 images, with a convolution in the first shortcut of a stage."""
    net = Network()
    x = trunk = net.conv(net.group("stem", 64), Width(3), 49, 112**2)
    for stage, size in enumerate((56, 28, 14, 7)):
        for block in range(2):
            wide = 64 * 2**stage
            if stage and not block:
                trunk = net.conv(net.group(f"trunk{stage}", wide), x, 1, size**2)
            inner = net.conv(net.group(f"stage{stage}.{block}", wide), x, 9, size**2)
            x = net.conv(trunk, inner, 9, size**2)
    return head(net, 1000, x)


def mobilenetv2() -> Groups:
    """For 224x224 images, with residual trunks between depthwise convolutions."""
    net, size = Network(), 112
    hidden = net.conv(net.group("stem", 32), Width(3), 9, size**2)
    net.conv(hidden, hidden, 9, size**2, depthwise=True)
    x = net.conv(net.group("trunk0", 16), hidden, 1, size**2)
    stages = ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
    into = 16
    for stage, (out, blocks, stride) in enumerate(stages, 1):
        trunk = net.group(f"trunk{stage}", out)
        for block in range(blocks):
            hidden = net.conv(net.group(f"hidden{stage}.{block}", 6 * into), x, 1, size**2)
            size //= stride if block == 0 else 1
            net.conv(hidden, hidden, 9, size**2, depthwise=True)
            x, into = net.conv(trunk, hidden, 1, size**2), out
    return head(net, 1000, net.conv(net.group("last", 1280), x, 1, size**2))


NETWORKS: Mapping[str, tuple[Callable[[], Groups], int]] = {
    "resnet56": (resnet56, 125_485_696),
    "resnet18": (resnet18, 1_814_073_344),
    "mobilenetv2": (mobilenetv2, 300_774_272),
}
SEVENTY_PERCENT = 60.3e6 / 125_485_696
"""The share of ResNet-56's MACs that remains where every width is 70 % of itself."""


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_cost_what_they_are_known_to_cost(name: str) -> None:
    make, macs = NETWORKS[name]
    groups = make()
    assert groups.cost.macs(groups.full_widths()) == macs


def rounded_down(groups: Groups, kept: float, multiple: int) -> dict[str, int]:
    return {group.id: max(multiple, int(kept * group.size) // multiple * multiple) for group in groups.groups}


def test_resnet56_rounded_to_multiples_of_8_keeps_its_60_million_macs() -> None:
    groups, target = resnet56(), Target("macs", SEVENTY_PERCENT)
    widths = choose_widths(groups, target, round_to=8)
    macs = groups.cost.macs(widths)
    assert 59.5e6 < macs <= 60.3e6
    assert groups.cost.macs(rounded_down(groups, 0.7, 8)) < 40e6, "rounding every width down loses a third of them"
    for group in groups.groups:
        assert widths[group.id] % 8 == 0
        assert widths[group.id] >= 8
        wider = min(group.size, widths[group.id] + 8)
        assert wider == widths[group.id] or groups.cost.macs(widths | {group.id: wider}) > 60.3e6


CASES = [(name, kept, multiple) for name in NETWORKS for kept in (0.3, SEVENTY_PERCENT, 0.7) for multiple in (8, 16)]
REACHABLE = [case for case in CASES if case[0] != "resnet56" or case[1] == 0.7 or case[2] == 8]


@pytest.mark.parametrize(("name", "kept", "multiple"), REACHABLE)
def test_rounded_widths_lie_near_the_unrounded_ones_and_keep_the_budget(name: str, kept: float, multiple: int) -> None:
    groups, target = NETWORKS[name][0](), Target("macs", kept)
    # A multiple is the least that a group keeps; what that costs, the others spare without rounding too.
    floors = {group.id: min(group.size, multiple) for group in groups.groups}
    wanted = choose_widths(groups, target, floors=floors)
    widths = choose_widths(groups, target, round_to=multiple)
    assert kept - 0.015 < share(groups, "macs", widths) <= kept
    off = np.array([(widths[group.id] - wanted[group.id]) / multiple for group in groups.groups])
    # Rounding to the nearest without any budget gives 0.29 for widths that lie anywhere, and half a step at most.
    assert np.sqrt(np.mean(off**2)) < 0.55
    assert abs(np.mean(off)) < 0.5, "neither all too narrow nor all too wide"
    assert np.mean(np.abs(off) <= 0.51) >= 0.5


def test_groups_that_are_alike_share_what_the_budget_leaves() -> None:
    # Nine blocks want 11 of 16 channels: some get 8 and some 16, in place of all 8, or all 16 and the last stage full.
    widths = choose_widths(resnet56(), Target("macs", SEVENTY_PERCENT), round_to=8)
    first = [width for name, width in widths.items() if name.startswith("stage1.")]
    last = [width for name, width in widths.items() if name.startswith("stage3.")]
    assert set(first) == {8, 16}
    assert set(last) <= {40, 48, 56}


def test_a_wide_step_that_is_refused_does_not_let_the_others_grow_full() -> None:
    # Climbing by a common share alone stops at the trunk, which costs as much as ten blocks, and then fills the rest.
    groups, target = resnet56(), Target("macs", SEVENTY_PERCENT)
    wanted, widths = choose_widths(groups, target), choose_widths(groups, target, round_to=8)
    ladders = build_ladders(groups, 8, dict.fromkeys(wanted, 1))
    alone = climbed_by_share_alone(groups, target, ladders)
    assert distance(alone, wanted, ladders) > 0.9
    assert distance(widths, wanted, ladders) < 0.5


def climbed_by_share_alone(groups: Groups, target: Target, ladders: Ladders) -> dict[str, int]:
    widths = {group: rungs[0] for group, rungs in ladders.rungs.items()}
    steps = [
        ((low + high) / 2 / groups[group].size, place, group, high)
        for place, (group, rungs) in enumerate(ladders.rungs.items())
        for low, high in pairwise(rungs)
    ]
    for _, _, group, high in sorted(steps):
        if share(groups, "macs", widths | {group: high}) <= target.share:
            widths[group] = high
    return widths


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_rounding_by_scores_lies_near_the_unrounded_masks(name: str, ranking: str) -> None:
    groups, target = NETWORKS[name][0](), Target("macs", 0.5)
    generator = np.random.default_rng(0)
    scores = {group.id: generator.gamma(2.0, 1 + 0.5 * generator.random(), group.size) for group in groups.groups}
    how = cast(Ranking, ranking)
    wanted = widths_of(masks_to_budget(scores, groups, target, ranking=how))
    widths = widths_of(masks_to_budget(scores, groups, target, ranking=how, round_to=8))
    assert all(width % 8 == 0 for width in widths.values())
    off = np.array([(widths[group.id] - wanted[group.id]) / 8 for group in groups.groups])
    assert np.sqrt(np.mean(off**2)) < 0.75
    assert 0.48 < share(groups, "macs", widths) <= 0.5


def test_without_rounding_a_step_is_one_channel() -> None:
    groups, target = resnet56(), Target("macs", 0.5)
    widths = choose_widths(groups, target)
    shares = [widths[group.id] / group.size for group in groups.groups]
    assert max(shares) - min(shares) < 0.08
    assert 0.4995 < share(groups, "macs", widths) <= 0.5
