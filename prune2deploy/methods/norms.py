"""Batch norms of a masked network, measured anew: methods that judge it so give it so, too."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy.groups import Groups
from prune2deploy.masks import Masks

if TYPE_CHECKING:
    from torch import nn


def masked_and_measured(module: "nn.Module", groups: Groups, masks: Masks, images: Iterable[Any]) -> "nn.Module":
    """Return a masked copy of a network, the statistics of its norms measured on batches of one size."""
    from prune2deploy.apply import apply_masks
    from prune2deploy.train import measure_norms

    masked = copy.deepcopy(module)
    apply_masks(masked, groups, masks)
    measure_norms(masked, images)
    return masked


def statistics_of(module: "nn.Module") -> dict[str, np.ndarray]:
    """Return the running means and variances of a network's batch norms, as `methods.base.PruneResult.weights`."""
    from prune2deploy.apply import weights_of
    from prune2deploy.train.accuracy import BATCH_NORMS

    parts = ((name, part) for name, part in module.named_modules() if isinstance(part, BATCH_NORMS))
    norms = [name for name, part in parts if part.track_running_stats]
    weights = weights_of(module)
    return {full: weights[full] for name in norms for full in (f"{name}.running_mean", f"{name}.running_var")}
