"""Gates on channels where they are read, and how they are trained: what the methods share that learn gates.

A gate multiplies the weights with which every reader of a channel reads it. That is a gate on the channel itself behind
its activation, in front of all its readers: for a residual sum, whose layers share the channel; for a flattened map and
the blocks of a grouped convolution, where a channel has several places; and behind a depthwise convolution on the way.
So gates need no change of the network's code, and `folded` leaves them in its weights, exactly.

Gate 0 makes the readers see 0. A masked channel shows them f(0) of the activations on the way: the same behind ReLU,
ReLU6, SiLU, GELU and their like, not behind a sigmoid. What is pruned in the end is always what masks mean, so there
gates only guide; `Silence` is the hard gate, and it is a mask.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy.budget import Budget, TargetKind, share
from prune2deploy.errors import InputError
from prune2deploy.groups import SILENCED_ROLES, Group, Groups
from prune2deploy.masks import Masks
from prune2deploy.methods.base import Context, Weights, array, named, per_channel
from prune2deploy.silence import removed_channels

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from prune2deploy.train import Task

log = logging.getLogger(__name__)

Gates = Mapping[str, "Tensor"]
"""Group id -> one gate for every channel, [channels]; a group that is not named is not gated."""

_FALLEN = 0.5
"""Gates that cost less than this share of what they were driven to say little: nothing held them."""

_NO_DIRECTION = 1e-9
"""Singular values below this share of the largest are rounding: their directions mean nothing."""


class Gated:
    """A network with gates on its channels; its own weights are constants, and take no gradients.

    It holds the weights where they are now: make it anew after the network was moved or trained. The network runs in
    the mode it is in, so put it in eval mode: batch norms would take note of gated activations.

    Args:
        module: the network.
        groups: its groups.

    Raises:
        InputError: if a weight that the groups name is not there.
    """

    def __init__(self, module: "nn.Module", groups: Groups) -> None:
        import torch

        tensors = module.state_dict(keep_vars=True)
        self.module = module
        self._readers: dict[tuple[str, int], list[tuple[str, Tensor, int]]] = {}
        for group in groups.prunable:
            for member in group.of_role("reader"):
                device = named(tensors, member.parameter).device
                places = torch.from_numpy(member.indices.ravel()).to(device)
                entry = (group.id, places, member.indices.shape[1])
                self._readers.setdefault((member.parameter, member.axis), []).append(entry)
        self._weights = {name: tensors[name].detach() for name, _ in self._readers}
        gated = {id(tensors[name]) for name in self._weights}
        self._others = {name: one.detach() for name, one in module.named_parameters() if id(one) not in gated}

    def weights(self, gates: Gates) -> "dict[str, Tensor]":
        """Return the weights of all readers, each multiplied by the gates of what it reads; differentiable."""
        import torch

        found = dict(self._weights)
        for (name, axis), entries in self._readers.items():
            weight = found[name]
            factor = torch.ones(weight.shape[axis], dtype=weight.dtype, device=weight.device)
            for group, places, times in entries:
                if group in gates:
                    factor = factor.index_copy(0, places, gates[group].to(factor).repeat_interleave(times))
            found[name] = weight * factor.view([-1 if place == axis else 1 for place in range(weight.ndim)])
        return found

    def __call__(self, gates: Gates, images: "Tensor") -> "Tensor":
        """Return the logits of the gated network, [B, classes]; images may be of any float type."""
        import torch

        dtype = next(iter(self._weights.values())).dtype if self._weights else images.dtype
        logits: Tensor = torch.func.functional_call(
            self.module, {**self._others, **self.weights(gates)}, (images.to(dtype),)
        )
        return logits


def folded(weights: Weights, groups: Groups, gates: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights of all readers of gated channels with the gates multiplied in, of the type they had.

    Args:
        weights: the network's.
        groups: its groups.
        gates: group id -> [channels].

    Raises:
        InputError: if a weight that the groups name is not there.
    """
    factors: dict[tuple[str, int], np.ndarray] = {}
    for group_id, gate in gates.items():
        for member in groups[group_id].of_role("reader"):
            size = named(weights, member.parameter).shape[member.axis]
            factor = factors.setdefault((member.parameter, member.axis), np.ones(size))
            factor[member.indices] = np.asarray(gate, dtype=np.float64)[:, None]
    found: dict[str, np.ndarray] = {}
    for (name, axis), factor in factors.items():
        weight = found.get(name, weights[name])
        shape = [-1 if place == axis else 1 for place in range(weight.ndim)]
        found[name] = weight * factor.reshape(shape).astype(weight.dtype)
    return found


