"""Operators that rename axes: Transpose, Squeeze, Unsqueeze. Each output axis is an axis of the input, or new."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, layout_key
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, tie_axes
from prune2deploy.graph.rules.channelwise import nothing_to_drop
from prune2deploy.graph.rules.pool import linear_window
from prune2deploy.graph.rules.sources import MOVED


def _transpose_axes(node: Node, rank: int) -> list[int | None] | None:
    return [int(axis) for axis in node.attribute("perm", range(rank)[::-1])]


def _listed_axes(node: Node) -> list[int] | None:
    axes = node.attribute("axes")
    if axes is None and node.input(1) is not None:
        given = node.constant(1)
        return None if given is None else [int(axis) for axis in given.ravel()]
    return None if axes is None else [int(axis) for axis in axes]


def _squeeze_axes(node: Node, rank: int) -> list[int | None] | None:
    listed = _listed_axes(node)
    if listed is None:
        shape = node.inputs[0].shape
        if node.input(1) is not None or shape is None or not all(isinstance(size, int) for size in shape):
            return None
        listed = [axis for axis, size in enumerate(shape) if size == 1]
    gone = {axis % rank for axis in listed}
    return [axis for axis in range(rank) if axis not in gone]


def _unsqueeze_axes(node: Node, rank: int) -> list[int | None] | None:
    listed = _listed_axes(node)
    if listed is None:
        return None
    total = rank + len(listed)
    new = {axis % total for axis in listed}
    old = iter(range(rank))
    return [None if axis in new else next(old) for axis in range(total)]


def _drop_squeeze(node: Node, edit: Edit) -> None:
    """Say which axes go where the operator took all of size 1: the kept channels may be one by now."""
    shape = node.inputs[0].shape
    if _listed_axes(node) is not None or shape is None:
        return
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    if node.opset < 13:
        edit.set_attribute("axes", axes)
    else:
        edit.set_constant(1, np.array(axes, dtype=np.int64))


def renaming_rule(
    read: Callable[[Node, int], list[int | None] | None], drop: Callable[[Node, Edit], None] = nothing_to_drop
) -> Rule:
    """Return the rule of an operator that permutes, removes or adds axes; ``read`` gives each output axis's source."""

    def facts(node: Node, view: View) -> list[Fact] | str:
        fact = view.of(node.inputs[0])
        axes = read(node, len(fact.shape))
        if axes is None:
            return "its axes are computed"
        if any(fact.shape[axis] > 1 for axis in range(len(fact.shape)) if axis not in axes):
            return "an axis that it takes away is not of size 1"
        collapsed = [axis for axis in axes if axis is not None and fact.shape[axis] == 1]
        if collapsed != sorted(collapsed):  # the remaining coordinates change their order
            signature = (node.op_type, tuple(axes), layout_key(node.inputs[0].shape or (), fact))
            fact = linear_window(fact, signature, border=False, view=view)
        return [fact.map(lambda array: _renamed(array, axes))]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        layout = view.of(node.inputs[0]).shape
        axes = read(node, len(layout))
        assert axes is not None
        assert outs[0] is not None
        order = sorted((axis, place) for place, axis in enumerate(axes) if axis is not None)
        places = [place for _, place in order]
        rest = [place for place in range(len(axes)) if place not in places]
        return {0: Demand(outs[0].transpose([*places, *rest]).reshape(layout))}

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        axes = read(node, len(view.of(node.inputs[0]).shape))
        assert axes is not None
        for place, axis in enumerate(axes):
            if axis is not None:
                yield from tie_axes(positions, (node.outputs[0].name, place), (node.inputs[0].name, axis))

    return Rule(facts, live, ties, drop, "movement", types=MOVED)


def _renamed(array: np.ndarray, axes: list[int | None]) -> np.ndarray:
    kept = [axis for axis in axes if axis is not None]
    gone = [axis for axis in range(array.ndim) if axis not in kept]
    moved = array.transpose([*kept, *gone]).reshape([array.shape[axis] for axis in kept])
    return moved[tuple(None if axis is None else slice(None) for axis in axes)]


TRANSPOSE = renaming_rule(_transpose_axes)
SQUEEZE = renaming_rule(_squeeze_axes, _drop_squeeze)
UNSQUEEZE = renaming_rule(_unsqueeze_axes)
