"""Masks silence channels, and silenced channels can be removed."""

import copy
from collections.abc import Iterator

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
    masks_of,
    mobile_groups,
    narrowed,
    norm_layer,
    norm_members,
    of,
    random_masks,
    randomise,
    reader,
    residual_groups,
    span,
)

from prune2deploy.apply import MaskKeeper, MergeKeeper, apply_masks, fold_offsets, set_weights, weights_of
from prune2deploy.cost import Cost, Width
from prune2deploy.errors import InputError
from prune2deploy.groups import COPIED_ROLES, SILENCED_ROLES, Group, Groups


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("seed", range(3))
def test_the_masked_network_computes_what_the_narrow_one_computes(
    toy: str, seed: int, dtype: torch.dtype, limit: float
) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make(), seed).to(dtype), make_groups()
    masks = random_masks(groups, seed)
    x = torch.randn(shape, dtype=dtype)
    dense = net(x)
    apply_masks(net, groups, masks)
    assert (net(x) - narrowed(net, groups, masks)(x)).abs().max() <= limit
    assert (net(x) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("toy", TOYS)
def test_masks_that_keep_all_change_no_bit(toy: str) -> None:
    make, make_groups, _ = TOYS[toy]
    net, groups = randomise(make()), make_groups()
    before = weights_of(net)
    apply_masks(net, groups, masks_of(groups, {}))
    MaskKeeper(net, groups, masks_of(groups, {}))()
    assert all(values.tobytes() == before[name].tobytes() for name, values in weights_of(net).items())


def test_only_silenced_members_of_removed_channels_become_zero() -> None:
    net, groups = randomise(Residual()), residual_groups()
    before = weights_of(net)
    masks = masks_of(groups, {"stem": [1, 4], "conv1": [0]})
    apply_masks(net, groups, masks)
    after = weights_of(net)
    expected = {name: values.copy() for name, values in before.items()}
    for name in ("stem.weight", "bn.weight", "bn.bias", "conv2.weight", "bn2.weight", "bn2.bias"):
        expected[name][[1, 4]] = 0
    for name in ("conv1.weight", "bn1.weight", "bn1.bias"):
        expected[name][0] = 0
    assert all(np.array_equal(after[name], expected[name]) for name in before)


def test_a_kept_mask_stays_silent_through_training_with_momentum_and_decay() -> None:
    net, groups = randomise(Residual()).train(), residual_groups()
    masks = masks_of(groups, {"stem": [0, 5], "conv1": [2, 3, 7]})
    apply_masks(net, groups, masks)
    keep = MaskKeeper(net, groups, masks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    before = weights_of(net)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
        optimizer.step()
        keep()
    after = weights_of(net)
    for group_id, mask in masks.items():
        for part in groups[group_id].of_role(*SILENCED_ROLES):
            values = np.moveaxis(after[part.parameter], part.axis, 0)
            assert not values[part.indices[~mask]].any()
            assert not np.signbit(values[part.indices[~mask]]).any()
            moved = values[part.indices[mask]] != np.moveaxis(before[part.parameter], part.axis, 0)[part.indices[mask]]
            assert moved.any()


MERGES = {
    "residual": {"stem": np.array([0, 0, 2, 0, 4, 4]), "conv1": np.array([3, 1, 2, 3, 2, 2, 6, 7])},
    "mobile": {"expand": np.array([2, 1, 2, 1]), "grouped": np.array([1, 1])},
}


def copies(
    weights: dict[str, np.ndarray],
    groups: Groups,
    merges: dict[str, np.ndarray],
    roles: tuple[str, ...] = COPIED_ROLES,
) -> Iterator[np.ndarray]:
    """Yield the channels of everything that is to be equal, and those that they copy."""
    for group_id, kept in merges.items():
        for part in groups[group_id].of_role(*roles):
            values = np.moveaxis(weights[part.parameter], part.axis, 0)[part.indices]
            yield np.stack([values, values[kept]])


@pytest.mark.parametrize("toy", TOYS)
def test_merged_channels_stay_exact_copies_through_training_with_momentum_and_decay(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups, merges = randomise(make()).train(), make_groups(), MERGES[toy]
    keep = MergeKeeper(net, groups, merges)
    assert not all(np.array_equal(*pair) for pair in copies(weights_of(net), groups, merges))
    keep.after_step()
    before = weights_of(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(4, *shape[1:])), torch.tensor([0, 1, 2, 0])).backward()
        keep.after_backward()
        optimizer.step()
        # Equal gradients make equal steps; only the norms' statistics may round apart.
        assert all(np.array_equal(*pair) for pair in copies(weights_of(net), groups, merges, tuple(SILENCED_ROLES)))
        keep.after_step()
        assert all(np.array_equal(*pair) for pair in copies(weights_of(net), groups, merges))
    after = weights_of(net)
    moved = {part.parameter for group in groups.groups for part in group.of_role(*COPIED_ROLES)}
    assert all(not np.array_equal(after[name], before[name]) for name in moved)


@pytest.mark.parametrize("toy", TOYS)
def test_merging_copies_the_kept_channel_and_averages_gradients_place_by_place(toy: str) -> None:
    make, make_groups, _ = TOYS[toy]
    net, groups, merges = randomise(make()), make_groups(), MERGES[toy]
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = weights_of(net)
    gradients = {name: parameter.grad.numpy().copy() for name, parameter in net.named_parameters()}
    keep = MergeKeeper(net, groups, merges)
    keep.after_backward()
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())
    keep.after_step()
    expected = {name: values.copy() for name, values in before.items()}
    for group_id, kept in merges.items():
        for part in groups[group_id].of_role(*COPIED_ROLES):
            for place in part.indices.T:
                expected[part.parameter][place] = before[part.parameter][place[kept]]
                if part.parameter in gradients:
                    own = gradients[part.parameter][place].copy()
                    for channel, stays in enumerate(kept):
                        gradients[part.parameter][place[channel]] = own[kept == stays].mean(axis=0)
    assert all(np.array_equal(values, expected[name]) for name, values in weights_of(net).items())
    for name, parameter in net.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), gradients[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("group", "kept", "message"),
    [
        ("other", np.arange(6), "name a group 'other'"),
        ("fc", np.arange(5), "cannot be pruned: an output of the network"),
        ("stem", np.arange(5), "do not name one of its 6 channels for each"),
        ("stem", np.array([1, 2, 2, 3, 4, 5]), "do not name one of its 6 channels for each"),
        ("stem", np.array([0, 0, 0, 0, 0, 6]), "do not name one of its 6 channels for each"),
        ("stem", np.array([0, 0, 0, 0, 0, -1]), "do not name one of its 6 channels for each"),
        ("stem", np.zeros(6), "do not name one of its 6 channels for each"),
    ],
)
def test_merges_that_do_not_fit_are_refused(group: str, kept: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MergeKeeper(Residual(), residual_groups(), {group: kept})


def test_weights_of_are_copies() -> None:
    net = randomise(Residual())
    weights = weights_of(net)
    weights["stem.weight"][:] = 0
    assert net.stem.weight.any()
    assert weights.keys() == net.state_dict().keys()
    assert weights_of(net.to(torch.bfloat16))["stem.weight"].dtype == np.float32


def test_new_weights_are_put_in_place_whole_and_in_the_networks_own_type() -> None:
    net = randomise(Residual()).to(torch.bfloat16)
    kept = net.get_parameter("bn.weight")
    set_weights(net, {"bn.weight": np.arange(6.0), "bn.running_var": np.ones(6, np.float32)})
    assert net.get_parameter("bn.weight") is kept
    assert kept.tolist() == [0, 1, 2, 3, 4, 5]
    assert net.get_buffer("bn.running_var").tolist() == [1] * 6
    before = weights_of(net)
    for name, array in (("bn.weight", np.ones(5)), ("other", np.ones(6))):
        with pytest.raises(InputError, match=f"no '{name}' of shape"):
            set_weights(net, {"bn.bias": np.ones(6), name: array})
    assert all(np.array_equal(before[name], values) for name, values in weights_of(net).items())


def test_masks_that_do_not_fit_are_refused_with_what_is_wrong() -> None:
    net, groups = randomise(Residual()), residual_groups()
    with pytest.raises(InputError, match="name a group 'other'"):
        apply_masks(net, groups, {"other": np.ones(3, dtype=np.bool_)})
    with pytest.raises(InputError, match=r"bool \[6\] is wanted"):
        apply_masks(net, groups, {"stem": np.ones(3, dtype=np.bool_)})
    with pytest.raises(InputError, match=r"bool \[6\] is wanted"):
        apply_masks(net, groups, {"stem": np.ones(6)})
    with pytest.raises(InputError, match="cannot be pruned: an output of the network"):
        apply_masks(net, groups, masks_of(groups, {"fc": [0]}))
    with pytest.raises(InputError, match=r"no parameter or buffer 'stem.weight'"):
        apply_masks(Mobile(), groups, masks_of(groups, {"stem": [0]}))
    with pytest.raises(InputError, match="too small"):
        apply_masks(Residual(4, 8), groups, masks_of(groups, {"stem": [5]}))


class Pair(nn.Module):
    """conv1 - norm - activation - conv2, with a norm or a bias behind it or neither."""

    def __init__(self, *, padding: int = 0, sigmoid: bool = False, norm: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=padding, bias=bias)
        self.bn2 = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.activation = nn.Sigmoid() if sigmoid else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))


