"""The normal form in which all arms are analysed and timed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from prune2deploy.errors import InputError, one_line
from prune2deploy.graph.fold import fold_constants
from prune2deploy.graph.groupnorm import fuse_group_norms, restore_group_norms, settle_casts
from prune2deploy.graph.infer import SMALL_CONSTANT, infer_shapes, says_nothing
from prune2deploy.graph.open_sizes import name_sizes
from prune2deploy.graph.order import all_inputs, outputs_within, redirect, remove_dead_nodes, sort_nodes
from prune2deploy.graph.pads import fold_infinite_pads
from prune2deploy.graph.shapes import fold_shapes
from prune2deploy.graph.shuffle import fuse_shuffles, restore_shuffles
from prune2deploy.graph.stored import absorb_transposes
from prune2deploy.graph.strided import reshape_strided
from prune2deploy.graph.windows import join_windows, part_windows


def normalise(model: onnx.ModelProto) -> gs.Graph:
    """Return the graph in normal form: shapes inferred, constants folded, no dead node, none that only passes on.

    Initializers that are listed as inputs become plain constants: their listing alone keeps a runtime from optimising.
    The inputs and outputs keep their names, types and shapes. Works in place: the model's own nodes are changed too.
    """
    if model.functions:
        own = next((one.name for one in model.functions if one.domain in ("", "ai.onnx")), None)
        if own is not None:  # runtimes take the operator, onnx's inliner the function
            raise InputError(f"the graph defines '{own}' of ONNX's own domain anew; export it again")
        try:
            model.CopyFrom(onnx.inliner.inline_local_functions(model))
        except RuntimeError as error:
            reason = f"its functions cannot be put in their places ({one_line(error, 120)})"
            raise InputError(f"the graph is not valid: {reason}; export it again") from error
    _lift_constants(model.graph)
    _fill_sparse(model.graph)
    _remove_passing(model.graph)
    graph = _imported(model)
    settle_casts(graph)
    if any(node.op in ("Shape", "Size", "If") for node in graph.nodes):
        fold_constants(graph)
        fold_shapes(graph)
        remove_dead_nodes(graph)
        graph = _imported_again(graph, model)  # more shapes are known by now
    absorb_transposes(graph)
    fold_constants(graph)
    remove_dead_nodes(graph)
    sort_nodes(graph)
    name_sizes(graph)
    reshape_strided(graph)
    fold_infinite_pads(graph)
    part_windows(graph)
    fuse_shuffles(graph)
    fuse_group_norms(graph)
    return graph


def _imported(model: onnx.ModelProto) -> gs.Graph:
    outputs = infer_shapes(model)
    with G_LOGGER.suppress():  # it prints
        graph = gs.import_onnx(model)
    for tensor in graph.outputs:
        if tensor.name in outputs and not isinstance(tensor, gs.Constant):
            tensor.shape = outputs[tensor.name]
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, gs.Constant)]
    for tensor in graph.inputs:
        if tensor.shape is not None:
            tensor.shape = [None if says_nothing(str(size)) else size for size in tensor.shape]
    return graph


def _imported_again(graph: gs.Graph, like: onnx.ModelProto) -> gs.Graph:
    """Return the graph as it is read from what it would write; large weights are handed over, not written."""
    outputs = outputs_within(graph)
    weights: dict[str, gs.Constant] = {}
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Constant) and np.prod(tensor.shape) > SMALL_CONSTANT and id(tensor) not in outputs:
            weights[name] = tensor.copy()
            tensor.values = LazyValues(_without_data(tensor))
    written = _exported(graph, like)
    _remove_passing(written.graph)
    graph = _imported(written)
    for name, tensor in graph.tensors().items():
        if name in weights:
            redirect(tensor, weights[name])
    return graph


def _without_data(tensor: gs.Constant) -> onnx.TensorProto:
    element = tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
    return onnx.TensorProto(name=tensor.name, dims=tensor.shape, data_type=element)


_NOT_WRITTEN = frozenset({"int4", "uint4", "float8_e4m3fnuz", "float8_e5m2fnuz", "object"})
"""Types of arrays that onnx-graphsurgeon writes wrongly or not at all; what it did not read it hands on as it is."""


def _exported(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    sort_nodes(graph)
    for tensor in {id(tensor): tensor for node in graph.nodes for tensor in all_inputs(node)}.values():
        read = isinstance(tensor, gs.Constant) and not isinstance(tensor._values, LazyValues)
        if read and str(tensor.dtype) in _NOT_WRITTEN:
            tensor.values = LazyValues(onnx.numpy_helper.from_array(tensor.values, tensor.name))
    with G_LOGGER.suppress():
        model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = like.ir_version
    return model


_SCALAR_FIELDS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes into initializers."""
    lifted = [node for node in graph.node if node.op_type == "Constant" and _constant_value(node) is not None]
    for node in lifted:
        tensor = _constant_value(node)
        assert tensor is not None
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)


