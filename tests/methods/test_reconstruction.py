"""The algebra that cap and cpli share, against brute force."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import lstsq

from prune2deploy.methods.reconstruction import (
    Lasso,
    Moments,
    Reading,
    compensation,
    factor,
    inverse,
    loss_after,
    removal_order,
    ridged,
    weighted_least_squares,
    weighted_mean,
)

RNG = np.random.default_rng(3)


def correlated(samples: int, variables: int) -> np.ndarray:
    """Return samples of variables that depend on one another, with means that are not 0."""
    mixing = RNG.normal(size=(variables, variables)) / np.sqrt(variables) + np.eye(variables)
    return RNG.normal(size=(samples, variables)) @ mixing + RNG.normal(size=variables) * 3


def reading(rows: np.ndarray, second: np.ndarray) -> Reading:
    return Reading(rows.copy(), inverse(second), np.arange(len(second))[:, None])


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_streamed_moments_are_those_of_all_samples_at_once_also_far_from_zero(offset: float) -> None:
    samples = correlated(500, 4)
    moments = Moments(4)
    for part in np.split(samples + offset, [3, 100, 320]):
        moments.add(part[:, :, None])
    assert moments.samples == 500
    np.testing.assert_allclose(moments.second(), np.cov(samples.T, bias=True), rtol=1e-7)
    np.testing.assert_allclose(moments.mean[:, 0], samples.mean(axis=0) + offset)


def test_places_of_a_flattened_map_share_one_covariance_about_the_mean_of_each_place() -> None:
    values = RNG.normal(size=(60, 3, 5)) + RNG.normal(size=(3, 5)) * 4
    moments = Moments(3, 5)
    moments.add(values[:25])
    moments.add(values[25:])
    centred = values - values.mean(axis=0)
    np.testing.assert_allclose(moments.mean, values.mean(axis=0))
    np.testing.assert_allclose(moments.second(), np.einsum("nip,njp->ij", centred, centred) / 300)
    np.testing.assert_allclose(moments.second(centred=False), np.einsum("nip,njp->ij", values, values) / 300)


def test_the_ridge_is_a_share_of_the_mean_variance_and_never_leaves_a_singular_matrix() -> None:
    np.testing.assert_allclose(ridged(np.diag([1.0, 3.0]), 0.5), np.diag([2.0, 4.0]))
    np.testing.assert_array_equal(ridged(np.zeros((2, 2)), 1e-3), np.eye(2))


# --- compensation -----------------------------------------------------------------------------------------------------


def test_the_loss_of_one_channel_is_the_error_of_the_best_refit_of_a_1x1_consumer() -> None:
    """E(i) = |W_i|^2 / H_ii without ridge, against least squares with a constant."""
    x, rows = correlated(400, 6), RNG.normal(size=(5, 6))
    second = np.cov(x.T, bias=True)
    found = reading(rows, second).losses(np.arange(6))
    for channel in range(6):
        others = np.column_stack([np.delete(x, channel, axis=1), np.ones(len(x))])
        wanted = x @ rows.T
        error = wanted - others @ lstsq(others, wanted)[0]
        assert found[channel] == pytest.approx((error**2).sum() / len(x), rel=1e-9)


def test_losses_of_greedy_steps_add_up_to_the_loss_of_the_whole_set() -> None:
    """The sum of E(i), each after the down-dates before it, is E(P) = tr(W_P S W_P^T)."""
    second, rows = np.cov(correlated(300, 9).T), RNG.normal(size=(4, 9))
    order, losses = removal_order([reading(rows, second)], np.arange(9), 6)
    for count in range(1, 7):
        removed = order[:count]
        kept = np.setdiff1d(np.arange(9), removed)
        assert losses[count - 1] == pytest.approx(loss_after(rows, second, removed, kept), rel=1e-9)


def test_down_dates_empty_the_removed_columns_and_give_the_others_the_closed_form() -> None:
    """W <- W - W_i H_i. / H_ii, H <- H - H_.i H_i. / H_ii ends at W_K + W_P S_PK S_KK^-1 and S_KK^-1."""
    second, rows = np.cov(correlated(300, 8).T), RNG.normal(size=(4, 8))
    state = reading(rows, second)
    removed, kept = np.array([2, 7, 3]), np.array([0, 1, 4, 5, 6])
    for channel in removed:
        state.remove(int(channel))
    assert np.abs(state.rows[:, removed]).max() <= 1e-16
    closed = rows[:, kept] + rows[:, removed] @ compensation(second, removed, kept)
    np.testing.assert_allclose(state.rows[:, kept], closed, rtol=1e-9)
    np.testing.assert_allclose(state.inverse[np.ix_(kept, kept)], np.linalg.inv(second[np.ix_(kept, kept)]), rtol=1e-9)


def test_a_channel_of_several_taps_goes_with_all_of_them() -> None:
    """E(i) = tr(W_i H_ii^-1 W_i^T) with H_ii a block: the order is that of trying, the losses are E(P)."""
    channels, taps = 7, 3
    second, rows = np.cov(correlated(300, channels * taps).T), RNG.normal(size=(4, channels * taps))
    places = np.arange(channels * taps).reshape(taps, channels).T
    order, losses = removal_order([Reading(rows.copy(), inverse(second), places)], np.arange(channels), channels - 1)

    def lost(removed: list[int]) -> float:
        gone = places[removed].ravel()
        return loss_after(rows, second, gone, np.setdiff1d(places, gone))

    removed: list[int] = []
    for channel, loss in zip(order, losses, strict=True):
        removed.append(min(set(range(channels)) - set(removed), key=lambda c: lost([*removed, c])))
        assert channel == removed[-1]
        assert loss == pytest.approx(lost(removed), rel=1e-9)


def test_independent_inputs_of_equal_variance_give_plain_deletion() -> None:
    """S = I: E(i) = |W_i|^2, nothing is compensated, and channels go by their norms."""
    rows = RNG.normal(size=(3, 6))
    order, losses = removal_order([reading(rows, np.eye(6))], np.arange(6))
    squares = (rows**2).sum(axis=0)
    np.testing.assert_array_equal(order, np.argsort(squares))
    np.testing.assert_allclose(losses, np.cumsum(np.sort(squares)))
    assert not compensation(np.eye(6), np.array([1, 4]), np.array([0, 2, 3, 5])).any()


def test_a_planted_dependency_costs_nothing_as_the_ridge_goes_to_zero() -> None:
    """x5 = 0.3 x1 - 2 x7 (S is singular): E(5) falls with the ridge; A on the others is exact without one."""
    x, rows = correlated(400, 8), RNG.normal(size=(5, 8))
    x[:, 5] = 0.3 * x[:, 1] - 2 * x[:, 7]
    second = np.cov(x.T)
    found = [reading(rows, ridged(second, ridge)).losses(np.array([5]))[0] for ridge in (1e-2, 1e-4, 1e-6, 1e-8)]
    assert all(later < earlier / 50 for earlier, later in pairwise(found))
    guess = compensation(second, np.array([5]), np.delete(np.arange(8), 5))
    np.testing.assert_allclose(guess[0], [0, 0.3, 0, 0, 0, 0, -2], atol=1e-10)


def test_the_greedy_order_is_that_of_trying_every_channel_also_when_matrices_are_compacted() -> None:
    """Two readers, of which one also reads channels of others and has them in another order."""
    channels, places = 24, RNG.permutation(30)[:24]
    seconds = [np.cov(correlated(200, size).T) for size in (24, 30)]
    weights = [RNG.normal(size=(40, 24)), RNG.normal(size=(7, 30))]
    where = [np.arange(24), places]
    units = [2.0, 0.5]
    own = [
        Reading(factor(w), inverse(s), p[:, None], u) for w, s, p, u in zip(weights, seconds, where, units, strict=True)
    ]
    order, losses = removal_order(own, np.arange(channels), 20)

    def lost(removed: list[int]) -> float:
        total = 0.0
        for w, s, p, u in zip(weights, seconds, where, units, strict=True):
            gone = p[removed]
            total += loss_after(w, s, gone, np.setdiff1d(np.arange(len(s)), gone)) / u
        return total

    removed: list[int] = []
    for step in range(20):
        best = min((c for c in range(channels) if c not in removed), key=lambda c: lost([*removed, c]))
        removed.append(best)
        assert order[step] == best
        assert losses[step] == pytest.approx(lost(removed), rel=1e-8)


def test_a_factor_has_the_products_of_the_columns() -> None:
    rows = RNG.normal(size=(50, 7))
    assert factor(rows).shape == (7, 7)
    np.testing.assert_allclose(factor(rows).T @ factor(rows), rows.T @ rows)


# --- LASSO ------------------------------------------------------------------------------------------------------------


def problem(variables: int, samples: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return z, y = the sum of its columns, and their moments."""
    z = correlated(samples, variables)
    y = z.sum(axis=1)
    return z, y, z.T @ z / samples, z.T @ y / samples


