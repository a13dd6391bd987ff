"""A sound bound on how far the outputs of a changed graph can be from those of the reference.

One sweep forward by interval arithmetic: for every value what it can be in either graph, and what the difference can
be, over all inputs in a box. The bound holds in exact arithmetic; the rounding of the runtime is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from prune2deploy.errors import InputError
from prune2deploy.graph.bounds.interval import interval, zero
from prune2deploy.graph.bounds.movement import dropout
from prune2deploy.graph.bounds.ranges import Ranges, constants, ranges, unchanged, unknown
from prune2deploy.graph.bounds.rules import RULES
from prune2deploy.graph.bounds.step import Step
from prune2deploy.graph.fold import RANDOM
from prune2deploy.graph.groupnorm import restore_group_norms
from prune2deploy.graph.model import copy_of
from prune2deploy.graph.node import FLOATS, Node, Operand, Tables, tables
from prune2deploy.graph.normal import normalise
from prune2deploy.graph.validity import blaming_the_file

REAL = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
"""The floating types, as files number them."""

End = float | np.ndarray
InputRanges = Mapping[str, tuple[End, End]]
"""Input -> (lowest, highest): numbers, one per channel (axis 1), or arrays that broadcast to the input."""


@dataclass(frozen=True, eq=False)
class Bound:
    """How far one output can move.

    Attributes:
        largest: no element moves by more, whatever the input in the box; infinite where nothing is known.
        channels: the same for each position of axis 1, where the sweep could tell them apart.
        lowest, highest: what the output can be in the reference, to hold the bound against.
        unbounded_by: the first node that left it without a bound (``name (operator)``), or None.
    """

    largest: float
    channels: np.ndarray | None
    lowest: float
    highest: float
    unbounded_by: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the bound as a JSON object, with None for what is infinite."""
        numbers = {name: getattr(self, name) for name in ("largest", "lowest", "highest")}
        finite = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
        return {**finite, "unbounded_by": self.unbounded_by}


