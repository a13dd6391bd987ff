"""Reshape and Flatten: blocks of axes that are merged and split, each block on its own.

A batch of any size takes part in one way only: as many channels as there are heads become part of it, or come back out
of it (``[N, 4 * 64, 256]`` and ``[4 * N, 64, 256]``, as attention is often written).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.constraints import FROZEN, Constraint, Equal, Hull, Ids, Positions
from prune2deploy.graph.fact import Fact, Shape, collapse, expand, layout_key
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.pool import linear_window
from prune2deploy.graph.rules.sources import MOVED, computed, everything

MOST_POSITIONS = 2**20
"""A Reshape that would give a value more positions than this is opaque: each takes about 2 us and 300 bytes."""


@dataclass(frozen=True)
class Block:
    """Consecutive input axes that become consecutive output axes, with equal products of sizes."""

    into: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether it is a single axis on either side."""
        return len(self.into) == len(self.out) == 1


def blocks(before: Shape, after: Shape) -> list[Block] | None:
    """Return the smallest blocks of two shapes of one tensor, or None where unknown sizes leave them open.

    Blocks are closed from the front, and then from the back, as soon as the products on both sides provably agree;
    named dimensions match themselves. What is left in the middle is one block: the products of all sizes agree, and
    none is 0, so those of the rest do too.
    """
    front = _matched(before, after)
    i, j = _ends(front)
    back = _matched(before[i:][::-1], after[j:][::-1])
    p, q = (len(before) - _ends(back)[0], len(after) - _ends(back)[1])
    if (i == p) != (j == q):  # the rest is a product of 1 that is not known to be one
        return None
    middle = [Block(tuple(range(i, p)), tuple(range(j, q)))] if i < p else []
    mirrored = [
        Block(
            tuple(len(before) - 1 - axis for axis in block.into[::-1]),
            tuple(len(after) - 1 - axis for axis in block.out[::-1]),
        )
        for block in back[::-1]
    ]
    return [*front, *middle, *mirrored]


def _ends(found: list[Block]) -> tuple[int, int]:
    return sum(len(block.into) for block in found), sum(len(block.out) for block in found)


def _matched(before: Shape, after: Shape) -> list[Block]:
    """Return the blocks that can be closed one after the other from the front."""
    found: list[Block] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        if i < len(before) and j < len(after) and before[i] is not None and before[i] == after[j]:
            i, j = i + 1, j + 1
        else:
            grown = _grow(before, after, i, j)
            if grown is None:
                break
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


@dataclass(frozen=True)
class Heads:
    """The channels of a block whose other axis is the batch: ``[into, each]`` of them become ``[out, each]``.

    One of ``into`` and ``out`` is 1: the heads are in the batch there.
    """

    into: int
    out: int
    each: int


