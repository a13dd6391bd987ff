"""Pooling and means over collapsed axes: MaxPool, AveragePool, GlobalAveragePool, GlobalMaxPool, ReduceMean."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import ONE, Fact, make
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Rule, View, tie_axes
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


def _only_channels(node: Node, view: View) -> bool:
    """Whether nothing but batch and channels is expanded, and a single output is used."""
    used = [output for output in node.outputs if output.name]
    return len(used) == 1 and node.inputs[0].rank is not None and max(view.of(node.inputs[0]).shape[2:], default=1) == 1


def _average_facts(node: Node, view: View) -> list[Fact] | None:
    if not _only_channels(node, view):
        return None
    auto_pad = node.attribute("auto_pad", "NOTSET")
    padded = (
        max(node.attribute("pads", [0])) > 0 or auto_pad not in ("NOTSET", "VALID") or node.attribute("ceil_mode", 0)
    )
    border = bool(padded and node.attribute("count_include_pad", 0))
    return [linear_window(view.of(node.inputs[0]), _signature(node), border=border, view=view)]


def _max_facts(node: Node, view: View) -> list[Fact] | None:
    if not _only_channels(node, view):
        return None
    fact = view.of(node.inputs[0])
    keyed = Fact(fact.number, np.where(fact.scale < 0, -1.0, 1.0), fact.shift)  # max(s X + t) = s max(X) + t for s > 0
    number = view.numbers.of_facts(str(_signature(node)), keyed, shift=False)
    return [make(number, np.abs(fact.scale), fact.shift)]


def _window_rule(facts: Callable[[Node, View], list[Fact] | None]) -> Rule:
    return Rule(facts, same_layout_live, same_layout_ties, nothing_to_drop, "pool")


AVERAGE_POOL = _window_rule(_average_facts)
MAX_POOL = _window_rule(_max_facts)


def _reduced_axes(node: Node) -> list[int] | None:
    """Return the axes that a reduction removes, not negative, or None where they or the rank are not known."""
    rank = node.inputs[0].rank
    if rank is None:
        return None
    axes = node.attribute("axes")
    if axes is None and node.input(1) is not None:
        given = node.constant(1)
        if given is None:
            return None
        axes = given.ravel().tolist()
    if not axes:
        return [] if node.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return sorted(int(axis) % rank for axis in axes)


def _mean_facts(node: Node, view: View) -> list[Fact] | None:
    axes = _reduced_axes(node)
    fact = view.of(node.inputs[0])
    if axes is None or any(fact.shape[axis] > 1 for axis in axes):
        return None  # a mean over channels reads every one of them
    result = linear_window(fact, ("ReduceMean", axes, node.inputs[0].shape, fact.shape), border=False, view=view)
    if not node.attribute("keepdims", 1):
        result = result.map(lambda array: array.squeeze(axis=tuple(axes)))
    return [result]


def _mean_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    assert outs[0] is not None
    return {0: Demand(outs[0].reshape(view.of(node.inputs[0]).shape))}


def _mean_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    axes = _reduced_axes(node) or []
    rank = len(view.of(node.inputs[0]).shape)
    kept = list(range(rank)) if node.attribute("keepdims", 1) else [axis for axis in range(rank) if axis not in axes]
    for out_axis, in_axis in enumerate(kept):
        yield from tie_axes(positions, (node.outputs[0].name, out_axis), (node.inputs[0].name, in_axis))


REDUCE_MEAN = Rule(_mean_facts, _mean_live, _mean_ties, nothing_to_drop, "pool")
