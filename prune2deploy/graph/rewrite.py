"""Rewrite: the only step that writes. Applies the kept positions to a graph, node by node, and decides nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from prune2deploy import __version__
from prune2deploy.graph.constants import write_constants
from prune2deploy.graph.fact import digest
from prune2deploy.graph.fold import fold_constants
from prune2deploy.graph.keep import Analysis, analyse
from prune2deploy.graph.layers import LayerRow, layer_rows, totals
from prune2deploy.graph.names import fresh
from prune2deploy.graph.node import Node, Operand, tables
from prune2deploy.graph.normal import normalise, restore, to_model
from prune2deploy.graph.order import all_inputs, redirect, remove_dead_nodes
from prune2deploy.graph.permutation import fold_permutations
from prune2deploy.graph.rules.base import Axis, Part, Piece, View
from prune2deploy.graph.rules.select import SHUFFLE
from prune2deploy.graph.stored import Stored
from prune2deploy.graph.uneven import GroupChoice, choose_groups
from prune2deploy.graph.validity import blaming_the_file

Indices = list[int] | list[list[int]]
"""Kept old indices of an axis, in order; or of each group that shares it."""


@dataclass(frozen=True, eq=False)
class Slimmed:
    """A slim model with what was done to get it.

    Attributes:
        model: the slim graph.
        analysis: the facts, liveness and kept positions of the graph that it came from.
        layers: one row per convolution and linear layer, before and after.
        kept: for every value axis and initializer axis that changed, the kept old indices in order (``slim.json``); for
            an axis that the groups of a convolution share, a list for each group where they kept different ones.
        opaque: operator -> how many nodes of it no rule covers.
        removed_channels: channels removed from convolution and linear outputs, removed layers included.
        removed_layers: names of the convolution and linear layers that are gone altogether.
        groups: what was chosen for each grouped convolution whose groups need different numbers of channels.
        unread_inputs: inputs of the graph on which no output depends any more.
        seconds: time taken by ``normalise``, ``analysis`` and ``rewrite``.
        drops: which channels were silenced before, by name, and what that changed; None where none were.
        tolerance: which near-dead weights were zeroed before, and what that can change; None where none were.
        proof: how well the result agrees with the original, once that was verified.
    """

    model: onnx.ModelProto
    analysis: Analysis
    layers: list[LayerRow]
    kept: dict[str, dict[str, dict[str, Indices]]]
    opaque: dict[str, int]
    removed_channels: int
    removed_layers: list[str]
    groups: list[GroupChoice]
    unread_inputs: list[str]
    seconds: dict[str, float]
    drops: dict[str, object] | None = None
    tolerance: dict[str, object] | None = None
    proof: dict[str, object] | None = None

    def report(self) -> dict[str, object]:
        """Return the section ``slim`` of a report, without what only the caller knows."""
        before, after = totals(self.layers, "before"), totals(self.layers, "after")
        return {
            "layers": [row.to_json() for row in self.layers],
            "macs": {"before": before.macs, "after": after.macs},
            "parameters": {"before": before.parameters, "after": after.parameters},
            "opaque": self.opaque,
            "removed_channels": self.removed_channels,
            "removed_layers": self.removed_layers,
            "groups": [choice.to_json() for choice in self.groups],
            "unread_inputs": self.unread_inputs,
            "idle_classes": self.analysis.idle_classes(),
            "seconds": self.seconds,
            **({} if self.drops is None else {"drops": self.drops}),
            **({} if self.tolerance is None else {"tolerance": self.tolerance}),
        }


@blaming_the_file
def remove_dead_channels(model: onnx.ModelProto, *, round_to: int = 1) -> Slimmed:
    """Return the model without every channel that provably does not matter; the given one is brought to normal form.

    With ``round_to`` dead channels are kept so that convolution and linear outputs have multiples of it.
    """
    start = time.perf_counter()
    graph = normalise(model)
    normalised = time.perf_counter()
    analysis, groups = choose_groups(analyse(tables(graph), round_to=round_to))
    analysed = time.perf_counter()
    kept: dict[str, dict[str, dict[str, Indices]]] = {"values": {}, "initializers": {}}
    sizes: dict[tuple[int, int], int] = {}
    gone: set[int] = set()
    if analysis.changes:
        targets = list(graph.nodes)
        writer, orders = apply_kept(graph, analysis)
        sizes = writer.sizes
        left = {id(node) for node in graph.nodes}
        gone = {index for index, node in enumerate(targets) if id(node) not in left}
        written = graph.tensors()
        kept["values"] = _kept_values(analysis, orders)
        axes_by_name = kept_initializers(analysis, writer.written, orders)
        kept["initializers"] = {name: axes for name, axes in axes_by_name.items() if name in written}
    slim = to_model(graph, model)
    stamp(slim, "prune2deploy.version", __version__)
    rewritten = time.perf_counter()
    layers = layer_rows(analysis, sizes, gone)
    return Slimmed(
        model=slim,
        analysis=analysis,
        layers=layers,
        kept=kept,
        opaque=opaque_operators(analysis),
        removed_channels=sum(row.before - row.after for row in layers),
        removed_layers=[row.name for row in layers if row.after == 0],
        groups=groups,
        unread_inputs=_unread_inputs(graph, analysis),
        seconds={
            "normalise": normalised - start,
            "analysis": analysed - normalised,
            "rewrite": rewritten - analysed,
        },
    )


def _unread_inputs(graph: gs.Graph, analysis: Analysis) -> list[str]:
    """Return the inputs that were read before and whose values nothing reads now (at most their shape)."""
    before = analysis.tables.readers()
    read = {tensor.name for node in graph.nodes if node.op != "Shape" for tensor in all_inputs(node)}
    passed = {tensor.name for tensor in graph.outputs}
    names = [operand.name for operand in analysis.tables.inputs]
    return [name for name in names if name in before and name not in read and name not in passed]


def opaque_operators(analysis: Analysis) -> dict[str, int]:
    """Return how many nodes of which operator no rule covers; nodes without computed inputs are not counted."""
    names = [
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node, rule in zip(analysis.tables.nodes, analysis.known.rules, strict=True)
        if rule is None and any(operand.is_value for operand in node.inputs)
    ]
    return dict(sorted(Counter(names).items()))


def stamp(model: onnx.ModelProto, key: str, value: str) -> None:
    """Set an entry of the model's metadata."""
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = value
            return
    model.metadata_props.add(key=key, value=value)


