"""Drops: channels that a file of the user's names are silenced before slimming. This changes what the graph computes.

Three kinds of file are read: index lists by name, the pruning history of Torch-Pruning, and the masks of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import require_file
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.indexed import nearest, require_channels, silence_by_name
from prune2deploy.graph.masking import apply_masks, separate_layers, weights_of
from prune2deploy.graph.model import copy_of
from prune2deploy.graph.normal import normalise, to_model
from prune2deploy.groups import Group, Groups, Member
from prune2deploy.masks import load_masks

FORMS = (
    '{"conv1.weight": [0, 3]} by the names of weights or values, a pruning_history() of Torch-Pruning as JSON, '
    "or a masks.safetensors"
)


@dataclass(frozen=True, eq=False)
class Dropped:
    """A model whose channels were silenced.

    Attributes:
        model: in normal form, with those channels zero.
        channels: name in the file, or id of a group -> how many of its channels were silenced.
    """

    model: onnx.ModelProto
    channels: dict[str, int]


class Drops(Protocol):
    """What a drop file holds."""

    def apply(self, model: onnx.ModelProto) -> Dropped:
        """Return the model with its channels silenced; the given one is brought to normal form."""


def load_drops(path: Path) -> Drops:
    """Return what a drop file holds.

    Raises:
        InputError: if it is none of the forms that are known.
    """
    if path.suffix == ".safetensors":
        return GroupMasks(load_masks(path))
    text = require_file(path, "a file of channels to drop").read_bytes()
    try:
        document = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"'{path}' cannot be read as JSON ({one_line(error, 120)}); give {FORMS}") from error
    if isinstance(document, dict) and document and all(_is_indices(value) for value in document.values()):
        return IndexLists({name: tuple(value) for name, value in document.items()})
    if isinstance(document, list) and document and all(_is_entry(entry) for entry in document):
        return History(tuple(Entry(entry[0], entry[1], tuple(entry[2])) for entry in document))
    raise InputError(f"'{path}' holds no channels to drop; give {FORMS}")


def apply_drops(model: onnx.ModelProto, drops: Drops) -> Dropped:
    """Return the model with the channels silenced that ``drops`` name; the given one is brought to normal form.

    Raises:
        InputError: if a name or an index does not fit the model, or a layer would lose all its channels.
    """
    return drops.apply(model)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' is there twice")
        found[name] = value
    return found


def _is_indices(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(index) is int for index in value)


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and isinstance(value[0], str)
        and isinstance(value[1], bool)
        and _is_indices(value[2])
    )


@dataclass(frozen=True)
class IndexLists:
    """Name of a weight, of a norm's scale or of a value -> channels."""

    channels: Mapping[str, tuple[int, ...]]

    def apply(self, model: onnx.ModelProto) -> Dropped:
        """Return the model with the named channels silenced; the given one is brought to normal form."""
        graph = normalise(model)
        silence_by_name(graph, self.channels)
        return Dropped(to_model(graph, model), {name: len(channels) for name, channels in self.channels.items()})


@dataclass(frozen=True, eq=False)
class GroupMasks:
    """The masks of a run, over the groups that are found in the file."""

    masks: Mapping[str, np.ndarray]

    def apply(self, model: onnx.ModelProto) -> Dropped:
        """Return the model with the masked channels silenced; the given one is brought to normal form."""
        own, groups = _grouped(model)
        missing = [name for name in self.masks if name not in groups.by_id]
        if missing:
            raise InputError(
                f"the masks name a group '{missing[0]}' that the file does not have; groups with close names: "
                f"{nearest(missing[0], groups.by_id)}"
            )
        apply_masks(own, groups, self.masks)
        return Dropped(own, {name: int((~mask).sum()) for name, mask in self.masks.items() if not mask.all()})


# --- Torch-Pruning ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One pruning of Torch-Pruning: a module, whether its outputs or its inputs, and indices of what was left then."""

    module: str
    of_outputs: bool
    indices: tuple[int, ...]


