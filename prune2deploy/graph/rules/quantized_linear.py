"""Linear layers with quantised weights: behind a DequantizeLinear, or in QLinear and Integer operators.

Sums of stored integers need not be integers of their type, so rows and columns of the weights are only left out, or set
to the zero point. Inputs that are zero fall away. Aliases stay, and other constants too, unless the bias takes them up:
one in floats, or one in integers where the constant adds a whole number of its steps (as it does after quantisation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np

from prune2deploy.graph.fact import ONE, Fact, Numbers, make
from prune2deploy.graph.node import Node, Operand
from prune2deploy.graph.rules import linear
from prune2deploy.graph.rules.base import Demand, Edit, Rule, View
from prune2deploy.graph.rules.layer import Linear, Reader, Roles, Writer, linear_rule
from prune2deploy.graph.rules.matrix import Columns
from prune2deploy.graph.rules.quantized import rounded, zero_of
from prune2deploy.graph.stored import Stored

Takes = Callable[[int, float], bool]
"""Whether the bias can take up a constant input: of which column, and how much above zero."""

BIAS_RANGE = 2.0**20
"""What one constant may add to a bias of 32 bits, in steps: hundreds of them do not overflow."""


def columns_apart(
    fact: Fact,
    padded: bool,
    numbers: Numbers,
    *,
    zero: float = 0.0,
    point: Callable[[Numbers], int] | None = None,
    takes: Takes | None = None,
) -> Columns:
    """Return the columns of inputs with these facts, none merged with another.

    ``zero`` is the value that adds nothing, or ``point`` the number of a computed one.
    """
    number, scale, shift = (part.ravel() for part in (fact.number, fact.scale, fact.shift))
    absent = (scale == 0) & (shift == zero)
    if point is not None:
        absent = (number == point(numbers)) & (scale == 1) & (shift == 0)
    offset = np.zeros(len(number))
    if takes is not None and not padded:
        for k in np.flatnonzero((scale == 0) & ~absent).tolist():
            offset[k] = shift[k] - zero if takes(k, float(shift[k] - zero)) else 0.0
    seen: Counter[tuple[int, float, float]] = Counter()
    key = np.full(len(number), ONE, dtype=np.int64)
    live = ~absent & (offset == 0)
    for k in np.flatnonzero(live).tolist():
        what = (int(number[k]), float(scale[k]), float(shift[k]))
        key[k] = numbers.intern(("apart", *what, seen[what]))
        seen[what] += 1
    return Columns(key, np.where(live, 1.0, 0.0), offset)


# --- float operators whose weights come from a DequantizeLinear -------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a float linear operator is read and written, and the roles of its constants' axes."""

    read: Reader
    write: Writer
    roles: Roles


FORMS = {
    "Conv": Form(linear.read_conv, linear.write_conv, linear.conv_roles),
    "ConvTranspose": Form(linear.read_conv_transpose, linear.write_conv_transpose, linear.transposed_roles),
    "Gemm": Form(linear.read_gemm, linear.write_gemm, linear.gemm_roles),
    "MatMul": Form(linear.read_matmul, linear.write_matmul, linear.matmul_roles),
}


class _Redirected:
    """An edit whose ``set_constant`` goes elsewhere: the writers of float layers write quantised ones through it."""

    def __init__(self, edit: Edit, set_constant: Callable[[int, np.ndarray], None]) -> None:
        self.set_constant = set_constant
        self.set_attribute = edit.set_attribute

    def after(self, op_type: str, attributes: dict[str, object], *constants: np.ndarray) -> None:
        raise AssertionError("nothing is folded into an operator without a bias")


