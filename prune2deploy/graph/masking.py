"""Masks on an ONNX graph: silence the removed channels in its initializers, and fold in their means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from prune2deploy.errors import InputError
from prune2deploy.graph.names import fresh
from prune2deploy.groups import Groups
from prune2deploy.masks import Masks
from prune2deploy.silence import folded_means, silenced

LAYERS = frozenset({"BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose constants a mask may zero."""


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return copies of a graph's initializers by name; bfloat16 becomes float32."""
    found = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        wide = tensor.data_type == onnx.TensorProto.BFLOAT16
        found[tensor.name] = array.astype(np.float32) if wide else array.copy()
    return found


def set_weights(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> None:
    """Replace initializers in place; each keeps its type.

    Raises:
        InputError: if the model has none of that name and shape.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, array in weights.items():
        own = _array(tensors, name)
        if own.shape != array.shape:
            raise InputError(f"initializer '{name}' has shape {list(own.shape)}, not {list(array.shape)}")
        write(tensors[name], array.astype(own.dtype))


def apply_masks(model: onnx.ModelProto, groups: Groups, masks: Masks) -> None:
    """Silence the removed channels in place: zero their filters, biases, and norm scales and shifts.

    Args:
        model: in normal form; its initializers are changed.
        groups: what `graph.groups.find_groups` finds in this model.
        masks: which channels are removed.

    Raises:
        InputError: if masks and groups do not fit each other or the model.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for (name, axis), indices in silenced(groups, masks).items():
        array = _array(tensors, name).copy()
        if axis >= array.ndim or indices.max() >= array.shape[axis]:
            raise InputError(
                f"initializer '{name}' has shape {list(array.shape)}, too small for its groups; use this file's groups"
            )
        np.moveaxis(array, axis, 0)[indices] = 0
        write(tensors[name], array)


def fold_offsets(model: onnx.ModelProto, groups: Groups, masks: Masks, offsets: Mapping[str, np.ndarray]) -> list[str]:
    """Give the readers of removed channels constants in their place, in place; return the readers that have none.

    What goes where is said in `silence.folded_means`. Call it once, before `apply_masks`.

    Raises:
        InputError: if masks and groups do not fit each other or the model.
    """
    shifts, skipped = folded_means(weights_of(model), groups, masks, offsets, _scaled_readers(model))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, shift in shifts.items():
        array = _array(tensors, name)
        if array.size != shift.size:
            skipped.append(f"the means of removed channels are not folded: '{name}' is one number for all channels")
            continue
        write(tensors[name], (array.astype(np.float64) + shift.reshape(array.shape)).astype(array.dtype))
    return skipped


def _scaled_readers(model: onnx.ModelProto) -> dict[str, str]:
    """Return the weights that a Gemm multiplies by alpha, or whose bias it multiplies by beta."""
    found = {}
    for node in model.graph.node:
        factors = {one.name: one.f for one in node.attribute if one.name in ("alpha", "beta")}
        if node.op_type == "Gemm" and any(value != 1 for value in factors.values()):
            found[node.input[1]] = f"'{node.input[1]}' is read by a Gemm that scales it"
    return found


def separate_layers(model: onnx.ModelProto) -> None:
    """Give every layer vectors of its own, in place: exporters store equal ones once, whichever layers they belong to.

    A layer that the graph applies several times keeps its vectors in common: its nodes have all their constants in
    common. Matrices stay shared among layers, which ties these, but what an operator without channels reads (as an
    embedding reads the matrix of a head) is set apart from what a mask may zero, and keeps the name.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = set(tensors) | {name for node in model.graph.node for name in (*node.input, *node.output)}
    own_name: dict[str, dict[User, str]] = {}
    for name, user, _ in _uses(model, tensors):
        own_name.setdefault(name, {}).setdefault(user, name)
    for name, users in own_name.items():
        first = OTHERS if OTHERS in users else next(iter(users))
        for user in users:
            if user != first:
                users[user] = fresh(name, taken)
                copy = model.graph.initializer.add()
                copy.CopyFrom(tensors[name])
                copy.name = users[user]
    for name, user, place in list(_uses(model, tensors)):
        if place is not None:
            node, slot = place
            node.input[slot] = own_name[name][user]


User = tuple[str, ...]
OTHERS: User = ()


def _uses(
    model: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto]
) -> Iterator[tuple[str, User, tuple[onnx.NodeProto, int] | None]]:
    """Yield (initializer, its user, (node, slot)); a vector's user is one slot of a layer, known by its constants."""
    yield from ((value.name, OTHERS, None) for value in model.graph.output if value.name in tensors)
    for node in model.graph.node:
        own = (node.op_type, *(name for name in node.input if name in tensors))
        for slot, name in enumerate(node.input):
            if name in tensors:
                layer = (*own, str(slot)) if len(tensors[name].dims) == 1 else ("a matrix",)
                yield name, layer if node.op_type in LAYERS else OTHERS, (node, slot)
        for inner in _subgraphs(node):
            for child in inner.node:
                yield from ((name, OTHERS, None) for name in child.input if name in tensors)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield inner
            for child in inner.node:
                yield from _subgraphs(child)


def _array(tensors: Mapping[str, onnx.TensorProto], name: str) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"the file has no initializer '{name}', which its groups name; use the groups of this file")
    return np.asarray(numpy_helper.to_array(tensors[name]))


def write(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    """Put an array into an initializer, in place; its name and documentation stay."""
    documentation = tensor.doc_string
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    tensor.doc_string = documentation
