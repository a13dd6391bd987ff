"""C-SGD: clusters whose members are pulled together at a rate that no data changes, and merges without loss."""

import copy
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.small import run
from onnx.reference import ReferenceEvaluator
from torch import nn
from toy_groups import (
    TOYS,
    Mobile,
    Residual,
    member,
    mobile_groups,
    narrowed,
    randomise,
    residual_groups,
    span,
    with_merged_readers,
)

from methods.test_table import toy_task
from prune2deploy.apply import ChannelMeans, MergeKeeper, set_weights, weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.errors import DeviceError, InputError
from prune2deploy.exporter import export_network
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.verify import verify
from prune2deploy.groups import COPIED_ROLES, Groups
from prune2deploy.masks import widths
from prune2deploy.methods.base import Context
from prune2deploy.methods.clusters import kmeans
from prune2deploy.methods.csgd import CSGD, State
from prune2deploy.networks import load_network
from prune2deploy.networks.cifar_resnet import resnet20

HALF = Budget(Target("macs", 0.5))
TAU, EPS, ETA = 0.05, 0.4, 0.02


def csgd(**options: Any) -> CSGD:
    return CSGD(**{"strength": EPS, "weight_decay": ETA, "learning_rate": TAU, "momentum": 0.0} | options)


def trained(
    method: CSGD, toy: str, steps: int, *, seed: int = 0, momentum: float = 0.0, nesterov: bool = False
) -> Iterator[tuple[nn.Module, Groups, State]]:
    """Train a toy of double precision on noise in a plain loop; yield before the first step and after every one."""
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()).double().train(), make_groups()
    state = method.prepare(net, groups, HALF)
    # The plain optimizer's own decay would come on top of the one in the gradient.
    optimizer = torch.optim.SGD(net.parameters(), lr=method.learning_rate, momentum=momentum, nesterov=nesterov)
    generator = torch.Generator().manual_seed(seed)
    yield net, groups, state
    for _ in range(steps):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.randint(3, (len(x),), generator=generator)).backward()
        method.after_backward(state)
        optimizer.step()
        yield net, groups, state


def differences(net: nn.Module, groups: Groups, state: State, *roles: str) -> np.ndarray:
    """Return the differences of all pairs in all clusters, in all parameters of these roles, one after the other."""
    weights, found = weights_of(net), []
    for group_id, kept in state.merges.items():
        first, second = np.nonzero(np.triu(kept[:, None] == kept, k=1))
        for part in groups[group_id].of_role(*roles):
            rows = np.moveaxis(weights[part.parameter], part.axis, 0)[part.indices]
            found.append((rows[first] - rows[second]).ravel())
    return np.concatenate(found)


VECTORS = ("bias", "scale", "shift")


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS)
def test_without_momentum_pairs_shrink_by_one_minus_tau_eta_plus_eps_whatever_the_data(toy: str) -> None:
    """d[t+1] = (1 - tau (eta + eps)) d[t] for filters, and (1 - tau factor eps) d[t] for vectors."""
    for seed in (0, 1):
        training = trained(csgd(vector_strength=0.1), toy, 6, seed=seed)
        net, groups, state = next(training)
        filters, vectors = (differences(net, groups, state, *roles) for roles in (("filter",), VECTORS))
        assert np.abs(filters).min() > 0
        assert np.abs(vectors).min() > 0
        for step, _ in enumerate(training, 1):
            expected = filters * (1 - TAU * (ETA + EPS)) ** step
            np.testing.assert_allclose(differences(net, groups, state, "filter"), expected, rtol=1e-6)
            expected = vectors * (1 - TAU * 0.1 * EPS) ** step
            np.testing.assert_allclose(differences(net, groups, state, *VECTORS), expected, rtol=1e-6)


