"""L2: the Euclidean norm of a filter."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from prune2deploy.groups import Groups
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, Weights
from prune2deploy.methods.filters import filter_scores


@final
@dataclass(frozen=True)
class L2(Method):
    """Score a filter by its Euclidean norm (as in He et al., Soft Filter Pruning, IJCAI 2018, arXiv 1808.06866).

    Of that paper only the criterion: its filters come back while it trains. Where several layers make a channel
    together (a residual stage), each counts alike, in units of its own mean; that is ours.
    """

    needs: ClassVar[Needs] = Needs()

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]; a function of the filters alone."""
        return filter_scores(weights, groups, lambda filters: np.linalg.norm(filters, axis=1))
