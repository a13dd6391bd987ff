"""Recalibrate: the statistics of every BatchNormalization measured anew on real inputs, as training would see them.

The graph is run with each norm written out: it normalises with the mean and variance of the batch, which are outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from prune2deploy.errors import DeviceError, InputError, one_line
from prune2deploy.graph.infer import infer_shapes
from prune2deploy.graph.masking import separate_layers, write
from prune2deploy.graph.model import copy_of, save_model
from prune2deploy.graph.verify import open_session

Feeds = Mapping[str, np.ndarray]

WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)
"""Types in which sums over a batch are exact enough; others are cast to float for a norm and back."""


def recalibrate(model: onnx.ModelProto, batches: Iterable[Feeds]) -> int:
    """Measure every BatchNormalization's mean and variance anew, in place, and return how many norms there were.

    As training mode does it: each norm normalises with the statistics of the batch at hand, so the norms behind it see
    what they would see after training. The new statistics are plain averages over the batches, which should be of one
    size; the variance is the unbiased one. A norm that the graph applies several times gets the average of all.

    Args:
        model: its norms' initializers are changed; norms with computed statistics are left alone.
        batches: input name -> array [batch, ...], batches of 2 or more.

    Raises:
        InputError: if there is no norm to measure or nothing to measure on, or the graph cannot run on the batches.
        DeviceError: if onnxruntime is not installed.
    """
    separate_layers(model)  # a norm's mean may be stored together with another one's
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    norms = norms_of(model)
    measured = _measure(_written_out(model, norms), len(norms), batches)
    found: dict[tuple[str, str], list[_Statistics]] = {}
    for node, statistics in zip(norms, measured, strict=True):
        found.setdefault((node.input[3], node.input[4]), []).append(statistics)
    for (mean, var), several in found.items():
        for name, values in ((mean, [one.mean for one in several]), (var, [one.var for one in several])):
            dtype = numpy_helper.to_array(constants[name]).dtype
            write(constants[name], np.mean(values, axis=0).astype(dtype))
    return len(found)


def norms_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the norms of a graph that can be measured anew.

    Raises:
        InputError: if there are none.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    norms = [node for node in model.graph.node if _is_measurable(node, constants)]
    if not norms:
        raise InputError(
            "the file has no BatchNormalization to measure anew (they may be folded into the convolutions); "
            "leave --recalibrate out, or export the network with its norms"
        )
    return norms


@dataclass(frozen=True, eq=False)
class _Statistics:
    """A norm's mean and unbiased variance, float64 [channels]."""

    mean: np.ndarray
    var: np.ndarray


