"""Index lists: channels of a graph named by a weight, a norm's scale or a value are zeroed, on the graph itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.errors import InputError
from prune2deploy.graph.facts import Known, channel_facts
from prune2deploy.graph.names import fresh
from prune2deploy.graph.node import Node, Operand, Tables, tables
from prune2deploy.graph.order import redirect
from prune2deploy.graph.rules.base import Axis, Part

NAMED = {"filter": frozenset({"filter", "bias"}), "scale": frozenset({"scale", "shift"})}
"""The role of the named constant -> the roles of its node's constants that are zeroed with it."""


def silence_by_name(graph: gs.Graph, channels: Mapping[str, Sequence[int]]) -> None:
    """Zero channels of a graph in normal form, in place.

    Of the weight of a convolution or linear layer: its filters and bias, and the scale and shift of the norms (and the
    bias that an Add holds) which alone read it. Of a norm's scale: scale and shift. Of a value: it is multiplied by 0
    and 1 before all its readers. A constant that other nodes share changes only where it was named.

    Raises:
        InputError: if a name is unknown, has no channels, or an index does not fit.
    """
    tb = tables(graph)
    work = _Work(tb, channel_facts(tb))
    for name, indices in channels.items():
        work.take(name, indices)
    _write(graph, work)


@dataclass(frozen=True, eq=False)
class _Work:
    """What is to be written: new arrays by (node index, slot), and factors by value."""

    tb: Tables
    known: Known
    arrays: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    factors: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, name: str, indices: Sequence[int]) -> None:
        """Note what zeroing these channels of a weight or a value writes."""
        users = [(node, slot) for node in self.tb.nodes for slot, one in enumerate(node.inputs) if one.name == name]
        constant = any(node.inputs[slot].array is not None for node, slot in users)
        if not constant:
            self._take_value(name, indices)
            return
        named = [(node, part) for node, slot in users for part in self._parts(node) if part.slot == slot]
        wanted = [(node, part) for node, part in named if part.role in NAMED]
        if not wanted:
            raise InputError(
                f"'{name}' is not the weight of a layer or the scale of a norm whose channels are known; name the "
                f"weight, or the value '{users[0][0].outputs[0].name}' that '{users[0][0].op_type}' makes of it"
            )
        for node, part in wanted:
            size = self._size(part.axis)
            require_channels(f"'{name}'", indices, size)
            if set(part.of.tolist()) != set(range(size)):
                raise InputError(
                    f"the filters of '{name}' are not one for each channel; name the value '{part.axis.value}' instead"
                )
            self._zero(node, NAMED[part.role], np.asarray(indices))
            if part.role == "filter":
                self._follow(part.axis, np.asarray(indices))

    def _parts(self, node: Node) -> list[Part]:
        rule = self.known.rules[node.index]
        return [] if rule is None else rule.parts(node, self.known.view)

    def _size(self, axis: Axis) -> int:
        return int(self.known.view.facts[axis.value].shape[axis.axis])

    def _zero(self, node: Node, roles: frozenset[str], channels: np.ndarray) -> None:
        for part in self._parts(node):
            if part.role in roles:
                array = self._array(node, part.slot)
                np.moveaxis(array, part.constant_axis, 0)[np.isin(part.of, channels)] = 0
        bias = node.constant(2) if "bias" in roles and node.op_type == "Gemm" else None
        if bias is not None and bias.size == 1:  # one number for all channels
            (part,) = (one for one in self._parts(node) if one.role == "filter")
            array = self.arrays.setdefault((node.index, 2), np.full(len(part.of), bias.ravel()[0]))
            array[channels] = 0

    def _array(self, node: Node, slot: int) -> np.ndarray:
        old = node.inputs[slot].array
        assert old is not None
        return self.arrays.setdefault((node.index, slot), np.array(old))

    def _follow(self, axis: Axis, channels: np.ndarray) -> None:
        """Zero the norms and added biases behind a layer, as long as each alone reads the one before."""
        readers, outputs = self.tb.readers(), {operand.name for operand in self.tb.outputs}
        value = axis.value
        while value not in outputs and len(readers.get(value, [])) == 1:
            node = self.tb.nodes[readers[value][0]]
            rule = self.known.rules[node.index]
            if rule is not None and rule.kind == "norm":
                self._zero(node, NAMED["scale"], channels)
            elif node.op_type == "Add" and self._adds_a_bias(node, axis):
                self._zero(node, frozenset({"constant"}), channels)
            else:
                return
            value = node.outputs[0].name

    def _adds_a_bias(self, node: Node, axis: Axis) -> bool:
        """Whether an Add adds one number for each channel."""
        arrays = [operand.array for operand in node.inputs if operand.array is not None]
        parts = [part for part in self._parts(node) if part.axis.axis == axis.axis]
        return len(arrays) == 1 and len(parts) == 1 and arrays[0].size == len(parts[0].of) == self._size(axis)

    # --- values -------------------------------------------------------------------------------------------------------

    def _take_value(self, name: str, indices: Sequence[int]) -> None:
        operand = self._operand(name)
        if any(operand.name == output.name for output in self.tb.outputs):
            raise InputError(f"'{name}' is an output of the graph, whose channels must stay; name what it is made of")
        axis = self._channel_axis(operand)
        size = None if operand.shape is None or axis is None else operand.shape[axis]
        if axis is None or not isinstance(size, int) or operand.dtype == "unknown":
            raise InputError(f"the channels of the value '{name}' are not known before run time; name a weight")
        require_channels(f"'{name}'", indices, size)
        factor = np.ones(size, dtype=operand.dtype)
        factor[list(indices)] = 0
        self.factors[name] = factor.reshape([size, *([1] * ((operand.rank or 0) - 1 - axis))])

    def _operand(self, name: str) -> Operand:
        values = {operand.name: operand for operand in self.tb.inputs}
        values |= {operand.name: operand for node in self.tb.nodes for operand in node.outputs if operand.name}
        if name in values:
            return values[name]
        weights = {part_name for node in self.tb.nodes for part_name in self._weights(node)}
        raise InputError(
            f"the file has no weight or value '{name}' (or its normal form has not: what only passes its input on is "
            f"left out); close names: {nearest(name, weights | values.keys())}"
        )

    def _weights(self, node: Node) -> list[str]:
        return [node.inputs[part.slot].name for part in self._parts(node) if part.role in NAMED]

    def _channel_axis(self, operand: Operand) -> int | None:
        """Return the one axis whose positions are told apart (the last one of a sequence), else axis 1."""
        layout = self.known.view.facts[operand.name].shape
        told_apart = [axis for axis, size in enumerate(layout) if size > 1]
        if len(told_apart) == 1:
            return told_apart[0]
        return 1 if len(layout) > 1 else None