Orders = Mapping[str, np.ndarray]
"""The order in which the kept channels (axis 1) of a value stand, where it is not the old one."""


def _kept_values(analysis: Analysis, orders: Orders) -> dict[str, dict[str, Indices]]:
    table: dict[str, dict[str, Indices]] = {}
    for (value, axis), mask in analysis.keep.kept.items():
        if not mask.all():
            table.setdefault(value, {})[str(axis)] = _ordered(np.flatnonzero(mask), Axis(value, axis), orders)
    return dict(sorted(table.items()))


def _ordered(indices: np.ndarray, axis: Axis, orders: Orders) -> list[int]:
    found: list[int] = (indices[orders[axis.value]] if axis.axis == 1 and axis.value in orders else indices).tolist()
    return found


def apply_kept(graph: gs.Graph, analysis: Analysis) -> tuple[Writer, Orders]:
    """Apply every live node's ``drop``; return what knows the new constants, and which channels changed their order."""
    writer = Writer(graph)
    for node, target in zip(analysis.tables.nodes, list(graph.nodes), strict=True):
        rule = analysis.known.rules[node.index]
        if node.index in analysis.liveness.needed and rule is not None:
            rule.drop(node, NodeEdit(analysis, node, target, writer))
    writer.place_nodes()
    shuffles = [node for node in graph.nodes if SHUFFLE in node.attrs]
    restore(graph)
    write_constants(graph, analysis)
    remove_dead_nodes(graph)
    orders = fold_permutations(graph, shuffles, writer.replace)
    if analysis.liveness.constants:
        _forget_shapes(graph)
        fold_constants(graph)
        remove_dead_nodes(graph)
    writer.name_constants()
    return writer, orders


