"""Functions of one input, applied to every element: activations, roundings, Cast; one table from operator to function.

Constants are evaluated in float64 and rounded to the type in which the graph computes. A runtime's own approximations
differ from that, and from each other, by some units in the last place; so where a function jumps, a constant near the
jump is not taken for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import special

from prune2deploy.graph.fact import Fact, make
from prune2deploy.graph.node import FLOATS, Node
from prune2deploy.graph.rules.base import Edit, Rule, View
from prune2deploy.graph.rules.channelwise import nothing_to_drop, same_layout_live, same_layout_ties
from prune2deploy.graph.rules.precision import BOOL, COVERED, margin, rounded, unfit

Array = np.ndarray
Apply = Callable[[Array], Array]


@dataclass(frozen=True)
class Function:
    """An elementwise function of one input.

    Attributes:
        apply: the function on float64 arrays.
        degree: f(s x) = s**degree f(x) for s > 0: it passes a scale on.
        parity: f(-x) is -f(x) (``odd``) or f(x) (``even``).
        steps: whether it jumps.
    """

    apply: Apply
    degree: float | None = None
    parity: Literal["odd", "even"] | None = None
    steps: bool = False


FunctionOf = Callable[[Node], Function | str]
"""From a node to its function, or to why it is not covered."""


def activation(function_of: FunctionOf, types: frozenset[str] = FLOATS) -> Rule:
    """Return the rule of an elementwise function of one input."""

    def facts(node: Node, view: View) -> list[Fact] | str:
        reason = unfit(node.inputs[0]) or _unbounded(node)
        function = function_of(node) if reason is None else reason
        return function if isinstance(function, str) else _facts(function, node, view)

    return Rule(facts, same_layout_live, same_layout_ties, nothing_to_drop, "activation", types=types)


def _unbounded(node: Node) -> str | None:
    """Return which attribute would make NaN of a zero, if any; limits may be infinite."""
    found = (
        name
        for name, value in node.attributes.items()
        if isinstance(value, float) and not np.isfinite(value) and name not in ("min", "max")
    )
    return next((f"its {name} is not finite" for name in found), None)


def _facts(function: Function, node: Node, view: View) -> list[Fact] | str:
    fact = view.of(node.inputs[0])
    value, sure = _evaluated(function, fact, node)
    constants = tuple(None if part.array is None else part.array.tobytes() for part in node.inputs[1:])
    signature = (node.op_type, str(sorted(node.attributes.items())), constants, node.outputs[0].dtype)
    inner, outer = _split_scale(function, fact, node)
    number = view.numbers.of_facts(signature, Fact(fact.number, inner, fact.shift))
    found = make(number, np.where(sure, 0.0, outer), np.where(sure, value, 0.0))
    return [found] if np.isfinite(found.shift).all() else "a constant leaves its domain or its type"


def _evaluated(function: Function, fact: Fact, node: Node) -> tuple[Array, Array]:
    """Return the function's value where the input is constant, and where that is sure: far from any jump."""
    sure = fact.constant.copy()
    with np.errstate(all="ignore"):
        value = function.apply(fact.shift)
        if function.steps:
            by = margin(fact.shift, node.inputs[0].dtype)
            for moved in (function.apply(fact.shift - by), function.apply(fact.shift + by)):
                sure &= ~(np.abs(moved - value) > 4 * by)
        return rounded(np.where(sure, value, 0.0), node.outputs[0].dtype), sure


def _split_scale(function: Function, fact: Fact, node: Node) -> tuple[Array, Array]:
    """Return the scale inside the function and the one outside of it: f(s X) = outer f(inner X).

    Only in floating types: integers wrap.
    """
    if not {node.inputs[0].dtype, node.outputs[0].dtype} <= FLOATS:
        return fact.scale, np.ones(fact.shape)
    size, sign = np.abs(fact.scale), np.sign(fact.scale)
    inner = np.where(function.degree is None, size, 1.0) * np.where(function.parity is None, sign, 1.0)
    with np.errstate(all="ignore"):
        outer = np.ones(fact.shape) if function.degree is None else np.power(size, function.degree)
        outer = outer * sign if function.parity == "odd" else outer
    passes = ~fact.constant & (fact.shift == 0) & np.isfinite(outer) & (outer != 0)
    return np.where(passes, inner, fact.scale), np.where(passes, outer, 1.0)


# --- functions with parameters ----------------------------------------------------------------------------------------


def _number(node: Node, name: str, default: float) -> float:
    return float(node.attribute(name, default))


def _elu(node: Node) -> Function:
    alpha = _number(node, "alpha", 1.0)
    return Function(lambda x: np.where(x > 0, x, alpha * np.expm1(x)))


def _selu(node: Node) -> Function:
    alpha, gamma = _number(node, "alpha", 1.67326319217681884765625), _number(node, "gamma", 1.05070102214813232421875)
    return Function(lambda x: gamma * np.where(x > 0, x, alpha * np.expm1(x)))


def _celu(node: Node) -> Function:
    alpha = _number(node, "alpha", 1.0)
    return Function(lambda x: np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(x / alpha)))


def _hard_sigmoid(node: Node) -> Function:
    alpha, beta = _number(node, "alpha", 0.2), _number(node, "beta", 0.5)
    return Function(lambda x: np.clip(alpha * x + beta, 0, 1))


def _leaky_relu(node: Node) -> Function:
    alpha = _number(node, "alpha", 0.01)
    return Function(lambda x: np.where(x < 0, alpha * x, x), degree=1)


