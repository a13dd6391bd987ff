"""Operators that treat every position on its own and keep the layout: Identity, Dropout, BatchNormalization."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, make, with_layout
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Axis, Demand, Edit, Part, Rule, View, tie_axes


def same_layout_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    """Return the demand of an operator whose position i reads position i of its first input."""
    assert outs[0] is not None
    return {0: Demand(outs[0])}


def same_layout_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    """Tie every position of the output to the same position of the first input."""
    output = node.outputs[0]
    for axis in range(len(view.of(output).shape)):
        yield from tie_axes(positions, (output.name, axis), (node.inputs[0].name, axis))


def nothing_to_drop(node: Node, edit: Edit) -> None:
    """Leave a node as it is: nothing in it depends on the kept positions."""


def _identity_facts(node: Node, view: View) -> list[Fact] | None:
    mode = node.constant(2)  # of a Dropout
    if len(node.outputs) > 1 or (node.input(2) is not None and (mode is None or mode.any())):
        return None
    return [view.of(node.inputs[0])]


IDENTITY = Rule(_identity_facts, same_layout_live, same_layout_ties, nothing_to_drop, "movement")


def _batchnorm(node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a BatchNormalization's factor and offset by channel, float64, or None for training mode."""
    arrays = [node.constant(slot) for slot in (1, 2, 3, 4)]
    if node.attribute("training_mode", 0) or sum(1 for output in node.outputs if output.name) > 1:
        return None
    if any(array is None for array in arrays):
        return None
    scale, shift, mean, var = (np.asarray(array, dtype=np.float64) for array in arrays)
    factor = scale / np.sqrt(var + node.attribute("epsilon", 1e-5))
    offset = shift - mean * factor
    return (factor, offset) if np.isfinite(factor).all() and np.isfinite(offset).all() else None


def _batchnorm_facts(node: Node, view: View) -> list[Fact] | None:
    affine = _batchnorm(node)
    shape = node.inputs[0].shape
    if affine is None or shape is None or len(shape) < 2:
        return None
    fact = view.of(node.inputs[0])
    others = [axis for axis in range(2, len(shape)) if fact.shape[axis] > 1]
    size = len(affine[0])
    fact = with_layout(fact, [1, *others], [size, *(fact.shape[axis] for axis in others)], shape, view.numbers)
    column = [1] * len(shape)
    column[1] = size
    factor, offset = (part.reshape(column) for part in affine)
    return [make(fact.number, fact.scale * factor, fact.shift * factor + offset)]


def _batchnorm_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    affine = _batchnorm(node)
    assert affine is not None
    assert outs[0] is not None
    column = [1] * outs[0].ndim
    column[1] = len(affine[0])
    return {0: Demand(outs[0] & (affine[0] != 0).reshape(column))}


def _batchnorm_drop(node: Node, edit: Edit) -> None:
    kept = edit.kept(node.outputs[0], 1)
    if kept is None:
        return
    for slot in (1, 2, 3, 4):
        array = node.inputs[slot].array
        assert array is not None
        edit.set_constant(slot, array[kept])


def _batchnorm_parts(node: Node, view: View) -> list[Part]:
    axis = Axis(node.outputs[0].name, 1)
    roles = ((1, "scale"), (2, "shift"), (3, "mean"), (4, "var"))
    found = []
    for slot, role in roles:
        array = node.inputs[slot].array
        assert array is not None
        found.append(Part(slot, 0, role, axis, np.arange(len(array))))
    return found


BATCH_NORMALIZATION = Rule(
    _batchnorm_facts, _batchnorm_live, same_layout_ties, _batchnorm_drop, "norm", parts=_batchnorm_parts
)
