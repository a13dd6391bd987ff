"""The algebra of making up for removed inputs: second moments, compensation, the LASSO, weighted least squares.

Inputs that a layer reads are *variables*; a weight is a matrix of *rows* [outputs and taps, variables].
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lstsq

from prune2deploy.errors import DeviceError

_COMPACT = 0.75
"""Matrices are copied without what is removed when less than this share of them is left."""

_STEPS = 200
_RESIDUAL = 1e-12
"""Conjugate gradients end at this residual relative to the right side, or after so many steps."""


class Moments:
    """Mean and second moment of variables, gathered in float64 from batches, each multiplied in its own precision.

    Each batch is centred by its own mean and merged (Chan, Golub, LeVeque 1979), so large means cost no digits.

    Attributes:
        mean: [variables, places]: variables that lie at several places (a flattened map) have a mean at each.
        samples: how many rows were seen.
    """

    def __init__(self, variables: int, places: int = 1) -> None:
        self.mean = np.zeros((variables, places))
        self.samples = 0
        self._scatter = np.zeros((variables, variables))

    def add(self, rows: np.ndarray) -> None:
        """Take in samples, [samples, variables, places]."""
        mean = rows.mean(axis=0, dtype=np.float64)
        centred = np.moveaxis(rows - mean.astype(rows.dtype), 1, 0).reshape(rows.shape[1], -1)
        shift = mean - self.mean
        total = self.samples + len(rows)
        self._scatter += centred @ centred.T + shift @ shift.T * (self.samples * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.samples = total

    def second(self, *, centred: bool = True) -> np.ndarray:
        """Return the covariance, places pooled, or the second moment around 0; [variables, variables]."""
        places = self.mean.shape[1]
        covariance = self._scatter / max(self.samples * places, 1)
        return covariance if centred else covariance + self.mean @ self.mean.T / places


def ridged(second: np.ndarray, ridge: float) -> np.ndarray:
    """Return ``second + ridge * mean of its diagonal * I``; of variables that never vary, the identity."""
    level = float(np.diag(second).mean())
    return np.eye(len(second)) if level <= 0 else second + ridge * level * np.eye(len(second))


def inverse(second: np.ndarray) -> np.ndarray:
    """Return the inverse of a positive definite matrix, symmetric to the last bit."""
    found = cho_solve(cho_factor(second), np.eye(len(second)))
    return np.asarray((found + found.T) / 2)


def compensation(second: np.ndarray, removed: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return A = S_PK S_KK^-1, [removed, kept]: the best linear guess of removed variables from those kept."""
    if not len(kept):
        return np.zeros((len(removed), 0))
    return np.asarray(cho_solve(cho_factor(second[np.ix_(kept, kept)]), second[np.ix_(kept, removed)]).T)


def loss_after(rows: np.ndarray, second: np.ndarray, removed: np.ndarray, kept: np.ndarray) -> float:
    """Return E(P) = tr(W_P S W_P^T), S = S_PP - S_PK S_KK^-1 S_KP: what compensation cannot make up for."""
    guess = compensation(second, removed, kept)
    rest = second[np.ix_(removed, removed)] - guess @ second[np.ix_(kept, removed)]
    return float(np.einsum("rp,pq,rq->", rows[:, removed], rest, rows[:, removed]))


@dataclass(eq=False)
class Reading:
    """How one layer would bear the loss of variables: arrays that `remove` updates in place.

    Attributes:
        rows: the weight, [rows, variables], or its triangular factor: only products of its columns count.
        inverse: of the variables' second moment, [variables, variables].
        places: int [channels, taps]: the variables that each channel of a group is.
        unit: what losses are counted in; above 0.
    """

    rows: np.ndarray
    inverse: np.ndarray
    places: np.ndarray
    unit: float = 1.0

    def losses(self, channels: np.ndarray) -> np.ndarray:
        """Return E(i) = tr(W_i H_ii^-1 W_i^T) in the layer's unit, for these channels; |W_i|^2 / H_ii for one tap."""
        at = self.places[channels]
        own = np.moveaxis(self.rows[:, at], 0, 2)  # [channels, taps, rows]
        solved = np.linalg.solve(self.inverse[at[:, :, None], at[:, None, :]], own)
        return np.asarray((own * solved).sum(axis=(1, 2)) / self.unit)

    def remove(self, channel: int) -> None:
        """Take a channel's variables out, their weight moved to others (the down-dates of optimal brain surgery)."""
        at = self.places[channel]
        share = np.linalg.solve(self.inverse[np.ix_(at, at)], self.inverse[at])
        share[:, at] = np.eye(len(at))  # as it is but for rounding
        self.rows -= self.rows[:, at] @ share
        self.inverse -= self.inverse[:, at] @ share
        self.inverse[at, :] = self.inverse[:, at] = 0.0  # here, too: they are out of all that follows

    def compacted(self, channels: np.ndarray) -> "Reading":
        """Return this without the variables of removed channels; ``channels`` are those left."""
        gone = np.setdiff1d(self.places, self.places[channels])
        stay = np.setdiff1d(np.arange(len(self.inverse)), gone)
        places = np.zeros_like(self.places)
        places[channels] = np.searchsorted(stay, self.places[channels])
        return Reading(factor(self.rows[:, stay]), self.inverse[np.ix_(stay, stay)].copy(), places, self.unit)


