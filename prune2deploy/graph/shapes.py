"""Arithmetic on sizes: named sizes are read from the graph's inputs, never from an inner value.

Slimming changes the sizes of inner values but never those of the inputs, so what ``x.size(0)`` left in a graph must not
read an inner value where it can be helped.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from prune2deploy.graph.names import fresh

log = logging.getLogger(__name__)


def fold_shapes(graph: gs.Graph) -> None:
    """Write down what can be known of sizes before run time, in one sweep over a topologically sorted graph.

    Integer inputs that depend on static sizes become constants; so do the targets of Reshapes, where 0 copies a named
    size and -1 is what is left. Shapes that this makes known are inferred on the way. What still reads a Shape whose
    sizes are known by number or name then reads the graph's inputs.
    """
    for node in graph.nodes:
        if not node.domain:
            _fix_integers(node)
        if node.op == "Reshape" and not node.domain:
            _fix_target(node)
        _infer(node, graph)
    sizes = Sizes(graph)
    inputs = {id(tensor) for tensor in graph.inputs}
    for node in list(graph.nodes):
        if node.op != "Shape" or node.domain or not node.outputs:  # folded ones have lost theirs
            continue
        if id(node.inputs[0]) not in inputs and node.inputs[0].shape:
            _replace(node, list(node.inputs[0].shape)[slice(node.attrs.get("start", 0), node.attrs.get("end"))], sizes)
    graph.nodes = [*sizes.nodes, *graph.nodes]


def _replace(node: gs.Node, shape: list[int | str | None], sizes: Sizes) -> None:
    output = node.outputs[0]
    for reader in list(output.outputs):
        place = _single_index(reader, output)
        size = None if place is None else shape[place]
        if isinstance(size, str) and size in sizes.named:
            source, axis = sizes.named[size]
            index = np.full(np.shape(reader.inputs[1].values), axis, dtype=np.int64)
            reader.inputs = [sizes.shape_of(source), gs.Constant(sizes.fresh(f"{reader.name}_axis"), index)]
    if not output.outputs or all(isinstance(size, int) for size in shape):  # the latter is folded with all constants
        return
    known = [size for size in shape if isinstance(size, int) or size in sizes.named]
    if len(known) == len(shape):
        joined = sizes.vector([size for size in known if size is not None])
        for reader in list(output.outputs):
            reader.inputs = [joined if tensor is output else tensor for tensor in reader.inputs]


def _single_index(reader: gs.Node, output: gs.Tensor) -> int | None:
    """Return the one entry that a Gather takes of a vector, or None."""
    if reader.op != "Gather" or reader.inputs[0] is not output or not isinstance(reader.inputs[1], gs.Constant):
        return None
    indices = np.ravel(reader.inputs[1].values)
    return int(indices[0]) if len(indices) == 1 else None


# --- what a vector of sizes holds -------------------------------------------------------------------------------------

Entries = list[int | str]


def _fix_integers(node: gs.Node) -> None:
    """Turn computed integer inputs whose entries are all known into constants."""
    for slot, tensor in enumerate(node.inputs):
        if isinstance(tensor, gs.Constant) or not tensor.inputs or tensor.inputs[0].op not in _READERS:
            continue
        entries, rank = _entries(tensor, 0), _rank(tensor)
        if entries is None or rank is None or tensor.dtype not in INTEGERS:
            continue
        if not all(isinstance(entry, int) for entry in entries):
            continue
        array = np.array(entries, dtype=tensor.dtype).reshape([len(entries)] if rank else [])
        node.inputs[slot] = gs.Constant(f"{tensor.name}_of_{node.name}_{slot}", array)


def _fix_target(node: gs.Node) -> None:
    source, target = node.inputs
    entries = None if isinstance(target, gs.Constant) else _entries(target, 0)
    if entries is None or source.shape is None or (node.attrs.get("allowzero", 0) and 0 in entries):
        return
    copied = [
        0 if isinstance(entry, str) and place < len(source.shape) and source.shape[place] == entry else entry
        for place, entry in enumerate(entries)
    ]
    names = [place for place, entry in enumerate(copied) if isinstance(entry, str)]
    if len(names) == 1 and -1 not in copied:
        copied[names[0]] = -1
    if len(names) <= 1 and all(isinstance(entry, int) for entry in copied):
        node.attrs.pop("allowzero", None)
        node.inputs[1] = gs.Constant(f"{target.name}_of_{node.outputs[0].name}", np.array(copied, dtype=np.int64))


_NOT_INFERRED = (
    onnx.defs.SchemaError,
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    ValueError,
    TypeError,
    RuntimeError,
)


def _infer(node: gs.Node, graph: gs.Graph) -> None:
    """Infer the shapes of a node's outputs where they are not known whole, from those of its inputs."""
    if all(_is_whole(tensor) for tensor in node.outputs) or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
        return
    if any(tensor.name and not isinstance(tensor, gs.Constant) and tensor.shape is None for tensor in node.inputs):
        return
    if any(tensor.name and tensor.dtype is None for tensor in node.inputs):
        return
    try:
        schema = onnx.defs.get_schema(node.op, graph.opset, node.domain or "")
        proto = OnnxExporter.export_node(node)
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
        return
    for tensor in node.outputs:
        if tensor.name in found and found[tensor.name].tensor_type.HasField("shape"):
            dims = found[tensor.name].tensor_type.shape.dim
            tensor.shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims]
            if tensor.dtype is None:
                tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(found[tensor.name].tensor_type.elem_type)