def require_channels(what: str, indices: Sequence[int], size: int) -> None:
    """Refuse channels that are not there, or named twice, or all that there are.

    Raises:
        InputError: naming ``what``.
    """
    for index in indices:
        if not 0 <= index < size:
            raise InputError(f"{what} has {size} channels, 0 to {size - 1}, but {index} is to be dropped")
    if len(set(indices)) < len(indices):
        repeated = next(index for index in indices if list(indices).count(index) > 1)
        raise InputError(f"channel {repeated} of {what} is to be dropped twice; name it once")
    if len(indices) == size:
        raise InputError(f"all {size} channels of {what} are to be dropped; leave one at least")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the three known names that are closest to a name, as text."""
    return ", ".join(get_close_matches(name, sorted(known), n=3, cutoff=0.0)) or "none"


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(graph: gs.Graph, work: _Work) -> None:
    nodes = list(graph.nodes)
    names = set(graph.tensors())
    _write_constants(nodes, work.arrays, names)
    for value, factor in work.factors.items():
        _insert_factor(graph, graph.tensors()[value], factor, names)


def _write_constants(nodes: list[gs.Node], arrays: Mapping[tuple[int, int], np.ndarray], names: set[str]) -> None:
    made: dict[str, list[gs.Constant]] = {}
    replaced: dict[str, gs.Constant] = {}
    for (index, slot), array in arrays.items():
        old = nodes[index].inputs[slot]
        replaced[old.name] = old
        array = np.ascontiguousarray(array).astype(old.values.dtype)
        versions = made.setdefault(old.name, [])
        same = next((one for one in versions if np.array_equal(one.values, array)), None)
        if same is None:
            same = gs.Constant(fresh(f"{old.name}_dropped", names), array)
            versions.append(same)
        nodes[index].inputs[slot] = same
    for name, old in replaced.items():
        if not old.outputs:  # nothing else reads it: the name is free
            made[name][0].name = name


def _insert_factor(graph: gs.Graph, value: gs.Tensor, factor: np.ndarray, names: set[str]) -> None:
    product = gs.Variable(fresh(f"{value.name}_dropped", names), dtype=value.dtype, shape=value.shape)
    redirect(value, product)
    constant = gs.Constant(fresh(f"{product.name}_factor", names), factor)
    node = gs.Node("Mul", product.name, {}, [value, constant], [product])
    place = next((index + 1 for index, one in enumerate(graph.nodes) if any(one is maker for maker in value.inputs)), 0)
    graph.nodes.insert(place, node)
