"""AdaPruner: widths from scales, checked on a grid; the criterion that wins, planted."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_groups import Mobile, Residual, mobile_groups, norm_members, of, randomise, reader, residual_groups, span

from methods.test_table import toy_task
from prune2deploy.apply import apply_masks, set_weights, weights_of
from prune2deploy.budget import Budget, Target, share
from prune2deploy.cost import Cost, Term, Width
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups, Layer, Member
from prune2deploy.masks import widths
from prune2deploy.methods import adapruner
from prune2deploy.methods.adapruner import CRITERIA, AdaPruner
from prune2deploy.methods.base import Context, PruneResult
from prune2deploy.methods.line import PRECISION, Line, bisected
from prune2deploy.methods.random import Random
from prune2deploy.train import measure

Batch = tuple[Tensor, Tensor]
HALF = Budget(Target("macs", 0.5))


def noise(shape: tuple[int, ...] = (8, 3, 8, 8), classes: int = 5, count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(shape, generator=generator), torch.randint(classes, shape[:1], generator=generator))
        for _ in range(count)
    ]


def planned(method: AdaPruner, net: nn.Module, groups: Groups, budget: Budget = HALF) -> PruneResult:
    data = noise() if isinstance(net, Residual) else noise((8, 1, 6, 6), 3)
    return method.plan(weights_of(net), groups, budget, Context(net, data, data))


def line_of(net: nn.Module, groups: Groups, budget: Budget = HALF, least: float = 0.1) -> Line:
    scores = AdaPruner(scope="all").scores(weights_of(net), groups)
    return Line.of({group: float(score.mean()) for group, score in scores.items()}, groups, budget, least)


# --- the widths -------------------------------------------------------------------------------------------------------


def test_the_importance_of_a_group_is_the_mean_size_of_its_scales() -> None:
    """``I_b = mean |gamma_c|``; the norms of several layers that make a group count alike."""
    net, groups = randomise(Residual()), residual_groups()
    report = planned(AdaPruner(scope="all"), net, groups).report
    scale = {name: np.abs(weights_of(net)[f"{name}.weight"].astype(np.float64)) for name in ("bn", "bn1", "bn2")}
    assert report["importance"]["conv1"] == pytest.approx(scale["bn1"].mean())
    assert report["importance"]["stem"] == pytest.approx((scale["bn"].mean() + scale["bn2"].mean()) / 2)


def test_a_width_is_the_clipped_share_of_t_rounded() -> None:
    """``n_b(t) = max(1, round(clip(t * I_b / max I, r_min, 1) * C_b))`` on a grid of t."""
    net, groups = randomise(Residual()), residual_groups()
    importance = {group: s.mean() for group, s in AdaPruner(scope="all").scores(weights_of(net), groups).items()}
    line = line_of(net, groups, least=0.3)
    for t in np.linspace(0, line.end, 57):
        for group, width in line.at(float(t)).items():
            size = groups[group].size
            kept = np.clip(t * importance[group] / max(importance.values()), 0.3, 1) * size
            assert width == max(1, np.floor(kept + 0.5)), (t, group)
    assert line.at(line.end) == {group.id: group.size for group in groups.prunable}


@pytest.mark.parametrize("seed", range(4))
def test_the_cost_never_falls_as_t_grows(seed: int) -> None:
    """``cost(n(t))`` is monotone on a grid: what lets bisection find t*."""
    groups = residual_groups()
    line = line_of(randomise(Residual(), seed), groups)
    costs = [groups.cost.macs(groups.full_widths() | line.at(float(t))) for t in np.linspace(0, line.end, 400)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_the_t_that_is_found_meets_the_target_and_a_step_more_does_not(seed: int, target: float) -> None:
    """``t* = the largest t with cost(n(t)) <= B``."""
    groups, budget = residual_groups(), Budget(Target("macs", target))
    line = line_of(randomise(Residual(), seed), groups, budget)
    t = bisected(line, groups, budget)
    assert share(groups, "macs", groups.full_widths() | line.at(t)) <= target
    more = line.at(t * (1 + 2 * PRECISION))
    assert share(groups, "macs", groups.full_widths() | more) > target


@pytest.mark.parametrize("seed", range(4))
def test_the_widths_are_those_of_t_and_no_group_could_be_given_one_channel_more(seed: int) -> None:
    """Budget: from below, within one channel."""
    net, groups = randomise(Residual(), seed), residual_groups()
    result = planned(AdaPruner(scope="all"), net, groups)
    found, at_t = widths(result.keep), line_of(net, groups).at(result.report["t"])
    assert all(found[group] >= width for group, width in at_t.items())
    assert share(groups, "macs", found) <= 0.5
    for group in groups.prunable:
        if found[group.id] < group.size:
            assert share(groups, "macs", found | {group.id: found[group.id] + 1}) > 0.5


def test_bisection_finds_t_however_little_a_group_matters() -> None:
    groups, budget = residual_groups(), Budget(Target("macs", 0.4))
    line = Line.of({"stem": 1.0, "conv1": 1e-12}, groups, budget, 0.1)
    t = bisected(line, groups, budget)
    assert share(groups, "macs", groups.full_widths() | line.at(t)) <= 0.4
    assert share(groups, "macs", groups.full_widths() | line.at(t * (1 + 2 * PRECISION))) > 0.4
    dead = Line.of({"stem": 0.0, "conv1": 0.0}, groups, budget, 0.1)
    assert dead.slopes == {"stem": 1.0, "conv1": 1.0}


def test_widths_depend_on_the_scales_alone() -> None:
    """Scaling W leaves n_b; scaling a norm does not."""
    net, groups = randomise(Residual()), residual_groups()
    before = widths(planned(AdaPruner(scope="all"), net, groups).keep)
    with torch.no_grad():
        net.get_parameter("conv1.weight").mul_(50)
        net.get_parameter("stem.weight").mul_(0.01)
    assert widths(planned(AdaPruner(scope="all"), net, groups).keep) == before
    with torch.no_grad():
        net.get_parameter("bn1.weight").mul_(5)
    assert widths(planned(AdaPruner(scope="all"), net, groups).keep)["conv1"] > before["conv1"]


def test_a_rescaled_network_computes_the_same_and_gets_other_widths() -> None:
    """The pitfall: ``gamma, beta -> c gamma, c beta`` and ``W_next -> W_next / c`` is exact behind a ReLU.

    So scales of a network that was not trained with the penalty can be moved at will, and the report warns of that.
    """
    net, groups = randomise(Residual()).double(), residual_groups()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before, dense = planned(AdaPruner(scope="all"), net.float(), groups), net.double()(x)
    with torch.no_grad():
        for name in ("bn1.weight", "bn1.bias"):
            net.get_parameter(name).mul_(8)
        net.get_parameter("conv2.weight").div_(8)
    torch.testing.assert_close(net(x), dense)
    after = planned(AdaPruner(scope="all"), net.float(), groups)
    assert after.report["importance"]["conv1"] == pytest.approx(8 * before.report["importance"]["conv1"])
    assert widths(after.keep)["conv1"] > widths(before.keep)["conv1"]
    assert "nothing was trained with the penalty" in after.report["warnings"][0]


def test_rounding_floors_and_given_widths_are_kept() -> None:
    net, groups = randomise(Residual(8, 16)), residual_groups(8, 16)
    method = AdaPruner(scope="all")
    rounded = planned(method, net, groups, Budget(Target("macs", 0.6), round_to=4))
    assert all(width % 4 == 0 for width in widths({g.id: rounded.keep[g.id] for g in groups.prunable}).values())
    assert rounded.report["share"]["macs"] <= 0.6
    floored = planned(method, net, groups, Budget(Target("macs", 0.6), floors={"stem": 7}))
    assert widths(floored.keep)["stem"] >= 7
    assert floored.report["share"]["macs"] <= 0.6
    given = planned(AdaPruner(), net, groups, Budget(None, widths={"stem": 3, "conv1": 11}))
    assert (widths(given.keep)["stem"], widths(given.keep)["conv1"]) == (3, 11)
    assert given.report["t"] is None


def test_a_ranking_that_the_user_gives_decides_the_widths() -> None:
    net, groups = randomise(Residual()), residual_groups()
    even = planned(AdaPruner(scope="all"), net, groups, Budget(Target("macs", 0.5), ranking="uniform"))
    assert widths(even.keep) == Budget(Target("macs", 0.5)).common_widths(groups)
    assert even.report["ranking"] == "uniform"


def test_the_output_of_a_stage_stays_whole_in_the_papers_scope() -> None:
    net, groups = randomise(Residual()), residual_groups()
    result = planned(AdaPruner(), net, groups, Budget(Target("macs", 0.6)))
    assert result.keep["stem"].all()
    assert not result.keep["conv1"].all()
    assert result.report["not_scored"] == ["stem"]


def test_a_target_that_its_own_floor_forbids_is_refused_with_the_option_that_helps() -> None:
    net, groups = randomise(Residual()), residual_groups()
    with pytest.raises(InputError, match=r"cannot be met.*; or lower --option least=0.5; or give --option scope=all"):
        planned(AdaPruner(least=0.5), net, groups, Budget(Target("macs", 0.3)))
    with pytest.raises(InputError, match=r"cannot be met.*raise the target$"):
        planned(AdaPruner(least=0.0, scope="all"), net, groups, Budget(Target("macs", 0.001)))


# --- the criterion ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """What tells the useful channels from the harmful ones: scale, shift, and filters."""

    useful: tuple[float, float]
    harmful: tuple[float, float]
    filters: str = "small"


PLANTS = {
    "bn": Plant((0.1, 1.0), (1.0, 0.0)),  # always on, barely moving: only the expected activation is larger
    "scale": Plant((1.0, -0.5), (0.5, 1.0)),
    "l1": Plant((0.1, 0.0), (1.0, 0.0), "dense"),
    "l2": Plant((0.1, 0.0), (1.0, 0.0), "sparse"),
    "fpgm": Plant((0.1, 0.0), (1.0, 0.0), "apart"),
    "random": Plant((0.1, 0.0), (1.0, 0.0)),
}
SIZE, KEPT, PIXELS = 12, 6, 25


def useful_channels(winner: str) -> np.ndarray:
    """Return which channels are useful, int64 [6]: those that chance takes, or those that it leaves."""
    order = np.argsort(-Random(seed=0).scores({}, planted_groups())["conv"], kind="stable")
    return order[:KEPT] if winner == "random" else order[KEPT:]


def planted_filters(kind: str, useful: np.ndarray) -> np.ndarray:
    """Return filters [12, 25] on pixel 0, which tells the class, pixels 1 to 8 of noise, and silent ones from 9 on."""
    harmful = np.setdiff1d(np.arange(SIZE), useful)
    filters = np.zeros((SIZE, PIXELS))
    own, dense = np.arange(KEPT), slice(9, 17)
    if kind == "small":
        filters[useful, 0], filters[harmful, 1 + own] = 0.1, 1.0
    elif kind == "dense":  # L1 2.7 against 2, L2 0.9 against 2
        filters[useful, 0], filters[harmful, 1 + own] = 0.3, 2.0
        filters[useful, dense] = 0.3
    elif kind == "sparse":  # the other way round, and the useful ones are all alike
        filters[useful, 0], filters[harmful, 1 + own] = 1.5, 0.3
        filters[harmful, dense] = 0.3
    else:  # small, but no two alike, while the harmful ones all are
        filters[useful, 0], filters[useful, 9 + own], filters[harmful, 1] = 0.3, 0.3, 2.0
    return filters


class Planted(nn.Module):
    """conv 1x1 - norm - relu - linear on [B, 25, 1, 1]; two classes, by the sign of pixel 0."""

    def __init__(self, winner: str) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(PIXELS, SIZE, 1, bias=False), nn.BatchNorm2d(SIZE), nn.Linear(SIZE, 2)
        plant, useful = PLANTS[winner], useful_channels(winner)
        is_useful = np.isin(np.arange(SIZE), useful)
        scale, shift = (np.where(is_useful, plant.useful[place], plant.harmful[place]) for place in (0, 1))
        # Each useful channel is a vote for class 1, to be held against the bias; a harmful one outvotes them all.
        signs = np.where(np.arange(SIZE) % 2, 1.0, -1.0)
        low, high = (max(plant.useful[0] * z + plant.useful[1], 0) for z in (-1, 1))
        with torch.no_grad():
            for tensor, values in (
                (self.conv.weight, planted_filters(plant.filters, useful)[:, :, None, None]),
                (self.bn.weight, scale),
                (self.bn.bias, shift),
                (self.fc.weight, np.stack([0 * scale, np.where(is_useful, 1.0, 20 * signs) / scale])),
                (self.fc.bias, np.array([KEPT * (low + high) / 2 / plant.useful[0], 0.0])),
            ):
                tensor.copy_(torch.from_numpy(np.asarray(values)))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).flatten(1))


def planted_groups() -> Groups:
    every, conv = span(0, SIZE), of(conv=1)
    members = (Member("conv.weight", 0, "filter", every, "conv"), *norm_members("bn", every), reader("fc", every))
    layers = (
        Layer("conv", "Conv", weight="conv.weight", norm="bn", out_width=conv, in_width=Width(PIXELS)),
        Layer("bn", "BatchNormalization", weight="bn.weight", out_width=conv, in_width=conv),
        Layer("fc", "Gemm", weight="fc.weight", out_width=Width(2), in_width=conv),
    )
    terms = (Term("conv", PIXELS, (conv,)), Term("fc", 2, (conv,)))
    return Groups((Group("conv", SIZE, members, ("Relu",)),), layers, Cost(terms, terms))


def signs_of_pixel_0(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(11)
    found = []
    for _ in range(count):
        labels = torch.randint(2, (64,), generator=generator)
        pixels = torch.randn((64, PIXELS, 1, 1), generator=generator)
        pixels[:, 0, 0, 0] = 2.0 * labels - 1 + 0.1 * pixels[:, 0, 0, 0]
        pixels[:, 9:] = 0
        found.append((pixels, labels))
    return found


@pytest.mark.parametrize("winner", CRITERIA)
def test_the_criterion_that_alone_finds_the_useful_channels_wins(winner: str) -> None:
    """``omega* = argmax Acc_val(BNrecal(subnet(n(t*), top by omega)))``, where all others choose a broken set."""
    net, groups, data = Planted(winner), planted_groups(), signs_of_pixel_0()
    before = weights_of(net)
    result = AdaPruner().plan(weights_of(net), groups, HALF, Context(net, data[:2], data[2:]))
    accuracy = result.report["holdout_top1"]
    assert np.flatnonzero(result.keep["conv"]).tolist() == sorted(useful_channels(winner).tolist())
    assert result.report["criterion"] == winner
    assert accuracy[winner] >= 0.95
    assert max(accuracy[name] for name in CRITERIA if name != winner) <= 0.8
    assert all(np.array_equal(values, before[name]) for name, values in weights_of(net).items())


def test_norms_are_measured_anew_before_a_criterion_is_judged() -> None:
    """Without that the accuracy is about chance, whatever was chosen: here statistics are far off."""
    net, groups, data = Planted("l1"), planted_groups(), signs_of_pixel_0()
    with torch.no_grad():
        net.bn.running_mean.fill_(30.0)
    result = AdaPruner().plan(weights_of(net), groups, HALF, Context(net, data[:2], data[2:]))
    assert result.report["holdout_top1"]["l1"] >= 0.95


def test_the_result_is_the_network_that_was_judged() -> None:
    """With its norms as measured: at those that it came with it would be as good as chance."""
    net, groups, data = Planted("l1"), planted_groups(), signs_of_pixel_0()
    with torch.no_grad():
        net.bn.running_mean.fill_(30.0)
    result = AdaPruner().plan(weights_of(net), groups, HALF, Context(net, data[:2], data[2:]))
    assert result.weights.keys() == {"bn.running_mean", "bn.running_var"}
    apply_masks(net, groups, result.keep)
    assert measure(net, data[2:]).top1 <= 0.7
    set_weights(net, result.weights)
    found = measure(net, data[2:])
    assert found.top1 == result.report["holdout_top1"]["l1"] >= 0.95
    assert found.loss == result.report["holdout_loss"]["l1"]


def test_where_nothing_is_removed_nothing_changes() -> None:
    net, groups, data = Planted("l1"), planted_groups(), signs_of_pixel_0()
    whole = Budget(None, widths={"conv": SIZE})
    assert AdaPruner().plan(weights_of(net), groups, whole, Context(net, data[:2], data[2:])).weights == {}


def test_norms_are_measured_on_images_that_are_moved_as_in_training() -> None:
    """Here what is not moved is too bright by far: norms measured on it leave an accuracy of chance."""
    net, groups, data = Planted("l1"), planted_groups(), signs_of_pixel_0()
    bright = [(images + 30.0, labels) for images, labels in data[:2]]
    tops = [
        AdaPruner()
        .plan(weights_of(net), groups, HALF, Context(net, bright, data[2:], moved=moved))
        .report["holdout_top1"]
        for moved in (data[:2], None)
    ]
    assert tops[0]["l1"] >= 0.95
    assert tops[1]["l1"] <= 0.7


def test_of_equal_accuracies_the_smaller_loss_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    net, groups, data = Planted("l1"), planted_groups(), signs_of_pixel_0()
    faint, loud = useful_channels("l1")[:2]
    with torch.no_grad():
        net.fc.weight[:, faint] *= 0.8
        net.fc.bias[0] = 0.5
    table = {"faint": faint, "loud": loud, "fainter": faint}
    chosen = {name: lambda *_, at=at: {"conv": np.eye(SIZE)[at]} for name, at in table.items()}
    monkeypatch.setattr(adapruner, "CRITERIA", chosen)
    one = Budget(None, widths={"conv": 1})
    report = AdaPruner().plan(weights_of(net), groups, one, Context(net, data[:2], data[2:])).report
    assert len(set(report["holdout_top1"].values())) == 1
    assert report["holdout_loss"]["loud"] < report["holdout_loss"]["faint"] == report["holdout_loss"]["fainter"]
    assert report["criterion"] == "loud"


def test_a_criterion_that_cannot_score_a_narrowed_group_is_left_out_and_named() -> None:
    net, groups = randomise(Mobile()), mobile_groups()
    report = planned(AdaPruner(), net, groups, Budget(None, widths={"grouped": 1, "expand": 2})).report
    assert report["unusable"] == dict.fromkeys(("scale", "bn"), "it does not score 'grouped'")
    assert report["holdout_top1"].keys() == CRITERIA.keys() - {"scale", "bn"}
    assert planned(AdaPruner(), net, groups).report["unusable"] == {}


def test_without_held_out_images_it_says_what_it_was_judged_on() -> None:
    net, groups = randomise(Residual()), residual_groups()
    report = AdaPruner(scope="all").plan(weights_of(net), groups, HALF, Context(net, noise())).report
    assert any("compared on training images" in line for line in report["warnings"])
    with pytest.raises(InputError, match=r"'adapruner' needs images"):
        AdaPruner(scope="all").plan(weights_of(net), groups, HALF)


def test_a_network_without_norms_is_refused() -> None:
    groups = residual_groups()
    bare = Groups(
        tuple(
            Group(g.id, g.size, tuple(m for m in g.members if m.role in ("filter", "reader")), (), g.kept_because)
            for g in groups.groups
        ),
        groups.layers,
        groups.cost,
    )
    with pytest.raises(InputError, match=r"'adapruner' needs norms"):
        AdaPruner().scores(weights_of(randomise(Residual())), bare)


# --- the training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "held_small"), [("inner", {"bn1"}), ("all", {"bn", "bn1", "bn2"})])
def test_the_penalty_is_the_sum_of_the_scales_sizes_of_the_scope(scope: str, held_small: set[str]) -> None:
    """``L = CE + lam * sum |gamma|``: its value, and its gradient lam * sign(gamma)."""
    net, groups = randomise(Residual()), residual_groups()
    method = AdaPruner(strength=0.25, scope=scope)  # type: ignore[arg-type]
    penalty = method.penalty(method.prepare(net, groups, HALF))
    assert isinstance(penalty, Tensor)
    scales = {name: net.get_parameter(f"{name}.weight") for name in ("bn", "bn1", "bn2")}
    assert float(penalty.detach()) == pytest.approx(
        0.25 * sum(float(scales[name].detach().abs().sum()) for name in held_small)
    )
    penalty.backward()
    for name, scale in scales.items():
        expected = 0.25 * scale.detach().sign() if name in held_small else None
        assert scale.grad is None if expected is None else torch.equal(scale.grad, expected)


def sizes(net: nn.Module, names: Mapping[str, object] | list[str]) -> float:
    return sum(float(net.get_parameter(f"{name}.weight").detach().abs().sum()) for name in names)


def test_sparse_training_makes_the_scales_smaller_than_training_without() -> None:
    task, groups = toy_task((2, 3, 8, 8), 5), residual_groups()
    nets = {}
    for strength in (0.0, 0.05):
        nets[strength] = randomise(Residual())
        method = AdaPruner(epochs=6, learning_rate=0.1, strength=strength)
        state = method.fit(nets[strength], groups, HALF, task)
        assert state.steps == 18
    assert sizes(nets[0.05], ["bn1"]) < 0.9 * sizes(nets[0.0], ["bn1"])
    context = Context(nets[0.05], list(task.images(batch_size=8)), list(task.holdout(batch_size=8)), state)
    assert method.plan(weights_of(nets[0.05]), groups, Budget(Target("macs", 0.6)), context).report["warnings"] == []


def test_a_training_that_was_over_when_it_was_interrupted_counts(tmp_path: Path) -> None:
    """Killed while it chose, it goes on behind the last step: the scales are those of the penalty all the same."""
    groups, method, images = residual_groups(), AdaPruner(epochs=2), noise()
    states, nets = [], []
    for _ in range(2):
        net = randomise(Residual())
        states.append(method.fit(net, groups, HALF, replace(toy_task((2, 3, 8, 8), 5), checkpoint=tmp_path)))
        nets.append(weights_of(net))
    assert [state.steps for state in states] == [6, 6]
    assert all(np.array_equal(values, nets[1][name]) for name, values in nets[0].items())
    result = method.plan(weights_of(net), groups, Budget(Target("macs", 0.6)), Context(net, images, images, states[1]))
    assert result.report["warnings"] == []


def test_it_works_in_somebody_elses_loop() -> None:
    net, groups, data = randomise(Residual()), residual_groups(), noise(count=12)
    method = AdaPruner(strength=0.05, scope="all")
    state = method.prepare(net, groups, HALF)
    before, optimizer = sizes(net, ["bn", "bn1", "bn2"]), torch.optim.SGD(net.parameters(), lr=0.1)
    net.train()
    for images, labels in itertools.chain(data, data):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels) + method.penalty(state)
        loss.backward()
        method.after_backward(state)
        optimizer.step()
        method.after_step(state)
    net.eval()
    assert sizes(net, ["bn", "bn1", "bn2"]) < before
    result = method.plan(weights_of(net), groups, HALF, Context(net, data, data[:4], state))
    assert result.report["warnings"] == []
    assert result.report["share"]["macs"] <= 0.5
