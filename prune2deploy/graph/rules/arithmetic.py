"""The elementwise operators of one or more inputs: one table from operator to what it computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from prune2deploy.graph.node import FLOATS, Node
from prune2deploy.graph.rules import combine
from prune2deploy.graph.rules.base import Rule
from prune2deploy.graph.rules.elementwise import Constants, Operator, elementwise
from prune2deploy.graph.rules.precision import BOOL

Evaluate = Callable[[Node, Sequence[np.ndarray]], np.ndarray]


def folded(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Evaluate:
    """Return a function of two arrays as one of any number, taken from the left."""
    return lambda node, arrays: np.asarray(functools.reduce(function, arrays))


def _divided(node: Node, arrays: Sequence[np.ndarray]) -> np.ndarray:
    a, b = arrays
    if node.outputs[0].dtype in FLOATS:
        return np.asarray(a / b)
    whole, by = a.astype(np.int64), b.astype(np.int64)
    quotient = np.sign(whole) * np.sign(by) * (np.abs(whole) // np.abs(by))  # rounds towards zero
    return np.where(by == 0, np.nan, quotient)


def _remainder(node: Node, arrays: Sequence[np.ndarray]) -> np.ndarray:
    a, b = arrays
    return np.asarray(np.fmod(a, b) if node.attribute("fmod", 0) else np.mod(a, b))


def _no_zero_divisor(node: Node) -> str | None:
    divisor = node.constant(1)
    return "it divides by a constant 0" if divisor is not None and (divisor == 0).any() else None


def _known_slopes(node: Node) -> str | None:
    return "its slopes are computed" if node.constant(1) is None else None


def _side(constants: Constants) -> int | None:
    """Return which side a Where takes everywhere, or None where that depends."""
    condition = constants.get(0)
    if condition is None:
        return None
    return 1 if condition.all() else None if condition.any() else 2


def _comparison(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Operator:
    return Operator(lambda node, arrays: function(*arrays).astype(np.float64), steps=True, types=BOOL)


def _logic(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray], *, neutral: float, absorbing: float | None = None
) -> Operator:
    def evaluate(node: Node, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return function(arrays[0] != 0, arrays[1] != 0).astype(np.float64)

    return Operator(evaluate, neutral=neutral, absorbing=absorbing, types=BOOL)


def _mean(count: int) -> list[float]:
    return [1.0 / count] * count


OPERATORS: dict[str, Operator] = {
    "Add": Operator(folded(np.add), combine.combination(lambda count: [1.0, 1.0]), neutral=0),
    "And": _logic(np.logical_and, neutral=1, absorbing=0),
    "Div": Operator(_divided, combine.quotient, neutral=1, neutral_from=1, refuses=_no_zero_divisor),
    "Equal": _comparison(np.equal),
    "Greater": _comparison(np.greater),
    "GreaterOrEqual": _comparison(np.greater_equal),
    "Less": _comparison(np.less),
    "LessOrEqual": _comparison(np.less_equal),
    "Max": Operator(folded(np.maximum), combine.extremum(1.0), variadic=True),
    "Mean": Operator(
        lambda node, arrays: np.asarray(np.mean(arrays, axis=0)), combine.combination(_mean), types=FLOATS
    ),
    "Min": Operator(folded(np.minimum), combine.extremum(-1.0), variadic=True),
    "Mod": Operator(_remainder, steps=True, refuses=_no_zero_divisor),
    "Mul": Operator(folded(np.multiply), combine.product, neutral=1, absorbing=0),
    "Neg": Operator(lambda node, arrays: -arrays[0], combine.combination(lambda count: [-1.0])),
    "Or": _logic(np.logical_or, neutral=0, absorbing=1),
    "PRelu": Operator(
        lambda node, arrays: np.where(arrays[0] < 0, arrays[1] * arrays[0], arrays[0]),
        combine.slope,
        refuses=_known_slopes,
        kind="activation",
    ),
    "Pow": Operator(folded(np.power), combine.power, neutral=1, neutral_from=1),
    "Sub": Operator(folded(np.subtract), combine.combination(lambda count: [1.0, -1.0]), neutral=0, neutral_from=1),
    "Sum": Operator(folded(np.add), combine.combination(lambda count: [1.0] * count), neutral=0, variadic=True),
    "Where": Operator(
        lambda node, arrays: np.where(arrays[0] != 0, arrays[1], arrays[2]),
        combine.choice,
        any_type=True,
        matters=combine.choice_matters,
        passes=_side,
    ),
    "Xor": _logic(np.logical_xor, neutral=0),
}

RULES: dict[str, Rule] = {name: elementwise(operator) for name, operator in OPERATORS.items()}
