"""Widths that grow together with one number t, each group's in proportion to its importance."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prune2deploy.budget import Budget, share
from prune2deploy.cost import Widths
from prune2deploy.groups import Groups

PRECISION = 1e-9
"""Of t, relative. (Bisection takes some thirty steps, and more where a group has next to no importance.)"""


@dataclass(frozen=True, eq=False)
class Line:
    """How wide groups are at t: ``clip(t * slope, lowest / size, 1) * size``, rounded.

    Attributes:
        slopes: group id -> importance in units of the largest, from 0 to 1.
        sizes: group id -> number of channels.
        lowest: group id -> smallest width.
    """

    slopes: Mapping[str, float]
    sizes: Mapping[str, int]
    lowest: Mapping[str, int]

    @staticmethod
    def of(importance: Mapping[str, float], groups: Groups, budget: Budget, least: float) -> "Line":
        """Return the line of these importances; where all are 0 they are all the same."""
        largest = max(importance.values(), default=0.0)
        sizes = {group: groups[group].size for group in importance}
        return Line(
            slopes={group: value / largest if largest else 1.0 for group, value in importance.items()},
            sizes=sizes,
            lowest={
                group: max(1, budget.min_keep, budget.floors.get(group, 0), _nearest(least * size))
                for group, size in sizes.items()
            },
        )

    @property
    def end(self) -> float:
        """The t at which all groups of any importance are whole."""
        return max((1 / slope for slope in self.slopes.values() if slope), default=1.0)

    def at(self, t: float) -> dict[str, int]:
        """Return the widths at t."""
        return {
            group: min(size, max(self.lowest[group], _nearest(t * self.slopes[group] * size)))
            for group, size in self.sizes.items()
        }

    def scores(self) -> dict[str, np.ndarray]:
        """Return scores whose threshold is ``-t``: of the channel number k (from 1) the t at which the width gets k."""
        tiny = np.finfo(np.float64).tiny
        return {
            group: -(np.arange(size) + 0.5) / size / max(self.slopes[group], tiny) for group, size in self.sizes.items()
        }


def _nearest(width: float) -> int:
    return int(np.floor(width + 0.5))


def bisected(line: Line, groups: Groups, budget: Budget) -> float:
    """Return the largest t, but for `PRECISION`, at which the widths (unrounded) meet the target."""
    assert budget.target is not None, "only a target is searched"
    full, target = groups.full_widths(), budget.target

    def fits(there: Widths) -> bool:
        return share(groups, target.kind, {**full, **there}) <= target.share

    low, high = 0.0, line.end
    if fits(line.at(high)):
        return high
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(line.at(middle)) else (low, middle)
    return low