def test_no_penalty_gives_exactly_one_and_the_largest_product_gives_zero() -> None:
    """lambda = 0 -> beta = 1; lambda >= max |q| -> beta = 0, and just below it one is not 0."""
    _, _, gram, products = problem(7)
    top = np.abs(products).max()
    np.testing.assert_allclose(Lasso(gram, products).solve(0.0), 1.0, rtol=1e-9)
    assert not Lasso(gram, products).solve(top).any()
    assert np.count_nonzero(Lasso(gram, products).solve(top * 0.999)) == 1


@pytest.mark.parametrize("variables", [5, 20])
@pytest.mark.parametrize("share", [0.9, 0.3, 0.03, 1e-3])
def test_the_optimality_conditions_hold_to_1e8(variables: int, share: float) -> None:
    """KKT: |q - H beta| = lambda where beta is not 0 and with its sign, and at most lambda elsewhere."""
    _, _, gram, products = problem(variables)
    penalty = share * np.abs(products).max()
    assert Lasso(gram, products).missed(penalty, Lasso(gram, products).solve(penalty)) < 1e-8


def test_the_residual_of_the_conditions_sees_what_is_not_optimal() -> None:
    _, _, gram, products = problem(5)
    penalty = 0.3 * np.abs(products).max()
    best = Lasso(gram, products).solve(penalty)
    assert Lasso(gram, products).missed(penalty, best + 1e-3) > 1e-5
    assert Lasso(gram, products).missed(penalty, np.zeros(5)) == pytest.approx(np.abs(products).max() - penalty)


