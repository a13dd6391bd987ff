"""Reshape and Flatten: blocks of axes that are merged and split, each block on its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.constraints import FROZEN, Constraint, Hull, Positions
from prune2deploy.graph.fact import Fact, Shape, expand, layout_key
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, tie_axes
from prune2deploy.graph.rules.pool import linear_window


@dataclass(frozen=True)
class Block:
    """Consecutive input axes that become consecutive output axes, with equal products of sizes."""

    into: tuple[int, ...]
    out: tuple[int, ...]


def blocks(before: Shape, after: Shape) -> list[Block] | None:
    """Return the smallest blocks of two shapes of one tensor, or None where unknown sizes leave them open.

    Named dimensions match themselves; a block is closed as soon as the products on both sides agree.
    """
    found: list[Block] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        if i < len(before) and j < len(after) and before[i] is not None and before[i] == after[j]:
            i, j = i + 1, j + 1
        else:
            grown = _grow(before, after, i, j)
            if grown is None:
                return None
            i, j = grown
        found.append(Block(tuple(range(first_i, i)), tuple(range(first_j, j))))
    return found


def _grow(before: Shape, after: Shape, i: int, j: int) -> tuple[int, int] | None:
    """Extend the shorter side until the products agree; only over static sizes."""
    product = [1, 1]
    sides = (before, after)
    at = [i, j]
    while True:
        side = 0 if product[0] <= product[1] and at[0] < len(before) else 1
        if at[side] >= len(sides[side]):
            side = 1 - side
        if at[side] >= len(sides[side]):
            return None
        size = sides[side][at[side]]
        if not isinstance(size, int):
            return None
        product[side] *= size
        at[side] += 1
        if product[0] == product[1]:
            return at[0], at[1]


def _target(node: Node) -> Shape | None:
    """Return the output's shape; its one open size takes the name of the input's where it can be nothing else."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None:
        return None
    opens = [[size for size in shape if not isinstance(size, int)] for shape in (before, after)]
    rests = [int(np.prod([size for size in shape if isinstance(size, int)])) for shape in (before, after)]
    if len(opens[0]) == len(opens[1]) == 1 and rests[0] == rests[1] > 0:
        return tuple(size if isinstance(size, int) else opens[0][0] for size in after)
    return after


def _blocks(node: Node, view: View) -> list[Block] | None:
    before, after = node.inputs[0].shape, _target(node)
    return None if before is None or after is None else blocks(before, after)


def _expanded(node: Node, view: View, block: Block) -> bool:
    layout = view.of(node.inputs[0]).shape
    return any(layout[axis] > 1 for axis in block.into)


def _facts(node: Node, view: View) -> list[Fact] | None:
    found = _blocks(node, view)
    before, after = node.inputs[0].shape, _target(node)
    if found is None or before is None or after is None:
        return None
    fact = view.of(node.inputs[0])
    target: list[int] = [1] * len(after)
    merged: list[Block] = []
    for block in found:
        sizes = [after[axis] for axis in block.out]
        if _expanded(node, view, block):
            for axis in block.into:
                size = before[axis]
                if not isinstance(size, int):
                    return None
                fact = expand(fact, axis, size, before, view.numbers)
            for axis, size in zip(block.out, sizes, strict=True):
                target[axis] = int(size) if isinstance(size, int) else 1
        elif len(block.into) != 1 or len(block.out) != 1:
            merged.append(block)
    if merged:
        signature = ("Reshape", str(merged), after, layout_key(before, fact))
        fact = linear_window(fact, signature, border=False, view=view)
    return [fact.map(lambda array: array.reshape(target))]


def _live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    found, before = _blocks(node, view), node.inputs[0].shape
    assert found is not None
    assert before is not None
    assert outs[0] is not None
    shape = [1] * len(before)
    for block in found:
        if _expanded(node, view, block):
            for axis in block.into:
                size = before[axis]
                assert isinstance(size, int)
                shape[axis] = size
    return {0: Demand(outs[0].reshape(shape))}


def _ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    found = _blocks(node, view)
    assert found is not None
    operand, output = node.inputs[0], node.outputs[0]
    for block in found:
        if not _expanded(node, view, block):
            continue
        into = [axis for axis in block.into if (operand.shape or ())[axis] != 1]
        out = [axis for axis in block.out if (output.shape or ())[axis] != 1]
        if len(into) == 1 and len(out) == 1:
            yield from tie_axes(positions, (operand.name, into[0]), (output.name, out[0]))
        else:
            sides = (
                _axes(positions, operand.name, operand.shape, into),
                _axes(positions, output.name, output.shape, out),
            )
            yield Hull(sides)


def _axes(positions: Positions, value: str, shape: Shape | None, axes: list[int]) -> tuple[np.ndarray, ...]:
    """Return the ids along each axis; an axis without positions of its own is whole, so its cells are frozen."""
    found = []
    for axis in axes:
        ids = positions.ids(value, axis)
        size = (shape or ())[axis]
        assert isinstance(size, int)
        found.append(np.full(size, FROZEN) if ids is None else ids)
    return tuple(found)


def _drop(node: Node, edit: Edit) -> None:
    """Rewrite the target shape; 0 copies an axis at the same place, -1 is left for one that is dynamic."""
    output = node.outputs[0]
    shape = _target(node)
    assert shape is not None
    kept = [edit.kept(output, axis) for axis in range(len(shape))]
    if all(indices is None for indices in kept) or node.op_type == "Flatten":
        return
    sizes: list[int] = []
    for axis, (size, indices) in enumerate(zip(shape, kept, strict=True)):
        if indices is not None:
            sizes.append(len(indices))
        elif isinstance(size, int):
            sizes.append(size)
        elif axis < len(node.inputs[0].shape or ()) and (node.inputs[0].shape or ())[axis] == size:
            sizes.append(0)
        else:
            sizes.append(-1)
    edit.set_constant(1, np.array(sizes, dtype=np.int64))
    if node.attribute("allowzero", 0):
        edit.set_attribute("allowzero", 0)


def _checked_facts(node: Node, view: View) -> list[Fact] | None:
    """Refuse shapes that could not be rewritten: more than one dynamic size that cannot be copied."""
    before, after = node.inputs[0].shape or (), _target(node) or ()
    open_sizes = [
        axis
        for axis, size in enumerate(after)
        if not isinstance(size, int) and not (axis < len(before) and before[axis] == size)
    ]
    if len(open_sizes) > 1 or any(size == 0 for size in (*before, *after)):
        return None
    return _facts(node, view)


RESHAPE = Rule(_checked_facts, _live, _ties, _drop, "movement")
