"""PAAM: attention among filters makes scores, in turn with the training of the network."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_groups import TOYS, Residual, narrowed, permuted, randomise, residual_groups

from methods.plain_digits import digits_task, plain_groups, top1_of, untrained
from methods.plain_digits import trained as trained_digits
from methods.test_table import toy_task
from prune2deploy.apply import weights_of
from prune2deploy.budget import Budget, Target, share
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.masks import widths
from prune2deploy.methods import paam
from prune2deploy.methods.base import Context, PruneResult
from prune2deploy.methods.gates import Gated, Trained, soft_share
from prune2deploy.methods.paam import PAAM, Attention, leaky_exponential, relaxed, rows_of
from prune2deploy.train import Processes, Progress, Task

SHORT = PAAM(epochs=3, anneal=0.7, gate_learning_rate=0.05, learning_rate=0.01, batch_size=8)
HALF = Budget(Target("macs", 0.5))


def noise(shape: tuple[int, ...] = (2, 3, 8, 8), classes: int = 5) -> Task:
    return toy_task(shape, classes)


def attention_of(net: nn.Module, groups: Groups, hidden: int = 8) -> Attention:
    weights = weights_of(net)
    rows = {group.id: rows_of(weights, group) for group in groups.prunable}
    return Attention(rows, groups, hidden=hidden, seed=0, dtype=next(net.parameters()).dtype)


def randomised(attention: Attention) -> Attention:
    """Give every parameter of the attention a random value, so that scores differ."""
    with torch.no_grad():
        for index, parameter in enumerate(attention.parameters):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return attention


def pruned(
    net: nn.Module, groups: Groups, budget: Budget, task: Task, method: PAAM = SHORT
) -> tuple[Trained, PruneResult]:
    state = method.fit(net, groups, budget, task)
    return state, method.plan(weights_of(net), groups, budget, Context(net, state=state))


@pytest.mark.parametrize("toy", TOYS)
def test_at_the_start_all_scores_are_one_and_the_gated_network_is_the_network_bit_for_bit(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups, x = randomise(make()), make_groups(), torch.randn(shape)
    scores = attention_of(net, groups).scores()
    assert all(torch.equal(one, torch.ones_like(one)) for one in scores.values())
    assert torch.equal(Gated(net, groups)(scores, x), net(x))


def test_scores_are_additive_attention_over_pairs_of_filters() -> None:
    """``z_i = mean_j v . tanh(F_i Q + a + F_j K) + b``, ``F`` in units of the filters' mean length."""
    net, groups = randomise(Residual()).double(), residual_groups()
    attention = randomised(attention_of(net, groups))
    scores = attention.scores()["conv1"].detach().numpy()
    query, shift, key, voice, last = (one.detach().numpy() for one in attention.parameters[5:])
    filters = weights_of(net)["conv1.weight"].reshape(8, -1)
    filters = filters / np.linalg.norm(filters, axis=1).mean()
    for i in range(8):
        z = np.mean([voice @ np.tanh(filters[i] @ query + shift + filters[j] @ key) for j in range(8)]) + last
        assert scores[i] == pytest.approx(math.exp(z) if z < 0 else 1 + 0.01 * z, rel=1e-9)


def test_layers_that_share_channels_count_alike_and_depthwise_ones_are_among_them() -> None:
    """All members' filters side by side, each in units of its own mean length."""
    weights = weights_of(randomise(Residual()).double())
    rows = rows_of(weights, residual_groups()["stem"])
    assert rows.shape == (6, 27 + 72)
    lengths = [np.linalg.norm(part, axis=1).mean() for part in (rows[:, :27], rows[:, 27:])]
    assert lengths[0] == pytest.approx(lengths[1])
    assert np.linalg.norm(rows, axis=1).mean() == pytest.approx(1.0)
    louder = {**weights, "conv2.weight": weights["conv2.weight"] * 100}
    np.testing.assert_allclose(rows_of(louder, residual_groups()["stem"]), rows)
    make, make_groups, _ = TOYS["mobile"]
    assert rows_of(weights_of(randomise(make())), make_groups()["expand"]).shape == (4, 2 * 9 + 2 * 9)


