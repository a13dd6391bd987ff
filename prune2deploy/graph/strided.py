"""Reads by stride that read everything in order: exporters write such an ``as_strided`` as a Gather of single elements.

``x.reshape(-1)[320 * arange(N) + arange(320)]`` is ``x`` again, as ``[N, 320]``; but no rule sees that in the indices.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.names import fresh
from prune2deploy.graph.order import outputs_within, redirect, remove_dead_nodes

Places = tuple[int, np.ndarray]
"""Indices that are so many times the batch's index (along axis 0) plus a constant."""


def reshape_strided(graph: gs.Graph) -> None:
    """Turn every Gather that takes all elements of a value in their order into a Reshape, or into nothing."""
    found = [(node, source) for node in graph.nodes if (source := _read_in_order(node)) is not None]
    if not found:
        return
    outputs, names = outputs_within(graph), set(graph.tensors())
    for node, source in found:
        output = node.outputs[0]
        if list(source.shape) == list(output.shape) and id(output) not in outputs:
            redirect(output, source)
            continue
        target = gs.Constant(fresh(f"{output.name}_shape", names), np.array([-1, *output.shape[1:]], dtype=np.int64))
        node.op, node.attrs, node.inputs = "Reshape", {}, [source, target]
    remove_dead_nodes(graph)


def _read_in_order(node: gs.Node) -> gs.Tensor | None:
    """Return the value that a Gather reads whole and in order, or None where it does anything else."""
    if node.op != "Gather" or node.domain or node.attrs.get("axis", 0) != 0 or not node.inputs[0].inputs:
        return None
    flatten, output = node.inputs[0].inputs[0], node.outputs[0]
    if flatten.op != "Reshape" or flatten.domain or node.inputs[0].shape is None or len(node.inputs[0].shape) != 1:
        return None
    source = flatten.inputs[0]
    if not source.shape or not output.shape or source.shape[0] != output.shape[0]:
        return None
    sizes = (*source.shape[1:], *output.shape[1:])
    if not isinstance(source.shape[0], str) or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    whole, places = int(np.prod(source.shape[1:])), _places(node.inputs[1], source.shape[0])
    if places is None or places[0] != whole or whole != np.prod(output.shape[1:]):
        return None
    read = np.broadcast_to(places[1], (1, *output.shape[1:]))
    return source if (read.ravel() == np.arange(whole)).all() else None


def _places(tensor: gs.Tensor, batch: str) -> Places | None:
    if isinstance(tensor, gs.Constant):
        return 0, np.asarray(tensor.values)
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.domain or tensor.shape is None:
        return None
    if node.op == "Range":
        start, _, step = (part.values if isinstance(part, gs.Constant) else None for part in node.inputs)
        counts = start == 0 and step == 1 and list(tensor.shape) == [batch]
        return (1, np.zeros((1,), np.int64)) if counts else None
    if node.op not in ("Add", "Mul", "Unsqueeze"):
        return None
    found = [_places(part, batch) for part in node.inputs]
    first = found[0]
    if first is None or None in found:
        return None
    if node.op == "Unsqueeze":  # behind the batch
        rank = len(tensor.shape)
        return (first[0], first[1].reshape((1,) * rank)) if first[1].size == 1 and _batch_first(node) else None
    return _sum_or_product(node.op, [part for part in found if part is not None], len(tensor.shape))


def _batch_first(node: gs.Node) -> bool:
    before, after = node.inputs[0].shape, node.outputs[0].shape
    return bool(before) and list(after) == [before[0], *(1 for _ in after[1:])]


def _sum_or_product(op: str, parts: list[Places], rank: int) -> Places | None:
    """Return the places that two make, each of which follows the batch along axis 0 or has one row for all of it."""
    (step, first), (other, second) = parts
    for stride, array in parts:
        if (stride and array.ndim != rank) or (array.ndim == rank > 0 and array.shape[0] != 1):
            return None
    if op == "Add":
        return step + other, first + second
    if (step and other) or first.size > 1 or second.size > 1:
        return None
    factor, array = (int(second.ravel()[0]), first) if step else (int(first.ravel()[0]), second)
    return (step + other) * factor, array * factor