def test_it_is_the_lasso_on_the_samples_themselves() -> None:
    """Proximal gradient steps on the samples: nothing in common with coordinate descent on moments."""
    z, y, gram, products = problem(6)
    penalty = 0.2 * np.abs(products).max()
    step = 1.0 / np.linalg.eigvalsh(gram)[-1]
    beta = np.zeros(6)
    for _ in range(20000):
        slope = z.T @ (z @ beta - y) / len(z)
        beta = beta - step * slope
        beta = np.sign(beta) * np.maximum(np.abs(beta) - step * penalty, 0.0)
    np.testing.assert_allclose(Lasso(gram, products).solve(penalty), beta, atol=1e-8)


def test_a_singular_problem_is_solved_and_a_variable_that_is_zero_stays_out() -> None:
    z, y, _, _ = problem(6)
    z[:, 4], z[:, 2] = z[:, 1], 0.0
    gram, products = z.T @ z / len(z), z.T @ y / len(z)
    penalty = 0.05 * np.abs(products).max()
    found = Lasso(gram, products).solve(penalty)
    assert found[2] == 0
    assert Lasso(gram, products).missed(penalty, found) < 1e-8


@pytest.mark.parametrize("count", [1, 3, 6, 11, 12])
def test_the_penalty_is_bisected_until_as_many_stay(count: int) -> None:
    _, _, gram, products = problem(12)
    found, penalty = Lasso(gram, products).keeping(count)
    assert np.count_nonzero(found) == count
    assert Lasso(gram, products).missed(penalty, found) < 1e-7


def test_where_nothing_contributes_the_bisection_ends() -> None:
    found, penalty = Lasso(np.zeros((4, 4)), np.zeros(4)).keeping(2)
    assert not found.any()
    assert penalty == 0


# --- least squares ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("samples", [200, 12])
def test_weighted_least_squares_are_those_of_every_output_by_itself(samples: int, centred: bool) -> None:
    """More samples than variables, and fewer; against the normal equations of one output at a time."""
    x, y, start = correlated(samples, 20), RNG.normal(size=(samples, 3)), RNG.normal(size=(20, 3))
    weights, ridge = RNG.random((samples, 3)) ** 4, 1e-3
    found = weighted_least_squares(x, y, weights, start, ridge, centred=centred)
    plain = x - x.mean(axis=0) if centred else x
    level = ridge * (plain**2).mean()
    for output in range(3):
        w = weights[:, output]
        own = x - np.average(x, axis=0, weights=w) if centred else x
        wanted = y[:, output] - np.average(y[:, output], weights=w) if centred else y[:, output]
        gram = own.T @ (w[:, None] * own) / samples + level * np.eye(20)
        exact = np.linalg.solve(gram, own.T @ (w * wanted) / samples + level * start[:, output])
        np.testing.assert_allclose(found[:, output], exact, rtol=1e-6, atol=1e-8)


def test_an_output_whose_samples_weigh_nothing_keeps_its_weights() -> None:
    x, y, start = correlated(50, 4), RNG.normal(size=(50, 2)), RNG.normal(size=(4, 2))
    weights = np.ones((50, 2))
    weights[:, 1] = 0.0
    found = weighted_least_squares(x, y, weights, start, 1e-4, centred=True)
    np.testing.assert_array_equal(found[:, 1], start[:, 1])
    assert np.abs(found[:, 0] - start[:, 0]).max() > 0.1
    assert weighted_mean(y, weights)[1] == 0
