"""Masks on a torch network: silence the removed channels, keep them silent while training, fold in their means."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
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

        tensors = module.state_dict(keep_vars=True)
        sources: dict[tuple[str, int], np.ndarray] = {}
        for name, kept in merges.items():
            for member in groups[name].of_role(*COPIED_ROLES):
                tensor = _tensor(tensors, member.parameter, member.axis, member.indices)
                key = (member.parameter, member.axis)
                source = sources.setdefault(key, np.arange(tensor.shape[member.axis]))
                source[member.indices] = member.indices[kept]
        self._parts = [
            (tensors[name], axis, torch.from_numpy(source).to(tensors[name].device))
            for (name, axis), source in sources.items()
        ]

    def after_backward(self) -> None:
        """Give the copies of a channel the mean of their gradients."""
        import torch

        for tensor, axis, source in self._parts:
            if tensor.grad is not None:
                sums = torch.zeros_like(tensor.grad).index_add_(axis, source, tensor.grad)
                counts = torch.bincount(source, minlength=len(source)).to(sums.dtype)
                shape = [-1 if place == axis else 1 for place in range(sums.ndim)]
                tensor.grad = (sums / counts.clamp(min=1).view(shape)).index_select(axis, source)

    def after_step(self) -> None:
        """Copy every kept channel onto its copies, statistics of norms included."""
        import torch

        with torch.no_grad():
            for tensor, axis, source in self._parts:
                tensor.copy_(tensor.index_select(axis, source))


COPIED_ROLES = ("filter", "bias", "scale", "shift", "mean", "var")
"""The roles in which merged channels are equal: all that makes or carries a channel."""


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
