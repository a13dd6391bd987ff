"""What masks do to arrays, whatever holds them: which entries become zero, and what folded means add."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prune2deploy.errors import InputError
from prune2deploy.groups import SILENCED_ROLES, Group, Groups, Layer, Member
from prune2deploy.masks import Masks

Arrays = Mapping[str, np.ndarray]
"""Parameter or initializer name -> array."""


def removed_channels(groups: Groups, masks: Masks) -> list[tuple[Group, np.ndarray]]:
    """Return the groups that lose channels with the positions [removed] of these.

    Raises:
        InputError: if masks and groups do not fit each other.
    """
    found = []
    for name, mask in masks.items():
        if name not in groups.by_id:
            raise InputError(
                f"the masks name a group '{name}' that the network does not have; use the masks of this network"
            )
        group = groups[name]
        if mask.shape != (group.size,) or mask.dtype != np.bool_:
            raise InputError(
                f"the mask of group '{name}' is {mask.dtype} {list(mask.shape)}, but bool [{group.size}] is wanted; "
                "use the masks of this network"
            )
        if not mask.all() and not group.prunable:
            raise InputError(
                f"the masks remove channels of group '{name}', which cannot be pruned: {group.kept_because}"
            )
        if not mask.all():
            found.append((group, np.flatnonzero(~mask)))
    return found


def silenced(groups: Groups, masks: Masks) -> dict[tuple[str, int], np.ndarray]:
    """Return (parameter, axis) -> the int64 indices [removed] along the axis that masks zero.

    Raises:
        InputError: if masks and groups do not fit each other.
    """
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for group, removed in removed_channels(groups, masks):
        for member in group.of_role(*SILENCED_ROLES):
            found.setdefault((member.parameter, member.axis), []).append(member.indices[removed].ravel())
    return {key: np.unique(np.concatenate(parts)).astype(np.int64) for key, parts in found.items()}


def folded_means(
    weights: Arrays,
    groups: Groups,
    masks: Masks,
    offsets: Arrays,
    refused: Mapping[str, str] | None = None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return what to add to which vector so that readers see removed channels' means, and why the other readers cannot.

    The running mean of the norm that follows a reader falls by ``sum over taps of W[:, c] * offset[c]``; without such a
    norm the reader's bias rises by it. Exact for a channel that is the constant, except at the border of a zero-padded
    reader. Left as they are, each with a line in the result: readers with neither norm nor bias, grouped convolutions
    (the group does not say which rows read a channel) and transposed ones (taps differ between positions).

    Args:
        weights: as they were before any mask or fold.
        groups: the network's groups.
        masks: which channels are removed.
        offsets: `methods.base.PruneResult.offsets`.
        refused: weights of readers that must stay as they are -> why.

    Returns:
        parameter name -> float64 [outputs], and the lines.

    Raises:
        InputError: if masks and groups do not fit each other.
    """
    removed_channels(groups, masks)
    shifts: dict[str, np.ndarray] = {}
    skipped = []
    for group_id, offset in offsets.items():
        removed_offset = np.where(masks[group_id], 0.0, offset)
        for member in groups[group_id].of_role("reader") if removed_offset.any() else []:
            fold = (refused or {}).get(member.parameter) or fold_place(weights, groups, member)
            if isinstance(fold, str):
                skipped.append(f"the means of removed channels of '{group_id}' are not folded: {fold}")
                continue
            shift = fold.sign * _shift(weights, member, removed_offset)
            shifts[fold.parameter] = shifts.get(fold.parameter, 0.0) + shift
    return shifts, skipped


@dataclass(frozen=True)
class FoldPlace:
    """The parameter that takes a constant, and with which sign."""

    parameter: str
    sign: float


def fold_place(weights: Arrays, groups: Groups, reader: Member) -> FoldPlace | str:
    """Return where a reader's constant goes, or why it can go nowhere."""
    layer = groups.layer_by_name[reader.layer]
    dense_width = layer.in_width.at(groups.full_widths())
    if layer.op_type == "ConvTranspose":
        return f"'{layer.name}' is a transposed convolution"
    if weights[reader.parameter].shape[reader.axis] != dense_width:
        return f"'{layer.name}' is a grouped convolution"
    norm: Layer | None = groups.layer_by_name[layer.norm] if layer.norm else None
    if norm is not None and norm.mean is not None and norm.mean in weights:
        return FoldPlace(norm.mean, -1.0)
    if layer.bias is not None and layer.bias in weights:
        return FoldPlace(layer.bias, 1.0)
    return f"'{layer.name}' has no bias and no norm behind it"


def _shift(weights: Arrays, reader: Member, offset: np.ndarray) -> np.ndarray:
    """Return by how much each output channel of a reader grows when its input channels grow by ``offset``."""
    weight = weights[reader.parameter].astype(np.float64)
    by_input = np.moveaxis(weight, (reader.axis, 1 - reader.axis), (0, 1))  # [inputs, outputs, taps...]
    taps_summed = by_input.reshape(*by_input.shape[:2], -1).sum(axis=2)
    by_channel = taps_summed[reader.indices].sum(axis=1)  # [channels, outputs]
    total: np.ndarray = offset @ by_channel
    return total
