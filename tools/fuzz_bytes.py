"""Slim malformed models for as long as you like, and print every one that does not end as it should.

Usage: python tools/fuzz_bytes.py --cases 20000 --seed 1 [--limit 30] [--memory 3] [--save DIR]

A case is a small valid model with damage: bits flipped, bytes cut, doubled or taken from another model, or fields of
the protobuf set to what no exporter writes. It must end in an error for the user (an InputError, or a VerifyError where
the damaged graph cannot be compared), or in a slim graph that was verified. Anything else is a failure: another
exception, a dead process, one that takes longer than the limit, or one that asks for more memory than allowed. Cases
run in a process of their own that is started again where it dies; a case is repeated by its seed and number alone.
"""

import argparse
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from google.protobuf.message import EncodeError  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from prune2deploy.errors import P2DError, one_line  # noqa: E402
from prune2deploy.graph.inspect import inspect_model  # noqa: E402
from prune2deploy.graph.model import load_model  # noqa: E402
from prune2deploy.slim import Options, reasons, slim_file  # noqa: E402

Random = np.random.Generator
EXTERNAL = "weights.data"
"""The file beside a model in which one of the valid models keeps its weights."""


@dataclass
class Damaged:
    """A model's bytes, the bytes of its external data, and what was done to them."""

    data: bytes
    external: bytes = b""
    story: list[str] = field(default_factory=list)


# --- the valid models ---------------------------------------------------------------------------------------------


def planted(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights with a zero row and a row that repeats."""
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if shape[0] > 3:
        array[1], array[3] = 0, array[0]
    return array


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    shapes: tuple[list[Any], list[Any]],
    opset: int = 18,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Return a model from ``x`` (of this kind) to ``y``."""
    infos = (
        [helper.make_tensor_value_info("x", kind, shapes[0])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes[1])],
    )
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "fuzzed", *infos, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def residual(opset: int = 18, batch: Any = "N") -> onnx.ModelProto:
    """Convolutions, a norm, an add, a pool and a linear layer."""
    norm = {name: np.abs(planted(8, seed=seed)) + 0.5 for seed, name in enumerate(("scale", "shift", "mean", "var"))}
    constants = {"w1": planted(8, 3, 3, 3), "b1": planted(8), "w2": planted(8, 8, 3, 3, seed=1), **norm}
    constants |= {"head": planted(5, 8, seed=2), "hb": planted(5)}
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1], kernel_shape=[3, 3], strides=[1, 1]),
        node("BatchNormalization", ["a", *norm], ["n"], epsilon=1e-3),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "w2"], ["c"], pads=[1, 1, 1, 1], dilations=[1, 1]),
        node("Add", ["c", "r"], ["s"]),
        node("MaxPool", ["s"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["m"], ["g"]),
        node("Flatten", ["g"], ["f"], axis=1),
        node("Gemm", ["f", "head", "hb"], ["y"], transB=1, alpha=1.0),
    ]
    return model_of(nodes, constants, ([batch, 3, 8, 8], [batch, 5]), opset)


def shuffling() -> onnx.ModelProto:
    """Splits, shapes as constants, grouped and depthwise convolutions, slices, a pad, a concat."""
    node, ints = helper.make_node, lambda *values: np.array(values, np.int64)
    constants = {
        "w1": planted(8, 4, 1, 1),
        "w2": planted(8, 2, 3, 3),
        "dw": planted(8, 1, 3, 3),
        "w3": planted(4, 12, 1, 1),
    }
    constants |= {"s1": ints(0, 2, 4, 6, 6), "s2": ints(0, 8, 6, 6), "sizes": ints(4, 4), "starts": ints(0)}
    constants |= {"ends": ints(4), "axes": ints(1), "pads": ints(0, 0, 1, 1, 0, 0, 1, 1), "order": ints(3, 1, 2, 0)}
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Conv", ["a", "w2"], ["g"], group=4, pads=[1, 1, 1, 1]),
        node("Reshape", ["g", "s1"], ["q"]),
        node("Transpose", ["q"], ["t"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["t", "s2"], ["u"]),
        node("Pad", ["u", "pads"], ["p"]),
        node("Conv", ["p", "dw"], ["d"], group=8),
        node("Split", ["d", "sizes"], ["l", "r"], axis=1),
        node("Slice", ["a", "starts", "ends", "axes"], ["z"]),
        node("Gather", ["l", "order"], ["o"], axis=1),
        node("Concat", ["o", "r", "z"], ["k"], axis=1),
        node("LeakyRelu", ["k"], ["e"], alpha=0.1),
        node("Conv", ["e", "w3"], ["y"]),
    ]
    return model_of(nodes, constants, ([1, 4, 6, 6], [1, 4, 6, 6]))


