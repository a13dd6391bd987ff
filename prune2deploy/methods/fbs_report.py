"""What gates of feature boosting and suppression do with images: what they choose, cost, and gain."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prune2deploy.budget import Budget
from prune2deploy.groups import Group
from prune2deploy.methods.base import Context, per_channel
from prune2deploy.methods.fbs_cost import ROUNDING, Wiring

if TYPE_CHECKING:
    from torch import nn

    from prune2deploy.train.boosting import Usage

STATIC = (
    "static=true is another method (static), not FBS: its gates are folded to their averages, and channels that the "
    "calibration images never use are removed"
)


class Observed(NamedTuple):
    """What was seen: the usage of every gate, and the names of layers whose input is not as sparse as was thought."""

    usage: "Mapping[str, Usage]"
    dense: frozenset[str]


def observed(module: "nn.Module", wiring: Wiring, images: Any, count: int) -> Observed:
    """Return what the gates choose, and which layers read more than they should."""
    from prune2deploy.train.boosting import observe

    full = wiring.groups.full_widths()
    readers = wiring.readers()
    modules = dict(module.named_modules())
    sizes = {path: int(layer.in_width.at(full)) for path, layer in readers.items() if path in modules}
    usage, counts = observe(module, images, count, sizes)
    widths = wiring.widths(active(usage))
    dense = {
        layer.name
        for path, layer in readers.items()
        if path not in counts or (counts[path].numpy() > layer.in_width.at(widths) + ROUNDING).any()
    }
    return Observed(usage, frozenset(dense))


def active(usage: "Mapping[str, Usage]") -> dict[str, np.ndarray]:
    """Return how many channels of every gate are active, path -> int64 [images]."""
    return {path: found.masks.sum(1).numpy() for path, found in usage.items()}


def mean_scores(wiring: Wiring, usage: "Mapping[str, Usage]") -> dict[str, np.ndarray]:
    """Return group id -> mean of m g over the images, each gate's in units of its average, float64 [channels]."""
    boosts = {path: found.boost.numpy() for path, found in usage.items()}
    found = {}
    for group in wiring.groups.prunable:
        parts = [part.mean(axis=1) for part in of_group(wiring, group, boosts)]
        if parts:
            found[group.id] = np.mean([part / (part.mean() or 1.0) for part in parts], axis=0)
    return found


def of_group(wiring: Wiring, group: Group, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return what the gates that make a group's channels say of them, each [channels, places]."""
    paths = {gate.layer: path for path, gate in wiring.gates.items()}
    return [
        per_channel(values[paths[member.layer]], 0, member.indices)
        for member in group.of_role("filter")
        if member.layer in paths
    ]


def mean_cost(wiring: Wiring, usage: "Mapping[str, Usage]", dense: frozenset[str]) -> dict[str, Any]:
    """Return what an image costs a runtime that skips what is suppressed: the mean, and how far images differ."""
    costs = np.asarray(wiring.macs(active(usage), dense), dtype=np.float64)
    network = wiring.groups.cost.macs(wiring.groups.full_widths())
    return {
        "what": "mean over images for a runtime that skips suppressed channels, predictors included; no static cost",
        "mean": float(costs.mean()),
        "deviation": float(costs.std()),
        "smallest": float(costs.min()),
        "largest": float(costs.max()),
        "images": len(costs),
        "network": int(network),
        "predictors": wiring.overhead,
        "share": float(costs.mean() / network),
        "read_whole": sorted(dense),
    }


def holdout_top1(module: "nn.Module", usage: "Mapping[str, Usage]", context: Context) -> dict[str, float]:
    """Return the held-out accuracy as it is, and with every layer's most frequent mask for all images."""
    from copy import deepcopy

    from prune2deploy.train import measure
    from prune2deploy.train.boosting import boosted_layers

    if context.holdout is None:
        return {}
    frozen = deepcopy(module)
    for path, gate in boosted_layers(frozen).items():
        gate.fixed = usage[path].most_frequent.to(gate.bias.device)
    own = measure(module, context.holdout)
    return {
        "own_masks": own.top1,
        "most_frequent_masks": measure(frozen, context.holdout).top1,
        "images": own.images,
    }


def warnings(
    cost: Mapping[str, Any], usage: "Mapping[str, Usage]", holdout: Mapping[str, float], budget: Budget
) -> list[str]:
    """Return what must be said of a network that is smaller for some runtimes only."""
    lines = [
        f"'fbs' keeps gates in the network and removes nothing: every graph does all MACs, and the predictors'. A "
        f"runtime that skips suppressed channels would do {cost['mean']:,.0f} MACs an image, {cost['share']:.1%} of "
        f"the dense network's (mean of {cost['images']:,} images, {cost['smallest']:,.0f} to {cost['largest']:,.0f})"
    ]
    if budget.target is not None and cost["share"] > budget.target.share:
        lines.append(
            f"'fbs': layers read channels that are not zero where gates suppress them ({', '.join(cost['read_whole'])})"
            f", so the mean cost is above {budget.target}"
        )
    fixed = sum(found.distinct == 1 for found in usage.values())
    if fixed:
        lines.append(f"'fbs': {fixed} of {len(usage)} gates have one mask for all images: there the choice is static")
    if holdout and holdout["most_frequent_masks"] >= holdout["own_masks"]:
        lines.append(
            f"'fbs': with every layer's most frequent mask for all images the accuracy on {holdout['images']:,} "
            f"held-out ones is no lower ({holdout['most_frequent_masks']:.2%} against {holdout['own_masks']:.2%})"
        )
    return lines


def used_channels(wiring: Wiring, usage: "Mapping[str, Usage]", budget: Budget) -> dict[str, np.ndarray]:
    """Return masks of the channels that some image used, of any of the gates that make them.

    Groups that a layer without a gate makes as well stay whole. Where fewer are used than must stay, the first of the
    others stay too.
    """
    used = {path: found.masks.any(0).numpy() for path, found in usage.items()}
    keep = {}
    for group in wiring.groups.groups:
        makers = [member for member in group.of_role("filter") if member.layer not in wiring.followers]
        parts = of_group(wiring, group, used)
        mask = np.ones(group.size, dtype=np.bool_)
        if parts and len(parts) == len(makers):
            mask = np.any(np.concatenate(parts, axis=1), axis=1)
            missing = min(group.size, max(budget.min_keep, budget.floors.get(group.id, 1))) - int(mask.sum())
            mask[np.flatnonzero(~mask)[: max(0, missing)]] = True
        keep[group.id] = mask
    return keep


def static_report(usage: "Mapping[str, Usage]", share: float, budget: Budget) -> dict[str, Any]:
    """Return what folded gates have to say of themselves; ``share`` is what is left of the MACs."""
    lines = [STATIC]
    if budget.target is not None and share > budget.target.share:
        lines.append(
            f"'fbs' with static=true is not held to a target: {share:.1%} of the MACs are left, where {budget.target} "
            "was asked for"
        )
    return {
        "what": STATIC,
        "images": len(next(iter(usage.values())).masks),
        "distinct_masks": {path: found.distinct for path, found in usage.items()},
        "warnings": lines,
    }