def _heads(block: Block, before: Shape, after: Shape) -> Heads | None:
    """Return the heads that a block takes into the batch or out of it; None where it does anything else."""
    counts = []
    for axes, shape in ((block.into, before), (block.out, after)):
        sizes = [size for axis in axes[1:] if isinstance(size := shape[axis], int)]
        if block.same or axes[0] != 0 or isinstance(shape[0], int) or len(sizes) < len(axes) - 1:
            return None
        counts.append(math.prod(sizes))
    each = min(counts)
    return None if max(counts) % each else Heads(counts[0] // each, counts[1] // each, each)


def _regrouped(fact: Fact, heads: Heads, block: Block, before: Shape, view: View) -> Fact:
    """Return the fact of a value whose channels lose their heads to the batch, or get them from there.

    All of the block's channels are along axis 1 of it; its other axes stay, so that those behind keep their numbers.
    """
    for axis in block.into[1:]:
        size = before[axis]
        assert isinstance(size, int)
        fact = expand(fact, axis, size, before, view.numbers)
    behind, sizes = fact.shape[len(block.into) :], before[len(block.into) :]
    ones = (1,) * len(block.into[2:])
    fact = fact.map(lambda array: array.reshape(heads.into, heads.each, *behind))
    fact = collapse(fact, 0, (heads.into, heads.each, *sizes), view.numbers)
    fact = expand(fact, 0, heads.out, (heads.out, heads.each, *sizes), view.numbers)
    return fact.map(lambda array: array.reshape(1, heads.out * heads.each, *ones, *behind))


def _found(node: Node, view: View) -> list[Block]:
    """Return the blocks of a node that has some."""
    found = view.once(node, "blocks", lambda: blocks(node.inputs[0].shape or (), node.outputs[0].shape or ()))
    assert found is not None
    return found


def _expanded(node: Node, view: View, block: Block) -> bool:
    layout = view.of(node.inputs[0]).shape
    return any(layout[axis] > 1 for axis in block.into)


def _width(node: Node, view: View, found: list[Block]) -> int:
    """Return how many positions the result has, as far as sizes are known."""
    before, after = node.inputs[0].shape or (), node.outputs[0].shape or ()
    expanded = [block for block in found if _expanded(node, view, block)]
    sides = [before[axis] for block in expanded for axis in block.into], [after[a] for b in expanded for a in b.out]
    return max(math.prod(size for size in side if isinstance(size, int)) for side in sides)


def _facts(node: Node, view: View) -> list[Fact] | str:
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None:
        return "the rank of its result is not known"
    if any(size == 0 for size in (*before, *after)):
        return "its result is empty"
    found = view.once(node, "blocks", lambda: blocks(before, after))
    if found is None:
        return "its sizes are not known"
    fact = view.of(node.inputs[0])
    width = _width(node, view, found)
    if width > max(MOST_POSITIONS, fact.number.size):
        return f"it merges channels with space into {width:,} positions, more than {MOST_POSITIONS:,}"
    target: list[int] = [1] * len(after)
    merged: list[Block] = []
    for block in found:
        if not _expanded(node, view, block):
            merged += [] if block.same else [block]
        elif heads := _heads(block, before, after):
            fact = _regrouped(fact, heads, block, before, view)
            for axis in block.out[1:]:
                size = after[axis]
                assert isinstance(size, int)
                target[axis] = size
            merged.append(block)
        else:
            for axis in block.into:
                size = before[axis]
                if not isinstance(size, int):
                    return "it merges channels with an axis whose size is not known"
                fact = expand(fact, axis, size, before, view.numbers)
            for axis in block.out:
                size = after[axis]
                if not isinstance(size, int):
                    if not block.same:
                        return "it splits channels into sizes that are not known"
                    size = fact.shape[block.into[0]]
                target[axis] = size
    if merged:
        signature = ("Reshape", str(merged), after, layout_key(before, fact))
        fact = linear_window(fact, signature, border=False, view=view)
    return [fact.map(lambda array: array.reshape(target))]


def _live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    before, after, mask = node.inputs[0].shape, node.outputs[0].shape, outs[0]
    assert before is not None
    assert after is not None
    assert mask is not None
    shape = [1] * len(before)
    for block in _found(node, view):
        if not _expanded(node, view, block):
            continue
        heads = _heads(block, before, after)
        if heads is not None:
            wanted = mask.reshape(heads.out, heads.each, -1).any(axis=0)
            mask = np.broadcast_to(wanted, (heads.into, *wanted.shape))
        for axis in block.into if heads is None else block.into[1:]:
            size = before[axis]
            assert isinstance(size, int)
            shape[axis] = size
    demands = {0: Demand(mask.reshape(shape))}
    if _shape(node, view) is None:  # it takes a computed shape as it comes
        demands |= {slot: everything(node.inputs[slot], view) for slot in computed(node, (1,))}
    return demands


def _ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    operand, output = node.inputs[0], node.outputs[0]
    fixed = bool(computed(node, (1,))) and _shape(node, view) is None
    for block in _found(node, view):
        if not _expanded(node, view, block):
            continue
        heads = _heads(block, operand.shape or (), output.shape or ())
        into = [axis for axis in block.into if (operand.shape or ())[axis] != 1]
        out = [axis for axis in block.out if (output.shape or ())[axis] != 1]
        if fixed or (heads is not None and max(len(into), len(out)) > 2):  # heads beside more than one axis of places
            for value, axes in ((operand, into), (output, out)):
                yield from (freeze(positions.ids(value.name, axis)) for axis in axes)
        elif heads is not None:
            sides_of = ((operand.name, into[1:]), (output.name, out[1:]))
            yield from _head_ties(heads, *(positions.ids(value, axes[0]) if axes else None for value, axes in sides_of))
        elif len(into) == 1 and len(out) == 1:
            yield from tie_axes(positions, (operand.name, into[0]), (output.name, out[0]))
        else:
            sides = (
                _axes(positions, operand.name, operand.shape, into),
                _axes(positions, output.name, output.shape, out),
            )
            yield Hull(sides)


def _head_ties(heads: Heads, into: Ids | None, out: Ids | None) -> Iterable[Constraint]:
    """Tie place i of every head to place i of every other."""
    if into is None or out is None:
        yield freeze(out if into is None else into)
        return
    for own in into.reshape(heads.into, heads.each):
        for other in out.reshape(heads.out, heads.each):
            yield Equal(own, other)


def _axes(positions: Positions, value: str, shape: Shape | None, axes: list[int]) -> tuple[np.ndarray, ...]:
    """Return the ids along each axis; an axis without positions of its own is whole, so its cells are frozen."""
    found = []
    for axis in axes:
        ids = positions.ids(value, axis)
        size = (shape or ())[axis]
        assert isinstance(size, int)
        found.append(np.full(size, FROZEN) if ids is None else ids)
    return tuple(found)


def _shape(node: Node, view: View) -> list[int] | None:
    """Return a constant shape for the whole output: 0 copies an axis in its place, -1 is the only one left open."""
    output = node.outputs[0].shape or ()
    copied = {block.out[0] for block in _found(node, view) if block.same and block.into == block.out}
    sizes = [size if isinstance(size, int) else 0 if axis in copied else -1 for axis, size in enumerate(output)]
    return sizes if sizes.count(-1) < 2 else None


def _drop(node: Node, edit: Edit) -> None:
    """Rewrite the target shape, or only the entries of the axes that changed where it is written down."""
    if node.op_type == "Flatten":
        return
    operand, output, given = node.inputs[0], node.outputs[0], node.constant(1)
    kept = [edit.kept(output, axis) for axis in range(output.rank or 0)]
    if given is None:
        sizes = _shape(node, edit.view)
        if sizes is None:
            return
    else:
        sizes = [int(size) for size in given.ravel()]
    zeros_copy = given is None or not node.attribute("allowzero", 0)
    for axis, indices in enumerate(kept):
        if indices is not None:
            sizes[axis] = len(indices)
        elif sizes[axis] == 0 and zeros_copy and edit.kept(operand, axis) is not None:
            size = (output.shape or ())[axis]  # what it would copy has become smaller
            assert isinstance(size, int)
            sizes[axis] = size
    if given is None:
        edit.set_attribute("allowzero", 0)
    if given is None or sizes != [int(size) for size in given.ravel()]:
        edit.set_constant(1, np.array(sizes, dtype=np.int64))


RESHAPE = Rule(_facts, _live, _ties, _drop, "movement", types=MOVED)
