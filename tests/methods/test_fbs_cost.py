"""FBS: what an image costs whose channels are skipped, and the densities that meet a budget."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_groups import (
    Mobile,
    Residual,
    member,
    mobile_groups,
    randomise,
    residual_groups,
    span,
)

from methods.chains import HALF, SMALL, Chain, Step, batches, chain_groups, gated, images, planned, small
from prune2deploy.budget import Budget, Target, protect
from prune2deploy.errors import InputError
from prune2deploy.methods.base import Context
from prune2deploy.methods.fbs import FBS
from prune2deploy.methods.fbs_cost import find_places
from prune2deploy.train.boosting import Boosted, boosted_layers


# --- sparse execution and cost ----------------------------------------------------------------------------------------
def run_sparsely(net: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Run a gated chain on one image, computing active channels only; return logits and multiply-adds done."""
    active = torch.arange(x.shape[1])
    done = 0
    for conv in net.convs:
        assert isinstance(conv, Boosted)
        full = torch.zeros((1, conv.conv.in_channels, *x.shape[2:]), dtype=x.dtype).index_copy(1, active, x)
        saliencies = conv.saliencies(full)
        out = conv.mask(saliencies)[0].nonzero().flatten()
        weight = conv.conv.weight.index_select(0, out).index_select(1, active)
        y = F.conv2d(x, weight, None, conv.conv.stride, conv.conv.padding)
        norm = conv.norm
        scale = (norm.running_var[out] + norm.eps).rsqrt()
        y = (y - norm.running_mean[out].view(-1, 1, 1)) * scale.view(-1, 1, 1)
        x = F.relu(saliencies[0, out].view(-1, 1, 1) * y + conv.bias[out].view(-1, 1, 1))
        done += weight.numel() * y[0, 0].numel()
        done += conv.conv.in_channels * conv.conv.out_channels + y[0, 0].numel() * conv.conv.out_channels
        active = out
    weight = net.fc.weight.index_select(1, active)
    return F.linear(x.mean((2, 3)), weight, net.fc.bias), done + weight.numel()


def test_sparse_execution_of_one_image_is_masked_dense_execution_and_costs_what_is_reported() -> None:
    """index_select of in and out channels; MACs = sum of taps H W active_in active_out, + I O + H W O of predictors."""
    net, groups = small()
    _, state = gated(net, groups)
    x = images(8)
    runs = [run_sparsely(net, x[n : n + 1]) for n in range(8)]
    torch.testing.assert_close(torch.cat([logits for logits, _ in runs]), net(x), rtol=1e-12, atol=1e-12)
    cost = planned(net, groups, state, x)["mean_macs"]
    macs = [done for _, done in runs]
    assert cost["mean"] == pytest.approx(np.mean(macs), rel=1e-12)
    assert cost["deviation"] == pytest.approx(np.std(macs), rel=1e-9)
    assert (cost["smallest"], cost["largest"], cost["images"]) == (min(macs), max(macs), 8)
    assert len(set(macs)) > 1, "saliencies of 0 make images differ"
    assert cost["share"] <= 0.5
    assert cost["read_whole"] == []


M_CIFARNET = [
    Step(64, 30, padding=0),
    Step(64, 30),
    *(Step(128, 15, stride) for stride in (2, 1, 1)),
    *(Step(192, 8, stride) for stride in (2, 1, 1)),
]


