"""Resize and Upsample over collapsed axes; the entry of a channel axis in their sizes follows the kept channels."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.fact import Fact, layout_key, make
from prune2deploy.graph.node import FLOATS, Node, Operand
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View
from prune2deploy.graph.rules.channelwise import same_layout_ties
from prune2deploy.graph.rules.pool import linear_window
from prune2deploy.graph.rules.sources import MOVED, computed, everything, whole_key

ROUNDS_DOWN = ("floor", "round_prefer_floor")
"""Ways of rounding under which a half pixel more is the same pixel."""


@dataclass(frozen=True, eq=False)
class _Given:
    """The operands of a Resize by meaning, absent ones None, and the axes that they speak of."""

    roi: Operand | None
    scales: Operand | None
    sizes: Operand | None
    axes: list[int]


def _given(node: Node) -> _Given:
    def operand(slot: int) -> Operand | None:
        found = node.input(slot)
        return None if found is None or (found.array is not None and found.array.size == 0) else found

    rank = node.inputs[0].rank or 0
    axes = [int(axis) % rank for axis in node.attribute("axes", range(rank))]
    if node.op_type == "Upsample" or node.opset < 11:
        return _Given(None, operand(1), None, axes)
    return _Given(operand(1), operand(2), operand(3), axes)


def _mode(node: Node) -> str:
    return str(node.attribute("coordinate_transformation_mode", "half_pixel"))


def _touches_channels(node: Node, view: View, given: _Given) -> str | None:
    """Return why an axis with channels does not provably stay as it is, or None where it does."""
    layout, before, after = view.of(node.inputs[0]).shape, node.inputs[0].shape or (), node.outputs[0].shape or ()
    channels = [(place, axis) for place, axis in enumerate(given.axes) if layout[axis] > 1]
    if not channels:
        return None
    if _mode(node) == "tf_half_pixel_for_nn" and node.attribute("nearest_mode", ROUNDS_DOWN[1]) not in ROUNDS_DOWN:
        return "it moves channels by half a pixel"
    if given.scales is not None:
        if given.scales.array is None:
            return "its scales are computed"
        if any(given.scales.array.ravel()[place] != 1 for place, _ in channels):
            return "it resizes an axis with channels"
    elif given.sizes is not None:
        if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
            return "it keeps the aspect ratio of channels"
        sizes = None if given.sizes.array is None else given.sizes.array.ravel()
        new = {axis: after[axis] if sizes is None else int(sizes[place]) for place, axis in channels}
        if any(not isinstance(before[axis], int) or before[axis] != new[axis] for _, axis in channels):
            return "it resizes an axis with channels"
    if _mode(node) == "tf_crop_and_resize":
        crop = None if given.roi is None or given.roi.array is None else given.roi.array.ravel()
        if crop is None or any((crop[place], crop[len(given.axes) + place]) != (0, 1) for place, _ in channels):
            return "it crops an axis with channels, or its crop is computed"
    return None


def _facts(node: Node, view: View) -> list[Fact] | str:
    given = _given(node)
    if given.scales is None and given.sizes is None:
        return "it has neither scales nor sizes"
    if node.attribute("mode", "nearest") != "nearest" and node.outputs[0].dtype not in FLOATS:
        return "it interpolates integers"
    why = _touches_channels(node, view, given)
    if why is not None:
        return why
    fact = view.of(node.inputs[0])
    present = [operand for operand in (given.roi, given.scales, given.sizes) if operand is not None]
    signature: Hashable = (
        node.op_type,
        str(sorted(node.attributes.items())),
        tuple(whole_key(operand, view) for operand in present),
        layout_key(node.inputs[0].shape or (), fact),
    )
    if _mode(node) != "tf_crop_and_resize":  # the weights of every output add up to 1
        return [linear_window(fact, signature, border=False, view=view)]
    outside = float(node.attribute("extrapolation_value", 0.0))
    kept = fact.constant & (fact.shift == outside)
    number = view.numbers.of_facts(("crop", signature), fact)
    return [make(number, np.where(kept, 0.0, 1.0), np.where(kept, outside, 0.0))]


def _live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    assert outs[0] is not None
    return {0: Demand(outs[0]), **{slot: everything(node.inputs[slot], view) for slot in computed(node, (1, 2, 3))}}


def _drop(node: Node, edit: Edit) -> None:
    given = _given(node)
    kept = {place: edit.kept(node.outputs[0], axis) for place, axis in enumerate(given.axes)}
    if given.sizes is None or all(indices is None for indices in kept.values()):
        return
    before = node.inputs[0].shape or ()
    change = np.zeros(len(given.axes), dtype=np.int64)
    for place, indices in kept.items():
        size = before[given.axes[place]]
        if indices is not None and isinstance(size, int):
            change[place] = len(indices) - size
    if given.sizes.array is None:
        edit.before(3, "Add", {}, change)
    else:
        edit.set_constant(3, given.sizes.array + change)


RESIZE = Rule(_facts, _live, same_layout_ties, _drop, "movement", types=MOVED)
