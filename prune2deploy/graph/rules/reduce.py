"""The ten reductions, over collapsed axes (space, batch) and over channels.

Over collapsed axes a channel stays a channel: its constant or its multiple passes as the operator allows. Over channels
the result reads all of them, except those that it can do without: a constant is put back behind the operator (a sum
misses ``c``, a mean also its share, a maximum ``max(y, c)``), and equal inputs of a maximum count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from prune2deploy.graph.constraints import Constraint, Positions
from prune2deploy.graph.fact import Fact, make
from prune2deploy.graph.node import Node, Operand
from prune2deploy.graph.rules.base import Choice, Demand, Edit, Rule, View, freeze, sliced, tie_axes
from prune2deploy.graph.rules.mixing import expanded_among, row_numbers, rows, signature, static_count

Split = Callable[[Fact, int | None], tuple[Fact, np.ndarray, np.ndarray]]
"""Facts and the number of elements to: what the result is keyed by, and the scale and shift that pass."""
Restored = list[tuple[str, np.ndarray]]
"""Operators to put behind, each with its constant, shaped like the operator's other operand."""


@dataclass(frozen=True)
class Reduction:
    """How one reduction treats constants, multiples, and channels that it reads together.

    Attributes:
        value: constants [..., k], each so many times, to the result [...].
        split: what passes of s X + t over collapsed axes.
        spares: of constants, which can be left out where channels are reduced; told whether their count is known.
        restore: constants that were left out [..., k] (0 where they are of no concern), their count, and the share of
            the channels that stay, to what puts them back.
        counts: whether the number of elements matters to constants other than 0.
        equal_once: whether equal inputs count once.
        keeps_single: whether the result over a single element is that element.
    """

    value: Callable[[np.ndarray, int], np.ndarray]
    split: Split
    spares: Callable[[np.ndarray, bool], np.ndarray]
    restore: Callable[[np.ndarray, int, float], Restored] = lambda c, count, share: []
    counts: bool = True
    equal_once: bool = False
    keeps_single: bool = True


# --- What passes over collapsed axes ----------------------------------------------------------------------------------


def _only(fact: Fact, where: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> tuple[Fact, np.ndarray, np.ndarray]:
    """Return the split that keys by the number alone where that is allowed, and by the whole fact elsewhere."""
    keyed = Fact(fact.number, np.where(where, 1.0, fact.scale), np.where(where, 0.0, fact.shift))
    return keyed, np.where(where, scale, 1.0), np.where(where, shift, 0.0)


def _linear(fact: Fact, count: int | None) -> tuple[Fact, np.ndarray, np.ndarray]:
    passes = np.broadcast_to(count is not None, fact.shape) | (fact.shift == 0)
    return _only(fact, passes, fact.scale, fact.shift * (count or 0))


def _extreme(fact: Fact, count: int | None) -> tuple[Fact, np.ndarray, np.ndarray]:
    keyed = Fact(fact.number, np.sign(fact.scale), np.zeros(fact.shape))  # max(s X + t) = s max(X) + t for s > 0
    return keyed, np.abs(fact.scale), fact.shift


def _power(degree: int) -> Split:
    def split(fact: Fact, count: int | None) -> tuple[Fact, np.ndarray, np.ndarray]:
        scale = np.abs(fact.scale) ** degree
        return _only(fact, (fact.shift == 0) & (scale > 0), scale, fact.shift)

    return split


def _shifted(fact: Fact, count: int | None) -> tuple[Fact, np.ndarray, np.ndarray]:
    return Fact(fact.number, fact.scale, np.zeros(fact.shape)), np.ones(fact.shape), fact.shift


def _whole(fact: Fact, count: int | None) -> tuple[Fact, np.ndarray, np.ndarray]:
    return fact, np.ones(fact.shape), np.zeros(fact.shape)


# --- The operators ----------------------------------------------------------------------------------------------------


def _log_sum_exp(c: np.ndarray, count: int) -> np.ndarray:
    top = c.max(axis=-1, keepdims=True)
    return np.asarray(top.squeeze(-1) + np.log(count * np.exp(c - top).sum(axis=-1)))


def _zeros(c: np.ndarray, counted: bool) -> np.ndarray:
    return np.asarray(c == 0)


def _zeros_or_all(c: np.ndarray, counted: bool) -> np.ndarray:
    return np.asarray((c == 0) | counted)


def _all(c: np.ndarray, counted: bool) -> np.ndarray:
    return np.ones(c.shape, dtype=bool)


def _none(c: np.ndarray, counted: bool) -> np.ndarray:
    return np.zeros(c.shape, dtype=bool)


def _add_back(of: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, int, float], Restored]:
    return lambda c, count, share: [("Add", of(c).sum(axis=-1) * count)]


