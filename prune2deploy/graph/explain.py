"""Explain: why each removed channel of a layer could go, and what keeps each dead one that stayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prune2deploy.graph.constraints import FROZEN, Constraint, Count, Equal, Hull, Implies, close
from prune2deploy.graph.keep import Analysis, live_ids, owned_constraints
from prune2deploy.graph.layers import layer_name
from prune2deploy.graph.liveness import GRAPH_OUTPUT, NOBODY
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Axis

Sources = Mapping[str, Mapping[str, str]]
"""Node name -> ``module`` and ``source``, as in ``source_map.json``."""


@dataclass
class Reason:
    """One reason that several channels share.

    Attributes:
        channels: indices along the layer's output channels.
        why: one sentence.
        details: the same for machines: ``kind`` and what belongs to it.
    """

    channels: list[int]
    why: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the reason as a JSON object."""
        return {"channels": self.channels, "why": self.why, **self.details}


@dataclass
class LayerReasons:
    """A layer's removed channels and its dead but kept ones, each with its reason; ``gone``: the whole layer went.

    ``axis`` is that of the channels in the layer's output.
    """

    layer: str
    op_type: str
    axis: int
    before: int
    after: int
    gone: bool
    removed: list[Reason]
    kept: list[Reason]

    def to_json(self) -> dict[str, Any]:
        """Return the layer's reasons as a JSON object."""
        own: dict[str, Any] = {
            "layer": self.layer,
            "op_type": self.op_type,
            "axis": self.axis,
            "before": self.before,
            "after": self.after,
        }
        reasons = {name: [one.to_json() for one in getattr(self, name)] for name in ("removed", "kept")}
        return own | {"gone": self.gone} | reasons


def explain(analysis: Analysis, sources: Sources | None = None) -> list[LayerReasons]:
    """Return the reasons of every convolution, linear layer and norm that lost channels or kept dead ones.

    Args:
        analysis: of the graph before removal.
        sources: modules and source lines by node, where the graph was exported from a torch network.
    """
    why_kept = _Keepers(analysis, sources or {})
    found = []
    for node in analysis.tables.nodes:
        rule = analysis.known.rules[node.index]
        if rule is None or rule.kind not in ("linear", "norm"):
            continue
        work = rule.work(node, analysis.known.view)
        output = Axis(node.outputs[0].name, work.out.axis if work is not None else 1)
        if output.axis < len(analysis.known.view.facts[output.value].shape):
            reasons = _layer(node, output, analysis, why_kept)
            if reasons.removed or reasons.kept or reasons.gone:
                found.append(reasons)
    return found


def _layer(node: Node, output: Axis, analysis: Analysis, why_kept: _Keepers) -> LayerReasons:
    fact = analysis.known.view.facts[output.value]
    size = fact.shape[output.axis]
    mask = analysis.keep.kept.get((output.value, output.axis))
    gone = node.index not in analysis.liveness.needed
    kept = np.zeros(size, dtype=bool) if gone else (np.ones(size, dtype=bool) if mask is None else mask)
    channels = _Channels(output, analysis)
    removed = _grouped(
        (k, *why_kept.with_ties(output, k, channels.why_removed(k, kept))) for k in np.flatnonzero(~kept).tolist()
    )
    dead = [k for k in np.flatnonzero(kept).tolist() if channels.is_dead(k)]
    stayed = _grouped((k, *why_kept.of(output, k)) for k in dead)
    return LayerReasons(layer_name(node), node.op_type, output.axis, size, int(kept.sum()), gone, removed, stayed)


def _grouped(found: Iterable[tuple[int, str, dict[str, Any]]]) -> list[Reason]:
    reasons: dict[str, Reason] = {}
    for channel, why, details in found:
        reasons.setdefault(why, Reason([], why, details)).channels.append(int(channel))
    return list(reasons.values())


