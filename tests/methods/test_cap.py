"""CaP: what compensation makes up for, end to end through the masked network, and the search."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_groups import (
    TOYS,
    Mobile,
    Residual,
    conv_layer,
    filters,
    mobile_groups,
    narrowed,
    norm_layer,
    norm_members,
    of,
    randomise,
    reader,
    residual_groups,
    span,
)

from prune2deploy.apply import apply_masks, set_weights, weights_of
from prune2deploy.budget import Budget, Target, share
from prune2deploy.cost import Cost, Term, Width
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
from prune2deploy.masks import widths
from prune2deploy.methods.base import Context, PruneResult
from prune2deploy.methods.cap import CaP
from prune2deploy.methods.compensation import spread
from prune2deploy.methods.readers import Reader

EXACT = 1e-12


class Plain(nn.Module):
    """conv - activation - conv - norm - mean - linear: the second convolution reads a group without a norm.

    The first convolution has 3 inputs in each of its blocks.
    """

    def __init__(self, activation: nn.Module, kernel: int = 3, blocks: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3 * blocks, 8, 3, padding=1, groups=blocks)
        self.activation = activation
        self.conv2 = nn.Conv2d(8, 6, kernel, padding=kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn2(self.conv2(self.activation(self.conv1(x))))).mean((2, 3)))


def plain_groups(kernel: int = 3, blocks: int = 1) -> Groups:
    eight, six = of(conv1=blocks), of(conv2=1)
    tied = np.arange(8).reshape(blocks, -1).T  # a channel is one place in each block
    return Groups(
        groups=(
            Group("conv1", len(tied), (*filters("conv1", tied, bias=True), reader("conv2", tied)), ()),
            Group(
                "conv2",
                6,
                (*filters("conv2", span(0, 6)), *norm_members("bn2", span(0, 6)), reader("fc", span(0, 6))),
                ("Relu",),
            ),
        ),
        layers=(
            conv_layer("conv1", eight, Width(3 * blocks), bias=True),
            conv_layer("conv2", six, eight, norm="bn2"),
            norm_layer("bn2", six),
            conv_layer("fc", Width(4), six, bias=True, op_type="Gemm"),
        ),
        cost=Cost(
            macs_terms=(
                Term("conv1", 27 * 64, (eight,)),
                Term("conv2", kernel**2 * 64, (six, eight)),
                Term("fc", 4, (six,)),
            ),
            parameter_terms=(),
        ),
    )


def batches(shape: tuple[int, ...], count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(shape, generator=generator).double(), torch.zeros(shape[0])) for _ in range(count)]


def planned(net: nn.Module, groups: Groups, method: CaP, kept: dict[str, int], shape: tuple[int, ...]) -> PruneResult:
    return method.plan(weights_of(net), groups, Budget(None, widths=kept), Context(net, batches(shape)))


def masked(net: nn.Module, groups: Groups, result: PruneResult) -> nn.Module:
    """Return the masked network, made as the pipeline makes it; the network is changed in place."""
    set_weights(net, result.weights)
    apply_masks(net, groups, result.keep)
    return net


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_planted_dependency_leaves_the_outputs_as_they_are(kernel: int) -> None:
    """x5 = 0.3 x1 - 2 x7 in front of a zero-padded consumer: W_K + W_P A gives the outputs of the dense network."""
    net, groups = randomise(Plain(nn.Identity(), kernel)).double(), plain_groups(kernel)
    for name in ("conv1.weight", "conv1.bias"):
        tensor = net.get_parameter(name)
        tensor[5] = 0.3 * tensor[1] - 2 * tensor[7]
    x = torch.randn(3, 3, 8, 8).double()
    dense = net(x)
    result = planned(net, groups, CaP(ridge=EXACT), {"conv1": 7}, (4, 3, 8, 8))
    removed = np.flatnonzero(~result.keep["conv1"])
    assert len(removed) == 1
    assert set(removed) <= {1, 5, 7}  # each of the three follows from the other two
    assert not result.weights["conv2.weight"][:, removed].any()
    assert (masked(net, groups, result)(x) - dense).abs().max() <= 1e-9


@torch.no_grad()
def test_channels_that_every_reader_can_do_without_leave_a_residual_network_as_it_is() -> None:
    """Two equal channels of a stage that two layers make and two read, and a multiple of one inside the block."""
    net, groups = randomise(Residual()).double(), residual_groups()
    for name in ("stem.weight", "conv2.weight", "bn", "bn2"):
        parts = [net.get_parameter(name)] if "." in name else net.get_submodule(name).state_dict().values()
        for tensor in parts:
            if tensor.ndim:
                tensor[4] = tensor[2]
    net.get_parameter("conv1.weight")[6] = net.get_parameter("conv1.weight")[3]
    for name, tensor in net.get_submodule("bn1").state_dict().items():
        if tensor.ndim:
            tensor[6] = (2 if name in ("weight", "bias") else 1) * tensor[3]
    x = torch.randn(3, 3, 8, 8).double()
    dense = net(x)
    result = planned(net, groups, CaP(ridge=EXACT), {"stem": 5, "conv1": 7}, (4, 3, 8, 8))
    assert set(np.flatnonzero(~result.keep["stem"])) <= {2, 4}
    assert set(np.flatnonzero(~result.keep["conv1"])) <= {3, 6}
    small = narrowed(masked(net, groups, result), groups, result.keep)
    assert (net(x) - dense).abs().max() <= 1e-9
    assert (small(x) - dense).abs().max() <= 1e-9


@torch.no_grad()
@pytest.mark.parametrize("factors", [(2, 2), (2, 5)])
def test_a_channel_that_spans_a_flattened_map_is_compensated_at_every_place(factors: tuple[int, int]) -> None:
    """Of the two filters that make a channel, each follows from another one in its own way."""
    net, groups = randomise(Mobile()).double(), mobile_groups()
    net.get_parameter("grouped.bias").fill_(1.0)  # so that no ReLU is dead
    for name in ("grouped.weight", "grouped.bias"):
        tensor = net.get_parameter(name)
        tensor[1], tensor[3] = factors[0] * tensor[0], factors[1] * tensor[2]
    x = torch.randn(3, 1, 6, 6).double()
    dense = net(x)
    result = planned(net, groups, CaP(ridge=EXACT), {"grouped": 1}, (4, 1, 6, 6))
    assert (masked(net, groups, result)(x) - dense).abs().max() <= 1e-9


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_channel_of_several_filters_is_compensated_filter_by_filter(kernel: int) -> None:
    """Behind a grouped convolution: what x3 and x7 follow from differs, and both go at once."""
    net, groups = randomise(Plain(nn.Identity(), kernel, 2)).double(), plain_groups(kernel, 2)
    for name in ("conv1.weight", "conv1.bias"):
        tensor = net.get_parameter(name)
        tensor[3] = 0.3 * tensor[0] - 2 * tensor[1]
        tensor[7] = 0.7 * tensor[4] + 1.5 * tensor[5]
    x = torch.randn(3, 6, 8, 8).double()
    dense = net(x)
    result = planned(net, groups, CaP(ridge=EXACT), {"conv1": 3}, (4, 6, 8, 8))
    removed = np.flatnonzero(~result.keep["conv1"])
    assert len(removed) == 1
    assert set(removed) <= {0, 1, 3}
    assert not result.weights["conv2.weight"][:, [removed[0], removed[0] + 4]].any()
    assert (masked(net, groups, result)(x) - dense).abs().max() <= 1e-9


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
def test_behind_a_grouped_convolution_a_regression_is_least_squares_on_all_that_is_left(kernel: int) -> None:
    """Weights and score of the reader of a group whose channels are two filters; every filter and tap on its own."""
    net, groups = randomise(Plain(nn.ReLU(), kernel, 2)).double(), plain_groups(kernel, 2)
    data, taps = batches((4, 6, 8, 8)), kernel**2
    read = F.unfold(net.activation(net.conv1(torch.cat([x for x, _ in data]))), kernel, padding=kernel // 2)
    rows = read.transpose(1, 2).reshape(-1, 8 * taps).numpy()
    wanted = rows @ net.conv2.weight.flatten(1).numpy().T

    def left(kept: np.ndarray) -> np.ndarray:
        return np.column_stack([rows[:, np.repeat(np.tile(kept, 2), taps)], np.ones(len(rows))])

    result = planned(net, groups, CaP(positions=0, ridge=EXACT), {"conv1": 2}, (4, 6, 8, 8))
    kept = result.keep["conv1"]
    best = np.linalg.lstsq(left(kept), wanted, rcond=None)[0][:-1]
    found = result.weights["conv2.weight"][:, np.tile(kept, 2)].reshape(6, -1).T
    np.testing.assert_allclose(found, best, rtol=1e-6, atol=1e-9)
    scores = CaP(positions=0, ridge=EXACT).scores(weights_of(net), groups, Context(net, data))["conv1"]
    losses = []
    for channel in range(4):
        without = left(np.arange(4) != channel)
        error = wanted - without @ np.linalg.lstsq(without, wanted, rcond=None)[0]
        losses.append((error**2).sum() / ((wanted - wanted.mean(axis=0)) ** 2).sum())
    assert np.argmin(scores) == np.argmin(losses)
    assert scores.min() == pytest.approx(min(losses), rel=1e-6)


@torch.no_grad()
def test_behind_a_pooled_grouped_convolution_a_linear_layer_has_each_filter_as_an_input() -> None:
    class Pooled(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv1(x)).mean((2, 3)))

    net = randomise(Pooled(nn.ReLU(), 1, 2))
    net.fc = randomise(nn.Linear(8, 4))
    net = net.double()
    tied = np.arange(8).reshape(2, -1).T
    eight = of(conv1=2)
    groups = Groups(
        (Group("conv1", 4, (*filters("conv1", tied, bias=True), reader("fc", tied)), ("Relu",)),),
        (conv_layer("conv1", eight, Width(6), bias=True), conv_layer("fc", Width(4), eight, bias=True, op_type="Gemm")),
        Cost((Term("conv1", 27 * 64, (eight,)), Term("fc", 4, (eight,))), ()),
    )
    result = planned(net, groups, CaP(ridge=EXACT), {"conv1": 3}, (16, 6, 8, 8))
    read = torch.cat([torch.relu(net.conv1(x)).mean((2, 3)) for x, _ in batches((16, 6, 8, 8))]).numpy()
    wanted, kept = read @ net.fc.weight.numpy().T, np.tile(result.keep["conv1"], 2)
    best = np.linalg.lstsq(np.column_stack([read[:, kept], np.ones(len(read))]), wanted, rcond=None)[0][:-1]
    np.testing.assert_allclose(result.weights["fc.weight"][:, kept], best.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "at", "expected"),
    [
        (nn.Conv2d(12, 2, 1), [[0, 6], [1, 7]], [[[0], [6]], [[1], [7]]]),
        (nn.Linear(12, 2), [[0, 6], [1, 7]], [[[0], [6]], [[1], [7]]]),
        (
            nn.Linear(12, 2),
            [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]],
            [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]],
        ),
        (
            nn.Linear(12, 2),
            [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]],
            [[[0, 4, 8], [2, 6, 10]], [[1, 5, 9], [3, 7, 11]]],
        ),
        (nn.Linear(12, 2), [[0, 1, 2], [3, 4, 5]], [[[0, 1, 2]], [[3, 4, 5]]]),
    ],
    ids=["convolution", "pooled", "flattened", "flattened, channels last", "flattened, no multiple"],
)
def test_the_positions_of_a_flattened_map_are_told_from_the_filters_of_a_channel(
    layer: nn.Module, at: list[list[int]], expected: list[list[list[int]]]
) -> None:
    two = np.array([[0, 2], [1, 3]])
    member = reader("layer", np.array(at))
    group = Group("group", 2, (*filters("made", two), member), ())
    found = Reader(member, conv_layer("layer", Width(2), of(group=2)), (layer,), 1, None, "nowhere")
    np.testing.assert_array_equal(spread(found, group, member), expected)


@torch.no_grad()
def test_readers_of_an_activation_that_is_not_0_at_0_are_right_too() -> None:
    """A masked channel shows sigmoid(0) = 0.5; its column is 0, and the constant is that of the dense network."""
    net, groups = randomise(Plain(nn.Sigmoid())).double(), plain_groups()
    for name in ("conv1.weight", "conv1.bias"):
        net.get_parameter(name)[5] = net.get_parameter(name)[1]
    x = torch.randn(3, 3, 8, 8).double()
    dense = net(x)
    result = planned(net, groups, CaP(ridge=EXACT), {"conv1": 7}, (4, 3, 8, 8))
    assert set(np.flatnonzero(~result.keep["conv1"])) <= {1, 5}
    assert (masked(net, groups, result)(x) - dense).abs().max() <= 1e-9


@torch.no_grad()
def test_the_mean_of_what_a_reader_gives_stays() -> None:
    """b' = b + sum over taps of (W - W') mean: checked behind the norm of a 1x1 reader, over all positions."""
    net, groups = randomise(Plain(nn.ReLU(), 1)).double(), plain_groups(1)
    images = torch.cat([x for x, _ in batches((4, 3, 8, 8))])

    def mean() -> Tensor:
        return net.bn2(net.conv2(net.activation(net.conv1(images)))).mean((0, 2, 3))

    dense = mean()
    result = planned(net, groups, CaP(positions=0), {"conv1": 3}, (4, 3, 8, 8))
    masked(net, groups, result)
    torch.testing.assert_close(mean(), dense)
    net.bn2.running_mean.copy_(randomise(Plain(nn.ReLU(), 1)).double().bn2.running_mean)
    assert (mean() - dense).abs().max() > 0.01


@torch.no_grad()
def test_without_a_place_for_a_constant_the_regression_has_none() -> None:
    """The error is that of least squares through 0 on the second moment, and no vector is changed."""
    net = randomise(Plain(nn.ReLU(), 1)).double()
    groups = plain_groups(1)
    bare = Groups(
        groups.groups,
        tuple(
            one if one.name != "conv2" else conv_layer("conv2", one.out_width, one.in_width) for one in groups.layers
        ),
        groups.cost,
    )
    result = planned(net, bare, CaP(positions=0, ridge=EXACT), {"conv1": 5}, (4, 3, 8, 8))
    assert result.weights.keys() == {"conv2.weight"}
    images = torch.cat([x for x, _ in batches((4, 3, 8, 8))])
    read = net.activation(net.conv1(images)).permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    kept = result.keep["conv1"]
    wanted = read @ net.conv2.weight[:, :, 0, 0].numpy().T
    best = np.linalg.lstsq(read[:, kept], wanted, rcond=None)[0]
    np.testing.assert_allclose(result.weights["conv2.weight"][:, kept, 0, 0], best.T, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_every_tap_has_a_regression_of_its_own() -> None:
    """The weights of a 3x3 reader are those of least squares on its windows; shared taps come less close."""
    net, groups = randomise(Plain(nn.ReLU())).double(), plain_groups()
    images = torch.cat([x for x, _ in batches((4, 3, 8, 8))])
    read = F.unfold(net.activation(net.conv1(images)), 3, padding=1).transpose(1, 2).reshape(-1, 72).numpy()
    wanted = read @ net.conv2.weight.flatten(1).numpy().T
    errors = {}
    for taps in ("own", "shared"):
        method = CaP(positions=0, ridge=EXACT, taps=taps)
        result = planned(net, groups, method, {"conv1": 5}, (4, 3, 8, 8))
        kept = np.repeat(result.keep["conv1"], 9)
        left = np.column_stack([read[:, kept], np.ones(len(read))])
        best = np.linalg.lstsq(left, wanted, rcond=None)[0][:-1]
        found = result.weights["conv2.weight"].reshape(6, -1)[:, kept].T
        lost = wanted - read[:, kept] @ found
        errors[taps] = float((lost - lost.mean(axis=0)).var(axis=0).sum())
        assert np.allclose(found, best, rtol=1e-6, atol=1e-9) == (taps == "own")
    assert errors["own"] < 0.95 * errors["shared"]


@torch.no_grad()
def test_the_score_of_a_3x3_reader_is_what_its_outputs_lose() -> None:
    """E(i) relative to the variance of the outputs, for the channel that goes first; against least squares."""
    net, groups = randomise(Plain(nn.ReLU())).double(), plain_groups()
    data = batches((4, 3, 8, 8))
    read = F.unfold(net.activation(net.conv1(torch.cat([x for x, _ in data]))), 3, padding=1)
    rows = read.transpose(1, 2).reshape(-1, 72).numpy()
    wanted = rows @ net.conv2.weight.flatten(1).numpy().T
    scores = CaP(positions=0, ridge=EXACT).scores(weights_of(net), groups, Context(net, data))["conv1"]
    losses = []
    for channel in range(8):
        left = np.column_stack([rows[:, np.repeat(np.arange(8) != channel, 9)], np.ones(len(rows))])
        error = wanted - left @ np.linalg.lstsq(left, wanted, rcond=None)[0]
        losses.append((error**2).sum() / ((wanted - wanted.mean(axis=0)) ** 2).sum())
    assert np.argmin(scores) == np.argmin(losses)
    assert scores.min() == pytest.approx(min(losses), rel=1e-6)


def test_what_is_redundant_goes_before_what_is_weak() -> None:
    """Large |W_i| does not save a channel that another one predicts."""
    net, groups = randomise(Plain(nn.Identity())).double(), plain_groups()
    with torch.no_grad():
        for name in ("conv1.weight", "conv1.bias"):
            net.get_parameter(name)[5] = net.get_parameter(name)[1]
        net.get_parameter("conv2.weight")[:, [1, 5]] *= 50
        net.get_parameter("conv2.weight")[:, 2] *= 0.05
    scores = CaP(ridge=1e-9).scores(weights_of(net), groups, Context(net, batches((4, 3, 8, 8))))["conv1"]
    first, second = np.argsort(scores)[:2]
    assert first in (1, 5)
    assert second == 2


def test_groups_are_measured_on_what_is_pruned_so_far() -> None:
    """The second group's weights fit the inputs that the first one's removal has left, not the dense ones."""
    net, groups = randomise(Plain(nn.ReLU())).double(), plain_groups()
    both = planned(net, groups, CaP(positions=0), {"conv1": 2, "conv2": 3}, (4, 3, 8, 8))
    first = planned(net, groups, CaP(positions=0), {"conv1": 2}, (4, 3, 8, 8))
    small = masked(randomise(Plain(nn.ReLU())).double(), groups, first)
    again = planned(small, groups, CaP(positions=0), {"conv2": 3}, (4, 3, 8, 8))
    dense = planned(net, groups, CaP(positions=0), {"conv2": 3}, (4, 3, 8, 8))
    np.testing.assert_allclose(both.weights["fc.weight"], again.weights["fc.weight"], rtol=1e-9)
    assert np.abs(both.weights["fc.weight"] - dense.weights["fc.weight"]).max() > 1e-3


def test_compensation_beats_deletion_of_the_same_channels() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    x = torch.randn(64, 3, 8, 8).double()
    with torch.no_grad():
        dense = net(x)
    result = planned(net, groups, CaP(), {"conv1": 4, "stem": 4}, (16, 3, 8, 8))
    errors = []
    for weights in (result.weights, {}):
        other = randomise(Residual()).double()
        set_weights(other, weights)
        apply_masks(other, groups, result.keep)
        with torch.no_grad():
            errors.append(float((other(x) - dense).square().mean()))
    assert errors[0] < 0.5 * errors[1]


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("target", [0.3, 0.55, 0.9])
def test_the_target_is_met_from_below_within_one_step(toy: str, target: float) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()).double(), make_groups()
    result = CaP().plan(weights_of(net), groups, Budget(Target("macs", target)), Context(net, batches(shape)))
    kept = widths(result.keep)
    assert share(groups, "macs", kept) <= target
    for group in groups.prunable:
        if kept[group.id] < group.size:
            assert share(groups, "macs", kept | {group.id: kept[group.id] + 1}) > target


def test_rounding_floors_and_given_widths_are_kept_to() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    context, weights = Context(net, batches((4, 3, 8, 8))), weights_of(net)
    rounded = widths(CaP().plan(weights, groups, Budget(Target("macs", 0.6), round_to=2), context).keep)
    assert all(width % 2 == 0 for group, width in rounded.items() if group != "fc")
    floored = CaP().plan(weights, groups, Budget(Target("macs", 0.6), floors={"conv1": 8}), context)
    assert widths(floored.keep)["conv1"] == 8
    exact = CaP().plan(weights, groups, Budget(None, widths={"stem": 3, "conv1": 2}), context)
    assert widths(exact.keep) == {"stem": 3, "conv1": 2, "fc": 5}
    uniform = Budget(Target("macs", 0.6), ranking="uniform")
    assert widths(CaP().plan(weights, groups, uniform, context).keep) == uniform.common_widths(groups)


def test_no_group_sheds_more_than_the_step_before_everything_is_measured_anew() -> None:
    """A search of small steps takes as many sweeps as the group that shrinks most, and one that only looks."""
    net, groups = randomise(Residual()).double(), residual_groups()
    context, weights = Context(net, batches((4, 3, 8, 8))), weights_of(net)
    careful = CaP(step=0.125).plan(weights, groups, Budget(Target("macs", 0.4)), context)
    lost = [group.size - widths(careful.keep)[group.id] for group in groups.prunable]
    assert careful.report["search"]["sweeps"] >= max(lost) + 1
    assert CaP(step=1.0).plan(weights, groups, Budget(Target("macs", 0.4)), context).report["search"]["sweeps"] <= 3


def test_the_search_takes_from_the_group_that_loses_least() -> None:
    """All of conv1's channels but two follow from those two; then the search leaves the other group whole."""
    net, groups = randomise(Plain(nn.Identity())).double(), plain_groups()
    with torch.no_grad():
        for name in ("conv1.weight", "conv1.bias"):
            tensor = net.get_parameter(name)
            for channel in range(2, 8):
                tensor[channel] = channel * tensor[0] - tensor[1]
    result = CaP(ridge=1e-9).plan(
        weights_of(net), groups, Budget(Target("macs", 0.3)), Context(net, batches((4, 3, 8, 8)))
    )
    assert widths(result.keep) == {"conv1": 2, "conv2": 6}
    assert result.report["search"]["tolerance"] < 1e-6