def _forget_shapes(graph: gs.Graph) -> None:
    """Forget the inner shapes, which were those before removal."""
    given = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and id(tensor) not in given:
            tensor.shape = None


def kept_initializers(
    analysis: Analysis, written: dict[tuple[int, int], gs.Constant], orders: Orders
) -> dict[str, dict[str, Indices]]:
    """Return the kept old indices of the initializers that became smaller, by axis, under their new names.

    One that several nodes shared has several names where they keep different indices of it.
    """
    table: dict[str, dict[str, Indices]] = {}
    for node in analysis.tables.nodes:
        rule = analysis.known.rules[node.index]
        if rule is None or node.index not in analysis.liveness.needed or node.index in analysis.known.view.divided:
            continue  # (the weights of a divided layer are no longer one tensor)
        for part in rule.parts(node, analysis.known.view):
            indices = analysis.keep.indices(part.axis.value, part.axis.axis)
            if indices is None:
                continue
            chosen = _chosen(analysis.keep.kept[part.axis.value, part.axis.axis], part, orders)
            operand = node.inputs[part.slot]
            name = operand.stored.source if operand.stored is not None else operand.name
            if (node.index, part.slot) in written:
                name = written[node.index, part.slot].name
            table.setdefault(name, {})[str(part.constant_axis)] = chosen
    return dict(sorted(table.items()))


def _chosen(mask: np.ndarray, part: Part, orders: Orders) -> Indices:
    """Return the kept old indices of a constant's axis; by group where groups that share it keep different ones."""
    size = len(part.of)
    if size == len(mask) or len(mask) % size or not (part.of == np.arange(size)).all():
        return _ordered(np.flatnonzero(mask[part.of]), part.axis, orders)
    groups = [np.flatnonzero(own).tolist() for own in mask.reshape(-1, size) if own.any()]
    return groups[0] if all(group == groups[0] for group in groups) else groups


