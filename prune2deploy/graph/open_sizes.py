"""Sizes that onnx leaves open: what they must be.

onnx gives the -1 of a Reshape to ``[-1, 2, 58, 28, 28]`` a symbol of its own, even where it can only be the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from prune2deploy.graph.entries import MOST, entries_of
from prune2deploy.graph.infer import POOLS, floored
from prune2deploy.graph.sizes import Shape, Size, is_open, product, quotient, read_shape

log = logging.getLogger(__name__)


def name_sizes(graph: gs.Graph) -> None:
    """Give every open size of a topologically sorted graph the number or the name that it must have."""
    if all(is_whole(tensor) for node in graph.nodes for tensor in node.outputs):
        return
    sizes = OpenSizes(graph)
    for node in graph.nodes:
        sizes.settle(node)
    sizes.finish()


def is_whole(tensor: gs.Tensor) -> bool:
    """Whether every size of a tensor is known by number or name."""
    return tensor.shape is not None and not any(is_open(size) for size in tensor.shape)


class OpenSizes:
    """What onnx's symbols were found to stand for, as one sweep over the nodes goes on."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._found: dict[str, Size] = {}

    def settle(self, node: gs.Node) -> None:
        """Infer the shapes of a node's outputs where they are not known whole, from those of its inputs."""
        for tensor in node.outputs:
            self._rename(tensor)
        if all(is_whole(tensor) for tensor in node.outputs):
            return
        for tensor, shape in zip(node.outputs, _inferred(node, self._graph), strict=True):
            self._learn(tensor, shape)
        if node.op in _SAY and not node.domain and node.outputs:
            self._learn(node.outputs[0], _SAY[node.op](node))

    def finish(self) -> None:
        """Let what was found later hold for all tensors."""
        for node in self._graph.nodes:
            for tensor in node.outputs:
                self._rename(tensor)

    def _rename(self, tensor: gs.Tensor) -> None:
        if self._found and tensor.shape is not None:
            tensor.shape = [self._known(size) for size in tensor.shape]

    def _known(self, size: Size) -> Size:
        while isinstance(size, str) and size in self._found:
            size = self._found[size]
        return size

    def _learn(self, tensor: gs.Tensor, shape: Shape | None) -> None:
        if shape is None or (tensor.shape is not None and len(tensor.shape) != len(shape)):
            return
        for old, new in zip(tensor.shape or (), shape, strict=False):
            if isinstance(old, str) and is_open(old) and not is_open(new):
                self._found[old] = new
        before = tensor.shape or [None] * len(shape)
        tensor.shape = [
            self._known(old if is_open(new) and old is not None else new)
            for old, new in zip(before, shape, strict=True)
        ]


def _balanced(node: gs.Node) -> Shape | None:
    """Return the output's shape of a Reshape with the one size that its source's elements leave for it."""
    source, output = node.inputs[0].shape, node.outputs[0].shape
    if source is None or output is None:
        return None
    opened = [axis for axis, size in enumerate(output) if is_open(size) and size not in source]
    if len(opened) != 1:
        return None
    rest = product(size for axis, size in enumerate(output) if axis != opened[0])
    found = quotient(product(source), rest)
    return [found if axis == opened[0] else size for axis, size in enumerate(output)]


def _resized(node: gs.Node) -> Shape | None:
    """Return the sizes that a Resize is given for all axes, or those that its scales leave as they are."""
    whole = "axes" not in node.attrs and node.attrs.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if len(node.inputs) == 4:
        return entries_of(node.inputs[3]) if whole else None
    source, scales = node.inputs[0].shape, node.inputs[-1]
    if source is None or not whole or not isinstance(scales, gs.Constant) or scales.values.size != len(source):
        return None
    return [size if scale == 1 else None for size, scale in zip(source, scales.values.ravel(), strict=True)]


def _counted(node: gs.Node) -> Shape | None:
    """Return how many numbers a Range from 0 in steps of 1 gives."""
    start, limit, step = (entries_of(tensor) for tensor in node.inputs)
    return limit if (start, step) == ([0], [1]) else None


def _expanded(node: gs.Node) -> Shape | None:
    """Return the sizes that an Expand is given, where its input has only one of everything."""
    source, wanted = node.inputs[0].shape, entries_of(node.inputs[1])
    if source is None or wanted is None or len(source) > len(wanted):
        return None
    before = [*[1] * (len(wanted) - len(source)), *source]
    return [new if old == 1 else None for old, new in zip(before, wanted, strict=True)]


def _tiled(node: gs.Node) -> Shape | None:
    """Return the sizes of a Tile's input, each as often as its repeats say."""
    source, repeats = node.inputs[0].shape, entries_of(node.inputs[1])
    if source is None or repeats is None or len(source) != len(repeats):
        return None
    return [product(both) for both in zip(source, repeats, strict=True)]


def _filled(node: gs.Node) -> Shape | None:
    return entries_of(node.inputs[0])


_SAY: dict[str, Callable[[gs.Node], Shape | None]] = {
    "Reshape": _balanced,
    "Resize": _resized,
    "Upsample": _resized,
    "Range": _counted,
    "Expand": _expanded,
    "Tile": _tiled,
    "ConstantOfShape": _filled,
}
"""What else an operator says of its output's shape."""


_NOT_INFERRED = (
    onnx.defs.SchemaError,
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    ValueError,
    TypeError,
    RuntimeError,
)


def _inferred(node: gs.Node, graph: gs.Graph) -> list[Shape | None]:
    """Return what onnx says of the shapes of a node's outputs, given those of its inputs; types are set on the way."""
    unknown: list[Shape | None] = [None] * len(node.outputs)
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return unknown
    if any(tensor.name and not isinstance(tensor, gs.Constant) and tensor.shape is None for tensor in node.inputs):
        return unknown
    if any(tensor.name and tensor.dtype is None for tensor in node.inputs):
        return unknown
    try:
        schema = onnx.defs.get_schema(node.op, graph.opset, node.domain or "")
        proto = OnnxExporter.export_node(node)
        if node.op in POOLS:
            floored(proto, node.inputs[0].shape)
        types = {tensor.name: _type_of(tensor) for tensor in node.inputs if tensor.name}
        small = {
            tensor.name: onnx.numpy_helper.from_array(np.asarray(tensor.values), tensor.name)
            for tensor in node.inputs
            if isinstance(tensor, gs.Constant) and np.prod(tensor.shape) <= MOST
        }
        opsets = [onnx.helper.make_opsetid("", graph.opset)]
        found = onnx.shape_inference.infer_node_outputs(schema, proto, types, small, opset_imports=opsets)
    except _NOT_INFERRED as error:
        log.debug("the shape of %s is not known: %s", node.name, error)
        return unknown
    return [_taken(tensor, found[tensor.name]) if tensor.name in found else None for tensor in node.outputs]


def _taken(tensor: gs.Tensor, found: onnx.TypeProto) -> Shape | None:
    shape = read_shape(found)
    if shape is not None and tensor.dtype is None:
        tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(found.tensor_type.elem_type)
    return shape


def _type_of(tensor: gs.Tensor) -> onnx.TypeProto:
    kind = (
        tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    return onnx.helper.make_tensor_type_proto(kind, [size if size != "" else None for size in tensor.shape])
