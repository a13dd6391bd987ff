"""Norms that measure their input: Instance-, Group-, Layer-, RMS-, Lp- and mean-variance normalisation, and LRN.

Every position along the axes that a norm measures is read, so none of them goes: they are frozen. What a norm measures
channel by channel (InstanceNormalization) or group by group leaves the others free.
A constant input other than 0 is no constant behind a norm: its distance from the mean is rounding, enlarged by epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from prune2deploy.graph.constraints import Constraint, Equal, Positions
from prune2deploy.graph.fact import Fact, digest, expand, layout_key, make
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Axis, Demand, Edit, Part, Rule, View
from prune2deploy.graph.rules.channelwise import nothing_to_drop
from prune2deploy.graph.rules.mixing import expanded_among, mixed_numbers, mixing_ties, rows, signature, spread


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm read from its node: ``gain * normalised(x) + offset``.

    Attributes:
        axes: the axes along which it measures.
        gain, offset: float64, of the input's rank, size 1 along axes where all positions share them.
        own_axis: the axis that gain and offset follow, where it is not measured.
        zero_stays: whether a 0 stays 0 whatever else is measured.
        zeros_stay: whether only zeros give 0.
    """

    axes: tuple[int, ...]
    gain: np.ndarray
    offset: np.ndarray
    own_axis: int | None = None
    zero_stays: bool = False
    zeros_stay: bool = True


Reader = Callable[[Node], Norm | str]

EPSILON = 1e-5
"""What every one of these operators adds to a variance where its node does not say otherwise."""


def _guarded(node: Node) -> bool:
    """Whether zeros stay zeros: without an epsilon they are divided by 0."""
    return float(node.attribute("epsilon", EPSILON)) > 0


def _parameters(node: Node, names: dict[int, str]) -> dict[str, np.ndarray | None] | str:
    """Return gain and offset by name, None where absent, or why they cannot be known."""
    found: dict[str, np.ndarray | None] = {}
    for slot, name in names.items():
        array = node.constant(slot)
        if array is None and node.input(slot) is not None:
            return f"its {name} is computed"
        if array is not None and not np.isfinite(array.astype(np.float64)).all():
            return f"its {name} is not finite"
        found[name] = None if array is None else array.astype(np.float64)
    return found


def _of_rank(array: np.ndarray | None, rank: int, default: float) -> np.ndarray:
    """Return an array broadcast from behind, as ONNX does, to a rank; the default where it is absent."""
    whole = np.full((), default) if array is None else array
    return whole.reshape((1,) * (rank - whole.ndim) + whole.shape)


def _read_layer_norm(node: Node) -> Norm | str:
    if sum(1 for output in node.outputs if output.name) > 1:
        return "its statistics are used"
    parameters = _parameters(node, {1: "scale", 2: "bias"})
    if isinstance(parameters, str):
        return parameters
    rank = node.inputs[0].rank or 0
    if rank < 2:
        return "it has no channels"
    axes = tuple(range(int(node.attribute("axis", -1)) % rank, rank))
    gain, offset = _of_rank(parameters["scale"], rank, 1.0), _of_rank(parameters["bias"], rank, 0.0)
    if any(size > 1 and axis not in axes for part in (gain, offset) for axis, size in enumerate(part.shape)):
        return "its scale reaches over more than what is measured"
    zero_stays = node.op_type == "RMSNormalization"
    return Norm(axes, gain, offset, zero_stays=zero_stays, zeros_stay=_guarded(node))


def _read_instance_norm(node: Node) -> Norm | str:
    parameters = _parameters(node, {1: "scale", 2: "bias"})
    if isinstance(parameters, str):
        return parameters
    rank = node.inputs[0].rank or 0
    gain, offset = parameters["scale"], parameters["bias"]
    if gain is None or offset is None or rank < 3:
        return "it has no channels and space"
    column = (1, -1, *(1,) * (rank - 2))
    axes = tuple(range(2, rank))
    return Norm(axes, gain.reshape(column), offset.reshape(column), own_axis=1, zeros_stay=_guarded(node))


def _plain(axes: Iterable[int], rank: int, **zeros: bool) -> Norm:
    return Norm(
        tuple(sorted({int(axis) % rank for axis in axes})), np.ones((1,) * rank), np.zeros((1,) * rank), **zeros
    )


