"""Operators that repeat: Expand and Tile. A channel that is repeated becomes that many equal channels.

Also those that repeat a constant as often as sizes say: ConstantOfShape, and an Expand or a Tile of a constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, Shape, constant, layout_key
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.channelwise import nothing_to_drop
from prune2deploy.graph.rules.pool import linear_window
from prune2deploy.graph.rules.sources import (
    MOVED,
    Plan,
    computed,
    everything,
    exact,
    plan_of,
    renumbered,
    sourced_rule,
    whole_key,
)

CHANNELS = 1
"""The axis along which a value of one channel becomes several positions: on any other axis it is stretched as a map."""

# --- Tile -------------------------------------------------------------------------------------------------------------


def _tile_plan(node: Node, view: View) -> Plan | str:
    repeats, fact = node.constant(1), view.of(node.inputs[0])
    before = node.inputs[0].shape or ()
    if repeats is None:
        return "its repeats are computed"
    times = {axis: int(count) for axis, count in enumerate(repeats.ravel()) if count != 1}
    if min(times.values(), default=1) < 1:
        return "its result is empty"
    sources = {axis: np.tile(np.arange(fact.shape[axis]), n) for axis, n in times.items() if fact.shape[axis] > 1}
    if CHANNELS in times and before[CHANNELS] == 1 and max(fact.shape, default=1) == 1:
        sources[CHANNELS] = np.zeros(times[CHANNELS], dtype=np.int64)
    rest = tuple((axis, count) for axis, count in times.items() if axis not in sources)
    signature = ("Tile", rest, layout_key(before, fact))
    return Plan(sources, lambda fact: linear_window(fact, signature, border=False, view=view) if rest else fact)


def _drop_tile(node: Node, edit: Edit) -> None:
    repeats = node.constant(1)
    assert repeats is not None
    operand, new = node.inputs[0], repeats.copy()
    for axis, source in plan_of(_tile_plan, node, edit.view).sources.items():
        present, kept = edit.kept(operand, axis), edit.kept(node.outputs[0], axis)
        if present is None and kept is None:
            continue
        places = renumbered(present, source if kept is None else source[kept])
        size = edit.view.of(operand).shape[axis] if present is None else len(present)
        times, over = divmod(len(places), size)
        if over or (places != np.tile(np.arange(size), times)).any():  # no whole copies
            edit.gather(0, axis, places)
            times = 1
        new.ravel()[axis] = times
    if (new != repeats).any():
        edit.set_constant(1, new)


TILE = sourced_rule(_tile_plan, _drop_tile)


# --- Expand -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Stretch:
    """What an Expand does: its input with the output's rank, which axis gets equal positions, what it does to maps."""

    fact: Fact
    aliased: int | None
    grown: bool


def _stretch(node: Node, view: View) -> _Stretch | str:
    after, inner = node.outputs[0].shape, node.inputs[0].shape
    if after is None or inner is None:
        return "the rank of its result is not known"
    start = len(after) - len(inner)
    if start < 0:
        return "its shapes contradict each other"
    before: Shape = (*(1,) * start, *inner)
    fact = view.of(node.inputs[0]).map(lambda array: array.reshape((1,) * start + array.shape))
    if any(size > 1 and after[axis] != size for axis, size in enumerate(fact.shape)):
        return "the size of an axis with channels is not known"
    changed = {axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old is None or old != new}
    aliased = None
    if CHANNELS in changed and before[CHANNELS] == 1 and max(fact.shape, default=1) == 1:
        size = after[CHANNELS]
        aliased = CHANNELS if isinstance(size, int) and size > 1 and node.constant(1) is not None else None
    return _Stretch(fact, aliased, bool(changed - {aliased}))


