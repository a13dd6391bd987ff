"""What the dense network teaches of a layer: its outputs, their derivatives, and what its shortcut carries."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prune2deploy.methods.readers import Batch, Pruned, Reader, Watch, is_watched
from prune2deploy.methods.samples import positioned, take, windows
from prune2deploy.methods.shortcuts import Shortcut, find_shortcuts

if TYPE_CHECKING:
    from torch import Tensor, nn

_LEAST_SCALE = 1e-3
"""Outputs whose norm multiplies them by less (of the largest) are not asked to make up for a shortcut."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the dense network says of one layer.

    Attributes:
        chosen: for every batch, int64 [images, positions]: which outputs were looked at, as flat positions.
        outputs: y, float64 [samples, outputs].
        derivatives: of an image's cross-entropy by y, float64 [samples, outputs].
        shortcut: what is added to the outputs behind the norm, where one was found.
        carried: what the shortcut carries, float64 [samples, channels]; one item, or none.
    """

    chosen: "list[Tensor]"
    outputs: np.ndarray
    derivatives: np.ndarray
    shortcut: Shortcut | None = None
    carried: list[np.ndarray] = field(default_factory=list)

    @staticmethod
    def of(parts: "Sequence[tuple[Tensor, Tensor, Tensor]]", shortcut: Shortcut | None = None) -> "Lesson":
        """Return the lesson of what was chosen and seen, batch by batch."""
        chosen, outputs, slopes = zip(*parts, strict=True)
        y, g = (np.concatenate([part.double().cpu().numpy() for part in own]) for own in (outputs, slopes))
        return Lesson(list(chosen), y, g, shortcut)

    def lost(self, now: np.ndarray | None) -> np.ndarray:
        """Return what the layer should add to its outputs for what its shortcut does not carry any more.

        Args:
            now: what it carries now, [samples, channels].
        """
        found = np.zeros_like(self.outputs)
        if self.shortcut is not None and now is not None and self.carried:
            scale = self.shortcut.scale
            usable = np.abs(scale) > _LEAST_SCALE * np.abs(scale).max(initial=0.0)
            outputs = self.shortcut.outputs[usable]
            found[:, outputs] = (self.carried[0] - now)[:, usable] / scale[usable]
        return found

    def sample_weights(self, alpha: float) -> np.ndarray:
        """Return ``(1 - alpha) + alpha g^2 / mean over the samples of g^2``, [samples, outputs]."""
        squares = self.derivatives**2
        means = squares.mean(axis=0)
        shares = np.divide(squares, means, out=np.ones_like(squares), where=means > 0)
        return np.asarray((1 - alpha) + alpha * shares)

    def importance(self) -> np.ndarray:
        """Return the mean of ``|g y|`` over the samples, [outputs]."""
        return np.asarray(np.abs(self.derivatives * self.outputs).mean(axis=0))


class Sight(NamedTuple):
    """What a layer reads in the pruned network, [samples, inputs, taps], and what it should give, [samples, outputs].

    The dense network's bias is taken off what it should give.
    """

    seen: np.ndarray
    wanted: np.ndarray


def teach(network: Pruned, names: Sequence[str], positions: int, seed: int) -> dict[str, Lesson]:
    """Return what the dense network says of some readers at random positions of every image; the copy is dense yet.

    Raises:
        InputError: if the loss on the images is not finite.
    """
    import torch

    readers = [network.readers[name] for name in names if is_watched(network.readers[name])]
    shortcuts = find_shortcuts(network, [reader.parameter for reader in readers if not reader.refused])
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[tuple[Any, Any, Any]]] = {reader.parameter: [] for reader in readers}
    for batch in network.batches if readers else ():
        with _recorded(readers) as calls:
            gradients = _derivatives(network.module, batch, lambda: [call.output for call in calls.values()])
        for (name, call), gradient in zip(calls.items(), gradients, strict=True):
            outputs, slopes = positioned(call.owner, call.output), positioned(call.owner, gradient)
            noise = torch.rand(outputs.shape[:2], generator=generator)
            chosen = noise.topk(min(positions, outputs.shape[1]), dim=1).indices.to(outputs.device)
            parts[name].append((chosen, take(outputs, chosen), take(slopes, chosen)))
    lessons = {name: Lesson.of(own, shortcuts.get(name)) for name, own in parts.items() if own}
    _, carried = look(network, lessons, ())
    for name, values in carried.items():
        lessons[name].carried.append(values)
    return lessons


def study(network: Pruned, teacher: Mapping[str, Lesson]) -> dict[str, Sight]:
    """Return what these readers see now where the teacher looked, and what they should make of it."""
    seen, carried = look(network, teacher, list(teacher))
    return {
        name: Sight(rows, teacher[name].outputs - network.bias(name) + teacher[name].lost(carried.get(name)))
        for name, rows in seen.items()
    }


def look(
    network: Pruned, lessons: Mapping[str, Lesson], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what readers see now where the teacher looked, and what the shortcuts of all lessons carry there.

    Returns:
        name -> [samples, inputs, taps] for ``names``; name -> float64 [samples, channels] for lessons with a shortcut.
    """
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    shortcuts = {name: lesson.shortcut for name, lesson in lessons.items() if lesson.shortcut is not None}
    carried: dict[str, list[np.ndarray]] = {name: [] for name in shortcuts}

    def visit(name: str, owner: "nn.Module", values: "Tensor", call: int) -> None:
        if call:
            return
        if name in seen:
            chosen = lessons[name].chosen[len(seen[name])]
            seen[name].append(windows(owner, values, chosen).flatten(0, 1).cpu().numpy())
        for target, shortcut in shortcuts.items():
            if shortcut.source == name:
                chosen = lessons[target].chosen[len(carried[target])]
                carried[target].append(shortcut.at(values, chosen).double().cpu().numpy())

    watched = dict.fromkeys([*names, *(shortcut.source for shortcut in shortcuts.values())])
    if watched:
        Watch(network.module, [network.readers[name] for name in watched], visit).run(network.batches)
    return (
        {name: np.concatenate(parts) for name, parts in seen.items()},
        {name: np.concatenate(parts) for name, parts in carried.items()},
    )


