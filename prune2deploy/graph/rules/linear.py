"""Conv, Gemm and MatMul with constant weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.constraints import Constraint, Count, Equal, Positions
from prune2deploy.graph.fact import Fact, make, with_layout
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Axis, Choice, Demand, Edit, Part, Rule, View, Work, freeze
from prune2deploy.graph.rules.matrix import Columns, Matrix, columns, fold, merge, needed_columns, row_facts


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

    @property
    def depthwise(self) -> bool:
        """Whether every group reads a single input channel (and there are several)."""
        return self.groups > 1 and self.weight.shape[1] == 1

    @property
    def in_size(self) -> int:
        """The number of input channels."""
        return int(self.weight.shape[1]) * self.groups

    def group(self, index: int) -> Matrix:
        """Return one group's matrix."""
        size = len(self.weight) // self.groups
        rows = slice(index * size, (index + 1) * size)
        return Matrix(self.weight[rows], self.bias[rows], self.padded)


Reader = Callable[[Node], Linear | None]
Writer = Callable[[Node, Edit, np.ndarray, np.ndarray, int], None]


def read_conv(node: Node) -> Linear | None:
    """Return a convolution with constant weights, or None for what the rule does not cover."""
    weight, bias = node.constant(1), node.constant(2)
    if weight is None or weight.ndim < 3 or (bias is None and node.input(2) is not None):
        return None
    pads = node.attribute("pads", [0])
    auto_pad = node.attribute("auto_pad", "NOTSET")
    if min(pads) < 0:
        return None
    padded = max(pads) > 0 if auto_pad == "NOTSET" else auto_pad != "VALID"
    keys = ("strides", "dilations", "pads", "auto_pad")
    signature = ("Conv", weight.shape[2:], tuple((key, str(node.attribute(key))) for key in keys))
    rows = len(weight)
    return Linear(
        weight=weight.reshape(rows, weight.shape[1], -1),
        bias=np.zeros(rows) if bias is None else bias.astype(np.float64),
        groups=int(node.attribute("group", 1)),
        padded=padded,
        slot=0,
        in_axis=1,
        out_axis=1,
        out_rank=weight.ndim,
        signature=signature,
    )