def test_reordered_filters_reorder_the_scores() -> None:
    """Permutation equivariance of ``s`` for any parameters of the attention."""
    net, groups = randomise(Residual()).double(), residual_groups()
    attention = randomised(attention_of(net, groups))
    before = attention.scores()
    order = np.random.default_rng(1).permutation(8)
    moved = permuted(weights_of(net), groups["conv1"], order)
    attention.look_at({"conv1": rows_of(moved, groups["conv1"]), "stem": rows_of(weights_of(net), groups["stem"])})
    after = attention.scores()
    torch.testing.assert_close(after["conv1"], before["conv1"][torch.from_numpy(order)], rtol=1e-12, atol=0)
    assert len(set(after["conv1"].tolist())) == 8
    assert torch.equal(after["stem"], before["stem"])


def test_reordered_inputs_reorder_the_first_weights() -> None:
    """Ours: queries and keys start along the filters' main directions."""
    net, groups = randomise(Residual()).double(), residual_groups()
    weights = weights_of(net)
    order = np.random.default_rng(1).permutation(6)
    moved = {**weights, "conv1.weight": weights["conv1.weight"][:, order]}
    rows = [{group.id: rows_of(one, group) for group in groups.prunable} for one in (weights, moved)]
    first, second = (Attention(one, groups, hidden=4, seed=0, dtype=torch.float64).parameters for one in rows)
    for index in (5, 7):
        expected = first[index].detach().reshape(6, 9, 4)[torch.from_numpy(order)].reshape(54, 4)
        torch.testing.assert_close(second[index].detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_leaky_exponential_rises_everywhere_is_one_at_zero_and_in_reach_below() -> None:
    """``LE' > 0`` on [-20, 20]; (0, 1] below 0; no jump."""
    z = torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    values = leaky_exponential(z)
    (slope,) = torch.autograd.grad(values.sum(), [z])
    assert (slope > 0).all()
    assert torch.isfinite(slope).all()
    assert float(leaky_exponential(torch.zeros(()))) == 1.0
    assert ((values > 0) & (values < 1))[z < 0].all()
    assert float(leaky_exponential(torch.tensor(-1e-9))) == pytest.approx(1.0)
    far = torch.tensor([200.0], requires_grad=True)
    leaky_exponential(far).sum().backward()
    assert far.grad is not None
    assert float(far.grad) == pytest.approx(0.01)  # not nan: the other branch does not overflow


@pytest.mark.parametrize("toy", TOYS)
def test_an_attention_phase_leaves_weights_and_norms_as_they_were_bit_for_bit(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()).train(), make_groups()
    before = weights_of(net)
    run = paam._Run(SHORT, net, groups, HALF, noise(shape, 3 if shape[1] == 1 else 5))
    start = run.attention.scores()
    run._train_attention(0, "macs", 0.5)
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(torch.equal(score, start[group]) for group, score in run.attention.scores().items())


@pytest.mark.parametrize(
    ("budget", "kind"),
    [(HALF, "macs"), (Budget(Target("params", 0.6)), "params"), (Budget(None, widths={"conv1": 3}), "macs")],
)
def test_the_loss_is_cross_entropy_and_the_hinge_on_the_share_of_the_epoch(budget: Budget, kind: Any) -> None:
    """``L = CE + strength * relu(R(S) - rho_t)``; at the first step ``R = 1`` and ``rho_t`` half way down."""
    net, groups = randomise(Residual()), residual_groups()
    told: list[Progress] = []
    task = replace(noise(), on_progress=told.append)
    ((images, labels),) = task.images(24, batch_size=24)
    entropy = float(F.cross_entropy(net(images), labels).detach())
    target = budget.target.share if budget.target else share(groups, "macs", {"stem": 6, "conv1": 3, "fc": 5})
    method = PAAM(epochs=2, anneal=1.0, batch_size=24, learning_rate=0.01, strength=3.0)
    state = method.fit(net, groups, budget, task)
    assert told[0].loss == pytest.approx(entropy + 3.0 * (1 - target) / 2, rel=1e-5)
    assert [one["share"] for one in state.report["choices"]] == pytest.approx([(1 + target) / 2, target])
    soft = {group: torch.from_numpy(score) for group, score in state.gates.items()}
    assert state.report["soft_share"][kind] == pytest.approx(float(soft_share(groups, kind, soft)), rel=1e-6)


@pytest.mark.parametrize("toy", TOYS)
def test_in_the_end_the_network_is_masked_as_planned_and_masked_is_removed(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()), make_groups()
    dense = copy.deepcopy(net)
    _, result = pruned(net, groups, HALF, noise(shape, 3 if shape[1] == 1 else 5))
    assert share(groups, "macs", widths(result.keep)) <= 0.5
    for group in groups.prunable:
        for part in group.of_role("filter", "bias", "scale", "shift"):
            values = np.moveaxis(weights_of(net)[part.parameter], part.axis, 0)
            assert not values[part.indices[~result.keep[group.id]]].any()
            assert values[part.indices[result.keep[group.id]]].any()
    x = torch.randn(shape)
    assert (net(x) - narrowed(net, groups, result.keep)(x)).abs().max() <= 1e-5
    assert not torch.equal(net(x), narrowed(dense, groups, result.keep)(x))  # trained
    assert result.weights == {}


def test_choices_are_made_in_the_annealing_alone_and_the_last_one_stays() -> None:
    """All channels during the warm-up, chosen anew during the annealing, fixed for the rest."""
    assert PAAM(epochs=24, start="scratch").schedule() == (6, 10)
    assert PAAM(epochs=24).schedule() == (0, 10)
    assert PAAM(epochs=1, start="scratch").schedule() == (0, 1)
    assert PAAM(epochs=2, start="scratch", warm_up=0.9, anneal=1.0).schedule() == (1, 1)
    assert PAAM(epochs=5, anneal=0.0).schedule() == (0, 1)
    net, groups, silent = randomise(Residual()), residual_groups(), []

    class Watched(Task):
        def train(self, module: nn.Module, **how: Any) -> Any:
            def after_epoch(result: Any) -> None:
                silent.append([(module.get_parameter(f"{name}.weight") == 0).tolist() for name in ("bn", "bn1")])
                how["after_epoch"](result)

            return super().train(module, **{**how, "after_epoch": after_epoch})

    task = noise()
    watched = Watched(**{name: getattr(task, name) for name in ("data", "mean", "std", "settings")})
    method = PAAM(epochs=8, start="scratch", anneal=0.25, gate_learning_rate=0.05, learning_rate=0.01, batch_size=8)
    state, _ = pruned(net, groups, HALF, watched, method)
    assert [one["epoch"] for one in state.report["choices"]] == [3, 4]
    assert not any(any(part) for part in (*silent[0], *silent[1]))
    assert any(any(part) for part in silent[2])
    assert all(one == silent[3] for one in silent[4:])


def test_of_several_processes_the_first_ones_scores_choose_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trains an attention of its own, and the masks are those of the scores that all agree on."""
    net, groups = randomise(Residual()), residual_groups()
    own: list[dict[str, np.ndarray]] = []

    def agreed(_: Processes, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        own.append(make())
        return {group: -scores for group, scores in own[-1].items()}

    monkeypatch.setattr(Processes, "agreed", agreed)
    state, result = pruned(net, groups, Budget(None, widths={"stem": 3, "conv1": 4}), noise())
    assert len(own) == 2
    for group in ("stem", "conv1"):
        assert np.array_equal(state.gates[group], -own[-1][group])
        assert state.gates[group][result.keep[group]].min() > state.gates[group][~result.keep[group]].max()
    silent = net.get_parameter("conv1.weight").detach().abs().sum(dim=(1, 2, 3)).numpy() == 0
    assert np.array_equal(~silent, result.keep["conv1"])


def test_the_budget_falls_on_a_line_and_ends_where_it_was_given() -> None:
    groups = residual_groups()
    halves = [relaxed(HALF, groups, progress).target for progress in (0.25, 0.5)]
    assert halves == [Target("macs", 0.875), Target("macs", 0.75)]
    assert relaxed(HALF, groups, 1.0) is HALF
    given = Budget(None, widths={"conv1": 3})
    assert [relaxed(given, groups, progress).widths for progress in (0.1, 0.5, 0.99)] == [
        {"conv1": 8},
        {"conv1": 6},
        {"conv1": 4},
    ]
    assert relaxed(given, groups, 1.0) is given


def test_given_widths_multiples_and_floors_are_kept() -> None:
    groups = residual_groups()
    _, exact = pruned(randomise(Residual()), groups, Budget(None, widths={"conv1": 3, "stem": 5}), noise())
    assert widths(exact.keep) == {"stem": 5, "conv1": 3, "fc": 5}
    rounded = Budget(Target("macs", 0.6), round_to=2, floors={"conv1": 6})
    _, result = pruned(randomise(Residual()), groups, rounded, noise())
    assert all(width % 2 == 0 for group, width in widths(result.keep).items() if group != "fc")
    assert result.keep["conv1"].sum() >= 6


def test_from_scratch_nothing_of_the_weights_is_left_and_the_seed_alone_counts() -> None:
    groups, found = residual_groups(), []
    for seed in (0, 1):
        net = randomise(Residual(), seed)
        state, _ = pruned(net, groups, HALF, noise(), replace(SHORT, start="scratch"))
        found.append((state.gates, weights_of(net)))
    assert all(np.array_equal(found[0][1][name], values) for name, values in found[1][1].items())
    assert all(np.array_equal(found[0][0][name], values) for name, values in found[1][0].items())
    other = randomise(Residual())
    pruned(other, groups, HALF, noise())
    assert not np.array_equal(weights_of(other)["stem.weight"], found[0][1]["stem.weight"])


def test_a_layer_that_cannot_be_drawn_anew_is_refused() -> None:
    net = randomise(Residual())
    net.register_module("scale", nn.ParameterList([nn.Parameter(torch.ones(1))]))
    with pytest.raises(InputError, match=r"cannot draw 'scale' \(ParameterList\) anew.*start=pretrained"):
        replace(SHORT, start="scratch").fit(net, residual_groups(), HALF, noise())


def test_it_is_refused_before_training_where_the_target_cannot_be_met() -> None:
    net = randomise(Residual())
    before = weights_of(net)
    with pytest.raises(InputError, match="cannot be met"):
        replace(SHORT, start="scratch").fit(net, residual_groups(), Budget(Target("macs", 0.001)), noise())
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())
    with pytest.raises(InputError, match="'paam' chooses by gates that it trains"):
        SHORT.plan(before, residual_groups(), HALF)


@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_half_the_digits_network_reads_nearly_as_well_as_the_whole(start: Any) -> None:
    """At half the MACs, ten epochs from trained weights, or sixteen from none."""
    groups, task = plain_groups(), digits_task()
    net = trained_digits() if start == "pretrained" else untrained()
    method = PAAM(start=start, epochs=10 if start == "pretrained" else 16)
    state, result = pruned(net, groups, HALF, task, method)
    assert share(groups, "macs", widths(result.keep)) <= 0.5
    assert state.report["soft_share"]["macs"] == pytest.approx(0.5, abs=0.1)
    assert top1_of(net) > 0.95
