"""Operators that move positions along one axis or rename axes: Concat, Slice, Pad, Transpose, Squeeze, Unsqueeze.

Along an expanded axis the operator itself is run on the fact arrays; along a collapsed one it makes fresh numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Count, Implies, Positions
from prune2deploy.graph.fact import ONE, Fact, constant, expand, layout_key, make
from prune2deploy.graph.node import Node, Operand
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.channelwise import nothing_to_drop
from prune2deploy.graph.rules.pool import linear_window


def expanded_axes(fact: Fact) -> list[int]:
    """Return the axes along which a fact has positions."""
    return [axis for axis, size in enumerate(fact.shape) if size > 1]


# --- Concat ---------------------------------------------------------------------------------------------------------


def _concat_axis(node: Node) -> int | None:
    rank = node.outputs[0].rank
    return None if rank is None else int(node.attribute("axis", 1)) % rank


def _concat_parts(node: Node, view: View) -> list[Fact] | None:
    """Return the inputs' facts in one layout, expanded along the axis where any input is."""
    axis = _concat_axis(node)
    if axis is None or any(operand.shape is None for operand in node.inputs):
        return None
    facts = [view.of(op) if op.is_value else constant(np.asarray(op.array)) for op in node.inputs]
    values = [fact for fact, op in zip(facts, node.inputs, strict=True) if op.is_value]
    wanted = {a for fact in values for a in expanded_axes(fact)}
    found = []
    for fact, operand in zip(facts, node.inputs, strict=True):
        assert operand.shape is not None
        for a in range(len(operand.shape)):
            size = operand.shape[a] if a == axis else max(value.shape[a] for value in values)
            if a in wanted and not isinstance(size, int):
                return None
            if a in wanted and isinstance(size, int):
                fact = expand(fact, a, size, operand.shape, view.numbers)
            elif fact.shape[a] > 1:  # a constant that has positions where the values have none
                return None
        found.append(fact)
    return found


def _concat_facts(node: Node, view: View) -> list[Fact] | None:
    axis, facts = _concat_axis(node), _concat_parts(node, view)
    if facts is None or axis is None:
        return None
    if any(fact.shape[axis] > 1 for fact in facts):
        return [
            Fact(*(np.concatenate(parts, axis=axis) for parts in zip(*(_parts(fact) for fact in facts), strict=True)))
        ]
    same = np.logical_and.reduce([fact.constant & (fact.shift == facts[0].shift) for fact in facts])
    signature = ("Concat", axis, tuple(operand.shape for operand in node.inputs))
    return [
        make(view.numbers.of_facts(signature, *facts), np.where(same, 0.0, 1.0), np.where(same, facts[0].shift, 0.0))
    ]


def _parts(fact: Fact) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return fact.number, fact.scale, fact.shift


def _concat_spans(node: Node, view: View) -> list[slice]:
    """Return for each input the span of the output's axis that it fills; the whole axis where that is collapsed."""
    axis = _concat_axis(node)
    assert axis is not None
    if view.of(node.outputs[0]).shape[axis] == 1:
        return [slice(None)] * len(node.inputs)
    sizes = [operand.shape[axis] for operand in node.inputs if operand.shape is not None]
    ends = np.cumsum([size for size in sizes if isinstance(size, int)])
    return [
        slice(int(end) - int(size), int(end)) for end, size in zip(ends, sizes, strict=True) if isinstance(size, int)
    ]


def _concat_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    axis = _concat_axis(node)
    assert axis is not None
    assert outs[0] is not None
    collapsed = view.of(node.outputs[0]).shape[axis] == 1
    demands = {}
    for slot, span in enumerate(_concat_spans(node, view)):
        mask = outs[0][(slice(None),) * axis + (span,)]
        if node.inputs[slot].is_value and (collapsed or mask.any()):
            demands[slot] = Demand(mask)
    return demands


def _concat_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    axis, output = _concat_axis(node), node.outputs[0]
    assert axis is not None
    along = positions.ids(output.name, axis)
    for slot, span in enumerate(_concat_spans(node, view)):
        operand = node.inputs[slot]
        if not operand.is_value:
            continue
        if slot not in needed:  # left out; if one of its places must be kept for another's sake, it comes back
            if along is not None:
                yield Implies(along[span], np.full(span.stop - span.start, positions.tripwire(node.index, slot)))
            continue
        for other in range(len(view.of(output).shape)):
            if other != axis:
                yield from tie_axes(positions, (output.name, other), (operand.name, other))
        if along is None:
            yield freeze(positions.ids(operand.name, axis))
            continue
        source = positions.ids(operand.name, axis)
        # An input without positions of its own (the graph's input, say) enters whole.
        yield freeze(along[span]) if source is None else Implies(along[span], source)


