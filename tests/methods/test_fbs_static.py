"""FBS with static=true, which is another method: gates folded to their averages."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_groups import (
    TOYS,
    Residual,
    randomise,
    residual_groups,
)

from methods.chains import HALF, SMALL, Chain, batches, chain_groups, gated, images, small
from methods.test_table import toy_task
from prune2deploy.apply import apply_masks, weights_of
from prune2deploy.budget import Budget, Target, share
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.masks import widths
from prune2deploy.methods.base import Context
from prune2deploy.methods.fbs import FBS, State
from prune2deploy.train.boosting import boosted_layers


def static(net: nn.Module, groups: Groups, x: Tensor, method: FBS) -> tuple[Any, State]:
    """Gate, lower and fold a network without training; return the plan and the state."""
    from prune2deploy.methods.fbs_report import observed
    from prune2deploy.train.boosting import fold

    _, state = gated(net, groups, method)
    expected = net(x).detach()
    state.usage, _ = observed(net, state.wiring, batches(x), 10_000)
    fold(net, state.places, state.usage)
    return (method.plan(weights_of(net), groups, HALF, Context(net, None, None, state)), expected), state


@pytest.mark.parametrize("shift", ["masked", "boosted"])
@pytest.mark.parametrize("toy", [*TOYS, "chain"])
def test_static_gates_that_choose_one_mask_fold_into_the_plain_network_that_they_are(shift: Any, toy: str) -> None:
    """With Phi = 0 boosts and masks are constants: folded and pruned, the network computes what the gated one did."""
    toys = {name: (make, make_groups) for name, (make, make_groups, _) in TOYS.items()}
    make, make_groups = toys.get(toy, (lambda: Chain(SMALL, 3), lambda: chain_groups(SMALL, 3)))
    net, groups = randomise(make()).double(), make_groups()
    names = list(net.state_dict())
    x = torch.randn((4, 1, 6, 6)).double() if toy == "mobile" else images()
    (result, expected), state = static(net, groups, x, FBS(predictor="zero", shift=shift, static=True))
    assert sorted(net.state_dict()) == sorted(names), "a plain network, of the names that it had"
    apply_masks(net, groups, result.keep)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    assert any(not mask.all() for mask in result.keep.values())
    for group, path in state.wiring.sparse.items():
        assert int(result.keep[group].sum()) * (state.gates[path].conv.out_channels // groups[group].size) >= 1
    assert result.report["share"]["macs"] == share(groups, "macs", widths(result.keep)) < 1


def test_static_removes_exactly_the_channels_that_no_image_uses_and_weighs_the_others_by_their_average() -> None:
    net, groups = small()
    x = images(30)
    method = FBS(predictor="kaiming", static=True)
    (result, _), state = static(net, groups, x, method)
    assert state.usage is not None
    for path, found in state.usage.items():
        used = found.masks.any(0).numpy()
        assert np.array_equal(result.keep[path], used)
        gate, index = state.gates[path], path.rpartition(".")[2]
        np.testing.assert_allclose(net.get_parameter(f"norms.{index}.weight").detach().numpy(), found.boost.numpy())
        share_used = found.masks.double().mean(0)
        torch.testing.assert_close(net.get_parameter(f"norms.{index}.bias").detach(), share_used * gate.bias.detach())


def test_static_keeps_a_channel_of_a_sum_that_any_addend_uses_and_floors() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    (result, _), state = static(net, groups, images(), FBS(predictor="zero", static=True))
    assert state.usage is not None
    used = state.usage["stem"].masks.any(0) | state.usage["conv2"].masks.any(0)
    assert np.array_equal(result.keep["stem"], used.numpy())
    floor = Budget(Target("macs", 0.5), floors={"conv1": 7})
    keep = FBS(static=True).plan({}, groups, floor, Context(state=state)).keep
    assert keep["conv1"].sum() == 7
    assert (keep["conv1"] | ~result.keep["conv1"]).all()


def test_static_says_that_it_is_not_fbs_and_what_it_left() -> None:
    net, groups = small()
    x = images(30)
    (result, _), state = static(net, groups, x, FBS(predictor="kaiming", static=True))
    assert result.report["what"].startswith("static=true is another method (static), not FBS")
    assert result.report["warnings"][0] == result.report["what"]
    assert "mean_macs" not in result.report
    left = result.report["share"]["macs"]
    assert len(result.report["warnings"]) == (1 if left <= 0.5 else 2)
    below = Budget(Target("macs", left - 0.01))
    again = FBS(static=True).plan({}, groups, below, Context(state=state)).report
    assert again["warnings"][1].startswith("'fbs' with static=true is not held to a target: ")


def test_static_trains_the_same_gates_and_leaves_a_plain_network() -> None:
    net, groups = randomise(Residual()), residual_groups()
    task = toy_task((2, 3, 8, 8), 5)
    method = FBS(static=True, epochs=1, last_epochs=1)
    state = method.fit(net, groups, HALF, task)
    assert state.usage is not None
    assert not boosted_layers(net)
    again = Residual()
    method.rebuild(again, groups)
    again.load_state_dict(net.state_dict())
    result = method.plan(weights_of(net), groups, HALF, Context(net, task.images(), task.holdout(), state))
    assert result.report["what"].startswith("static=true")
    unfolded = FBS(static=True).prepare(randomise(Residual()), groups, HALF)
    with pytest.raises(InputError, match=r"folds gates \(static=true\) that it trained itself"):
        FBS(static=True).plan({}, groups, HALF, Context(state=unfolded))