def _expand_facts(node: Node, view: View) -> list[Fact] | str:
    stretch = view.once(node, "stretch", lambda: _stretch(node, view))
    if isinstance(stretch, str):
        return stretch
    fact, after = stretch.fact, node.outputs[0].shape or ()
    if stretch.grown:
        signature = ("Expand", node.inputs[0].shape, after, whole_key(node.inputs[1], view), fact.shape)
        fact = linear_window(fact, signature, border=False, view=view)
    if stretch.aliased is None:
        return [fact]
    size = after[stretch.aliased]
    return [fact.map(lambda array: np.repeat(array, size, axis=stretch.aliased))]  # type: ignore[arg-type]


def _known(node: Node, view: View) -> _Stretch:
    stretch = view.once(node, "stretch", lambda: _stretch(node, view))
    assert isinstance(stretch, _Stretch)
    return stretch


def _expand_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    stretch, mask = _known(node, view), outs[0]
    assert mask is not None
    if stretch.aliased is not None:
        mask = np.asarray(mask.any(axis=stretch.aliased, keepdims=True))
    aside = {slot: everything(node.inputs[slot], view) for slot in computed(node, (1,))}
    return {0: Demand(mask.reshape(view.of(node.inputs[0]).shape)), **aside}


def _expand_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    stretch, operand, output = _known(node, view), node.inputs[0], node.outputs[0]
    start = len(stretch.fact.shape) - (operand.rank or 0)
    for axis in range(start, len(stretch.fact.shape)):
        if axis == stretch.aliased:
            continue
        yield from tie_axes(positions, (output.name, axis), (operand.name, axis - start))
        if node.constant(1) is None:  # it may hold the size
            yield freeze(positions.ids(output.name, axis))


def _drop_expand(node: Node, edit: Edit) -> None:
    shape, output = node.constant(1), node.outputs[0]
    if shape is None:
        return
    new, start = shape.copy(), (output.rank or 0) - shape.size
    for place, size in enumerate(shape.ravel().tolist()):
        kept = edit.kept(output, start + place)
        if kept is not None and size > 1:
            new.ravel()[place] = len(kept)
    stretch = _known(node, edit.view)
    kept = None if stretch.aliased is None else edit.kept(output, stretch.aliased)
    if kept is not None and len(kept) == 1 and not stretch.grown and node.inputs[0].rank == output.rank:
        edit.bypass(0)  # the channel itself
    elif (new != shape).any():
        edit.set_constant(1, new)


EXPAND = Rule(_expand_facts, _expand_live, _expand_ties, _drop_expand, "movement", types=MOVED)


# --- constants of a size that is computed -----------------------------------------------------------------------------


def _stated(node: Node) -> np.ndarray:
    if node.op_type == "ConstantOfShape":
        value = node.attribute("value")
        return np.zeros(()) if value is None else np.asarray(value.values).reshape(())
    return np.asarray(node.inputs[0].array)


def _stated_facts(node: Node, view: View) -> list[Fact] | str:
    after, values = node.outputs[0].shape, _stated(node)
    if after is None:
        return "the rank of its result is not known"
    if not exact(values):
        return "its value is not finite or too large"
    if values.ndim > len(after):
        return "its shapes contradict each other"
    values = values.reshape((1,) * (len(after) - values.ndim) + values.shape)
    for axis, (size, wanted) in enumerate(zip(values.shape, after, strict=True)):
        if size == 1 or wanted == size:
            continue
        first = np.take(values, [0], axis=axis)
        if (values == first).all():
            values = first
        elif isinstance(wanted, int) and wanted % size == 0:
            values = np.concatenate([values] * (wanted // size), axis)
        else:
            return "the size of an axis with channels is not known"
    return [constant(values)]


def _stated_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    return {slot: everything(node.inputs[slot], view) for slot in node.value_slots}


def _stated_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    for axis in range(len(view.of(node.outputs[0]).shape)):
        yield freeze(positions.ids(node.outputs[0].name, axis))  # the computed sizes may hold its size


STATED = Rule(_stated_facts, _stated_live, _stated_ties, nothing_to_drop, "constant", types=MOVED, constant_first=True)
"""The rule of ConstantOfShape, and of an Expand or a Tile of a constant."""
