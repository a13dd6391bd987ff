"""What is known of the results of elementwise operators on floats: sums, products, extrema, powers, choices.

The operands' facts are aligned: equal numbers are equal functions on the result's domain. Each function gives the
result in normal form, so that results that differ only by a factor or an offset share a number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prune2deploy.graph.fact import ONE, Fact, make
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import View
from prune2deploy.graph.rules.elementwise import Combine, Facts

Term = tuple[int, float, float]
"""Number, scale and shift of one operand at one position."""


def _usable(factor: np.ndarray) -> np.ndarray:
    """Whether a scale can be passed on: one that under- or overflowed would make a constant of a function."""
    return np.asarray(np.isfinite(factor) & (factor != 0))


def _passed(fact: Fact) -> Fact:
    """Return the fact with its scale taken out."""
    return Fact(fact.number, np.ones(fact.shape), fact.shift)


def _chosen(where: np.ndarray, a: Fact, b: Fact) -> Fact:
    return make(
        np.where(where, a.number, b.number), np.where(where, a.scale, b.scale), np.where(where, a.shift, b.shift)
    )


# --- sums -------------------------------------------------------------------------------------------------------------


def combination(coefficients: Callable[[int], list[float]]) -> Combine:
    """Return how a linear combination of its operands, with coefficients by their count, treats facts."""

    def combine(node: Node, facts: Facts, view: View) -> Fact:
        factors = coefficients(len(facts))
        number = np.stack([fact.number for fact in facts])
        scale = np.stack([factor * fact.scale for factor, fact in zip(factors, facts, strict=True)])
        shift = np.sum([factor * fact.shift for factor, fact in zip(factors, facts, strict=True)], axis=0)
        number, scale = _collected(number, scale)
        largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=0)[None], axis=0)[0]
        one = (scale != 0).sum(axis=0) <= 1  # a single function is left, or none
        found = np.where(one, number.max(axis=0), ONE)
        if not one.all():
            mark = view.numbers.intern(("sum",))
            ratios = scale[:, ~one] / largest[~one]
            rows = zip(number[:, ~one].T.tolist(), ratios.T.tolist(), strict=True)
            keys = [tuple((n, r) for n, r in zip(*row, strict=True) if r) for row in rows]
            found[~one] = view.numbers.intern_all((mark, key) for key in keys)
        return make(found, largest, shift)

    return combine


def _collected(number: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort the terms (first axis) by number and add up those of one number; what is left over has scale 0."""
    order = np.argsort(number, axis=0, kind="stable")
    number, scale = np.take_along_axis(number, order, axis=0), np.take_along_axis(scale, order, axis=0)
    for i in range(1, len(number)):
        same = number[i] == number[i - 1]
        scale[i] = np.where(same, scale[i] + scale[i - 1], scale[i])
        scale[i - 1] = np.where(same, 0.0, scale[i - 1])
    return np.where(scale == 0, ONE, number), scale


# --- products ---------------------------------------------------------------------------------------------------------


def product(node: Node, facts: Facts, view: View) -> Fact:
    """Return the facts of a product: (s X)(s' Y) = s s' (X Y)."""
    a, b = facts
    held = np.where(a.constant, a.shift, b.shift)
    other = _chosen(a.constant, b, a)
    single = make(other.number, held * other.scale, held * other.shift)
    swap = a.number > b.number
    first, second = _chosen(swap, b, a), _chosen(swap, a, b)
    factor = a.scale * b.scale
    plain = (a.shift == 0) & (b.shift == 0) & _usable(factor)
    keys = tuple(_chosen(plain, _passed(fact), fact) for fact in (first, second))
    both = make(view.numbers.of_facts(("product",), *keys), np.where(plain, factor, 1.0), np.zeros(a.shape))
    return _chosen(a.constant | b.constant, single, both)


def quotient(node: Node, facts: Facts, view: View) -> Fact | str:
    """Return the facts of a quotient; nothing is known of 0 / y and of y / y, where y may be 0."""
    a, b = facts
    if (b.constant & (b.shift == 0)).any():
        return "it divides by a constant 0"
    divisor = np.where(b.constant, b.shift, 1.0)
    by_constant = make(a.number, a.scale / divisor, a.shift / divisor)
    above = np.where(a.constant, a.shift, a.scale)  # s X / (s' Y) = (s / s') (X / Y); a constant is s times one
    with np.errstate(all="ignore"):
        factor = above / np.where(b.constant, 1.0, b.scale)
    plain = (a.constant | (a.shift == 0)) & (b.shift == 0) & _usable(factor)
    numerator = Fact(a.number, np.where(plain, 1.0, a.scale), np.where(plain, 0.0, a.shift))
    number = view.numbers.of_facts(("quotient",), numerator, _chosen(plain, _passed(b), b))
    return _chosen(b.constant, by_constant, make(number, np.where(plain, factor, 1.0), np.zeros(a.shape)))


