"""Masks on a torch network: silence the removed channels, keep them silent while training, fold in their means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prune2deploy.errors import InputError
from prune2deploy.groups import SILENCED_ROLES, Group, Groups, Layer, Member
from prune2deploy.masks import Masks

if TYPE_CHECKING:
    from torch import Tensor, nn


def weights_of(module: "nn.Module") -> dict[str, np.ndarray]:
    """Return copies of a network's parameters and buffers by name; bfloat16 becomes float32."""
    import torch

    found = {}
    for name, tensor in module.state_dict().items():
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        found[name] = wide.detach().cpu().numpy().copy()
    return found


def apply_masks(module: "nn.Module", groups: Groups, masks: Masks) -> None:
    """Silence the removed channels in place: zero their filters, biases, and norm scales and shifts.

    Raises:
        InputError: if masks and groups do not fit each other or the module.
    """
    import torch

    tensors = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for (name, axis), indices in _silenced(groups, masks).items():
            tensor = _tensor(tensors, name, axis, indices)
            tensor.index_fill_(axis, torch.from_numpy(indices).to(tensor.device), 0.0)


class MaskKeeper:
    """Keeps masked channels silent while a network trains: call it after every step of the optimizer.

    Make it when the module is where it will train (its index tensors lie on the same device).

    Raises:
        InputError: if masks and groups do not fit each other or the module.
    """

    def __init__(self, module: "nn.Module", groups: Groups, masks: Masks) -> None:
        import torch

        tensors = module.state_dict(keep_vars=True)
        factors: dict[str, Tensor] = {}
        for (name, axis), indices in _silenced(groups, masks).items():
            tensor = _tensor(tensors, name, axis, indices)
            factor = factors.setdefault(name, torch.ones_like(tensor, requires_grad=False))
            factor.index_fill_(axis, torch.from_numpy(indices).to(tensor.device), 0.0)
        self._tensors = [tensors[name] for name in factors]
        self._factors = list(factors.values())

    def __call__(self) -> None:
        """Zero the removed channels again, in place."""
        import torch

        if self._tensors:
            with torch.no_grad():
                torch._foreach_mul_(self._tensors, self._factors)  # few kernels for all tensors, as optimizers do it
                torch._foreach_add_(self._tensors, 0.0)  # a negative weight became -0.0; adding 0 makes it 0.0


def fold_offsets(module: "nn.Module", groups: Groups, masks: Masks, offsets: Mapping[str, np.ndarray]) -> list[str]:
    """Give the readers of removed channels constants in their place, in place; return the readers that have none.

    The running mean of the norm that follows a reader falls by ``sum over taps of W[:, c] * offset[c]``; without such a
    norm the reader's bias rises by it. Exact for a channel that is the constant, except at the border of a zero-padded
    reader. Left as they are, each with a line in the result: readers with neither norm nor bias, grouped convolutions
    (the group does not say which rows read a channel) and transposed ones (taps differ between positions).

    Call it once, before `apply_masks`: the weights are read as they are, and a second call folds again.

    Args:
        module: the network.
        groups: its groups.
        masks: which channels are removed.
        offsets: `methods.base.PruneResult.offsets`.

    Raises:
        InputError: if masks and groups do not fit each other or the module.
    """
    import torch

    _removed(groups, masks)
    weights = weights_of(module)
    tensors = module.state_dict(keep_vars=True)
    skipped = []
    for group_id, offset in offsets.items():
        removed_offset = np.where(masks[group_id], 0.0, offset)
        for member in groups[group_id].of_role("reader") if removed_offset.any() else []:
            fold = _fold_place(weights, groups, member)
            if isinstance(fold, str):
                skipped.append(f"the means of removed channels of '{group_id}' are not folded: {fold}")
                continue
            shift = fold.sign * _shift(weights, member, removed_offset)
            tensor = tensors[fold.parameter]
            with torch.no_grad():
                # Added in float64, rounded once.
                tensor.copy_((tensor.double().cpu() + torch.from_numpy(shift)).to(tensor.dtype))
    return skipped


@dataclass(frozen=True)
class _FoldPlace:
    """The parameter that takes a constant, and with which sign."""

    parameter: str
    sign: float


def _fold_place(weights: Mapping[str, np.ndarray], groups: Groups, reader: Member) -> _FoldPlace | str:
    """Return where a reader's constant goes, or why it can go nowhere."""
    layer = groups.layer_by_name[reader.layer]
    dense_width = layer.in_width.at(groups.full_widths())
    if layer.op_type == "ConvTranspose":
        return f"'{layer.name}' is a transposed convolution"
    if weights[reader.parameter].shape[reader.axis] != dense_width:
        return f"'{layer.name}' is a grouped convolution"
    norm: Layer | None = groups.layer_by_name[layer.norm] if layer.norm else None
    if norm is not None and norm.mean is not None and norm.mean in weights:
        return _FoldPlace(norm.mean, -1.0)
    if layer.bias is not None and layer.bias in weights:
        return _FoldPlace(layer.bias, 1.0)
    return f"'{layer.name}' has no bias and no norm behind it"


def _shift(weights: Mapping[str, np.ndarray], reader: Member, offset: np.ndarray) -> np.ndarray:
    """Return by how much each output channel of a reader grows when its input channels grow by ``offset``."""
    weight = weights[reader.parameter].astype(np.float64)
    by_input = np.moveaxis(weight, (reader.axis, 1 - reader.axis), (0, 1))  # [inputs, outputs, taps...]
    taps_summed = by_input.reshape(*by_input.shape[:2], -1).sum(axis=2)
    by_channel = taps_summed[reader.indices].sum(axis=1)  # [channels, outputs]
    total: np.ndarray = offset @ by_channel
    return total


def _removed(groups: Groups, masks: Masks) -> list[tuple[Group, np.ndarray]]:
    """Return the groups that lose channels with the positions [removed] of these."""
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


def _silenced(groups: Groups, masks: Masks) -> dict[tuple[str, int], np.ndarray]:
    """Return (parameter, axis) -> the int64 indices [removed] along the axis that masks zero."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for group, removed in _removed(groups, masks):
        for member in group.of_role(*SILENCED_ROLES):
            found.setdefault((member.parameter, member.axis), []).append(member.indices[removed].ravel())
    return {key: np.unique(np.concatenate(parts)).astype(np.int64) for key, parts in found.items()}


def _tensor(tensors: "Mapping[str, Tensor]", name: str, axis: int, indices: np.ndarray) -> "Tensor":
    if name not in tensors:
        raise InputError(
            f"the module has no parameter or buffer '{name}', which its groups name; use the groups of this network"
        )
    tensor = tensors[name]
    if axis >= tensor.ndim or (indices.size and indices.max() >= tensor.shape[axis]):
        raise InputError(
            f"parameter '{name}' has shape {list(tensor.shape)}, too small for its groups; use this network's groups"
        )
    return tensor
