"""Exported group norms: Reshape, InstanceNormalization, Reshape as one node while channels are removed, and back again.

The first Reshape merges the channels of a group with their space, which alone would take a position for every place of
every channel, and a size that is known. As one node the three have a position for every channel; whole groups of them
stay or go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from prune2deploy.graph.names import fresh
from prune2deploy.graph.rules.norm import BY_GROUP
from prune2deploy.graph.triples import Chain, Return, Targets, Triple, chains, put_back, replace, shape_of

GROUP_AXES = 3
"""The axes of a value that is split into groups: batch, groups, everything else."""


@dataclass(frozen=True, eq=False)
class GroupNorm:
    """The group norm that a GroupNormalization stands for, as it was found."""

    triple: Triple
    groups: int
    channels: int


def settle_casts(graph: gs.Graph) -> None:
    """Let a constant that is cast to another value's type no longer read that value: exporters cast scales so."""
    for node in graph.nodes:
        if node.op != "CastLike" or node.domain or not isinstance(node.inputs[0], gs.Constant):
            continue
        dtype = node.inputs[1].dtype
        if dtype is None:
            continue
        kind = dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        node.op, node.inputs = "Cast", [node.inputs[0]]
        node.attrs["to"] = kind


def stand_in_group_norms(graph: onnx.GraphProto) -> None:
    """Put an Identity in the place of each Reshape at the end of a group norm that asks its input for its shape.

    For shape inference alone, which in older operator sets loses even the rank there.
    """
    made_by = {name: node for node in graph.node for name in node.output if not node.domain}
    for node in graph.node:
        is_reshape = node.op_type == "Reshape" and not node.domain and len(node.input) > 1
        shape = made_by.get(node.input[1]) if is_reshape else None
        if shape is None or shape.op_type != "Shape" or shape.attribute:
            continue
        inner = node
        for op in ("InstanceNormalization", "Reshape"):
            maker = made_by.get(inner.input[0])
            if maker is None or maker.op_type != op:
                break
            inner = maker
        else:
            if inner.input[0] == shape.input[0]:
                node.op_type = "Identity"
                node.input[:] = [shape.input[0]]
                del node.attribute[:]


def fuse_group_norms(graph: gs.Graph) -> None:
    """Turn every exported group norm of a sorted graph into one GroupNormalization that remembers it.

    Its scale and bias are those of the InstanceNormalization, by group.
    """
    found = [(nodes, _stand_in(nodes)) for nodes in list(_apart(graph))]
    for (_, norm), triple in zip(found, replace(graph, found), strict=True):
        groups, channels = len(norm.inputs[1].values), int(norm.inputs[0].shape[1])
        norm.attrs |= {"num_groups": groups, BY_GROUP: GroupNorm(triple, groups, channels)}


def _stand_in(nodes: Chain) -> gs.Node:
    first, middle, last = nodes
    return gs.Node("GroupNormalization", last.name, dict(middle.attrs), [first.inputs[0], *middle.inputs[1:]])


def _apart(graph: gs.Graph) -> Iterator[Chain]:
    """Yield the group norms; of two that would share a Reshape, the first."""
    used: set[int] = set()
    for nodes in chains(graph, "InstanceNormalization"):
        if _is_group_norm(nodes) and not used.intersection(map(id, nodes)):
            used.update(map(id, nodes))
            yield nodes


def _is_group_norm(nodes: Chain) -> bool:
    """Whether three nodes split channels into groups, normalise each, and give the result the shape that came in."""
    first, norm, last = nodes
    source, groups = shape_of(first.inputs[0]), _groups(norm)
    if source is None or len(source) < 2 or 0 in source or groups is None or len(norm.outputs) != 1:
        return False
    channels = source[1]
    if not isinstance(channels, int) or channels % groups:
        return False
    return _splits(first, groups) and _is_as_before(last, first.inputs[0])


def _groups(norm: gs.Node) -> int | None:
    """Return the number of groups by the parameters of the norm, or None where they are computed."""
    if len(norm.inputs) != 3 or not all(isinstance(tensor, gs.Constant) for tensor in norm.inputs[1:]):
        return None
    scale, bias = (tensor.values for tensor in norm.inputs[1:])
    return len(scale) if scale.ndim == 1 and len(scale) and scale.shape == bias.shape else None