def _concat_drop(node: Node, edit: Edit) -> None:
    axis, output = _concat_axis(node), node.outputs[0]
    assert axis is not None
    kept = edit.kept(output, axis)
    stay = []
    for slot, span in enumerate(_concat_spans(node, edit.view)):
        operand = node.inputs[slot]
        wanted = None if kept is None else kept[(kept >= span.start) & (kept < span.stop)] - span.start
        if wanted is not None and not len(wanted):
            continue
        stay.append(slot)
        if operand.array is not None:
            _concat_constant(node, edit, slot, axis, wanted)
        elif wanted is not None:
            gather_if_needed(edit, slot, operand, axis, wanted)
    edit.keep_inputs(stay)


def _concat_constant(node: Node, edit: Edit, slot: int, axis: int, wanted: np.ndarray | None) -> None:
    array = node.inputs[slot].array
    assert array is not None
    for other in range(array.ndim):
        kept = wanted if other == axis else edit.kept(node.outputs[0], other)
        if kept is not None and len(kept) < array.shape[other]:
            array = np.take(array, kept, axis=other)
    if array is not node.inputs[slot].array:
        edit.set_constant(slot, array)


def gather_if_needed(edit: Edit, slot: int, operand: Operand, axis: int, wanted: np.ndarray) -> None:
    """Select ``wanted`` old positions of an input, unless they are exactly those that are kept of it, in order."""
    kept = edit.kept(operand, axis)
    if kept is None:
        size = edit.view.of(operand).shape[axis]
        if len(wanted) < size:
            edit.gather(slot, axis, wanted)
    elif len(kept) != len(wanted):
        edit.gather(slot, axis, np.searchsorted(kept, wanted))


CONCAT = Rule(_concat_facts, _concat_live, _concat_ties, _concat_drop, "movement", constant_first=True)


# --- Slice and Pad: one input; the output's position i along an axis comes from source[i], or is the padding (-1) ----


Sources = dict[int, np.ndarray]
"""Axis of the value -> the input position of each output position, -1 for padding."""


def _slice_ranges(node: Node) -> dict[int, tuple[int, int, int]] | None:
    """Return (start, end, step) by axis, axes not negative; None where they are computed."""
    rank = node.inputs[0].rank
    if rank is None:
        return None
    if node.opset < 10:
        starts, ends = node.attribute("starts"), node.attribute("ends")
        axes, steps = node.attribute("axes"), None
    else:
        if any(slot < len(node.inputs) and node.inputs[slot].is_value for slot in (1, 2, 3, 4)):
            return None
        starts, ends, axes, steps = (
            None if node.constant(slot) is None else np.asarray(node.constant(slot)).ravel().tolist()
            for slot in (1, 2, 3, 4)
        )
    if starts is None or ends is None:
        return None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return {int(a) % rank: (int(s), int(e), int(p)) for a, s, e, p in zip(axes, starts, ends, steps, strict=True)}


def _slice_source(bounds: tuple[int, int, int], size: int) -> np.ndarray:
    start, end, step = bounds
    if step < 0 and end < -size:
        return np.arange(size)[start::step]
    return np.arange(size)[start:end:step]


def _slice_plan(node: Node, view: View) -> tuple[Sources, object, float] | None:
    ranges = _slice_ranges(node)
    if ranges is None:
        return None
    layout = view.of(node.inputs[0]).shape
    sources = {axis: _slice_source(bounds, layout[axis]) for axis, bounds in ranges.items() if layout[axis] > 1}
    if any(len(source) == 0 for source in sources.values()):
        return None
    rest = tuple(sorted((axis, bounds) for axis, bounds in ranges.items() if axis not in sources))
    return sources, rest, np.nan


