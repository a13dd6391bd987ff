"""L1 and the random control."""

import numpy as np
import pytest
from toy_groups import Mobile, Residual, mobile_groups, randomise, residual_groups

from prune2deploy.apply import weights_of
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.methods.l1 import L1
from prune2deploy.methods.random import Random


def test_l1_of_one_producer_is_in_proportion_to_its_sum_of_absolute_weights() -> None:
    weights = weights_of(randomise(Residual()))
    score = L1().scores(weights, residual_groups())["conv1"]
    sums = np.abs(weights["conv1.weight"].astype(np.float64)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(score, sums / sums.mean(), rtol=1e-12)


def test_no_producer_outweighs_another_by_its_scale() -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    before = L1().scores(weights, groups)["stem"]
    weights["stem.weight"] *= 1000
    np.testing.assert_allclose(L1().scores(weights, groups)["stem"], before, rtol=1e-6)
    assert before.mean() == pytest.approx(1.0)


def test_a_producer_that_is_all_zero_has_no_say() -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    weights["conv2.weight"][:] = 0
    sums = np.abs(weights["stem.weight"].astype(np.float64)).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(L1().scores(weights, groups)["stem"], sums / sums.mean(), rtol=1e-12)
    weights["stem.weight"][:] = 0
    assert L1().scores(weights, groups)["stem"].tolist() == [0.0] * 6


def test_l1_adds_up_all_places_of_a_channel() -> None:
    weights = weights_of(randomise(Mobile()))
    score = L1().scores(weights, mobile_groups())["grouped"]
    sums = np.abs(weights["grouped.weight"].astype(np.float64)).sum(axis=(1, 2, 3))
    places = sums[[0, 1]] + sums[[2, 3]]
    np.testing.assert_allclose(score, places / places.mean(), rtol=1e-12)


def test_a_weight_that_the_groups_name_and_the_network_lacks_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"no weight 'stem.weight'"):
        L1().scores({}, residual_groups())


def test_random_scores_depend_on_seed_and_group_only() -> None:
    groups = residual_groups()
    scores = Random().scores({}, groups)
    fewer = Groups(groups.groups[1:2], groups.layers, groups.cost)
    assert np.array_equal(Random().scores({}, fewer)["conv1"], scores["conv1"])
    assert not np.array_equal(Random(seed=1).scores({}, groups)["conv1"], scores["conv1"])
    assert not np.array_equal(scores["conv1"][:6], scores["stem"])
    # Kept across versions: a control that changes is no control.
    np.testing.assert_allclose(
        scores["stem"][:3], [0.1748436274723103, 0.4373598855310715, 0.22194506969470695], rtol=1e-12
    )
