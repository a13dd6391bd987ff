"""Small graphs for tests: written as text or as nodes, slimmed, run and compared."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from prune2deploy.graph.infer import NOT_INFERRED, stand_in
from prune2deploy.graph.keep import Analysis, analyse
from prune2deploy.graph.node import tables
from prune2deploy.graph.normal import normalise
from prune2deploy.graph.rewrite import Slimmed, remove_dead_channels
from prune2deploy.graph.verify import verify


def weights(*shape: int, seed: int = 0, zero: tuple[int, ...] = ()) -> np.ndarray:
    """Return dense float32 weights with the named rows zeroed."""
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    array[list(zero)] = 0
    return array


def graph(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]] | list[str],
    *,
    opset: int = 18,
    element: int | dict[str, int] = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Return a checked model; constants keep the type of their array, outputs given by name get what onnx infers.

    ``element`` is the type of the inputs and outputs, one for all or by name.
    """
    types = element if isinstance(element, dict) else dict.fromkeys([*inputs, *outputs], element)
    if isinstance(outputs, list):
        open_types = {name: 0 if name in outputs else types[name] for name in [*inputs, *outputs]}
        open_ended = _model(nodes, constants, inputs, dict.fromkeys(outputs), opset, open_types)
        stand_in(open_ended.graph)
        inferred = onnx.shape_inference.infer_shapes(open_ended, data_prop=True)
        outputs = {
            value.name: [dim.dim_param or dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
            for value in inferred.graph.output
        }
        types = types | {value.name: value.type.tensor_type.elem_type for value in inferred.graph.output}
    model = _model(nodes, constants, inputs, outputs, opset, types)
    onnx.checker.check_model(model, full_check=not any(node.op_type in NOT_INFERRED for node in nodes))
    return model


def _model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    inputs: dict[str, list[Any]],
    outputs: dict[str, Any],
    opset: int,
    types: dict[str, int],
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, types[name], shape) for name, shape in inputs.items()],
        [
            helper.make_tensor_value_info(name, types[name], shape) if types[name] else onnx.ValueInfoProto(name=name)
            for name, shape in outputs.items()
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def parse(text: str, opset: int = 18, **constants: np.ndarray) -> onnx.ModelProto:
    """Return the model written in ONNX's text form, with large constants given as arrays by name."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.load_from_string(model.SerializeToString())


def slim_and_verify(model: onnx.ModelProto, **options: Any) -> Slimmed:
    """Return what was removed of a copy, after verifying it."""
    slimmed = remove_dead_channels(copy_of(model), **options)
    verify(model.SerializeToString(), slimmed.model.SerializeToString())
    return slimmed


def analysis_of(model: onnx.ModelProto) -> Analysis:
    return analyse(tables(normalise(copy_of(model))))


def kept(model: onnx.ModelProto, value: str, axis: int = 1) -> list[bool]:
    """Return which positions of a value are kept."""
    return list(analysis_of(model).keep.kept[value, axis].tolist())


def initializer(model: onnx.ModelProto, name: str) -> np.ndarray:
    found = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return np.asarray(numpy_helper.to_array(found))


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return all outputs, without graph optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]