def nested() -> onnx.ModelProto:
    """A subgraph that captures, shape arithmetic, a local function, another type of constant."""
    node = helper.make_node
    info = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    then = helper.make_graph([node("Relu", ["a"], ["branch"])], "then", [], [info])
    other = helper.make_graph([node("Neg", ["a"], ["branch"])], "else", [], [info])
    constants = {"w": planted(4, 6, seed=3), "yes": np.array(True), "minus": np.array([-1], np.int64)}
    constants |= {"zero": np.array(0, np.int64), "zeros": np.array([0], np.int64)}
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("If", ["yes"], ["b"], then_branch=then, else_branch=other),
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["batch"], axis=0),
        node("Unsqueeze", ["batch", "zeros"], ["first"]),
        node("Concat", ["first", "minus"], ["target"], axis=0),
        node("Reshape", ["b", "target"], ["c"]),
        node("Twice", ["c"], ["d"], domain="own"),
        node("Softmax", ["d"], ["y"], axis=-1),
    ]
    model = model_of(nodes, constants, (["N", 4], ["N", 6]))
    twice = helper.make_function(
        "own", "Twice", ["i"], ["o"], [node("Add", ["i", "i"], ["o"])], [helper.make_opsetid("", 18)]
    )
    model.functions.append(twice)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def halves() -> onnx.ModelProto:
    """Half precision, constants as nodes, and old attribute forms."""
    node = helper.make_node
    constant = numpy_helper.from_array(planted(6, 4, 1, 1).astype(np.float16))
    nodes = [
        node("Constant", [], ["w"], value=constant),
        node("Conv", ["x", "w"], ["a"]),
        node("Clip", ["a"], ["b"], min=0.0, max=6.0),
        node("Squeeze", ["b"], ["c"], axes=[2, 3]),
        node("Cast", ["c"], ["d"], to=TensorProto.FLOAT),
        node("Sigmoid", ["d"], ["y"]),
    ]
    return model_of(nodes, {}, ([2, 4, 1, 1], [2, 6]), opset=10, kind=TensorProto.FLOAT16)


def listed() -> onnx.ModelProto:
    """Initializers that are listed as inputs too, as old exporters do."""
    model = residual(opset=9, batch=1)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def valid_models() -> list[Damaged]:
    """Return the models that damage starts from; one keeps its weights in a file beside it."""
    made = [Damaged(each.SerializeToString()) for each in (residual(), shuffling(), nested(), halves(), listed())]
    model, external = residual(opset=13), b""
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        entries = {"location": EXTERNAL, "offset": str(len(external)), "length": str(len(raw))}
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        external += raw
    return [*made, Damaged(model.SerializeToString(), external)]


# --- damage to bytes ----------------------------------------------------------------------------------------------


def flip(data: bytearray, other: bytes, random: Random) -> None:
    for _ in range(int(random.integers(1, 9))):
        place = int(random.integers(len(data)))
        data[place] ^= 1 << int(random.integers(8))


def overwrite(data: bytearray, other: bytes, random: Random) -> None:
    place = int(random.integers(len(data)))
    data[place : place + 4] = bytes(random.choice([0, 1, 0x7F, 0x80, 0xFF], 4).tolist())


def truncate(data: bytearray, other: bytes, random: Random) -> None:
    del data[int(random.integers(len(data))) :]


def remove(data: bytearray, other: bytes, random: Random) -> None:
    place = int(random.integers(len(data)))
    del data[place : place + int(random.integers(1, 40))]


def double(data: bytearray, other: bytes, random: Random) -> None:
    first, last = sorted(random.integers(0, len(data), 2).tolist())
    data[first:first] = data[first : min(last, first + 300)]