def test_m_cifarnet_costs_174_30_million_macs_dense_and_44_35_at_density_a_half() -> None:
    """I O + H W O of overhead for each gate, k^2 H W active_in active_out for each layer."""
    net, groups = Chain(M_CIFARNET, 3), chain_groups(M_CIFARNET, 3)
    _, wiring = find_places(net, groups)
    sizes = {path: gate.channels for path, gate in wiring.gates.items()}
    dense = groups.cost.macs(groups.full_widths())
    half = wiring.macs({path: size // 2 for path, size in sizes.items()})
    assert dense == 174_301_824
    assert wiring.macs(sizes) == dense + 382_016
    assert half == 44_346_752
    assert dense / half == pytest.approx(3.93, abs=0.005)


def test_with_more_density_an_image_costs_more() -> None:
    """d is monotone in MACs, strictly where it gives any layer another channel."""
    net, groups = small()
    _, wiring = find_places(net, groups)
    costs = [wiring.macs(dict.fromkeys(wiring.gates, k)) for k in range(1, 13)]
    assert all(after > before for before, after in pairwise(costs))


@pytest.mark.parametrize("target", [0.15, 0.3, 0.6, 0.9])
def test_density_is_the_largest_common_one_that_meets_the_target(target: float) -> None:
    net, groups = small()
    state = FBS().prepare(net, groups, Budget(Target("macs", target)))
    sizes = {path: gate.channels for path, gate in state.wiring.gates.items()}
    assert state.wiring.share(state.final) <= target
    more = min((k + 1) / sizes[path] for path, k in state.final.items())
    denser = {path: int(np.ceil(more * size - 1e-9)) for path, size in sizes.items()}
    assert state.wiring.share(denser) > target
    densities = [k / sizes[path] for path, k in state.final.items()]
    assert max(densities) - min(densities) < 1 / min(sizes.values())


def test_what_reads_a_sum_reads_all_of_it_and_a_branch_alone_is_sparse() -> None:
    """Residual sums stay dense: each addend drops channels of its own."""
    net, groups = randomise(Residual()).double(), residual_groups()
    _, wiring = find_places(net, groups)
    assert list(wiring.gates) == ["stem", "conv1", "conv2"]
    assert wiring.sparse == {"conv1": "conv1"}
    active = {"stem": 2, "conv1": 4, "conv2": 3}
    overhead = 3 * 6 + 6 * 8 + 8 * 6 + 64 * (6 + 8 + 6)
    assert wiring.macs(active) == 9 * 64 * (2 * 3 + 4 * 6 + 3 * 4) + 5 * 6 + overhead


def test_a_depthwise_convolution_costs_its_active_channels_and_a_flattened_reader_those_that_it_sees() -> None:
    net, groups = randomise(Mobile()).double(), mobile_groups()
    _, wiring = find_places(net, groups)
    assert wiring.followers == {"depthwise": "expand"}
    assert wiring.sparse == {"expand": "expand"}
    expected = 9 * 16 * 2 * 1 + 9 * 16 * 2 + 16 * 4 * 2 / 2 + 3 * 64 + (1 * 8 + 16 * 8)
    assert wiring.macs({"expand": 2}) == expected


def test_a_network_that_changes_zeros_on_the_way_is_found_out_and_read_whole() -> None:
    """What is counted as skipped must have been seen to be zero."""

    class Shifted(Chain):
        def forward(self, x: Tensor) -> Tensor:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = F.relu(norm(conv(x))) + 0.5
            return self.fc(x.mean((2, 3)))

    net, groups = randomise(Shifted(SMALL, 3)).double(), chain_groups(SMALL, 3)
    _, state = gated(net, groups)
    report = planned(net, groups, state, images())
    assert report["mean_macs"]["read_whole"] == ["convs.1", "convs.2", "fc"]
    assert report["mean_macs"]["share"] > 0.5
    assert any("not zero where gates suppress them (convs.1, convs.2, fc)" in text for text in report["warnings"])


@pytest.mark.parametrize("activation", ["Sigmoid", "HardSigmoid(0.166667,0.5)", "Clip(1,6)", "Softplus", "Unheard"])
def test_behind_an_activation_that_makes_zeros_something_else_nothing_is_taken_for_skipped(activation: str) -> None:
    net, groups = small()
    changed = [replace(group, activations=(activation,)) for group in groups.groups]
    _, wiring = find_places(net, replace(groups, groups=tuple(changed)))
    assert wiring.sparse == {}


@pytest.mark.parametrize("activation", ["HardSwish", "Silu", "Gelu(tanh)", "Elu(0.5)", "PRelu", "Clip(0,6) of Relu"])
def test_behind_an_activation_that_keeps_zeros_they_are_skipped(activation: str) -> None:
    net, groups = small()
    changed = [replace(group, activations=(activation,)) for group in groups.groups]
    assert (
        find_places(net, replace(groups, groups=tuple(changed)))[1].sparse == find_places(net, groups)[1].sparse != {}
    )


@pytest.mark.parametrize("role", ["constant", "scale"])
def test_a_group_with_another_norm_or_constant_on_the_way_is_not_taken_for_sparse(role: str) -> None:
    net, groups = small()
    first, *rest = groups.groups
    first = replace(first, members=(*first.members, member("late.weight", role, span(0, 12))))
    _, wiring = find_places(net, replace(groups, groups=(first, *rest)))
    assert wiring.sparse.keys() == {"convs.1", "convs.2"}


# --- budgets ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(Target("params", 0.5)), "keeps all parameters, so target params=0.5 cannot be met; give macs=SHARE"),
        (Budget(Target("macs", 0.5), round_to=8), "no widths to round; leave --round-to out"),
        (Budget(Target("macs", 0.5), ranking="global"), "one density for all layers"),
        (
            Budget(Target("macs", 0.01)),
            r"macs=0.01 cannot be met by method 'fbs'; the smallest reachable is macs=0\.\d",
        ),
    ],
)
def test_budgets_that_densities_cannot_meet_are_refused_before_anything_changes(budget: Budget, message: str) -> None:
    net, groups = small()
    with pytest.raises(InputError, match=message):
        FBS().prepare(net, groups, budget)
    assert not boosted_layers(net)


