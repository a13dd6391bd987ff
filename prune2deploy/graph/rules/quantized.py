"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear of computed values.

Rounding has no inverse, so of an affine fact only what is equal passes: equal inputs with equal scale and zero point
give equal results. A constant is rounded as the runtime does; one so near the middle between two integers that another
way of dividing would round it differently is not taken for a constant.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from prune2deploy.graph.fact import Fact, Numbers, make, with_layout
from prune2deploy.graph.node import FLOATS, Node, Operand
from prune2deploy.graph.rules.base import Axis, Demand, Edit, Part, Rule, View
from prune2deploy.graph.rules.channelwise import nothing_to_drop, same_layout_live, same_layout_ties

INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32"})
"""Types of quantised values."""

MIDDLE = 1e-3
"""A quotient so near the middle between two integers may be rounded either way."""


@dataclass(frozen=True, eq=False)
class Parameters:
    """Scale and zero point of a Quantize or DequantizeLinear, float64; both [] or one per index of ``axis``."""

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None

    def fact(self, rank: int) -> Fact:
        """Return scale and zero point in the place of scale and shift, to be part of keys; [1, .., size, .., 1]."""
        column = [1] * rank
        if self.axis is not None:
            column[self.axis] = -1
        scale, zero_point = (part.reshape(column) for part in (self.scale, self.zero_point))
        return Fact(np.zeros(scale.shape, dtype=np.int64), scale, zero_point)


def parameters(node: Node) -> Parameters | str:
    """Return the parameters of a Quantize or DequantizeLinear, or why they are beyond the rule."""
    scale, zero_point = node.constant(1), node.constant(2)
    if scale is None or (zero_point is None and node.input(2) is not None):
        return "its scale or zero point is computed"
    if scale.ndim > 1 or node.attribute("block_size", 0):
        return "its scales go by block"
    rank = node.inputs[0].rank or 0
    shape = node.inputs[0].shape or ()
    axis = None
    if scale.size > 1:
        axis = int(node.attribute("axis", 1)) % rank
        if shape[axis] != scale.size:
            return "its scales do not fit its input"
    values = scale.astype(np.float64).reshape(-1 if axis is not None else ())
    if not (np.isfinite(values).all() and (values > 0).all()):
        return "its scale is not positive"
    if zero_point is None:
        return Parameters(values, np.zeros(values.shape), axis)
    if zero_point.size != scale.size:
        return "its scale and zero point have different sizes"
    return Parameters(values, zero_point.astype(np.float64).reshape(values.shape), axis)


