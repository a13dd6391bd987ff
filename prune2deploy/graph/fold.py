"""What depends on constants alone, computed once and for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from prune2deploy.graph.model import SINGLE_FILE_BYTES
from prune2deploy.graph.order import redirect
from prune2deploy.graph.stored import feeds_quantised

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators that give other values each time, constant inputs or not."""


def fold_constants(graph: gs.Graph) -> None:
    """Compute what depends on constants alone, once and for all; an output that does is passed on by an Identity."""
    if not any(_foldable(node) for node in graph.nodes):
        return
    outputs = {tensor.name for tensor in graph.outputs}

    def stays(node: gs.Node) -> bool:
        return node.op in RANDOM or feeds_quantised(node) or any(tensor.name in outputs for tensor in node.outputs)

    guards = [_guarded(graph, tensor) for tensor in graph.outputs if tensor.inputs]
    witnesses = [_witness(tensor) for node in graph.nodes if _is_elided(node) for tensor in node.outputs]
    graph.nodes += witnesses
    partial = _partial_shapes(graph)
    for node in partial:
        node.op = "PartialShape"
    with G_LOGGER.suppress(), _quiet_runtime():  # they print
        graph.fold_constants(recurse_subgraphs=False, size_threshold=SINGLE_FILE_BYTES, should_exclude_node=stays)
    for node in partial:
        node.op = "Shape"
    for witness in witnesses:
        witness.inputs.clear()
        witness.outputs.clear()
        graph.nodes.remove(witness)
    for guard in guards:
        inner, output = guard.inputs[0], guard.outputs[0]
        if not isinstance(inner, gs.Constant):  # as it was
            guard.inputs.clear()
            guard.outputs.clear()
            graph.nodes.remove(guard)
            redirect(inner, output)
            producer = inner.inputs[0]
            producer.outputs = [output if tensor is inner else tensor for tensor in producer.outputs]


@contextmanager
def _quiet_runtime() -> Iterator[None]:
    """Keep ONNX Runtime, where it is installed, from printing what its optimiser could not do."""
    try:
        from onnxruntime import set_default_logger_severity
    except ImportError:
        yield
        return
    set_default_logger_severity(4)
    try:
        yield
    finally:
        set_default_logger_severity(2)  # as it is at the start


def _partial_shapes(graph: gs.Graph) -> list[gs.Node]:
    """Fold every Shape of some axes that are all known, and return the others.

    onnx-graphsurgeon takes either for a Shape of all axes.
    """
    left = []
    for node in graph.nodes:
        if node.op != "Shape" or node.domain or not {"start", "end"} & set(node.attrs):
            continue
        shape = node.inputs[0].shape
        sizes = [None] if shape is None else list(shape)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
        if all(isinstance(size, int) for size in sizes):
            output = node.outputs[0]
            output.to_constant(np.array(sizes, dtype=np.int64))
            output.inputs.clear()
        else:
            left.append(node)
    return left


def _is_elided(node: gs.Node) -> bool:
    """Whether onnx-graphsurgeon might compute a node in integers, because it stands between casts to floats and back.

    A size times 1.5 would become a size times 1.
    """
    makers = [maker for tensor in node.inputs for maker in tensor.inputs]
    readers = [reader for tensor in node.outputs for reader in tensor.outputs]
    return any(maker.op == "Cast" for maker in makers) and any(reader.op == "Cast" for reader in readers)


def _witness(tensor: gs.Tensor) -> gs.Node:
    """Return another reader of a value, so that what makes it must stay as it is."""
    return gs.Node("Identity", inputs=[tensor], outputs=[gs.Variable(f"{tensor.name}_witness", dtype=tensor.dtype)])


def _guarded(graph: gs.Graph, output: gs.Variable) -> gs.Node:
    """Put an Identity before an output, so that its producer may be folded like any other node."""
    inner = gs.Variable(f"{output.name}_unfolded", dtype=output.dtype, shape=output.shape)
    producer = output.inputs[0]
    redirect(output, inner)
    producer.outputs = [inner if tensor is output else tensor for tensor in producer.outputs]
    guard = gs.Node("Identity", f"{output.name}_constant", {}, [inner], [output])
    graph.nodes.append(guard)
    return guard


def _foldable(node: gs.Node) -> bool:
    return node.op in ("Shape", "Size") or (
        bool(node.inputs)
        and all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in node.inputs)
        and not feeds_quantised(node)
    )
