"""Dagger: gates that a module makes of the weights, and what is left of them as masks."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_groups import TOYS, Residual, counted_macs, narrowed, randomise, residual_groups

from methods.plain_digits import digits_task, finetuned, plain_groups, random_at, top1_of
from methods.plain_digits import trained as trained_digits
from methods.test_table import toy_task
from prune2deploy.apply import apply_masks, set_weights, weights_of
from prune2deploy.budget import Budget, Target, share
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.masks import widths
from prune2deploy.methods.base import Context, PruneResult
from prune2deploy.methods.dagger import Dagger, GateModule, features_of
from prune2deploy.methods.gates import Gated, Trained, as_arrays, folded, soft_share
from prune2deploy.train import Progress, Task, measure

SHORT = Dagger(epochs=2, gate_learning_rate=0.05, batch_size=8)
HALF = Budget(Target("macs", 0.5))


def noise(shape: tuple[int, ...] = (2, 3, 8, 8), classes: int = 5) -> Task:
    return toy_task(shape, classes)


def pruned(
    net: nn.Module, groups: Groups, budget: Budget, task: Task, method: Dagger = SHORT
) -> tuple[Trained, PruneResult]:
    state = method.fit(net, groups, budget, task)
    context = Context(net, task.images(), task.holdout(), state)
    return state, method.plan(weights_of(net), groups, budget, context)


def test_the_gate_is_a_sigmoid_of_one_hidden_layer_over_standardised_tap_means() -> None:
    """``f = (mean over taps - mean of rows) / std``; ``g = sigmoid(relu(f U1 + u1) U2 + u2)``."""
    weights, groups = weights_of(randomise(Residual()).double()), residual_groups()
    module = GateModule(weights, groups, hidden=4, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    of_layer = {}
    for name in ("stem", "conv1", "conv2"):
        means = weights[f"{name}.weight"].mean((2, 3))
        of_layer[name] = (means - means.mean(0)) / (means - means.mean(0)).std()
    features = {"stem": np.concatenate([of_layer["stem"], of_layer["conv2"]], axis=1), "conv1": of_layer["conv1"]}
    for number, (group, own) in enumerate(features.items()):
        into, shift, out, last = (one.detach().numpy() for one in module.parameters[4 * number : 4 * number + 4])
        logits = np.maximum(own @ into + shift, 0) @ out + last
        np.testing.assert_allclose(module.gates()[group].detach().numpy(), 1 / (1 + np.exp(-logits[:, 0])), rtol=1e-9)


def test_gates_start_nearly_open_and_all_alike() -> None:
    module = GateModule(weights_of(randomise(Residual())), residual_groups(), hidden=8, seed=0, dtype=torch.float64)
    for gate in module.gates().values():
        np.testing.assert_allclose(gate.detach().numpy(), 1 / (1 + np.exp(-3.0)), rtol=1e-12)


def test_depthwise_filters_are_among_the_features_of_what_they_pass_on() -> None:
    make, make_groups, _ = TOYS["mobile"]
    features, _ = features_of(weights_of(randomise(make())), make_groups()["expand"])
    assert features.shape == (4, 4)  # two places of a channel, in two layers, one input each


def test_filters_that_look_alike_get_equal_gates() -> None:
    """The module sees nothing but weights."""
    net, groups = randomise(Residual()), residual_groups()
    with torch.no_grad():
        net.get_parameter("conv1.weight")[5] = net.get_parameter("conv1.weight")[2]
    gates = SHORT.fit(net, groups, HALF, noise()).gates["conv1"]
    assert gates[5] == gates[2]
    assert len(np.unique(gates)) == 7


@pytest.mark.parametrize("toy", TOYS)
def test_the_network_reads_by_the_same_gates_whatever_the_images(toy: str) -> None:
    """Data-agnostic: two batches meet the same weights in every reader, those with the gates multiplied in."""
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()), make_groups()
    module = GateModule(weights_of(net), groups, hidden=8, seed=0, dtype=torch.float32)
    met: dict[str, list[np.ndarray]] = {}

    def note(name: str, owner: nn.Module) -> None:
        met.setdefault(f"{name}.weight", []).append(owner.state_dict(keep_vars=True)["weight"].detach().numpy().copy())

    readers = {member.layer for group in groups.prunable for member in group.of_role("reader")}
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        for name in readers:
            net.get_submodule(name).register_forward_pre_hook(lambda owner, _, name=name: note(name, owner))
        logits = [Gated(net, groups)(module.gates(), torch.randn(shape)) for _ in range(2)]
    assert not torch.equal(*logits)
    expected = folded(weights_of(net), groups, as_arrays(module.gates()))
    assert met.keys() == expected.keys()
    for name, (first, second) in met.items():
        assert np.array_equal(first, second)
        np.testing.assert_allclose(first, expected[name], rtol=1e-6)
        assert not np.allclose(first, weights_of(net)[name])


@pytest.mark.parametrize("toy", TOYS)
def test_training_the_gates_leaves_the_network_as_it_was_bit_for_bit(toy: str) -> None:
    """Frozen weights, norms in eval mode; only the module's parameters get gradients."""
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()).train(), make_groups()
    before = weights_of(net)
    state, _ = pruned(net, groups, HALF, noise(shape, 3 if shape[1] == 1 else 5))
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert net.training
    assert all(((gate > 0) & (gate < 1)).all() for gate in state.gates.values())