def factor(rows: np.ndarray) -> np.ndarray:
    """Return a matrix of the same products of columns with no more rows than columns."""
    return np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows.copy()


def removal_order(
    readings: Sequence[Reading], channels: np.ndarray, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the order in which channels go, each the one whose loss is least then, and the losses added up.

    Args:
        readings: of all layers that read the channels; their losses are added. They are used up.
        channels: int [channels]: those that can go.
        count: how many to remove; by default all.

    Returns:
        int64 [count], and float64 [count], never falling.
    """
    left = channels
    own, compacted = list(readings), len(channels)
    order, losses = [], []
    for _ in range(len(channels) if count is None else count):
        found = np.sum([reading.losses(left) for reading in own], axis=0)
        best = int(np.argmin(found))
        order.append(left[best])
        losses.append(max(float(found[best]), 0.0))
        for reading in own:
            reading.remove(int(left[best]))
        left = np.delete(left, best)
        if 0 < len(left) < _COMPACT * compacted:
            own, compacted = [reading.compacted(left) for reading in own], len(left)
    return np.array(order, dtype=np.int64), np.cumsum(losses)


# --- LASSO ------------------------------------------------------------------------------------------------------------


class Lasso:
    """The problem argmin of ``b H b / 2 - q b + penalty * sum |b|`` for one H and q, and any penalty.

    scikit-learn's coordinate descent finds which variables are 0; the others are then solved for exactly.

    Attributes:
        gram: H, [variables, variables], positive semidefinite.
        products: q, [variables].
        top: the smallest penalty that leaves none, ``max |q|``.

    Raises:
        DeviceError: if scikit-learn is not installed.
    """

    def __init__(self, gram: np.ndarray, products: np.ndarray) -> None:
        try:
            from sklearn import linear_model
        except ImportError as error:
            message = "scikit-learn is not installed, which method 'cpli' needs; pip install 'prune2deploy[torch]'"
            raise DeviceError(message) from error
        self.gram = gram
        self.products = products
        self.top = float(np.abs(products).max(initial=0.0))
        # A design of as few rows as possible that has this Gram matrix and these products.
        values, vectors = np.linalg.eigh(gram)
        kept = values > max(values[-1], 0.0) * 1e-14
        root, basis = np.sqrt(values[kept]), vectors[:, kept].T
        scale = np.sqrt(max(len(root), 1))
        self._design = np.asfortranarray(basis * root[:, None] * scale)
        self._wanted = basis @ products / root * scale
        self._solver = linear_model.Lasso(fit_intercept=False, max_iter=20000, tol=1e-10, warm_start=True)
        self._solver.coef_ = np.zeros(len(products))

    def near(self, penalty: float) -> np.ndarray:
        """Return the solution by coordinate descent from the last one, [variables]; penalty > 0."""
        from sklearn.exceptions import ConvergenceWarning

        if penalty >= self.top:
            return np.zeros(len(self.products))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._solver.set_params(alpha=penalty).fit(self._design, self._wanted)
        return np.array(self._solver.coef_, dtype=np.float64)

    def solve(self, penalty: float) -> np.ndarray:
        """Return the solution, [variables]; without a penalty that of the linear equations."""
        if penalty == 0:
            return _equations(self.gram, self.products)
        found = self.near(penalty)
        active = np.flatnonzero(found)
        signs = np.sign(found[active])
        exact = np.zeros_like(found)
        exact[active] = _equations(self.gram[np.ix_(active, active)], self.products[active] - penalty * signs)
        better = np.array_equal(np.sign(exact[active]), signs) and self.missed(penalty, exact) <= self.missed(
            penalty, found
        )
        return exact if better else found

    def missed(self, penalty: float, found: np.ndarray) -> float:
        """Return by how much the conditions of optimality are missed at worst; 0 at the minimum."""
        slope = self.products - self.gram @ found
        active = found != 0
        missed = np.where(active, np.abs(slope - penalty * np.sign(found)), np.maximum(np.abs(slope) - penalty, 0.0))
        return float(missed.max(initial=0.0))

    def keeping(self, count: int, *, steps: int = 40) -> tuple[np.ndarray, float]:
        """Return the solution of the largest penalty found that leaves ``count`` variables or more, and that penalty.

        Bisection of the penalty on a geometric scale; where no penalty leaves as many, the solution without one.
        """
        high, low = self.top, 0.0
        for _ in range(steps if self.top > 0 else 0):
            middle = float(np.sqrt(high * low)) if low > 0 else high / 8
            kept = np.count_nonzero(self.near(middle))
            low, high = (middle, high) if kept >= count else (low, middle)
            if kept == count or (low == 0 and high < self.top * 1e-12):
                break
        return self.solve(low), low


def _equations(gram: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Return the solution of linear equations, the smallest where there are many."""
    try:
        return np.asarray(cho_solve(cho_factor(gram), products))
    except LinAlgError:
        return np.asarray(lstsq(gram, products)[0])


# --- least squares ----------------------------------------------------------------------------------------------------

Solve = Callable[[np.ndarray], np.ndarray]


def weighted_least_squares(
    inputs: np.ndarray,
    wanted: np.ndarray,
    sample_weights: np.ndarray,
    start: np.ndarray,
    ridge: float,
    *,
    centred: bool = False,
) -> np.ndarray:
    """Return for every output o the weights W that give what is wanted, near those it has.

    That is argmin of ``mean_n w_no (wanted_no - inputs_n W_o)^2 + ridge * level * |W_o - start_o|^2``, where ``level``
    is the mean square of an input. Each output is a problem of its own, since its samples have their own weights; all
    are solved together by conjugate gradients, preconditioned by the problem of equal weights. An output whose samples
    weigh nothing keeps ``start``.

    Args:
        inputs: [samples, variables].
        wanted: [samples, outputs].
        sample_weights: [samples, outputs], not negative.
        start: [variables, outputs].
        ridge: above 0.
        centred: leave a constant free for every output; it is the weighted mean of ``wanted - inputs W``.

    Returns:
        float64 [variables, outputs].
    """
    samples = len(inputs)
    plain = inputs - inputs.mean(axis=0) if centred else inputs
    level = ridge * (float((plain**2).mean()) or 1.0)

    def residual(values: np.ndarray) -> np.ndarray:
        free = weighted_mean(values, sample_weights) if centred else 0.0
        return np.asarray(sample_weights * (values - free))

    def apply(found: np.ndarray) -> np.ndarray:
        return np.asarray(plain.T @ residual(plain @ found) / samples + level * found)

    right = plain.T @ residual(wanted - plain @ start) / samples
    return np.asarray(start + _conjugate_gradients(apply, right, _equal_weights(plain, level)))


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted means of columns; 0 where nothing weighs."""
    total = weights.sum(axis=0)
    sums = (weights * values).sum(axis=0)
    return np.asarray(np.divide(sums, total, out=np.zeros(len(sums)), where=total > 0))


def _equal_weights(inputs: np.ndarray, level: float) -> Solve:
    """Return the solver of ``(X^T X / samples + level I) d = r``, by the smaller of the two Gram matrices."""
    samples, variables = inputs.shape
    if variables <= samples:
        small = cho_factor(inputs.T @ inputs / samples + level * np.eye(variables))
        return lambda right: np.asarray(cho_solve(small, right))
    dual = cho_factor(inputs @ inputs.T / samples + level * np.eye(samples))
    return lambda right: np.asarray((right - inputs.T @ cho_solve(dual, inputs @ right) / samples) / level)


def _conjugate_gradients(apply: Solve, right: np.ndarray, precondition: Solve) -> np.ndarray:
    """Return the solutions of one positive definite problem per column, each with its own steps."""
    found = np.zeros_like(right)
    residual = right.copy()
    direction = ahead = precondition(residual)
    level = (residual * ahead).sum(axis=0)
    enough = _RESIDUAL * np.linalg.norm(right, axis=0)
    for _ in range(_STEPS):
        if (np.linalg.norm(residual, axis=0) <= enough).all():
            break
        image = apply(direction)
        curvature = (direction * image).sum(axis=0)
        step = np.divide(level, curvature, out=np.zeros_like(level), where=curvature > 0)
        found = found + step * direction
        residual = residual - step * image
        ahead = precondition(residual)
        before, level = level, (residual * ahead).sum(axis=0)
        direction = ahead + np.divide(level, before, out=np.zeros_like(level), where=before > 0) * direction
    return found
