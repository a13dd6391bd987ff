"""FPGM: how far a filter is from the others of its layer."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from prune2deploy.groups import Groups
from prune2deploy.methods.base import Method, Needs, Weights
from prune2deploy.methods.filters import filter_scores


@final
@dataclass(frozen=True)
class FPGM(Method):
    """Score a filter by the sum of its Euclidean distances to the layer's other filters.

    The filter with the smallest sum is the one nearest the geometric median, which the others stand in for best (He et
    al., Filter Pruning via Geometric Median, CVPR 2019, arXiv 1811.00250). Where several layers make a channel together
    (a residual stage), each counts alike, in units of its own mean; that is ours.
    """

    needs: ClassVar[Needs] = Needs()

    def scores(self, weights: Weights, groups: Groups, state: Any = None) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]; a function of the filters alone."""
        return filter_scores(weights, groups, distance_sums)


def distance_sums(filters: np.ndarray) -> np.ndarray:
    """Return the sum of each row's Euclidean distances to all rows, float64 [rows]; rows are [rows, weights]."""
    return np.asarray(np.sqrt(squared_distances(filters)).sum(axis=1))


def squared_distances(filters: np.ndarray) -> np.ndarray:
    """Return the squared Euclidean distances of rows, float64 [rows, rows]; rows are [rows, weights].

    ``|a - b|^2`` is taken as ``|a|^2 - 2 a b + |b|^2``, one product of matrices. The rows are centred first, so that
    what they have in common is not rounded away; equal rows may come out as far apart as 1e-16 of their square.
    """
    centred = filters - filters.mean(axis=0)
    products = centred @ centred.T
    squares = np.diag(products)
    distances = np.maximum(squares[:, None] - 2 * products + squares, 0.0)
    np.fill_diagonal(distances, 0.0)
    return np.asarray(distances)
