"""Gates where channels are read: what they do to a network, what they cost, and what training them leaves alone."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_groups import (
    TOYS,
    Mobile,
    Residual,
    conv_layer,
    counted_macs,
    filters,
    masks_of,
    mobile_groups,
    narrowed,
    of,
    permuted,
    random_masks,
    randomise,
    reader,
    residual_groups,
    span,
)

from methods.test_table import toy_task
from prune2deploy.apply import apply_masks, set_weights, weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.cost import Cost, Term, Width
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
from prune2deploy.methods.base import Context
from prune2deploy.methods.gates import (
    Gated,
    Silence,
    aim,
    as_arrays,
    filters_of,
    folded,
    main_directions,
    soft_share,
    train_gates,
    trained,
    warn_if_fallen,
)


def random_gates(groups: Groups, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        group.id: torch.rand(group.size, generator=generator, dtype=torch.float64) * 1.2 for group in groups.prunable
    }


def hard(masks: dict[str, np.ndarray], groups: Groups) -> dict[str, Tensor]:
    return {group.id: torch.from_numpy(masks[group.id]).double() for group in groups.prunable}


def behind_activations(net: nn.Module, at: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the logits with what layers take in multiplied, channel by channel: gates as a person would put them."""
    handles = []
    for name, gate in at.items():

        def multiply(_: nn.Module, inputs: tuple[Tensor], gate: Tensor = gate) -> tuple[Tensor]:
            return (inputs[0] * (gate[:, None, None] if inputs[0].ndim == 4 else gate),)

        handles.append(net.get_submodule(name).register_forward_pre_hook(multiply))
    logits: Tensor = net(x)
    for handle in handles:
        handle.remove()
    return logits


def test_gates_multiply_a_shared_channel_in_front_of_all_its_readers_but_not_in_the_sum() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    gates, x = random_gates(groups), torch.randn(3, 3, 8, 8).double()
    expected = behind_activations(net, {"conv1": gates["stem"], "fc": gates["stem"], "conv2": gates["conv1"]}, x)
    torch.testing.assert_close(Gated(net, groups)(gates, x), expected, rtol=1e-12, atol=1e-12)