def power(node: Node, facts: Facts, view: View) -> Fact:
    """Return the facts of a power: x**1 is x, x**0 is 1, and (s X)**p = s**p X**p for s > 0 and for whole p."""
    base, exponent = facts
    p = exponent.shift
    whole = exponent.constant & (p == np.rint(p))
    with np.errstate(all="ignore"):
        factor = np.where((base.scale > 0) | whole, np.power(base.scale, p), 0.0)
        value = np.power(base.shift, p)
    plain = ~base.constant & exponent.constant & (base.shift == 0) & _usable(factor)
    number = view.numbers.of_facts(("power",), _chosen(plain, _passed(base), base), exponent)
    found = make(number, np.where(plain, factor, 1.0), np.zeros(base.shape))
    one = Fact(np.full(base.shape, ONE), np.zeros(base.shape), np.ones(base.shape))
    found = _chosen(exponent.constant & (p == 0), one, _chosen(exponent.constant & (p == 1), base, found))
    constant = base.constant & exponent.constant
    return _chosen(constant, Fact(one.number, one.scale, np.where(constant, value, 0.0)), found)


def slope(node: Node, facts: Facts, view: View) -> Fact:
    """Return the facts of a PRelu: it passes a positive scale where the slopes are equal."""
    x, slopes = facts
    known = x.constant & (slopes.constant | (x.shift >= 0))
    value = np.where(x.shift < 0, slopes.shift * x.shift, x.shift)
    plain = ~x.constant & (x.shift == 0)
    keyed = Fact(x.number, np.where(plain, np.sign(x.scale), x.scale), x.shift)
    number = view.numbers.of_facts(("slope",), keyed, slopes)
    scale = np.where(known, 0.0, np.where(plain, np.abs(x.scale), 1.0))
    return make(number, scale, np.where(known, value, 0.0))


# --- extrema and choices ----------------------------------------------------------------------------------------------


def extremum(sign: float) -> Combine:
    """Return how Max (sign 1) and Min (-1) treat facts: max(s X + t, s Y + t) = s max(X, Y) + t for s > 0."""

    def combine(node: Node, facts: Facts, view: View) -> Fact:
        parts = [(fact.number, sign * fact.scale, sign * fact.shift) for fact in facts]
        columns = [[part.ravel().tolist() for part in found] for found in parts]
        rows = zip(*(zip(*column, strict=True) for column in columns), strict=True)
        found = [_highest(list(row), view) for row in rows]
        number, scale, shift = (np.array(part).reshape(facts[0].shape) for part in zip(*found, strict=True))
        return make(number.astype(np.int64), sign * scale, sign * shift)

    return combine


def _highest(terms: list[Term], view: View) -> Term:
    """Return the maximum of some terms: one of them, or a function keyed by the others relative to the first."""
    constants = [shift for _, scale, shift in terms if scale == 0]
    functions = sorted({term for term in terms if term[1] != 0})
    bound = [(ONE, 0.0, max(constants))] if constants else []
    if not functions:
        return bound[0]
    if len(functions) == 1 and not bound:
        return functions[0]
    _, scale, shift = functions[0]
    relative = tuple(sorted((n, s / scale, (t - shift) / scale) for n, s, t in functions + bound))
    return view.numbers.intern(("highest" if scale > 0 else "lowest", relative)), scale, shift


def choice(node: Node, facts: Facts, view: View) -> Fact:
    """Return the facts of a Where: of the chosen side where the condition is known or both sides are equal."""
    condition, yes, no = facts
    base = _chosen(yes.constant, no, yes)  # both sides relative to a function: s f(X, Y) + t
    scale, shift = (np.where(base.constant, default, part) for default, part in ((1.0, base.scale), (0.0, base.shift)))
    sides = tuple(Fact(side.number, side.scale / scale, (side.shift - shift) / scale) for side in (yes, no))
    found = make(view.numbers.of_facts(("choice", node.outputs[0].dtype), condition, *sides), scale, shift)
    found = _chosen(_equal(yes, no), yes, found)
    known = condition.constant
    return _chosen(known, _chosen(condition.shift != 0, yes, no), found)


def choice_matters(facts: Facts) -> list[np.ndarray]:
    """Return where a Where depends on its condition, its first and its second side."""
    condition, yes, no = facts
    return [
        ~_equal(yes, no) | condition.constant,
        ~(condition.constant & (condition.shift == 0)),
        ~(condition.constant & (condition.shift != 0)),
    ]


def _equal(a: Fact, b: Fact) -> np.ndarray:
    return np.asarray((a.number == b.number) & (a.scale == b.scale) & (a.shift == b.shift))
