"""MatMul and Gemm of two computed values, as in attention: queries times keys, weights times values.

The contracted axis is tied on both sides: place k of one meets place k of the other, and where either is 0 the two add
nothing. The rows of the result follow the first value's, its columns the second's, and batch axes follow both.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, Shape, digest, expand, make
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Axis, Demand, Edit, Part, Rule, View, sliced, tie_axes


@dataclass(frozen=True, eq=False)
class Side:
    """One operand in the product's own order of axes: batch axes, rows, columns.

    Attributes:
        fact: of that order, with size-1 axes in front where the operand has fewer than the result.
        shape: likewise.
        axes: for each axis of that order the operand's own axis, None where it has none.
    """

    fact: Fact
    shape: Shape
    axes: tuple[int | None, ...]

    def zero(self) -> np.ndarray:
        """Return where the operand is 0; bool, shaped like the fact."""
        return np.asarray(self.fact.constant & (self.fact.shift == 0))

    def own(self, mask: np.ndarray) -> np.ndarray:
        """Return a mask of that order in the operand's own order of axes."""
        order = [place for place, axis in enumerate(self.axes) if axis is not None]
        order.sort(key=lambda place: self.axes[place] or 0)
        front = tuple(place for place, axis in enumerate(self.axes) if axis is None)
        squeezed = np.asarray(mask.any(axis=front, keepdims=True))
        return squeezed.transpose([*front, *order]).reshape([squeezed.shape[place] for place in order])


def _sides(node: Node, view: View) -> tuple[Side, Side] | str:
    """Return both operands with one layout along the batch axes and the contracted one, or why there is none."""
    ranks = [node.inputs[slot].rank or 0 for slot in (0, 1)]
    if min(ranks) < 2:
        return "it contracts a value of one axis"
    rank = max(ranks)
    left, right = (_side(node, slot, rank, view) for slot in (0, 1))
    contracted = (rank - 1, rank - 2)
    for batch in range(rank - 2):
        size = max(left.fact.shape[batch], right.fact.shape[batch])
        left, right = (_expanded(side, batch, size, view) for side in (left, right))
    size = max(side.fact.shape[axis] for side, axis in zip((left, right), contracted, strict=True))
    left, right = (_expanded(side, axis, size, view) for side, axis in zip((left, right), contracted, strict=True))
    if left.fact.shape[rank - 1] != right.fact.shape[rank - 2]:
        return "the sizes of its contracted axes are not known"
    return left, right


def _side(node: Node, slot: int, rank: int, view: View) -> Side:
    operand = node.inputs[slot]
    own = operand.shape or ()
    start = rank - len(own)
    order = list(range(len(own)))
    if node.attribute(("transA", "transB")[slot], 0):
        order[-2:] = order[:-3:-1]
    layout = (1,) * start + tuple(view.of(operand).shape[axis] for axis in order)
    fact = view.of(operand).map(lambda array: array.transpose(tuple(order)).reshape(layout))
    return Side(fact, (1,) * start + tuple(own[axis] for axis in order), (None,) * start + tuple(order))


def _expanded(side: Side, axis: int, size: int, view: View) -> Side:
    """Expand an axis that the operand really has; along one of size 1 it is broadcast, which needs nothing."""
    if side.fact.shape[axis] == size or side.shape[axis] == 1:
        return side
    return Side(expand(side.fact, axis, size, side.shape, view.numbers), side.shape, side.axes)


def _sides_once(node: Node, view: View) -> tuple[Side, Side]:
    sides = view.once(node, "sides", lambda: _sides(node, view))
    assert not isinstance(sides, str), "facts() accepted this node"
    return sides


def _facts(node: Node, view: View) -> list[Fact] | str:
    if not all(node.inputs[slot].is_value for slot in (0, 1)):
        return "one of its matrices is a constant"
    sides = view.once(node, "sides", lambda: _sides(node, view))
    if isinstance(sides, str):
        return sides
    left, right = sides
    bias = _bias(node, left, right)
    if isinstance(bias, str):
        return bias
    layouts = [(side.shape, side.fact.shape, side.axes) for side in sides]
    signature = ("product", str(layouts), node.outputs[0].dtype)
    factor = float(node.attribute("alpha", 1.0))
    number, scale = (_paired if left.fact.shape[-1] > 1 else _whole)(left, right, signature, view)
    layout = number.shape
    return [make(number, scale * factor, np.broadcast_to(bias, layout))]


def _bias(node: Node, left: Side, right: Side) -> np.ndarray | str:
    """Return what a Gemm adds, broadcast to the layout of the result, or why that cannot be said."""
    given = node.constant(2)
    if node.input(2) is not None and given is None:
        return "its bias is computed"
    if given is None:
        return np.zeros((1, 1))
    values: np.ndarray = given.astype(np.float64) * float(node.attribute("beta", 1.0))
    values = values.reshape((1,) * (2 - values.ndim) + values.shape)
    layout = (left.fact.shape[-2], right.fact.shape[-1])
    if any(size > 1 and size != have for size, have in zip(values.shape, layout, strict=True)):
        return "its bias varies along an axis of which nothing is known"
    return values


