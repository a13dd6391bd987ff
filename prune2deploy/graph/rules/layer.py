"""The rule of an operator with constant weights: a matrix over channels for each group, whatever it does to the rest.

Each operator brings a reader (node -> `Linear`), a writer, and the roles of its constants' axes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import numpy as np

from prune2deploy.graph.constraints import Constraint, Count, Equal, Positions
from prune2deploy.graph.fact import Fact, Numbers, make, with_layout
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Axis, Choice, Demand, Edit, Part, Piece, Rule, View, Work, freeze
from prune2deploy.graph.rules.matrix import Columns, Fate, Folded, Matrix, Reads, columns, fold, read_rows, unit_row


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear operator read from its node.

    Attributes:
        weight: [rows, columns of one group, taps].
        bias: [rows] float64.
        groups: number of groups; rows and input channels are split among them in order.
        padded: whether zero padding can reach an output.
        slot: input slot of the value.
        in_axis, out_axis: the contracted axis of the input, and the produced one of the output.
        signature: everything else that the result depends on.
        columns: what the inputs are to this layer; one whose weights must not change takes no aliases together.
        per_input: whether the work is counted by input positions (a transposed convolution), not by output ones.
    """

    weight: np.ndarray
    bias: np.ndarray
    groups: int
    padded: bool
    slot: int
    in_axis: int
    out_axis: int
    out_rank: int
    signature: Hashable
    columns: Callable[[Fact, bool, Numbers], Columns] = columns
    per_input: bool = False

    @property
    def depthwise(self) -> bool:
        """Whether every group reads a single input channel (and there are several)."""
        return self.groups > 1 and self.weight.shape[1] == 1

    @property
    def in_size(self) -> int:
        """The number of input channels."""
        return int(self.weight.shape[1]) * self.groups

    @property
    def height(self) -> int:
        """The number of rows of one group."""
        return len(self.weight) // self.groups

    def group(self, index: int) -> Matrix:
        """Return one group's matrix."""
        rows = slice(index * self.height, (index + 1) * self.height)
        return Matrix(self.weight[rows], self.bias[rows])


Reader = Callable[[Node], Linear | str]
Writer = Callable[[Node, Edit, np.ndarray, np.ndarray, int], None]
Roles = Callable[[Node], list[tuple[int, int, str]]]
"""Slot, axis and role of every constant axis that follows positions; axes of size 1 follow none."""


@dataclass(frozen=True, eq=False)
class State:
    """What the forward sweep found of a layer, group by group, and keeps for the later steps.

    Of a depthwise layer there is one matrix in all, whose columns are those of its rows.
    """

    linear: Linear
    columns: list[Columns]
    reads: list[Reads]
    number: np.ndarray
    scale: np.ndarray

    @property
    def constant(self) -> np.ndarray:
        """The rows that read nothing; bool [rows]."""
        return np.concatenate([reads.constant for reads in self.reads])

    @property
    def shift(self) -> np.ndarray:
        """Bias and everything constant; float64 [rows]."""
        return np.concatenate([reads.shift for reads in self.reads])


def linear_rule(read: Reader, write: Writer, roles: Roles) -> Rule:
    """Return the rule of a linear operator from its reader, its writer and the roles of its constants' axes."""

    def linear_of(node: Node, view: View) -> Linear:
        linear = view.once(node, "linear", lambda: read(node))
        assert isinstance(linear, Linear), "facts() accepted this node"
        return linear

    def state_of(node: Node, view: View) -> State:
        return view.once(node, "state", lambda: _state(node, linear_of(node, view), view))

    def facts(node: Node, view: View) -> list[Fact] | str:
        linear = view.once(node, "linear", lambda: read(node))
        if isinstance(linear, str):
            return linear
        shape = node.inputs[linear.slot].shape or ()
        if len(shape) <= linear.in_axis or shape[linear.in_axis] != linear.in_size:
            return "its weights do not fit the inferred size of its input"
        if not linear.weight.size:
            return "its weights are empty"
        if not (_finite(linear.weight) and np.isfinite(linear.bias).all()):
            return "its weights are not finite"
        state = state_of(node, view)
        if not np.isfinite(state.shift.astype(linear.weight.dtype)).all():
            return "what its constant inputs add up to is beyond its precision"
        layout = [1] * linear.out_rank
        layout[linear.out_axis] = len(linear.weight)
        parts = (state.number, state.scale, state.shift)
        return [make(*(part.reshape(layout) for part in parts))]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        state = state_of(node, view)
        return {state.linear.slot: _demand(node, state, _rows(outs[0], state.linear))}

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        linear = linear_of(node, view)
        operand = node.inputs[linear.slot]
        for axis in range(operand.rank or 0):  # what it takes as space or batch, another may take as channels
            if axis != linear.in_axis:
                yield freeze(positions.ids(operand.name, axis))
        if linear.groups == 1:
            return
        into = positions.ids(operand.name, linear.in_axis)
        out = positions.ids(node.outputs[0].name, linear.out_axis)
        if into is None or out is None:
            yield freeze(out if into is None else into)
        elif len(out) == len(into) and linear.depthwise:
            yield Equal(out, into)
        elif node.index in view.divided:  # each group on its own: it keeps something on both sides, or nothing
            for own in zip(into.reshape(linear.groups, 1, -1), out.reshape(linear.groups, 1, -1), strict=True):
                yield Count(own)
        else:
            yield Count((into.reshape(linear.groups, -1), out.reshape(linear.groups, -1)))

    def drop(node: Node, edit: Edit) -> None:
        state = state_of(node, edit.view)
        if state.linear.depthwise:
            write(node, edit, *_dropped_depthwise(node, state, edit))
            return
        folded = _folded(node, state, edit)
        runs = _runs(folded)
        if len(runs) == 1:
            write(node, edit, *_joined(state.linear, folded))
        else:
            pieces = [_piece(node, write, run) for run in runs]
            edit.divide(state.linear.slot, state.linear.in_axis, state.linear.out_axis, pieces)

    def parts(node: Node, view: View) -> list[Part]:
        return _parts(node, linear_of(node, view), roles(node))

    def work(node: Node, view: View) -> Work | None:
        return _work(node, linear_of(node, view))

    return Rule(facts, live, ties, drop, "linear", parts, work, constant_first=True)