def _pad_plan(node: Node, view: View) -> tuple[Sources, object, float] | None:
    rank = node.inputs[0].rank
    if rank is None or any(slot < len(node.inputs) and node.inputs[slot].is_value for slot in (1, 2, 3)):
        return None
    mode = node.attribute("mode", b"constant")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    given = node.attribute("pads", node.attribute("paddings")) if node.opset < 11 else node.constant(1)
    if given is None:
        return None
    pads = [int(pad) for pad in np.asarray(given).ravel()]
    axes = _pad_axes(node, rank)
    amounts = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    layout = view.of(node.inputs[0]).shape
    on_channels = {axis: pair for axis, pair in amounts.items() if layout[axis] > 1 and pair != (0, 0)}
    rest = tuple(sorted((axis, pair) for axis, pair in amounts.items() if axis not in on_channels and pair != (0, 0)))
    if any(min(pair) < 0 for pair in on_channels.values()) or (on_channels and mode != "constant"):
        return None
    sources = {
        axis: np.concatenate([np.full(before, -1), np.arange(layout[axis]), np.full(after, -1)])
        for axis, (before, after) in on_channels.items()
    }
    value = node.attribute("value", 0.0) if node.opset < 11 else node.constant(2)
    fill = 0.0 if value is None else float(np.ravel(value)[0])
    return sources, (mode, rest), fill


def _pad_axes(node: Node, rank: int) -> list[int]:
    given = node.constant(3)
    return list(range(rank)) if given is None else [int(axis) % rank for axis in given.ravel()]


Plan = Callable[[Node, View], tuple[Sources, object, float] | None]


def _collapsed_effect(node: Node, fact: Fact, rest: object, fill: float, view: View) -> Fact:
    """Return the fact after the part of a Slice or Pad that works on collapsed axes."""
    signature = (node.op_type, rest, layout_key(node.inputs[0].shape or (), fact))
    if node.op_type == "Slice":
        return linear_window(fact, signature, border=False, view=view) if rest else fact
    assert isinstance(rest, tuple)
    mode, amounts = rest
    if not amounts:
        return fact
    if mode != "constant":
        return linear_window(fact, signature, border=False, view=view)
    if fill == 0:
        return linear_window(fact, signature, border=True, view=view)
    kept = fact.constant & (fact.shift == fill)
    number = view.numbers.of_facts((signature, fill), fact)
    return make(number, np.where(kept, 0.0, 1.0), np.where(kept, fact.shift, 0.0))


def _moved(array: np.ndarray, sources: Sources, fill: float) -> np.ndarray:
    """Apply the sources to an array of the input's layout."""
    for axis, source in sources.items():
        column = [1] * array.ndim
        column[axis] = len(source)
        taken = np.take(array, np.maximum(source, 0), axis=axis)
        array = np.where((source < 0).reshape(column), np.asarray(fill).astype(array.dtype), taken)
    return array


def sourced_rule(plan: Plan, drop: Callable[[Node, Edit], None]) -> Rule:
    """Return the rule of an operator that takes positions from one input or from padding."""

    def facts(node: Node, view: View) -> list[Fact] | None:
        planned = plan(node, view)
        if planned is None:
            return None
        sources, rest, fill = planned
        fact = _collapsed_effect(node, view.of(node.inputs[0]), rest, fill, view)
        return [
            Fact(_moved(fact.number, sources, ONE), _moved(fact.scale, sources, 0.0), _moved(fact.shift, sources, fill))
        ]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        planned = plan(node, view)
        assert planned is not None
        assert outs[0] is not None
        mask = outs[0]
        layout = list(view.of(node.inputs[0]).shape)
        for axis, source in planned[0].items():
            inside = np.flatnonzero(source >= 0)
            shape = list(mask.shape)
            shape[axis] = layout[axis]
            wider = np.zeros(shape, dtype=bool)
            front = np.moveaxis(wider, axis, 0)  # a view
            np.logical_or.at(front, source[inside], np.moveaxis(mask, axis, 0)[inside])
            mask = wider
        return {0: Demand(mask)}

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        planned = plan(node, view)
        assert planned is not None
        output, operand = node.outputs[0], node.inputs[0]
        for axis in range(len(view.of(output).shape)):
            source = planned[0].get(axis)
            if source is None:
                yield from tie_axes(positions, (output.name, axis), (operand.name, axis))
                continue
            out, into = positions.ids(output.name, axis), positions.ids(operand.name, axis)
            inside = source >= 0
            if out is None:  # a single position is left
                yield freeze(None if into is None else into[source[inside]])
            elif into is not None:
                yield Implies(out[inside], into[source[inside]])
                yield Count((out[inside][None],), always=True)  # padding alone has nothing to be put around

    return Rule(facts, live, ties, drop, "movement")