def _mean_back(c: np.ndarray, count: int, share: float) -> Restored:
    """Return y = share * mean of those that stay + sum(c) / C, with C = (number left out) / (1 - share)."""
    rest = c.sum(axis=-1) * (1 - share) / c.shape[-1]
    return [("Mul", np.full(rest.shape, share)), ("Add", rest)]


_extreme_reduction = partial(Reduction, split=_extreme, spares=_all, counts=False, equal_once=True)

SUM = Reduction(lambda c, n: c.sum(axis=-1) * n, _linear, _zeros_or_all, _add_back(lambda c: c))
MEAN = Reduction(lambda c, n: c.mean(axis=-1), lambda fact, n: _linear(fact, 1), _all, _mean_back, counts=False)
MAX = _extreme_reduction(lambda c, n: c.max(axis=-1), restore=lambda c, n, share: [("Max", c.max(axis=-1))])
MIN = _extreme_reduction(lambda c, n: c.min(axis=-1), restore=lambda c, n, share: [("Min", c.min(axis=-1))])
PROD = Reduction(lambda c, n: c.prod(axis=-1) ** n, _whole, lambda c, counted: np.asarray(c == 1))
L1 = Reduction(lambda c, n: np.abs(c).sum(-1) * n, _power(1), _zeros_or_all, _add_back(np.abs), keeps_single=False)
L2 = Reduction(lambda c, n: np.sqrt((c * c).sum(axis=-1) * n), _power(1), _zeros, keeps_single=False)
SUM_SQUARE = Reduction(
    lambda c, n: (c * c).sum(axis=-1) * n, _power(2), _zeros_or_all, _add_back(np.square), keeps_single=False
)
LOG_SUM = Reduction(lambda c, n: np.log(c.sum(axis=-1) * n), _whole, _zeros, keeps_single=False)
LOG_SUM_EXP = Reduction(_log_sum_exp, _shifted, _none)


# --- The rule ---------------------------------------------------------------------------------------------------------


def _axes(node: Node) -> list[int] | None:
    """Return the axes that are removed, not negative, or None where they are computed."""
    rank = node.inputs[0].rank or 0
    axes = node.attribute("axes")
    if axes is None and node.input(1) is not None:
        given = node.constant(1)
        if given is None:
            return None
        axes = given.ravel().tolist()
    if not axes:
        return [] if node.attribute("noop_with_empty_axes", 0) else list(range(rank))
    return sorted({int(axis) % rank for axis in axes})


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a node reduces: all axes, those of them that have positions, and the number of elements along the rest."""

    axes: list[int]
    across: list[int]
    count: int | None

    @property
    def several(self) -> bool:
        """Whether there are positions along more than one of the axes; then nothing is left out."""
        return len(self.across) > 1


def _plan(node: Node, view: View) -> _Plan:
    axes, fact = _axes(node), view.of(node.inputs[0])
    assert axes is not None
    return _Plan(axes, expanded_among(fact, axes), static_count(node.inputs[0], fact, axes))


def _squeezed(node: Node, array: np.ndarray, axes: list[int]) -> np.ndarray:
    return array if node.attribute("keepdims", 1) else array.squeeze(axis=tuple(axes))


def _reduced_layout(fact: Fact, axes: list[int]) -> list[int]:
    return [1 if axis in axes else size for axis, size in enumerate(fact.shape)]


def _reduced_fact(node: Node, reduction: Reduction, view: View) -> Fact:
    """Return the result's fact with size 1 along the reduced axes."""
    plan, fact = _plan(node, view), view.of(node.inputs[0])
    mark = signature(node, plan.axes, fact)
    count = 1 if plan.count is None else plan.count
    constants, shifts = rows(fact.constant, plan.across), rows(fact.shift, plan.across)
    known = plan.count is not None or not reduction.counts
    if not known:  # so many zeros are zero, whatever their number, in a sum
        constants = constants & _zeros(shifts, False) & (reduction.spares(np.zeros(1), False)[0])
    layout = _reduced_layout(fact, plan.axes)
    constant = constants.all(axis=-1).reshape(layout)
    value = reduction.value(np.where(constants, shifts, 1.0), count).reshape(layout)
    if plan.across:
        number = row_numbers(fact, plan.across, mark, view)
        scale, shift = np.ones(layout), np.zeros(layout)
    else:  # a constant c is c times the function 1, whose result is a function of unknown sizes
        form = Fact(
            fact.number, np.where(fact.constant, fact.shift, fact.scale), np.where(fact.constant, 0.0, fact.shift)
        )
        keyed, scale, shift = reduction.split(form, plan.count)
        number = view.numbers.of_facts(mark, keyed)
    return make(number, np.where(constant, 0.0, scale), np.where(constant, value, shift))