def _finite(array: np.ndarray) -> bool:
    """Whether all is finite; the extremes of an array are cheaper than a mask of it, and NaN passes through them."""
    return not array.size or bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _rows(mask: np.ndarray | None, linear: Linear) -> np.ndarray:
    """Return the live rows, bool [rows]; a collapsed axis is all or nothing."""
    assert mask is not None
    axes = tuple(axis for axis in range(mask.ndim) if axis != linear.out_axis)
    return np.broadcast_to(mask.any(axis=axes), (len(linear.weight),))


def _state(node: Node, linear: Linear, view: View) -> State:
    operand = node.inputs[linear.slot]
    assert operand.shape is not None
    fact = with_layout(view.of(operand), [linear.in_axis], [linear.in_size], operand.shape, view.numbers)
    cols = linear.columns(fact, linear.padded, view.numbers)
    signature = (linear.signature, operand.shape, linear.weight.dtype.str)
    if linear.depthwise:
        return _depthwise_state(linear, cols, signature, view)
    size = linear.weight.shape[1]
    own = [cols.part(first, size) for first in range(0, linear.in_size, size)]
    found = [read_rows(linear.group(index), part, signature, view.numbers) for index, part in enumerate(own)]
    reads, numbers, scales = zip(*found, strict=True)
    return State(linear, own, list(reads), np.concatenate(numbers), np.concatenate(scales))


def _depthwise_state(linear: Linear, cols: Columns, signature: Hashable, view: View) -> State:
    """Return the state of a layer whose rows read one column each: all rows at once."""
    of = np.repeat(np.arange(linear.groups), linear.height)
    own = Columns(cols.key[of], cols.weight[of], cols.offset[of])
    weight = (linear.weight[:, 0].astype(np.float64) * own.weight[:, None]).astype(linear.weight.dtype)
    constant = ~(weight != 0).any(axis=1)
    shift = linear.bias + linear.weight[:, 0].astype(np.float64).sum(axis=1) * own.offset
    mark = view.numbers.intern(("linear", signature))
    number, scale = np.zeros(len(weight), dtype=np.int64), np.zeros(len(weight))
    for row in np.flatnonzero(~constant).tolist():
        shape, length = unit_row(weight[row])
        number[row], scale[row] = view.numbers.scaled((mark, int(own.key[row]), shape.tobytes()), length)
    nothing = np.zeros(0, dtype=np.int64)
    return State(linear, [own], [Reads(nothing, nothing, nothing, constant, shift)], number, scale)


def _demand(node: Node, state: State, rows: np.ndarray) -> Demand:
    linear = state.linear
    layout = [1] * (node.inputs[linear.slot].rank or 0)
    layout[linear.in_axis] = linear.in_size
    reading = rows & ~state.constant
    if linear.depthwise:
        return Demand(reading.reshape(linear.groups, -1).any(axis=1).reshape(layout))
    live = np.zeros(linear.in_size, dtype=bool)
    choices: list[Choice] = []
    size = linear.weight.shape[1]
    for index, (cols, reads) in enumerate(zip(state.columns, state.reads, strict=True)):
        needed = reads.needed(reading[index * linear.height : (index + 1) * linear.height])
        active = reads.class_of >= 0
        alone = needed & (reads.members == 1)
        live[index * size : (index + 1) * size][active] = alone[reads.class_of[active]]
        for wanted in np.flatnonzero(needed & (reads.members > 1)).tolist():
            of_class = np.flatnonzero(reads.class_of == wanted)
            choices.append(Choice(of_class + index * size, np.abs(cols.weight[of_class])))
    return Demand(live.reshape(layout), tuple(choices))