def first_loss(budget: Budget, method: Dagger) -> float:
    told: list[Progress] = []
    task = replace(noise(), on_progress=told.append)
    method.fit(randomise(Residual()), residual_groups(), budget, task)
    return told[0].loss


WIDTHS = {"conv1": 3}
AIMED = share(residual_groups(), "macs", {"stem": 6, "conv1": 3, "fc": 5})


@pytest.mark.parametrize(
    ("budget", "kind", "target"),
    [
        (HALF, "macs", 0.5),
        (Budget(Target("params", 0.7)), "params", 0.7),
        (Budget(Target("macs", 0.99)), "macs", 0.99),
        (Budget(None, widths=WIDTHS), "macs", AIMED),
    ],
)
def test_the_loss_is_cross_entropy_and_the_hinge_on_the_cost(budget: Budget, kind: Any, target: float) -> None:
    """``L = CE + strength * relu(F(g) / F_full - target) / (1 - target)``."""
    net, groups, task = randomise(Residual()), residual_groups(), noise()
    start = GateModule(weights_of(net), groups, hidden=32, seed=0, dtype=torch.float32).gates()
    ((images, labels),) = task.images(24, batch_size=24)
    entropy = float(F.cross_entropy(Gated(net, groups)(start, images), labels).detach())
    cost = float(soft_share(groups, kind, start).detach())
    assert (cost > target) == (target != 0.99)
    expected = entropy + 3 * max(0.0, cost - target) / (1 - target)
    assert first_loss(budget, Dagger(epochs=1, strength=3.0, batch_size=24)) == pytest.approx(expected, rel=1e-5)


def test_given_widths_are_kept_exactly() -> None:
    net, groups, task = randomise(Residual()), residual_groups(), noise()
    budget = Budget(None, widths={"conv1": 3, "stem": 6})
    state, result = pruned(net, groups, budget, task)
    assert widths(result.keep) == {"stem": 6, "conv1": 3, "fc": 5}
    assert result.keep["conv1"].tolist() == (state.gates["conv1"] >= np.sort(state.gates["conv1"])[-3]).tolist()


def test_the_largest_gates_of_all_groups_stay_and_the_target_is_met() -> None:
    net, groups, task = randomise(Residual()), residual_groups(), noise()
    state, result = pruned(net, groups, HALF, task)
    kept = np.concatenate([state.gates[group][result.keep[group]] for group in state.gates])
    gone = np.concatenate([state.gates[group][~result.keep[group]] for group in state.gates])
    assert np.median(kept) > np.median(gone)
    assert result.report["ranking"] == "global"
    assert counted_macs(narrowed(net, groups, result.keep), torch.randn(1, 3, 8, 8)) == groups.cost.macs(
        widths(result.keep)
    )
    assert result.report["share"]["macs"] <= 0.5