def _left_out(reduction: Reduction, fact: Fact, wanted: np.ndarray, plan: _Plan, operand: Operand) -> np.ndarray:
    """Return which indices of the reduced channel axis can go; only at ``wanted`` positions does that matter."""
    axis = plan.across[0]
    spare = fact.constant & reduction.spares(fact.shift, plan.count is not None)
    if reduction.equal_once and operand.dtype == "bfloat16":
        spare = np.zeros_like(spare)  # Max and Min do not have this type before opset 13
    others = tuple(other for other in range(spare.ndim) if other != axis)
    return np.asarray((spare | ~wanted).all(axis=others))


def _equal_choices(fact: Fact, here: np.ndarray) -> tuple[np.ndarray, list[Choice]]:
    """Return the positions among ``here`` that have no equal there, and a choice for each set of equal ones."""
    sets: dict[tuple[int, float, float], list[int]] = {}
    for k in np.flatnonzero(here).tolist():
        key = (int(fact.number.flat[k]), float(fact.scale.flat[k]), float(fact.shift.flat[k]))
        sets.setdefault(key, []).append(k)
    alone = np.zeros(here.shape, dtype=bool)
    alone.flat[[members[0] for members in sets.values() if len(members) == 1]] = True
    return alone, [Choice(np.array(m), np.ones(len(m))) for m in sets.values() if len(m) > 1]


def _demand(node: Node, reduction: Reduction, out: np.ndarray, view: View) -> Demand:
    plan, fact = _plan(node, view), view.of(node.inputs[0])
    wanted = np.broadcast_to(out.reshape(_reduced_layout(fact, plan.axes)), fact.shape).copy()
    if not plan.across or plan.several or not wanted.any():
        return Demand(wanted)
    axis = plan.across[0]
    left = _left_out(reduction, fact, wanted, plan, node.inputs[0])
    if left.all():
        left[0] = False  # an axis does not shrink to 0
    column = [1] * wanted.ndim
    column[axis] = len(left)
    wanted &= ~left.reshape(column)
    if reduction.equal_once and fact.number.size == len(left):
        alone, choices = _equal_choices(fact, wanted)
        return Demand(alone, tuple(choices))
    return Demand(wanted)


