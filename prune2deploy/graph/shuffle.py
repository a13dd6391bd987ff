"""Channel shuffles: Reshape, Transpose, Reshape as one Gather while channels are removed, and back again.

The triple splits channels into groups, so alone it could only lose whole rows and columns of channels. As a
permutation it loses any. What is left of it is a shuffle again where every group kept equally many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.names import fresh
from prune2deploy.graph.rules.reshape import blocks
from prune2deploy.graph.rules.select import SHUFFLE
from prune2deploy.graph.triples import Chain, Return, Targets, Triple, chains, put_back, replace, shape_of


@dataclass(frozen=True, eq=False)
class Shuffle:
    """The shuffle that a Gather stands for."""

    triple: Triple
    axis: int
    groups: int
    channels: int


def fuse_shuffles(graph: gs.Graph) -> None:
    """Turn every channel shuffle of a sorted graph into one Gather that remembers it."""
    found = [(nodes, shuffle) for nodes in chains(graph, "Transpose") if (shuffle := _shuffle(nodes)) is not None]
    names = set(graph.tensors())
    gathers = [(nodes, _gather(nodes, place, names)) for nodes, place in found]
    for (_, gather), triple, (_, place) in zip(gathers, replace(graph, gathers), found, strict=True):
        gather.attrs[SHUFFLE] = Shuffle(triple, *place)


def _gather(nodes: Chain, place: tuple[int, int, int], names: set[str]) -> gs.Node:
    axis, groups, channels = place
    order = np.arange(channels).reshape(groups, -1).T.ravel()
    indices = gs.Constant(fresh(f"{nodes[2].outputs[0].name}_order", names), order)
    return gs.Node("Gather", nodes[2].name, {"axis": axis}, [nodes[0].inputs[0], indices])


def _shuffle(nodes: Chain) -> tuple[int, int, int] | None:
    """Return the axis, the groups and the channels of a shuffle, or None for any other three nodes."""
    first, turn, last = nodes
    if not all(isinstance(node.inputs[1], gs.Constant) for node in (first, last)):
        return None
    if any(node.attrs.get("allowzero", 0) and not node.inputs[1].values.all() for node in (first, last)):
        return None
    shapes = [shape_of(tensor) for tensor in (first.inputs[0], first.outputs[0], turn.outputs[0], last.outputs[0])]
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


def restore_shuffles(graph: gs.Graph) -> None:
    """Turn every remembered Gather back into its shuffle where it still is one; others stay what they are."""
    marked = [node for node in graph.nodes if SHUFFLE in node.attrs]
    if not marked:
        return
    targets = Targets(graph)
    returns = []
    for gather in marked:
        shuffle: Shuffle = gather.attrs.pop(SHUFFLE)
        order = gather.inputs[1].values.ravel()
        groups = _groups(order)
        if groups is None:
            continue
        sizes = zip(shuffle.triple.targets, _sizes(shuffle, groups, len(order)), strict=True)
        first, last = (targets.rewritten(old, new) for old, new in sizes)
        returns.append(Return(gather, shuffle.triple, (first, last)))
    put_back(graph, returns, targets)


def _groups(order: np.ndarray) -> int | None:
    """Return the number of groups of the shuffle that is this permutation, or None where it is none."""
    each = int(order[1]) if len(order) > 1 else 0
    if each < 2 or len(order) % each:
        return None
    regular = np.arange(len(order)).reshape(-1, each).T.ravel()
    return len(order) // each if (order == regular).all() else None


def _sizes(shuffle: Shuffle, groups: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    split, merged = (constant.values.copy() for constant in shuffle.triple.targets)
    if (groups, channels) != (shuffle.groups, shuffle.channels):
        split.ravel()[shuffle.axis : shuffle.axis + 2] = groups, channels // groups
        merged.ravel()[shuffle.axis] = channels
    return split, merged