def _whole(left: Side, right: Side, signature: Hashable, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers and scales where the contracted axis has no positions: one function of the two."""
    layout = np.broadcast_shapes(left.fact.shape, right.fact.shape)
    a, b = (side.fact.map(lambda array: np.broadcast_to(array, layout)) for side in (left, right))
    plain = (a.shift == 0) & (b.shift == 0)  # (s X)(s' Y) = s s' (X Y)
    keyed = (Fact(part.number, np.where(plain & (part.scale != 0), 1.0, part.scale), part.shift) for part in (a, b))
    nothing = (a.constant & (a.shift == 0)) | (b.constant & (b.shift == 0))
    scale = np.where(nothing, 0.0, np.where(plain, a.scale * b.scale, 1.0))
    return view.numbers.of_facts(signature, *keyed), scale


def _paired(left: Side, right: Side, signature: Hashable, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers and scales where the contracted axis has positions: keyed by the pairs that are not always 0."""
    batch = np.broadcast_shapes(left.fact.shape[:-2], right.fact.shape[:-2])
    a, b = (
        side.fact.map(lambda array: np.broadcast_to(array, batch + array.shape[-2:]).reshape(-1, *array.shape[-2:]))
        for side in (left, right)
    )
    rows, columns = a.shape[1], b.shape[2]
    number = np.zeros((a.shape[0], rows, columns), dtype=np.int64)
    scale = np.zeros(number.shape)
    mark = view.numbers.intern(signature)
    for index in range(a.shape[0]):
        parts = [[part[index] for part in (fact.number, fact.scale, fact.shift)] for fact in (a, b)]
        zero = [(part[1] == 0) & (part[2] == 0) for part in parts]
        used = ~zero[0].all(axis=0) & ~zero[1].all(axis=1)
        by_row = [digest(*(part[row, used] for part in parts[0])) for row in range(rows)]
        by_column = [digest(*(part[used, column] for part in parts[1])) for column in range(columns)]
        keys = ((mark, row, column) for row in by_row for column in by_column)
        number[index] = view.numbers.intern_all(keys).reshape(rows, columns)
        meet = (~zero[0][:, used]).astype(np.float64) @ (~zero[1][used]).astype(np.float64)
        scale[index] = meet > 0
    return number.reshape(*batch, rows, columns), scale.reshape(*batch, rows, columns)


def _useless(left: Side, right: Side) -> np.ndarray:
    """Return the places of the contracted axis where in every matrix of the batch one side is 0; bool [places]."""
    if left.fact.shape[-1] == 1:  # no places: all of it is read, or none
        return np.zeros(1, dtype=bool)
    pair = np.logical_or(left.zero().all(axis=-2), right.zero().all(axis=-1))
    return np.asarray(pair.reshape(-1, pair.shape[-1]).all(axis=0))


def _live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    left, right = _sides_once(node, view)
    assert outs[0] is not None
    used = ~_useless(left, right)
    rows, columns = outs[0].any(axis=-1, keepdims=True), outs[0].any(axis=-2, keepdims=True)
    masks = (rows & used, columns & used[:, None])
    return {
        slot: Demand(_own_layout(mask, side))
        for slot, (mask, side) in enumerate(zip(masks, (left, right), strict=True))
    }


def _own_layout(mask: np.ndarray, side: Side) -> np.ndarray:
    """Return a mask of the product's layout as a demand on one operand: nothing is wanted twice along size 1."""
    axes = tuple(axis for axis, size in enumerate(side.shape) if size == 1)
    return side.own(np.asarray(mask.any(axis=axes, keepdims=True)))


def _ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    left, right = _sides_once(node, view)
    output = node.outputs[0].name
    rank = len(left.shape)
    names = (node.inputs[0].name, node.inputs[1].name)
    places = {0: (*range(rank - 2), rank - 2), 1: (*range(rank - 2), rank - 1)}
    for slot, side in enumerate((left, right)):
        for place in places[slot]:
            axis = side.axes[place]
            if axis is not None and side.shape[place] != 1:
                yield from tie_axes(positions, (output, place), (names[slot], axis))
    contracted = (left.axes[rank - 1], right.axes[rank - 2])
    assert contracted[0] is not None
    assert contracted[1] is not None
    yield from tie_axes(positions, (names[0], contracted[0]), (names[1], contracted[1]))


def _drop(node: Node, edit: Edit) -> None:
    """Make the zeros true that nobody keeps right: a place may stay for another's sake, and then hold anything."""
    left, right = _sides_once(node, edit.view)
    rank = len(left.shape)
    axes = (left.axes[rank - 1], right.axes[rank - 2])
    always_zero = (_every(left.zero(), rank - 1), _every(right.zero(), rank - 2))
    wrong = _useless(left, right)
    for operand, axis, zero in zip(node.inputs, axes, always_zero, strict=False):
        assert axis is not None
        wrong = wrong & ~(zero & _every(edit.live(operand), axis))
    for slot, axis in enumerate(axes):
        assert axis is not None
        operand = node.inputs[slot]
        kept = edit.kept(operand, axis)
        stays = wrong if kept is None else wrong[kept]
        if stays.any() and edit.view.of(operand).shape[axis] > 1:  # one side is enough
            layout = [1] * (operand.rank or 0)
            layout[axis] = len(stays)
            edit.before(slot, "Mul", {}, (~stays).reshape(layout).astype(operand.dtype))
            break
    bias = node.constant(2)
    if bias is not None:
        edit.set_constant(2, sliced(bias, node.outputs[0], edit))


def _every(mask: np.ndarray, axis: int) -> np.ndarray:
    """Return along one axis whether all is set."""
    return np.asarray(mask.all(axis=tuple(other for other in range(mask.ndim) if other != axis)))


def _parts(node: Node, view: View) -> list[Part]:
    bias = node.constant(2)
    if bias is None:
        return []
    layout = view.of(node.outputs[0]).shape
    places = ((axis, axis + 2 - bias.ndim) for axis in range(bias.ndim))
    return [
        Part(2, axis, "constant", Axis(node.outputs[0].name, place), np.arange(bias.shape[axis]))
        for axis, place in places
        if bias.shape[axis] > 1 and layout[place] == bias.shape[axis]
    ]


PRODUCT = Rule(_facts, _live, _ties, _drop, "product", _parts)