def _selected(node: Node, edit: Edit, source: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sources of the kept output positions, and the distinct input positions among them in order."""
    kept = edit.kept(node.outputs[0], axis)
    sources = source if kept is None else source[kept]
    return sources, sources[sources >= 0]


def _drop_slice(node: Node, edit: Edit) -> None:
    planned, ranges = _slice_plan(node, edit.view), _slice_ranges(node)
    assert planned is not None
    assert ranges is not None
    for axis, source in planned[0].items():
        operand = node.inputs[0]
        if edit.kept(node.outputs[0], axis) is None and edit.kept(operand, axis) is None:
            continue
        _, wanted = _selected(node, edit, source, axis)
        kept = edit.kept(operand, axis)
        places = wanted if kept is None else np.searchsorted(kept, wanted)
        steps = np.unique(np.diff(places))
        if len(steps) > 1 or (len(steps) == 1 and steps[0] < 1):  # no regular form
            edit.gather(0, axis, places)
            places, steps = np.arange(len(places)), np.ones(1, dtype=np.int64)
        ranges[axis] = (int(places[0]), int(places[-1]) + 1, int(steps[0]) if len(steps) else 1)
    if ranges != _slice_ranges(node):
        _write_slice(node, edit, ranges)


def _write_slice(node: Node, edit: Edit, ranges: dict[int, tuple[int, int, int]]) -> None:
    axes = list(ranges)
    columns = [[ranges[axis][part] for axis in axes] for part in range(3)]
    if node.opset < 10:
        for name, values in (("starts", columns[0]), ("ends", columns[1]), ("axes", axes)):
            edit.set_attribute(name, values)
        return
    for slot, values in ((1, columns[0]), (2, columns[1]), (3, axes), (4, columns[2])):
        edit.set_constant(slot, np.array(values, dtype=np.int64))


def _drop_pad(node: Node, edit: Edit) -> None:
    planned = _pad_plan(node, edit.view)
    assert planned is not None
    operand = node.inputs[0]
    rank = len(edit.view.of(operand).shape)
    given = node.attribute("pads", node.attribute("paddings")) if node.opset < 11 else node.constant(1)
    amounts = np.array(given).ravel().copy()
    count = len(amounts) // 2
    axes = _pad_axes(node, rank)
    changed = False
    for axis, source in planned[0].items():
        if edit.kept(node.outputs[0], axis) is None and edit.kept(operand, axis) is None:
            continue
        sources, wanted = _selected(node, edit, source, axis)
        gather_if_needed(edit, 0, operand, axis, wanted)
        place = axes.index(axis)
        inside = np.flatnonzero(sources >= 0)
        amounts[place], amounts[count + place] = inside[0], len(sources) - 1 - inside[-1]
        changed = True
    if changed and node.opset < 11:
        edit.set_attribute("pads", amounts.tolist())
    elif changed:
        edit.set_constant(1, amounts.astype(np.int64))


SLICE = sourced_rule(_slice_plan, _drop_slice)
PAD = sourced_rule(_pad_plan, _drop_pad)


# --- Transpose, Squeeze, Unsqueeze: the output's axis is an axis of the input, or new ---------------------------------


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

    def facts(node: Node, view: View) -> list[Fact] | None:
        fact = view.of(node.inputs[0])
        axes = read(node, len(fact.shape))
        if axes is None or any(fact.shape[axis] > 1 for axis in range(len(fact.shape)) if axis not in axes):
            return None
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

    return Rule(facts, live, ties, drop, "movement")


def _renamed(array: np.ndarray, axes: list[int | None]) -> np.ndarray:
    kept = [axis for axis in axes if axis is not None]
    gone = [axis for axis in range(array.ndim) if axis not in kept]
    moved = array.transpose([*kept, *gone]).reshape([array.shape[axis] for axis in kept])
    return moved[tuple(None if axis is None else slice(None) for axis in axes)]


TRANSPOSE = renaming_rule(_transpose_axes)
SQUEEZE = renaming_rule(_squeeze_axes, _drop_squeeze)
UNSQUEEZE = renaming_rule(_unsqueeze_axes)