def _is_whole(tensor: gs.Tensor) -> bool:
    known = tensor.shape is not None and all(isinstance(size, int) or size for size in tensor.shape)
    return known and not any(isinstance(size, str) and size.startswith("unk__") for size in tensor.shape)


def _type_of(tensor: gs.Tensor) -> onnx.TypeProto:
    kind = (
        tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    return onnx.helper.make_tensor_type_proto(kind, [size if size != "" else None for size in tensor.shape])


def _rank(tensor: gs.Tensor) -> int | None:
    """Return whether integers are a vector (1) or a scalar (0), or None where that is not known."""
    return None if tensor.shape is None or len(tensor.shape) > 1 else len(tensor.shape)


def _entries(tensor: gs.Tensor, depth: int) -> Entries | None:
    """Return what an integer vector (or scalar) holds, sizes by number or name, or None where that is not known."""
    if tensor.shape is not None and len(tensor.shape) > 1:  # what selects from it would take whole rows
        return None
    if isinstance(tensor, gs.Constant):
        values = np.ravel(tensor.values)
        if len(values) > MOST or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            return None
        return [int(value) for value in values] if (values == np.trunc(values)).all() else None  # 1.5 times a size
    if not tensor.inputs or depth > DEEPEST:
        return None
    node = tensor.inputs[0]
    read = _READERS.get(node.op) if not node.domain else None
    return None if read is None else read(node, depth + 1)


MOST, DEEPEST = 64, 40
INTEGERS = (np.int64, np.int32)


def _shape_entries(node: gs.Node, depth: int) -> Entries | None:
    shape = node.inputs[0].shape
    if shape is None or not all(isinstance(size, int) or size for size in shape):
        return None
    return list(shape)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]


def _gathered(node: gs.Node, depth: int) -> Entries | None:
    whole, index = _entries(node.inputs[0], depth), node.inputs[1]
    if whole is None or not isinstance(index, gs.Constant) or np.ndim(index.values) > 1:
        return None
    return [whole[int(place)] for place in np.ravel(index.values)]


def _sliced(node: gs.Node, depth: int) -> Entries | None:
    whole = _entries(node.inputs[0], depth)
    if "starts" in node.attrs:
        bounds = [node.attrs["starts"], node.attrs["ends"]]
    elif all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        bounds = [np.ravel(tensor.values).tolist() for tensor in node.inputs[1:]]
    else:
        return None
    step = bounds[3][0] if len(bounds) > 3 else 1
    return None if whole is None or len(bounds[0]) != 1 else whole[bounds[0][0] : bounds[1][0] : step]


def _joined(node: gs.Node, depth: int) -> Entries | None:
    parts = [_entries(tensor, depth) for tensor in node.inputs]
    known = [part for part in parts if part is not None]
    return [entry for part in known for entry in part] if len(known) == len(parts) else None