def _restored(node: Node, reduction: Reduction, gone: np.ndarray, edit: Edit) -> Restored:
    """Return what is put behind a reduction whose channels ``gone`` are left out."""
    plan, fact = _plan(node, edit.view), edit.view.of(node.inputs[0])
    axis, layout = plan.across[0], _reduced_layout(fact, plan.axes)
    constant, shift = (np.moveaxis(part, axis, -1) for part in (fact.constant, fact.shift))
    left = gone
    if reduction.equal_once and constant.size == constant.shape[-1]:  # the others have their equals among what stays
        left = gone[constant.ravel()[gone]]
        stays = np.setdiff1d(np.flatnonzero(constant), gone)
        best = [reduction.value(shift.ravel()[some], 1) for some in (stays, np.union1d(stays, left)) if len(some)]
        if not len(left) or (len(stays) and best[0] == best[1]):
            return []
    share = 1 - len(gone) / fact.shape[axis]
    count = 1 if plan.count is None else plan.count
    found = reduction.restore(np.where(constant, shift, 0.0)[..., left], count, share)
    return [(op_type, _placed(node, array.reshape(layout), plan, edit)) for op_type, array in found]


def _placed(node: Node, array: np.ndarray, plan: _Plan, edit: Edit) -> np.ndarray:
    """Return an array of the reduced layout as the output will have it: kept positions only, without what is alike."""
    output = node.outputs[0]
    array = sliced(_squeezed(node, array, plan.axes), output, edit)
    uniform = bool((array == array.flat[0]).all())
    return np.asarray(array.flat[0] if uniform else array).astype(np.dtype(output.dtype))


_NEUTRAL = {"Add": 0.0, "Mul": 1.0}


def reduction_rule(reduction: Reduction) -> Rule:
    """Return the rule of one reduction."""

    def facts(node: Node, view: View) -> list[Fact] | str:
        axes = _axes(node)
        if axes is None:
            return "its axes are computed"
        if not axes and not reduction.keeps_single:
            return "without axes, runtimes differ in what it does"
        with np.errstate(all="ignore"):
            fact = _reduced_fact(node, reduction, view)
            finite = np.isfinite(fact.shift).all()
        if not finite:
            return "a constant has no finite result"
        return [fact.map(lambda array: _squeezed(node, array, axes))]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        assert outs[0] is not None
        return {0: _demand(node, reduction, outs[0], view)}

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        plan, operand = _plan(node, view), node.inputs[0]
        keepdims = node.attribute("keepdims", 1)
        place = 0
        for axis in range(len(view.of(operand).shape)):
            if axis not in plan.axes:
                yield from tie_axes(positions, (node.outputs[0].name, place), (operand.name, axis))
            elif plan.several:
                yield freeze(positions.ids(operand.name, axis))
            place += axis not in plan.axes or bool(keepdims)

    def drop(node: Node, edit: Edit) -> None:
        plan, operand = _plan(node, edit.view), node.inputs[0]
        if len(plan.across) != 1:
            return
        axis = plan.across[0]
        mask, out = edit.live(operand), edit.live(node.outputs[0])
        # Where another reader wants an index in some cells only, it may hold anything in those that this one reads.
        read = mask | ~out.reshape(_reduced_layout(edit.view.of(operand), plan.axes))
        live = np.asarray(read.all(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if live.all() or not live.any():
            return
        # What is kept for others' sake may hold anything: only live channels are right.
        kept = edit.kept(operand, axis)
        places = np.flatnonzero(live if kept is None else live[kept])
        if len(places) < (len(live) if kept is None else len(kept)):
            edit.gather(0, axis, places)
        for op_type, array in reversed(_restored(node, reduction, np.flatnonzero(~live), edit)):  # the nearest last
            if not (array == _NEUTRAL.get(op_type, np.nan)).all():
                edit.after(op_type, {}, array)

    return Rule(facts, live, ties, drop, "pool")


REDUCE_L1 = reduction_rule(L1)
REDUCE_L2 = reduction_rule(L2)
REDUCE_LOG_SUM = reduction_rule(LOG_SUM)
REDUCE_LOG_SUM_EXP = reduction_rule(LOG_SUM_EXP)
REDUCE_MAX = reduction_rule(MAX)
REDUCE_MEAN = reduction_rule(MEAN)
REDUCE_MIN = reduction_rule(MIN)
REDUCE_PROD = reduction_rule(PROD)
REDUCE_SUM = reduction_rule(SUM)
REDUCE_SUM_SQUARE = reduction_rule(SUM_SQUARE)
