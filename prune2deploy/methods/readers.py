"""The layers of a torch network that read channels: what they read, and a copy that is pruned step by step."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups, Layer, Member
from prune2deploy.methods.base import array, named
from prune2deploy.silence import FoldPlace, fold_place

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = tuple[Any, Any]


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads channels, and the torch modules that own its weight.

    Attributes:
        member: the weight and the axis that its inputs index (of the first group that it reads).
        layer: of the groups.
        owners: modules with this parameter; more than one where it is shared.
        blocks: groups of the convolution.
        refused: why its weights cannot be fitted anew, or None.
        constant: where a constant goes that is to be added to its outputs, or why it cannot go anywhere.
    """

    member: Member
    layer: Layer
    owners: tuple["nn.Module", ...]
    blocks: int
    refused: str | None
    constant: FoldPlace | str

    @property
    def parameter(self) -> str:
        """Name of the weight."""
        return self.member.parameter


def find_readers(module: "nn.Module", weights: Mapping[str, np.ndarray], groups: Groups) -> dict[str, Reader]:
    """Return the layers that read groups, by the name of their weight and in graph order.

    Of groups that cannot be pruned those are left out whose weights are no parameters of the network.

    Raises:
        InputError: if the network has no weight that its groups name.
    """
    found: dict[str, Reader] = {}
    own = dict(module.named_parameters(remove_duplicate=False))
    for group in groups.groups:
        for member in group.of_role("reader"):
            if member.parameter not in found and (group.prunable or member.parameter in own):
                found[member.parameter] = _reader(module, weights, groups, member)
    order = {layer.weight: place for place, layer in enumerate(groups.layers)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def _reader(module: "nn.Module", weights: Mapping[str, np.ndarray], groups: Groups, member: Member) -> Reader:
    from torch import nn

    tensor = named(dict(module.named_parameters(remove_duplicate=False)), member.parameter)
    owners = tuple(part for part in module.modules() if any(own is tensor for own in part.parameters(recurse=False)))
    kinds: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1, nn.Linear: 1}
    kinds |= {nn.ConvTranspose1d: 0, nn.ConvTranspose2d: 0, nn.ConvTranspose3d: 0}
    blocks = max((int(getattr(owner, "groups", 1)) for owner in owners), default=1)
    refused = None
    if any(kinds.get(type(owner)) != member.axis for owner in owners):
        refused = f"'{member.layer}' is not a plain convolution or linear layer"
        blocks = 1
    elif blocks > 1:
        refused = f"'{member.layer}' is a grouped convolution"
    constant = fold_place(weights, groups, member)
    return Reader(member, groups.layer_by_name[member.layer], owners, blocks, refused, constant)


def is_watched(reader: Reader) -> bool:
    """Whether what the layer reads is what its module gets."""
    return reader.refused is None or reader.blocks > 1