def _folded(node: Node, state: State, edit: Edit) -> list[Folded]:
    """Return what remains of every group that keeps a row."""
    linear = state.linear
    operand, output = node.inputs[linear.slot], node.outputs[0]
    live_rows = _rows(edit.live(output), linear)
    rows = _kept(edit.kept(output, linear.out_axis), len(linear.weight))
    live_mask = edit.live(operand)
    axes = tuple(axis for axis in range(live_mask.ndim) if axis != linear.in_axis)
    # What this layer reads is live in every cell; in some only, where another reader wants it there.
    live_columns = np.broadcast_to(live_mask.all(axis=axes), (linear.in_size,))
    cols = _kept(edit.kept(operand, linear.in_axis), linear.in_size)
    folded = []
    for index in range(linear.groups):
        own_rows = _fate(rows, live_rows, index, linear.height)
        if len(own_rows.kept):
            inputs = _fate(cols, live_columns, index, linear.weight.shape[1])
            folded.append(fold(linear.group(index), state.columns[index], state.reads[index], own_rows, inputs))
    return folded


def _kept(indices: np.ndarray | None, size: int) -> np.ndarray:
    return np.arange(size) if indices is None else indices


def _fate(kept: np.ndarray, live: np.ndarray, index: int, size: int) -> Fate:
    """Return what becomes of one group's share of an axis."""
    own = kept[np.searchsorted(kept, index * size) : np.searchsorted(kept, (index + 1) * size)]
    return Fate(own - index * size, live[index * size : (index + 1) * size])


def _joined(linear: Linear, folded: list[Folded]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the weights [rows, columns, taps], the bias [rows] and the number of groups of one layer.

    Weights that stay as they are come back as the same array.
    """
    bias = np.concatenate([part.bias for part in folded])
    if len(folded) == linear.groups and all(part.same for part in folded):
        return linear.weight, bias, linear.groups
    weight = folded[0].weight if linear.groups == 1 else np.concatenate([part.weight for part in folded])
    return weight, bias, len(folded)


def _runs(folded: list[Folded]) -> list[list[Folded]]:
    """Return neighbouring groups of one shape together: each run is one layer."""
    return [list(run) for _, run in groupby(folded, key=lambda part: part.weight.shape)]


class _Recorder:
    """An edit that remembers the constants and attributes that a writer sets."""

    def __init__(self) -> None:
        self.constants: dict[int, np.ndarray] = {}
        self.attributes: dict[str, object] = {}

    def set_constant(self, slot: int, array: np.ndarray) -> None:
        self.constants[slot] = array

    def set_attribute(self, name: str, value: object) -> None:
        self.attributes[name] = value


def _piece(node: Node, write: Writer, run: list[Folded]) -> Piece:
    recorder = _Recorder()
    weight, bias = np.concatenate([part.weight for part in run]), np.concatenate([part.bias for part in run])
    write(node, cast(Edit, recorder), weight, bias, len(run))
    return Piece(sum(part.weight.shape[1] for part in run), recorder.constants, recorder.attributes)


def _dropped_depthwise(node: Node, state: State, edit: Edit) -> tuple[np.ndarray, np.ndarray, int]:
    linear, constant = state.linear, state.constant
    idle = constant | ~_rows(edit.live(node.outputs[0]), linear)
    rows = _kept(edit.kept(node.outputs[0], linear.out_axis), len(linear.weight))
    groups = len(np.unique(rows // linear.height))
    bias = np.where(idle, np.where(constant, state.shift, 0.0), linear.bias)
    if len(rows) == len(idle) and not idle.any():
        return linear.weight, bias, groups
    weight = linear.weight[rows]
    weight[idle[rows]] = 0
    return weight, bias[rows], groups


def _parts(node: Node, linear: Linear, roles: list[tuple[int, int, str]]) -> list[Part]:
    out = Axis(node.outputs[0].name, linear.out_axis)
    into = Axis(node.inputs[linear.slot].name, linear.in_axis)
    found = []
    for slot, axis, role in roles:
        array = node.constant(slot)
        if array is None or array.ndim <= axis or array.shape[axis] == 1:
            continue
        size = array.shape[axis]
        of = np.arange(size)
        if linear.depthwise and role == "filter":  # by channel: the first of its outputs stands for them
            of = of * (len(linear.weight) // size)
        found.append(Part(slot, axis, role, into if role == "reader" else out, of))
    return found


def _work(node: Node, linear: Linear) -> Work:
    counted, axis = node.outputs[0].shape, linear.out_axis
    if linear.per_input:
        counted, axis = node.inputs[linear.slot].shape, linear.in_axis
    sizes = [size for place, size in enumerate(counted or ()) if place not in (0, axis)]
    known = [size for size in sizes if isinstance(size, int)]
    whole = counted is not None and len(known) == len(sizes)
    coefficient = int(np.prod(known, dtype=np.int64)) * linear.weight.shape[2] if whole else None
    out = Axis(node.outputs[0].name, linear.out_axis)
    if linear.depthwise:
        return Work(coefficient, out, len(linear.weight), None, 1, padded=linear.padded)
    into = Axis(node.inputs[linear.slot].name, linear.in_axis)
    return Work(coefficient, out, len(linear.weight), into, linear.in_size, linear.groups, linear.padded)
