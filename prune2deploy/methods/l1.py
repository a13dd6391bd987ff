"""L1: the sum of a filter's absolute weights."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from prune2deploy.groups import Groups
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, Weights
from prune2deploy.methods.filters import filter_scores


@final
@dataclass(frozen=True)
class L1(Method):
    """Score a filter by the sum of its absolute weights (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017).

    Where several layers make a channel together (a residual stage), each counts alike, in units of its own mean; that
    is ours, for the paper prunes each layer on its own.
    """

    needs: ClassVar[Needs] = Needs()

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]; a function of the filters alone."""
        return filter_scores(weights, groups, lambda filters: np.abs(filters).sum(axis=1))