def _thresholded_relu(node: Node) -> Function:
    alpha = _number(node, "alpha", 1.0)
    return Function(lambda x: np.where(x > alpha, x, 0.0), degree=None if alpha else 1, steps=True)


def _shrink(node: Node) -> Function:
    bias, edge = _number(node, "bias", 0.0), _number(node, "lambd", 0.5)
    return Function(
        lambda x: np.where(x < -edge, x + bias, np.where(x > edge, x - bias, 0.0)),
        parity="odd" if edge >= 0 else None,
        steps=True,
    )


def _gelu(node: Node) -> Function | str:
    known: dict[str, Apply] = {
        "none": lambda x: x * special.ndtr(x),
        "tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    }
    mode = node.attribute("approximate", "none")
    return Function(known[mode]) if mode in known else f"its approximation is '{mode}'"


def _swish(node: Node) -> Function:
    alpha = _number(node, "alpha", 1.0)
    return Function(lambda x: x * special.expit(alpha * x))


def clip_bounds(node: Node) -> tuple[float, float] | None:
    """Return the bounds of a Clip, or None where they are computed."""
    if node.opset < 11:
        return float(node.attribute("min", -np.inf)), float(node.attribute("max", np.inf))
    if any(operand is not None and operand.array is None for operand in (node.input(1), node.input(2))):
        return None
    low, high = (
        default if bound is None or not bound.size else float(bound.ravel()[0])
        for bound, default in ((node.constant(1), -np.inf), (node.constant(2), np.inf))
    )
    return min(low, high), high


def _clip(node: Node) -> Function | str:
    bounds = clip_bounds(node)
    if bounds is None:
        return "its bounds are computed"
    if np.isnan(bounds).any():
        return "a bound is not a number"
    low, high = bounds
    scaled = all(bound in (0, -np.inf, np.inf) for bound in bounds)  # then the bounds scale with the input
    return Function(lambda x: np.minimum(np.maximum(x, low), high), degree=1 if scaled else None)


def _cast(node: Node) -> Function:
    source, target = node.inputs[0].dtype, node.outputs[0].dtype
    if target in BOOL:
        return Function(lambda x: (x != 0).astype(np.float64), steps=source in FLOATS)
    if target in FLOATS:
        return Function(lambda x: x)
    return Function(np.trunc, steps=source in FLOATS)


def _drop_cast_like(node: Node, edit: Edit) -> None:
    """Let a constant give the type, so that nothing computes a value only for its type."""
    if node.inputs[1].is_value:
        edit.set_constant(1, np.zeros((), dtype=np.dtype(node.outputs[0].dtype)))


# --- the table --------------------------------------------------------------------------------------------------------


def _plain(
    apply: Apply,
    *,
    degree: float | None = None,
    parity: Literal["odd", "even"] | None = None,
    steps: bool = False,
) -> FunctionOf:
    function = Function(apply, degree, parity, steps)
    return lambda node: function


FUNCTIONS: dict[str, FunctionOf] = {
    "Abs": _plain(np.abs, degree=1, parity="even"),
    "Acos": _plain(np.arccos),
    "Acosh": _plain(np.arccosh),
    "Asin": _plain(np.arcsin, parity="odd"),
    "Asinh": _plain(np.arcsinh, parity="odd"),
    "Atan": _plain(np.arctan, parity="odd"),
    "Atanh": _plain(np.arctanh, parity="odd"),
    "Cast": _cast,
    "Ceil": _plain(np.ceil, steps=True),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _plain(np.cos, parity="even"),
    "Cosh": _plain(np.cosh, parity="even"),
    "Elu": _elu,
    "Erf": _plain(special.erf, parity="odd"),
    "Exp": _plain(np.exp),
    "Floor": _plain(np.floor, steps=True),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "IsInf": _plain(np.zeros_like),  # constants are finite
    "IsNaN": _plain(np.zeros_like),
    "LeakyRelu": _leaky_relu,
    "Log": _plain(np.log),
    "Mish": _plain(lambda x: x * np.tanh(np.logaddexp(0, x))),
    "Not": _plain(lambda x: (x == 0).astype(np.float64)),
    "Reciprocal": _plain(np.reciprocal, degree=-1, parity="odd"),
    "Relu": _plain(lambda x: np.maximum(x, 0.0), degree=1),
    "Round": _plain(np.rint, parity="odd", steps=True),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _plain(special.expit),
    "Sign": _plain(np.sign, degree=0, parity="odd", steps=True),
    "Sin": _plain(np.sin, parity="odd"),
    "Sinh": _plain(np.sinh, parity="odd"),
    "Softplus": _plain(lambda x: np.logaddexp(0, x)),
    "Softsign": _plain(lambda x: x / (1 + np.abs(x)), parity="odd"),
    "Sqrt": _plain(np.sqrt, degree=0.5),
    "Swish": _swish,
    "Tan": _plain(np.tan, parity="odd"),
    "Tanh": _plain(np.tanh, parity="odd"),
    "ThresholdedRelu": _thresholded_relu,
}

TYPES: dict[str, frozenset[str]] = {
    **dict.fromkeys(("Abs", "Cast", "Clip", "Relu", "Sign"), COVERED),
    **dict.fromkeys(("IsInf", "IsNaN", "Not"), BOOL),
}
"""The types of results, where they are not the floating ones."""

RULES: dict[str, Rule] = {
    **{name: activation(function_of, TYPES.get(name, FLOATS)) for name, function_of in FUNCTIONS.items()},
    "CastLike": replace(activation(_cast, COVERED), drop=_drop_cast_like),
}
