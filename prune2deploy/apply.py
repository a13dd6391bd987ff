"""Masks on a torch network: silence the removed channels, keep them silent while training, fold in their means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prune2deploy.errors import InputError
from prune2deploy.groups import COPIED_ROLES, Groups
from prune2deploy.masks import Masks
from prune2deploy.silence import folded_means, silenced

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


def set_weights(module: "nn.Module", weights: Mapping[str, np.ndarray]) -> None:
    """Replace parameters and buffers in place.

    Args:
        module: the network.
        weights: name -> the whole array.

    Raises:
        InputError: if the module has none of that name and shape.
    """
    import torch

    tensors = module.state_dict(keep_vars=True)
    for name, array in weights.items():
        if name not in tensors or tensors[name].shape != array.shape:
            raise InputError(f"the module has no '{name}' of shape {list(array.shape)}; use the groups of this network")
    with torch.no_grad():
        for name, array in weights.items():
            tensors[name].copy_(torch.from_numpy(array))


def apply_masks(module: "nn.Module", groups: Groups, masks: Masks) -> None:
    """Silence the removed channels in place: zero their filters, biases, and norm scales and shifts.

    Raises:
        InputError: if masks and groups do not fit each other or the module.
    """
    import torch

    tensors = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for (name, axis), indices in silenced(groups, masks).items():
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
        for (name, axis), indices in silenced(groups, masks).items():
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


@dataclass(frozen=True, eq=False)
class Copied:
    """A parameter or buffer that holds merged channels.

    Attributes:
        name: of the parameter or buffer.
        role: as `groups.Member.role`.
        tensor: the module's own.
        axis: that the channels index.
        source: for every index along the axis the index that it copies, int64 [size of the axis].
    """

    name: str
    role: str
    tensor: "Tensor"
    axis: int
    source: np.ndarray

    def means(self) -> "ChannelMeans":
        """Return what takes the means of the channels that merge."""
        return ChannelMeans(self.source, self.axis, self.tensor)


def copies_of(module: "nn.Module", groups: Groups, merges: Mapping[str, np.ndarray]) -> list[Copied]:
    """Return the parameters and buffers that make and carry merged channels, in graph order, each axis of one once.

    Args:
        module: the network.
        groups: its groups.
        merges: `methods.base.PruneResult.merges`.

    Raises:
        InputError: if merges and groups do not fit each other or the module.
    """
    tensors = module.state_dict(keep_vars=True)
    found: dict[tuple[str, int], Copied] = {}
    for name, kept in merges.items():
        _require_merge(groups, name, kept)
        for member in groups[name].of_role(*COPIED_ROLES):
            tensor = _tensor(tensors, member.parameter, member.axis, member.indices)
            key = (member.parameter, member.axis)
            if key not in found:
                found[key] = Copied(member.parameter, member.role, tensor, member.axis, np.arange(tensor.shape[key[1]]))
            found[key].source[member.indices] = member.indices[kept]
    return list(found.values())


def _require_merge(groups: Groups, name: str, kept: np.ndarray) -> None:
    if name not in groups.by_id:
        raise InputError(f"the merges name a group '{name}' that the network does not have; use this network's merges")
    group = groups[name]
    if not group.prunable:
        raise InputError(f"the merges are of group '{name}', which cannot be pruned: {group.kept_because}")
    fits = kept.shape == (group.size,) and kept.dtype == np.int64 and kept.min() >= 0 and kept.max() < group.size
    if not fits or not np.array_equal(kept[kept], kept):
        raise InputError(
            f"the merges of group '{name}' do not name one of its {group.size} channels for each, "
            "which is itself not merged into another; use this network's merges"
        )


class ChannelMeans:
    """Means over the channels that merge, each in the place of every one of them: bit for bit the same.

    Args:
        source: for every index along the axis the index that it copies, int64 [size].
        axis: that the channels index.
        like: a tensor of the type, and on the device, of those to come.
    """

    def __init__(self, source: np.ndarray, axis: int, like: "Tensor") -> None:
        import torch

        stay, cluster = np.unique(source, return_inverse=True)
        # A product of matrices, because index_add_ adds in another order every time on a GPU.
        average = np.zeros((len(stay), len(source)))
        average[cluster, np.arange(len(source))] = 1 / np.bincount(cluster)[cluster]
        self._axis = axis
        self._average = torch.from_numpy(average).to(like.device, like.dtype)
        self._cluster = torch.from_numpy(cluster).to(like.device)

    def __call__(self, values: "Tensor") -> "Tensor":
        """Return a new tensor of the same shape."""
        first = values.movedim(self._axis, 0)
        means = (self._average @ first.reshape(len(first), -1)).index_select(0, self._cluster)
        return means.reshape(first.shape).movedim(0, self._axis)


class MergeKeeper:
    """Keeps merged channels exact copies of one another while a network trains.

    Make it when the module is where it will train, and call its two methods in every step.

    Args:
        module: the network.
        groups: its groups.
        merges: `methods.base.PruneResult.merges`.

    Raises:
        InputError: if merges and groups do not fit each other or the module.
    """

    def __init__(self, module: "nn.Module", groups: Groups, merges: Mapping[str, np.ndarray]) -> None:
        import torch

        copies = copies_of(module, groups, merges)
        self._means = [(copied.tensor, copied.means()) for copied in copies if copied.tensor.requires_grad]
        self._sources = [
            (copied.tensor, copied.axis, torch.from_numpy(copied.source).to(copied.tensor.device)) for copied in copies
        ]

    def after_backward(self) -> None:
        """Give the copies of a channel the mean of their gradients."""
        for tensor, means in self._means:
            if tensor.grad is not None:
                tensor.grad.copy_(means(tensor.grad))

    def after_step(self) -> None:
        """Copy every kept channel onto its copies, statistics of norms included."""
        import torch

        with torch.no_grad():
            for tensor, axis, source in self._sources:
                tensor.copy_(tensor.index_select(axis, source))


def fold_offsets(module: "nn.Module", groups: Groups, masks: Masks, offsets: Mapping[str, np.ndarray]) -> list[str]:
    """Give the readers of removed channels constants in their place, in place; return the readers that have none.

    What goes where is said in `silence.folded_means`. Call it once, before `apply_masks`: the weights are read as they
    are, and a second call folds again.

    Args:
        module: the network.
        groups: its groups.
        masks: which channels are removed.
        offsets: `methods.base.PruneResult.offsets`.

    Raises:
        InputError: if masks and groups do not fit each other or the module.
    """
    import torch

    shifts, skipped = folded_means(weights_of(module), groups, masks, offsets)
    tensors = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, shift in shifts.items():  # added in float64, rounded once
            tensor = tensors[name]
            tensor.copy_((tensor.double().cpu() + torch.from_numpy(shift)).to(tensor.dtype))
    return skipped


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
