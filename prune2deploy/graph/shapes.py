"""Arithmetic on sizes: named sizes are read from the graph's inputs, never from an inner value.

Slimming changes the sizes of inner values but never those of the inputs, so what ``x.size(0)`` left in a graph must not
read an inner value where it can be helped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.entries import INTEGERS, READERS, entries_of
from prune2deploy.graph.names import fresh
from prune2deploy.graph.open_sizes import OpenSizes, is_whole
from prune2deploy.graph.sizes import Size, product, quotient


def fold_shapes(graph: gs.Graph) -> None:
    """Write down what can be known of sizes before run time, in one sweep over a topologically sorted graph.

    Integer inputs that depend on static sizes become constants; so do the targets of Reshapes, where 0 copies a named
    size and -1 is what is left. Shapes that this makes known are inferred on the way. What still reads a Shape whose
    sizes are known by number or name then reads the graph's inputs.
    """
    opened = OpenSizes(graph)
    for node in graph.nodes:
        if not node.domain:
            _fix_integers(node)
        if node.op in _FIX and not node.domain:
            _FIX[node.op](node)
        opened.settle(node)
    opened.finish()
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


def _fix_integers(node: gs.Node) -> None:
    """Turn computed integer inputs whose entries are all known into constants."""
    for slot, tensor in enumerate(node.inputs):
        if isinstance(tensor, gs.Constant) or not tensor.inputs or tensor.inputs[0].op not in READERS:
            continue
        entries, rank = entries_of(tensor), _rank(tensor)
        if entries is None or rank is None or tensor.dtype not in INTEGERS:
            continue
        if not all(isinstance(entry, int) for entry in entries):
            continue
        array = np.array(entries, dtype=tensor.dtype).reshape([len(entries)] if rank else [])
        node.inputs[slot] = gs.Constant(f"{tensor.name}_of_{node.name}_{slot}", array)


def _fix_reshape(node: gs.Node) -> None:
    """Write down a computed target: 0 copies the size in its place, and -1 is the only one left that is no number."""
    source, target = node.inputs
    entries = None if isinstance(target, gs.Constant) else entries_of(target)
    if entries is None or source.shape is None or (node.attrs.get("allowzero", 0) and 0 in entries):
        return
    if entries.count(-1) == 1:
        rest = quotient(product(source.shape), product(entry for entry in entries if entry != -1))
        entries = [rest if entry == -1 and isinstance(rest, int) else entry for entry in entries]
    copied = [
        0 if isinstance(entry, str) and place < len(source.shape) and source.shape[place] == entry else entry
        for place, entry in enumerate(entries)
    ]
    computed = [place for place, entry in enumerate(copied) if not isinstance(entry, int)]
    if len(computed) == 1 and -1 not in copied:
        copied[computed[0]] = -1
    if len(computed) <= 1 and all(isinstance(entry, int) for entry in copied):
        node.attrs.pop("allowzero", None)
        node.inputs[1] = gs.Constant(f"{target.name}_of_{node.outputs[0].name}", np.array(copied, dtype=np.int64))


def _fix_expand(node: gs.Node) -> None:
    """Write down a computed target: 1 leaves the size in its place."""
    source, target = node.inputs
    entries = None if isinstance(target, gs.Constant) else entries_of(target)
    if entries is None or source.shape is None or len(source.shape) > len(entries):
        return
    before = [1] * (len(entries) - len(source.shape)) + list(source.shape)
    left = [
        1 if isinstance(entry, str) and entry == size else entry for entry, size in zip(entries, before, strict=True)
    ]
    if all(isinstance(entry, int) for entry in left):
        node.inputs[1] = gs.Constant(f"{target.name}_of_{node.outputs[0].name}", np.array(left, dtype=np.int64))


def _fix_scatter(node: gs.Node) -> None:
    """Pass the updates on where they replace the data whole, as a slice of all of the batch is written."""
    data, indices, updates = node.inputs
    if node.attrs.get("reduction", "none") != "none" or not data.shape or data.shape != updates.shape:
        return
    if is_whole(data) and _counts_to(indices, data.shape[0]):
        node.op, node.inputs = "Identity", [updates]
        node.attrs.clear()


def _counts_to(indices: gs.Tensor, size: Size) -> bool:
    """Whether indices are a column of all numbers below a size."""
    column = indices.inputs[0] if indices.inputs else None
    if column is None or column.op != "Unsqueeze" or indices.shape is None or list(indices.shape)[1:] != [1]:
        return False
    span = column.inputs[0].inputs[0] if column.inputs[0].inputs else None
    return (
        span is not None and span.op == "Range" and [entries_of(bound) for bound in span.inputs] == [[0], [size], [1]]
    )


_FIX: dict[str, Callable[[gs.Node], None]] = {
    "Expand": _fix_expand,
    "Reshape": _fix_reshape,
    "ScatterND": _fix_scatter,
}


def _rank(tensor: gs.Tensor) -> int | None:
    """Return whether integers are a vector (1) or a scalar (0), or None where that is not known."""
    return None if tensor.shape is None or len(tensor.shape) > 1 else len(tensor.shape)


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