def test_gates_reach_every_place_of_a_channel_behind_depthwise_in_blocks_and_flattened() -> None:
    net, groups = randomise(Mobile()).double(), mobile_groups()
    gates, x = random_gates(groups), torch.randn(3, 1, 6, 6).double()
    at = {"grouped": gates["expand"].repeat(2), "fc": gates["grouped"].repeat(2).repeat_interleave(16)}
    torch.testing.assert_close(Gated(net, groups)(gates, x), behind_activations(net, at, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("toy", TOYS)
def test_gates_of_one_change_no_bit(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups, x = randomise(make()), make_groups(), torch.randn(shape)
    ones = {group.id: torch.ones(group.size) for group in groups.prunable}
    assert torch.equal(Gated(net, groups)(ones, x), net(x))
    assert torch.equal(Gated(net, groups)({}, x), net(x))


@pytest.mark.parametrize("toy", TOYS)
def test_folding_gates_into_the_readers_leaves_the_logits_as_they_were(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups, x = randomise(make()).double(), make_groups(), torch.randn(shape).double()
    gates = random_gates(groups)
    gated = Gated(net, groups)(gates, x)
    new = folded(weights_of(net), groups, as_arrays(gates))
    assert set(new) == {part.parameter for group in groups.prunable for part in group.of_role("reader")}
    set_weights(net, new)
    torch.testing.assert_close(net(x), gated, rtol=1e-12, atol=1e-12)
    single = folded(weights_of(copy.deepcopy(net).float()), groups, as_arrays(gates))
    assert all(values.dtype == np.float32 for values in single.values())


@pytest.mark.parametrize("toy", TOYS)
def test_a_gate_of_zero_is_a_mask_is_removal_behind_activations_that_keep_zero(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    for seed in range(5):
        net, groups, x = randomise(make()).double(), make_groups(), torch.randn(shape).double()
        masks = random_masks(groups, seed)
        gated = Gated(net, groups)(hard(masks, groups), x)
        torch.testing.assert_close(gated, narrowed(net, groups, masks)(x), rtol=1e-12, atol=1e-12)
        apply_masks(net, groups, masks)
        torch.testing.assert_close(gated, net(x), rtol=1e-12, atol=1e-12)


class Sigmoids(nn.Module):
    """conv - sigmoid - conv: a silent channel is 0.5 there."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).sigmoid()).mean((2, 3))


def sigmoid_groups() -> Groups:
    members = (*filters("one", span(0, 4)), reader("two", span(0, 4)))
    layers = (conv_layer("one", of(one=1), Width(1)), conv_layer("two", Width(2), of(one=1)))
    return Groups((Group("one", 4, members, ("Sigmoid",)),), layers, Cost((), ()))


def test_behind_a_sigmoid_a_gate_of_zero_shows_zero_where_a_mask_shows_a_half() -> None:
    net, groups, x = randomise(Sigmoids()).double(), sigmoid_groups(), torch.randn(2, 1, 3, 3).double()
    masks = masks_of(groups, {"one": [1, 3]})
    gated = Gated(net, groups)(hard(masks, groups), x)
    constant = 0.5 * net.get_parameter("two.weight")[:, [1, 3], 0, 0].sum(1)
    apply_masks(net, groups, masks)
    torch.testing.assert_close(net(x) - gated, constant.expand(2, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("toy", TOYS)
def test_the_cost_at_gates_of_zero_and_one_is_that_of_the_removed_network_exactly(toy: str) -> None:
    """``F(g) = cost(sum of g)``, as integers, against a count by hooks."""
    make, make_groups, shape = TOYS[toy]
    net, groups, x = randomise(make()), make_groups(), torch.randn(1, *shape[1:])
    dense = counted_macs(net, x)
    for seed in range(8):
        masks = random_masks(groups, seed)
        counted = counted_macs(narrowed(net, groups, masks), x)
        assert float(soft_share(groups, "macs", hard(masks, groups))) == counted / dense


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_derivative_by_a_gate_is_what_removing_its_channel_saves(kind: Any, toy: str) -> None:
    """``F(g) - F(g without i) = dF/dg_i`` where no layer has one group on both sides."""
    groups = TOYS[toy][1]()
    gates = {group: gate.clamp(max=1).requires_grad_(True) for group, gate in random_gates(groups).items()}
    cost = soft_share(groups, kind, gates)
    derivatives = torch.autograd.grad(cost, list(gates.values()))
    for (group, gate), derivative in zip(gates.items(), derivatives, strict=True):
        for channel in range(len(gate)):
            at = {name: one.detach().clone() for name, one in gates.items()}
            costs = {}
            for value in (0.0, 1.0, float(gate[channel].detach())):
                at[group][channel] = value
                costs[value] = float(soft_share(groups, kind, at))
            saved = float(derivative[channel])
            assert costs[1.0] - costs[0.0] == pytest.approx(saved, rel=1e-9)
            assert costs[value] - costs[0.0] == pytest.approx(saved * value, rel=1e-9)


def test_a_layer_with_one_group_on_both_sides_saves_less_than_the_derivative_says() -> None:
    """``c^2 - (c - 1)^2 = 2 c - 1``, not ``2 c``: the exception that the rule above names."""
    width = of(one=1)
    groups = Groups(
        (Group("one", 4, tuple(filters("one", span(0, 4))), ()),), (), Cost((Term("l", 1, (width,) * 2),), ())
    )
    gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    cost = soft_share(groups, "macs", {"one": gate})
    (derivative,) = torch.autograd.grad(cost, [gate])
    assert derivative[0] == 8 / 16
    without = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert cost - soft_share(groups, "macs", {"one": without}) == 7 / 16


def test_gates_above_one_cost_no_more_than_the_channel() -> None:
    groups = residual_groups()
    above = {group.id: torch.full((group.size,), 1.5) for group in groups.prunable}
    assert float(soft_share(groups, "macs", above)) == 1.0


def trainable(groups: Groups) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    gates = {group.id: torch.ones(group.size, requires_grad=True) for group in groups.prunable}
    return gates, torch.optim.Adam(gates.values(), lr=0.1)


@pytest.mark.parametrize("toy", TOYS)
def test_training_gates_changes_nothing_else_and_only_they_get_gradients(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups, task = randomise(make()).train(), make_groups(), toy_task(shape, 3 if shape[1] == 1 else 5)
    net.get_submodule("fc").eval()
    before, modes = weights_of(net), [part.training for part in net.modules()]
    (gates, optimizer), told = trainable(groups), []
    noted = copy.copy(task)
    object.__setattr__(noted, "on_progress", told.append)
    for epoch in (1, 2):
        gated = Gated(net, groups)
        how = {"batch_size": 8, "epoch": epoch, "epochs": 2}
        train_gates(gated, noted, optimizer, lambda: gates, lambda made: soft_share(groups, "macs", made), **how)
    after = weights_of(net)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(gate.grad is not None and not torch.equal(gate, torch.ones_like(gate)) for gate in gates.values())
    assert [part.training for part in net.modules()] == modes
    assert [(one.epoch, one.step, one.steps) for one in told] == [(e, s, 3) for e in (1, 2) for s in (1, 2, 3)]


def test_epochs_go_through_the_images_in_orders_of_their_own() -> None:
    net, groups, task = randomise(Residual()), residual_groups(), toy_task((2, 3, 8, 8), 5)
    seen = []

    class Watched(Gated):
        def __call__(self, gates: Any, images: Tensor) -> Tensor:
            seen.append(images.sum().item())
            return super().__call__(gates, images)

    gates, optimizer = trainable(groups)
    for epoch in (1, 2, 1):
        how = {"batch_size": 1, "epoch": epoch, "epochs": 2}
        train_gates(Watched(net, groups), task, optimizer, lambda: gates, lambda _: torch.zeros(()), **how)
    assert seen[:24] == seen[48:] != seen[24:48]
    assert sorted(seen[:24]) == sorted(seen[24:48])


def test_a_loss_that_is_not_a_number_is_refused_and_changes_no_gate() -> None:
    net, groups, task = randomise(Residual()), residual_groups(), toy_task((2, 3, 8, 8), 5)
    with torch.no_grad():
        net.get_parameter("fc.bias").fill_(float("nan"))
    gates, optimizer = trainable(groups)
    with pytest.raises(InputError, match=r"the loss became nan in epoch 2, step 1; use a lower gate_learning_rate"):
        train_gates(
            *(Gated(net, groups), task, optimizer, lambda: gates, lambda _: torch.zeros(())),
            **{"batch_size": 8, "epoch": 2, "epochs": 3},
        )
    assert all(torch.equal(gate, torch.ones_like(gate)) for gate in gates.values())


def test_a_network_of_too_few_classes_is_refused() -> None:
    net, groups, task = randomise(Residual()), residual_groups(), toy_task((2, 3, 8, 8), 7)
    gates, optimizer = trainable(groups)
    with pytest.raises(InputError, match="the network has 5 classes, but the data has 7"):
        train_gates(
            *(Gated(net, groups), task, optimizer, lambda: gates, lambda _: torch.zeros(())),
            **{"batch_size": 8, "epoch": 1, "epochs": 1},
        )


def test_gates_are_driven_to_the_target_or_to_the_cost_of_the_widths() -> None:
    groups = residual_groups()
    assert aim(groups, Budget(Target("params", 0.4))) == ("params", 0.4)
    cost = groups.cost.macs
    expected = cost({"stem": 6, "conv1": 4, "fc": 5}) / cost(groups.full_widths())
    assert aim(groups, Budget(None, widths={"conv1": 4})) == ("macs", expected)
    with pytest.raises(InputError, match=r"target macs=0.001 cannot be met"):
        aim(groups, Budget(Target("macs", 0.001)))
    with pytest.raises(InputError, match="group 'conv9' cannot be given 4 channels"):
        aim(groups, Budget(None, widths={"conv9": 4}))


@pytest.mark.parametrize("toy", TOYS)
def test_a_lifted_mask_gives_removed_channels_back_and_leaves_what_the_others_learned(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()), make_groups()
    masks, before = random_masks(groups, 2), weights_of(net)
    assert not all(mask.all() for mask in masks.values())
    silence = Silence(net, groups, masks)
    masked = weights_of(net)
    apply_masks(net, groups, masks)
    assert all(np.array_equal(values, masked[name]) for name, values in weights_of(net).items())
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    silence()
    x = torch.randn(shape)
    assert (net.eval()(x) - narrowed(net, groups, masks)(x)).abs().max() <= 1e-3 * net(x).abs().max()
    silence.lift()
    lifted = weights_of(net)
    own = {"filter", "bias", "scale", "shift", "mean", "var"}
    for group in groups.groups:
        for part in group.of_role(*own):
            values, old = (np.moveaxis(one[part.parameter], part.axis, 0) for one in (lifted, before))
            gone, stayed = part.indices[~masks[group.id]].ravel(), part.indices[masks[group.id]].ravel()
            assert np.array_equal(values[gone], old[gone])
            np.testing.assert_array_equal(values[stayed], (torch.from_numpy(old[stayed]) + 1).numpy())


@pytest.mark.parametrize("toy", TOYS)
def test_main_directions_go_with_the_input_channels_and_do_not_see_the_order_of_filters(toy: str) -> None:
    groups, weights = TOYS[toy][1](), weights_of(randomise(TOYS[toy][0]()).double())
    generator = np.random.default_rng(1)
    for moved in groups.prunable:
        other = permuted(weights, moved, generator.permutation(moved.size))
        for group in groups.prunable:
            for taps in (False, True):
                rows, after = (np.concatenate(filters_of(w, group, taps=taps), axis=1) for w in (weights, other))
                products = np.sort(rows @ main_directions(rows), axis=0)
                np.testing.assert_allclose(np.sort(after @ main_directions(after), axis=0), products, atol=1e-9)


def test_directions_that_filters_do_not_have_are_zero() -> None:
    rows = np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 0.0, 2.0])
    directions = main_directions(rows)
    np.testing.assert_allclose(directions, np.outer([1, 2, 0, 2], [1 / 3, 0, 0]), atol=1e-12)
    assert not main_directions(np.zeros((3, 4))).any()


def test_tap_means_and_taps_of_filters() -> None:
    groups, weights = residual_groups(), weights_of(randomise(Residual()))
    means = filters_of(weights, groups["stem"], taps=False)
    assert [part.shape for part in means] == [(6, 3), (6, 8)]
    np.testing.assert_allclose(means[0], weights["stem.weight"].astype(np.float64).mean((2, 3)))
    assert [part.shape for part in filters_of(weights, groups["stem"], taps=True)] == [(6, 27), (6, 72)]


def test_without_training_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(InputError, match=r"method 'dagger' chooses by gates that it trains.*call fit"):
        trained(Context(), "dagger")


def test_groups_of_another_network_are_refused() -> None:
    with pytest.raises(InputError, match=r"no weight 'conv1.weight'"):
        Gated(randomise(Mobile()), residual_groups())


def test_gates_that_fell_far_below_what_was_asked_for_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_fallen("dagger", 0.3, 0.5)
    assert not caplog.records
    warn_if_fallen("dagger", 0.2, 0.5)
    assert "dagger: the gates fell to 20.0 % of the cost, where 50.0 % were asked for" in caplog.text