def test_given_widths_are_densities_of_their_layers_and_floors_hold() -> None:
    net, groups = small()
    state = FBS().prepare(net, groups, Budget(None, widths={"convs.0": 5, "convs.2": 7}))
    assert state.final == {"convs.0": 5, "convs.1": 16, "convs.2": 7}
    floors = FBS().prepare(*small(), Budget(Target("macs", 0.2), floors={"convs.1": 11})).final
    free = FBS().prepare(*small(), Budget(Target("macs", 0.2))).final
    assert free["convs.1"] < 11 == floors["convs.1"]
    assert floors["convs.0"] <= free["convs.0"]


def test_layers_that_are_kept_have_no_gate() -> None:
    net, groups = small()
    state = FBS().prepare(net, protect(groups, ["convs.1.*"]), Budget(Target("macs", 0.8)))
    assert list(state.gates) == ["convs.0", "convs.2"]
    assert isinstance(net.get_submodule("norms.1"), nn.BatchNorm2d)


def test_a_network_without_norms_behind_convolutions_is_refused() -> None:
    net, groups = small()
    bare = replace(groups, layers=tuple(replace(layer, norm=None) for layer in groups.layers))
    with pytest.raises(InputError, match="convolutions that a BatchNorm follows directly, and this network has none"):
        FBS().prepare(net, bare, HALF)


def test_a_convolution_of_two_names_and_a_norm_that_does_more_are_left_alone() -> None:
    class Active(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    net, groups = small()
    net.add_module("again", net.get_submodule("convs.0"))
    net.norms[1] = Active(16).double()
    assert list(find_places(net, groups)[1].gates) == ["convs.2"]


def test_options_that_make_all_saliencies_equal_are_refused() -> None:
    with pytest.raises(InputError, match="predictor=zero and rho=one all saliencies are equal"):
        FBS(predictor="zero", rho="one").prepare(*small(), HALF)


def test_what_needs_training_and_images_says_so() -> None:
    net, groups = small()
    with pytest.raises(InputError, match="'fbs' needs gates that were trained; give --data"):
        FBS().plan({}, groups, HALF, Context(net, batches(images())))
    state = FBS().prepare(net, groups, HALF)
    with pytest.raises(InputError, match=r"not at its density yet; train \d+ epochs"):
        FBS().plan({}, groups, HALF, Context(net, batches(images()), None, state))
    _, state = gated(*small())
    with pytest.raises(InputError, match="'fbs' needs images"):
        FBS().plan({}, groups, HALF, Context(net, None, None, state))
    with pytest.raises(InputError, match="needs images to measure its gates on"):
        FBS().scores({}, groups, Context(net, [], None, state))