def test_in_float32_the_rate_holds_to_a_millionth() -> None:
    """Ratio of all pairs together, of one step: 1 - tau (eta + eps) to 1e-6."""
    net, groups = randomise(Residual()).train(), residual_groups()
    method = csgd()
    state = method.prepare(net, groups, HALF)
    before = np.linalg.norm(differences(net, groups, state, "filter").astype(np.float64))
    F.cross_entropy(net(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    method.after_backward(state)
    torch.optim.SGD(net.parameters(), lr=TAU).step()
    after = np.linalg.norm(differences(net, groups, state, "filter").astype(np.float64))
    assert after / before == pytest.approx(1 - TAU * (ETA + EPS), rel=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_with_momentum_pairs_follow_the_scalar_recursion(nesterov: bool) -> None:
    """v <- mu v + lambda d, d <- d - tau v (Nesterov: d - tau (lambda d + mu v)), lambda = eta + eps; 200 steps."""
    mu, rate = 0.9, 0.04 + 0.001
    method = csgd(strength=0.04, weight_decay=0.001)
    training = trained(method, "residual", 200, momentum=mu, nesterov=nesterov)
    net, groups, state = next(training)
    start = differences(net, groups, state, "filter")
    d, v = 1.0, 0.0
    for _ in training:
        v = mu * v + rate * d
        d -= TAU * (rate * d + mu * v if nesterov else v)
        np.testing.assert_allclose(differences(net, groups, state, "filter"), start * d, rtol=1e-6, atol=1e-12)
    assert abs(d) < 0.1


@pytest.mark.parametrize("toy", TOYS)
def test_the_gradient_is_the_matrix_form(toy: str) -> None:
    """G <- M G + D W with M = 1/|H| inside a cluster and D = (eta + eps) I - eps M, every place of a channel apart."""
    make, make_groups, _ = TOYS[toy]
    net, groups = randomise(make()).double(), make_groups()
    method = csgd(vector_strength=0.5)
    state = method.prepare(net, groups, HALF)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    given = {name: parameter.grad.numpy().copy() for name, parameter in net.named_parameters()}
    method.after_backward(state)
    seen = set()
    for group_id, kept in state.merges.items():
        same = (kept[:, None] == kept).astype(np.float64)
        mean = same / same.sum(axis=1, keepdims=True)
        for part in groups[group_id].of_role("filter", *VECTORS):
            eta, eps = (ETA, EPS) if part.role == "filter" else (0.0, 0.5 * EPS)
            decay = (eta + eps) * np.eye(len(kept)) - eps * mean
            weight, gradient = net.get_parameter(part.parameter).detach().numpy(), given[part.parameter]
            for place in part.indices.T:
                rows, steps = weight[place].reshape(len(kept), -1), gradient[place].reshape(len(kept), -1)
                got = net.get_parameter(part.parameter).grad.numpy()[place].reshape(len(kept), -1)
                np.testing.assert_allclose(got, mean @ steps + decay @ rows, rtol=1e-12, atol=1e-13)
            seen.add(part.parameter)
    for name, parameter in net.named_parameters():
        assert (name in seen) != np.array_equal(parameter.grad.numpy(), given[name])
    assert set(method.training(state)["no_decay"]) == seen, "the optimizer's decay would come twice"
    assert method.training(state)["weight_decay"] == ETA


def test_the_shared_trainer_does_not_decay_what_the_gradient_decays() -> None:
    """Without a loss the sum over a cluster shrinks by eta alone, since the pull has no sum; vectors keep theirs."""
    net, groups, task = randomise(Residual()), residual_groups(), toy_task((1, 3, 8, 8), 5)
    before = weights_of(net)
    method = csgd(epochs=1, batch_size=24)
    state = method.prepare(net, groups, HALF)
    task.train(
        net,
        **method.training(state) | {"loss": lambda *_: sum(0 * p.sum() for p in net.parameters())},
        after_backward=lambda: method.after_backward(state),
    )
    shrunk = 1 - task.history[0].lr * ETA
    after = weights_of(net)
    for name in ("fc.weight", "stem.weight", "conv1.weight", "conv2.weight"):
        assert after[name].sum() == pytest.approx(shrunk * before[name].sum(), rel=1e-5)
    for name in ("bn.weight", "bn2.bias", "fc.bias"):
        assert after[name].sum() == pytest.approx(before[name].sum(), rel=1e-5)
    assert not np.allclose(after["stem.weight"], shrunk * before["stem.weight"]), "they were pulled"


# --- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [HALF, Budget(Target("params", 0.7), round_to=2, floors={"conv1": 6})])
def test_there_are_as_many_clusters_as_the_budget_has_channels(budget: Budget) -> None:
    groups = residual_groups()
    state = CSGD().prepare(randomise(Residual()), groups, budget)
    wanted = budget.common_widths(groups)
    assert {group: len(np.unique(kept)) for group, kept in state.merges.items()} == {
        group.id: wanted[group.id] for group in groups.prunable if wanted[group.id] < group.size
    }
    for kept in state.merges.values():
        assert np.array_equal(kept[kept], kept)


def test_widths_that_are_given_are_the_numbers_of_clusters_and_nothing_else_is_touched() -> None:
    net, groups = randomise(Residual()), residual_groups()
    state = CSGD().prepare(net, groups, Budget(None, widths={"conv1": 3}))
    assert state.merges.keys() == {"conv1"}
    assert len(np.unique(state.merges["conv1"])) == 3
    assert {part.name for part in state.parts} == {"conv1.weight", "bn1.weight", "bn1.bias"}


def planted(clusters: int, members: int, spread: float) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.standard_normal((clusters, 27))
    return np.repeat(centres, members, axis=0) + spread * random.standard_normal((clusters * members, 27))


def test_planted_clusters_are_found_and_move_with_their_filters() -> None:
    filters = planted(6, 4, 0.02)
    assert (kmeans(filters, 6).reshape(6, 4) == kmeans(filters, 6)[::4, None]).all()
    spread = planted(5, 6, 1.0)
    order = np.random.default_rng(1).permutation(30)
    same = np.equal.outer(kmeans(spread, 7), kmeans(spread, 7))
    moved = np.equal.outer(kmeans(spread[order], 7), kmeans(spread[order], 7))
    assert np.array_equal(moved, same[np.ix_(order, order)])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
def test_filters_that_are_equal_stay_together_unless_there_are_too_few_others(count: int) -> None:
    filters = planted(3, 4, 0.0)
    labels = kmeans(filters, count)
    assert np.array_equal(np.unique(labels), np.arange(count))
    if count <= 3:
        assert (labels.reshape(3, 4) == labels[::4, None]).all()
    else:
        for label in range(count):
            assert np.ptp(filters[labels == label], axis=0).max() == 0


def test_a_second_round_keeps_together_what_the_first_has_merged() -> None:
    net, groups = randomise(Residual()), residual_groups()
    first = CSGD().prepare(net, groups, Budget(Target("macs", 0.8))).merges
    MergeKeeper(net, groups, first).after_step()
    second = CSGD().prepare(net, groups, Budget(Target("macs", 0.3))).merges
    for group, kept in first.items():
        assert len(np.unique(second[group])) < len(np.unique(kept))
        assert np.array_equal(second[group][kept], second[group])


def test_the_first_layer_of_a_group_leads_and_the_others_follow() -> None:
    net, groups = randomise(Residual()), residual_groups()
    before = CSGD().prepare(net, groups, HALF).merges
    with torch.no_grad():
        net.conv2.weight.normal_()
    assert all(np.array_equal(kept, before[group]) for group, kept in CSGD().prepare(net, groups, HALF).merges.items())
    with torch.no_grad():
        net.stem.weight.normal_()
    assert not np.array_equal(CSGD().prepare(net, groups, HALF).merges["stem"], before["stem"])
    mobile = CSGD().prepare(randomise(Mobile()), mobile_groups(), HALF)
    assert {"depthwise.weight", "bn_depthwise.weight", "grouped.bias"} <= {part.name for part in mobile.parts}


def test_even_clusters_are_neighbours() -> None:
    merges = CSGD(clusters="even").prepare(randomise(Residual()), residual_groups(), HALF).merges
    for kept in merges.values():
        labels = np.unique(kept, return_inverse=True)[1]
        blocks = [block.tolist() for block in np.array_split(np.arange(len(kept)), len(np.unique(kept)))]
        assert [np.flatnonzero(np.equal(labels, labels[block[0]])).tolist() for block in blocks] == blocks


def test_the_inner_scope_leaves_the_output_of_a_stage_whole() -> None:
    groups = residual_groups()
    state = CSGD(scope="inner").prepare(randomise(Residual()), groups, Budget(Target("macs", 0.7)))
    assert state.merges.keys() == {"conv1"}
    with pytest.raises(
        InputError, match="'stem' cannot be given 3 channels: it cannot be pruned, since 2 layers make it"
    ):
        CSGD(scope="inner").prepare(randomise(Residual()), groups, Budget(None, widths={"stem": 3}))


def test_channels_that_meet_constants_that_cannot_be_trained_are_not_merged() -> None:
    groups = residual_groups()
    gain = member("gain", "constant", span(0, 8), axis=1)
    inner = replace(groups["conv1"], members=(*groups["conv1"].members, gain))
    with_gain = replace(groups, groups=(groups["stem"], inner, groups["fc"]))
    assert CSGD().prepare(randomise(Residual()), with_gain, Budget(Target("macs", 0.7))).merges.keys() == {"stem"}
    net = randomise(Residual())
    net.gain = nn.Parameter(torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1))
    state = CSGD().prepare(net, with_gain, Budget(Target("macs", 0.7)))
    assert state.merges.keys() == {"stem", "conv1"}
    assert "gain" in {part.name for part in state.parts}


# --- merging ----------------------------------------------------------------------------------------------------------


def duplicated(net: nn.Module, groups: Groups, budget: Budget = HALF) -> tuple[nn.Module, State]:
    """Give all channels of a cluster the same values, exactly."""
    state = CSGD().prepare(net, groups, budget)
    MergeKeeper(net, groups, state.merges).after_step()
    return net.eval(), state


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "mobile": (Mobile, (2, 1, 6, 6)),
    "zero-padded shortcuts": (resnet20, (2, 3, 8, 8)),
    "biased, projected": (lambda: load_network("resnet8", num_classes=10).module, (2, 3, 16, 16)),
}


@pytest.mark.parametrize(
    "name", [name if name in TOYS else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_planted_duplicates_are_merged_by_the_graph_without_loss(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            randomise(part)
    groups = find_groups(export_network(net, (torch.zeros(shape),), fuse=False).model)
    net, state = duplicated(net, groups)
    result = CSGD().plan(weights_of(net), groups, HALF, Context(state=state))
    assert result.report["deviation"] <= 1e-7
    set_weights(net, result.weights)
    masked = export_network(net, (torch.zeros(shape),), fuse=True).model
    slimmed = remove_dead_channels(masked)
    verify(masked.SerializeToString(), slimmed.model.SerializeToString())
    kept = widths(result.keep)
    assert slimmed.report()["macs"] == {
        "before": groups.cost.macs(groups.full_widths()),
        "after": groups.cost.macs(kept),
    }
    arrays = {tensor.name: tensor.dims for tensor in slimmed.model.graph.initializer}
    for layer in groups.layers:
        if layer.weight in arrays and layer.op_type == "Conv":
            assert arrays[layer.weight][0] == layer.out_width.at(kept), layer.name
    x = torch.randn(shape)
    (got,) = run(slimmed.model, {"input": x.numpy()}).values()
    expected = net(x).detach().numpy()
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("toy", TOYS)
def test_in_double_precision_a_merge_loses_nothing_to_1e14(toy: str) -> None:
    """By the graph, and by adding up the readers' columns as a person would do it."""
    make, make_groups, shape = TOYS[toy]
    net, state = duplicated(randomise(make()).double(), make_groups())
    x = torch.randn(shape, dtype=torch.float64)
    dense = net(x).detach()
    scale = dense.abs().max()
    masked = export_network(net, (x,), fuse=False).model
    slimmed = remove_dead_channels(masked)
    assert slimmed.removed_channels > 0
    expected, got = (ReferenceEvaluator(model).run(None, {"input": x.numpy()})[0] for model in (masked, slimmed.model))
    assert got.dtype == np.float64
    assert np.abs(got - expected).max() <= 1e-14 * np.abs(expected).max()
    # A norm's epsilon is float32 in every graph: 1e-5 is off by 2.5e-13.
    assert np.abs(got - dense.numpy()).max() <= 1e-11 * scale
    masks = {group.id: np.ones(group.size, dtype=np.bool_) for group in make_groups().groups}
    masks |= {group: kept == np.arange(len(kept)) for group, kept in state.merges.items()}
    small = narrowed(with_merged_readers(net, make_groups(), state.merges), make_groups(), masks)
    assert (small(x) - dense).abs().max() <= 1e-14 * scale
    assert (narrowed(net, make_groups(), masks)(x) - dense).abs().max() > 1e-3, "the readers have to add up"


@pytest.mark.parametrize("toy", TOYS)
def test_what_is_merged_is_the_mean_in_the_same_bits_everywhere_and_the_rest_is_untouched(toy: str) -> None:
    make, make_groups, _ = TOYS[toy]
    net, groups = randomise(make()), make_groups()
    before = weights_of(net)
    method = CSGD(merge="anyway")
    state = method.prepare(net, groups, HALF)
    result = method.plan(before, groups, HALF, Context(state=state))
    assert result.report["merged_before_convergence"]
    assert result.report["deviation"] > 0.1
    assert result.keep.keys() == groups.full_widths().keys()
    named = set()
    for group_id, kept in result.merges.items():
        assert np.array_equal(result.keep[group_id], kept == np.arange(len(kept)))
        assert result.silent[group_id].all()
        for part in groups[group_id].of_role(*COPIED_ROLES):
            new, old = (
                np.moveaxis(weights[part.parameter], part.axis, 0)[part.indices] for weights in (result.weights, before)
            )
            assert new.dtype == old.dtype
            for channel, stays in enumerate(kept):
                assert new[channel].tobytes() == new[stays].tobytes()
                np.testing.assert_allclose(new[channel], old[kept == stays].mean(axis=0), rtol=1e-5, atol=1e-6)
            named.add(part.parameter)
    assert result.weights.keys() == named


def test_a_merge_of_single_channels_is_the_identity() -> None:
    """Clusters of one filter: no group is merged, no weight changes, and the gradient is plain decayed SGD's."""
    net, groups = randomise(Residual()), residual_groups()
    budget = Budget(None, widths={"stem": 6, "conv1": 8})
    state = CSGD().prepare(net, groups, budget)
    result = CSGD().plan(weights_of(net), groups, budget, Context(state=state))
    assert result.merges == {}
    assert result.weights == {}
    assert all(mask.all() for mask in result.keep.values())
    assert state.parts == []
    before = weights_of(net)
    alone = {"stem": np.arange(6), "conv1": np.arange(8)}
    MergeKeeper(net, groups, alone).after_step()
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())
    gradient = torch.randn(8, 3, 3)
    assert torch.equal(ChannelMeans(np.arange(8), 0, gradient)(gradient), gradient)


# --- convergence ------------------------------------------------------------------------------------------------------


def refusal(method: CSGD, net: nn.Module, groups: Groups, state: State) -> str:
    with pytest.raises(InputError) as caught:
        method.plan(weights_of(net), groups, HALF, Context(state=state))
    return str(caught.value)


def test_before_convergence_it_refuses_with_the_largest_deviation_and_the_steps_that_are_missing() -> None:
    """ln(dev / tol) / -ln(1 - tau eps), with eps + eta for filters and 0.1 eps for the vectors."""
    method = csgd()
    for net, groups, state in trained(method, "residual", 3):
        last = net, groups, state
    text = refusal(method, *last)
    assert text.startswith("method 'csgd' has not converged: '")
    parameter, group, deviation, steps = re.search(
        r"'(\S+)' of group '(\S+)' deviates by (\S+) in .* about ([\d,]+) more steps", text
    ).groups()
    found = {}
    weights = weights_of(net)
    for group_id, kept in state.merges.items():
        for part in groups[group_id].of_role(*COPIED_ROLES):
            rows = np.moveaxis(weights[part.parameter], part.axis, 0).reshape(len(kept), -1)
            means = np.stack([rows[kept == stays].mean(axis=0) for stays in kept])
            unit = np.linalg.norm(means, axis=1)
            if part.role not in ("filter", "var"):
                unit = np.maximum(unit, np.sqrt((rows**2).sum(axis=1).mean()))
            found[part.parameter, group_id] = (np.linalg.norm(rows - means, axis=1) / unit).max(), part.role
    assert (parameter, group) == max(found, key=lambda key: found[key][0])
    assert float(deviation) == pytest.approx(found[parameter, group][0], rel=0.06)
    pulls = {"filter": TAU * (EPS + ETA), **dict.fromkeys(VECTORS, TAU * 0.1 * EPS)}
    rates = {role: -np.log1p(-pull) for role, pull in pulls.items()}
    wanted = max(np.log(value / 1e-5) / rates[role] for value, role in found.values() if role in rates)
    assert int(steps.replace(",", "")) == np.ceil(wanted)


@pytest.mark.parametrize(("rate", "strength"), [(3e-2, 3e-3), (5e-2, 5e-2), (0.1, 0.1), (0.1, 5.0)])
def test_the_steps_that_are_predicted_with_momentum_are_those_of_the_recursion(rate: float, strength: float) -> None:
    """v <- mu v + eps d, d <- d - tau (eps d + mu v) to 1e-6; ln(1e6) (1 - mu) / (tau eps) where that is slow."""
    method = CSGD(strength=strength, learning_rate=rate, weight_decay=0.0, tolerance=1e-6)
    d, v, last = 1.0, 0.0, 0
    for step in range(1, 20_000):
        v = 0.9 * v + strength * d
        d -= rate * (strength * d + 0.9 * v)
        last = step if abs(d) >= 1e-6 else last
    predicted = method._missing("filter", 1.0)
    assert predicted == pytest.approx(last, rel=0.15)
    linear = np.log(1e6) * 0.1 / (rate * strength)
    if rate * strength < 1e-3:
        assert predicted == pytest.approx(linear, rel=0.01)
    elif rate * strength > 5e-3:
        assert predicted > linear
    assert method._missing("filter", 1.0, scheduled=True) > predicted


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_after_the_steps_that_were_missing_it_has_converged(momentum: float) -> None:
    method = csgd(strength=0.2, weight_decay=0.0, vector_strength=1.0, momentum=momentum, tolerance=1e-4)
    training = trained(method, "residual", 3000, momentum=momentum, nesterov=momentum > 0)
    net, groups, state = next(training)
    (steps,) = re.findall(r"about ([\d,]+) more steps", refusal(method, net, groups, state))
    missing = int(steps.replace(",", ""))
    for _ in range(missing // 2):
        next(training)
    assert "more steps" in refusal(method, net, groups, state)
    for _ in range(missing - missing // 2 + 100):  # the running statistics come last
        next(training)
    result = method.plan(weights_of(net), groups, HALF, Context(state=state))
    assert result.report["deviation"] < 1e-4
    assert not result.report["merged_before_convergence"]
    assert result.report["steps"] == missing + 100


def test_a_deviation_of_the_running_statistics_alone_is_refused() -> None:
    net, groups = randomise(Residual()), residual_groups()
    net, state = duplicated(net, groups)
    CSGD().plan(weights_of(net), groups, HALF, Context(state=state))
    for name, index in (("bn1.running_mean", 1.0), ("bn1.running_var", 0.5), ("bn1.bias", 1.0), ("conv1.weight", 1.0)):
        changed = copy.deepcopy(net)
        member_of = np.flatnonzero(np.bincount(state.merges["conv1"], minlength=8)[state.merges["conv1"]] > 1)[0]
        with torch.no_grad():
            changed.state_dict()[name][member_of] += 1e-3 * index
        assert f"'{name}' of group 'conv1'" in refusal(CSGD(), changed, groups, state)


def test_it_refuses_what_cannot_end_well_before_it_trains() -> None:
    net, groups, task = randomise(Residual()), residual_groups(), toy_task((1, 3, 8, 8), 5)
    before = weights_of(net)
    with pytest.raises(InputError, match=r"would not converge: its 600 epochs are 600 steps, .* give --option epochs="):
        CSGD().fit(net, groups, HALF, task)
    with pytest.raises(InputError, match="beyond their mean"):
        CSGD(strength=50.0).fit(net, groups, HALF, task)
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())
    net.stem.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"has to train 'stem\.weight', which is frozen"):
        CSGD().prepare(net, groups, HALF)


def test_groups_cannot_compete() -> None:
    """The clusters are made for the common widths before training; it says so in place of ranking otherwise."""
    net, groups = randomise(Residual()), residual_groups()
    with pytest.raises(
        InputError, match="'csgd' clusters every group by itself; leave ranking = \"global\" out"
    ) as raised:
        CSGD().prepare(net, groups, Budget(Target("macs", 0.5), ranking="global"))
    assert "\n" not in str(raised.value)
    even = CSGD().prepare(net, groups, Budget(Target("macs", 0.5), ranking="uniform"))
    asked = CSGD().prepare(net, groups, Budget(Target("macs", 0.5)))
    assert {group: kept.tolist() for group, kept in even.merges.items()} == {
        group: kept.tolist() for group, kept in asked.merges.items()
    }


def test_it_plans_only_what_it_was_trained_for() -> None:
    net, groups = randomise(Residual()), residual_groups()
    for call in (lambda: CSGD().plan(weights_of(net), groups, HALF), lambda: CSGD().scores(weights_of(net), groups)):
        with pytest.raises(InputError, match="train with it first"):
            call()
    net, state = duplicated(net, groups)
    with pytest.raises(InputError, match="another budget"):
        CSGD().plan(weights_of(net), groups, Budget(Target("macs", 0.6)), Context(state=state))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(DeviceError, match=r"scikit-learn is not installed.*prune2deploy\[torch\]"):
        kmeans(planted(3, 2, 0.1), 2)