@blaming_the_file
def output_bound(reference: onnx.ModelProto, changed: onnx.ModelProto, input_ranges: InputRanges) -> dict[str, Bound]:
    """Return for every output a bound on ``|changed(x) - reference(x)|`` over all inputs x in the box.

    Args:
        reference: the graph as it was.
        changed: the same graph with other weights.
        input_ranges: the box, one entry per input of `real_inputs`; the others may hold anything.

    Raises:
        InputError: if the graphs differ in more than weights, or the box does not fit the inputs.
    """
    before, after = _tables_of(reference), _tables_of(changed)
    _require_one_structure(before, after)
    _require_known(input_ranges, before)
    values = {operand.name: _input_ranges(operand, input_ranges) for operand in before.inputs}
    culprits: dict[str, str] = {}
    producers: dict[str, Node] = {}
    for node, other in zip(before.nodes, after.nodes, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float64 nothing is known, and that is no warning
            found = _found(Step(node, other, values, producers))
        blame = next((culprits[operand.name] for operand in node.inputs if operand.name in culprits), None)
        for operand, value in zip(node.outputs, found, strict=True):
            values[operand.name], producers[operand.name] = value, node
            if not np.isfinite(value.difference.magnitude).all():
                culprits[operand.name] = blame or f"{node.name} ({node.op_type})"
    result = {}
    for operand, other_operand in zip(before.outputs, after.outputs, strict=True):
        held = (operand.array, other_operand.array)
        value = values[operand.name] if held[0] is None or held[1] is None else constants(held[0], held[1])
        result[operand.name] = _bound(value, culprits.get(operand.name))
    return result


def real_inputs(model: onnx.ModelProto) -> list[str]:
    """Return the inputs that hold floating-point numbers, and so need a range; not those that initializers fill."""
    held = {tensor.name for tensor in model.graph.initializer}
    return [
        value.name for value in model.graph.input if value.name not in held and value.type.tensor_type.elem_type in REAL
    ]


def _tables_of(model: onnx.ModelProto) -> Tables:
    copy = copy_of(model)
    graph = normalise(copy)
    restore_group_norms(graph)  # its three nodes have rules; by itself it is in no file
    return tables(graph)


# --- the sweep --------------------------------------------------------------------------------------------------------


def _found(step: Step) -> list[Ranges]:
    """Return the ranges of a node's outputs; without a rule, only that equal inputs give equal outputs."""
    node = step.node
    same = _reads_the_same(step)
    rule = RULES.get(node.op_type) if node.domain == "" and not node.captured else None
    values = [operand for operand in node.inputs if operand.is_value]
    known = all(operand.shape is not None and 0 not in operand.shape for operand in values)  # of nothing is no smallest
    found = (rule(step) if rule is not None and known else None) or []
    result = []
    for slot, operand in enumerate(node.outputs):
        if slot < len(found) and _fits(found[slot], operand):
            value = found[slot]
            result.append(ranges(value.reference, value.changed, zero(value.shape)) if same else value)
        else:
            result.append(unknown((1,) * (operand.rank or 0), same=same))
    return result


def _reads_the_same(step: Step) -> bool:
    """Whether all that a node reads is the same in both graphs; what its own graphs read is not looked at."""
    training = step.node.op_type == "Dropout" and dropout(step) is None
    if step.node.captured or training or step.node.op_type in RANDOM:
        return False
    for slot, (operand, other) in enumerate(zip(step.node.inputs, step.changed.inputs, strict=True)):
        if operand.array is not None and other.array is not None:
            if operand.array.tobytes() != other.array.tobytes():
                return False
        elif operand.is_value and not step.ranges(slot).same:
            return False
    return True


def _fits(value: Ranges, operand: Operand) -> bool:
    """Whether a layout agrees with the shape that onnx inferred; a graph that contradicts itself is not bounded."""
    if operand.shape is None or len(operand.shape) != len(value.shape):
        return False
    sizes = zip(value.shape, operand.shape, strict=True)
    return all(size == 1 or not isinstance(have, int) or have == size for size, have in sizes)


def _bound(value: Ranges, culprit: str | None) -> Bound:
    moved = value.difference.magnitude
    channels = None
    if moved.ndim > 1 and moved.shape[1] > 1:
        channels = moved.max(axis=(0, *range(2, moved.ndim)))
    return Bound(
        largest=float(moved.max(initial=0.0)),
        channels=channels,
        lowest=float(value.reference.lo.min(initial=np.inf)),
        highest=float(value.reference.hi.max(initial=-np.inf)),
        unbounded_by=culprit,
    )


# --- what was given ---------------------------------------------------------------------------------------------------


def _require_known(given: InputRanges, graph: Tables) -> None:
    names = [operand.name for operand in graph.inputs]
    unknown_names = [name for name in given if name not in names]
    if unknown_names:
        raise InputError(f"there is no input '{unknown_names[0]}' to bound; the inputs are {', '.join(names)}")


def _input_ranges(operand: Operand, given: InputRanges) -> Ranges:
    layout = (1,) * (operand.rank or 0)
    if operand.name not in given:
        if operand.dtype in FLOATS:
            raise InputError(f"no range is given for input '{operand.name}'; give its lowest and highest value")
        return unknown(layout, same=True)
    low, high = (_ends(np.asarray(end, dtype=np.float64), operand) for end in given[operand.name])
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
        raise InputError(f"the range of input '{operand.name}' is not finite or upside down; give LOWEST,HIGHEST")
    shape = np.broadcast_shapes(low.shape, high.shape)
    return unchanged(interval(np.broadcast_to(low, shape), np.broadcast_to(high, shape)))


def _ends(array: np.ndarray, operand: Operand) -> np.ndarray:
    """Return ends in the layout of the input; one axis of them runs over the channels."""
    rank = operand.rank or 0
    if array.ndim == 1 and rank > 1:
        array = array.reshape(1, -1, *(1,) * (rank - 2))
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    sizes = zip(array.shape, operand.shape or (), strict=False)
    if array.ndim != rank or any(isinstance(have, int) and size not in (1, have) for size, have in sizes):
        raise InputError(
            f"the range of input '{operand.name}' has shape {list(array.shape)}, which does not fit "
            f"{list(operand.shape or ())}; give numbers, or one per channel"
        )
    return array


def _require_one_structure(before: Tables, after: Tables) -> None:
    if [_form(node) for node in before.nodes] != [_form(node) for node in after.nodes]:
        raise InputError("the two graphs differ in more than weights, so no bound can be given; compare them by verify")
    for node, other in zip(before.nodes, after.nodes, strict=True):
        for mine, theirs in zip(node.inputs, other.inputs, strict=True):
            if mine.array is None or theirs.array is None or mine.dtype in FLOATS:
                continue
            if not np.array_equal(mine.array, theirs.array):
                raise InputError(
                    f"constant '{mine.name}' of {node.name} is {mine.dtype} and differs between the two graphs, "
                    "so no bound can be given; compare them by verify"
                )


def _form(node: Node) -> tuple[object, ...]:
    attributes = {key: _plain(value) for key, value in node.attributes.items()}
    inputs = [(part.is_value and part.name, None if part.array is None else part.array.shape) for part in node.inputs]
    return (node.domain, node.op_type, str(sorted(attributes.items())), str(inputs), [out.name for out in node.outputs])


def _plain(value: object) -> object:
    held = getattr(value, "values", None)  # a tensor attribute is onnx-graphsurgeon's own object
    return held.tobytes() if isinstance(held, np.ndarray) else value
