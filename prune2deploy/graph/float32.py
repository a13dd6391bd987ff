"""A graph's twin in float32, for types that ONNX Runtime has no kernels for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

_OTHER_FLOATS = frozenset({onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE})


def in_float32(graph: Path | bytes) -> bytes:
    """Return the graph with bfloat16 and double replaced by float32 everywhere: weights, inputs, outputs, casts."""
    model = onnx.load(str(graph), format="protobuf") if isinstance(graph, Path) else onnx.load_from_string(graph)
    _retype_graph(model.graph)
    for function in model.functions:
        _retype_nodes(function.node)
    return bytes(model.SerializeToString())


def _retype_graph(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _retype_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _OTHER_FLOATS:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    _retype_nodes(graph.node)


def _retype_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _OTHER_FLOATS:
                attribute.i = onnx.TensorProto.FLOAT
            for tensor in (attribute.t, *attribute.tensors):
                _retype_tensor(tensor)
            for inner in (attribute.g, *attribute.graphs):
                _retype_graph(inner)


def _retype_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _OTHER_FLOATS:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def has_other_floats(graph: Path | bytes) -> bool:
    """Return whether a graph has weights of another type that `in_float32` replaces."""
    return any(tensor.data_type in _OTHER_FLOATS for tensor in read_bare(graph).graph.initializer)


def read_bare(graph: Path | bytes) -> onnx.ModelProto:
    """Return a model without its external data."""
    if isinstance(graph, bytes):
        return onnx.load_from_string(graph)
    return onnx.load(str(graph), format="protobuf", load_external_data=False)