def _is_measurable(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or _attribute(node, "training_mode"):
        return False
    return all(name in constants for name in node.input[3:5])


def _attribute(node: onnx.NodeProto, name: str, default: Any = 0) -> Any:
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


# --- the graph that measures ------------------------------------------------------------------------------------------


def _written_out(model: onnx.ModelProto, norms: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Return a copy that takes any batch, whose outputs are each norm's mean, variance and count."""
    copy = copy_of(model)
    infer_shapes(copy)
    kinds = {
        value.name: (len(value.type.tensor_type.shape.dim), value.type.tensor_type.elem_type)
        for value in (*copy.graph.value_info, *copy.graph.input)
        if value.type.tensor_type.HasField("shape")
    }
    opset = next(entry.version for entry in copy.opset_import if entry.domain in ("", "ai.onnx"))
    outputs = {node.output[0]: index for index, node in enumerate(norms)}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        index = outputs.get(node.output[0]) if node.op_type == "BatchNormalization" else None
        if index is None:
            nodes.append(node)
            continue
        if node.input[0] not in kinds:
            raise InputError(f"the rank of '{node.input[0]}' is not known, so its norm cannot be measured anew")
        maker = _Norm(index, opset, *kinds[node.input[0]])
        nodes += maker.nodes(node)
        copy.graph.initializer.extend(maker.constants)
    wanted = [f"{part}_{index}" for index in range(len(norms)) for part in PARTS]
    nodes = _needed(nodes, wanted)
    _free_batch(copy.graph)
    for field in ("node", "output", "value_info"):
        copy.graph.ClearField(field)
    copy.graph.node.extend(nodes)
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    read = {name for node in nodes for name in node.input} | _names_inside(nodes)
    for tensor in [tensor for tensor in copy.graph.initializer if tensor.name not in read]:
        copy.graph.initializer.remove(tensor)
    return copy


PREFIX = "p2d_norm"
PARTS = tuple(f"{PREFIX}_{part}" for part in ("mean", "var", "shape"))


class _Norm:
    """The nodes of one norm in training mode: y = (x - mean) / sqrt(var + epsilon) * scale + shift."""

    def __init__(self, index: int, opset: int, rank: int, element: int) -> None:
        self._index = index
        self._axes = [0, *range(2, rank)]
        self._column = [1, -1, *([1] * (rank - 2))]
        self._element = element
        self._opset = opset
        self.constants: list[onnx.TensorProto] = []

    def nodes(self, norm: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes in order; the last one makes the norm's output."""
        wide = self._element in WIDE
        x, y = norm.input[0], norm.output[0]
        source, result = (x, y) if wide else (self._name("wide"), self._name("narrow"))
        before = [] if wide else [helper.make_node("Cast", [x], [source], to=TensorProto.FLOAT)]
        after = [] if wide else [helper.make_node("Cast", [result], [y], to=self._element)]
        kind = np.float64 if self._element == TensorProto.DOUBLE else np.float32
        epsilon = self._constant("epsilon", np.array(_attribute(norm, "epsilon", 1e-5), dtype=kind))
        column = self._constant("column", np.array(self._column, dtype=np.int64))
        scale, shift = (self._as_column(norm.input[slot], name, column, wide) for slot, name in SCALES)
        mean, var, shape = (f"{part}_{self._index}" for part in PARTS)
        name = self._name
        return [
            *before,
            helper.make_node("Shape", [source], [shape]),
            self._mean(source, mean),
            helper.make_node("Sub", [source, mean], [name("centred")]),
            helper.make_node("Mul", [name("centred"), name("centred")], [name("squares")]),
            self._mean(name("squares"), var),
            helper.make_node("Add", [var, epsilon], [name("stable")]),
            helper.make_node("Sqrt", [name("stable")], [name("deviation")]),
            helper.make_node("Div", [name("centred"), name("deviation")], [name("normal")]),
            *scale[1],
            *shift[1],
            helper.make_node("Mul", [name("normal"), scale[0]], [name("scaled")]),
            helper.make_node("Add", [name("scaled"), shift[0]], [result]),
            *after,
        ]

    def _name(self, part: str) -> str:
        return f"{PREFIX}_{part}_{self._index}"

    def _constant(self, part: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(array, self._name(part)))
        return self._name(part)

    def _as_column(self, vector: str, part: str, column: str, wide: bool) -> tuple[str, list[onnx.NodeProto]]:
        """Return a vector [channels] as [1, channels, 1, ...] with the nodes that make it."""
        shaped, cast = self._name(f"{part}_column"), self._name(f"{part}_wide")
        if wide:
            return shaped, [helper.make_node("Reshape", [vector, column], [shaped])]
        return shaped, [
            helper.make_node("Cast", [vector], [cast], to=TensorProto.FLOAT),
            helper.make_node("Reshape", [cast, column], [shaped]),
        ]

    def _mean(self, source: str, made: str) -> onnx.NodeProto:
        if self._opset < 18:  # the axes were an attribute
            return helper.make_node("ReduceMean", [source], [made], axes=self._axes, keepdims=1)
        axes = self._name("axes")
        if axes not in {tensor.name for tensor in self.constants}:
            self._constant("axes", np.array(self._axes, dtype=np.int64))
        return helper.make_node("ReduceMean", [source, axes], [made], keepdims=1)


SCALES = ((1, "scale"), (2, "shift"))


def _needed(nodes: list[onnx.NodeProto], wanted: list[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the wanted values depend on, in order."""
    need = set(wanted)
    found = []
    for node in reversed(nodes):
        if need.intersection(node.output):
            found.append(node)
            need |= set(node.input) | _names_inside([node])
    return found[::-1]


def _names_inside(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the names that the nodes' subgraphs read."""
    found: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found |= {value.name for value in inner.output} | {name for one in inner.node for name in one.input}
                found |= _names_inside(inner.node)
    return found


def _free_batch(graph: onnx.GraphProto) -> None:
    """Let the first axis of every input take any size."""
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value"):
            dims[0].ClearField("dim_value")


# --- running it -------------------------------------------------------------------------------------------------------


def _measure(graph: onnx.ModelProto, count: int, batches: Iterable[Feeds]) -> list[_Statistics]:
    session = _open(graph)
    names = {item.name for item in session.get_inputs()}
    wanted = [f"{part}_{index}" for index in range(count) for part in PARTS]
    means: list[list[np.ndarray]] = [[] for _ in range(count)]
    variances: list[list[np.ndarray]] = [[] for _ in range(count)]
    for batch in batches:
        values = _run(session, wanted, {name: array for name, array in batch.items() if name in names})
        for index in range(count):
            mean, var, shape = values[3 * index : 3 * index + 3]
            places = int(np.prod(shape, dtype=np.int64)) // int(shape[1])
            if places < 2:
                raise InputError("a norm saw one value for each channel; give batches of 2 samples or more")
            means[index].append(mean.astype(np.float64).ravel())
            variances[index].append(var.astype(np.float64).ravel() * places / (places - 1))
    if not means[0]:
        raise InputError("there are no samples to measure the norms on; give more")
    found = [_Statistics(np.mean(m, axis=0), np.mean(v, axis=0)) for m, v in zip(means, variances, strict=True)]
    if not all(np.isfinite(one.mean).all() and np.isfinite(one.var).all() for one in found):
        raise InputError("the norms' statistics are not finite on these samples; check the samples")
    return found


def _open(graph: onnx.ModelProto) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "norms.onnx"  # as a file, since weights above 2 GB fit into no single message
        save_model(graph, path)
        try:
            return open_session(path, optimised=True, cannot="norms cannot be measured", threads=0)
        except DeviceError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise InputError(f"the norms cannot be measured: ONNX Runtime says {one_line(error, 200)}") from error


def _run(session: Any, wanted: list[str], batch: Feeds) -> list[np.ndarray]:
    try:
        values: list[np.ndarray] = session.run(wanted, dict(batch))
    except Exception as error:  # as above
        shapes = {name: list(array.shape) for name, array in batch.items()}
        raise InputError(
            f"the graph cannot run on samples of shape {shapes} ({one_line(error, 160)}); give what its inputs take, "
            "and export it with a dynamic batch"
        ) from error
    return values
