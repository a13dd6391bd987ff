"""Keep: from the live positions, by the closure of all constraints, to the positions that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.constraints import FROZEN, Constraint, Count, Ids, Positions, close
from prune2deploy.graph.facts import Known, channel_facts
from prune2deploy.graph.liveness import Liveness, live_channels
from prune2deploy.graph.node import Node, Tables


@dataclass(frozen=True, eq=False)
class Keep:
    """Which positions stay.

    Attributes:
        kept: (value, axis) -> bool along that axis, for every axis with positions of a value that is needed.
        class_of: the class of every position id.
        positions: the numbering of the ids.
    """

    kept: dict[tuple[str, int], np.ndarray]
    class_of: Ids
    positions: Positions

    def indices(self, value: str, axis: int) -> np.ndarray | None:
        """Return the kept old indices in order, or None where all are kept."""
        mask = self.kept.get((value, axis))
        return None if mask is None or mask.all() else np.flatnonzero(mask)

    @property
    def removed(self) -> int:
        """The number of positions that go, over all values that are needed."""
        return sum(int((~mask).sum()) for mask in self.kept.values())


@dataclass(frozen=True, eq=False)
class Analysis:
    """The first three steps of the channel analysis of one graph."""

    tables: Tables
    known: Known
    liveness: Liveness
    keep: Keep
    round_to: int = 1

    @property
    def changes(self) -> bool:
        """Whether anything is to be removed."""
        return bool(self.keep.removed or self.cuts() or len(self.liveness.needed) < len(self.tables.nodes))

    def cuts(self) -> list[tuple[int, int]]:
        """Return (node index, slot) of every computed operand that its reader no longer needs, in live nodes."""
        return [
            (index, slot)
            for index, needed in sorted(self.liveness.needed.items())
            for slot in self.tables.nodes[index].value_slots
            if slot not in needed
        ]

    def idle_classes(self) -> int:
        """Return how many kept classes have no live member: channels that stay for a constraint's sake alone."""
        live = live_ids(self.keep.positions, self.liveness)
        kept = np.zeros(self.keep.positions.count, dtype=bool)
        for value, axis, first, size in self.keep.positions.blocks():
            kept[first : first + size] = self.keep.kept[value, axis]
        class_of = self.keep.class_of
        return len(np.setdiff1d(class_of[kept], class_of[live]))


def analyse(tables: Tables, *, round_to: int = 1) -> Analysis:
    """Return the facts, the liveness and the kept positions of a graph; nothing is written."""
    return settle(tables, channel_facts(tables), round_to=round_to)


@dataclass(frozen=True, eq=False)
class Whole:
    """All nodes are to stay as they are, only narrower: what a network that is run by the same code needs.

    Attributes:
        live: (node index, slot) -> positions that count as live there.
        ties: further constraints of a node, besides its rule's.
    """

    live: Mapping[tuple[int, int], np.ndarray]
    ties: Callable[[Node, Positions], Iterable[Constraint]]


def settle(tables: Tables, known: Known, *, round_to: int = 1, whole: Whole | None = None) -> Analysis:
    """Return the liveness and the kept positions of a graph whose facts are known."""
    forced: set[tuple[int, ...]] = set()
    risky: dict[tuple[int, int], np.ndarray] = {}
    if whole is not None:
        forced = {(node.index, slot) for node in tables.nodes for slot in node.value_slots}
        risky = dict(whole.live)
    while True:  # what was left out and then kept for a count's sake comes back: rare, and monotone
        liveness = live_channels(tables, known, forced, risky, cut_constants=whole is None)
        keep, tripped = kept_channels(tables, known, liveness, round_to=round_to, whole=whole)
        found = _risky(tables, known, liveness, keep)
        if tripped <= forced and not found:
            return Analysis(tables, known, liveness, keep, round_to)
        forced |= tripped
        for key, mask in found.items():
            risky[key] = mask | risky.get(key, np.zeros_like(mask))


SINGULAR: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Acos", "Acosh", "Asin", "Atanh", "Log", "Reciprocal", "Sqrt", "Tan"), (0,)),
    "Div": (1,),
    "Mod": (1,),
    "Pow": (0, 1),
    "Exp": (0,),
    "Sinh": (0,),
    "Cosh": (0,),
    "DynamicQuantizeLinear": (0,),
    "MeanVarianceNormalization": (0,),
    "ReduceLogSum": (0,),
}
"""Inputs for which not every finite value gives a finite result, or one that leaves the other results alone."""


