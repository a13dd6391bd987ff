"""EPruner: the exemplars that affinity propagation finds among a layer's filters."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple, final

import numpy as np

from prune2deploy.budget import Budget, Ranking, share
from prune2deploy.errors import DeviceError
from prune2deploy.groups import Group, Groups
from prune2deploy.methods.base import (
    NO_CONTEXT,
    Context,
    Method,
    Needs,
    PruneResult,
    Range,
    Weights,
    named,
    of_channels,
)
from prune2deploy.methods.filters import in_scope, producers, squared_distances

_PAPERS_PREFERENCE = 0.76
"""For ResNet-56 on CIFAR-10; what scores are taken at where nothing is searched."""

_SEARCH_STEPS = 12
_MOST_PREFERENCE = 64.0

_ATTEMPTS = ((1000, 50), (5000, 50), (5000, 200))
"""Iterations at most, and for how many the exemplars must stay the same, one attempt after the other.

scikit-learn's 15 can stop on a passing state where filters are nearly equal: one exemplar in place of twelve.
"""

Distances = Mapping[str, np.ndarray]
"""Group id -> squared distances of its filters, float64 [channels, channels]."""

_NEW_NORM = {"scale": 1.0, "shift": 0.0, "mean": 0.0, "var": 1.0}


@final
@dataclass(frozen=True)
class EPruner(Method):
    """Keep a layer's exemplar filters (Lin et al., Network Pruning Using Adaptive Exemplar Filters, TNNLS 2022).

    arXiv 2101.07985, after the authors' code (the paper's text was not read): affinity propagation on the negative
    squared distances of the flattened filters, filter k's preference being ``preference`` times the median of its
    column. The exemplars stay with their weights, and the norms of pruned layers start anew: the network is of no use
    before it is fine-tuned. How many exemplars there are is the algorithm's choice; more preference gives fewer.

    Ours: the preference with which the exemplars meet the target best, from below, is searched, and what is left is
    filled with the filters that their exemplars represent worst; where exemplars have to go (widths are rounded, or the
    preference was given), those of the smallest clusters go first. The filters of several layers that make one group
    are put side by side, each in units of its layer's mean length.

    Attributes:
        preference: 0 searches it; above 0 it is this one, and the target is met by filling or taking away.
        scope: ``inner``, as the paper: groups that one layer makes, so that a stage's output stays whole; or ``all``.
        norms: ``reset``, as the paper: scale 1, shift 0, mean 0, variance 1 behind pruned layers; or ``keep``.
        damping: of the messages.
        seed: of the noise that breaks ties (scikit-learn's, at the size of rounding).
    """

    needs: ClassVar[Needs] = Needs(pretrained=True)
    ranking: ClassVar[Ranking] = "global"

    preference: Annotated[float, Range(low=0)] = 0.0
    scope: Literal["inner", "all"] = "inner"
    norms: Literal["reset", "keep"] = "reset"
    damping: Annotated[float, Range(low=0.5, high=0.99)] = 0.5
    seed: Annotated[int, Range(low=0)] = 0

    @property
    def needs_finetuning(self) -> str | None:
        """Why the network is of no use before it was trained, if norms start anew."""
        return "starts norms anew (--option norms=keep leaves them)" if self.norms == "reset" else None

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]: above 1 for exemplars, by cluster; else how badly it is represented.

        The context's state is the clusters that `plan` found; without it they are looked for.

        Raises:
            DeviceError: if scikit-learn is not installed.
        """
        clusters = context.state
        if clusters is None:
            clusters = self._clusters(self._distances(weights, groups), self.preference or _PAPERS_PREFERENCE)
        return {group: _score(found) for group, found in clusters.items()}

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return the masks of the preference that was given or found; arguments and errors are `Method.plan`'s."""
        distances = self._distances(weights, groups)
        preference, clusters = self._found(distances, groups, budget)
        result = super().plan(weights, groups, budget, replace(context, state=clusters))
        own = {
            "preference": preference,
            "exemplars": _counts(clusters),
            "not_converged": [group for group, found in clusters.items() if not found.converged],
            "scope": self.scope,
            "norms": self.norms,
        }
        return replace(result, report=result.report | own)

    def new_weights(self, weights: Weights, groups: Groups, keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the norms that start anew: those that carry the channels of groups that lost some."""
        found: dict[str, np.ndarray] = {}
        for group in groups.prunable if self.norms == "reset" else ():
            if keep[group.id].all():
                continue
            for member in group.of_role(*_NEW_NORM):
                values = found.setdefault(member.parameter, np.array(named(weights, member.parameter)))
                np.moveaxis(values, member.axis, 0)[member.indices] = _NEW_NORM[member.role]
        return found

    def _found(self, distances: Distances, groups: Groups, budget: Budget) -> "tuple[float, dict[str, Clusters]]":
        """Return the preference that was given, or whose exemplars best meet the target from below, and its clusters.

        More preference gives fewer exemplars, in practice but not always; so the best of those tried is taken.
        """
        if self.preference or budget.target is None:
            preference = self.preference or _PAPERS_PREFERENCE
            return preference, self._clusters(distances, preference)
        target, low, high = budget.target, 0.0, 1.0
        seen: dict[float, float] = {}
        clusters = {}

        def too_much(preference: float) -> bool:
            clusters[preference] = self._clusters(distances, preference)
            seen[preference] = share(groups, target.kind, groups.full_widths() | _counts(clusters[preference]))
            return seen[preference] > target.share

        while too_much(high) and high < _MOST_PREFERENCE:
            low, high = high, 2 * high
        for _ in range(_SEARCH_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if too_much(middle) else (low, middle)
        within = [preference for preference in seen if seen[preference] <= target.share]
        best = max(within, key=seen.__getitem__) if within else min(seen, key=seen.__getitem__)
        return best, clusters[best]

    def _distances(self, weights: Weights, groups: Groups) -> Distances:
        found = {}
        for group in groups.prunable:
            if producers(weights, groups, group) and in_scope(weights, groups, group, self.scope):
                found[group.id] = squared_distances(_rows(weights, group))
        return found

    def _clusters(self, distances: Distances, preference: float) -> dict[str, "Clusters"]:
        return {
            group: exemplars_of(own, preference, damping=self.damping, seed=self.seed)
            for group, own in distances.items()
        }


class Clusters(NamedTuple):
    """What affinity propagation found among filters.

    Attributes:
        exemplars: int64 [clusters], ascending.
        of: the exemplar of every filter, int64 [filters].
        distances: squared distances, float64 [filters, filters].
        converged: whether it did; if not, every filter is its own exemplar.
    """

    exemplars: np.ndarray
    of: np.ndarray
    distances: np.ndarray
    converged: bool


def _counts(clusters: Mapping[str, Clusters]) -> dict[str, int]:
    return {group: len(found.exemplars) for group, found in clusters.items()}


def exemplars_of(distances: np.ndarray, preference: float, *, damping: float = 0.5, seed: int = 0) -> Clusters:
    """Return clusters and their exemplars by squared distances, [filters, filters] (Frey, Dueck, Science 315, 2007).

    Raises:
        DeviceError: if scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import AffinityPropagation
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        message = "scikit-learn is not installed, which method 'epruner' needs; pip install 'prune2deploy[torch]'"
        raise DeviceError(message) from error
    count = len(distances)
    preferences = preference * np.median(-distances, axis=0)
    for iterations, steady in _ATTEMPTS if count > 1 else ():
        propagation = AffinityPropagation(
            damping=damping,
            max_iter=iterations,
            convergence_iter=steady,
            affinity="precomputed",
            preference=preferences,
            random_state=seed,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            propagation.fit(-distances)
        if not any(issubclass(one.category, ConvergenceWarning) for one in caught):
            exemplars = propagation.cluster_centers_indices_.astype(np.int64)
            return Clusters(np.sort(exemplars), exemplars[propagation.labels_], distances, True)
    everyone = np.arange(count)
    return Clusters(everyone, everyone, distances, count == 1)


def _score(found: Clusters) -> np.ndarray:
    count = len(found.of)
    nearest = found.distances[np.arange(count), found.of]
    typical = float(np.median(found.distances)) or 1.0
    score = nearest / (nearest + typical)
    score[found.exemplars] = 1 + np.bincount(found.of, minlength=count)[found.exemplars] / count
    return np.asarray(score)


def _rows(weights: Weights, group: Group) -> np.ndarray:
    """Return the filters of a group's channels, float64 [channels, weights]."""
    rows = [of_channels(weights, member) for member in group.of_role("filter")]
    if len(rows) == 1:
        return rows[0]
    return np.concatenate([part / (np.linalg.norm(part, axis=1).mean() or 1.0) for part in rows], axis=1)