def _read_lp_norm(node: Node) -> Norm | str:
    # Runtimes differ in what they make of a sum of zeros.
    return _plain([node.attribute("axis", -1)], node.inputs[0].rank or 1, zero_stays=True, zeros_stay=False)


def _read_mean_variance(node: Node) -> Norm | str:
    return _plain(node.attribute("axes", [0, 2, 3]), node.inputs[0].rank or 1, zeros_stay=False)


# --- The rule of a norm -----------------------------------------------------------------------------------------------


def _input_fact(node: Node, norm: Norm, view: View) -> Fact | None:
    """Return the input's fact with positions wherever gain and offset need them; None where they contradict it.

    Over several axes that have no positions (a whole image) they stay what they are, functions of the coordinates.
    """
    operand = node.inputs[0]
    fact, shape = view.of(operand), operand.shape or ()
    sizes = np.maximum(norm.gain.shape, norm.offset.shape).tolist()
    if any(size > 1 and isinstance(have, int) and have != size for size, have in zip(sizes, shape, strict=True)):
        return None
    alone = norm.own_axis if norm.own_axis is not None else norm.axes[0] if len(norm.axes) == 1 else None
    if alone is not None and sizes[alone] > 1:
        fact = expand(fact, alone, sizes[alone], shape, view.numbers)
    return fact


def _fitted(array: np.ndarray, layout: tuple[int, ...]) -> np.ndarray | None:
    """Return an array without the axes along which the layout has no positions, or None where it varies along them."""
    first = array[tuple(slice(0, 1) if size == 1 else slice(None) for size in layout)]
    return first if (array == first).all() else None


def _normalised(fact: Fact, axes: list[int], mark: Hashable, norm: Norm, view: View) -> Fact:
    """Return the fact before gain and offset."""
    number = mixed_numbers(fact, axes, mark, view)
    zero = fact.constant & (fact.shift == 0)
    whole = rows(zero, axes).all(axis=-1)
    layout = [1 if axis in axes else size for axis, size in enumerate(fact.shape)]
    all_zero = np.broadcast_to(whole.reshape(layout), fact.shape)
    stays = (all_zero & norm.zeros_stay) | (zero & ~all_zero & norm.zero_stays)
    return make(number, np.where(stays, 0.0, 1.0), np.zeros(fact.shape))


def _scaled(plain: Fact, norm: Norm, mark: Hashable, view: View) -> Fact:
    """Return the fact after gain and offset."""
    gain, offset = _fitted(norm.gain, plain.shape), _fitted(norm.offset, plain.shape)
    if gain is not None and offset is not None:
        return make(plain.number, plain.scale * gain, plain.shift * gain + offset)
    place = np.arange(plain.number.size).reshape(plain.shape)
    key = (mark, digest(norm.gain, norm.offset))
    ones, zeros = np.ones(plain.shape), np.zeros(plain.shape)
    return make(view.numbers.of_facts(key, plain, Fact(place, ones, zeros)), ones, zeros)


def _read_positions(node: Node, norm: Norm, out: np.ndarray, view: View) -> np.ndarray:
    """Return the output positions that still read their input: those without gain are constant."""
    gain = _fitted(norm.gain, out.shape)
    return out if gain is None else out & (gain != 0)


def _must(norm: Norm | str) -> Norm:
    assert isinstance(norm, Norm), "facts() accepted this node"
    return norm


def norm_rule(read: Reader, kind: str = "norm") -> Rule:
    """Return the rule of a norm from its reader; one without parameters is no layer, so it is of another kind."""

    def facts(node: Node, view: View) -> list[Fact] | str:
        norm = read(node)
        if isinstance(norm, str):
            return norm
        fact = _input_fact(node, norm, view)
        if fact is None:
            return "its scale does not fit its input"
        mark = signature(node, norm.axes, fact)
        return [_scaled(_normalised(fact, expanded_among(fact, norm.axes), mark, norm, view), norm, mark, view)]

    def live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
        norm = _must(read(node))
        assert outs[0] is not None
        fact = view.of(node.outputs[0])
        mask = _read_positions(node, norm, outs[0], view)
        return {0: Demand(spread(mask, expanded_among(fact, norm.axes), fact.shape))}

    def ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
        norm = _must(read(node))
        return mixing_ties(node, positions, view, norm.axes)

    def drop(node: Node, edit: Edit) -> None:
        norm = _must(read(node))
        if norm.own_axis is not None:
            _slice_parameters(node, edit, edit.kept(node.outputs[0], norm.own_axis))

    def parts(node: Node, view: View) -> list[Part]:
        norm = _must(read(node))
        return [] if norm.own_axis is None else _channel_parts(node, norm.own_axis)

    return Rule(facts, live, ties, drop, kind, parts)