def test_both_costs_and_both_accuracies_are_reported() -> None:
    """The gap between gates and masks."""
    net, groups, task = randomise(Residual()), residual_groups(), noise()
    state, result = pruned(net, groups, HALF, task)
    soft = folded(weights_of(net), groups, state.gates)
    copied = copy.deepcopy(net)
    set_weights(copied, soft)
    assert result.report["soft_top1"] == measure(copied, task.holdout()).top1
    apply_masks(copied, groups, result.keep)
    assert result.report["hard_top1"] == measure(copied, task.holdout()).top1
    assert result.report["dense_top1"] == measure(net, task.holdout()).top1
    gates = {group: torch.from_numpy(gate) for group, gate in state.gates.items()}
    for kind in ("macs", "params"):
        assert result.report["soft_share"][kind] == pytest.approx(float(soft_share(groups, kind, gates)), rel=1e-6)
        assert result.report["soft_share"][kind] != result.report["share"][kind]
    assert len(result.report["losses"]) == 2
    assert Dagger().plan(weights_of(net), groups, HALF, Context(state=state)).report["hard_top1"] is None


def test_folded_gates_are_those_of_the_gated_network_and_without_fold_the_weights_stay() -> None:
    """Folding is exact; where nothing is removed nothing is folded."""
    net, groups, task = randomise(Residual()), residual_groups(), noise()
    state, result = pruned(net, groups, HALF, task)
    x = torch.randn(4, 3, 8, 8)
    gates = {group: torch.from_numpy(gate).float() for group, gate in state.gates.items()}
    gated = Gated(net, groups)(gates, x)
    copied = copy.deepcopy(net)
    set_weights(copied, result.weights)
    torch.testing.assert_close(copied(x), gated, rtol=1e-5, atol=1e-5)
    context = Context(state=state)
    assert replace(SHORT, fold=False).plan(weights_of(net), groups, HALF, context).weights == {}
    assert SHORT.plan(weights_of(net), groups, Budget(None, widths={}), context).weights == {}


def test_the_order_of_channels_does_not_matter_to_the_first_weights() -> None:
    """Ours: the module starts along the filters' main directions."""
    net, groups = randomise(Residual()).double(), residual_groups()
    weights = weights_of(net)
    order = np.random.default_rng(1).permutation(6)
    moved = {**weights, "conv1.weight": weights["conv1.weight"][:, order]}
    drawn = [GateModule(one, groups, hidden=8, seed=0, dtype=torch.float64).parameters[4] for one in (weights, moved)]
    np.testing.assert_allclose(drawn[1].detach().numpy(), drawn[0].detach().numpy()[order], atol=1e-12)
    other = GateModule(weights, groups, hidden=8, seed=1, dtype=torch.float64).parameters[4]
    assert not torch.equal(drawn[0], other)


def test_it_is_refused_before_training_where_the_target_cannot_be_met() -> None:
    with pytest.raises(InputError, match="cannot be met"):
        SHORT.fit(randomise(Residual()), residual_groups(), Budget(Target("macs", 0.001)), noise())
    with pytest.raises(InputError, match="'dagger' chooses by gates that it trains"):
        SHORT.plan(weights_of(randomise(Residual())), residual_groups(), HALF)


def test_half_the_digits_network_chosen_by_gates_beats_random_channels_of_the_same_widths() -> None:
    """A trained network at half its MACs, without fine-tuning and after two epochs of it."""
    net, groups, task = trained_digits(), plain_groups(), digits_task()
    state, result = pruned(net, groups, HALF, task, Dagger(epochs=8))
    assert share(groups, "macs", widths(result.keep)) <= 0.5
    assert state.report["soft_share"]["macs"] == pytest.approx(0.5, abs=0.05)
    assert state.report["soft_top1"] >= 0.95
    at_random = max(finetuned(net, random_at(result.keep, seed), epochs=0) for seed in range(3))
    set_weights(net, result.weights)
    hard = finetuned(net, result.keep, epochs=0)
    assert hard > at_random + 0.1
    assert hard < state.report["soft_top1"]  # the gap between gates and masks
    assert finetuned(net, result.keep) > 0.9
    assert top1_of(net) > 0.9  # gated, not masked


def test_gates_that_close_for_the_loss_alone_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """An untrained network's loss is best with all gates closed."""
    state = SHORT.fit(randomise(Residual()), residual_groups(), HALF, noise())
    fell = state.report["soft_share"]["macs"] < 0.25
    assert ("the gates fell" in caplog.text) == fell
    replace(SHORT, epochs=30).fit(randomise(Residual()), residual_groups(), HALF, noise())
    assert "dagger: the gates fell" in caplog.text


def test_arrays_of_gates_are_float64() -> None:
    arrays = as_arrays({"a": torch.ones(3, requires_grad=True)})
    assert arrays["a"].dtype == np.float64
