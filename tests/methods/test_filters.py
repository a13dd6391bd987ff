"""L1, L2 and FPGM: what they measure of a filter, and how groups of several layers are scored."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize
from toy_groups import Mobile, Residual, mobile_groups, randomise, residual_groups

from prune2deploy.apply import weights_of
from prune2deploy.errors import InputError
from prune2deploy.methods import load_method
from prune2deploy.methods.fpgm import distance_sums

Rows = list[list[float]]


def absolute_sums(rows: Rows) -> list[float]:
    return [sum(abs(value) for value in row) for row in rows]


def lengths(rows: Rows) -> list[float]:
    return [sum(value * value for value in row) ** 0.5 for row in rows]


def distances(rows: Rows) -> list[float]:
    return [sum(sum((a - b) ** 2 for a, b in zip(row, other, strict=True)) ** 0.5 for other in rows) for row in rows]


MEASURES: dict[str, Callable[[Rows], list[float]]] = {"l1": absolute_sums, "l2": lengths, "fpgm": distances}
"""The papers' formulas, element by element."""


def shares(name: str, rows: np.ndarray) -> np.ndarray:
    """Return the formula's values in units of their average."""
    values = np.array(MEASURES[name](rows.astype(np.float64).tolist()))
    return np.asarray(values / values.mean())


@pytest.mark.parametrize("name", MEASURES)
def test_the_score_of_one_producer_is_in_proportion_to_the_formula(name: str) -> None:
    weights = weights_of(randomise(Residual()))
    filters = weights["conv1.weight"]
    score = load_method(name).scores(weights, residual_groups())["conv1"]
    np.testing.assert_allclose(score, shares(name, filters.reshape(len(filters), -1)), rtol=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_no_producer_outweighs_another_by_its_scale(name: str) -> None:
    weights, groups, method = weights_of(randomise(Residual())), residual_groups(), load_method(name)
    before = method.scores(weights, groups)["stem"]
    weights["stem.weight"] *= 1000
    np.testing.assert_allclose(method.scores(weights, groups)["stem"], before, rtol=1e-6)
    assert before.mean() == pytest.approx(1.0)


@pytest.mark.parametrize("name", MEASURES)
def test_a_producer_that_is_all_zero_has_no_say(name: str) -> None:
    weights, groups, method = weights_of(randomise(Residual())), residual_groups(), load_method(name)
    weights["conv2.weight"][:] = 0
    expected = shares(name, weights["stem.weight"].reshape(6, -1))
    np.testing.assert_allclose(method.scores(weights, groups)["stem"], expected, rtol=1e-9)
    weights["stem.weight"][:] = 0
    assert method.scores(weights, groups)["stem"].tolist() == [0.0] * 6


@pytest.mark.parametrize("name", MEASURES)
def test_all_places_of_a_channel_are_one_filter(name: str) -> None:
    weights = weights_of(randomise(Mobile()))
    score = load_method(name).scores(weights, mobile_groups())["grouped"]
    rows = weights["grouped.weight"].reshape(4, -1)
    together = np.concatenate([rows[[0, 1]], rows[[2, 3]]], axis=1)
    np.testing.assert_allclose(score, shares(name, together), rtol=1e-9)


def test_a_weight_that_the_groups_name_and_the_network_lacks_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"no weight 'stem.weight'"):
        load_method("l1").scores({}, residual_groups())


# --- FPGM -------------------------------------------------------------------------------------------------------------


def test_the_filter_with_the_smallest_sum_is_nearest_the_geometric_median() -> None:
    """The claim of He et al. 2019; the median itself by a general optimiser."""
    filters = np.random.default_rng(3).standard_normal((9, 5))
    filters[4] = filters.mean(axis=0)
    found = minimize(lambda point: np.linalg.norm(filters - point, axis=1).sum(), np.ones(5), method="BFGS")
    assert np.linalg.norm(filters - found.x, axis=1).argmin() == distance_sums(filters).argmin() == 4


def test_distances_do_not_see_what_all_filters_have_in_common() -> None:
    filters = np.random.default_rng(0).standard_normal((12, 27))
    np.testing.assert_allclose(distance_sums(filters + 1e6), distance_sums(filters), rtol=1e-7)


def test_a_filter_that_is_there_twice_is_as_near_as_can_be() -> None:
    filters = np.random.default_rng(1).standard_normal((6, 18))
    filters[5] = filters[2]
    assert distance_sums(filters[[2, 5]]).tolist() == pytest.approx([0, 0], abs=1e-7)
    assert distance_sums(filters)[2] == pytest.approx(distance_sums(filters)[5])


def test_one_filter_alone_is_at_no_distance() -> None:
    assert distance_sums(np.ones((1, 9))).tolist() == [0.0]