def _singular(node: Node) -> tuple[int, ...]:
    if node.domain:
        return ()
    return (0,) if node.attribute("epsilon") == 0 else SINGULAR.get(node.op_type, ())


def _risky(tables: Tables, known: Known, liveness: Liveness, keep: Keep) -> dict[tuple[int, int], np.ndarray]:
    """Return the positions that stay without being live where a value that is free could become infinite or NaN.

    A zero weight does not silence those: the reader's ``0 * inf`` would be NaN. They must be computed as they were; so
    must what enters a range that all results share.
    """
    found = {}
    for index in liveness.needed:
        node = tables.nodes[index]
        for slot in _singular(node):
            name = node.inputs[slot].name
            if not node.inputs[slot].is_value or name not in liveness.live:
                continue
            live = liveness.live[name]
            kept = np.ones(live.shape, dtype=bool)
            for axis, size in enumerate(live.shape):
                mask = keep.kept.get((name, axis))
                if mask is not None:
                    kept &= mask.reshape([size if place == axis else 1 for place in range(live.ndim)])
            if (kept & ~live).any():
                found[index, slot] = kept
    return found


def kept_channels(
    tables: Tables, known: Known, liveness: Liveness, *, round_to: int = 1, whole: Whole | None = None
) -> tuple[Keep, set[tuple[int, ...]]]:
    """Return the least set of positions that holds the live ones and satisfies every constraint, and what tripped."""
    positions = Positions()
    for value in _in_order(tables, liveness):
        positions.add(value, known.view.facts[value].shape)
    blocks = list(positions.blocks())
    constraints = [constraint for _, constraint in owned_constraints(tables, known, liveness, positions, round_to)]
    if whole is not None:
        constraints += [constraint for node in tables.nodes for constraint in whole.ties(node, positions)]
    closed, class_of = close(positions.count, constraints, live_ids(positions, liveness))
    table = {(value, axis): closed[first : first + size] for value, axis, first, size in blocks}
    return Keep(table, class_of, positions), positions.tripped(closed)


def owned_constraints(
    tables: Tables, known: Known, liveness: Liveness, positions: Positions, round_to: int
) -> Iterable[tuple[int, Constraint]]:
    """Yield every constraint with the index of the node that makes it; -1 where it is not a node's."""
    for _, _, first, size in positions.blocks():
        yield -1, Count((np.arange(first, first + size)[None],), always=True)  # no axis shrinks to 0
    for node in tables.nodes:
        if node.index in liveness.needed:
            for constraint in node_constraints(node, known, positions, liveness.needed[node.index]):
                yield node.index, constraint
            for constraint in _rounded(node, known, positions, round_to):
                yield node.index, constraint


def live_ids(positions: Positions, liveness: Liveness) -> np.ndarray:
    """Return which position ids are live, and the frozen one."""
    live = np.zeros(positions.count, dtype=bool)
    live[FROZEN] = True
    for value, axis, first, size in positions.blocks():
        mask = liveness.live[value]
        live[first : first + size] = mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis))
    return live


def node_constraints(node: Node, known: Known, positions: Positions, needed: frozenset[int]) -> Iterable[Constraint]:
    """Return the constraints of one node; an opaque node has none, since all it reads is live."""
    rule = known.rules[node.index]
    return [] if rule is None else rule.ties(node, positions, known.view, needed)


def _rounded(node: Node, known: Known, positions: Positions, round_to: int) -> Iterable[Constraint]:
    rule = known.rules[node.index]
    work = rule.work(node, known.view) if rule is not None and round_to > 1 else None
    ids = None if work is None or work.divisor > 1 else positions.ids(work.out.value, work.out.axis)
    return [] if ids is None else [Count((ids[None],), multiple=round_to, least=round_to, always=True)]


def _in_order(tables: Tables, liveness: Liveness) -> Iterable[str]:
    for operand in tables.inputs:
        if operand.name in liveness.live:
            yield operand.name
    for node in tables.nodes:
        for operand in node.outputs:
            if operand.name in liveness.live:
                yield operand.name
