"""The four kinds of constraint on which positions are kept, and the closure that satisfies them all.

Positions are numbered: each (value, expanded axis) owns a block of consecutive ids; id 0 is *frozen*, always kept.
Equalities are solved first, by connected components; the others are worked until nothing changes. All are
monotone: they only ever add positions. Counts have a choice which ones to add, so they come last and take the lowest
indices, readers before what they read: what must be kept anyway then serves them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FROZEN = 0
Ids = np.ndarray  # int64


@dataclass(frozen=True, eq=False)
class Equal:
    """Position ``a[i]`` is kept exactly when ``b[i]`` is (elementwise operators, depthwise convolutions, norms)."""

    a: Ids
    b: Ids


@dataclass(frozen=True, eq=False)
class Implies:
    """A kept ``position[i]`` keeps ``needs[i]``, not the other way (Slice, Concat, Pad keep their sources).

    ``also`` are further positions that must be kept too for that: a cell of a table is where a row and a column are.
    """

    position: Ids
    needs: Ids
    also: tuple[Ids, ...] = ()

    def ids(self) -> Ids:
        """Return the positions whose keeping can trigger this constraint."""
        return np.concatenate([self.position, *self.also])

    def close(self, kept: np.ndarray) -> Ids:
        """Return what must be kept besides, given ``kept`` (bool by id)."""
        return np.asarray(self.needs[np.logical_and.reduce([kept[ids] for ids in (self.position, *self.also)])])


@dataclass(frozen=True, eq=False)
class Hull:
    """A reshape: the kept cells of a block are a product of kept indices on either side.

    ``sides`` are the input's and the output's axes of the block, each axis a vector of ids; the cells of both sides
    are the same, in row-major order. An axis without positions of its own (collapsed) is a vector of frozen ids.
    """

    sides: tuple[tuple[Ids, ...], tuple[Ids, ...]]

    def ids(self) -> Ids:
        """Return the positions whose keeping can trigger this constraint."""
        return np.concatenate([axis for side in self.sides for axis in side])

    def close(self, kept: np.ndarray) -> Ids:
        """Return what must be kept besides, given ``kept`` (bool by id)."""
        cells = np.zeros(int(np.prod([len(axis) for axis in self.sides[0]])), dtype=bool)
        for side in self.sides:
            product = np.ones((), dtype=bool)
            for axis in side:
                product = np.logical_and.outer(product, kept[axis])
            cells |= product.ravel()
        found: list[Ids] = []
        for side in self.sides:
            box = cells.reshape([len(axis) for axis in side])
            for number, axis in enumerate(side):
                others = tuple(other for other in range(len(side)) if other != number)
                found.append(axis[box.any(axis=others)])
        return np.concatenate(found)


@dataclass(frozen=True, eq=False)
class Count:
    """Counts over blocks of positions: equal in every active row, a multiple of ``multiple``, at least ``least``.

    ``columns`` are matrices of ids with one row per block (a grouped convolution: its input and its output channels by
    group). A row is active where any of its positions, in any column, is kept; inactive rows stay empty. With
    ``always`` every row is active.
    """

    columns: tuple[Ids, ...]
    multiple: int = 1
    least: int = 1
    always: bool = False

    def ids(self) -> Ids:
        """Return the positions whose keeping can trigger this constraint."""
        return np.concatenate([column.ravel() for column in self.columns])

    def close(self, kept: np.ndarray) -> Ids:
        """Return what must be kept besides, given ``kept`` (bool by id); the lowest indices are added first."""
        have = [kept[column] for column in self.columns]
        active = np.logical_or.reduce([rows.any(axis=1) for rows in have]) | self.always
        found: list[Ids] = []
        for column, rows in zip(self.columns, have, strict=True):
            counts = rows.sum(axis=1)
            want = max(int(counts.max(initial=0)), self.least)
            want = min(-(-want // self.multiple) * self.multiple, column.shape[1])
            for row in np.flatnonzero(active & (counts < want)):
                missing = np.flatnonzero(~rows[row])[: want - int(counts[row])]
                found.append(column[row, missing])
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


Constraint = Equal | Implies | Hull | Count


class Positions:
    """Numbers the positions of values along their expanded axes."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, int], tuple[int, int]] = {}
        self._tripwires: dict[int, tuple[int, ...]] = {}
        self._values: set[str] = set()
        self.count = 1

    def add(self, value: str, layout: Sequence[int]) -> None:
        """Number the positions of a value with this layout; axes of size 1 have none."""
        self._values.add(value)
        for axis, size in enumerate(layout):
            if size > 1:
                self._first[value, axis] = (self.count, size)
                self.count += size

    def has(self, value: str) -> bool:
        """Whether a value was added: one that nobody needs is not."""
        return value in self._values

    def ids(self, value: str, axis: int) -> Ids | None:
        """Return the ids along an axis, or None where it has no positions of its own."""
        found = self._first.get((value, axis))
        return None if found is None else np.arange(found[0], found[0] + found[1])

    def tripwire(self, *key: int) -> int:
        """Return the id of a position that stands for "this was left out, but it is needed after all"."""
        self._tripwires[self.count] = key
        self.count += 1
        return self.count - 1

    def tripped(self, kept: np.ndarray) -> set[tuple[int, ...]]:
        """Return the keys of the tripwires that were kept."""
        return {key for position, key in self._tripwires.items() if kept[position]}

    def blocks(self) -> Iterable[tuple[str, int, int, int]]:
        """Yield (value, axis, first id, size) of every block in order."""
        for (value, axis), (first, size) in self._first.items():
            yield value, axis, first, size


