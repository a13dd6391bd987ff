"""Operators that select along an axis: Slice and Gather; and Pad, which puts something around."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Implies, Positions
from prune2deploy.graph.fact import Fact, layout_key, make
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.pool import linear_window
from prune2deploy.graph.rules.sources import (
    MOVED,
    Plan,
    Sources,
    computed,
    everything,
    exact,
    gather_if_needed,
    plan_of,
    renumbered,
    sourced_rule,
    spread_back,
    whole_key,
)

# --- Slice ------------------------------------------------------------------------------------------------------------

Bounds = tuple[int, int, int]
"""Start, end and step."""


def _slice_ranges(node: Node) -> dict[int, Bounds] | None:
    """Return the bounds by axis, axes not negative; None where they are computed."""
    rank = node.inputs[0].rank or 0
    if node.opset < 10:
        starts, ends = node.attribute("starts"), node.attribute("ends")
        axes, steps = node.attribute("axes"), None
    else:
        if computed(node, (1, 2, 3, 4)):
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


def _slice_source(bounds: Bounds, size: int) -> np.ndarray:
    start, end, step = bounds
    if step < 0 and end < -size:
        return np.arange(size)[start::step]
    return np.arange(size)[start:end:step]


def _slice_plan(node: Node, view: View) -> Plan | str:
    ranges = _slice_ranges(node)
    if ranges is None:
        return _computed_slice(node, view)
    layout = view.of(node.inputs[0]).shape
    sources = {axis: _slice_source(bounds, layout[axis]) for axis, bounds in ranges.items() if layout[axis] > 1}
    if any(len(source) == 0 for source in sources.values()):
        return "nothing is left of an axis with channels"
    rest = tuple(sorted((axis, bounds) for axis, bounds in ranges.items() if axis not in sources))
    return Plan(sources, lambda fact: _selected(node, rest, fact, view) if rest else fact)


def _computed_slice(node: Node, view: View) -> Plan | str:
    """Return the plan of a Slice whose bounds are computed; its axes must be known to be collapsed."""
    rank = node.inputs[0].rank or 0
    listed, count = node.constant(3), (node.inputs[1].shape or (None,))[0]
    if node.input(3) is not None and listed is None:
        return "its axes are computed"
    if listed is None and not isinstance(count, int):
        return "its axes are not known"
    axes = [int(axis) % rank for axis in (range(count if isinstance(count, int) else 0) if listed is None else listed)]
    if any(view.of(node.inputs[0]).shape[axis] > 1 for axis in axes):
        return "its bounds on an axis with channels are computed"
    rest = (tuple(axes), *(whole_key(operand, view) for operand in node.inputs[1:] if operand.name))
    aside = tuple(computed(node, (1, 2, 4)))
    return Plan({}, lambda fact: _selected(node, rest, fact, view), aside=aside)


def _selected(node: Node, rest: Hashable, fact: Fact, view: View) -> Fact:
    """Return the fact after a selection along collapsed axes."""
    signature = (node.op_type, rest, layout_key(node.inputs[0].shape or (), fact))
    return linear_window(fact, signature, border=False, view=view)


def _kept_sources(node: Node, edit: Edit, source: np.ndarray, axis: int) -> np.ndarray:
    kept = edit.kept(node.outputs[0], axis)
    return source if kept is None else source[kept]


def _drop_slice(node: Node, edit: Edit) -> None:
    ranges = _slice_ranges(node)
    if ranges is None:
        return
    operand = node.inputs[0]
    for axis, source in plan_of(_slice_plan, node, edit.view).sources.items():
        kept = edit.kept(operand, axis)
        if edit.kept(node.outputs[0], axis) is None and kept is None:
            continue
        places = renumbered(kept, _kept_sources(node, edit, source, axis))
        steps = np.unique(np.diff(places))
        allowed = range(1, len(source) + len(places)) if node.opset >= 10 else range(1, 2)
        if len(steps) > 1 or (len(steps) == 1 and steps[0] not in allowed):  # no regular form
            edit.gather(0, axis, places)
            places, steps = np.arange(len(places)), np.ones(1, dtype=np.int64)
        ranges[axis] = (int(places[0]), int(places[-1]) + 1, int(steps[0]) if len(steps) else 1)
    if ranges != _slice_ranges(node):
        _write_slice(node, edit, ranges)


def _write_slice(node: Node, edit: Edit, ranges: dict[int, Bounds]) -> None:
    axes = list(ranges)
    columns = [[ranges[axis][part] for axis in axes] for part in range(3)]
    if node.opset < 10:
        for name, values in (("starts", columns[0]), ("ends", columns[1]), ("axes", axes)):
            edit.set_attribute(name, values)
        return
    for slot, values in ((1, columns[0]), (2, columns[1]), (3, axes), (4, columns[2])):
        edit.set_constant(slot, np.array(values, dtype=np.int64))


SLICE = sourced_rule(_slice_plan, _drop_slice)


# --- Pad --------------------------------------------------------------------------------------------------------------


def _pad_plan(node: Node, view: View) -> Plan | str:
    if computed(node, (1, 2, 3)):
        return "its amounts are computed"
    given = _pad_amounts(node)
    if given is None:
        return "its amounts are not given"
    axes = _pad_axes(node, node.inputs[0].rank or 0)
    pairs = zip(axes, given[: len(axes)].tolist(), given[len(axes) :].tolist(), strict=True)
    amounts = {axis: (before, after) for axis, before, after in pairs if (before, after) != (0, 0)}
    mode = node.attribute("mode", "constant")
    layout = view.of(node.inputs[0]).shape
    on_channels = {axis: pair for axis, pair in amounts.items() if layout[axis] > 1}
    if any(min(pair) < 0 for pair in on_channels.values()):
        return "it takes channels away"
    if on_channels and mode != "constant":
        return f"it pads channels in mode {mode}"
    value = np.asarray(node.attribute("value", 0.0) if node.opset < 11 else node.constant(2))
    if value.dtype != object and not exact(value):
        return "its padding is not finite or too large"
    fill = 0.0 if value.dtype == object or not value.size else float(value.ravel()[0])
    sources: Sources = {
        axis: np.concatenate([np.full(before, -1), np.arange(layout[axis]), np.full(after, -1)])
        for axis, (before, after) in on_channels.items()
    }
    rest = tuple(sorted((axis, pair) for axis, pair in amounts.items() if axis not in on_channels))
    return Plan(sources, lambda fact: _padded(node, (mode, rest), fill, fact, view) if rest else fact, fill)


def _pad_amounts(node: Node) -> np.ndarray | None:
    given = node.attribute("pads", node.attribute("paddings")) if node.opset < 11 else node.constant(1)
    return None if given is None else np.asarray(given).ravel().astype(np.int64)


def _pad_axes(node: Node, rank: int) -> list[int]:
    given = node.constant(3)
    return list(range(rank)) if given is None else [int(axis) % rank for axis in given.ravel()]


def _padded(node: Node, how: tuple[str, Hashable], fill: float, fact: Fact, view: View) -> Fact:
    """Return the fact after padding on collapsed axes."""
    signature = (node.op_type, how, layout_key(node.inputs[0].shape or (), fact))
    if how[0] != "constant":
        return linear_window(fact, signature, border=False, view=view)
    if fill == 0:
        return linear_window(fact, signature, border=True, view=view)
    kept = fact.constant & (fact.shift == fill)
    number = view.numbers.of_facts((signature, fill), fact)
    return make(number, np.where(kept, 0.0, 1.0), np.where(kept, fact.shift, 0.0))


def _drop_pad(node: Node, edit: Edit) -> None:
    given = _pad_amounts(node)
    assert given is not None
    operand = node.inputs[0]
    amounts = given.copy()
    axes = _pad_axes(node, operand.rank or 0)
    for axis, source in plan_of(_pad_plan, node, edit.view).sources.items():
        if edit.kept(node.outputs[0], axis) is None and edit.kept(operand, axis) is None:
            continue
        sources = _kept_sources(node, edit, source, axis)
        gather_if_needed(edit, 0, operand, axis, sources[sources >= 0])
        place = axes.index(axis)
        inside = np.flatnonzero(sources >= 0)
        amounts[place], amounts[len(axes) + place] = inside[0], len(sources) - 1 - inside[-1]
    if (amounts == given).all():
        return
    if node.opset < 11:
        edit.set_attribute("pads", amounts.tolist())
    else:
        edit.set_constant(1, amounts)


PAD = sourced_rule(_pad_plan, _drop_pad)


# --- Gather: constant indices take positions; computed ones move a collapsed axis -------------------------------------


SHUFFLE = "prune2deploy_shuffle"
"""The attribute of a Gather that stands for a channel shuffle (see `graph.shuffle`); it is in no file."""


def _gather_axis(node: Node) -> int:
    return int(node.attribute("axis", 0)) % (node.inputs[0].rank or 1)


def _indices(node: Node, view: View) -> np.ndarray | None:
    """Return the constant indices, not negative, where the axis has positions; else None."""
    given, size = node.constant(1), view.of(node.inputs[0]).shape[_gather_axis(node)]
    return None if given is None or size == 1 else np.where(given < 0, given + size, given).astype(np.int64)


def _gather_facts(node: Node, view: View) -> list[Fact] | str:
    axis, fact, operand = _gather_axis(node), view.of(node.inputs[0]), node.inputs[1]
    if operand.rank is None:
        return "the rank of its indices is not known"
    indices = _indices(node, view)
    if indices is not None:
        if indices.size == 0 or indices.min() < 0 or indices.max() >= fact.shape[axis]:
            return "its indices are empty or out of range"
        return [fact.map(lambda array: np.take(array, indices, axis=axis))]
    if fact.shape[axis] > 1:
        return "its indices are computed"
    signature = (axis, whole_key(operand, view))
    fact = _selected(node, signature, fact, view)
    layout = (*fact.shape[:axis], *(1,) * operand.rank, *fact.shape[axis + 1 :])
    return [fact.map(lambda array: array.reshape(layout))]


def _gather_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    axis, layout, indices = _gather_axis(node), view.of(node.inputs[0]).shape, _indices(node, view)
    assert outs[0] is not None
    if indices is None:
        aside = {slot: everything(node.inputs[slot], view) for slot in computed(node, (1,))}
        return {0: Demand(outs[0].reshape(layout)), **aside}
    mask = outs[0].reshape(*layout[:axis], indices.size, *layout[axis + 1 :])
    return {0: Demand(spread_back(mask, axis, indices.ravel(), layout[axis]))}


def _gather_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    axis, indices = _gather_axis(node), _indices(node, view)
    operand, output = node.inputs[0], node.outputs[0]
    more = (node.inputs[1].rank or 0) - 1
    for other in range(operand.rank or 0):
        if other != axis:
            place = other if other < axis else other + more
            yield from tie_axes(positions, (output.name, place), (operand.name, other))
    into = positions.ids(operand.name, axis)
    if indices is None or into is None:
        return
    cells = []
    for place in range(indices.ndim):
        out = positions.ids(output.name, axis + place)
        if out is not None:
            cells.append(
                np.broadcast_to(np.expand_dims(out, tuple(range(1, indices.ndim - place))), indices.shape).ravel()
            )
    source = into[indices.ravel()]
    yield Implies(cells[0], source, tuple(cells[1:])) if cells else freeze(source)


def _drop_gather(node: Node, edit: Edit) -> None:
    axis, given, indices = _gather_axis(node), node.constant(1), _indices(node, edit.view)
    others = (other for other in range(node.inputs[0].rank or 0) if other != axis)
    if any(edit.kept(node.inputs[0], other) is not None for other in others):
        edit.set_attribute(SHUFFLE, None)  # of sizes that its shapes do not hold
    if indices is None or given is None:
        return
    present = edit.kept(node.inputs[0], axis)
    kept = [edit.kept(node.outputs[0], axis + place) for place in range(indices.ndim)]
    if present is None and all(some is None for some in kept):
        return
    for place, some in enumerate(kept):
        indices = indices if some is None else np.take(indices, some, axis=place)
    places = renumbered(present, indices)
    size = edit.view.of(node.inputs[0]).shape[axis] if present is None else len(present)
    if places.size != size:
        edit.set_attribute(SHUFFLE, None)  # no permutation any more
    if places.ndim == 1 and len(places) == size and (places == np.arange(size)).all():
        edit.bypass(0)
    else:
        edit.set_constant(1, places.astype(given.dtype))


GATHER = Rule(_gather_facts, _gather_live, _gather_ties, _drop_gather, "movement", types=MOVED)