def test_only_inner_groups_shrink_where_that_is_asked_for() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    result = CaP(scope="inner").plan(
        weights_of(net), groups, Budget(Target("macs", 0.6)), Context(net, batches((4, 3, 8, 8)))
    )
    assert result.keep["stem"].all()
    assert not result.keep["conv1"].all()


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_grouped_convolutions_keep_their_weights_and_are_named() -> None:
    net, groups = randomise(Mobile()).double(), mobile_groups()
    result = planned(net, groups, CaP(), {"expand": 2, "grouped": 1}, (4, 1, 6, 6))
    assert result.report["not_compensated"] == ["the weights stay: 'grouped' is a grouped convolution"]
    assert result.weights.keys() == {"fc.weight", "fc.bias"}


@torch.no_grad()
def test_in_front_of_a_grouped_convolution_a_channel_counts_by_weights_and_mean_square() -> None:
    net, groups = randomise(Mobile()).double(), mobile_groups()
    data = batches((4, 1, 6, 6))
    scores = CaP(positions=0).scores(weights_of(net), groups, Context(net, data))["expand"]
    images = torch.cat([x for x, _ in data])
    read: list[Tensor] = []
    net.grouped.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    net(images)
    squares = read[0].square().mean((0, 2, 3))
    single = torch.zeros(4).double()
    for output in range(4):
        for channel in range(4):
            place = channel + 4 * (output // 2)
            single[channel] += net.grouped.weight[output, channel, 0, 0] ** 2 * squares[place]
    expected = np.cumsum(np.sort(single.numpy())) / single.sum().item()
    np.testing.assert_allclose(np.sort(scores), expected, rtol=1e-9)
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(single.numpy()))


def test_the_network_is_left_as_it_was_and_no_more_images_are_taken_than_asked_for() -> None:
    net, groups = randomise(Residual()).double().train(), residual_groups()
    before, data = weights_of(net), batches((4, 3, 8, 8))
    some = CaP(images=8).scores(before, groups, Context(net, data))
    again = CaP().scores(before, groups, Context(net, data[:2]))
    assert all(np.array_equal(some[name], again[name]) for name in some)
    CaP().plan(before, groups, Budget(Target("macs", 0.5)), Context(net, data))
    assert net.training
    assert all(np.array_equal(before[name], values) for name, values in weights_of(net).items())


def test_without_images_it_says_what_it_needs() -> None:
    net = randomise(Residual())
    with pytest.raises(InputError, match=r"'cap' needs images.*--data"):
        CaP().scores(weights_of(net), residual_groups())
    with pytest.raises(InputError, match=r"'cap' needs images"):
        CaP().scores(weights_of(net), residual_groups(), Context(net, []))