def _passed(node: gs.Node, depth: int) -> Entries | None:
    return _entries(node.inputs[0], depth)


def _arithmetic(function: Callable[[int, int], int]) -> Callable[[gs.Node, int], Entries | None]:
    def read(node: gs.Node, depth: int) -> Entries | None:
        sides = [_entries(tensor, depth) for tensor in node.inputs]
        values = [side[0] for side in sides if side is not None and len(side) == 1 and isinstance(side[0], int)]
        return [function(*values)] if len(values) == len(sides) == 2 else None

    return read


def _divided(node: gs.Node, depth: int) -> Entries | None:
    """Return a quotient where it is the same for integers and for floats that were cast from them."""
    top, bottom = (_entries(tensor, depth) for tensor in node.inputs)
    if top is None or bottom is None or len(top) != 1 or len(bottom) != 1:
        return None
    a, b = top[0], bottom[0]
    if not isinstance(a, int) or not isinstance(b, int) or a < 0 or b < 1:
        return None
    whole = node.outputs[0].dtype in INTEGERS
    return [a // b] if whole or a % b == 0 else None


_READERS: dict[str, Callable[[gs.Node, int], Entries | None]] = {
    "Shape": _shape_entries,
    "Gather": _gathered,
    "Slice": _sliced,
    "Concat": _joined,
    "Unsqueeze": _passed,
    "Squeeze": _passed,
    "Reshape": _passed,
    "Identity": _passed,
    "Cast": _passed,
    "Floor": _passed,
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _arithmetic(operator.mul),
    "Div": _divided,
}


class Sizes:
    """Makes the nodes that give sizes at run time: a named one is read from the input that carries it, each once."""

    def __init__(self, graph: gs.Graph) -> None:
        self.named: dict[str, tuple[gs.Variable, int]] = {}
        for tensor in graph.inputs:
            for axis, size in enumerate(tensor.shape or ()):
                if isinstance(size, str) and size:
                    self.named.setdefault(size, (tensor, axis))
        self._names = set(graph.tensors())
        self._shapes: dict[int, gs.Variable] = {}
        self._sizes: dict[str, gs.Variable] = {}
        self.nodes: list[gs.Node] = []

    def fresh(self, wanted: str) -> str:
        """Return a tensor name that is not in use."""
        return fresh(wanted, self._names)

    def vector(self, shape: Sequence[int | str]) -> gs.Tensor:
        """Return these sizes as one vector."""
        if all(isinstance(size, int) for size in shape):
            return gs.Constant(self.fresh("sizes"), np.array(shape, dtype=np.int64))
        parts = [self._named_size(size) if isinstance(size, str) else self._constant(size) for size in shape]
        joined = gs.Variable(self.fresh("sizes"), dtype=np.int64, shape=[len(parts)])
        self.nodes.append(gs.Node("Concat", joined.name, {"axis": 0}, parts, [joined]))
        return joined

    def shape_of(self, source: gs.Variable) -> gs.Variable:
        """Return the shape of an input."""
        if id(source) not in self._shapes:
            name = self.fresh(f"{source.name}_shape")
            self._shapes[id(source)] = gs.Variable(name, dtype=np.int64, shape=[len(source.shape)])
            self.nodes.append(gs.Node("Shape", name, {}, [source], [self._shapes[id(source)]]))
        return self._shapes[id(source)]

    def _named_size(self, size: str) -> gs.Variable:
        if size not in self._sizes:
            source, axis = self.named[size]
            name = self.fresh(f"{source.name}_size{axis}")
            index = gs.Constant(self.fresh(f"{name}_axis"), np.array([axis], dtype=np.int64))
            shape = self.shape_of(source)
            self._sizes[size] = gs.Variable(name, dtype=np.int64, shape=[1])
            self.nodes.append(gs.Node("Gather", name, {"axis": 0}, [shape, index], [self._sizes[size]]))
        return self._sizes[size]

    def _constant(self, size: int) -> gs.Constant:
        return gs.Constant(self.fresh(f"size_{size}"), np.array([size], dtype=np.int64))