def pair_groups(*, norm: bool = True, bias: bool = False, op_type: str = "Conv", activation: str = "Relu") -> Groups:
    five = span(0, 5)
    group = Group(
        "conv1", 5, (*filters("conv1", five), *norm_members("bn1", five), reader("conv2", five)), (activation,)
    )
    layers = [conv_layer("conv1", of(conv1=1), Width(2), norm="bn1"), norm_layer("bn1", of(conv1=1))]
    layers += [conv_layer("conv2", Width(4), of(conv1=1), norm="bn2" if norm else None, bias=bias, op_type=op_type)]
    layers += [norm_layer("bn2", Width(4))] if norm else []
    return Groups((group,), tuple(layers), Cost((), ()))


CONSTANT = 1.75


def constant_pair(**options: bool) -> Pair:
    """A network of double precision whose channel 2 is the constant 1.75 before the activation."""
    net = randomise(Pair(**options)).double()
    with torch.no_grad():
        net.bn1.weight[2], net.bn1.bias[2] = 0.0, CONSTANT
    return net


def folded(net: nn.Module, groups: Groups, value: float) -> nn.Module:
    small = copy.deepcopy(net)
    masks = masks_of(groups, {"conv1": [2]})
    assert fold_offsets(small, groups, masks, {"conv1": np.full(5, value)}) == []
    apply_masks(small, groups, masks)
    return small