def soft_share(groups: Groups, kind: TargetKind, gates: Gates) -> "Tensor":
    """Return the share of the dense network's cost where a group is as wide as its gates (each 1 at most) add up to.

    A scalar in float64, differentiable: the derivative by a gate is what its channel costs, at its neighbours' widths.
    """
    import torch

    sizes = groups.full_widths()
    soft: dict[str, Any] = {group: gate.double().clamp(max=1.0).sum() for group, gate in gates.items()}
    dense = groups.cost.of(kind, sizes)
    return torch.as_tensor(groups.cost.of(kind, sizes | soft) / dense if dense else 1.0, dtype=torch.float64)


def aim(groups: Groups, budget: Budget) -> tuple[TargetKind, float]:
    """Return the kind and the share that gates are driven to: the target, or the share of MACs of the given widths.

    Raises:
        InputError: if the budget cannot be met, which is better known before the training.
    """
    budget.masks({group.id: np.zeros(group.size) for group in groups.prunable}, groups, "global")
    if budget.target is not None:
        return budget.target.kind, budget.target.share
    return "macs", share(groups, "macs", groups.full_widths() | budget.exact_widths(groups))


def warn_if_fallen(method: str, soft: float, target: float) -> None:
    """Warn where the gates cost far less than they were driven to: then the loss itself closed them."""
    if soft < _FALLEN * target:
        log.warning(
            "%s: the gates fell to %.1f %% of the cost, where %.1f %% were asked for, so they say little; start from a "
            "trained network, or give a lower strength or gate_learning_rate",
            *(method, 100 * soft, 100 * target),
        )


def train_gates(
    gated: Gated,
    task: "Task",
    optimizer: "Optimizer",
    gates: Callable[[], Gates],
    penalty: "Callable[[Gates], Tensor]",
    *,
    batch_size: int,
    epoch: int,
    epochs: int,
) -> float:
    """Train what makes the gates for one epoch, and return the mean loss: cross-entropy and ``penalty``.

    The network stays as it is, bit for bit: it runs in eval mode, and its weights take no gradients. Images are neither
    shifted nor mirrored, and come in another order in every epoch.

    Args:
        gated: the network.
        task: its images and whom to tell.
        optimizer: of what makes the gates.
        gates: makes them.
        penalty: from the gates to a scalar.
        batch_size: images a step.
        epoch: which one it is of ``epochs``, from 1.
        epochs: for those who are told.

    Raises:
        InputError: if the loss stops being a number, or the network does not give logits for the data's classes.
    """
    import torch.nn.functional as F

    from prune2deploy.train import Progress
    from prune2deploy.train.accuracy import cudnn_flags, eval_mode, logits_of, require

    images_and_labels = replace(task.images(batch_size=batch_size), seed=task.seed * 1_000_003 + epoch)
    steps = len(task.data.train) // min(batch_size, len(task.data.train))
    lr = optimizer.param_groups[0]["lr"]
    total = 0.0
    with eval_mode(gated.module), cudnn_flags(tf32=False):
        for step, (images, labels) in enumerate(images_and_labels, 1):
            optimizer.zero_grad(set_to_none=True)
            made = gates()
            extra = penalty(made)
            network = partial(gated, made)  # called like a module, and no more
            logits = logits_of(network, images, task.data.num_classes)  # type: ignore[arg-type]
            loss = F.cross_entropy(logits, labels).to(extra) + extra
            value = float(loss.detach())
            require(
                math.isfinite(value),
                f"training the gates diverged: the loss became {value} in epoch {epoch}, step {step}; use a lower "
                f"gate_learning_rate than {lr:g}, or check the weights and the normalisation",
            )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += value
            if task.on_progress is not None:
                task.on_progress(Progress(epoch, epochs, step, steps, value, lr))
    return total / steps


