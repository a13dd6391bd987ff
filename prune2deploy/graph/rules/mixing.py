"""Operators that mix positions along axes: Softmax, LogSoftmax, Hardmax, CumSum, ArgMax, ArgMin and TopK.

Where a mixed axis is expanded, every result depends on every position along it, so none of them may go: all are
demanded, and both sides are frozen. Along all other axes these operators are channelwise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, digest, layout_key, make
from prune2deploy.graph.node import FLOATS, Node, Operand
from prune2deploy.graph.rules.base import Demand, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.channelwise import nothing_to_drop
from prune2deploy.graph.rules.pool import linear_window

INTEGERS = frozenset({"int64"})
"""The type of indices."""


def expanded_among(fact: Fact, axes: Iterable[int]) -> list[int]:
    """Return which of these axes have positions."""
    return [axis for axis in axes if fact.shape[axis] > 1]


def static_count(operand: Operand, fact: Fact, axes: Iterable[int]) -> int | None:
    """Return the number of elements that each position holds along these axes, or None where a size is not known."""
    assert operand.shape is not None
    count = 1
    for axis in axes:
        size = operand.shape[axis]
        if fact.shape[axis] > 1:
            continue
        if not isinstance(size, int):
            return None
        count *= size
    return count


def signature(node: Node, axes: Iterable[int], fact: Fact) -> Hashable:
    """Return what a result depends on besides the input's facts and constant inputs."""
    return (
        node.op_type,
        str(sorted(node.attributes.items())),
        tuple(axes),
        layout_key(node.inputs[0].shape or (), fact),
    )