def classes(count: int, constraints: Iterable[Constraint], *, also_implied: bool = False) -> Ids:
    """Return the class of every position: positions tied by equalities share one.

    With ``also_implied`` the other kinds tie as well, as if each were an equality between all that it couples: that
    gives sets of positions whose joint removal satisfies every constraint.
    """
    sources: list[Ids] = []
    targets: list[Ids] = []
    for constraint in constraints:
        for a, b in _pairs(constraint, also_implied):
            sources.append(a)
            targets.append(b)
    if not sources:
        return np.arange(count)
    a, b = np.concatenate(sources), np.concatenate(targets)
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _pairs(constraint: Constraint, also_implied: bool) -> Iterable[tuple[Ids, Ids]]:
    if isinstance(constraint, Equal):
        yield constraint.a, constraint.b
    elif not also_implied:
        return
    elif isinstance(constraint, Implies):
        for position in (constraint.position, *constraint.also):
            yield position, constraint.needs
    elif isinstance(constraint, Hull):
        grids = [np.meshgrid(*side, indexing="ij") for side in constraint.sides]
        cells = [axis.ravel() for side in grids for axis in side if (axis != FROZEN).any()]
        for axis in cells[1:]:
            yield cells[0], axis
    elif any(column.shape[1] == 1 for column in constraint.columns):  # one input per group: it goes with its outputs
        first = constraint.columns[0][:, 0]
        for column in constraint.columns:
            yield np.repeat(first, column.shape[1]), column.ravel()
    else:
        for column in constraint.columns:  # the k-th position of every row goes with the k-th of the first
            for row in column[1:]:
                yield column[0], row


def close(
    count: int, constraints: Sequence[Constraint], kept: np.ndarray, causes: dict[int, Constraint] | None = None
) -> tuple[np.ndarray, Ids]:
    """Return a least superset of ``kept`` (bool by id) that satisfies every constraint, and the classes.

    ``causes`` is filled with the constraint that added each class that holds nothing of ``kept``.
    Runs in time linear in the positions that constraints touch, times how often each constraint must be revisited.
    """
    class_of = classes(count, constraints)
    members = _by_class(class_of)
    work = [constraint for constraint in constraints if not isinstance(constraint, Equal)]
    class_count = int(class_of.max()) + 1
    touched_by = _touched_by(class_of, class_count, work)

    kept = kept.copy()
    kept[FROZEN] = True
    class_kept = np.zeros(class_count, dtype=bool)
    class_kept[class_of[kept]] = True
    kept = class_kept[class_of]

    queue = deque(index for index, constraint in enumerate(work) if not isinstance(constraint, Count))
    counts = [index for index, constraint in enumerate(work) if isinstance(constraint, Count)]  # last in, first out
    queued = np.ones(len(work), dtype=bool)
    while queue or counts:
        index = queue.popleft() if queue else counts.pop()
        queued[index] = False
        new = _distinct(class_of[work[index].close(kept)], class_count)
        for class_id in new[~class_kept[new]].tolist():
            class_kept[class_id] = True
            kept[members(class_id)] = True
            if causes is not None:
                causes[class_id] = work[index]
            for other in touched_by(class_id):
                if not queued[other]:
                    queued[other] = True
                    (counts if isinstance(work[other], Count) else queue).append(other)
    return kept, class_of


def _by_class(class_of: Ids) -> Callable[[int], Ids]:
    """Return a function from a class to its positions."""
    order = np.argsort(class_of, kind="stable")
    start = np.searchsorted(class_of[order], np.arange(int(class_of.max()) + 2))
    return lambda class_id: order[start[class_id] : start[class_id + 1]]


def _touched_by(class_of: Ids, count: int, work: Sequence[Implies | Hull | Count]) -> Callable[[int], list[int]]:
    """Return a function from a class to the constraints that its keeping can trigger, in order."""
    touched = [_distinct(class_of[constraint.ids()], count) for constraint in work]
    if not touched:
        return lambda class_id: []
    by = np.repeat(np.arange(len(work)), [len(own) for own in touched])
    classes_touched = np.concatenate(touched)
    order = np.argsort(classes_touched, kind="stable")
    by, start = by[order], np.searchsorted(classes_touched[order], np.arange(count + 1))
    return lambda class_id: by[start[class_id] : start[class_id + 1]].tolist()


def _distinct(found: Ids, count: int) -> Ids:
    """Return the sorted distinct classes among these, of ``count`` in all; for many, marking is faster than sorting."""
    if len(found) * 8 < count:
        return np.unique(found)
    seen = np.zeros(count, dtype=bool)
    seen[found] = True
    return np.flatnonzero(seen)