class Writer:
    """Collects new nodes and constants; a constant that several nodes share stays shared while they agree on it."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._names = set(graph.tensors())
        self._node_names = {node.name for node in graph.nodes}
        self._before: dict[int, list[gs.Node]] = {}
        self._after: dict[int, list[gs.Node]] = {}
        self._shared: dict[str, list[tuple[np.ndarray, gs.Constant]]] = {}
        self._index = {id(node): index for index, node in enumerate(graph.nodes)}
        self._stored: dict[str, list[tuple[bytes, gs.Variable]]] = {}
        self.sizes: dict[tuple[int, int], int] = {}
        """The new size of each constant input that was written, by node and slot."""
        self.written: dict[tuple[int, int], gs.Constant] = {}
        self.beside: set[int] = set()
        """The nodes that others were put beside."""
        self.passed: set[int] = set()
        """The nodes that were left out, since they only pass an input on by now."""

    def fresh(self, wanted: str) -> str:
        """Return a tensor name that is not in use."""
        return fresh(wanted, self._names)

    def fresh_node(self, wanted: str) -> str:
        """Return a node name that is not in use."""
        return fresh(wanted, self._node_names)

    def constant(self, wanted: str, array: np.ndarray) -> gs.Constant:
        """Return a constant with this array, one object for equal arrays that come from the same constant."""
        array = np.asarray(array, order="C")
        versions = self._shared.setdefault(wanted, [])
        for known, constant in versions:
            if known.dtype == array.dtype and np.array_equal(known, array):
                return constant
        versions.append((array, gs.Constant(self.fresh(wanted), array)))
        return versions[-1][1]

    def replace(self, node: gs.Node, slot: int, array: np.ndarray) -> None:
        """Give one of the analysed nodes another constant, as a version of the one that it had at first."""
        old = node.inputs[slot]
        first = (name for name, versions in self._shared.items() if any(made is old for _, made in versions))
        made = self.constant(next(first, old.name), array)
        node.inputs[slot] = self.written[self._index[id(node)], slot] = made

    def stored(self, old: gs.Variable, stored: Stored, near: gs.Node) -> gs.Variable:
        """Return a dequantised constant like ``old`` with other contents, one for equal contents."""
        versions = self._stored.setdefault(old.name, [])
        key = digest(*(array for array in (stored.integers, stored.scale, stored.zero_point) if array is not None))
        found = next((variable for known, variable in versions if known == key), None)
        if found is not None:
            return found
        dequantise = old.inputs[0]
        first = dequantise.inputs[0]
        if isinstance(first, gs.Constant):
            source: gs.Tensor = self._again(first, stored.integers)
        else:  # floats that are quantised at run time
            quantise = first.inputs[0]
            floats = self._again(quantise.inputs[0], stored.values())
            source = gs.Variable(self.fresh(first.name), dtype=first.dtype)
            self._copy_of(quantise, floats, stored, source, near)
        made = gs.Variable(self.fresh(old.name), dtype=old.dtype)
        self._copy_of(dequantise, source, stored, made, near)
        versions.append((key, made))
        return made

    def _copy_of(self, node: gs.Node, first: gs.Tensor, stored: Stored, made: gs.Variable, near: gs.Node) -> None:
        """Put a copy of one node of a quantised constant's pair beside its reader."""
        scale, *rest = node.inputs[1:]
        inputs = [first, self._again(scale, stored.scale)]
        if stored.zero_point is not None:
            inputs.append(self._again(rest[0], stored.zero_point))
        copy = gs.Node(node.op, self.fresh_node(node.name or made.name), dict(node.attrs), inputs, [made])
        self.insert(copy, near)

    def _again(self, old: gs.Constant, array: np.ndarray) -> gs.Constant:
        """Return the constant itself where it stays as it is, or its new version."""
        same = old.values.dtype == array.dtype and np.array_equal(old.values, array)
        return old if same else self.constant(old.name, array)

    def name_constants(self) -> None:
        """Give the first version of each constant its old name, unless the old constant itself is still read."""
        outputs = {tensor.name for tensor in self._graph.outputs}
        read = outputs | {tensor.name for node in self._graph.nodes for tensor in all_inputs(node)}
        for wanted, versions in self._shared.items():
            used = [constant for _, constant in versions if constant.outputs]
            if used and wanted not in read:
                used[0].name = wanted
        for wanted, stored in self._stored.items():
            if wanted not in read and stored[0][1].outputs:
                stored[0][1].name = wanted

    def insert(self, node: gs.Node, near: gs.Node, *, after: bool = False) -> None:
        """Remember a new node beside an old one."""
        if after:  # a second one goes between the old node and the first
            self._after.setdefault(id(near), []).insert(0, node)
        else:
            self._before.setdefault(id(near), []).append(node)

    def place_nodes(self) -> None:
        """Put the new nodes in their places."""
        self._graph.nodes = [
            new
            for node in self._graph.nodes
            for new in (*self._before.get(id(node), ()), node, *self._after.get(id(node), ()))
        ]


