"""ONNX files in and out, and the normal form in which all arms are analysed and timed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data
from onnx_graphsurgeon.logger import G_LOGGER

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import publish, require_file, write_with
from prune2deploy.graph.groupnorm import fuse_group_norms, restore_group_norms, settle_casts, stand_in_group_norms
from prune2deploy.graph.open_sizes import name_sizes
from prune2deploy.graph.shapes import fold_shapes
from prune2deploy.graph.shuffle import fuse_shuffles, restore_shuffles
from prune2deploy.graph.stored import absorb_transposes, feeds_quantised
from prune2deploy.graph.windows import join_windows, part_windows

log = logging.getLogger(__name__)

SINGLE_FILE_BYTES = int(1.5e9)
"""Above this a model keeps its weights in a file beside it; protobuf itself ends at 2 GB."""

SMALL_CONSTANT = 1024
"""Constants of up to so many elements may be shapes, axes or indices, whose values shape inference needs."""

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators that give other values each time, constant inputs or not."""

PLACEHOLDERS = frozenset({"", "?", "-1", "none", "unk", "unknown", "dynamic", "any"})
"""What exporters write for a size of which they know nothing: two such are not one size."""

MIN_OPSET, MAX_OPSET = 9, 23


def load_model(path: Path) -> onnx.ModelProto:
    """Return the model in an ONNX file, with its external data.

    Raises:
        InputError: if the file is missing, a folder, truncated, not ONNX, of an operator set that is not supported, or
            if its external data is missing or lies outside its folder.
    """
    require_file(path, "an ONNX file")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"'{path}' is not an ONNX file or is truncated ({one_line(error, 120)}); export it again"
        ) from error
    if not model.graph.node and not model.graph.input and not model.graph.output:
        raise InputError(f"'{path}' is not an ONNX file: it holds no graph; export it again")
    names = [value.name for value in model.graph.output]
    if len(set(names)) < len(names):
        raise InputError(f"'{path}' gives out two outputs of one name; export it again")
    _check_opset(model, path)
    _load_external(model, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise InputError(f"'{path}' is not a valid ONNX graph ({one_line(error, 200)}); export it again") from error
    return model


def _check_opset(model: onnx.ModelProto, path: Path) -> None:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise InputError(f"'{path}' names no ONNX operator set; export it again with opset {MIN_OPSET} to {MAX_OPSET}")
    if not MIN_OPSET <= versions[0] <= MAX_OPSET:
        raise InputError(
            f"'{path}' uses operator set {versions[0]}, but {MIN_OPSET} to {MAX_OPSET} are supported; "
            "convert it with onnx.version_converter or export it again"
        )


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in onnx.external_data_helper._get_all_tensors(model):  # the only walk over subgraphs too
        if not uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if not isinstance(location, str):  # protobuf gives bytes where a name is no text
            raise InputError(f"'{path}' wants its weights from a file whose name is no text; export it again")
        try:
            place = (folder / location).resolve()
        except (OSError, ValueError) as error:
            reason = f"'{path}' wants its weights from a file of an impossible name ({one_line(error, 60)})"
            raise InputError(f"{reason}; export it again") from error
        shown = one_line(location, 80)
        if not place.is_relative_to(folder):
            raise InputError(f"'{path}' wants its weights from '{shown}', outside its folder; move them beside it")
        if not os.path.isfile(place):  # (unlike Path.is_file, no name is too long for it)
            raise InputError(
                f"'{path}' wants its weights from '{shown}', which is not beside it; copy that file there too"
            )
    try:
        onnx.load_external_data_for_model(model, str(folder))
    except (OSError, TypeError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise InputError(
            f"the external data of '{path}' cannot be read ({one_line(error, 160)}); export it again"
        ) from error


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model whole or not at all: one file below 1.5 GB, above it with its weights in ``NAME.data``."""
    if sum(tensor.ByteSize() for tensor in model.graph.initializer) < SINGLE_FILE_BYTES:
        data = model.SerializeToString(deterministic=True)
        write_with(path, lambda temporary: temporary.write_bytes(data))
        return
    model = copy_of(model)  # saving with external data takes the weights out of the model
    weights = path.with_name(path.name + ".data")
    temporary_weights = path.with_name(f".{path.name}.data.part")

    def write(temporary: Path) -> None:
        onnx.save_model(
            model, temporary, save_as_external_data=True, all_tensors_to_one_file=True, location=temporary_weights.name
        )
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = weights.name
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        publish(temporary_weights, weights)

    write_with(path, write)


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model, its weights included."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


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
        again = _exported(graph, model)
        _remove_passing(again.graph)
        graph = _imported(again)  # more shapes are known by now
    absorb_transposes(graph)
    fold_constants(graph)
    remove_dead_nodes(graph)
    sort_nodes(graph)
    name_sizes(graph)
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
            tensor.shape = [None if str(size).lower() in PLACEHOLDERS else size for size in tensor.shape]
    return graph


def _exported(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    sort_nodes(graph)
    with G_LOGGER.suppress():
        model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = like.ir_version
    return model


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


Dimensions = list[int | str | None]


def infer_shapes(model: onnx.ModelProto) -> dict[str, Dimensions]:
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
            if dimension.dim_param.lower() in PLACEHOLDERS:
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
    del model.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except (ValueError, RuntimeError, onnx.shape_inference.InferenceError) as error:
        log.warning("shapes could not be inferred (%s); operators without shapes stay opaque", one_line(error, 120))
        return {value.name: shape for value in model.graph.output if (shape := _believed(None, value)) is not None}
    model.graph.value_info.extend(inferred.graph.value_info)
    pairs = zip(inferred.graph.output, model.graph.output, strict=True)
    believed = ((value.name, _believed(_shape(value), given)) for value, given in pairs if value.name in made)
    return {name: shape for name, shape in believed if shape is not None}


def _shape(value: onnx.ValueInfoProto) -> Dimensions | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims]


def _believed(inferred: Dimensions | None, given: onnx.ValueInfoProto) -> Dimensions | None:
    """Return the shape of an output: what was inferred, else the sizes that are given as numbers, never as names."""
    stated = _shape(given)
    if stated is None:
        return inferred
    numbers: Dimensions = [None if isinstance(size, str) else size for size in stated]
    if inferred is None or len(inferred) != len(numbers):
        return numbers if inferred is None else inferred
    unknown = (isinstance(size, str) and size.startswith("unk__") for size in inferred)
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


def _foldable(node: gs.Node) -> bool:
    return node.op in ("Shape", "Size") or (
        bool(node.inputs)
        and all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in node.inputs)
        and not feeds_quantised(node)
    )


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of ``old`` read ``new``."""
    for reader in list(old.outputs):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]


def remove_dead_nodes(graph: gs.Graph) -> None:
    """Remove every node that no output depends on; inputs stay."""
    alive: set[int] = set()
    stack = [producer for tensor in graph.outputs for producer in tensor.inputs]
    while stack:
        node = stack.pop()
        if id(node) in alive:
            continue
        alive.add(id(node))
        stack += [producer for tensor in all_inputs(node) for producer in tensor.inputs]
    for node in graph.nodes:
        if id(node) not in alive:
            node.inputs.clear()
            node.outputs.clear()
    graph.nodes = [node for node in graph.nodes if id(node) in alive]


def all_inputs(node: gs.Node) -> Iterable[gs.Tensor]:
    """Yield everything that a node reads, in its subgraphs too."""
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield from value.outputs
            for inner in value.nodes:
                yield from all_inputs(inner)


def sort_nodes(graph: gs.Graph) -> None:
    """Sort the nodes topologically, keeping their order where it is already right."""
    made_by = {id(tensor): node for node in graph.nodes for tensor in node.outputs}
    state: dict[int, str] = {}
    order: list[gs.Node] = []
    for root in graph.nodes:
        stack = [(root, iter(list(all_inputs(root))))] if id(root) not in state else []
        while stack:
            node, inputs = stack[-1]
            state[id(node)] = "open"
            for tensor in inputs:
                maker = made_by.get(id(tensor))
                if maker is None or state.get(id(maker)) == "done":
                    continue
                if state.get(id(maker)) == "open":
                    raise InputError("the graph has a cycle, which ONNX does not allow; export it again")
                stack.append((maker, iter(list(all_inputs(maker)))))
                break
            else:
                state[id(node)] = "done"
                order.append(node)
                stack.pop()
    graph.nodes = order


def to_model(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as a model with the metadata, operator sets and IR version of ``like``, without inner shapes."""
    restore_group_norms(graph)
    restore_shuffles(graph)
    join_windows(graph)
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