class _Channels:
    """What is known of the channels of one axis of a value; several positions of a channel must agree."""

    def __init__(self, output: Axis, analysis: Analysis) -> None:
        fact = analysis.known.view.facts[output.value]
        number, scale, shift = (
            np.moveaxis(part, output.axis, 0).reshape(fact.shape[output.axis], -1)
            for part in (fact.number, fact.scale, fact.shift)
        )
        self._constant: np.ndarray = np.asarray((scale == 0).all(axis=1) & (shift == shift[:, :1]).all(axis=1))
        self._single = number.shape[1] == 1
        self._number, self._scale, self._shift = number[:, 0], scale[:, 0], shift[:, 0]
        live = analysis.liveness.live.get(output.value)
        axes = () if live is None else tuple(axis for axis in range(live.ndim) if axis != output.axis)
        self._live = np.zeros(len(number), dtype=bool) if live is None else np.asarray(live.any(axis=axes))

    def is_dead(self, k: int) -> bool:
        """Whether a kept channel is one that nothing needs for its own sake."""
        return bool(not self._live[k] or self._constant[k])

    def why_removed(self, k: int, kept: np.ndarray) -> tuple[str, dict[str, Any]]:
        """Return why a channel could go: a sentence, and the same for machines."""
        if self._constant[k]:
            value = float(self._shift[k])
            return f"constant {value:g}", {"kind": "constant", "value": value}
        equal = np.flatnonzero((self._number == self._number[k]) & kept & (self._scale != 0))
        if self._single and len(equal):
            j = int(equal[0])
            scale = float(self._scale[k] / self._scale[j])
            shift = float(self._shift[k] - scale * self._shift[j])
            details = {"kind": "alias", "of": j, "scale": scale, "shift": shift}
            factor = "" if scale == 1 else f"{scale:g} times "
            return f"equal to {factor}channel {j}" + (f" plus {shift:g}" if shift else ""), details
        return "never read", {"kind": "unread"}