class NodeEdit:
    """What one node's ``drop`` may see and do (see `rules.base.Edit`)."""

    def __init__(self, analysis: Analysis, node: Node, target: gs.Node, writer: Writer) -> None:
        self._analysis = analysis
        self._node = node
        self._target = target
        self._writer = writer
        self.view: View = analysis.known.view
        self.needed = analysis.liveness.needed[node.index]

    def kept(self, operand: Operand, axis: int) -> np.ndarray | None:
        """Return the kept old indices along an axis in order, or None where all are kept."""
        return self._analysis.keep.indices(operand.name, axis)

    def live(self, operand: Operand) -> np.ndarray:
        """Return the live positions of a value (bool, in its layout)."""
        return self._analysis.liveness.live[operand.name]

    def is_needed(self, operand: Operand) -> bool:
        """Whether anything needs a value."""
        return operand.name in self._analysis.liveness.live

    def set_constant(self, slot: int, array: np.ndarray) -> None:
        """Replace (or add) a constant input."""
        inputs = self._target.inputs
        old = self._node.inputs[slot] if slot < len(self._node.inputs) else None
        same = old is not None and old.array is not None and old.array.dtype == array.dtype
        if same and old is not None and old.array is not None and np.array_equal(old.array, array):
            return
        stored = None if old is None or old.stored is None else self._stored_part(slot, old.stored).of_values(array)
        if stored is not None:
            self.set_stored(slot, stored)
            return
        while len(inputs) <= slot:
            inputs.append(gs.Variable.empty())
        if old is not None and old.array is not None:
            name = old.name
        else:
            name = self._writer.fresh(f"{self._node.outputs[0].name}_input{slot}")
        inputs[slot] = self._writer.written[self._node.index, slot] = self._writer.constant(name, array)
        self._writer.sizes[self._node.index, slot] = array.size

    def _stored_part(self, slot: int, stored: Stored) -> Stored:
        """Return a quantised constant with the scales and zero points of what is kept along its axis."""
        rule = self._analysis.known.rules[self._node.index]
        parts = [] if rule is None or stored.axis is None else rule.parts(self._node, self.view)
        part = next((part for part in parts if (part.slot, part.constant_axis) == (slot, stored.axis)), None)
        mask = None if part is None else self._analysis.keep.kept.get((part.axis.value, part.axis.axis))
        return stored if part is None or mask is None else stored.part(stored.integers, np.flatnonzero(mask[part.of]))

    def set_stored(self, slot: int, stored: Stored) -> None:
        """Let a quantised constant keep other integers, scales and zero points."""
        old = self._node.inputs[slot].stored
        assert old is not None
        pairs = [(old.integers, stored.integers), (old.scale, stored.scale), (old.zero_point, stored.zero_point)]
        self._writer.sizes[self._node.index, slot] = stored.integers.size
        if all(before is after or np.array_equal(np.asarray(before), np.asarray(after)) for before, after in pairs):
            return
        self._target.inputs[slot] = self._writer.stored(self._target.inputs[slot], stored, self._target)

    def set_attribute(self, name: str, value: object) -> None:
        """Set an attribute, unless it has this value already (given or by default); None removes it."""
        defaults = {"group": 1, "alpha": 1.0, "beta": 1.0, "allowzero": 0}
        if value is None:
            self._target.attrs.pop(name, None)
        elif self._target.attrs.get(name, defaults.get(name)) != value:
            self._target.attrs[name] = value

    def before(self, slot: int, op_type: str, attributes: dict[str, object], *constants: np.ndarray) -> None:
        """Put a node before an input; its other inputs are constants."""
        source = self._target.inputs[slot]
        made = gs.Variable(self._writer.fresh(f"{source.name}_{op_type.lower()}"), dtype=source.dtype)
        node = self._node_of(op_type, attributes, [source, *self._tables(made.name, constants)], made)
        self._target.inputs[slot] = made
        self._writer.insert(node, self._target)
        self._writer.beside.add(self._node.index)

    def after(self, op_type: str, attributes: dict[str, object], *constants: np.ndarray) -> None:
        """Put a node after the first output, which takes the output's name; its other inputs are constants."""
        output = self._target.outputs[0]
        partial = gs.Variable(self._writer.fresh(f"{output.name}_before_{op_type.lower()}"), dtype=output.dtype)
        self._target.outputs[0] = partial
        node = self._node_of(op_type, attributes, [partial, *self._tables(output.name, constants)], output)
        self._writer.insert(node, self._target, after=True)
        self._writer.beside.add(self._node.index)

    def _node_of(self, op_type: str, attributes: dict[str, object], inputs: list[gs.Tensor], out: gs.Tensor) -> gs.Node:
        name = self._writer.fresh_node(f"{self._node.name}_{op_type.lower()}")
        return gs.Node(op_type, name, attributes, inputs, [out])

    def _tables(self, name: str, constants: tuple[np.ndarray, ...]) -> list[gs.Constant]:
        return [self._writer.constant(self._writer.fresh(f"{name}_constant"), array) for array in constants]

    def gather(self, slot: int, axis: int, indices: np.ndarray) -> None:
        """Put a Gather before an input."""
        self.before(slot, "Gather", {"axis": axis}, indices.astype(np.int64))

    def divide(self, slot: int, axis: int, out_axis: int, pieces: list[Piece]) -> None:
        """Put several nodes in the place of this one: they split an input along ``axis`` and join their outputs."""
        target, output = self._target, self._target.outputs[0]
        dtype = output.dtype
        shares = [gs.Variable(self._writer.fresh(f"{output.name}_input{i}"), dtype=dtype) for i in range(len(pieces))]
        made = [gs.Variable(self._writer.fresh(f"{output.name}_part{i}"), dtype=dtype) for i in range(len(pieces))]
        sizes = np.array([piece.size for piece in pieces], dtype=np.int64)
        listed = self._tables(output.name, (sizes,)) if self._node.opset >= 13 else []
        attributes: dict[str, object] = {"axis": axis} if listed else {"axis": axis, "split": sizes.tolist()}
        name = self._writer.fresh_node(f"{self._node.name}_split")
        self._writer.beside.add(self._node.index)
        self._writer.insert(gs.Node("Split", name, attributes, [target.inputs[slot], *listed], shares), target)
        for i, (piece, share, part) in enumerate(zip(pieces, shares, made, strict=True)):
            inputs: list[gs.Tensor] = [gs.Variable.empty() for _ in range(1 + max(slot, *piece.constants))]
            inputs[slot] = share
            for place, array in piece.constants.items():
                old = self._node.inputs[place].name if place < len(self._node.inputs) else ""
                inputs[place] = self._writer.constant(old or self._writer.fresh(f"{part.name}_input{place}"), array)
                key = (self._node.index, place)
                self._writer.sizes[key] = self._writer.sizes.get(key, 0) + array.size
            if i == 0:  # the old node is the first
                target.inputs, target.outputs = inputs, [part]
                target.attrs.update(piece.attributes)
            else:
                own = self._writer.fresh_node(f"{self._node.name}_part{i}")
                node = gs.Node(target.op, own, {**target.attrs, **piece.attributes}, inputs, [part])
                self._writer.insert(node, target, after=True)
        name = self._writer.fresh_node(f"{self._node.name}_concat")
        self._writer.insert(gs.Node("Concat", name, {"axis": out_axis}, made, [output]), target, after=True)

    def keep_inputs(self, slots: list[int]) -> None:
        """Remove every input slot that is not listed."""
        if len(slots) < len(self._target.inputs):
            self._target.inputs = [self._target.inputs[slot] for slot in slots]

    def keep_outputs(self, slots: list[int]) -> None:
        """Remove every output slot that is not listed; nothing may read it."""
        if len(slots) < len(self._target.outputs):
            self._target.outputs = [self._target.outputs[slot] for slot in slots]

    def bypass(self, slot: int) -> None:
        """Let the readers of the node's output read this input in its place."""
        source, output = self._target.inputs[slot], self._target.outputs[0]
        self._writer.passed.add(self._node.index)
        if any(output is tensor for tensor in self._writer._graph.outputs):
            self._target.op = "Identity"
            self._target.attrs.clear()
            self._target.inputs = [source]
        else:
            redirect(output, source)
