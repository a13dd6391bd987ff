"""Pooling over space: MaxPool, AveragePool, LpPool and their global forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import ONE, Fact, collapse, make
from prune2deploy.graph.node import FLOATS, Node
from prune2deploy.graph.rules.base import Demand, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.channelwise import nothing_to_drop, same_layout_live, same_layout_ties


def linear_window(fact: Fact, signature: object, *, border: bool, view: View) -> Fact:
    """Return the fact of a linear operator on collapsed axes that maps 1 to 1, except at a zero ``border``.

    L(s X + t) = s L(X) + t L(1), and L(1) = 1 without a border. With one, L(1) is a function of its own: constants
    become multiples of it, and only where shift is 0 does the scale pass.
    """
    mark = view.numbers.intern(("window", str(signature)))
    constant = fact.constant
    if not border:
        number = view.numbers.of_facts(mark, fact, scale=False, shift=False)
        return make(number, fact.scale, fact.shift)
    plain = constant | (fact.shift == 0)
    keyed = Fact(
        np.where(constant, ONE, fact.number), np.where(plain, 1.0, fact.scale), np.where(plain, 0.0, fact.shift)
    )
    scale = np.where(constant, fact.shift, np.where(plain, fact.scale, 1.0))
    return make(view.numbers.of_facts(mark, keyed), scale, np.zeros(fact.shape))


def _signature(node: Node) -> object:
    return (node.op_type, sorted(node.attributes.items(), key=lambda item: item[0]), node.inputs[0].shape)


def _padded(node: Node) -> bool:
    """Whether a window can reach beyond the input: by padding, or by one more step than fits."""
    given = max(node.attribute("pads", [0])) > 0 or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return bool(given or node.attribute("ceil_mode", 0))


def _hollow(node: Node) -> bool:
    """Whether a window may hold nothing but padding: its taps may step over a small input."""
    dilations = node.attribute("dilations") or [1]
    if max(dilations) == 1 or not _padded(node):
        return False
    sizes = (node.inputs[0].shape or ())[2:]
    return not all(isinstance(n, int) and n >= d for n, d in zip(sizes, dilations, strict=False))


def _checked(facts: Callable[[Node, View], list[Fact]]) -> Callable[[Node, View], list[Fact] | str]:
    """Return facts that decline what no pool's facts hold for."""

    def checked(node: Node, view: View) -> list[Fact] | str:
        return "a window may hold nothing but padding" if _hollow(node) else facts(node, view)

    return checked


def _map(node: Node, view: View) -> Fact:
    """Return the fact of what is pooled, without positions in space: a window takes what lies in it together."""
    operand = node.inputs[0]
    fact = view.of(operand)
    for axis in range(2, len(fact.shape)):
        fact = collapse(fact, axis, operand.shape or (), view.numbers)
    return fact


def _average_facts(node: Node, view: View) -> list[Fact]:
    border = bool(_padded(node) and node.attribute("count_include_pad", 0))
    return [linear_window(_map(node, view), _signature(node), border=border, view=view)]


def _lp_facts(node: Node, view: View) -> list[Fact]:
    """Sum |x|^p, to the power of 1/p: a multiple passes with its magnitude, and 1 gives 1 times a function of its own.

    Without padding that function is the number of the window's elements, to the power of 1/p.
    """
    fact = _map(node, view)
    plain = fact.constant | (fact.shift == 0)
    factor = np.where(fact.constant, np.abs(fact.shift), np.where(plain, np.abs(fact.scale), 1.0))
    keyed = Fact(fact.number, np.where(plain, 1.0, fact.scale), np.where(plain, 0.0, fact.shift))
    number = view.numbers.of_facts(("lp", str(_signature(node))), keyed)
    whole = (node.inputs[0].shape or ())[2:] if node.op_type == "GlobalLpPool" else node.attribute("kernel_shape")
    sizes = [int(size) for size in whole if isinstance(size, int)]
    if len(sizes) < len(whole) or _padded(node):
        return [make(number, factor, np.zeros(fact.shape))]
    count = float(np.prod(np.array(sizes, dtype=np.float64))) ** (1.0 / float(node.attribute("p", 2)))
    return [make(number, np.where(fact.constant, 0.0, factor), np.where(fact.constant, factor * count, 0.0))]


# --- MaxPool: its second output counts places over all channels, so a reader of that keeps them all -------------------


def _max_facts(node: Node, view: View) -> list[Fact]:
    fact = _map(node, view)
    keyed = Fact(fact.number, np.where(fact.scale < 0, -1.0, 1.0), fact.shift)  # max(s X + t) = s max(X) + t for s > 0
    number = view.numbers.of_facts(str(_signature(node)), keyed, shift=False)
    place = np.arange(fact.number.size).reshape(fact.shape)
    ones, zeros = np.ones(fact.shape), np.zeros(fact.shape)
    indices = view.numbers.of_facts(("indices", str(_signature(node))), fact, Fact(place, ones, zeros))
    return [make(number, np.abs(fact.scale), fact.shift), make(indices, ones, zeros)]


def _max_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    mask = outs[0] if outs[0] is not None else np.zeros(view.of(node.outputs[0]).shape, dtype=bool)
    if len(outs) > 1 and outs[1] is not None:
        mask = mask | outs[1].any()
    return {0: Demand(mask)}


def _max_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    operand = node.inputs[0]
    axes = range(len(view.of(operand).shape))
    for slot, output in enumerate(node.outputs):
        if not positions.has(output.name):
            continue  # nobody reads it
        for axis in axes:
            yield from tie_axes(positions, (output.name, axis), (operand.name, axis))
            if slot == 1:
                yield freeze(positions.ids(operand.name, axis))


def _pool(facts: Callable[[Node, View], list[Fact]]) -> Rule:
    return Rule(_checked(facts), same_layout_live, same_layout_ties, nothing_to_drop, "pool")


AVERAGE_POOL = _pool(_average_facts)
LP_POOL = _pool(_lp_facts)
MAX_POOL = Rule(
    _checked(_max_facts), _max_live, _max_ties, nothing_to_drop, "pool", types=FLOATS | {"int8", "int64", "uint8"}
)
