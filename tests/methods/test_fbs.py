"""FBS: what a gated layer computes, how it trains, and what it says of itself."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_groups import (
    TOYS,
    Mobile,
    mobile_groups,
    permuted,
    randomise,
)

from methods.chains import HALF, SMALL, Chain, batches, chain_groups, gated, images, planned, small
from methods.test_table import toy_task
from prune2deploy.apply import weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.errors import InputError
from prune2deploy.methods.base import Context
from prune2deploy.methods.fbs import FBS
from prune2deploy.networks import load_weights, save_weights
from prune2deploy.train import measure
from prune2deploy.train.boosting import boosted_layers


# --- what a gated layer computes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", ["masked", "boosted"])
def test_identity_embedding_with_phi_0_and_rho_gamma_at_density_1_is_conv_norm_relu(
    shift: Any, bias: bool, dtype: torch.dtype
) -> None:
    """Phi = 0, rho = gamma (gamma < 0: the filter's sign turned), beta or beta / gamma; gamma = 0 is a constant."""
    net = Chain(SMALL, 3)
    net.convs[1] = nn.Conv2d(12, 16, 3, 2, 1, bias=bias)
    net = randomise(net).to(dtype)
    scale = net.get_parameter("norms.1.weight")
    assert (scale < 0).any()
    assert (scale > 0).any()
    with torch.no_grad():
        scale[3] = 0.0
    x = images().to(dtype)
    with torch.no_grad():
        dense = net(x)
        FBS(shift=shift).rebuild(net, chain_groups(SMALL, 3))
        worst = float((net(x) - dense).abs().max() / dense.abs().max())
    assert len(boosted_layers(net)) == 3
    assert worst <= (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("shift", ["masked", "boosted"])
def test_identity_embedding_keeps_the_toys_as_they_are(shift: Any, toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, x = randomise(make()).double(), torch.randn(shape).double()
    dense = net(x)
    FBS(shift=shift, predictor="zero").prepare(net, make_groups(), HALF)
    torch.testing.assert_close(net(x), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", ["masked", "boosted"])
def test_a_gate_is_g_relu_of_mean_abs_x_phi_plus_rho_and_m_the_k_largest(shift: Any) -> None:
    """g = relu(mean|x| Phi + rho); m = top k; y = (m g) norm(conv x) + m beta, or (m g) (norm(conv x) + beta)."""
    net, groups = small()
    gates, _ = gated(net, groups, FBS(shift=shift, predictor="kaiming"))
    gate, x = gates["convs.0"], images()
    found = gate(x).detach().numpy()
    phi = gate.predictor.weight.detach().numpy().T
    g = np.maximum(np.abs(x.numpy()).mean((2, 3)) @ phi + gate.predictor.bias.detach().numpy(), 0)
    normed = gate.norm(gate.conv(x)).detach().numpy()
    beta = gate.bias.detach().numpy()
    assert 1 <= gate.active < 12
    for n in range(len(x)):
        best = np.argsort(-g[n])[: gate.active]
        for c in range(12):
            m = float(c in best and g[n, c] > 0)
            parts = {
                "masked": m * g[n, c] * normed[n, c] + m * beta[c],
                "boosted": m * g[n, c] * (normed[n, c] + beta[c]),
            }
            np.testing.assert_allclose(found[n, c], parts[shift], rtol=1e-12, atol=1e-14)


def test_k_is_the_density_times_the_width_rounded_up() -> None:
    """k = ceil(d O), where 0.7 * 10 in floating point is 7 as well."""
    net, groups = small()
    method = FBS(step=0.3, epochs=1, last_epochs=1)
    state = method.prepare(net, groups, Budget(None, widths={"convs.0": 1, "convs.1": 4, "convs.2": 16}))
    assert [round(density, 4) for density in state.densities] == [1.0, 0.7, 0.4, 0.1, 0.0833]
    seen = []
    for epoch in range(4):
        method.epoch_end(state, epoch)
        seen.append([gate.active for gate in state.gates.values()])
    assert seen == [[9, 12, 16], [5, 7, 16], [2, 4, 16], [1, 4, 16]]


def test_exactly_k_channels_are_active_where_none_tie() -> None:
    net, groups = small()
    gates, _ = gated(net, groups, FBS(predictor="normal", rho="one"))
    net(images(50))
    for gate in gates.values():
        saliencies, mask = gate.choice.saliencies, gate.choice.mask
        assert saliencies is not None
        assert mask is not None
        clear = (saliencies > 0).sum(1) > gate.active
        assert clear.sum() > 40
        assert (mask.sum(1)[clear] == gate.active).all()
        assert (mask.sum(1) <= gate.active).all()
        assert (saliencies[mask > 0].min() > 0).all()
        assert mask.unique().tolist() == [0.0, 1.0]


def test_ties_saliencies_of_0_are_never_active_and_a_tie_at_the_limit_suppresses_all_that_tie() -> None:
    """m = 1 where g is strictly above the (k + 1)-th largest: a rule that no runtime's order of ties changes."""
    gate = gated(*small())[0]["convs.0"]
    gate.activate(3)
    rows = torch.tensor(
        [
            [5.0, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0],
            [5.0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [5.0, 4, 3, 3, 1, 0, 0, 0, 0, 0, 0, 0],
            [0.0] * 12,
        ]
    )
    assert [row.nonzero().flatten().tolist() for row in gate.mask(rows)] == [[0, 1, 2], [0, 1], [0, 1], []]
    gate.activate(12)
    assert gate.mask(rows).all(), "without a limit all are active, also those of saliency 0"


def test_channels_of_a_depthwise_convolution_have_the_mask_of_the_layer_before() -> None:
    """Depthwise: the producer is gated, and its mask used again behind the depthwise norm."""
    net, x = randomise(Mobile()).double(), torch.randn((4, 1, 6, 6)).double()
    gates, _ = gated(net, mobile_groups())
    seen = []
    net.get_submodule("grouped").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(x)
    assert list(gates) == ["expand"]
    mask = gates["expand"].choice.mask
    assert mask is not None
    assert 0 < mask.sum() < mask.numel()
    assert not seen[0][mask == 0].any()
    assert (seen[0].flatten(2).abs().amax(2)[mask == 1] > 0).any()


def test_a_copy_of_the_network_has_choices_of_its_own_that_its_depthwise_layers_follow() -> None:
    net, x = randomise(Mobile()).double(), torch.randn((4, 1, 6, 6)).double()
    gated(net, mobile_groups())
    net.train()(x).sum().backward()
    copy = deepcopy(net).eval()
    assert boosted_layers(copy)["expand"].choice.mask is None
    expected = net.eval()(x)
    boosted_layers(net)["expand"].choice.mask = None
    assert torch.equal(copy(x), expected)


def test_batch_statistics_in_training_are_those_of_the_convolution_without_gates() -> None:
    """The gate stands behind the norm: suppressed channels do not count as zeros in its mean and variance."""
    net, groups = small()
    plain = [nn.BatchNorm2d(12, affine=False).double(), net.get_submodule("convs.0")]
    x = images(16)
    gates, _ = gated(net, groups)
    gate = gates["convs.0"]
    assert gate.active < 12
    plain[0].load_state_dict(gate.norm.state_dict())
    gate.train()(x)
    plain[0].train()(gate.conv(x))
    assert torch.equal(gate.norm.running_mean, plain[0].running_mean)
    assert torch.equal(gate.norm.running_var, plain[0].running_var)


def test_saliencies_are_computed_in_full_precision_under_autocast() -> None:
    """With 8 bits many saliencies would tie, and ties are suppressed."""
    gate = gated(randomise(Chain(SMALL, 3)), chain_groups(SMALL, 3))[0]["convs.0"]
    x = images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gate.saliencies(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, gate.saliencies(x))


# --- training ---------------------------------------------------------------------------------------------------------
def test_suppressed_outputs_give_their_phi_rows_no_gradient_but_that_of_the_penalty() -> None:
    """No gradient goes through m; strength * sum_l mean_n |g_l|_1 reaches every saliency above 0."""
    net, groups = small()
    method = FBS(predictor="normal", rho="one", strength=1.0)
    gates, state = gated(net, groups, method)
    x = images(1)
    F.cross_entropy(net(x), torch.tensor([1])).backward()
    last = gates["convs.2"]
    assert last.choice.mask is not None
    assert last.choice.saliencies is not None
    suppressed = last.choice.mask[0] == 0
    pulled = suppressed & (last.choice.saliencies[0] > 0)
    rows = last.predictor.weight.grad
    assert pulled.any()
    assert not rows[suppressed].any()
    assert not last.predictor.bias.grad[suppressed].any()
    assert rows[~suppressed].any()
    net.zero_grad()
    net(x)
    penalty = method.penalty(state)
    assert isinstance(penalty, Tensor)
    penalty.backward()
    assert last.predictor.weight.grad[pulled].any(dim=1).all()
    torch.testing.assert_close(last.predictor.bias.grad, (last.choice.saliencies[0] > 0).double())


def test_penalty_is_the_strength_times_the_sum_over_layers_of_the_mean_l1_of_saliencies() -> None:
    net, groups = small()
    method = FBS(predictor="kaiming", strength=0.25)
    state = method.prepare(net, groups, HALF)
    assert method.penalty(state) == 0.0, "before the first pass there is nothing"
    x = images()
    expected, before = 0.0, x
    with torch.no_grad():
        for gate, norm in zip(net.convs, net.norms, strict=True):
            expected += 0.25 * float(gate.saliencies(before).abs().sum()) / len(x)
            before = F.relu(norm(gate(before)))
        net(x)
        assert float(method.penalty(state)) == pytest.approx(expected, rel=1e-6)


def test_density_falls_from_1_by_a_step_every_few_epochs_and_the_last_one_stays() -> None:
    net, groups = small()
    method = FBS(epochs=2, last_epochs=3)
    state = method.prepare(net, groups, Budget(None, widths={"convs.0": 9, "convs.1": 12, "convs.2": 12}))
    assert state.densities == pytest.approx([1.0, 0.9, 0.8, 0.75])
    counts = [state.gates["convs.1"].active]
    for epoch in range(method.training(state)["epochs"]):
        method.epoch_end(state, epoch)
        counts.append(state.gates["convs.1"].active)
    assert counts == [16, 16, 15, 15, 13, 13, 12, 12, 12, 12]


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("shift", ["masked", "boosted"])
def test_training_meets_the_target_and_is_the_same_twice(shift: Any, toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    found = []
    for _ in range(2):
        net, groups = randomise(make()), make_groups()
        before = weights_of(net)
        task = toy_task(shape, 3 if shape[1] == 1 else 5)
        method = FBS(shift=shift, epochs=1, last_epochs=2)
        state = method.fit(net, groups, Budget(Target("macs", 0.6)), task)
        assert {path: gate.active for path, gate in state.gates.items()} == state.final
        assert len(task.history) == len(state.densities) + 1
        context = Context(net, task.images(batch_size=8), task.holdout(), state)
        result = method.plan(weights_of(net), groups, Budget(Target("macs", 0.6)), context)
        assert all(mask.all() for mask in result.keep.values())
        assert 0 < result.report["mean_macs"]["share"] <= 0.6
        assert result.report["share"] == {"macs": 1.0, "params": 1.0}, "static: nothing is removed"
        found.append(weights_of(net))
    changed = [name for name in before if name in found[0] and not np.array_equal(found[0][name], before[name])]
    assert "fc.weight" in changed
    assert all(np.array_equal(value, found[1][name]) for name, value in found[0].items())


def test_predictors_are_trained_and_norm_like_parameters_are_spared_from_weight_decay() -> None:
    """``bias`` is what the trainer does not decay: rho and beta are called so."""
    net, groups = small()
    FBS().rebuild(net, groups)
    names = [name for name, _ in net.named_parameters() if name.startswith("convs.0.")]
    assert names == ["convs.0.bias", "convs.0.conv.weight", "convs.0.predictor.weight", "convs.0.predictor.bias"]


@pytest.mark.parametrize("predictor", ["normal", "kaiming", "zero"])
def test_phi_starts_as_asked_for(predictor: Any) -> None:
    net, groups = small()
    state = FBS(predictor=predictor).prepare(net, groups, HALF)
    drawn = torch.cat([gate.predictor.weight.detach().flatten() for gate in state.gates.values()])
    expected = {"normal": 0.044, "kaiming": float(np.sqrt(2 / 14)), "zero": 0.0}[predictor]
    assert float(drawn.std()) == pytest.approx(expected, rel=0.25, abs=1e-12)
    assert predictor != "normal" or float(drawn.abs().max()) <= 0.1
    other = FBS(predictor=predictor, seed=1).prepare(*small(), HALF)
    assert (predictor == "zero") == bool(
        torch.equal(other.gates["convs.0"].predictor.weight, state.gates["convs.0"].predictor.weight)
    )


def test_rho_starts_as_the_norms_scale_or_one() -> None:
    net, groups = small()
    scale = net.get_parameter("norms.0.weight").abs().clone()
    assert torch.equal(FBS().prepare(net, groups, HALF).gates["convs.0"].predictor.bias, scale)
    ones = FBS(rho="one").prepare(*small(), HALF).gates["convs.0"].predictor.bias
    assert torch.equal(ones, torch.ones_like(ones))


# --- what is planned and reported -------------------------------------------------------------------------------------
def test_with_phi_0_there_is_one_mask_for_all_images_and_the_report_says_so() -> None:
    """It easily degenerates to a static mask; then the most frequent mask, frozen, changes nothing."""
    net, groups = small()
    method = FBS(predictor="zero")
    _, state = gated(net, groups, method)
    report = planned(net, groups, state, images(40), method)
    assert report["distinct_masks"] == {"convs.0": 1, "convs.1": 1, "convs.2": 1}
    assert report["mean_macs"]["deviation"] == 0.0
    assert report["holdout_top1"]["own_masks"] == report["holdout_top1"]["most_frequent_masks"]
    assert any("3 of 3 gates have one mask for all images" in text for text in report["warnings"])
    assert any("held-out ones is no lower" in text for text in report["warnings"])


def test_masks_that_differ_are_counted_and_the_most_frequent_one_is_frozen_for_the_comparison() -> None:
    net, groups = small()
    gates, state = gated(net, groups)
    x = images(40)
    with torch.no_grad():
        answers = net(x).argmax(1)
    seen = {path: gate.choice.mask.bool() for path, gate in gates.items() if gate.choice.mask is not None}
    context = Context(net, [(x, answers)], [(x, answers)], state)
    report = FBS().plan({}, groups, HALF, context).report
    for path, masks in seen.items():
        assert report["distinct_masks"][path] == len({tuple(row.tolist()) for row in masks})
    assert max(report["distinct_masks"].values()) > 3
    frozen = deepcopy(net)
    for path, gate in boosted_layers(frozen).items():
        rows = [tuple(row.tolist()) for row in seen[path]]
        gate.fixed = torch.tensor(max(sorted(set(rows)), key=rows.count))
    assert report["holdout_top1"] == {
        "own_masks": 1.0,
        "most_frequent_masks": measure(frozen, [(x, answers)]).top1,
        "images": 40,
    }
    assert report["holdout_top1"]["most_frequent_masks"] < 1.0
    assert all(gate.fixed is None for gate in gates.values()), "the network itself is left as it was"


def test_the_mean_is_called_a_mean_over_images_and_not_a_static_cost() -> None:
    net, groups = small()
    _, state = gated(net, groups)
    report = planned(net, groups, state, images())
    assert "mean over images" in report["mean_macs"]["what"]
    assert "no static cost" in report["mean_macs"]["what"]
    assert "removes nothing: every graph does all MACs" in report["warnings"][0]
    assert report["added_macs"] == 3 * 12 + 12 * 16 + 16 * 16


def test_no_more_images_are_measured_than_asked_for() -> None:
    net, groups = small()
    _, state = gated(net, groups)
    assert planned(net, groups, state, images(10), FBS(images=5))["mean_macs"]["images"] == 5


@pytest.mark.parametrize("toy", TOYS)
def test_scores_are_mean_boosts_and_permuting_filters_permutes_them_and_nothing_else(toy: str) -> None:
    """Gates made from permuted weights are permuted gates: the network computes the same, at the last density too."""
    make, make_groups, shape = TOYS[toy]
    groups, weights = make_groups(), weights_of(randomise(make()).double())
    moved = groups.prunable[0]
    order = np.random.default_rng(5).permutation(moved.size)
    x = torch.randn((6, *shape[1:])).double()
    method = FBS(predictor="zero")
    outputs, scores = [], []
    for own in (weights, permuted(weights, moved, order)):
        net = make().double().eval()
        net.load_state_dict({key: torch.from_numpy(value) for key, value in own.items()})
        _, state = gated(net, groups, method)
        outputs.append(net(x))
        scores.append(method.scores(own, groups, Context(net, batches(x), None, state)))
    torch.testing.assert_close(outputs[1], outputs[0])
    for group, score in scores[0].items():
        expected = score[order] if group == moved.id else score
        np.testing.assert_allclose(scores[1][group], expected, rtol=1e-9)
        assert score.mean() == pytest.approx(1.0)


def test_scores_of_a_chain_are_the_mean_of_m_g_by_its_average() -> None:
    net, groups = small()
    gates, state = gated(net, groups)
    x = images()
    net(x)
    gate = gates["convs.1"]
    assert gate.choice.saliencies is not None
    assert gate.choice.mask is not None
    boost = (gate.choice.saliencies * gate.choice.mask).detach().mean(0).numpy()
    found = FBS().scores({}, groups, Context(net, batches(x), None, state))
    np.testing.assert_allclose(found["convs.1"], boost / boost.mean(), rtol=1e-12)


# --- weights on disk --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("shift", ["masked", "boosted"])
def test_trained_weights_load_into_a_rebuilt_network_with_its_densities(shift: Any, toy: str, tmp_path: Any) -> None:
    make, make_groups, shape = TOYS[toy]
    net, x = randomise(make()), torch.randn(shape)
    method = FBS(shift=shift, predictor="kaiming")
    gated(net, make_groups(), method)
    save_weights(net.state_dict(), tmp_path / "weights.safetensors")
    again = randomise(make(), seed=9)
    method.rebuild(again, make_groups())
    assert list(again.state_dict()) == list(net.state_dict())
    load_weights(again, tmp_path / "weights.safetensors")
    assert torch.equal(again(x), net(x))
    counts = [gate.active for gate in boosted_layers(again).values()]
    assert counts == [gate.active for gate in boosted_layers(net).values()]
    assert all(gate.active < gate.conv.out_channels for gate in boosted_layers(again).values())


@pytest.mark.parametrize("count", [0, 13])
def test_weights_with_an_impossible_number_of_active_channels_are_refused(count: int) -> None:
    gate = gated(*small())[0]["convs.0"]
    with pytest.raises(InputError, match=f"{count} of 12 channels cannot be active"):
        gate.load_state_dict(gate.state_dict() | {"_extra_state": torch.tensor(count)})