def _target(node: gs.Node) -> list[int] | None:
    """Return the constant target of a Reshape in which 0 copies a size."""
    if len(node.inputs) != 2 or not isinstance(node.inputs[1], gs.Constant):
        return None
    sizes = [int(size) for size in node.inputs[1].values.ravel()]
    return None if node.attrs.get("allowzero", 0) and 0 in sizes else sizes


def _splits(node: gs.Node, groups: int) -> bool:
    """Whether a Reshape keeps the batch, and splits all the rest into groups."""
    sizes, before, after = _target(node), shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if sizes is None or len(sizes) != GROUP_AXES or before is None:
        return False
    if sizes[1] != groups and (after is None or after[1] != groups):
        return False
    if sizes[0] < 0:  # the batch is what is left
        rest = [size for size in before[1:] if isinstance(size, int)]
        return len(rest) == len(before) - 1 and math.prod(rest) == math.prod(sizes[1:])
    return sizes[0] in (0, before[0])


def _is_as_before(node: gs.Node, source: gs.Tensor) -> bool:
    """Whether a Reshape gives its result the shape of ``source``, also once that has lost channels."""
    if len(node.inputs) != 2:
        return False
    target, before, after = node.inputs[1], shape_of(source), shape_of(node.outputs[0])
    if _reads_shape_of(target, source):
        return True
    if before is None or after is None or len(before) != len(after):
        return False
    known = [size is not None and size == other for size, other in zip(before, after, strict=True)]
    sizes = _target(node)
    if sizes is None:
        return all(known) and not isinstance(target, gs.Constant) and _from_inputs(target)
    if 0 in sizes[1:]:  # it would copy the number of groups, or the size of one
        return False
    known[0] |= sizes[0] == 0
    return sum(known) >= len(known) - 1  # then the one that is left has what remains


def _reads_shape_of(target: gs.Tensor, source: gs.Tensor) -> bool:
    maker = target.inputs[0] if target.inputs else None
    if maker is None or maker.op != "Shape" or maker.domain or maker.inputs[0] is not source:
        return False
    return not maker.attrs.get("start", 0) and "end" not in maker.attrs


def _from_inputs(target: gs.Tensor) -> bool:
    """Whether a shape depends on nothing but constants and the sizes of the graph's inputs, which never change."""
    stack, seen = [target], set()
    while stack:
        tensor = stack.pop()
        if isinstance(tensor, gs.Constant) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is None or any(isinstance(value, gs.Graph) for value in maker.attrs.values()):
            return False
        if maker.op == "Shape" and not maker.domain and not maker.inputs[0].inputs:
            continue
        stack += maker.inputs
    return True


def restore_group_norms(graph: gs.Graph) -> None:
    """Turn every remembered GroupNormalization back into its three nodes, for the groups that are left."""
    marked = [node for node in graph.nodes if BY_GROUP in node.attrs]
    if not marked:
        return
    targets = Targets(graph)
    names = set(targets.tensors) | {node.name for node in graph.nodes}
    put_back(graph, [_returned(norm, targets, names) for norm in marked], targets)


def _returned(node: gs.Node, targets: Targets, names: set[str]) -> Return:
    norm: GroupNorm = node.attrs.pop(BY_GROUP)
    source, *parameters = node.inputs
    groups = len(parameters[0].values)
    split, whole = norm.triple.targets
    before: list[gs.Node] = []
    new = targets.rewritten(split, _resized(split, norm.groups, groups))
    if isinstance(whole, gs.Constant):
        whole = targets.rewritten(whole, _resized(whole, norm.channels, norm.channels // norm.groups * groups))
    elif groups != norm.groups and not _reads_shape_of(whole, source):
        name = fresh(f"{norm.triple.between[1].name}_shape", names)
        whole = gs.Variable(name, dtype=np.int64)
        before.append(gs.Node("Shape", name, {}, [source], [whole]))
    return Return(node, norm.triple, (new, whole), parameters, before)


def _resized(target: gs.Constant, old: int, new: int) -> np.ndarray:
    """Return a target with another size of its second axis where that is written down."""
    sizes: np.ndarray = target.values.copy()
    if sizes.ravel()[1] == old:
        sizes.ravel()[1] = new
    return sizes