class Pruned:
    """A copy of a network that loses channels step by step, as the masked network does.

    Attributes:
        module: the copy, in eval mode.
        groups: the network's groups.
        batches: the images and labels that everything is measured on.
        readers: see `find_readers`.
        alive: weight -> bool [inputs]: which of a reader's inputs are still there.
        kept: group id -> bool [channels].
        weights: the reader weights and the vectors that take constants, float64, as they are now.
    """

    def __init__(self, module: "nn.Module", groups: Groups, batches: Sequence[Batch]) -> None:
        from prune2deploy.apply import weights_of

        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.groups = groups
        self.batches = batches
        self._dense = weights_of(module)
        self.readers = find_readers(self.module, self._dense, groups)
        self.alive = {
            name: np.ones(self._dense[name].shape[reader.member.axis], dtype=np.bool_)
            for name, reader in self.readers.items()
        }
        self.kept = {group.id: np.ones(group.size, dtype=np.bool_) for group in groups.groups}
        self._now: dict[str, np.ndarray] = {}

    def weight(self, name: str) -> np.ndarray:
        """Return a parameter or buffer as it is now, in float64; not to be changed."""
        return self._now[name] if name in self._now else array(self._dense, name)

    def by_input(self, name: str) -> np.ndarray:
        """Return a reader's weight as [inputs, outputs, taps...]."""
        axis = self.readers[name].member.axis
        return np.moveaxis(self.weight(name), (axis, 1 - axis), (0, 1))

    def live_outputs(self, name: str) -> np.ndarray:
        """Return which outputs of a reader are still there, bool [outputs]."""
        axis = 1 - self.readers[name].member.axis
        live = np.ones(self._dense[name].shape[axis], dtype=np.bool_)
        for group in self.groups.prunable:
            for member in group.of_role("filter"):
                if member.parameter == name and member.axis == axis:
                    live[member.indices[~self.kept[group.id]]] = False
        return live

    def replace(self, name: str, values: np.ndarray) -> None:
        """Give a parameter or buffer other values, kept in float64 here and rounded in the copy; masks hold."""
        from prune2deploy.apply import apply_masks, set_weights

        self._now[name] = values
        set_weights(self.module, {name: values.astype(self._dense[name].dtype)})
        apply_masks(self.module, self.groups, self.kept)

    def replace_by_input(self, name: str, values: np.ndarray) -> None:
        """Give a reader's weight other values, [inputs, outputs, taps...]; inputs that are gone become 0."""
        values[~self.alive[name]] = 0.0
        axis = self.readers[name].member.axis
        self.replace(name, np.moveaxis(values, (0, 1), (axis, 1 - axis)))

    def add_constant(self, name: str, constant: np.ndarray) -> None:
        """Add a constant to a reader's outputs, [outputs], where there is a place for it."""
        place = self.readers[name].constant
        if isinstance(place, FoldPlace):
            self.replace(place.parameter, self.weight(place.parameter) + place.sign * constant)

    def set_constant(self, name: str, constant: np.ndarray) -> None:
        """Let a reader's outputs be those of its weights plus ``constant`` [outputs], beside the dense network's own.

        Whatever was added before is forgotten.
        """
        place = self.readers[name].constant
        if isinstance(place, FoldPlace):
            self.replace(place.parameter, array(self._dense, place.parameter) + place.sign * constant)

    def bias(self, name: str) -> np.ndarray | float:
        """Return the dense network's bias of a reader, [outputs], or 0."""
        own = self.readers[name].layer.bias
        return array(self._dense, own) if own is not None and own in self._dense else 0.0

    def silence(self, group: Group, removed: np.ndarray) -> None:
        """Mask channels (their positions in the group) and take note that readers do not have them any more."""
        from prune2deploy.apply import apply_masks

        self.kept[group.id][removed] = False
        apply_masks(self.module, self.groups, self.kept)
        for member in group.of_role("reader"):
            self.alive[member.parameter][member.indices[removed]] = False

    def new_weights(self) -> dict[str, np.ndarray]:
        """Return `PruneResult.weights`: what was replaced, in the types of the network."""
        return {name: values.astype(self._dense[name].dtype) for name, values in self._now.items()}

    def not_fitted(self) -> list[str]:
        """Return a line for every reader whose weights stay as they are."""
        names = {member.parameter for group in self.groups.prunable for member in group.of_role("reader")}
        refused = (reader.refused for name, reader in self.readers.items() if name in names)
        return [f"the weights stay: {reason}" for reason in refused if reason]


def first_batches(images: Iterable[Any], count: int, method: str) -> list[Batch]:
    """Return batches until there are ``count`` images; they stay in memory, since they are gone through often.

    Raises:
        InputError: if there are none.
    """
    found: list[Batch] = []
    seen = 0
    for batch in images:
        found.append((batch[0], batch[1]))
        seen += len(batch[0])
        if seen >= count:
            break
    if not found:
        raise InputError(f"method '{method}' needs images; give a data set that has some")
    return found


# --- what a layer reads -----------------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """Ends a forward pass of which nothing more is needed."""


Visit = Callable[[str, "nn.Module", "Tensor", int], None]
"""Called with the reader, its module, the input, and how often the module was called before on these images."""


@dataclass
class Watch:
    """Calls ``visit`` with what readers read, batch by batch, and stops every pass when all have been called.

    How often that is, is counted in the first batch. Only the first input of a module counts.
    """

    module: "nn.Module"
    readers: Sequence[Reader]
    visit: Visit
    calls: int | None = field(default=None, init=False)
    _seen: list[str] = field(default_factory=list, init=False)

    def run(self, batches: Iterable[Batch]) -> None:
        """Go through the batches, without gradients."""
        import torch

        from prune2deploy.train.accuracy import cudnn_flags

        with torch.no_grad(), cudnn_flags(tf32=False), self._hooks():
            for images, _ in batches:
                self._seen = []
                with suppress(_EnoughError):
                    self.module(images)
                self.calls = len(self._seen)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [
            owner.register_forward_pre_hook(self._hook(reader)) for reader in self.readers for owner in reader.owners
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, reader: Reader) -> "Callable[[nn.Module, tuple[Any, ...]], None]":
        def called(owner: "nn.Module", inputs: tuple[Any, ...]) -> None:
            self.visit(reader.parameter, owner, inputs[0], self._seen.count(reader.parameter))
            self._seen.append(reader.parameter)
            if len(self._seen) == self.calls:
                raise _EnoughError

        return called