@pytest.mark.parametrize("options", [{"norm": True}, {"norm": False, "bias": True}, {"norm": True, "bias": True}])
def test_a_folded_constant_is_exact_for_a_reader_without_padding(options: dict[str, bool]) -> None:
    net, groups = constant_pair(**options), pair_groups(**options)
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    assert (folded(net, groups, CONSTANT)(x) - net(x)).abs().max() <= 5e-15 * net(x).abs().max()
    masked_only = folded(net, groups, 0.0)
    assert (masked_only(x) - net(x)).abs().max() > 1e-2


def test_a_folded_constant_is_exact_inside_and_wrong_on_the_border_of_a_padded_reader() -> None:
    net, groups = constant_pair(padding=1), pair_groups()
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    difference = (folded(net, groups, CONSTANT)(x) - net(x)).abs()
    assert difference[:, :, 1:-1, 1:-1].max() <= 5e-15 * net(x).abs().max()
    assert difference[:, :, 0].max() > 1e-2


def test_an_offset_counts_from_what_the_masked_network_shows() -> None:
    net, groups = constant_pair(sigmoid=True), pair_groups(activation="Sigmoid")
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    above_half = torch.sigmoid(torch.tensor(CONSTANT, dtype=torch.float64)).item() - 0.5
    assert (folded(net, groups, above_half)(x) - net(x)).abs().max() <= 5e-15 * net(x).abs().max()


def test_a_channel_that_spans_a_flattened_map_is_folded_over_all_its_places() -> None:
    net, groups = randomise(Mobile()).double(), mobile_groups()
    with torch.no_grad():
        net.grouped.weight[[1, 3]], net.grouped.bias[[1, 3]] = 0.0, CONSTANT
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    dense, masks = net(x), masks_of(groups, {"grouped": [1]})
    assert fold_offsets(net, groups, masks, {"grouped": np.array([0.0, CONSTANT])}) == []
    apply_masks(net, groups, masks)
    assert (net(x) - dense).abs().max() <= 5e-15 * dense.abs().max() + 1e-15


def test_offsets_of_kept_channels_change_nothing() -> None:
    net, groups = constant_pair(), pair_groups()
    before = weights_of(net)
    assert fold_offsets(net, groups, masks_of(groups, {}), {"conv1": np.ones(5)}) == []
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())


@pytest.mark.parametrize(
    ("net", "groups", "removed", "reason"),
    [
        (Pair(norm=False), pair_groups(norm=False), "conv1", "'conv2' has no bias and no norm behind it"),
        (Pair(), pair_groups(op_type="ConvTranspose"), "conv1", "'conv2' is a transposed convolution"),
        (Mobile(), mobile_groups(), "expand", "'grouped' is a grouped convolution"),
    ],
)
def test_a_reader_that_cannot_take_a_constant_is_left_alone_and_named(
    net: nn.Module, groups: Groups, removed: str, reason: str
) -> None:
    before = weights_of(randomise(net))
    offsets = {removed: np.ones(groups[removed].size)}
    (line,) = fold_offsets(net, groups, masks_of(groups, {removed: [0]}), offsets)
    assert reason in line
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())
