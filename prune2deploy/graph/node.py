"""Tables of a graph that the analysis reads: nodes with constant operands, attributes with defaults, static shapes.

Values are keyed by name. The tables are built once from an onnx-graphsurgeon graph and never written to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes  # noqa: F401
import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from prune2deploy.graph.fact import Shape
from prune2deploy.graph.stored import Stored, stored_in

FLOATS = frozenset({"bfloat16", "float16", "float32", "float64"})
"""The floating types that rules cover; numpy knows the first by name once ml_dtypes is imported."""


@dataclass(frozen=True, eq=False)
class Operand:
    """An input or output of a node: a value by name, or a constant with its array; an absent one has the name ''.

    Of a constant that the graph keeps quantised, ``array`` are the dequantised values, and ``stored`` what it keeps.
    """

    name: str
    array: np.ndarray | None
    shape: Shape | None
    dtype: str
    stored: Stored | None = None

    @property
    def is_value(self) -> bool:
        """Whether it is computed at run time."""
        return self.array is None and self.name != ""

    @property
    def rank(self) -> int | None:
        """The number of axes, or None where it is not known."""
        return None if self.shape is None else len(self.shape)


@dataclass(frozen=True, eq=False)
class Node:
    """One operator of the graph."""

    index: int
    name: str
    op_type: str
    domain: str
    attributes: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    captured: tuple[str, ...]
    opset: int
    sizes_read: frozenset[int] | None = None
    """Of a Shape: the axes whose sizes its readers take; None where a reader takes all."""

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the operator's default."""
        return self.attributes.get(name, default)

    def input(self, slot: int) -> Operand | None:
        """Return an input, or None where it is absent."""
        return self.inputs[slot] if slot < len(self.inputs) and self.inputs[slot].name else None

    def constant(self, slot: int) -> np.ndarray | None:
        """Return a constant input's array, or None where it is absent or computed."""
        operand = self.input(slot)
        return None if operand is None else operand.array

    @property
    def value_slots(self) -> list[int]:
        """The slots of the inputs that are computed at run time."""
        return [slot for slot, operand in enumerate(self.inputs) if operand.is_value]


@dataclass(frozen=True, eq=False)
class Tables:
    """A graph as the analysis sees it, in topological order."""

    nodes: tuple[Node, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @cached_property
    def dimensions(self) -> dict[str, tuple[str, int]]:
        """Where each named dimension can be had at run time: the graph's input and axis that carry it."""
        found: dict[str, tuple[str, int]] = {}
        for operand in self.inputs:
            for axis, size in enumerate(operand.shape or ()):
                if isinstance(size, str):
                    found.setdefault(size, (operand.name, axis))
        return found

    def readers(self) -> dict[str, list[int]]:
        """Return for each value the indices of the nodes that read it, subgraphs included."""
        table: dict[str, list[int]] = {}
        for node in self.nodes:
            for name in {operand.name for operand in node.inputs if operand.is_value} | set(node.captured):
                table.setdefault(name, []).append(node.index)
        return table


def tables(graph: gs.Graph) -> Tables:
    """Return the analysis tables of a topologically sorted graph; node i of the table is node i of the graph."""
    given_out = {id(tensor) for tensor in graph.outputs}
    with G_LOGGER.suppress():  # it prints
        return Tables(
            nodes=tuple(_node(node, index, graph.opset, given_out) for index, node in enumerate(graph.nodes)),
            inputs=tuple(_operand(tensor) for tensor in graph.inputs),
            outputs=tuple(_operand(tensor) for tensor in graph.outputs),
        )


def _node(node: gs.Node, index: int, opset: int, given_out: set[int]) -> Node:
    subgraphs = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
    return Node(
        index=index,
        name=node.name or f"{node.op}_{index}",
        op_type=node.op,
        domain="" if node.domain in (None, "ai.onnx") else node.domain,
        attributes={key: value for key, value in node.attrs.items() if not isinstance(value, gs.Graph)},
        inputs=tuple(_input(tensor) for tensor in node.inputs),
        outputs=tuple(_operand(tensor) for tensor in node.outputs),
        captured=tuple(sorted({name for subgraph in subgraphs for name in _reads(subgraph)})),
        opset=opset,
        sizes_read=_sizes_read(node) if node.op == "Shape" and id(node.outputs[0]) not in given_out else None,
    )


def _sizes_read(node: gs.Node) -> frozenset[int] | None:
    """Return the axes whose sizes the readers of a Shape take, or None where one takes all of them."""
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    output = node.outputs[0]
    if rank is None or not output.outputs:
        return None
    listed = np.arange(rank)[slice(node.attrs.get("start", 0), node.attrs.get("end", rank))]
    taken: set[int] = set()
    for reader in output.outputs:
        constants = [tensor.values for tensor in reader.inputs[1:] if isinstance(tensor, gs.Constant)]
        if reader.op not in ("Gather", "Slice") or len(constants) < len(reader.inputs) - 1:
            return None if len(listed) == rank else frozenset(listed.tolist())
        if reader.op == "Gather":
            taken.update(listed[np.ravel(constants[0])].tolist())
        elif constants and len(constants) < 4:
            taken.update(listed[int(constants[0].ravel()[0]) : int(constants[1].ravel()[0])].tolist())
        else:
            taken.update(listed.tolist())
    return frozenset(taken)


def _reads(graph: gs.Graph) -> Iterator[str]:
    """Yield every name that a subgraph reads; its own names are unknown outside, so they do no harm."""
    for tensor in graph.outputs:
        yield tensor.name
    for node in graph.nodes:
        for tensor in node.inputs:
            yield tensor.name
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from _reads(value)


def _input(tensor: gs.Tensor) -> Operand:
    stored = stored_in(tensor)
    if stored is None:
        return _operand(tensor)
    array = stored.values()
    return Operand(tensor.name, array, array.shape, str(array.dtype), stored)


def _operand(tensor: gs.Tensor) -> Operand:
    if isinstance(tensor, gs.Constant):
        array = np.asarray(tensor.values)
        return Operand(tensor.name, array, array.shape, str(array.dtype))
    shape = None if tensor.shape is None else tuple(_dimension(size) for size in tensor.shape)
    return Operand(tensor.name, None, shape, _type_name(tensor.dtype))


def _dimension(size: Any) -> int | str | None:
    if isinstance(size, int | np.integer):
        return int(size) if size >= 0 else None
    return size if isinstance(size, str) and size else None


def _type_name(dtype: Any) -> str:
    """Return a type's name; onnx-graphsurgeon gives numpy types, but ONNX's own enum for bfloat16 and the like."""
    if dtype is None:
        return "unknown"
    if isinstance(dtype, int):
        return {16: "bfloat16"}.get(dtype, f"onnx_{dtype}")
    return str(np.dtype(dtype).name)