class _Keepers:
    """Why dead channels stay: ties to live ones, the constraint that added them, or a reader that needs them."""

    def __init__(self, analysis: Analysis, sources: Sources) -> None:
        self._analysis, self._sources = analysis, sources
        positions, liveness = analysis.keep.positions, analysis.liveness
        owned = list(owned_constraints(analysis.tables, analysis.known, liveness, positions, analysis.round_to))
        self._owner = {id(constraint): owner for owner, constraint in owned}
        self._causes: dict[int, Constraint] = {}
        live = live_ids(positions, liveness)
        _, self._class_of = close(positions.count, [constraint for _, constraint in owned], live, self._causes)
        self._sizes = np.bincount(self._class_of)
        self._tie, self._origin = _nearest_live(positions.count, owned, live)
        self._blocks = list(positions.blocks())
        self._first = np.array([first for _, _, first, _ in self._blocks], dtype=np.int64)

    def of(self, output: Axis, k: int) -> tuple[str, dict[str, Any]]:
        """Return what keeps channel ``k``: a sentence, and the same for machines."""
        ids = self._analysis.keep.positions.ids(output.value, output.axis)
        if ids is None or (output.value, output.axis) not in self._analysis.keep.kept:
            return "its value is taken whole", {"kind": "whole"}
        reader = self._reader(output.value, output.axis, k)
        if reader != NOBODY:
            return self._read_by(reader)
        position = int(ids[k])
        if self._tie[position] >= 0:
            return self._tied(position)
        cause = self._causes.get(int(self._class_of[position]))
        if cause is None:
            return "its value is taken whole", {"kind": "whole"}
        return self._caused(cause)

    def with_ties(self, output: Axis, k: int, reason: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        """Return the reason with how many other positions went because all of their class could."""
        ids = self._analysis.keep.positions.ids(output.value, output.axis)
        others = 0 if ids is None else int(self._sizes[self._class_of[ids[k]]]) - 1
        return (f"{reason[0]}, like the {others} tied to it", reason[1] | {"tied": others}) if others else reason

    def _reader(self, value: str, axis: int, k: int) -> int:
        """Return a reader that needs a channel for its own sake, the node's index, or `NOBODY`."""
        own = np.take(self._analysis.liveness.reader[value], k, axis=axis)
        live = np.take(self._analysis.liveness.live[value], k, axis=axis)
        return int(own[live].ravel()[0]) if live.any() else NOBODY

    def _read_by(self, reader: int) -> tuple[str, dict[str, Any]]:
        if reader == GRAPH_OUTPUT:
            return "the graph gives it out", {"kind": "output"}
        node = self._analysis.tables.nodes[reader]
        opaque = self._analysis.known.opaque.get(reader)
        details = {"kind": "opaque" if opaque else "read", **self._place(reader)}
        if opaque:
            return f"read by {self._title(reader)}, which is opaque: {opaque}", details | {"reason": opaque}
        rule = self._analysis.known.rules[reader]
        kind = "" if rule is None else rule.kind
        if kind == "linear" and self._analysis.known.view.of(node.inputs[node.value_slots[0]]).constant.any():
            return f"{self._title(reader)} keeps one constant channel for its border or its width", details
        if kind == "elementwise":
            return f"{self._title(reader)} joins it with a channel that is needed", details
        return f"read by {self._title(reader)}", details

    def _tied(self, position: int) -> tuple[str, dict[str, Any]]:
        owner, origin = int(self._tie[position]), int(self._origin[position])
        details = {"kind": "tied", **self._place(owner)}
        if origin == FROZEN:
            return f"{self._title(owner)} takes the axis whole", details
        number = int(np.searchsorted(self._first, origin, side="right")) - 1
        value, axis, first, _ = self._blocks[number]
        reader = self._reader(value, axis, origin - first)
        details |= {"value": value, "channel": origin - first}
        text = f"{self._title(owner)} ties it to channel {origin - first} of '{value}'"
        if reader == NOBODY:
            return text, details
        return f"{text}, {self._read_by(reader)[0]}", details | {"read_by": self._place(reader)}

    def _caused(self, cause: Constraint) -> tuple[str, dict[str, Any]]:
        owner = self._owner[id(cause)]
        if owner < 0:
            return "an axis cannot shrink to nothing", {"kind": "last"}
        return f"{self._title(owner)} {_DEMANDS[type(cause)](cause)}", {"kind": "shape", **self._place(owner)}

    def _title(self, index: int) -> str:
        node = self._analysis.tables.nodes[index]
        place = self._sources.get(node.name, {})
        where = ", ".join(place[key] for key in ("module", "source") if place.get(key))
        return f"{node.op_type} '{node.name}'" + (f" ({where})" if where else "")

    def _place(self, index: int) -> dict[str, Any]:
        if index == GRAPH_OUTPUT:
            return {"operator": "output", "node": ""}
        node = self._analysis.tables.nodes[index]
        return {"operator": node.op_type, "node": node.name, **self._sources.get(node.name, {})}


_DEMANDS: dict[type, Callable[[Any], str]] = {
    Implies: lambda cause: "keeps what its kept channels come from",
    Hull: lambda cause: "splits or joins axes, so that only whole rows and columns can go",
    Count: lambda cause: (
        f"has its width rounded to a multiple of {cause.multiple}"
        if cause.multiple > 1
        else "needs equal counts by group"
    ),
}


def _nearest_live(count: int, owned: list[tuple[int, Constraint]], live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for every position tied to a live one the node that ties it, and that live position; else -1.

    Breadth first over the equalities, from all live positions at once.
    """
    equal = [(owner, constraint) for owner, constraint in owned if isinstance(constraint, Equal)]
    tie, origin = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    origin[live] = np.flatnonzero(live)
    if not equal:
        return tie, origin
    a = np.concatenate([constraint.a for _, constraint in equal])
    b = np.concatenate([constraint.b for _, constraint in equal])
    by = np.concatenate([np.full(len(constraint.a), owner) for owner, constraint in equal])
    start, end, by = np.concatenate([a, b]), np.concatenate([b, a]), np.concatenate([by, by])
    seen = live.copy()
    while True:
        edges = np.flatnonzero(seen[start] & ~seen[end])
        if not len(edges):
            return tie, origin
        new, first = np.unique(end[edges], return_index=True)
        chosen = edges[first]
        tie[new], origin[new] = by[chosen], origin[start[chosen]]
        seen[new] = True