def _slice_parameters(node: Node, edit: Edit, kept: np.ndarray | None) -> None:
    """Keep scale and bias (vectors, in slots 1 and 2) of the kept positions."""
    for slot in (1, 2) if kept is not None else ():
        array = node.inputs[slot].array
        assert array is not None
        edit.set_constant(slot, array[kept])


def _channel_parts(node: Node, axis: int) -> list[Part]:
    size = len(np.asarray(node.inputs[1].array))
    return [
        Part(slot, 0, role, Axis(node.outputs[0].name, axis), np.arange(size))
        for slot, role in ((1, "scale"), (2, "shift"))
        if size > 1
    ]


INSTANCE_NORMALIZATION = norm_rule(_read_instance_norm)
LAYER_NORMALIZATION = norm_rule(_read_layer_norm)
LP_NORMALIZATION = norm_rule(_read_lp_norm, "activation")
MEAN_VARIANCE_NORMALIZATION = norm_rule(_read_mean_variance, "activation")


# --- GroupNormalization: whole groups stay or go ----------------------------------------------------------------------


BY_GROUP = "prune2deploy_by_group"
"""The attribute of a GroupNormalization whose scale and bias are by group, as exporters write it in three nodes.

It stands for them while channels are removed (see `graph.groupnorm`); it is in no file.
"""


UNIT = "unit"
"""The role of a constant that holds nothing but ones or zeros, only to have the right size."""