class _Call(NamedTuple):
    owner: "nn.Module"
    output: "Tensor"


@contextmanager
def _recorded(readers: Sequence[Reader]) -> Iterator[dict[str, _Call]]:
    """Record the output of every reader's first call."""
    calls: dict[str, _Call] = {}

    def hook(name: str) -> "Callable[[nn.Module, Any, Tensor], Tensor | None]":
        def called(owner: "nn.Module", _: Any, output: "Tensor") -> "Tensor | None":
            if name in calls:
                return None
            calls[name] = _Call(owner, output)
            return output.clone()  # what follows may work in place

        return called

    handles = [owner.register_forward_hook(hook(reader.parameter)) for reader in readers for owner in reader.owners]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _derivatives(module: "nn.Module", batch: Batch, outputs: "Callable[[], Sequence[Tensor]]") -> "Sequence[Tensor]":
    """Return the derivatives of the images' cross-entropies by what was recorded while the network ran."""
    import torch
    import torch.nn.functional as F

    from prune2deploy.train.accuracy import cudnn_flags, logits_of, require

    images, labels = batch
    with torch.enable_grad(), cudnn_flags(tf32=False):
        logits = logits_of(module, images.detach().clone().requires_grad_(True), int(labels.max()) + 1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        value = float(loss.detach())
        require(math.isfinite(value), f"the loss is {value}; check the weights and the normalisation")
        recorded = outputs()
        found = torch.autograd.grad(loss, recorded, allow_unused=True)
    return [torch.zeros_like(one) if slope is None else slope for one, slope in zip(recorded, found, strict=True)]