def rows(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Return an array with these axes merged into one behind all others."""
    others = [axis for axis in range(array.ndim) if axis not in axes]
    return array.transpose([*others, *axes]).reshape([array.shape[axis] for axis in others] + [-1])


def from_rows(array: np.ndarray, axes: Sequence[int], layout: tuple[int, ...]) -> np.ndarray:
    """Return what `rows` made, in the layout that it came from."""
    others = [axis for axis in range(len(layout)) if axis not in axes]
    order = np.argsort([*others, *axes])
    return array.reshape([layout[axis] for axis in (*others, *axes)]).transpose(order)


def row_numbers(fact: Fact, axes: Sequence[int], mark: Hashable, view: View) -> np.ndarray:
    """Return one number for each row of positions along these axes, shaped like the fact with size 1 along them."""
    parts = [rows(part, axes) for part in (fact.number, fact.scale, fact.shift)]
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    key = view.numbers.intern(("row", mark))
    found = [view.numbers.intern((key, digest(*row))) for row in zip(*flat, strict=True)]
    layout = [1 if axis in axes else size for axis, size in enumerate(fact.shape)]
    return np.array(found, dtype=np.int64).reshape(layout)


def mixed_numbers(fact: Fact, axes: Sequence[int], mark: Hashable, view: View, *, ordered: bool = False) -> np.ndarray:
    """Return a number for every position, keyed by its own fact and by all facts along the expanded ``axes``.

    ``ordered``: the result also depends on where along the axes the position is.
    """
    if not axes:
        return view.numbers.of_facts(mark, fact)
    number = np.broadcast_to(row_numbers(fact, axes, mark, view), fact.shape)
    whole = [Fact(number, np.ones(fact.shape), np.zeros(fact.shape)), fact]
    if ordered:
        size = int(np.prod([fact.shape[axis] for axis in axes]))
        repeat = int(np.prod(fact.shape)) // size
        index = from_rows(np.tile(np.arange(size), repeat), axes, fact.shape)
        whole.append(Fact(index, np.ones(fact.shape), np.zeros(fact.shape)))
    return view.numbers.of_facts(("mixed", mark), *whole)


def spread(mask: np.ndarray, axes: Sequence[int], layout: tuple[int, ...]) -> np.ndarray:
    """Return what is demanded of an input with this layout where each of its rows along ``axes`` is read whole."""
    reduced = mask.any(axis=tuple(axes), keepdims=True) if axes else mask
    return np.broadcast_to(reduced, layout).copy()


def mixing_ties(
    node: Node,
    positions: Positions,
    view: View,
    mixed: Sequence[int],
    out_axis: Callable[[int], int | None] = lambda a: a,
) -> Iterable[Constraint]:
    """Freeze both sides along mixed axes, and tie all others; ``out_axis`` gives the output's axis of an input's."""
    operand = node.inputs[0]
    for axis in range(len(view.of(operand).shape)):
        place = out_axis(axis)
        if axis in mixed:
            yield freeze(positions.ids(operand.name, axis))
        for output in node.outputs:
            if not output.name or place is None:
                continue
            if axis in mixed:
                yield freeze(positions.ids(output.name, place))
            elif any(positions.ids(output.name, other) is not None for other in range(len(view.of(output).shape))):
                yield from tie_axes(positions, (output.name, place), (operand.name, axis))


# --- Softmax, LogSoftmax, Hardmax -------------------------------------------------------------------------------------

Share = Callable[[np.ndarray, int], np.ndarray]
"""Constants [..., k], each ``count`` times, to the results at those positions."""


def _log_softmax(c: np.ndarray, count: int) -> np.ndarray:
    below = c - c.max(axis=-1, keepdims=True)
    return np.asarray(below - np.log(count * np.exp(below).sum(axis=-1, keepdims=True)))


def _softmax_axes(node: Node) -> list[int]:
    """Return the axes that are normalised together: before opset 13 the axis and all behind it."""
    rank = max(len(node.inputs[0].shape or ()), 1)
    axis = int(node.attribute("axis", 1 if node.opset < 13 else -1)) % rank
    return [axis] if node.opset >= 13 else list(range(axis, rank))


def _softmax_rule(share: Share | None) -> Rule:
    """Return the rule; ``share`` is None where the result at a position depends on its place (Hardmax: the first)."""

    def facts(node: Node, view: View) -> list[Fact]:
        fact, axes = view.of(node.inputs[0]), _softmax_axes(node)
        across = expanded_among(fact, axes)
        number = mixed_numbers(fact, across, signature(node, axes, fact), view, ordered=share is None)
        count = static_count(node.inputs[0], fact, axes)
        constant, value = np.zeros(fact.shape, dtype=bool), np.zeros(fact.shape)
        if share is not None and count is not None:
            whole = rows(fact.constant, across).all(axis=-1, keepdims=True)
            shared = share(rows(fact.shift, across), count)
            constant = from_rows(np.broadcast_to(whole, shared.shape), across, fact.shape)
            value = from_rows(shared, across, fact.shape)
        return [make(number, np.where(constant, 0.0, 1.0), np.where(constant, value, 0.0))]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        fact = view.of(node.inputs[0])
        assert outs[0] is not None
        return {0: Demand(spread(outs[0], expanded_among(fact, _softmax_axes(node)), fact.shape))}

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        fact = view.of(node.inputs[0])
        return mixing_ties(node, positions, view, expanded_among(fact, _softmax_axes(node)))

    return Rule(facts, live, ties, nothing_to_drop, "activation")


SOFTMAX = _softmax_rule(lambda c, count: np.exp(_log_softmax(c, count)))
LOG_SOFTMAX = _softmax_rule(_log_softmax)
HARDMAX = _softmax_rule(None)


# --- CumSum -----------------------------------------------------------------------------------------------------------


def _cumsum_axes(node: Node, view: View) -> list[int]:
    given = node.constant(1)
    assert given is not None
    return [int(given.ravel()[0]) % len(view.of(node.inputs[0]).shape)]


def _cumsum_facts(node: Node, view: View) -> list[Fact] | str:
    if node.constant(1) is None:
        return "its axis is computed"
    fact, axes = view.of(node.inputs[0]), _cumsum_axes(node, view)
    mark = signature(node, axes, fact)
    across = expanded_among(fact, axes)
    if not across:  # linear; the sum of ones is a ramp, so a constant becomes a multiple of that
        return [linear_window(fact, mark, border=True, view=view)]
    number = mixed_numbers(fact, across, mark, view, ordered=True)
    return [make(number, np.ones(fact.shape), np.zeros(fact.shape))]


def _cumsum_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    fact = view.of(node.inputs[0])
    assert outs[0] is not None
    return {0: Demand(spread(outs[0], expanded_among(fact, _cumsum_axes(node, view)), fact.shape))}


def _cumsum_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    fact = view.of(node.inputs[0])
    return mixing_ties(node, positions, view, expanded_among(fact, _cumsum_axes(node, view)))


CUMSUM = Rule(_cumsum_facts, _cumsum_live, _cumsum_ties, nothing_to_drop, "movement")


# --- ArgMax, ArgMin, TopK: positions are chosen along one axis --------------------------------------------------------


def _chosen_axis(node: Node, view: View) -> int:
    return int(node.attribute("axis", -1 if node.op_type == "TopK" else 0)) % len(view.of(node.inputs[0]).shape)


def _removes_axis(node: Node) -> bool:
    return node.op_type != "TopK" and not node.attribute("keepdims", 1)


def _chosen(fact: Fact, node: Node, axis: int, mark: Hashable, view: View) -> Fact:
    """Return the fact of a result that depends on all facts along the axis, in the output's layout."""
    across = expanded_among(fact, [axis])
    number = row_numbers(fact, across, mark, view) if across else view.numbers.of_facts(mark, fact)
    if _removes_axis(node):
        number = number.squeeze(axis=axis)
    return make(number, np.ones(number.shape), np.zeros(number.shape))


def _arg_facts(node: Node, view: View) -> list[Fact]:
    # Not even a constant's index is known: its value may differ from place to place in the last bit.
    fact, axis = view.of(node.inputs[0]), _chosen_axis(node, view)
    return [_chosen(fact, node, axis, signature(node, [axis], fact), view)]


def _topk_facts(node: Node, view: View) -> list[Fact] | str:
    if any(operand.is_value for operand in node.inputs[1:]):
        return "its k is computed"
    fact, axis = view.of(node.inputs[0]), _chosen_axis(node, view)
    k = node.constant(1)
    mark = (signature(node, [axis], fact), None if k is None else int(k.ravel()[0]))
    indices = _chosen(fact, node, axis, ("indices", mark), view)
    if fact.shape[axis] > 1:
        return [_chosen(fact, node, axis, ("values", mark), view), indices]
    keyed = Fact(fact.number, np.sign(fact.scale), np.zeros(fact.shape))  # the largest of s X + t, s > 0, is s X' + t
    return [make(view.numbers.of_facts(("values", mark), keyed), np.abs(fact.scale), fact.shift), indices]


def _chosen_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    fact, axis = view.of(node.inputs[0]), _chosen_axis(node, view)
    reduced = tuple(1 if place == axis else size for place, size in enumerate(fact.shape))
    masks = [mask.reshape(reduced) for mask in outs if mask is not None]
    return {0: Demand(np.broadcast_to(np.logical_or.reduce(masks), fact.shape).copy())}


def _chosen_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    axis = _chosen_axis(node, view)

    def out_axis(place: int) -> int | None:
        if place == axis:
            return None
        return place - 1 if _removes_axis(node) and place > axis else place

    return mixing_ties(node, positions, view, [axis], out_axis)


ARG = Rule(_arg_facts, _chosen_live, _chosen_ties, nothing_to_drop, "pool", types=INTEGERS)
TOPK = Rule(_topk_facts, _chosen_live, _chosen_ties, nothing_to_drop, "pool", types=FLOATS | INTEGERS)