def _read_group_norm(node: Node) -> Norm | str:
    """Return the norm of the input seen as [batch, groups, channels of a group, ...]."""
    by_group = BY_GROUP in node.attributes
    if node.opset < 21 and not by_group:
        return "below opset 21 it is deprecated"
    parameters = _parameters(node, {1: "scale", 2: "bias"})
    if isinstance(parameters, str):
        return parameters
    gain, offset = parameters["scale"], parameters["bias"]
    shape, groups = node.inputs[0].shape or (), int(node.attribute("num_groups", 1))
    if gain is None or offset is None or len(shape) < (2 if by_group else 3):
        return "it has no channels"
    if by_group and isinstance(shape[1], int):
        gain, offset = (np.repeat(part, shape[1] // groups) for part in (gain, offset))
    if shape[1] != len(gain) or len(gain) % groups:
        return "its scale does not fit its input"
    inner = (1, groups, len(gain) // groups, *(1,) * (len(shape) - 2))
    axes = tuple(range(2, len(shape) + 1))
    return Norm(axes, gain.reshape(inner), offset.reshape(inner), zeros_stay=_guarded(node))


def _grouped(array: np.ndarray, norm: Norm) -> np.ndarray:
    return array.reshape(array.shape[0], *norm.gain.shape[1:3], *array.shape[2:])


def _group_facts(node: Node, view: View) -> list[Fact] | str:
    norm = _read_group_norm(node)
    if isinstance(norm, str):
        return norm
    operand = node.inputs[0]
    fact = expand(view.of(operand), 1, norm.gain.size, operand.shape or (), view.numbers)
    epsilon, groups = float(node.attribute("epsilon", EPSILON)), norm.gain.shape[1]
    mark = ("GroupNormalization", epsilon, groups, layout_key(operand.shape or (), fact))
    inner = fact.map(lambda array: _grouped(array, norm))
    found = _scaled(_normalised(inner, expanded_among(inner, norm.axes), mark, norm, view), norm, mark, view)
    return [found.map(lambda array: array.reshape(fact.shape))]


def _group_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    norm = _must(_read_group_norm(node))
    assert outs[0] is not None
    mask = _grouped(outs[0], norm) & (norm.gain != 0)
    measured = [axis for axis in norm.axes if mask.shape[axis] > 1]
    return {0: Demand(spread(mask, measured, mask.shape).reshape(outs[0].shape))}


def _group_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    norm = _must(_read_group_norm(node))
    yield from mixing_ties(node, positions, view, range(2, norm.gain.ndim - 1))
    ids = positions.ids(node.outputs[0].name, 1)
    if ids is not None:
        by_group = ids.reshape(norm.gain.shape[1:3])
        yield Equal(np.broadcast_to(by_group[:, :1], by_group.shape).ravel(), by_group.ravel())


def _group_drop(node: Node, edit: Edit) -> None:
    norm = _must(_read_group_norm(node))
    kept = edit.kept(node.outputs[0], 1)
    if kept is not None:
        each = norm.gain.shape[2]
        _slice_parameters(node, edit, kept[::each] // each if BY_GROUP in node.attributes else kept)
        edit.set_attribute("num_groups", len(kept) // each)


GROUP_NORMALIZATION = Rule(
    _group_facts, _group_live, _group_ties, _group_drop, "norm", parts=lambda node, view: _channel_parts(node, 1)
)


def _by_group_parts(node: Node, view: View) -> list[Part]:
    """Return how scale and bias follow the first channel of each group.

    The ones and zeros of an exported norm are no parameters: many norms may share them and still be pruned apart.
    """
    norm = _must(_read_group_norm(node))
    groups, each = norm.gain.shape[1:3]
    role = UNIT if (norm.gain == 1).all() and not norm.offset.any() else "constant"
    axis, of = Axis(node.outputs[0].name, 1), np.arange(groups) * each
    return [Part(slot, 0, role, axis, of) for slot in (1, 2) if groups > 1]


GROUP_NORM_OF_THREE = replace(GROUP_NORMALIZATION, kind="activation", parts=_by_group_parts)
"""The rule where the attribute `BY_GROUP` says that a GroupNormalization stands for three nodes."""


# --- LRN: a window over channels --------------------------------------------------------------------------------------


def _lrn_window(node: Node) -> tuple[int, int]:
    """Return how many channels before and after each one it reads."""
    size = int(node.attribute("size"))
    return (size - 1) // 2, size // 2


def _lrn_facts(node: Node, view: View) -> list[Fact] | str:
    if len(view.of(node.inputs[0]).shape) < 2:
        return "it has no channels"
    if not (float(node.attribute("bias", 1.0)) > 0 and float(node.attribute("alpha", 1e-4)) >= 0):
        return "it may divide by zero"
    fact = view.of(node.inputs[0])
    before, after = _lrn_window(node)
    mark = view.numbers.intern(("window", signature(node, (1,), fact)))
    columns = [np.moveaxis(part, 1, -1) for part in (fact.number, fact.scale, fact.shift)]
    flat = [part.reshape(-1, part.shape[-1]) for part in columns]
    keys = []
    for row in range(len(flat[0])):
        for place in range(fact.shape[1]):
            first = max(place - before, 0)
            window = [part[row, first : place + after + 1] for part in flat]
            keys.append((mark, place - first, digest(*window)))
    number = np.moveaxis(view.numbers.intern_all(keys).reshape(columns[0].shape), -1, 1)
    zero = fact.constant & (fact.shift == 0)
    return [make(number, np.where(zero, 0.0, 1.0), np.zeros(fact.shape))]


def _lrn_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    out, fact = outs[0], view.of(node.inputs[0])
    assert out is not None
    reading = out & ~(fact.constant & (fact.shift == 0))
    if fact.shape[1] == 1:
        return {0: Demand(reading)}
    before, after = _lrn_window(node)
    mask = np.zeros_like(out)
    for place in np.flatnonzero(np.moveaxis(reading, 1, 0).reshape(out.shape[1], -1).any(axis=1)).tolist():
        span = slice(max(place - before, 0), place + after + 1)
        mask[:, span] |= reading[:, place : place + 1]
    return {0: Demand(mask)}


def _lrn_ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    return mixing_ties(node, positions, view, [1])


LRN = Rule(_lrn_facts, _lrn_live, _lrn_ties, nothing_to_drop, "activation")