def write_conv(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
    """Write the new weights of a convolution."""
    old = node.inputs[1].array
    assert old is not None
    edit.set_constant(1, weight.reshape(*weight.shape[:2], *old.shape[2:]))
    if node.input(2) is not None or bias.any():
        edit.set_constant(2, bias.astype(old.dtype))
    edit.set_attribute("group", groups)


def read_gemm(node: Node) -> Linear | None:
    """Return a Gemm with a constant matrix and a bias that does not depend on the row of A."""
    matrix, bias = node.constant(1), node.constant(2)
    if matrix is None or matrix.ndim != 2 or node.attribute("transA", 0) or not node.inputs[0].is_value:
        return None
    if (bias is None and node.input(2) is not None) or (bias is not None and bias.ndim == 2 and len(bias) > 1):
        return None
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    weight = matrix if node.attribute("transB", 0) else matrix.T
    rows = len(weight)
    offset = np.zeros(rows) if bias is None else np.broadcast_to(bias.astype(np.float64).ravel() * beta, (rows,)).copy()
    scaled = weight if alpha == 1 else (weight * alpha).astype(weight.dtype)
    return Linear(scaled[:, :, None], offset, 1, False, 0, 1, 1, 2, ("Gemm",))


def write_gemm(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
    """Write the new weights of a Gemm, alpha and beta folded in."""
    old = node.inputs[1].array
    assert old is not None
    matrix = weight[:, :, 0]
    edit.set_constant(1, matrix if node.attribute("transB", 0) else matrix.T)
    if node.input(2) is not None or bias.any():
        edit.set_constant(2, bias.astype(old.dtype))
    if node.attribute("alpha", 1.0) != 1 or node.attribute("beta", 1.0) != 1:
        edit.set_attribute("alpha", 1.0)
        edit.set_attribute("beta", 1.0)


def read_matmul(node: Node) -> Linear | None:
    """Return a MatMul with a constant matrix on either side."""
    slot = 0 if node.inputs[0].is_value else 1
    matrix, rank = node.inputs[1 - slot].array, node.inputs[slot].rank
    if matrix is None or matrix.ndim != 2 or rank is None or rank < 2:
        return None
    weight = matrix.T if slot == 0 else matrix
    axis = rank - 1 if slot == 0 else rank - 2
    return Linear(weight[:, :, None], np.zeros(len(weight)), 1, False, slot, axis, axis, rank, ("MatMul", slot))


def write_matmul(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
    """Write the new matrix of a MatMul; what constants add goes into an Add behind it."""
    slot = 0 if node.inputs[0].is_value else 1
    matrix = weight[:, :, 0]
    edit.set_constant(1 - slot, matrix.T if slot == 0 else matrix)
    if bias.any():
        edit.after("Add", {}, bias.astype(matrix.dtype) if slot == 0 else bias.astype(matrix.dtype)[:, None])


def linear_rule(read: Reader, write: Writer, roles: Callable[[Node], list[tuple[int, int, str]]]) -> Rule:
    """Return the rule of a linear operator from its reader, its writer and the roles of its constants' axes."""

    def facts(node: Node, view: View) -> list[Fact] | None:
        linear = read(node)
        if linear is None or not (np.isfinite(linear.weight).all() and np.isfinite(linear.bias).all()):
            return None
        shape = node.inputs[linear.slot].shape or ()
        if len(shape) <= linear.in_axis or shape[linear.in_axis] != linear.in_size:
            return None  # an inferred size that contradicts the weights: nothing can be said of this graph
        signature = (*_tuple(linear.signature), shape, linear.weight.dtype.str)
        number, scale, shift = _facts(node, linear, view, signature)
        if not np.isfinite(shift.astype(linear.weight.dtype)).all():
            return None  # what would be folded into the bias is beyond its precision
        layout = [1] * linear.out_rank
        layout[linear.out_axis] = len(linear.weight)
        return [make(*(part.reshape(layout) for part in (number, scale, shift)))]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        linear = _must(read(node))
        rows = _rows(outs[0], linear)
        return {linear.slot: _demand(node, linear, rows, view)}

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        linear = _must(read(node))
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
        else:
            yield Count((into.reshape(linear.groups, -1), out.reshape(linear.groups, -1)))

    def drop(node: Node, edit: Edit) -> None:
        linear = _must(read(node))
        write(node, edit, *_dropped(node, linear, edit))

    def parts(node: Node, view: View) -> list[Part]:
        linear = _must(read(node))
        out = Axis(node.outputs[0].name, linear.out_axis)
        into = Axis(node.inputs[linear.slot].name, linear.in_axis)
        found = []
        for slot, axis, role in roles(node):
            array = node.constant(slot)
            if array is None or array.ndim <= axis or array.shape[axis] == 1 or (role == "reader" and linear.depthwise):
                continue
            of = np.arange(array.shape[axis])
            found.append(Part(slot, axis, role, into if role == "reader" else out, of))
        return found

    def work(node: Node, view: View) -> Work | None:
        return _work(node, _must(read(node)))

    return Rule(facts, live, ties, drop, "linear", parts, work, constant_first=True)


def _tuple(signature: Hashable) -> tuple[Hashable, ...]:
    return signature if isinstance(signature, tuple) else (signature,)


def _must(linear: Linear | None) -> Linear:
    assert linear is not None, "facts() accepted this node"
    return linear


def _rows(mask: np.ndarray | None, linear: Linear) -> np.ndarray:
    """Return the live rows, bool [rows]; a collapsed axis is all or nothing."""
    assert mask is not None
    axes = tuple(axis for axis in range(mask.ndim) if axis != linear.out_axis)
    return np.broadcast_to(mask.any(axis=axes), (len(linear.weight),))


def _input(node: Node, linear: Linear, view: View) -> Fact:
    operand = node.inputs[linear.slot]
    assert operand.shape is not None
    return with_layout(view.of(operand), [linear.in_axis], [linear.in_size], operand.shape, view.numbers)


def _group_columns(fact: Fact, linear: Linear, view: View) -> list[Columns]:
    """Return the columns of every group."""
    cols = columns(fact, linear.padded, view.numbers)
    size = linear.weight.shape[1]
    return [
        Columns(cols.key[k : k + size], cols.weight[k : k + size], cols.offset[k : k + size])
        for k in range(0, linear.in_size, size)
    ]


def _facts(node: Node, linear: Linear, view: View, signature: Hashable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    fact = _input(node, linear, view)
    if linear.depthwise:
        return _depthwise_facts(fact, linear, view, signature)
    found = [
        row_facts(merge(linear.group(index), cols), signature, view.numbers)
        for index, cols in enumerate(_group_columns(fact, linear, view))
    ]
    return (
        np.concatenate([fact.number for fact in found]),
        np.concatenate([fact.scale for fact in found]),
        np.concatenate([fact.shift for fact in found]),
    )


def _depthwise(fact: Fact, linear: Linear, view: View) -> tuple[Columns, np.ndarray, np.ndarray, np.ndarray]:
    """Return each row's column, its weight times the column's multiple, whether it is constant, and its shift."""
    cols = columns(fact, linear.padded, view.numbers)
    of = np.repeat(np.arange(linear.groups), len(linear.weight) // linear.groups)
    own = Columns(cols.key[of], cols.weight[of], cols.offset[of])
    weight = (linear.weight[:, 0].astype(np.float64) * own.weight[:, None]).astype(linear.weight.dtype)
    constant = ~weight.any(axis=1)
    shift = linear.bias + linear.weight[:, 0].astype(np.float64).sum(axis=1) * own.offset
    return own, weight, constant, shift


def _depthwise_facts(
    fact: Fact, linear: Linear, view: View, signature: Hashable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    own, weight, constant, shift = _depthwise(fact, linear, view)
    mark = view.numbers.intern(("linear", signature))
    keys = ((mark, int(key), row.tobytes()) for key, row in zip(own.key, weight, strict=True))
    return view.numbers.intern_all(keys), np.where(constant, 0.0, 1.0), shift


def _demand(node: Node, linear: Linear, rows: np.ndarray, view: View) -> Demand:
    fact = _input(node, linear, view)
    layout = fact.shape
    if linear.depthwise:
        _, _, constant, _ = _depthwise(fact, linear, view)
        return Demand((rows & ~constant).reshape(linear.groups, -1).any(axis=1).reshape(layout))
    live = np.zeros(linear.in_size, dtype=bool)
    choices: list[Choice] = []
    size, height = linear.weight.shape[1], len(linear.weight) // linear.groups
    for index, cols in enumerate(_group_columns(fact, linear, view)):
        own = rows[index * height : (index + 1) * height]
        if not own.any():
            continue
        merged = merge(linear.group(index), cols)
        needed = needed_columns(merged, own)
        members = np.bincount(merged.class_of[merged.class_of >= 0], minlength=len(needed))
        alone = np.isin(merged.class_of, np.flatnonzero(needed & (members == 1)))
        live[index * size : (index + 1) * size] = alone
        for wanted in np.flatnonzero(needed & (members > 1)).tolist():
            of_class = np.flatnonzero(merged.class_of == wanted)
            choices.append(Choice(of_class + index * size, np.abs(cols.weight[of_class])))
    return Demand(live.reshape(layout), tuple(choices))


def _dropped(node: Node, linear: Linear, edit: Edit) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the kept part of the weights [rows, columns, taps], the bias [rows], and the number of groups."""
    operand, output = node.inputs[linear.slot], node.outputs[0]
    fact = _input(node, linear, edit.view)
    live_rows = _rows(edit.live(output), linear)
    kept_rows = edit.kept(output, linear.out_axis)
    rows = np.arange(len(linear.weight)) if kept_rows is None else kept_rows
    if linear.depthwise:
        _, _, constant, shift = _depthwise(fact, linear, edit.view)
        idle = constant | ~live_rows
        weight = np.where(idle[:, None, None], 0, linear.weight).astype(linear.weight.dtype)
        bias = np.where(idle, np.where(constant, shift, 0.0), linear.bias)
        groups = np.unique(rows // (len(linear.weight) // linear.groups))
        return weight[rows], bias[rows], len(groups)

    live_mask = edit.live(operand)
    axes = tuple(axis for axis in range(live_mask.ndim) if axis != linear.in_axis)
    live_columns = np.broadcast_to(live_mask.any(axis=axes), (linear.in_size,))
    kept_columns = edit.kept(operand, linear.in_axis)
    cols_kept = np.arange(linear.in_size) if kept_columns is None else kept_columns
    size, height = linear.weight.shape[1], len(linear.weight) // linear.groups
    weights, biases = [], []
    for index, cols in enumerate(_group_columns(fact, linear, edit.view)):
        own_rows = rows[(rows >= index * height) & (rows < (index + 1) * height)] - index * height
        own_cols = cols_kept[(cols_kept >= index * size) & (cols_kept < (index + 1) * size)] - index * size
        if not len(own_rows):
            continue
        span = slice(index * size, (index + 1) * size)
        full = linear.group(index)
        part = Matrix(full.weight[own_rows], full.bias[own_rows], full.padded)
        folded = fold(part, cols, live_columns[span], live_rows[index * height : (index + 1) * height][own_rows])
        weights.append(folded.weight[:, own_cols])
        biases.append(folded.bias)
    return np.concatenate(weights), np.concatenate(biases), len(weights)


def _work(node: Node, linear: Linear) -> Work | None:
    shape = node.outputs[0].shape
    if shape is None:
        return None
    sizes = [size for axis, size in enumerate(shape) if axis not in (0, linear.out_axis)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    coefficient = (
        int(np.prod([size for size in sizes if isinstance(size, int)], dtype=np.int64)) * linear.weight.shape[2]
    )
    out = Axis(node.outputs[0].name, linear.out_axis)
    if linear.depthwise:
        return Work(coefficient, out, len(linear.weight), None, 1, padded=linear.padded)
    into = Axis(node.inputs[linear.slot].name, linear.in_axis)
    return Work(coefficient, out, len(linear.weight), into, linear.in_size, linear.groups, linear.padded)


def _gemm_roles(node: Node) -> list[tuple[int, int, str]]:
    rows = 0 if node.attribute("transB", 0) else 1
    bias = node.constant(2)
    return [
        (1, rows, "filter"),
        (1, 1 - rows, "reader"),
        (2, 0 if bias is None or not bias.ndim else bias.ndim - 1, "bias"),
    ]


def _matmul_roles(node: Node) -> list[tuple[int, int, str]]:
    return [(1, 1, "filter"), (1, 0, "reader")] if node.inputs[0].is_value else [(0, 0, "filter"), (0, 1, "reader")]


CONV = linear_rule(read_conv, write_conv, lambda node: [(1, 0, "filter"), (1, 1, "reader"), (2, 0, "bias")])
GEMM = linear_rule(read_gemm, write_gemm, _gemm_roles)
MATMUL = linear_rule(read_matmul, write_matmul, _matmul_roles)
