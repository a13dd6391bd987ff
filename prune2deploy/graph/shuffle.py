"""Channel shuffles: Reshape, Transpose, Reshape as one Gather while channels are removed, and back again.

The triple splits channels into groups, so alone it could only lose whole rows and columns of channels. As a
permutation it loses any. What is left of it is a shuffle again where every group kept equally many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.fact import Shape
from prune2deploy.graph.rules.reshape import blocks
from prune2deploy.graph.rules.select import SHUFFLE


@dataclass(frozen=True, eq=False)
class Triple:
    """The nodes that a Gather stands for, taken out of the graph, with what they read and write between them.

    ``anchors`` are the nodes before which the first two stood.
    """

    nodes: tuple[gs.Node, gs.Node, gs.Node]
    shapes: tuple[gs.Constant, gs.Constant]
    between: tuple[gs.Variable, gs.Variable]
    anchors: tuple[gs.Node, gs.Node]
    axis: int
    groups: int


def fuse_shuffles(graph: gs.Graph) -> None:
    """Turn every channel shuffle of a sorted graph into one Gather that remembers it."""
    found = [(nodes, shuffle) for nodes in _triples(graph) if (shuffle := _shuffle(nodes)) is not None]
    hidden = {id(node) for nodes, _ in found for node in nodes[:2]}
    gathers = {id(nodes[2]): gs.Node("Gather", nodes[2].name) for nodes, _ in found}
    after: dict[int, gs.Node] = {}
    follower: gs.Node | None = None
    for node in reversed(graph.nodes):
        if id(node) not in hidden:
            follower = gathers.get(id(node), node)
        elif follower is not None:
            after[id(node)] = follower
    graph.nodes = [gathers.get(id(node), node) for node in graph.nodes if id(node) not in hidden]
    names = set(graph.tensors())
    for (first, turn, last), (axis, groups, channels) in found:
        source, output, gather = first.inputs[0], last.outputs[0], gathers[id(last)]
        triple = Triple(
            nodes=(first, turn, last),
            shapes=(first.inputs[1], last.inputs[1]),
            between=(first.outputs[0], turn.outputs[0]),
            anchors=(after[id(first)], after[id(turn)]),
            axis=axis,
            groups=groups,
        )
        for node in triple.nodes:
            node.inputs.clear()
            node.outputs.clear()
        order = np.arange(channels).reshape(groups, -1).T.ravel()
        gather.attrs = {"axis": axis, SHUFFLE: triple}
        gather.inputs = [source, gs.Constant(_fresh(f"{output.name}_order", names), order)]
        gather.outputs = [output]


def _triples(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Node, gs.Node]]:
    """Yield every Reshape, Transpose, Reshape that nobody else looks into."""
    outputs = {id(tensor) for tensor in graph.outputs}
    for last in graph.nodes:
        chain = [last]
        for op in ("Reshape", "Transpose", "Reshape"):
            node = chain[-1]
            source = node.inputs[0] if node.op == op and not node.domain and node.inputs else None
            if source is None:
                break
            alone = len(source.outputs) == 1 and id(source) not in outputs
            if len(chain) == 3:
                yield chain[2], chain[1], chain[0]
                break
            if not alone or not source.inputs:
                break
            chain.append(source.inputs[0])


def _shuffle(nodes: tuple[gs.Node, gs.Node, gs.Node]) -> tuple[int, int, int] | None:
    """Return the axis, the groups and the channels of a shuffle, or None for any other three nodes."""
    first, turn, last = nodes
    if not all(isinstance(node.inputs[1], gs.Constant) for node in (first, last)):
        return None
    if any(node.attrs.get("allowzero", 0) and not node.inputs[1].values.all() for node in (first, last)):
        return None
    shapes = [_shape(tensor) for tensor in (first.inputs[0], first.outputs[0], turn.outputs[0], last.outputs[0])]
    before, split, turned, after = shapes
    if before is None or split is None or turned is None or after is None or len(split) != len(before) + 1:
        return None
    down, up = blocks(before, split), blocks(turned, after)
    if down is None or up is None:
        return None
    parted = [block for block in down if not block.same]
    merged = [block for block in up if not block.same]
    if len(parted) != 1 or len(merged) != 1 or parted[0].into != merged[0].out or parted[0].out != merged[0].into:
        return None
    if len(parted[0].into) != 1 or len(parted[0].out) != 2:
        return None
    axis = parted[0].into[0]
    groups, each = split[axis], split[axis + 1]
    swapped = list(range(len(split)))
    swapped[axis], swapped[axis + 1] = axis + 1, axis
    if list(turn.attrs.get("perm", ())) != swapped or not isinstance(groups, int) or not isinstance(each, int):
        return None
    if last.inputs[1].values.ravel()[axis + 1 : axis + 2].tolist() == [0]:  # it would copy the number of groups
        return None
    return axis, groups, groups * each


def _shape(tensor: gs.Tensor) -> Shape | None:
    if tensor.shape is None:
        return None
    return tuple(size if isinstance(size, str) else int(size) if int(size) >= 0 else None for size in tensor.shape)


def restore_shuffles(graph: gs.Graph) -> None:
    """Turn every remembered Gather back into its shuffle where it still is one; others stay what they are."""
    marked = [node for node in graph.nodes if SHUFFLE in node.attrs]
    if not marked:
        return
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    tensors = graph.tensors()
    before: dict[int, list[gs.Node]] = {}
    instead: dict[int, gs.Node] = {}
    written: dict[tuple[int, tuple[int, ...]], gs.Constant] = {}
    for gather in marked:
        triple: Triple = gather.attrs.pop(SHUFFLE)
        order = gather.inputs[1].values.ravel()
        groups = _groups(order)
        if groups is None:
            continue
        shapes = [
            _rewritten(shape, sizes, tensors, written)
            for shape, sizes in zip(triple.shapes, _sizes(triple, groups, len(order)), strict=True)
        ]
        made_by = [place.get(id(node), -1) for node in gather.inputs[0].inputs]
        there = all(max(made_by, default=-1) < place.get(id(node), -1) for node in triple.anchors)
        for node, anchor in zip(triple.nodes[:2], triple.anchors if there else (gather, gather), strict=True):
            before.setdefault(id(anchor), []).append(node)
        instead[id(gather)] = triple.nodes[2]
        _connect(gather, triple, shapes, tensors)
    graph.nodes = [new for node in graph.nodes for new in (*before.get(id(node), ()), instead.get(id(node), node))]


def _groups(order: np.ndarray) -> int | None:
    """Return the number of groups of the shuffle that is this permutation, or None where it is none."""
    each = int(order[1]) if len(order) > 1 else 0
    if each < 2 or len(order) % each:
        return None
    regular = np.arange(len(order)).reshape(-1, each).T.ravel()
    return len(order) // each if (order == regular).all() else None


def _sizes(triple: Triple, groups: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    split, merged = (constant.values.copy() for constant in triple.shapes)
    if (groups, channels) != (triple.groups, _channels(triple)):
        split.ravel()[triple.axis : triple.axis + 2] = groups, channels // groups
        merged.ravel()[triple.axis] = channels
    return split, merged


def _channels(triple: Triple) -> int:
    groups, each = triple.between[0].shape[triple.axis : triple.axis + 2]
    return int(groups) * int(each)


def _rewritten(
    old: gs.Constant,
    sizes: np.ndarray,
    tensors: dict[str, gs.Tensor],
    written: dict[tuple[int, tuple[int, ...]], gs.Constant],
) -> gs.Constant:
    """Return a constant with these sizes under the old one's name where that is free; the old one if it has them."""
    key = (id(old), tuple(sizes.ravel().tolist()))
    if key not in written:
        same = bool((old.values == sizes).all()) and tensors.get(old.name, old) is old
        name = old.name if same or old.name not in tensors else _fresh(old.name, set(tensors))
        written[key] = old if same else gs.Constant(name, sizes)
        tensors[name] = written[key]
    return written[key]


def _connect(gather: gs.Node, triple: Triple, shapes: list[gs.Constant], tensors: dict[str, gs.Tensor]) -> None:
    source, output = gather.inputs[0], gather.outputs[0]
    gather.inputs.clear()
    gather.outputs.clear()
    first, turn, last = triple.nodes
    split, turned = triple.between
    for tensor in triple.between:
        if tensors.setdefault(tensor.name, tensor) is not tensor:
            tensor.name = _fresh(tensor.name, set(tensors))
            tensors[tensor.name] = tensor
    first.inputs, first.outputs = [source, shapes[0]], [split]
    turn.inputs, turn.outputs = [split], [turned]
    last.inputs, last.outputs = [turned, shapes[1]], [output]


def _fresh(wanted: str, names: set[str]) -> str:
    """Return a name that is not in use, and take it."""
    name, number = wanted, 1
    while name in names:
        name, number = f"{wanted}_{number}", number + 1
    names.add(name)
    return name