@dataclass(frozen=True)
class History:
    """What ``pruning_history()`` of Torch-Pruning returns: each entry took a group's channels out of every layer.

    Its indices count the channels that the earlier entries had left. The whole group is silenced: what reads it then
    sees the activations of zero, where Torch-Pruning removed the input; the two agree behind Relu and the like.
    """

    entries: tuple[Entry, ...]

    def apply(self, model: onnx.ModelProto) -> Dropped:
        """Return the model with the pruned channels silenced; the given one is brought to normal form."""
        own, groups = _grouped(model)
        shapes = {name: array.shape for name, array in weights_of(own).items()}
        keep = {group.id: np.ones(group.size, dtype=np.bool_) for group in groups.prunable}
        for entry in self.entries:
            axis = _pruned_axis(entry, groups, shapes)
            _take_out(entry, axis, keep)
        apply_masks(own, groups, keep)
        return Dropped(own, {name: int((~mask).sum()) for name, mask in keep.items() if not mask.all()})


@dataclass(frozen=True, eq=False)
class _Axis:
    """An axis of a weight: the group (or None) and the channel of each index."""

    group: list[Group | None]
    channel: np.ndarray

    def left(self, keep: Mapping[str, np.ndarray]) -> list[int]:
        """Return the indices that masks leave."""
        return [
            index
            for index, group in enumerate(self.group)
            if group is None or group.id not in keep or keep[group.id][self.channel[index]]
        ]


def _pruned_axis(entry: Entry, groups: Groups, shapes: Mapping[str, tuple[int, ...]]) -> _Axis:
    names = [name for name in (f"{entry.module}.weight", entry.module) if name in shapes]
    if not names:
        known = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
        raise InputError(
            f"the file has no weight '{entry.module}.weight', which the history names; modules with close names: "
            f"{nearest(entry.module, known)}; export the network with its parameters' names"
        )
    members = [(group, one) for group in groups.groups for one in group.members if one.parameter == names[0]]
    produced = [pair for pair in members if pair[1].role in ("filter", "scale")]
    read = [pair for pair in members if pair[1].role == "reader"]
    shape = shapes[names[0]]
    makes_what_it_reads = len(shape) == 1 or (len(shape) > 2 and shape[1] == 1)  # norms and depthwise convolutions
    chosen = produced if entry.of_outputs or makes_what_it_reads else read
    if not chosen:
        side = "outputs" if entry.of_outputs else "inputs"
        raise InputError(
            f"the history prunes the {side} of '{entry.module}', which must stay in this file: an input or output of "
            "the graph, or an operator without a rule, has them"
        )
    return _axis(entry, chosen, shape, groups)


def _axis(entry: Entry, members: Sequence[tuple[Group, Member]], shape: tuple[int, ...], groups: Groups) -> _Axis:
    size = shape[members[0][1].axis]
    layer = groups.layer_by_name.get(members[0][1].layer)
    if members[0][1].role == "reader" and layer is not None and layer.in_width.at(groups.full_widths()) != size:
        raise InputError(f"the history prunes the inputs of the grouped convolution '{entry.module}'; name its source")
    owner: list[Group | None] = [None] * size
    channel = np.full(size, -1, dtype=np.int64)
    for group, member in members:
        for number, row in enumerate(member.indices):
            channel[row] = number
            for index in row.tolist():
                owner[index] = group
    return _Axis(owner, channel)


def _take_out(entry: Entry, axis: _Axis, keep: Mapping[str, np.ndarray]) -> None:
    """Mask the channels of one entry; its indices count what the masks have left of the axis."""
    left = axis.left(keep)
    require_channels(f"the history's '{entry.module}' (what earlier entries left of it)", entry.indices, len(left))
    for index in (left[position] for position in entry.indices):
        group = axis.group[index]
        if group is None or not group.prunable:
            reason = "an output of the network or an operator without a rule needs them"
            why = reason if group is None else group.kept_because
            raise InputError(f"the history prunes channels of '{entry.module}' that must stay: {why}")
        keep[group.id][axis.channel[index]] = False
    if len(left) - len(axis.left(keep)) != len(entry.indices):
        raise InputError(
            f"the history prunes {len(entry.indices)} channels of '{entry.module}', but the file ties others to them; "
            "is it the history of this network?"
        )


def _grouped(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Groups]:
    """Return the model in normal form, no vector shared between layers, with its groups."""
    own = to_model(normalise(model), model)
    separate_layers(own)
    return own, find_groups(copy_of(own))