def _fill_sparse(graph: onnx.GraphProto) -> None:
    """Turn sparse initializers into plain ones: nothing below looks at the others."""
    for sparse in graph.sparse_initializer:
        values, indices = (onnx.numpy_helper.to_array(part) for part in (sparse.values, sparse.indices))
        dense = np.zeros(tuple(sparse.dims), dtype=values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            tensor: onnx.TensorProto = attribute.t
            return tensor
        if attribute.name in _SCALAR_FIELDS:
            value = np.array(onnx.helper.get_attribute_value(attribute), dtype=_SCALAR_FIELDS[attribute.name])
            return onnx.numpy_helper.from_array(value)
    return None


def _remove_passing(graph: onnx.GraphProto) -> None:
    """Let the readers of a node that only passes its input on read that input; the graph's outputs keep theirs."""
    listed = {value.name for value in graph.input}
    constants = {
        tensor.name: tensor
        for tensor in graph.initializer
        if np.prod(tensor.dims) <= SMALL_CONSTANT and tensor.name not in listed
    }
    outputs = {value.name for value in graph.output}
    instead: dict[str, str] = {}
    for node in graph.node:
        _rename_inputs(node, instead)
        passes = _PASSING.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if passes is not None and node.output[0] not in outputs and passes(node, constants):
            instead[node.output[0]] = node.input[0]


def _rename_inputs(node: onnx.NodeProto, instead: dict[str, str]) -> None:
    for slot, name in enumerate(node.input):
        if name in instead:
            node.input[slot] = instead[name]
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
            shadowed = {name for child in inner.node for name in child.output} | {value.name for value in inner.input}
            visible = {old: new for old, new in instead.items() if old not in shadowed}
            for child in inner.node:
                _rename_inputs(child, visible)
            for value in inner.output:
                if value.name in visible:  # an output must be a node's own: pass it through one
                    inner.node.add(op_type="Identity", input=[visible[value.name]], output=[value.name])


Constants = dict[str, onnx.TensorProto]


def _dropout_passes(node: onnx.NodeProto, constants: Constants) -> bool:
    if len(node.output) > 1 and node.output[1]:
        return False
    mode = node.input[2] if len(node.input) > 2 else ""
    return not mode or (mode in constants and not np.any(onnx.numpy_helper.to_array(constants[mode])))


def _slice_passes(node: onnx.NodeProto, constants: Constants) -> bool:
    """Whether a Slice takes everything, as exporters write for ``x[:, :, ::2]`` on the first axes."""
    if len(node.input) < 3 or any(name and name not in constants for name in node.input[1:]):
        return False
    parts = [onnx.numpy_helper.to_array(constants[name]) if name else None for name in node.input[1:]]
    starts, ends, steps = parts[0], parts[1], parts[3] if len(parts) > 3 else None
    assert starts is not None
    assert ends is not None
    return bool((starts == 0).all() and (ends >= 2**31 - 1).all() and (steps is None or (steps == 1).all()))


_PASSING: dict[str, Callable[[onnx.NodeProto, Constants], bool]] = {
    "Identity": lambda node, constants: True,
    "Dropout": _dropout_passes,
    "Slice": _slice_passes,
}


def restore(graph: gs.Graph) -> None:
    """Put back what the normal form writes in another way for the analysis alone."""
    restore_group_norms(graph)
    restore_shuffles(graph)
    join_windows(graph)


def to_model(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as a model with the metadata, operator sets and IR version of ``like``, without inner shapes."""
    restore(graph)
    model = _exported(graph, like)
    del model.graph.value_info[:]
    del model.opset_import[:]
    model.opset_import.extend(like.opset_import)
    del model.metadata_props[:]
    model.metadata_props.extend(like.metadata_props)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, field, getattr(like, field))
    del model.graph.input[:]
    names = {tensor.name for tensor in graph.inputs}
    model.graph.input.extend(value for value in like.graph.input if value.name in names)
    del model.graph.output[:]
    model.graph.output.extend(like.graph.output)
    model.graph.name = like.graph.name
    return model
