"""Uneven channel shuffles that the plain convolutions beside them take into their weights: then nothing is left to run.

A shuffle whose groups kept unequal numbers of channels is a Gather that permutes them. A convolution before it that
nobody else reads can make its outputs in that order; else convolutions after it can read their inputs in the order
before it. Activations and BatchNormalizations between the two treat every channel on its own and go along.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.order import outputs_within, redirect
from prune2deploy.graph.rules import activation

MADE: dict[str, dict[int, int]] = {
    "Conv": {1: 0, 2: 0},
    "ConvTranspose": {1: 1, 2: 0},
    "BatchNormalization": {1: 0, 2: 0, 3: 0, 4: 0},
}
"""The axis along which each constant of an operator follows the channels that it makes, by input slot."""

READ = {"Conv": 1, "ConvTranspose": 0}
"""The axis along which a convolution's filters follow the channels that it reads."""

Write = Callable[[gs.Node, int, np.ndarray], None]
"""Gives a node another constant in an input slot."""


def fold_permutations(graph: gs.Graph, gathers: Iterable[gs.Node], write: Write) -> dict[str, np.ndarray]:
    """Fold Gathers that each permute all channels of a value into plain convolutions beside them, where that can be.

    Those that are not in the graph any more are passed over. Returns, for every value whose channels (axis 1) are in
    another order now, the order in which the old ones stand.
    """
    outputs, nodes = outputs_within(graph), {id(node) for node in graph.nodes}
    orders: dict[str, np.ndarray] = {}
    for gather in gathers:
        if id(gather) not in nodes or gather.attrs["axis"] != 1 or id(gather.outputs[0]) in outputs:
            continue
        order = gather.inputs[1].values.ravel()
        before, after = _before(gather, outputs), _after(gather, outputs, nodes)
        if before is not None:
            moved = [node.outputs[0].name for node in before]
            _turn_rows(before, order, write)
        elif after is not None:
            order = np.argsort(order)
            carriers = [node for node in after if node.op not in READ]
            moved = [tensor.name for tensor in (gather.outputs[0], *(node.outputs[0] for node in carriers))]
            _turn_rows(carriers, order, write)
            for node in after:
                if node.op in READ:
                    write(node, 1, np.take(node.inputs[1].values, order, axis=READ[node.op]))
        else:
            continue
        for name in moved:
            orders[name] = orders[name][order] if name in orders else order
        redirect(gather.outputs[0], gather.inputs[0])
        gather.inputs.clear()
        graph.nodes.remove(gather)
    return orders


def _turn_rows(nodes: Iterable[gs.Node], order: np.ndarray, write: Write) -> None:
    """Let nodes make their channels in another order."""
    for node in nodes:
        for slot, axis in MADE.get(node.op, {}).items():
            if slot < len(node.inputs) and not node.inputs[slot].is_empty():
                write(node, slot, np.take(node.inputs[slot].values, order, axis=axis))


def _before(gather: gs.Node, outputs: Collection[int]) -> list[gs.Node] | None:
    """Return what makes a Gather's input for it alone, up to a plain convolution; None where there is none."""
    found: list[gs.Node] = []
    source = gather.inputs[0]
    while len(source.outputs) == 1 and len(source.inputs) == 1 and id(source) not in outputs:
        node = source.inputs[0]
        found.append(node)
        if _is_plain(node):
            return found
        if not _carries(node):
            return None
        source = node.inputs[0]
    return None


def _after(gather: gs.Node, outputs: Collection[int], nodes: Collection[int]) -> list[gs.Node] | None:
    """Return all that reads a Gather's output, up to plain convolutions; None where something else reads it too."""
    found: list[gs.Node] = []
    stack = [gather.outputs[0]]
    while stack:
        tensor = stack.pop()
        if id(tensor) in outputs:
            return None
        for node in tensor.outputs:
            carries = _carries(node)
            if id(node) not in nodes or node.inputs[0] is not tensor or not (carries or _is_plain(node)):
                return None
            found.append(node)
            stack += node.outputs if carries else []
    return found


def _is_plain(node: gs.Node) -> bool:
    """Whether a node is a convolution of one group whose weights are constants."""
    return node.op in READ and node.attrs.get("group", 1) == 1 and _has_constants(node)


def _carries(node: gs.Node) -> bool:
    """Whether a node treats every channel of its first input on its own, and reads nothing else that is computed."""
    return node.op in (*activation.RULES, "BatchNormalization") and len(node.outputs) == 1 and _has_constants(node)


def _has_constants(node: gs.Node) -> bool:
    own = node.domain in (None, "", "ai.onnx")
    return own and all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in node.inputs[1:])