@dataclass(frozen=True, eq=False)
class Trained:
    """What training gave.

    Attributes:
        gates: group id -> float64 [channels], of every prunable group.
        report: what happened, as JSON values.
    """

    gates: dict[str, np.ndarray]
    report: dict[str, Any] = field(default_factory=dict)


def trained(context: Context, method: str) -> Trained:
    """Return the context's state.

    Raises:
        InputError: if the gates were not trained.
    """
    if not isinstance(context.state, Trained):
        raise InputError(f"method '{method}' chooses by gates that it trains, and these were not; call fit first")
    return context.state


def as_arrays(gates: Gates) -> dict[str, np.ndarray]:
    """Return the gates as float64 arrays."""
    return {group: gate.detach().double().cpu().numpy() for group, gate in gates.items()}


def holdout_accuracy(
    module: "nn.Module", task: "Task", groups: Groups, weights: Weights, masks: Masks | None = None
) -> float:
    """Return the top-1 accuracy on the held-out split with other weights, and masked; the network stays as it is."""
    from prune2deploy.apply import apply_masks, set_weights

    copy = deepcopy(module)
    set_weights(copy, weights)
    if masks is not None:
        apply_masks(copy, groups, masks)
    return float(task.accuracy(copy).top1)


class Silence:
    """Hard gates that can be lifted: a mask on a network in training, and what the removed channels were before it.

    Make it when the network is where it trains, call it after every step of the optimizer, and `lift` it before another
    mask is chosen.

    Raises:
        InputError: if masks and groups do not fit each other or the module.
    """

    def __init__(self, module: "nn.Module", groups: Groups, masks: Masks) -> None:
        import torch

        from prune2deploy.apply import MaskKeeper, apply_masks

        self._keep = MaskKeeper(module, groups, masks)
        tensors = module.state_dict(keep_vars=True)
        self._parts = []
        for group, removed in removed_channels(groups, masks):
            for member in group.of_role(*SILENCED_ROLES, "mean", "var"):
                tensor = named(tensors, member.parameter)
                places = torch.from_numpy(member.indices[removed].ravel()).to(tensor.device)
                before = tensor.detach().index_select(member.axis, places)
                self._parts.append((tensor, member.axis, places, before))
        apply_masks(module, groups, masks)

    def __call__(self) -> None:
        """Silence the removed channels again, in place."""
        self._keep()

    def lift(self) -> None:
        """Give the removed channels back what they were, statistics of norms included."""
        import torch

        with torch.no_grad():
            for tensor, axis, places, before in self._parts:
                tensor.index_copy_(axis, places, before)


def filters_of(weights: Weights, group: Group, *, taps: bool) -> list[np.ndarray]:
    """Return the filters of a group's channels, float64 [channels, weights], layer by layer; depthwise ones are among.

    Args:
        weights: the network's.
        group: one of its groups.
        taps: whether every tap of a kernel counts, or their mean.
    """
    found = []
    for member in group.of_role("filter"):
        values = array(weights, member.parameter)
        if not taps and values.ndim > 2:
            values = values.reshape(*values.shape[:2], -1).mean(axis=2)
        found.append(per_channel(values, member.axis, member.indices))
    return found


def main_directions(rows: np.ndarray) -> np.ndarray:
    """Return the right singular vectors of rows, [columns, min(rows, columns)], each with its sign settled.

    Reordered columns reorder the result, and reordered rows leave it as it is. So a random start that is drawn along
    these directions does not depend on the order of a layer's input channels. A vector's sign is that which makes its
    largest product with a row positive; directions that the rows do not have are 0.
    """
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    largest = left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])]
    signs = np.where(largest < 0, -1.0, 1.0) * (values > _NO_DIRECTION * max(values.max(initial=0.0), 1e-300))
    return np.asarray((right * signs[:, None]).T)


def scaled_together(parts: Sequence[np.ndarray], sizes: Sequence[float]) -> np.ndarray:
    """Return several layers' filters side by side, each in units of its own size (a size of 0 is taken as 1)."""
    return np.concatenate([part / (size or 1.0) for part, size in zip(parts, sizes, strict=True)], axis=1)
