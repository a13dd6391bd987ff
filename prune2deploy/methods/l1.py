"""L1: the sum of a filter's absolute weights."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from prune2deploy.groups import Group, Groups
from prune2deploy.methods.base import Method, Needs, Weights, array, per_channel


@final
@dataclass(frozen=True)
class L1(Method):
    """Score a filter by the sum of its absolute weights (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017).

    A group that several layers produce (a residual stage, a depthwise convolution on the way) gets the mean of their
    sums, each in units of that layer's average over the group's channels: so no layer outweighs another because it
    is larger, and the scores of every group average 1. A layer that is all zero has no say.
    """

    needs: ClassVar[Needs] = Needs()

    def scores(self, weights: Weights, groups: Groups, state: Any = None) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]; a function of the filters alone."""
        scored = {group.id: _score(weights, group) for group in groups.prunable}
        return {group: score for group, score in scored.items() if score is not None}


def _score(weights: Weights, group: Group) -> np.ndarray | None:
    """Return the group's scores, or None where no layer with weights produces it."""
    sums = [
        np.abs(per_channel(array(weights, member.parameter), member.axis, member.indices)).sum(axis=1)
        for member in group.of_role("filter")
    ]
    if not sums:
        return None
    shares = [total / total.mean() for total in sums if total.any()]
    return np.mean(shares, axis=0) if shares else np.zeros(group.size)
