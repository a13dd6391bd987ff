"""SP: stages, the losses of a super-network held against narrow networks and sums by hand, and the search."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_groups import (
    Mobile,
    Residual,
    conv_layer,
    filters,
    member,
    mobile_groups,
    norm_layer,
    norm_members,
    of,
    randomise,
    reader,
    residual_groups,
    select,
    span,
)

from methods.test_table import toy_task
from prune2deploy.apply import apply_masks, set_weights, weights_of
from prune2deploy.budget import Budget, Target, share
from prune2deploy.cost import Cost, Term, Width
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
from prune2deploy.masks import Masks, widths
from prune2deploy.methods.base import Context
from prune2deploy.methods.sp import SP, Trained, channel_order
from prune2deploy.methods.stages import (
    Cut,
    Losses,
    Stage,
    best_widths,
    candidates,
    find_stages,
    first_channels,
    width_choices,
)
from prune2deploy.methods.supernet import SuperNet, all_cuts, losses_of, measured_losses, rounds
from prune2deploy.methods.watch import Watch
from prune2deploy.train import measure_norms

Batch = tuple[Tensor, Tensor]
BUDGET = Budget(Target("macs", 0.6))
FIVE = Width(5)


class Blocks(nn.Module):
    """stem - norm - relu, residual blocks, pooling and a linear layer, on images [B, 3, 8, 8]."""

    def __init__(self, inner: Sequence[int] = (8, 8), trunk: int = 6) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, trunk, 3, padding=1, bias=False), nn.BatchNorm2d(trunk)
        for number, width in enumerate(inner):
            self.add_module(f"a{number}", nn.Conv2d(trunk, width, 3, padding=1, bias=False))
            self.add_module(f"an{number}", nn.BatchNorm2d(width))
            self.add_module(f"b{number}", nn.Conv2d(width, trunk, 3, padding=1, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(trunk))
        self.fc = nn.Linear(trunk, 5)
        self.blocks = len(inner)

    def branch(self, number: int, x: Tensor) -> Tensor:
        """Return what a block adds to its input."""
        part = self.get_submodule
        return part(f"bn{number}")(part(f"b{number}")(F.relu(part(f"an{number}")(part(f"a{number}")(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        for number in range(self.blocks):
            x = F.relu(self.branch(number, x) + x)
        return self.fc(x.mean((2, 3)))


def blocks_groups(inner: Sequence[int] = (8, 8), trunk: int = 6) -> Groups:
    t, stem = span(0, trunk), of(stem=1)
    trunk_members = [*filters("stem", t), *norm_members("bn", t)]
    groups, terms = [], [Term("stem", 9 * 64, (stem, Width(3)))]
    layers = [conv_layer("stem", stem, Width(3), norm="bn"), norm_layer("bn", stem)]
    for n, size in enumerate(inner):
        own, i = of(**{f"a{n}": 1}), span(0, size)
        trunk_members += [reader(f"a{n}", t), *filters(f"b{n}", t), *norm_members(f"bn{n}", t)]
        members = (*filters(f"a{n}", i), *norm_members(f"an{n}", i), reader(f"b{n}", i))
        groups.append(Group(f"a{n}", size, members, ("Relu",)))
        layers += [conv_layer(f"a{n}", own, stem, norm=f"an{n}"), norm_layer(f"an{n}", own)]
        layers += [conv_layer(f"b{n}", stem, own, norm=f"bn{n}"), norm_layer(f"bn{n}", stem)]
        terms += [Term(f"a{n}", 9 * 64, (own, stem)), Term(f"b{n}", 9 * 64, (stem, own))]
    first = Group("stem", trunk, (*trunk_members, reader("fc", t)), ("Relu",))
    layers.append(conv_layer("fc", FIVE, stem, bias=True, op_type="Gemm"))
    return Groups((first, *groups), tuple(layers), Cost(tuple(terms), tuple(terms)))


class Chain(nn.Module):
    """Convolutions with norms in a row, pooling and a linear layer, on images [B, 3, 8, 8]."""

    def __init__(self, sizes: Sequence[int] = (8, 4, 8)) -> None:
        super().__init__()
        for number, (before, size) in enumerate(itertools.pairwise((3, *sizes))):
            self.add_module(f"c{number}", nn.Conv2d(before, size, 3, padding=1, bias=False))
            self.add_module(f"n{number}", nn.BatchNorm2d(size))
        self.fc, self.length = nn.Linear(sizes[-1], 5), len(sizes)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.length):
            x = F.relu(self.get_submodule(f"n{number}")(self.get_submodule(f"c{number}")(x)))
        return self.fc(x.mean((2, 3)))


def chain_groups(sizes: Sequence[int] = (8, 4, 8)) -> Groups:
    names = [f"c{n}" for n in range(len(sizes))]
    forms = [Width(3), *(of(**{name: 1}) for name in names)]
    layers, groups, terms = [], [], []
    for n, (name, size) in enumerate(zip(names, sizes, strict=True)):
        i = span(0, size)
        next_reader = reader(names[n + 1] if n + 1 < len(names) else "fc", i)
        groups.append(Group(name, size, (*filters(name, i), *norm_members(f"n{n}", i), next_reader), ("Relu",)))
        layers += [conv_layer(name, forms[n + 1], forms[n], norm=f"n{n}"), norm_layer(f"n{n}", forms[n + 1])]
        terms.append(Term(name, 9 * 64, (forms[n + 1], forms[n])))
    layers.append(conv_layer("fc", FIVE, forms[-1], bias=True, op_type="Gemm"))
    terms.append(Term("fc", 1, (FIVE, forms[-1])))
    return Groups(tuple(groups), tuple(layers), Cost(tuple(terms), tuple(terms)))


Make = Callable[[Sequence[int]], nn.Module]
NETS: dict[str, tuple[Make, Callable[[Sequence[int]], Groups], tuple[int, ...]]] = {
    "blocks": (Blocks, blocks_groups, (8, 8)),
    "chain": (Chain, chain_groups, (8, 4, 8)),
}


def batches(count: int = 2, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn((size, 3, 8, 8), generator=generator, dtype=torch.float64),
            torch.randint(5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def supernet(net: nn.Module, groups: Groups, longest: int = 1) -> SuperNet:
    stages = find_stages(weights_of(net), groups, longest)
    free = [group for stage in stages for group in stage.groups]
    order = channel_order(weights_of(net), groups)
    return SuperNet(net, groups, stages, width_choices(groups, free, 4, BUDGET), order, seed=0)


def losses_in_training(one: SuperNet, images: Tensor, chosen: Mapping[str, int]) -> list[Tensor]:
    one.module.train()
    with one:
        logits = one.module(images)
        found = one.stage_losses(images, chosen, one.watch.features(), logits.detach())
    one.module.eval()
    return [loss.detach() for loss in found]


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_lies_between_two_residual_sums_and_ends_behind_the_norm_of_its_reader() -> None:
    net = randomise(Blocks())
    found = find_stages(weights_of(net), blocks_groups(), 2)
    assert found == [Stage(("a0",), (Cut("b0", "bn0"),)), Stage(("a1",), (Cut("b1", "bn1"),))]


@pytest.mark.parametrize(
    ("longest", "expected"),
    [
        (1, [(("c0",), "n1"), (("c1",), "n2"), (("c2",), "fc")]),
        (2, [(("c0", "c1"), "n2"), (("c2",), "fc")]),
        (3, [(("c0", "c1", "c2"), "fc")]),
    ],
)
def test_a_row_of_layers_is_cut_after_so_many_groups(longest: int, expected: list[tuple[tuple[str, ...], str]]) -> None:
    found = find_stages(weights_of(randomise(Chain())), chain_groups(), longest)
    assert [(stage.groups, *(cut.module for cut in stage.cuts)) for stage in found] == expected


def test_a_depthwise_convolution_on_the_way_belongs_to_the_stage() -> None:
    found = find_stages(weights_of(randomise(Mobile())), mobile_groups(), 2)
    assert found == [Stage(("expand", "grouped"), (Cut("fc", "fc"),))]
    apart = find_stages(weights_of(randomise(Mobile())), mobile_groups(), 1)
    assert apart == [Stage(("expand",), (Cut("grouped", "grouped"),)), Stage(("grouped",), (Cut("fc", "fc"),))]


def test_a_group_with_two_readers_ends_its_stage_at_both() -> None:
    """A concatenation or a fork: what is read twice is not in a row with either reader."""
    groups = chain_groups((4, 4))
    second = member("fc.weight", "reader", span(0, 4), axis=1)
    forked = Group("c0", 4, (*groups["c0"].members, second), ("Relu",))
    both = Groups((forked, groups["c1"]), groups.layers, groups.cost)
    found = find_stages(weights_of(randomise(Chain((4, 4)))), both, 3)
    assert [(stage.groups, [cut.layer for cut in stage.cuts]) for stage in found] == [
        (("c0",), ["c1", "fc"]),
        (("c1",), ["fc"]),
    ]


def test_choices_are_shares_of_the_width_that_keep_rounding_and_floors() -> None:
    """``k in {0.25, 0.5, 0.75, 1} * C``."""
    groups = blocks_groups((16, 8))
    assert width_choices(groups, ["a0", "a1"], 4, BUDGET) == {"a0": [4, 8, 12, 16], "a1": [2, 4, 6, 8]}
    assert width_choices(groups, ["a0", "a1"], 2, BUDGET) == {"a0": [8, 16], "a1": [4, 8]}
    rounded = Budget(Target("macs", 0.6), round_to=8, floors={"a1": 5})
    assert width_choices(groups, ["a0", "a1"], 4, rounded) == {"a0": [8, 16], "a1": [8]}
    assert width_choices(groups, ["a0"], 4, Budget(Target("macs", 0.6), floors={"a0": 6})) == {"a0": [6, 8, 12, 16]}


# --- sub-networks -----------------------------------------------------------------------------------------------------


def narrow(kind: str, net: nn.Module, groups: Groups, masks: Masks) -> nn.Module:
    make, _, sizes = NETS[kind]
    free = ["a0", "a1"] if kind == "blocks" else ["c0", "c1", "c2"]
    small = make([int(masks[name].sum()) if name in masks else size for name, size in zip(free, sizes, strict=True)])
    small.double().load_state_dict(select(net.state_dict(), groups, masks))
    return small.eval()


@pytest.mark.parametrize(("kind", "chosen"), [("blocks", {"a0": 2, "a1": 6}), ("chain", {"c0": 4, "c1": 1, "c2": 6})])
def test_a_slice_of_the_super_network_is_the_network_without_the_other_channels(
    kind: str, chosen: dict[str, int]
) -> None:
    """slice(k) = removal with keep = first k: the same logits after the same recalibration, and in training."""
    make, make_groups, sizes = NETS[kind]
    net, groups, data = randomise(make(sizes)).double(), make_groups(sizes), batches()
    masks = first_channels(channel_order(weights_of(net), groups), chosen)
    small = narrow(kind, net, groups, masks)
    images = data[0][0]
    one = supernet(net, groups)
    net.train()
    small.train()
    with one:
        logits = net(images)
        expected = small(images)
        one.stages = one.stages[-1:]  # nothing is fed, so the logits are those of the sub-network
        found = one.stage_losses(images, chosen, {}, logits.detach())[-1]
    divergence = F.kl_div(expected.log_softmax(1), logits.log_softmax(1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(found, divergence, rtol=1e-9, atol=1e-12)
    net.eval()
    apply_masks(net, groups, masks)
    measure_norms(net, data)
    measure_norms(small.eval(), data)
    torch.testing.assert_close(net(images), small(images), rtol=1e-9, atol=1e-9)


def test_first_channels_are_the_largest_filters_of_the_network_as_it_came() -> None:
    net, groups = randomise(Residual()), residual_groups()
    with torch.no_grad():
        for place, scale in enumerate((3, 1, 8, 2, 5, 7, 4, 6)):
            net.get_parameter("conv1.weight")[place] = 0.1 * scale
    order = channel_order(weights_of(net), groups)
    assert order["conv1"].tolist() == [2, 5, 7, 4, 6, 0, 3, 1]
    assert np.flatnonzero(first_channels(order, {"conv1": 3})["conv1"]).tolist() == [2, 5, 7]
    with torch.no_grad():
        net.get_parameter("conv1.weight").mul_(torch.arange(8.0).view(8, 1, 1, 1))
    kept = SP().plan(weights_of(net), groups, Budget(None, widths={"conv1": 3}), Context(state=Trained(order))).keep
    assert np.flatnonzero(kept["conv1"]).tolist() == [2, 5, 7]


def test_training_sub_networks_leaves_the_running_statistics_of_the_full_one_alone() -> None:
    data = batches(1)[0][0]
    alone, groups = randomise(Blocks()).double().train(), blocks_groups()
    watched = randomise(Blocks()).double()
    alone(data)
    losses_in_training(supernet(watched, groups), data, {"a0": 2, "a1": 4})
    for (name, expected), found in zip(alone.named_buffers(), watched.buffers(), strict=True):
        assert torch.equal(expected, found), name


# --- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 2])
@pytest.mark.parametrize("kind", NETS)
def test_the_full_network_has_stage_losses_of_exactly_zero(kind: str, longest: int) -> None:
    """``||F^full - F^full||^2 = 0`` and KL = 0, in training and on held-out data, bit for bit."""
    make, make_groups, sizes = NETS[kind]
    net, groups, data = randomise(make(sizes)), make_groups(sizes), [(x.float(), y) for x, y in batches()]
    one = supernet(net, groups, longest)
    full = {group: groups[group].size for group in one.choices}
    assert [float(loss) for loss in losses_in_training(one, data[0][0], full)] == [0.0] * len(one.stages)
    everything = first_channels(one.order, full)
    assert losses_of(net, groups, one.stages, everything, data, data) == [0.0] * len(one.stages)
    fewer = first_channels(one.order, {group: max(1, size // 2) for group, size in full.items()})
    assert min(losses_of(net, groups, one.stages, fewer, data, data)) > 0


def test_the_losses_are_those_of_each_block_fed_with_the_full_networks_input() -> None:
    """``||F_s^net - F_s^full||^2 / ||F_s^full||^2`` for block 0; KL(full || sub) of the logits for block 1, by hand."""
    net, groups, images = randomise(Blocks()).double(), blocks_groups(), batches(1)[0][0]
    one = supernet(net, groups)
    found = losses_in_training(one, images, {"a0": 2, "a1": 4})
    sub = randomise(Blocks()).double().train()
    apply_masks(sub, groups, first_channels(one.order, {"a0": 2, "a1": 4}))
    full = randomise(Blocks()).double().train()
    entry = F.relu(full.bn(full.stem(images)))
    wanted, own = full.branch(0, entry), sub.branch(0, entry)
    assert_same(found[0], ((own - wanted) ** 2).sum() / (wanted**2).sum())
    middle = F.relu(wanted + entry)
    ends = [F.relu(branch + middle).mean((2, 3)) for branch in (full.branch(1, middle), sub.branch(1, middle))]
    target, logits = (full.fc(end).log_softmax(1) for end in ends)
    divergence = (target.exp() * (target - logits)).sum(1).mean()
    assert_same(found[1], divergence)


def test_in_a_row_a_stage_is_compared_on_the_channels_that_the_next_one_keeps() -> None:
    """The layer behind a cut makes channels of the next stage: those that are masked there are left out, by hand."""
    net, groups, images = randomise(Chain()).double(), chain_groups(), batches(1)[0][0]
    one = supernet(net, groups)
    chosen = {"c0": 2, "c1": 2, "c2": 4}
    found = losses_in_training(one, images, chosen)
    masks = first_channels(one.order, chosen)
    full = randomise(Chain()).double().train()
    sub = randomise(Chain()).double().train()
    apply_masks(sub, groups, {"c0": masks["c0"]})
    wanted = full.n1(full.c1(F.relu(full.n0(full.c0(images)))))
    own = sub.n1(sub.c1(F.relu(sub.n0(sub.c0(images)))))
    seen = torch.from_numpy(masks["c1"]).view(1, -1, 1, 1)
    expected = (((own - wanted) * seen) ** 2).sum() / ((wanted * seen) ** 2).sum()
    assert_same(found[0], expected)
    behind = sub.n2(sub.c2(F.relu(wanted) * seen))  # only what the next stage keeps is fed to it
    there = full.n2(full.c2(F.relu(wanted)))
    kept = torch.from_numpy(masks["c2"]).view(1, -1, 1, 1)
    expected = (((behind - there) * kept) ** 2).sum() / ((there * kept) ** 2).sum()
    assert_same(found[1], expected)


def test_what_one_stage_keeps_changes_no_other_stages_loss() -> None:
    """Stage independence: ``P_2`` does not depend on ``a_1``, nor ``P_1`` on ``a_2``; bit for bit."""
    net, groups, data = randomise(Blocks()), blocks_groups(), [(x.float(), y) for x, y in batches()]
    one = supernet(net, groups)
    table = {}
    for chosen in itertools.product((2, 4, 8), (2, 6)):
        masks = first_channels(one.order, dict(zip(("a0", "a1"), chosen, strict=True)))
        table[chosen] = losses_of(net, groups, one.stages, masks, data, data)
    for first, second in table:
        assert table[first, second] == [table[first, 2][0], table[2, second][1]]
    assert len({losses[0] for losses in table.values()}) == 3
    assert len({losses[1] for losses in table.values()}) == 2


@pytest.mark.parametrize("kind", NETS)
def test_candidates_that_run_together_get_the_losses_that_they_get_alone(kind: str) -> None:
    make, make_groups, sizes = NETS[kind]
    net, groups, data = randomise(make(sizes)), make_groups(sizes), [(x.float(), y) for x, y in batches()]
    one = supernet(net, groups)
    found = measured_losses(net, groups, one.stages, one.choices, one.order, lambda: data, lambda: data)
    for number, stage in enumerate(one.stages):
        assert found[number].keys() == set(candidates(stage, one.choices))
        for chosen, loss in found[number].items():
            masks = first_channels(one.order, dict(zip(stage.groups, chosen, strict=True)))
            assert losses_of(net, groups, one.stages, masks, data, data)[number] == loss


def test_neighbours_in_a_row_never_run_together_and_blocks_do() -> None:
    for kind, expected in (("blocks", 4), ("chain", 8)):
        make, make_groups, sizes = NETS[kind]
        one = supernet(randomise(make(sizes)), make_groups(sizes))
        found = rounds(one.stages, one.choices, one.groups)
        assert len(found) == expected
        assert sum(len(together) for together in found) == sum(len(widths) for widths in one.choices.values())
        if kind == "chain":
            assert not any({0, 1} <= together.keys() or {1, 2} <= together.keys() for together in found)


def test_the_losses_do_not_train_the_full_network_through_its_features() -> None:
    """Gradient check: a channel that no sub-network has gets the gradient of the cross-entropy alone.

    Both sub-networks are the tiny one here, so every other channel is in the full network only; through ``F^full`` it
    would get more.
    """
    net, groups, (images, labels) = randomise(Blocks()).double(), blocks_groups(), batches(1)[0]
    one = supernet(net, groups)
    one.choices = {group: allowed[:1] for group, allowed in one.choices.items()}
    gradients = []
    for loss in (lambda logits: F.cross_entropy(logits, labels), lambda logits: one.loss(images, logits, labels)):
        net.train()
        net.zero_grad()
        with one:
            loss(net(images)).backward()
            assert not any(tensor.requires_grad for calls in one.watch.features().values() for tensor in calls)
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    alone, together = gradients
    tiny = first_channels(one.order, {group: widths[0] for group, widths in one.choices.items()})
    for number in (0, 1):
        gone = torch.from_numpy(~tiny[f"a{number}"])
        for name, axis in ((f"a{number}.weight", 0), (f"an{number}.weight", 0), (f"b{number}.weight", 1)):
            before, after = (torch.movedim(found[name], axis, 0) for found in (alone, together))
            torch.testing.assert_close(after[gone], before[gone], rtol=1e-9, atol=1e-12)
            assert (after[~gone] - before[~gone]).abs().max() > 1e-6, name


def test_the_step_trains_the_full_the_tiny_and_a_random_network() -> None:
    """``L = CE(full) + sum over the stages and over {tiny, random}``."""
    net, groups, (images, labels) = randomise(Blocks()).double(), blocks_groups(), batches(1)[0]
    one, twin = supernet(net, groups), np.random.default_rng(0)
    drawn = {group: int(twin.choice(allowed)) for group, allowed in one.choices.items()}
    net.train()
    with one:
        logits = net(images)
        full = one.watch.features()
        total = one.loss(images, logits, labels)
        parts = [one.stage_losses(images, chosen, full, logits.detach()) for chosen in ({"a0": 2, "a1": 2}, drawn)]
    expected = F.cross_entropy(logits, labels) + sum(itertools.chain(*parts))
    torch.testing.assert_close(total, expected)


# --- the search -------------------------------------------------------------------------------------------------------


def brute_force(stages: Sequence[Stage], losses: Sequence[Losses], groups: Groups, target: Target) -> tuple[float, int]:
    """Return the least loss that meets the target, and how little it can cost."""
    free, found = [group for stage in stages for group in stage.groups], []
    for parts in itertools.product(*(table.items() for table in losses)):
        chosen = dict(zip(free, itertools.chain(*(chosen for chosen, _ in parts)), strict=True))
        spent = groups.full_widths() | chosen
        if share(groups, target.kind, spent) <= target.share:
            found.append((sum(loss for _, loss in parts), groups.cost.of(target.kind, spent)))
    return min(found)


def random_losses(stages: Sequence[Stage], choices: Mapping[str, Sequence[int]], seed: int) -> list[Losses]:
    generator = np.random.default_rng(seed)
    return [
        {chosen: float(generator.random() / sum(chosen)) for chosen in candidates(stage, choices)} for stage in stages
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("groups", "longest"),
    [
        pytest.param(blocks_groups((16, 8)), 1, id="two stages"),
        pytest.param(blocks_groups((16, 8, 12, 8)), 1, id="four stages"),
        pytest.param(chain_groups((8, 8, 8, 8)), 1, id="a row, where neighbours share costs"),
        pytest.param(chain_groups((8, 8, 8, 8)), 2, id="a row of pairs"),
    ],
)
def test_the_search_finds_what_trying_everything_finds(groups: Groups, longest: int, seed: int) -> None:
    """DP optimum = brute force, on a 2-stage space and on larger ones."""
    sizes = [group.size for group in groups.groups if group.id != "stem"]
    net = randomise((Blocks if "stem" in groups.by_id else Chain)(sizes))
    stages = find_stages(weights_of(net), groups, longest)
    choices = width_choices(groups, [g for stage in stages for g in stage.groups], 4, BUDGET)
    losses = random_losses(stages, choices, seed)
    for target in (Target("macs", 0.5), Target("macs", 0.7), Target("params", 0.6)):
        found = best_widths(stages, losses, groups, target)
        spent = groups.full_widths() | found.widths
        assert found.exact
        assert (pytest.approx(found.loss), groups.cost.of(target.kind, spent)) == brute_force(
            stages, losses, groups, target
        )


@pytest.mark.parametrize("make", [blocks_groups, chain_groups])
def test_where_not_all_paths_are_followed_the_target_still_holds_and_it_says_so(
    make: Callable[[Sequence[int]], Groups],
) -> None:
    groups = make((8,) * 5)
    net = randomise((Blocks if "stem" in groups.by_id else Chain)((8,) * 5))
    stages = find_stages(weights_of(net), groups, 1)
    choices = width_choices(groups, [g for stage in stages for g in stage.groups], 8, BUDGET)
    losses = random_losses(stages, choices, 1)
    exact = best_widths(stages, losses, groups, Target("macs", 0.5))
    found = best_widths(stages, losses, groups, Target("macs", 0.5), most=6)
    assert (exact.exact, found.exact) == (True, False)
    assert exact.loss <= found.loss
    assert share(groups, "macs", groups.full_widths() | found.widths) <= 0.5


def test_a_target_below_the_narrowest_choices_is_refused_with_what_can_be_reached() -> None:
    net, groups, data = randomise(Blocks()), blocks_groups(), [(x.float(), y) for x, y in batches()]
    smallest = share(groups, "macs", groups.full_widths() | {"a0": 2, "a1": 2})
    with pytest.raises(InputError, match=rf"macs=0.1 cannot be met.*smallest reachable is macs={smallest:.2f}"):
        SP(epochs=0).plan(weights_of(net), groups, Budget(Target("macs", 0.1)), Context(net, data, data))


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(net: nn.Module, groups: Groups, budget: Budget, method: SP | None = None) -> tuple[dict[str, int], dict]:  # type: ignore[type-arg]
    data = [(x.float(), y) for x, y in batches()]
    result = (method or SP(epochs=0)).plan(weights_of(net), groups, budget, Context(net, data, data))
    return widths(result.keep), result.report


def test_norms_are_measured_on_images_that_are_moved_as_in_training() -> None:
    net, groups = randomise(Chain((8, 4, 8))), chain_groups((8, 4, 8))
    data = [(x.float(), y) for x, y in batches()]
    bright = [(x + 30.0, y) for x, y in data]
    proxies = [
        SP(epochs=0).plan(weights_of(net), groups, BUDGET, Context(net, first, data, moved=moved)).report["stages"]
        for first, moved in ((data, None), (bright, data), (bright, None))
    ]
    assert proxies[0] == proxies[1] != proxies[2]


@pytest.mark.parametrize("budget", [BUDGET, Budget(None, widths={"c0": 3, "c1": 2, "c2": 5})])
def test_the_result_has_its_norms_measured_anew_as_the_proxies_do(budget: Budget) -> None:
    """On the first images, moved as in training; with widths that are given, too."""
    net, groups = randomise(Chain((8, 4, 8))), chain_groups((8, 4, 8))
    data, moved = ([(x.float() + shift, y) for x, y in batches(3)] for shift in (0.0, 0.5))
    context = Context(net, data, data, moved=moved)
    result = SP(epochs=0, batches=2).plan(weights_of(net), groups, budget, context)
    expected = copy.deepcopy(net)
    apply_masks(expected, groups, result.keep)
    measure_norms(expected, moved[:2])
    set_weights(net, result.weights)
    apply_masks(net, groups, result.keep)
    assert len(result.weights) == 6
    with torch.no_grad():
        assert all(torch.equal(net(x), expected(x)) for x, _ in data)
    whole = Budget(None, widths={"c0": 8, "c1": 4, "c2": 8})
    assert SP(epochs=0).plan(weights_of(net), groups, whole, context).weights == {}


@pytest.mark.parametrize("kind", NETS)
def test_the_plan_is_the_cheapest_in_proxy_filled_until_no_channel_more_fits(kind: str) -> None:
    make, make_groups, sizes = NETS[kind]
    net, groups = randomise(make(sizes)), make_groups(sizes)
    before = weights_of(net)
    found, report = plan(net, groups, BUDGET)
    losses = [{tuple(one["widths"]): one["loss"] for one in stage["losses"]} for stage in report["stages"]]
    stages = find_stages(weights_of(net), groups, 2)
    assert report["proxy"] == pytest.approx(brute_force(stages, losses, groups, BUDGET.target)[0])  # type: ignore[arg-type]
    assert report["share"]["macs"] <= 0.6
    for group, width in report["searched"].items():
        assert width <= found[group]
        if found[group] < groups[group].size:
            assert share(groups, "macs", found | {group: found[group] + 1}) > 0.6
    assert report["exact"]
    assert report["whole"] == (["stem"] if kind == "blocks" else [])
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())


def test_rounding_floors_given_widths_and_rankings_are_kept() -> None:
    net, groups = randomise(Blocks((16, 16))), blocks_groups((16, 16))
    rounded, _ = plan(net, groups, Budget(Target("macs", 0.7), round_to=4))
    assert rounded["a0"] % 4 == rounded["a1"] % 4 == 0
    floored, _ = plan(net, groups, Budget(Target("macs", 0.7), floors={"a0": 15}))
    assert floored["a0"] >= 15
    given, _ = plan(net, groups, Budget(None, widths={"a0": 3, "stem": 5}))
    assert (given["a0"], given["a1"], given["stem"]) == (3, 16, 5)
    even, report = plan(net, groups, Budget(Target("macs", 0.6), ranking="uniform"))
    assert even == Budget(Target("macs", 0.6)).common_widths(groups)
    assert report["ranking"] == "uniform"


def test_it_says_what_it_could_not_do() -> None:
    net, groups, data = randomise(Blocks()), blocks_groups(), [(x.float(), y) for x, y in batches()]
    report = SP(epochs=0).plan(weights_of(net), groups, BUDGET, Context(net, data)).report
    assert [line.split(":")[0].split(",")[0] for line in report["warnings"]] == [
        "the super-network was not trained",
        "there are no held-out images",
    ]
    with pytest.raises(InputError, match="'sp' needs images"):
        SP(epochs=0).plan(weights_of(net), groups, BUDGET)
    held = Groups((groups["stem"],), groups.layers, groups.cost)
    with pytest.raises(InputError, match="this network has none that can be pruned"):
        SP(epochs=0).plan(weights_of(net), held, BUDGET, Context(net, data, data))


class Functional(Blocks):
    def branch(self, number: int, x: Tensor) -> Tensor:
        """Call no module of the second convolution and its norm."""
        inner = F.relu(self.get_submodule(f"an{number}")(self.get_submodule(f"a{number}")(x)))
        return F.conv2d(inner, self.get_parameter(f"b{number}.weight"), padding=1)


def test_a_layer_that_the_network_computes_without_calling_it_is_refused() -> None:
    net, groups, data = randomise(Functional()), blocks_groups(), [(x.float(), y) for x, y in batches()]
    with pytest.raises(InputError, match=r"cannot see what 'b0' gives.*'bn0'"):
        SP(epochs=0).plan(weights_of(net), groups, BUDGET, Context(net, data, data))
    with pytest.raises(InputError, match=r"cannot see what 'b0' gives"):
        SP(epochs=1).fit(net, groups, BUDGET, toy_task((2, 3, 8, 8), 5))
    with pytest.raises(InputError, match=r"cannot see what 'x' gives.*'x.y'"), Watch(net, [Cut("x", "x.y")]):
        pass


# --- the training -----------------------------------------------------------------------------------------------------


def test_training_brings_the_narrow_networks_nearer_to_the_full_one_and_leaves_no_hooks() -> None:
    task, groups = toy_task((2, 3, 8, 8), 5), blocks_groups()
    data = list(task.images(batch_size=8))
    after = {}
    for epochs in (0, 12):
        net = randomise(Blocks())
        state = SP(epochs=epochs, learning_rate=0.05).fit(net, groups, BUDGET, task)
        stages = find_stages(weights_of(net), groups, 2)
        masks = first_channels(state.order, {"a0": 2, "a1": 2})
        after[epochs] = losses_of(net, groups, stages, masks, data, data)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert state.epochs == 12
    assert np.array_equal(state.order["a0"], channel_order(weights_of(randomise(Blocks())), groups)["a0"])
    assert after[12][0] < 0.7 * after[0][0]
    report = SP().plan(weights_of(net), groups, BUDGET, Context(net, data, data, state)).report
    assert report["warnings"] == []


def test_the_same_seed_trains_the_same_super_network() -> None:
    found = []
    for seed in (0, 0, 1):
        net = randomise(Blocks())
        SP(epochs=2, seed=seed).fit(net, blocks_groups(), BUDGET, toy_task((2, 3, 8, 8), 5))
        found.append(weights_of(net))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
    assert not np.array_equal(found[0]["a0.weight"], found[2]["a0.weight"])


def test_sub_networks_run_in_the_precision_of_the_full_one() -> None:
    """A full network under autocast has exactly the features of its full-width sub-network."""
    net, groups = randomise(Blocks()), blocks_groups()
    one, images = supernet(net, groups), batches(1)[0][0].float()
    net.train()
    with one:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(images)
        found = one.stage_losses(images, {"a0": 8, "a1": 8}, one.watch.features(), logits.detach())
    assert logits.dtype == torch.bfloat16
    assert [float(loss.detach()) for loss in found] == [0.0, 0.0]


def test_every_cut_is_watched_once() -> None:
    stages = find_stages(weights_of(randomise(Chain())), chain_groups(), 1)
    assert [cut.module for cut in all_cuts([*stages, *stages])] == ["n1", "n2", "fc"]
