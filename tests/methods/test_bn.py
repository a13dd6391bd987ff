"""BN: moments of activations from norms, the scores made of them, and what the fold of means does."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_groups import (
    Mobile,
    Residual,
    conv_layer,
    filters,
    mobile_groups,
    norm_layer,
    norm_members,
    of,
    randomise,
    reader,
    residual_groups,
    span,
)

from prune2deploy.apply import apply_masks, fold_offsets, weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.cost import Cost, Width
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
from prune2deploy.methods.base import PruneResult
from prune2deploy.methods.bn import BN, activation_moments

BETA = np.array([-2.0, -0.5, 0.0, 0.4, 1.5, 5.0, 7.0])
GAMMA = np.array([0.5, 1.0, 1.3, 0.2, 0.7, 2.0, 1.0])

ACTIVATIONS = {
    "Identity": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0),
    "Clip(0,6)": lambda x: np.clip(x, 0, 6),
    "Clip(-1,1)": lambda x: np.clip(x, -1, 1),
    "Clip(0,inf)": lambda x: np.maximum(x, 0),
    "LeakyRelu(0.1)": lambda x: np.where(x > 0, x, 0.1 * x),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "HardSigmoid(0.2,0.5)": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Silu": lambda x: x / (1 + np.exp(-x)),
    "Swish": lambda x: x / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Elu(0.5)": lambda x: np.where(x > 0, x, 0.5 * np.expm1(np.minimum(x, 0))),
    "Softplus": lambda x: np.log1p(np.exp(x)),
    "Gelu": lambda x: torch.nn.functional.gelu(torch.from_numpy(x)).numpy(),
    "Mish": lambda x: torch.nn.functional.mish(torch.from_numpy(x)).numpy(),
    "Gelu(tanh)": lambda x: F.gelu(torch.from_numpy(x), approximate="tanh").numpy(),
    "Selu": lambda x: F.selu(torch.from_numpy(x)).numpy(),
    "Celu(0.5)": lambda x: F.celu(torch.from_numpy(x), 0.5).numpy(),
    "Affine(-2,0.5)": lambda x: 0.5 - 2 * x,
    "Relu of Affine(-2,0.5)": lambda x: np.maximum(0.5 - 2 * x, 0),
    "Sigmoid of Relu": lambda x: 1 / (1 + np.exp(-np.maximum(x, 0))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moments_are_those_of_drawn_samples(activation: str) -> None:
    draws = np.random.default_rng(0).standard_normal((500_000, 1))
    values = ACTIVATIONS[activation](BETA + GAMMA * draws)
    m1, m2 = activation_moments(BETA, GAMMA, activation)
    for moment, power in ((m1, 1), (m2, 2)):
        drawn = values**power
        error = 5 * drawn.std(axis=0) / np.sqrt(len(draws)) + 2e-4  # quadrature at a kink
        assert (np.abs(moment - drawn.mean(axis=0)) < error).all()


def test_the_three_limits_of_relu() -> None:
    beta = np.array([-1.5, 0.0, 2.5])
    for tiny in (0.0, 1e-13, 1e-9):
        m1, m2 = activation_moments(beta, np.full(3, tiny), "Relu")
        np.testing.assert_allclose(m1, np.maximum(beta, 0), atol=1e-9)
        np.testing.assert_allclose(m2, np.maximum(beta, 0) ** 2, atol=1e-9)
    m1, m2 = activation_moments(np.array([50.0]), np.array([1.0]), "Relu")
    np.testing.assert_allclose([m1[0], m2[0]], [50.0, 2501.0], rtol=1e-14)
    m1, m2 = activation_moments(np.array([-50.0]), np.array([1.0]), "Relu")
    assert m1[0] == m2[0] == 0.0


@pytest.mark.parametrize("activation", ["Relu", "Clip(0,6)", "Clip(-1,1)", "LeakyRelu(0.1)"])
def test_moments_far_in_a_tail_stay_possible_ones(activation: str) -> None:
    beta = np.linspace(-40, 40, 4001)
    gamma = np.full_like(beta, 1.37)
    m1, m2 = activation_moments(beta, gamma, activation)
    assert (m2 >= m1**2 * (1 - 1e-12)).all()
    assert (np.diff(m1) >= -1e-12).all()
    if activation == "Relu":
        assert (m1 >= 0).all()


def set_norm(net: Residual, channel: int, gamma: float, beta: float) -> None:
    with torch.no_grad():
        net.bn1.weight[channel], net.bn1.bias[channel] = gamma, beta


@pytest.mark.parametrize("score", ["mean", "rms", "std", "rms_x_next", "std_x_next"])
@pytest.mark.parametrize("beta", [0.0, -0.7])
def test_a_channel_that_is_always_zero_scores_zero_and_its_removal_changes_nothing(score: str, beta: float) -> None:
    net, groups = randomise(Residual()), residual_groups()
    set_norm(net, 3, 0.0, beta)
    scores = BN(score=score).scores(weights_of(net), groups)["conv1"]
    assert scores[3] == 0.0
    assert (np.delete(scores, 3) > 0).all()
    x = torch.randn(2, 3, 8, 8)
    dense = net(x)
    keep = {"conv1": np.arange(8) != 3}
    apply_masks(net, groups, keep)
    assert torch.equal(net(x), dense)


def test_a_constant_channel_has_a_mean_but_no_deviation() -> None:
    net, groups = randomise(Residual()), residual_groups()
    set_norm(net, 3, 0.0, 1.25)
    weights = weights_of(net)
    assert BN(score="mean").scores(weights, groups)["conv1"][3] == 1.25
    assert BN(score="rms").scores(weights, groups)["conv1"][3] == 1.25
    assert BN(score="std").scores(weights, groups)["conv1"][3] == 0.0


def test_the_sign_of_the_scale_does_not_matter() -> None:
    net, groups = randomise(Residual()), residual_groups()
    before = BN(score="rms").scores(weights_of(net), groups)
    with torch.no_grad():
        net.bn1.weight.neg_()
    assert np.array_equal(BN(score="rms").scores(weights_of(net), groups)["conv1"], before["conv1"])


def test_norms_that_are_added_add_their_means_and_variances() -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    beta = weights["bn.bias"].astype(float) + weights["bn2.bias"]
    gamma = np.hypot(weights["bn.weight"].astype(float), weights["bn2.weight"])
    expected, _ = activation_moments(beta, gamma, "Relu")
    np.testing.assert_allclose(BN().scores(weights, groups)["stem"], expected, rtol=1e-12)


def test_behind_a_depthwise_convolution_its_own_norm_counts() -> None:
    weights, groups = weights_of(randomise(Mobile())), mobile_groups()
    m1, _ = activation_moments(
        weights["bn_depthwise.bias"].astype(float), np.abs(weights["bn_depthwise.weight"].astype(float)), "Clip(0,6)"
    )
    scores = BN().scores(weights, groups)
    np.testing.assert_allclose(scores["expand"], m1[:4] + m1[4:], rtol=1e-12)
    assert list(scores) == ["expand"]  # the other group has no norm


def test_a_norm_that_reads_a_sum_is_scored_by_itself() -> None:
    # Pre-activation: two norms read the trunk one after the other; their outputs are never added.
    four = span(0, 4)
    parts = (
        *filters("stem", four),
        *norm_members("n1", four),
        reader("conv1", four),
        *filters("conv2", four),
        *norm_members("n2", four),
        reader("fc", four),
    )
    width = of(trunk=1)
    layers = (
        conv_layer("stem", width, Width(3)),
        norm_layer("n1", width),
        conv_layer("conv2", width, Width(7)),
        norm_layer("n2", width),
    )
    groups = Groups((Group("trunk", 4, parts, ("Relu",)),), layers, Cost((), ()))
    generator = np.random.default_rng(0)
    weights = {f"{name}.{kind}": generator.standard_normal(4) for name in ("n1", "n2") for kind in ("weight", "bias")}
    moments = [
        activation_moments(weights[f"{n}.bias"], np.abs(weights[f"{n}.weight"]), "Relu")[0] for n in ("n1", "n2")
    ]
    np.testing.assert_allclose(BN().scores(weights, groups)["trunk"], np.mean(moments, axis=0), rtol=1e-12)
    assert BN(mean_fold=True).offsets(weights, groups, {"trunk": np.arange(4) > 1}) == {}


def test_scores_times_next_scale_with_the_weights_that_read_the_channel() -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    plain = BN(score="std").scores(weights, groups)["conv1"]
    by_next = BN(score="std_x_next").scores(weights, groups)["conv1"]
    norms = np.sqrt((weights["conv2.weight"].astype(float) ** 2).sum(axis=(0, 2, 3)))
    np.testing.assert_allclose(by_next, plain * norms, rtol=1e-12)


def test_a_network_without_norms_is_refused_with_what_works() -> None:
    groups = mobile_groups()
    no_norms = Groups(groups.groups[1:], groups.layers, groups.cost)
    with pytest.raises(InputError, match=r"method 'bn' needs norms, but .* use 'l1' or 'random'"):
        BN().scores(weights_of(randomise(Mobile())), no_norms)


@pytest.mark.parametrize("activation", ["Cube", "Clip(0,x)", "Sigmoidal", "Relu(1)", "Log of Sigmoid", "Tanh-Sub"])
def test_an_unknown_activation_is_refused_with_those_that_are_known(activation: str) -> None:
    with pytest.raises(InputError, match=r"does not know the activation '.*'; it knows Clip\(low,high\), .* Tanh"):
        activation_moments(np.zeros(1), np.ones(1), activation)


def plan(net: Residual, groups: Groups, *, mean_fold: bool) -> PruneResult:
    return BN(score="std", mean_fold=mean_fold).plan(weights_of(net), groups, Budget(Target("macs", 0.8)))


def test_the_fold_of_a_constant_channel_repairs_its_removal_away_from_the_border() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    with torch.no_grad():
        net.bn1.weight[3], net.bn1.bias[3] = 0.0, 1.25
        net.conv2.weight[..., 0], net.conv2.weight[..., 2] = 0.0, 0.0  # a 1x1 convolution in effect: it has no border
        net.conv2.weight[:, :, 0], net.conv2.weight[:, :, 2] = 0.0, 0.0
    groups = Groups(tuple(g for g in groups.groups if g.id != "fc"), groups.layers, residual_groups().cost)
    keep = {"stem": np.ones(6, dtype=np.bool_), "conv1": np.arange(8) != 3}
    offsets = BN(mean_fold=True).offsets(weights_of(net), groups, keep)
    assert offsets.keys() == {"conv1"}
    np.testing.assert_array_equal(offsets["conv1"], np.where(keep["conv1"], 0.0, 1.25))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    dense, plain = net(x), copy.deepcopy(net)
    apply_masks(plain, groups, keep)
    fold_offsets(net, groups, keep, offsets)
    apply_masks(net, groups, keep)
    assert (net(x) - dense).abs().max() <= 5e-15 * dense.abs().max()
    assert (plain(x) - dense).abs().max() > 1e-3


def test_offsets_are_given_only_where_one_norm_and_one_activation_are_certain() -> None:
    net, groups = randomise(Residual()), residual_groups()
    assert plan(net, groups, mean_fold=False).offsets == {}
    keep = {"stem": np.arange(6) > 0, "conv1": np.arange(8) > 0, "fc": np.ones(5, dtype=np.bool_)}
    weights = weights_of(net)
    assert BN(mean_fold=True).offsets(weights, groups, keep).keys() == {"conv1"}  # two norms are added in the other
    twice = Group("conv1", 8, groups["conv1"].members, ("Relu", "Clip(0,6)"))
    assert BN(mean_fold=True).offsets(weights, Groups((twice,), groups.layers, groups.cost), keep) == {}


def test_an_offset_is_measured_from_what_the_silenced_channel_shows() -> None:
    net, groups = randomise(Residual()), residual_groups()
    sigmoid = Groups((Group("conv1", 8, groups["conv1"].members, ("Sigmoid",)),), groups.layers, groups.cost)
    set_norm(net, 0, 0.0, 2.0)
    offsets = BN(mean_fold=True).offsets(weights_of(net), sigmoid, {"conv1": np.arange(8) > 0})
    assert offsets["conv1"][0] == pytest.approx(1 / (1 + np.exp(-2.0)) - 0.5, abs=1e-14)


def test_means_are_not_folded_where_readers_differ_in_the_activation() -> None:
    net, groups = randomise(Residual()), residual_groups()
    keep = {"conv1": np.arange(8) > 0}
    for read_as, folded in ((("Relu",), {"conv1"}), (("Relu", "Identity"), set()), (("Gated(Relu)",), set())):
        one = replace(groups, groups=(replace(groups["conv1"], read_as=read_as),))
        assert BN(mean_fold=True).offsets(weights_of(net), one, keep).keys() == folded
