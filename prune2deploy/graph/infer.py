"""Shapes as onnx infers them, of models of any size."""

from __future__ import annotations

import logging

import numpy as np
import onnx

from prune2deploy.errors import one_line
from prune2deploy.graph.groupnorm import stand_in_group_norms
from prune2deploy.graph.sizes import BY, Shape, is_open, read_shape
from prune2deploy.plugins import RULES_GROUP, plugins

log = logging.getLogger(__name__)

SMALL_CONSTANT = 1024
"""Constants of up to so many elements may be shapes, axes or indices, whose values shape inference needs."""

PLACEHOLDERS = frozenset({"", "?", "-1", "none", "unk", "unknown", "dynamic", "any"})
"""What exporters write for a size of which they know nothing: two such are not one size."""


def says_nothing(size: str) -> bool:
    """Whether the name of an input's size tells nothing, or might be mistaken for a product of sizes."""
    return size.lower() in PLACEHOLDERS or BY in size


def infer_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Replace the model's inner shapes by all that onnx can infer; large weights take no part, only their shapes do.

    Returns the shapes of the outputs. Those that the model gives them are not believed, nor is any runtime bound to
    them: exporters name the sizes of an output after those of the input, whatever the network did to them.
    """
    bare = onnx.ModelProto()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    stand_in(bare.graph)
    stand_in_group_norms(bare.graph)
    bare.graph.input.extend(model.graph.input)
    for value in bare.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if says_nothing(dimension.dim_param):
                dimension.ClearField("dim_param")
    made = {name for node in model.graph.node for name in node.output}
    for value in model.graph.output:
        open_ended = bare.graph.output.add(name=value.name, type=value.type).type
        if value.name in made and open_ended.HasField("tensor_type"):
            open_ended.tensor_type.ClearField("shape")
    listed = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) <= SMALL_CONSTANT:
            bare.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    bare.graph.value_info.extend(_of_other_domains(model))
    del model.graph.value_info[:]
    try:
        inferred = _inferred(bare)
    except (ValueError, RuntimeError, onnx.shape_inference.InferenceError) as error:
        log.warning("shapes could not be inferred (%s); operators without shapes stay opaque", one_line(error, 120))
        return {value.name: shape for value in model.graph.output if (shape := _believed(None, value)) is not None}
    model.graph.value_info.extend(inferred.graph.value_info)
    pairs = zip(inferred.graph.output, model.graph.output, strict=True)
    believed = ((value.name, _believed(read_shape(value.type), given)) for value, given in pairs if value.name in made)
    return {name: shape for name, shape in believed if shape is not None}


def _of_other_domains(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the shapes that a model gives for what operators make whose rule is another package's.

    onnx knows nothing of these operators; without a rule no shape of them is needed.
    """
    ruled = plugins(RULES_GROUP)
    made = {
        name
        for node in model.graph.node
        if node.domain and f"{node.domain}.{node.op_type}" in ruled
        for name in node.output
    }
    return [value for value in model.graph.value_info if value.name in made]


def _inferred(bare: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its inner shapes, once every pool in it makes the sizes that runtimes make."""
    while True:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
        pools = [node for node in bare.graph.node if _rounds_up(node)]
        graph = inferred.graph
        values = (*graph.value_info, *graph.input, *graph.output) if pools else ()
        shapes = {value.name: read_shape(value.type) for value in values}
        if not any(floored(node, shapes.get(node.input[0])) for node in pools):  # behind the first, sizes are others
            return inferred


def _rounds_up(node: onnx.NodeProto) -> bool:
    pool = node.op_type in POOLS and node.domain in ("", "ai.onnx")
    return pool and any(attribute.name == "ceil_mode" and attribute.i for attribute in node.attribute)


POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
"""Operators that may round the number of their windows up."""


def floored(node: onnx.NodeProto, shape: Shape | None) -> bool:
    """Let a pool with ``ceil_mode`` say its sizes without it, by its padding; return whether they are others then.

    Before opset 22 onnx counts a window that would start behind all of the input, and runtimes do not.
    """
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    kernel = given.get("kernel_shape", [])
    sizes = (shape or [])[2:]
    if not given.get("ceil_mode", 0) or len(sizes) != len(kernel) or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        return False
    if not all(isinstance(size, int) for size in sizes):
        return False
    ones = [1] * len(kernel)
    strides, dilations = given.get("strides", ones), given.get("dilations", ones)
    pads, fewer = list(given.get("pads", [0] * 2 * len(kernel))), False
    for axis, (size, taps, step, dilation) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        assert isinstance(size, int)
        window, padded = (taps - 1) * dilation + 1, size + pads[axis] + pads[len(kernel) + axis]
        count = -(-(padded - window) // step) + 1
        behind = (count - 1) * step >= size + pads[axis]
        count, fewer = count - behind, fewer or behind
        pads[len(kernel) + axis] += max(0, (count - 1) * step + window - padded)
    kept = [attribute for attribute in node.attribute if attribute.name not in ("ceil_mode", "pads")]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("pads", pads)])
    return fewer


def _believed(inferred: Shape | None, given: onnx.ValueInfoProto) -> Shape | None:
    """Return the shape of an output: what was inferred, else the sizes that are given as numbers, never as names."""
    stated = read_shape(given.type)
    if stated is None:
        return inferred
    numbers: Shape = [None if isinstance(size, str) else size for size in stated]
    if inferred is None or len(inferred) != len(numbers):
        return numbers if inferred is None else inferred
    unknown = (isinstance(size, str) and is_open(size) for size in inferred)
    pairs = zip(inferred, numbers, unknown, strict=True)
    return [number if number is not None and (size is None or open_) else size for size, number, open_ in pairs]


NOT_INFERRED = frozenset({"GroupNormalization", "MeanVarianceNormalization"})
"""Operators that keep their input's shape, which onnx infers wrongly or not at all."""


def stand_in(graph: onnx.GraphProto) -> None:
    """Put an Identity in the place of operators that shape inference does not cover: the shapes are the same."""
    for node in graph.node:
        if node.op_type in NOT_INFERRED and node.domain in ("", "ai.onnx"):
            node.op_type = "Identity"
            del node.attribute[:], node.input[1:], node.output[1:]
