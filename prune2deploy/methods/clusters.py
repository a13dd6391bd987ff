"""Clusters of filters: by k-means, how far their members are apart, and their means in every place."""

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from prune2deploy.errors import DeviceError
from prune2deploy.groups import COPIED_ROLES, Groups
from prune2deploy.methods.base import Weights, named, of_channels

_OWN_SIZE = frozenset({"filter", "var"})
"""Roles whose deviation counts in units of the cluster's own size: a norm behind them takes their size away."""

_DEAD = 1e-3
"""Below this share of the layer's typical size, a cluster's own size is no unit any more."""


class Clusters(NamedTuple):
    """The clusters of a group: the channel that each merges into, int64 [channels], and scores, float64 [channels]."""

    kept: np.ndarray
    scores: np.ndarray


class Deviation(NamedTuple):
    """How far a parameter's channels are from the means of their clusters, at most; relative."""

    group: str
    parameter: str
    role: str
    value: float


def kmeans(filters: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Return the clusters 0..count-1 of filters, int64 [filters], every one of them with a filter at least.

    Equal filters are one point, of their weight; they part only where there are fewer points than clusters. Points are
    sorted by length, so that clusters move with their filters.

    Raises:
        DeviceError: if scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        message = "scikit-learn is not installed, which method 'csgd' needs; pip install 'prune2deploy[torch]'"
        raise DeviceError(message) from error
    points, point_of, weight = np.unique(filters, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(-np.linalg.norm(points, axis=1), kind="stable")
    of_point = np.empty(len(points), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # which may come of points that are nearly equal
        model = KMeans(min(count, len(points)), n_init=10, random_state=seed)
        of_point[order] = model.fit(points[order], sample_weight=weight[order].astype(np.float64)).labels_
    _, labels = np.unique(of_point[point_of.ravel()], return_inverse=True)
    while labels.max() + 1 < count:
        largest = np.bincount(labels).argmax()
        labels[np.flatnonzero(labels == largest)[-1]] = labels.max() + 1
    return np.asarray(labels, dtype=np.int64)


def with_largest(filters: np.ndarray, labels: np.ndarray) -> Clusters:
    """Return the clusters with each one's largest filter as the channel that stays, and the channels' scores."""
    lengths = np.linalg.norm(filters, axis=1)
    order = np.lexsort((-lengths, labels))
    kept = order[np.searchsorted(labels[order], np.arange(labels.max() + 1))][labels]
    distances = np.linalg.norm(filters - filters[kept], axis=1)
    typical = float(lengths.mean()) or 1.0
    scores = distances / (distances + typical)
    stays = kept == np.arange(len(kept))
    scores[stays] = 1 + np.bincount(labels)[labels[stays]] / len(labels)
    return Clusters(kept.astype(np.int64), scores)


def _means(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return for every row of [channels, ...] the mean of its cluster, in float64."""
    _, labels = np.unique(kept, return_inverse=True)
    sums = np.zeros((labels.max() + 1, *values.shape[1:]))
    np.add.at(sums, labels, values)
    counts = np.bincount(labels).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray((sums / counts)[labels])


def deviations(weights: Weights, groups: Groups, merges: Mapping[str, np.ndarray]) -> Iterator[Deviation]:
    """Yield how far every parameter and statistic of the merged groups is from its clusters' means."""
    for group_id, kept in merges.items():
        for member in groups[group_id].of_role(*COPIED_ROLES):
            values = of_channels(weights, member)
            means = _means(values, kept)
            far, own = np.linalg.norm(values - means, axis=1), np.linalg.norm(means, axis=1)
            typical = math.sqrt(float((values**2).sum(axis=1).mean()))
            unit = np.maximum(own, typical * (_DEAD if member.role in _OWN_SIZE else 1.0))
            worst = float(np.divide(far, unit, out=np.zeros_like(far), where=unit > 0).max())
            yield Deviation(group_id, member.parameter, member.role, worst)


def merged(weights: Weights, groups: Groups, merges: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the parameters and statistics of merged groups with their clusters' means, the same bits in each place."""
    found: dict[str, np.ndarray] = {}
    for group_id, kept in merges.items():
        for member in groups[group_id].of_role(*COPIED_ROLES):
            values = found.setdefault(member.parameter, np.array(named(weights, member.parameter)))
            places = np.moveaxis(values, member.axis, 0)
            places[member.indices] = _means(places[member.indices].astype(np.float64), kept)
    return found
