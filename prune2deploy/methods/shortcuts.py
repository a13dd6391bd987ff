"""Shortcuts around a layer, found by trying: what else is added to its output before the next layer reads it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy.groups import Group, Member
from prune2deploy.methods.readers import Pruned

if TYPE_CHECKING:
    from torch import Tensor, nn

_IMAGES = 2
_TOLERANCE = 1e-4
"""Relative to the largest value: sums are computed in another order."""


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A tensor that is added to a layer's output behind its norm: what an earlier layer reads.

    Attributes:
        source: weight of that layer.
        inputs: int64 [channels]: indices of its inputs.
        outputs: int64 [channels]: the layer's outputs that they are added to.
        scale: float64 [channels]: what the norm between multiplies the outputs by.
        sizes: spatial sizes of the layer's output.
        steps: how many positions of the source lie between those of two neighbours of the output, for each axis.
    """

    source: str
    inputs: np.ndarray
    outputs: np.ndarray
    scale: np.ndarray
    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    def at(self, values: "Tensor", chosen: "Tensor") -> "Tensor":
        """Return what the shortcut carries, [images * positions, channels].

        Args:
            values: what the source reads, [images, inputs, ...].
            chosen: int64 [images, positions]: flat indices of the layer's outputs.
        """
        rest, step, place = chosen, 1, chosen * 0
        for size, wide, every in zip(self.sizes[::-1], tuple(values.shape[2:])[::-1], self.steps[::-1], strict=True):
            place = place + (rest % size) * every * step
            rest, step = rest // size, step * int(wide)
        flat = values[:, self.inputs].flatten(2)
        found = flat.gather(2, place[:, None, :].expand(-1, flat.shape[1], -1))
        return found.transpose(1, 2).flatten(0, 1)


def find_shortcuts(network: Pruned, names: Sequence[str]) -> dict[str, Shortcut]:
    """Return the identity shortcuts that are added to the outputs of some readers, by the name of their weight.

    Of a group that several layers make, the reader before the layer and the one behind it are looked at: if what the
    second reads is the layer's output, normed, plus what the first reads (behind a ReLU or none, averaged over
    positions or not), the first reads the shortcut.
    """
    trials = [
        (name, group, before, own, behind)
        for name in names
        for group in network.groups.groups
        for before, own, behind in _neighbours(network, group, name)
    ]
    wanted = {one.parameter for _, _, *members in trials for one in members}
    with _seen(network, wanted) as (read, given):
        if wanted:
            _run(network)
    found: dict[str, list[Shortcut]] = {}
    for name, _, before, own, behind in trials:
        if not {before.parameter, behind.parameter} <= read.keys() or name not in given:
            continue
        shortcut = _shortcut(network, before, own, read[before.parameter], given[name])
        if shortcut is not None and _fits(network, shortcut, name, read, given[name], behind):
            found.setdefault(name, []).append(shortcut)
    # The channels of several groups can lie side by side in one tensor.
    return {name: _joined(parts) for name, parts in found.items() if len({part.source for part in parts}) == 1}


def _joined(parts: Sequence[Shortcut]) -> Shortcut:
    inputs, outputs, scale = (
        np.concatenate([getattr(part, field) for part in parts]) for field in ("inputs", "outputs", "scale")
    )
    return replace(parts[0], inputs=inputs, outputs=outputs, scale=scale)


def _neighbours(network: Pruned, group: Group, name: str) -> Iterator[tuple[Member, Member, Member]]:
    """Yield the layer's filters with the readers of the group before and behind them, in graph order."""
    order = [one for one in group.of_role("filter", "reader") if one.indices.shape[1] == 1]
    for place, own in enumerate(order):
        if own.parameter != name or own.role != "filter":
            continue
        before, behind = (
            [
                one
                for one in part
                if one.role == "reader"
                and one.parameter in network.readers
                and not network.readers[one.parameter].refused
            ]
            for part in (order[:place], order[place:])
        )
        if before and behind:
            yield before[-1], own, behind[0]


def _shortcut(network: Pruned, before: Member, own: Member, source: "Tensor", output: "Tensor") -> Shortcut | None:
    wide, sizes = tuple(source.shape[2:]), tuple(output.shape[2:])
    if not sizes or len(wide) != len(sizes) or any(one % size for one, size in zip(wide, sizes, strict=True)):
        return None
    steps = tuple(one // size for one, size in zip(wide, sizes, strict=True))
    outputs = own.indices[:, 0]
    scale = _norm(network, own.parameter)[0][outputs]
    return Shortcut(before.parameter, before.indices[:, 0], outputs, scale, sizes, steps)


def _norm(network: Pruned, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what the norm behind a layer multiplies its outputs by, and adds to them; [outputs] each."""
    layer = network.readers[name].layer
    norm = network.groups.layer_by_name.get(layer.norm or "")
    outputs = network.by_input(name).shape[1]
    if norm is None or norm.mean is None or norm.var is None:
        return np.ones(outputs), np.zeros(outputs)
    scale = network.weight(norm.weight) if norm.weight else np.ones(outputs)
    shift = network.weight(norm.bias) if norm.bias else np.zeros(outputs)
    factor = scale / np.sqrt(network.weight(norm.var) + (norm.epsilon or 0.0))
    return factor, shift - factor * network.weight(norm.mean)


def _fits(
    network: Pruned, shortcut: Shortcut, name: str, read: "Mapping[str, Tensor]", output: "Tensor", behind: Member
) -> bool:
    """Whether the reader behind sees the sum."""
    import torch

    factor, constant = (part[shortcut.outputs] for part in _norm(network, name))
    every = torch.arange(int(np.prod(shortcut.sizes)), device=output.device).expand(len(output), -1)
    carried = shortcut.at(read[shortcut.source], every).double().cpu().numpy()
    own = output[:, shortcut.outputs].flatten(2).transpose(1, 2).flatten(0, 1).double().cpu().numpy()
    total = own * factor + constant + carried
    seen = read[behind.parameter][:, behind.indices[:, 0]].double().cpu()
    if tuple(seen.shape[2:]) == shortcut.sizes:
        got = seen.flatten(2).transpose(1, 2).flatten(0, 1).numpy()
        candidates = [total, np.maximum(total, 0.0)]
    elif seen.ndim == 2:
        got = seen.numpy()
        by_image = total.reshape(len(output), -1, total.shape[1])
        candidates = [by_image.mean(axis=1), np.maximum(by_image, 0.0).mean(axis=1)]
    else:
        return False
    most = float(np.abs(got).max())
    return most > 0 and any(float(np.abs(one - got).max()) <= _TOLERANCE * most for one in candidates)


@contextmanager
def _seen(network: Pruned, names: set[str]) -> "Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]":
    """Record what layers read and give in their first call."""
    read: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def hook(name: str) -> "Callable[[nn.Module, tuple[Any, ...], Tensor], None]":
        def called(_: "nn.Module", inputs: tuple[Any, ...], output: "Tensor") -> None:
            if name not in read:
                read[name], given[name] = inputs[0].clone(), output.clone()

        return called

    handles = [owner.register_forward_hook(hook(name)) for name in names for owner in network.readers[name].owners]
    try:
        yield read, given
    finally:
        for handle in handles:
            handle.remove()


def _run(network: Pruned) -> None:
    import torch

    from prune2deploy.train.accuracy import cudnn_flags

    with torch.no_grad(), cudnn_flags(tf32=False):
        network.module(network.batches[0][0][:_IMAGES])