def splice(data: bytearray, other: bytes, random: Random) -> None:
    here, there = int(random.integers(len(data))), int(random.integers(len(other)))
    data[here:] = other[there:]


def structure(data: bytearray, other: bytes, random: Random) -> None:
    """Damage near the start or the end, where the structure is, and not in the middle of the weights."""
    window = min(len(data), 600)
    place = int(random.integers(window))
    data[place if random.random() < 0.5 else -1 - place] = int(random.integers(256))


ByteDamage = Callable[[bytearray, bytes, Random], None]
BYTES: tuple[ByteDamage, ...] = (*(flip, overwrite, truncate, remove, double, splice, structure),)

# --- damage to fields ---------------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 3, 7, -2, 1000, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63))
TEXTS = (
    "",
    "x",
    "y",
    "w1",
    "a",
    "no such name",
    "Conv",
    "line\nbreak",
    "ü" * 40,
    "a" * 5000,
    "..",
    "/etc/passwd",
    "\x00",
)
Graph = onnx.GraphProto


def pick(random: Random, items: Any) -> Any:
    """Return one of some items, or None where there is none."""
    items = list(items)
    return items[int(random.integers(len(items)))] if items else None


def graphs_of(graph: Graph) -> Iterator[Graph]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)


def tensor_dims(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None and tensor.dims:
        tensor.dims[int(random.integers(len(tensor.dims)))] = pick(random, NUMBERS)


def tensor_rank(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None:
        dims = list(tensor.dims)
        tensor.ClearField("dims")
        tensor.dims.extend(pick(random, ([1, *dims], [*dims, 1], dims[1:], [int(np.prod(dims))], [])))


def tensor_type(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None:
        tensor.data_type = int(random.integers(0, 28))


def tensor_converted(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None and not tensor.external_data:
        kind = pick(random, (np.float16, np.float64, np.int32, np.int64, np.int8, np.uint8, np.bool_, np.complex64))
        with np.errstate(all="ignore"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(kind), tensor.name))


def tensor_bytes(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None:
        raw = tensor.raw_data
        tensor.raw_data = pick(random, (b"", raw[:-1], raw + b"\0", raw[: len(raw) // 2], raw * 2))


def tensor_fields(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None:
        if random.random() < 0.5:
            tensor.ClearField("raw_data")
        pick(random, (tensor.float_data, tensor.int32_data, tensor.int64_data)).extend([1, 2, 3])


def tensor_values(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    """Values that are not finite, huge or tiny; other indices and shapes."""
    tensor = pick(random, graph.initializer)
    if tensor is None or tensor.external_data:
        return
    array = numpy_helper.to_array(tensor).copy()
    if array.size:
        values = (np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0) if array.dtype.kind == "f" else NUMBERS
        with np.errstate(all="ignore"):
            wanted = np.asarray(pick(random, values)).astype(array.dtype)
        array.flat[int(random.integers(array.size))] = wanted
        if random.random() < 0.2:
            array[...] = wanted
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def tensor_empty(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None:
        shape = list(tensor.dims) or [1]
        shape[int(random.integers(len(shape)))] = 0
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(shape, kind), tensor.name))


def tensor_external(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is None:
        return
    if not tensor.external_data:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=pick(random, (EXTERNAL, *TEXTS)))
        return
    entry = pick(random, tensor.external_data)
    numbers = [str(number) for number in NUMBERS] + ["three", "1e3", "99999999999999999999999"]
    entry.value = pick(random, [".", "../other", *TEXTS] if entry.key == "location" else numbers)


def tensor_lost(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None:
        graph.initializer.remove(tensor)


def tensor_twice(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor, other = pick(random, graph.initializer), pick(random, graph.initializer)
    if tensor is not None:
        tensor.name = pick(random, (other.name, *TEXTS))


def tensor_sparse(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    tensor = pick(random, graph.initializer)
    if tensor is not None and not tensor.external_data:
        array = numpy_helper.to_array(tensor)
        places = np.flatnonzero(array)
        values = numpy_helper.from_array(array.ravel()[places], tensor.name)
        indices = numpy_helper.from_array(places.astype(np.int64), tensor.name + "_indices")
        graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(tensor.dims)))
        graph.initializer.remove(tensor)


def attribute_lost(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    node = pick(random, [node for node in graph.node if node.attribute])
    if node is not None:
        node.attribute.remove(pick(random, node.attribute))


def attribute_value(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    attribute = pick(random, [attribute for node in graph.node for attribute in node.attribute])
    if attribute is None:
        return
    if attribute.ints:
        attribute.ints[int(random.integers(len(attribute.ints)))] = pick(random, NUMBERS)
        if random.random() < 0.3:
            attribute.ints.append(pick(random, NUMBERS))
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = pick(random, (np.nan, np.inf, -1.0, 0.0, 3e38))
    else:
        attribute.i = pick(random, NUMBERS)


def attribute_type(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    node = pick(random, [node for node in graph.node if node.attribute])
    if node is None:
        return
    attribute = pick(random, node.attribute)
    others: tuple[Any, ...] = (1, -1, 0.5, "text", [1, 2], [0.5], ["a"], numpy_helper.from_array(planted(2)), graph)
    name = attribute.name
    node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, pick(random, others)))
    if random.random() < 0.3:
        node.attribute[-1].type = int(random.integers(0, 15))


def attribute_new(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    node = pick(random, graph.node)
    if node is not None:
        name = pick(
            random, ("group", "axis", "auto_pad", "pads", "perm", "training_mode", "keepdims", "made_up", "axes")
        )
        node.attribute.append(
            helper.make_attribute(name, pick(random, (1, 5, -9, [0], [1, 1], "VALID", "SAME_UPPER", "")))
        )


def node_type(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    node = pick(random, graph.node)
    if node is not None:
        known = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})
        node.op_type = pick(random, TEXTS) if random.random() < 0.2 else pick(random, known)


def node_domain(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    node = pick(random, graph.node)
    if node is not None:
        node.domain = pick(random, ("ai.onnx", "com.microsoft", "own", "ai.onnx.ml", "nobody's", "\x00"))
        if random.random() < 0.5:
            model.opset_import.add(domain=node.domain, version=int(random.integers(0, 3)))


def node_inputs(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    node = pick(random, [node for node in graph.node if node.input])
    if node is None:
        return
    names = [name for each in graph.node for name in (*each.input, *each.output)]
    place, what = int(random.integers(len(node.input))), random.random()
    if what < 0.6:
        node.input[place] = pick(random, (*names, ""))
    elif what < 0.8:
        del node.input[place]
    else:
        node.input.append(pick(random, (*names, *TEXTS)))


def node_outputs(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    node = pick(random, graph.node)
    if node is None or not node.output:
        return
    names = [name for each in graph.node for name in (*each.input, *each.output)]
    if random.random() < 0.6:
        node.output[int(random.integers(len(node.output)))] = pick(random, (*names, *TEXTS))
    else:
        node.output.append(pick(random, ("fresh", "", *names)))


def node_order(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    what = random.random()
    del graph.node[:]
    if what < 0.4:
        graph.node.extend([nodes[place] for place in random.permutation(len(nodes)).tolist()])
    elif what < 0.7 and nodes:
        graph.node.extend([*nodes, pick(random, nodes)])
    else:
        gone = int(random.integers(len(nodes))) if nodes else 0
        graph.node.extend(node for place, node in enumerate(nodes) if place != gone)


def cycle(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    if len(graph.node) > 1:
        first, last = sorted(random.choice(len(graph.node), 2, replace=False).tolist())
        if graph.node[first].input and graph.node[last].output:
            graph.node[first].input[0] = graph.node[last].output[0]


def value_shape(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    value = pick(random, (*graph.input, *graph.output))
    if value is None:
        return
    dims = value.type.tensor_type.shape.dim
    if not dims or random.random() < 0.2:
        value.type.tensor_type.shape.dim.add(dim_value=3)
        return
    dim = pick(random, dims)
    if random.random() < 0.7:
        dim.dim_value = pick(random, NUMBERS)
    else:
        dim.dim_param = pick(random, TEXTS)


def value_type(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    value = pick(random, (*graph.input, *graph.output))
    if value is None:
        return
    what = random.random()
    if what < 0.5:
        value.type.tensor_type.elem_type = int(random.integers(0, 28))
    elif what < 0.7:
        value.ClearField("type")
    elif what < 0.85:
        value.type.tensor_type.ClearField("shape")
    else:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1


def value_names(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    values = graph.input if random.random() < 0.5 else graph.output
    value = pick(random, values)
    if value is None:
        return
    what = random.random()
    if what < 0.5:
        value.name = pick(random, (*TEXTS, *(name for node in graph.node for name in node.output)))
    elif what < 0.8:
        values.append(value)
    else:
        values.remove(value)


def versions(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    what = random.random()
    if what < 0.5:
        model.opset_import[0].version = int(random.integers(-1, 30))
    elif what < 0.7:
        model.ir_version = pick(random, (0, 1, 2, 3, 4, 8, 13, 99, -1, 2**62))
    elif what < 0.85:
        model.opset_import.add(domain=pick(random, ("", "ai.onnx")), version=int(random.integers(1, 25)))
    else:
        model.ClearField("opset_import")


def functions(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    """A local function that calls itself, hides an operator, lacks a part or is there twice."""
    node = pick(random, graph.node)
    if node is None or not node.output:
        return
    domain, op = (node.domain, node.op_type) if random.random() < 0.5 else ("own", "Twice")
    body = [helper.make_node(pick(random, (op, "Relu", "Identity")), ["i"], ["o"], domain=pick(random, (domain, "")))]
    made = helper.make_function(
        domain, op, ["i"], pick(random, (["o"], ["p"], [])), body, [helper.make_opsetid("", 18)]
    )
    model.functions.append(made)


def declared_shapes(model: onnx.ModelProto, graph: Graph, random: Random) -> None:
    """Inner shapes that are wrong."""
    name = pick(random, [name for node in graph.node for name in node.output])
    if name:
        graph.value_info.append(helper.make_tensor_value_info(name, 1, [pick(random, (1, 2, 8, -1)) for _ in range(4)]))


FieldDamage = Callable[[onnx.ModelProto, Graph, Random], None]
FIELDS: tuple[FieldDamage, ...] = (
    *(
        tensor_dims,
        tensor_rank,
        tensor_type,
        tensor_converted,
        tensor_bytes,
        tensor_fields,
        tensor_values,
        tensor_empty,
    ),
    *(tensor_external, tensor_lost, tensor_twice, tensor_sparse, attribute_lost, attribute_value, attribute_type),
    *(attribute_new, node_type, node_domain, node_inputs, node_outputs, node_order, cycle, value_shape, value_type),
    *(value_names, versions, functions, declared_shapes),
)


# --- one case -----------------------------------------------------------------------------------------------------


def break_bytes(case: Damaged, damage: ByteDamage, other: bytes, random: Random) -> None:
    """Damage a case's bytes, and now and then those of its external data."""
    data = bytearray(case.data)
    damage(data, other, random)
    case.data = bytes(data)
    case.story.append(damage.__name__)
    if case.external and random.random() < 0.3:
        case.external = case.external[: int(random.integers(len(case.external)))]
        case.story.append("external data cut")


def break_fields(case: Damaged, damages: Iterable[FieldDamage], random: Random) -> None:
    """Damage the fields of a case, each kind in one of its graphs."""
    model = onnx.load_from_string(case.data)
    for damage in damages:
        try:
            damage(model, pick(random, graphs_of(model.graph)), random)
        except (ValueError, TypeError, LookupError, EncodeError):  # earlier damage stands in the way of this one
            continue
        case.story.append(damage.__name__)
    case.data = model.SerializeToString()


def damaged(seed: int, number: int) -> Damaged:
    """Return a case; the same seed and number give the same one."""
    random = np.random.default_rng((seed, number))
    models = valid_models()
    case = pick(random, models)
    if random.random() < 0.4:
        break_bytes(case, pick(random, BYTES), pick(random, models).data, random)
    else:
        count = 1 if random.random() < 0.6 else int(random.integers(2, 5))
        break_fields(case, [pick(random, FIELDS) for _ in range(count)], random)
    return case


def extreme(case: Damaged) -> bool:
    """Whether a case holds numbers that are not finite or so large that sums of them are not."""
    model = onnx.load_from_string(case.data)
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer if not tensor.external_data]
    arrays += [np.array([item.f, *item.floats]) for node in model.graph.node for item in node.attribute]
    return any(array.dtype.kind == "f" and bool((~(np.abs(array) < 1e30)).any()) for array in arrays)


def slim_end_to_end(case: Damaged, folder: Path) -> str:
    """Slim a case as the command does; return ``verified`` or the name and text of the error for the user.

    Then look at it as ``inspect`` does, and slim it with ``--explain`` and ``--tolerance``, which may also end in such
    an error. Any other exception is a failure and passes through.
    """
    path, target = folder / "model.onnx", folder / "slim.onnx"
    path.write_bytes(case.data)
    (folder / EXTERNAL).write_bytes(case.external)
    outcome = ended(lambda: slim_file(path, target))
    ended(lambda: inspect_model(load_model(path)))
    ended(lambda: reasons(path, slim_file(path, target, Options(tolerance=1e-3))))
    return outcome


def ended(work: Callable[[], object]) -> str:
    """Return how something ended: ``verified``, or the name and the one line of the error for the user."""
    try:
        work()
    except P2DError as error:
        text = str(error)
        if "\n" in text or not text:
            raise AssertionError(f"the message is not one line: {text!r}") from error
        return f"{type(error).__name__}: {text}"
    return "verified"


def settled(text: str) -> str:
    """Return the word under which an outcome is counted."""
    if text.startswith("VerifyError") and "differs" in text:
        return "VerifyError: differs"
    return text.partition(":")[0]


# --- many cases ---------------------------------------------------------------------------------------------------


def work(seed: int, first: int, count: int, memory: float) -> None:
    """Run cases in this process, a line for each: its number before, its outcome after."""
    import faulthandler
    import traceback
    import warnings

    faulthandler.enable()
    warnings.simplefilter("ignore")
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            print(f"\n>{number}", flush=True)
            try:
                outcome = slim_end_to_end(damaged(seed, number), Path(folder))
            except BaseException as error:
                frames = traceback.extract_tb(error.__traceback__)
                places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:]]
                outcome = f"FAILED {type(error).__name__}: {one_line(error, 200)} at {' '.join(places)}"
            print(f"\n<{number} {outcome}", flush=True)


def outcomes(seed: int, count: int, limit: float, memory: float) -> Iterator[tuple[int, str]]:
    """Yield every case's number and outcome; the process that runs them is started again where it dies."""
    number = 0
    while number < count:
        command = [sys.executable, __file__, "--child", str(seed), str(number), str(count - number), str(memory)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout is not None
        selector = selectors.DefaultSelector()
        selector.register(child.stdout, selectors.EVENT_READ)
        buffer, reason, last = b"", "", time.monotonic()
        while number < count:
            if selector.select(timeout=1):
                chunk = child.stdout.read1(65536)  # type: ignore[attr-defined]
                if not chunk:
                    reason = f"FAILED the process died with {child.wait()}"
                    break
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    if line.startswith(f"<{number} ".encode()):
                        yield number, line.decode(errors="replace").partition(" ")[2]
                        number, last = number + 1, time.monotonic()
            elif time.monotonic() - last > limit:
                reason = f"FAILED it took longer than {limit:.0f} s"
                break
        child.kill()
        _, errors = child.communicate()
        if reason:
            yield number, f"{reason} {one_line(errors.decode(errors='replace')[-300:], 300)}"
            number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Slim malformed models and print every one that ends badly.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=30, help="seconds for one case")
    parser.add_argument("--memory", type=float, default=4, help="GiB of address space for all cases")
    parser.add_argument("--save", type=Path, help="a folder for the cases that failed")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        seed, first, count, memory = given.child
        work(int(seed), int(first), int(count), float(memory))
        return 0
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    for number, outcome in outcomes(given.seed, given.cases, given.limit, given.memory):
        failed = outcome.startswith("FAILED")
        counts["FAILED" if failed else settled(outcome)] += 1
        if failed or "differs" in settled(outcome):
            case = damaged(given.seed, number)
            print(f"case {number} ({', '.join(case.story)}): {outcome}", flush=True)
            if given.save is not None:
                given.save.mkdir(parents=True, exist_ok=True)
                (given.save / f"{given.seed}-{number}.onnx").write_bytes(case.data)
    for name, value in counts.most_common():
        print(f"{value:8d}  {name}")
    print(f"{time.perf_counter() - start:8.1f}  seconds (seed {given.seed})")
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
