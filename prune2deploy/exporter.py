"""From a torch network to ONNX files: unfused with torch's names for the analysis, optimised for deployment."""

import ast
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from prune2deploy.errors import InputError, one_line

OPSET = 18
"""Read by every TensorRT from 10.0 on, and the set that torch's exporter writes without converting."""

SourceMap = dict[str, dict[str, str]]
"""Node name -> ``module`` (path of the torch module) and ``source`` (file, line and function)."""


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported graph, stripped of what the exporter recorded, and that record."""

    model: onnx.ModelProto
    source_map: SourceMap


def export_network(module: nn.Module, example_inputs: Sequence[torch.Tensor], *, fuse: bool) -> Exported:
    """Return the module as an ONNX graph with opset 18, named inputs and outputs, and a dynamic batch.

    Args:
        module: exported in eval mode; it is not changed.
        example_inputs: inputs with a batch of at least 2 (1 would be taken as a constant).
        fuse: run onnxscript's optimiser, which folds BatchNormalization; without it the graph keeps every norm, and
            every initializer that is a parameter or buffer keeps its torch name and value.

    Raises:
        InputError: if the network cannot be exported, with the exporter's reason.
    """
    module = copy.deepcopy(module).eval()
    inputs = tuple(example_inputs)
    outputs = _output_count(module, inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=_names("input", len(inputs)),
                output_names=_names("output", outputs),
                dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in inputs),
            )
            model = _simplified(program, fuse=fuse)
    except Exception as error:  # the exporter fails with errors of many libraries
        reason = _reason(error)
        raise InputError(
            f"the network cannot be exported to ONNX: {reason}; change that part of its forward()"
        ) from error
    if not fuse:
        _drop_made_up_biases(model, set(module.state_dict()))
    return Exported(model, _take_record(model))


def _names(base: str, count: int) -> list[str]:
    return [base] if count == 1 else [f"{base}_{index}" for index in range(count)]


def _output_count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    with torch.no_grad():
        try:
            result = module(*inputs)
        except Exception as error:  # whatever a user's forward() raises
            shapes = [list(tensor.shape) for tensor in inputs]
            raise InputError(
                f"the network does not run on inputs {shapes} ({one_line(error, 160)}); give --input NAME:SHAPE, or in "
                "Python other inputs"
            ) from error
    return len([leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints, logs and warns about its own internals, whole graphs among them."""
    earlier = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(earlier)


def _simplified(program: Any, *, fuse: bool) -> onnx.ModelProto:
    from onnxscript import optimizer

    if fuse:
        program.optimize()
    else:
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
    model: onnx.ModelProto = program.model_proto
    return model


def _reason(error: BaseException) -> str:
    """Return the innermost reason on one line: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return one_line(lines[0] if lines else type(error).__name__, 200).rstrip(".")


def _drop_made_up_biases(model: onnx.ModelProto, names: set[str]) -> None:
    """Remove the zero biases that the exporter gives to convolutions which have none."""
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        bias = node.input[2] if node.op_type == "Conv" and len(node.input) == 3 else ""
        if bias in arrays and bias not in names and not np.any(numpy_helper.to_array(arrays[bias])):
            del node.input[2]
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    unused = [tensor for tensor in model.graph.initializer if tensor.name not in used]
    for tensor in unused:
        model.graph.initializer.remove(tensor)


def _take_record(model: onnx.ModelProto) -> SourceMap:
    """Take what the exporter recorded of modules and source lines out of the model, and return it by node."""
    record: SourceMap = {}
    for node in model.graph.node:
        entries = {entry.key: entry.value for entry in node.metadata_props}
        found = {"module": _module_of(entries), "source": _source_of(entries)}
        record[node.name] = {key: value for key, value in found.items() if value}
        del node.metadata_props[:]
        node.ClearField("doc_string")
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
        value.ClearField("doc_string")
    del graph.metadata_props[:]
    del model.metadata_props[:]
    del graph.value_info[:]
    graph.ClearField("doc_string")
    model.ClearField("doc_string")
    graph.name = "main_graph"
    return record


def _module_of(entries: dict[str, str]) -> str:
    try:
        scopes = ast.literal_eval(entries.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _source_of(entries: dict[str, str]) -> str:
    """Return the innermost frame outside torch itself, as ``file:line in function``."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', entries.get("pkg.torch.onnx.stack_trace", ""))
    own = [frame for frame in frames if not re.search(r"(^|/)torch/", frame[0])] or frames
    return "{}:{} in {}".format(own[-1][0], *own[-1][1:]) if own else ""


def require_agreement(module: nn.Module, model: Path, inputs: Sequence[torch.Tensor], rtol: float = 1e-3) -> float:
    """Return the largest difference between torch and ONNX Runtime, relative to the largest output.

    Raises:
        VerifyError: if it is above ``rtol``: then the export is not the network.
        DeviceError: if onnxruntime is not installed.
    """
    from prune2deploy.errors import DeviceError, VerifyError

    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceError(
            "onnxruntime is not installed, so no export can be checked; pip install 'prune2deploy[cpu]'"
        ) from error
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    feeds = {item.name: tensor.numpy() for item, tensor in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    worst = 0.0
    for want, got in zip(expected, session.run(None, feeds), strict=True):
        scale = max(float(want.abs().max()), 1e-12)
        worst = max(worst, float(np.abs(want.numpy() - got).max()) / scale)
    if not worst <= rtol:
        raise VerifyError(
            f"'{model}' differs from the torch network by {worst:.1e} of its largest output (limit {rtol:.0e})"
        )
    return worst
