"""What methods measure of filters, one by one or by their distances, and which filters make a group."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from prune2deploy.groups import Group, Groups, Layer, Member
from prune2deploy.methods.base import Weights, array, of_channels

Measure = Callable[[np.ndarray], np.ndarray]
"""From a layer's filters, float64 [channels, everything else], to one number per channel, not negative."""


def filter_scores(weights: Weights, groups: Groups, measure: Measure) -> dict[str, np.ndarray]:
    """Return group id -> float64 [channels] for the prunable groups that layers with weights produce.

    A group that several layers produce (a residual stage, a depthwise convolution on the way) gets the mean of their
    measures, each in units of that layer's average over the group's channels: so no layer outweighs another because it
    is larger, and the scores of every group average 1. A layer whose measures are all zero has no say.
    """
    scored = {group.id: _score(weights, group, measure) for group in groups.prunable}
    return {group: score for group, score in scored.items() if score is not None}


def _score(weights: Weights, group: Group, measure: Measure) -> np.ndarray | None:
    """Return the group's scores, or None where no layer with weights produces it."""
    found = [measure(of_channels(weights, member)) for member in group.of_role("filter")]
    if not found:
        return None
    shares = [values / values.mean() for values in found if values.any()]
    return np.mean(shares, axis=0) if shares else np.zeros(group.size)


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


def is_depthwise(weights: Weights, layer: Layer) -> bool:
    """Whether the layer makes every output channel of the input channel at the same place."""
    if layer.op_type != "Conv" or layer.weight is None or layer.in_width != layer.out_width:
        return False
    return bool(layer.in_width.terms) and array(weights, layer.weight).shape[1] == 1


def producers(weights: Weights, groups: Groups, group: Group) -> list[Member]:
    """Return the filters that make a group's channels; depthwise ones on the way only pass them on."""
    return [
        member
        for member in group.of_role("filter")
        if member.layer not in groups.layer_by_name or not is_depthwise(weights, groups.layer_by_name[member.layer])
    ]


def in_scope(weights: Weights, groups: Groups, group: Group, scope: Literal["all", "inner"]) -> bool:
    """Whether a method of that scope prunes the group; ``inner`` is what one layer makes, not a stage's output."""
    return scope == "all" or len(producers(weights, groups, group)) == 1
