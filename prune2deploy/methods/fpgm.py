"""FPGM: how far a filter is from the others of its layer."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from prune2deploy.groups import Groups
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, Weights
from prune2deploy.methods.filters import filter_scores, squared_distances


@final
@dataclass(frozen=True)
class FPGM(Method):
    """Score a filter by the sum of its Euclidean distances to the layer's other filters.

    The filter with the smallest sum is the one nearest the geometric median, which the others stand in for best (He et
    al., Filter Pruning via Geometric Median, CVPR 2019, arXiv 1811.00250). Where several layers make a channel together
    (a residual stage), each counts alike, in units of its own mean; that is ours.
    """

    needs: ClassVar[Needs] = Needs()

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]; a function of the filters alone."""
        return filter_scores(weights, groups, distance_sums)


def distance_sums(filters: np.ndarray) -> np.ndarray:
    """Return the sum of each row's Euclidean distances to all rows, float64 [rows]; rows are [rows, weights]."""
    return np.asarray(np.sqrt(squared_distances(filters)).sum(axis=1))