def _stored_rule(form: Form) -> Rule:
    """Return the rule of a float linear operator with stored weights."""

    def read(node: Node) -> Linear | str:
        found = form.read(node)
        if isinstance(found, str):
            return found
        if node.attribute("alpha", 1.0) != 1 or node.attribute("beta", 1.0) != 1:
            return "its quantised weights are scaled by alpha or beta"
        axis = _weights(node, form).axis
        if axis is not None and found.groups > 1 and not (node.op_type == "Conv" and axis == 0):
            return "the scales of its quantised weights do not go by output channel"
        return replace(found, columns=partial(columns_apart, takes=_bias_takes(node.input(2), found)))

    def write(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
        found = read(node)
        assert isinstance(found, Linear)
        rows = edit.kept(node.outputs[0], found.out_axis)

        def set_constant(slot: int, array: np.ndarray) -> None:
            stored = node.inputs[slot].stored
            if stored is None or not any((place, role) == (slot, "bias") for place, _, role in form.roles(node)):
                edit.set_constant(slot, array)  # what was stored before, and zero, can be stored again
            else:
                edit.set_stored(slot, _stored_bias(stored, found, rows, bias))

        form.write(node, cast(Edit, _Redirected(edit, set_constant)), weight, bias, groups)

    return linear_rule(read, write, form.roles)


def _bias_takes(bias: Operand | None, found: Linear) -> Takes | None:
    """Return which constants a layer's bias can take up; of none where there is no bias of its own for every row."""
    if bias is None or bias.array is None or bias.array.size != len(found.weight):
        return None
    if bias.stored is None:
        return lambda column, amount: True
    if str(bias.stored.integers.dtype) != "int32":
        return None
    step = np.broadcast_to(bias.stored.scale.astype(np.float64), len(found.weight))
    return lambda column, amount: _is_whole(found, column, amount, step)


def _is_whole(found: Linear, column: int, amount: float, step: np.ndarray | float) -> bool:
    """Whether a constant input adds a whole number of steps to every row, but for the rounding of the step itself."""
    width = found.weight.shape[1]
    rows = slice(column // width * found.height, (column // width + 1) * found.height)
    added = amount * found.weight[rows, column % width].sum(axis=1, dtype=np.float64)
    added = added / np.broadcast_to(step, len(found.weight))[rows]
    off = np.abs(added - np.rint(added))
    return bool((np.abs(added) < BIAS_RANGE).all() and (off <= np.maximum(1e-3, 4e-7 * np.abs(added))).all())


def _stored_bias(stored: Stored, found: Linear, rows: np.ndarray | None, bias: np.ndarray) -> Stored:
    """Return a bias in integers with the kept rows, and with what constants add."""
    if stored.integers.size != len(found.weight):  # one for all rows
        return stored
    kept = np.arange(len(found.weight)) if rows is None else rows
    step = np.broadcast_to(stored.scale.astype(np.float64), len(found.weight))[kept]
    added = np.rint((bias - found.bias[kept]) / step).astype(np.int64)
    integers = (stored.integers.ravel()[kept] + added).astype(stored.integers.dtype)
    shape = [len(kept) if size > 1 else 1 for size in stored.integers.shape]
    return stored.part(integers.reshape(shape), rows)


def _weights(node: Node, form: Form) -> Stored:
    stored = node.inputs[form.roles(node)[0][0]].stored
    assert stored is not None
    return stored


STORED = {op_type: _stored_rule(form) for op_type, form in FORMS.items()}
"""Operator -> its rule where its weights are stored quantised."""


def stored_weights_rule(node: Node) -> Rule | None:
    """Return the rule of a float linear operator whose weights are stored quantised, or None for any other node."""
    if node.op_type not in STORED or not any(operand.stored for operand in node.inputs[:2]):
        return None
    return STORED[node.op_type]


# --- QLinearConv, QLinearMatMul, ConvInteger, MatMulInteger -----------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """Where an integer operator has its inputs; None for what it does not have."""

    value: int
    value_zero: int
    weight: int
    weight_zero: int
    value_scale: int | None = None
    weight_scale: int | None = None
    out_scale: int | None = None
    out_zero: int | None = None
    bias: int | None = None

    @property
    def twin_weight(self) -> int:
        """The slot of the weights in the float operator."""
        return 1 if self.value < self.weight else 0

    def scalars(self) -> list[int]:
        """Return the slots of what there is one of."""
        wanted = (self.value_zero, self.value_scale, self.out_scale, self.out_zero)
        return [slot for slot in wanted if slot is not None]

    def by_row(self) -> list[tuple[int, str]]:
        """Return the slots of the weights' parameters, which may go by row."""
        scale = [] if self.weight_scale is None else [(self.weight_scale, "step")]
        return [*scale, (self.weight_zero, "zero point")]


QLINEAR_CONV_SLOTS = Slots(0, 2, 3, 5, value_scale=1, weight_scale=4, out_scale=6, out_zero=7, bias=8)
QLINEAR_LEFT = Slots(0, 2, 3, 5, value_scale=1, weight_scale=4, out_scale=6, out_zero=7)
QLINEAR_RIGHT = Slots(3, 5, 0, 2, value_scale=4, weight_scale=1, out_scale=6, out_zero=7)
INTEGER_LEFT, INTEGER_RIGHT = Slots(0, 2, 1, 3), Slots(1, 3, 0, 2)


def _integer_rule(form: Form, left: Slots, right: Slots, types: frozenset[str]) -> Rule:
    """Return the rule of an operator on integers, from the form of the float operator that it stands for.

    ``left`` and ``right`` are the slots by the side on which its value is.
    """

    def slots(node: Node) -> Slots:
        return left if node.inputs[left.value].is_value else right

    def read(node: Node) -> Linear | str:
        at = slots(node)
        why = _uncovered(node, at)
        found = why or form.read(_float_twin(node, at))
        if isinstance(found, str):
            return found
        zero = node.input(at.value_zero)
        if zero is None or zero.array is not None:
            level = 0.0 if zero is None or zero.array is None else float(zero.array.ravel()[0])
            bias = None if at.bias is None else node.input(at.bias)
            takes = None if bias is None else lambda column, amount: _is_whole(found, column, amount, 1.0)
            return replace(found, slot=at.value, columns=partial(columns_apart, zero=level, takes=takes))
        return replace(found, slot=at.value, columns=partial(columns_apart, point=partial(zero_of, zero)))

    def roles(node: Node) -> list[tuple[int, int, str]]:
        at = slots(node)
        place = {at.twin_weight: at.weight, 2: at.bias}
        found = [(place[slot], axis, role) for slot, axis, role in form.roles(_float_twin(node, at))]
        own = [(slot, axis, role) for slot, axis, role in found if slot is not None]
        return [*own, *((slot, 0, role) for slot, role in at.by_row())]

    def write(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
        at, found = slots(node), read(node)
        assert isinstance(found, Linear)
        rows = edit.kept(node.outputs[0], found.out_axis)
        for slot, _ in at.by_row():
            array = node.constant(slot)
            if array is not None and array.size > 1 and rows is not None:
                edit.set_constant(slot, array[rows])
        if at.bias is not None and node.input(at.bias) is not None:
            edit.set_constant(at.bias, np.rint(bias).astype(np.int32))
        zero = _zero_by_row(node, at)
        if zero.size > 1 and rows is not None:
            zero = np.take(zero, rows, axis=int(np.argmax(zero.shape)))

        def set_constant(slot: int, array: np.ndarray) -> None:
            old = node.inputs[at.weight].array
            if slot == at.twin_weight and old is not None:
                edit.set_constant(at.weight, (array.astype(np.int64) + zero).astype(old.dtype))

        form.write(_float_twin(node, at), cast(Edit, _Redirected(edit, set_constant)), weight, bias, groups)

    plain = linear_rule(read, write, roles)

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        demands, zero = plain.live(node, outs, view), slots(node).value_zero
        return demands if zero not in node.value_slots else demands | {zero: Demand(np.ones((), dtype=bool))}

    def facts(node: Node, view: View) -> list[Fact] | str | None:
        found, at = plain.facts(node, view), slots(node)
        if not isinstance(found, list) or at.out_scale is None:
            return found
        return [_requantised(node, at, found[0], view)]

    return replace(plain, facts=facts, live=live, types=types)


def _uncovered(node: Node, at: Slots) -> str | None:
    """Return why an operator on integers is beyond the rule."""
    weight, value = node.constant(at.weight), node.inputs[at.value]
    if weight is None or not value.is_value:
        return "its weights are computed"
    if weight.dtype not in (np.int8, np.uint8) or weight.ndim < 2:
        return "its weights are not a matrix of bytes"
    if "MatMul" in node.op_type and weight.ndim > 2:
        return "its constant is a batch of matrices"
    rows = weight.shape[_row_axis(node, at)]
    for slot, sizes in [(slot, (1, rows)) for slot, _ in at.by_row()] + [(slot, (1,)) for slot in at.scalars()]:
        operand = node.input(slot)
        if operand is None:
            continue
        if operand.array is None and not (slot == at.value_zero and at.out_scale is None and operand.rank == 0):
            return "its scales or zero points are computed"
        if operand.array is not None and (operand.array.size not in sizes or operand.array.ndim > 1):
            return "its scales or zero points do not go by output channel"
    bias = None if at.bias is None else node.input(at.bias)
    return "its bias is computed" if bias is not None and bias.array is None else None


def _row_axis(node: Node, at: Slots) -> int:
    """Return the axis of the weights that makes outputs: the last of a matrix on the right, else the first."""
    return 1 if at.twin_weight == 1 and "MatMul" in node.op_type else 0


def _zero_by_row(node: Node, at: Slots) -> np.ndarray:
    """Return the weights' zero points so that they broadcast with the weights, int64."""
    weight, zero = node.constant(at.weight), node.constant(at.weight_zero)
    assert weight is not None
    column = [1] * weight.ndim
    if zero is not None and zero.size > 1:
        column[_row_axis(node, at)] = -1
    return (np.zeros(1, dtype=np.int64) if zero is None else zero.astype(np.int64)).reshape(column)


def _float_twin(node: Node, at: Slots) -> Node:
    """Return the float operator on the same value that has the weights less their zero points (exact in float32)."""
    weight = node.constant(at.weight)
    assert weight is not None
    centred = (weight.astype(np.int64) - _zero_by_row(node, at)).astype(np.float32)
    inputs = [node.inputs[at.value]]
    inputs.insert(at.twin_weight, Operand(node.inputs[at.weight].name, centred, centred.shape, "float32"))
    bias = None if at.bias is None else node.input(at.bias)
    return replace(node, inputs=(*inputs, *([] if bias is None else [bias])))


def _requantised(node: Node, at: Slots, fact: Fact, view: View) -> Fact:
    """Return the fact of sums of products after scaling, rounding and adding the zero point."""
    value_scale, weight_scale, out_scale, out_zero = (
        np.asarray(None if slot is None else node.constant(slot)).ravel()
        for slot in (at.value_scale, at.weight_scale, at.out_scale, at.out_zero)
    )
    step = (out_scale / (value_scale * weight_scale)).astype(np.float32)
    step = np.broadcast_to(step.reshape(fact.shape if step.size > 1 else ()), fact.shape)
    level = np.full(fact.shape, float(out_zero[0]))
    by = Fact(np.zeros(fact.shape, dtype=np.int64), step.astype(np.float64), level)
    to = node.outputs[0].dtype
    number = view.numbers.of_facts((node.op_type, to), fact, by)
    value, sure = rounded(fact.shift, step, level, to)
    constant = fact.constant & sure
    return make(number, np.where(constant, 0.0, 1.0), np.where(constant, value, 0.0))


BYTES, SUMS = frozenset({"int8", "uint8"}), frozenset({"int32"})
QLINEAR_CONV = _integer_rule(FORMS["Conv"], QLINEAR_CONV_SLOTS, QLINEAR_CONV_SLOTS, BYTES)
QLINEAR_MATMUL = _integer_rule(FORMS["MatMul"], QLINEAR_LEFT, QLINEAR_RIGHT, BYTES)
CONV_INTEGER = _integer_rule(FORMS["Conv"], INTEGER_LEFT, INTEGER_LEFT, SUMS)
MATMUL_INTEGER = _integer_rule(FORMS["MatMul"], INTEGER_LEFT, INTEGER_RIGHT, SUMS)