def rounded(value: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, to: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values by a scale of their type, rounded half to even and saturated, and where that is beyond doubt."""
    limits, epsilon = np.iinfo(to), ml_dtypes.finfo(scale.dtype).eps  # type: ignore[no-untyped-call]
    with np.errstate(over="ignore"):
        quotient = (value.astype(scale.dtype) / scale).astype(np.float64)
    doubt = np.maximum(MIDDLE, 4 * float(epsilon) * np.abs(quotient))
    low, middle, high = (
        np.clip(np.rint(quotient + sign * doubt) + zero_point, limits.min, limits.max) for sign in (-1.0, 0.0, 1.0)
    )
    return middle, low == high


def _prepared(node: Node, view: View, own: Parameters) -> tuple[Fact, Fact]:
    """Return the input's fact and that of the parameters, in one layout."""
    operand = node.inputs[0]
    fact = view.of(operand)
    assert operand.shape is not None
    if own.axis is not None and fact.shape[own.axis] == 1:
        axes = [axis for axis, size in enumerate(fact.shape) if size > 1 or axis == own.axis]
        sizes = [len(own.scale) if axis == own.axis else fact.shape[axis] for axis in axes]
        fact = with_layout(fact, axes, sizes, operand.shape, view.numbers)
    by = own.fact(len(fact.shape))
    return fact, by.map(lambda array: np.broadcast_to(array, fact.shape))


def _quantize_facts(node: Node, view: View) -> list[Fact] | str | None:
    own = parameters(node)
    if isinstance(own, str):
        return own
    kind, to = node.inputs[0].dtype, node.outputs[0].dtype
    if kind != node.inputs[1].dtype or kind not in FLOATS or node.attribute("precision", 0):
        return "its input and scale have different types"
    fact, by = _prepared(node, view, own)
    number = view.numbers.of_facts(("QuantizeLinear", kind, to), fact, by)
    value, sure = rounded(fact.shift, by.scale.astype(kind), by.shift, to)
    constant = fact.constant & sure
    return [make(number, np.where(constant, 0.0, 1.0), np.where(constant, value, 0.0))]


def _dequantize_facts(node: Node, view: View) -> list[Fact] | str | None:
    own = parameters(node)
    if isinstance(own, str):
        return own
    if node.inputs[0].dtype not in INTEGERS:
        return f"it reads values of type {node.inputs[0].dtype}"
    fact, by = _prepared(node, view, own)
    kind = node.outputs[0].dtype
    number = view.numbers.of_facts(("DequantizeLinear", kind), fact, by)
    value = ((fact.shift - by.shift).astype(kind) * by.scale.astype(kind)).astype(np.float64)
    return [make(number, np.where(fact.constant, 0.0, 1.0), np.where(fact.constant, value, 0.0))]


def _slice_parameters(node: Node, edit: Edit) -> None:
    for part in _parts(node, edit.view):
        kept = edit.kept(node.outputs[0], part.axis.axis)
        array = node.constant(part.slot)
        if kept is not None and array is not None:
            edit.set_constant(part.slot, array[kept])


def _parts(node: Node, view: View) -> list[Part]:
    own = parameters(node)
    if isinstance(own, str) or own.axis is None:
        return []
    axis = Axis(node.outputs[0].name, own.axis)
    return [
        Part(slot, 0, role, axis, np.arange(len(own.scale)))
        for slot, role in ((1, "step"), (2, "zero point"))
        if node.constant(slot) is not None
    ]


QUANTIZE_LINEAR = Rule(
    _quantize_facts, same_layout_live, same_layout_ties, _slice_parameters, "activation", _parts, types=INTEGERS
)
DEQUANTIZE_LINEAR = Rule(
    _dequantize_facts, same_layout_live, same_layout_ties, _slice_parameters, "activation", _parts, types=FLOATS
)


def zero_of(operand: Operand, numbers: Numbers) -> int:
    """Return the number of a computed zero point: positions that are 0 before dynamic quantisation equal it."""
    return numbers.intern(("zero point", operand.name))


def _dynamic_facts(node: Node, view: View) -> list[Fact]:
    """The range always holds 0, so a 0 becomes the zero point; all else depends on the whole tensor's range."""
    fact, numbers = view.of(node.inputs[0]), view.numbers
    signature: Hashable = ("DynamicQuantizeLinear", node.index)
    point = zero_of(node.outputs[2], numbers)
    number = np.where(_is_zero(fact), point, numbers.of_facts(signature, fact))
    scalars = [Fact(np.array(scalar), np.ones(()), np.zeros(())) for scalar in (numbers.intern((signature, 1)), point)]
    return [Fact(number, np.ones(fact.shape), np.zeros(fact.shape)), *scalars]


def _is_zero(fact: Fact) -> np.ndarray:
    return np.asarray(fact.constant & (fact.shift == 0))


def _dynamic_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    """The range reads every position but zeros (of equal ones all: one that is kept and not live may hold anything)."""
    reads = ~_is_zero(view.of(node.inputs[0]))
    return {0: Demand(reads if outs[0] is None else reads | outs[0])}


DYNAMIC_QUANTIZE_LINEAR = Rule(
    _dynamic_facts, _dynamic_live, same_layout_ties, nothing_to_drop, "activation", types=INTEGERS | FLOATS
)
