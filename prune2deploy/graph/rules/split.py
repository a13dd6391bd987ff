"""Split: each output takes a span of the input's positions; the spans of outputs that nobody needs go."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Implies, Positions
from prune2deploy.graph.fact import Fact, layout_key
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.pool import linear_window
from prune2deploy.graph.rules.sources import MOVED, renumbered


def _axis(node: Node) -> int:
    return int(node.attribute("axis", 0)) % (node.inputs[0].rank or 1)


def _given(node: Node) -> np.ndarray | None:
    """Return the sizes that are written down."""
    return node.constant(1) if node.attribute("split") is None else np.asarray(node.attribute("split"))


def _sizes(node: Node) -> list[int] | None:
    """Return the size of every output along the axis, or None where the input's is not known."""
    given, total, count = _given(node), (node.inputs[0].shape or ())[_axis(node)], len(node.outputs)
    if given is not None:
        return [int(size) for size in given.ravel()]
    if not isinstance(total, int):
        return None
    part = -(-total // count)
    return [min(part, total - part * slot) for slot in range(count)]


def _spans(node: Node) -> list[slice]:
    ends = np.cumsum(_sizes(node) or []).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _facts(node: Node, view: View) -> list[Fact] | str:
    axis, sizes, fact = _axis(node), _sizes(node), view.of(node.inputs[0])
    if len(node.inputs) > 1 and node.inputs[1].is_value:
        return "its sizes are computed"
    if sizes is not None and (min(sizes) < 1 or len(sizes) != len(node.outputs)):
        return "one of its outputs is empty"
    if fact.shape[axis] > 1:
        if sizes is None or sum(sizes) != fact.shape[axis]:
            return "its sizes do not add up to its input"
        return [
            fact.map(lambda array, span=span: array[(slice(None),) * axis + (span,)])  # type: ignore[misc]
            for span in _spans(node)
        ]
    how = len(node.outputs) if sizes is None else tuple(sizes)
    return [
        linear_window(
            fact,
            ("Split", axis, slot, how, layout_key(node.inputs[0].shape or (), fact)),
            border=False,
            view=view,
        )
        for slot in range(len(node.outputs))
    ]


def _live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    axis, layout = _axis(node), view.of(node.inputs[0]).shape
    mask = np.zeros(layout, dtype=bool)
    spans = _spans(node) if layout[axis] > 1 else [slice(None)] * len(outs)
    for out, span in zip(outs, spans, strict=True):
        if out is not None:
            mask[(slice(None),) * axis + (span,)] |= out
    return {0: Demand(mask)}


def _ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    axis, operand = _axis(node), node.inputs[0]
    layout = view.of(operand).shape
    into = positions.ids(operand.name, axis)
    for slot, output in enumerate(node.outputs):
        if not positions.has(output.name):
            continue
        for other in range(len(layout)):
            if other != axis:
                yield from tie_axes(positions, (output.name, other), (operand.name, other))
        if into is not None:
            out, source = positions.ids(output.name, axis), into[_spans(node)[slot]]
            yield freeze(source) if out is None else Implies(out, source)


def _drop(node: Node, edit: Edit) -> None:
    axis, operand = _axis(node), node.inputs[0]
    if edit.view.of(operand).shape[axis] == 1:
        return
    sizes, present = _sizes(node), edit.kept(operand, axis)
    assert sizes is not None
    spans = _spans(node)
    there = np.arange(sum(sizes)) if present is None else present
    parts: list[np.ndarray] = []
    for output, span in zip(node.outputs, spans, strict=True):
        have = there[(there >= span.start) & (there < span.stop)]
        wanted = edit.kept(output, axis)
        parts.append(have if wanted is None else wanted + span.start)  # an output that nobody needs takes what there is
    needed = [edit.is_needed(output) for output in node.outputs]
    if sum(len(part) for part in parts) != len(there):
        parts = [part if here else part[:0] for part, here in zip(parts, needed, strict=True)]
        edit.gather(0, axis, renumbered(present, np.concatenate(parts)))
    stay = [slot for slot, part in enumerate(parts) if len(part)]
    edit.keep_outputs(stay)
    if len(stay) == 1:
        edit.bypass(0)
    else:
        _write_sizes(node, edit, [len(parts[slot]) for slot in stay], sizes)


def _write_sizes(node: Node, edit: Edit, sizes: list[int], before: list[int]) -> None:
    if sizes == before or (_given(node) is None and len(sizes) == len(before) and len(set(sizes)) == 1):
        return
    if node.opset < 13:
        edit.set_attribute("split", sizes)
        return
    edit.set_constant(1, np.array(sizes, dtype=np.int64))
    edit.set_attribute("num_outputs", None)


SPLIT = Rule(_facts, _live, _ties, _drop, "movement", types=MOVED)
