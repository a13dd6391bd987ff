"""Activations: which functions channels pass, and as what function of their last norm each reader reads them.

Exporters write one function in many nodes (GELU in five), so functions are recognised by what they compute: nodes that
read one value and constants alone are a function of that value, evaluated on a grid and compared with the known ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special

from prune2deploy.graph.constraints import Ids, Positions
from prune2deploy.graph.facts import Known
from prune2deploy.graph.node import Node, Operand, Tables
from prune2deploy.graph.rules.activation import FUNCTIONS, Function, clip_bounds
from prune2deploy.graph.rules.arithmetic import OPERATORS
from prune2deploy.groups import GATED, IDENTITY, OF, gated, ungated

GRID = np.concatenate([np.linspace(-40, 40, 1601), np.linspace(-1, 1, 2001), [-1000.0, -100.0, 100.0, 1000.0]])
"""Where functions are compared: also between the kinks near 0, and far out, where bounded ones stay behind."""

TOLERANCE = 1e-5
"""Constants are float32 in files."""

COMMON: Mapping[str, np.ndarray] = {
    "Relu": np.maximum(GRID, 0.0),
    "Clip(0,6)": np.clip(GRID, 0.0, 6.0),
    "Gelu": GRID * special.ndtr(GRID),
    "Gelu(tanh)": 0.5 * GRID * (1 + np.tanh(np.sqrt(2 / np.pi) * (GRID + 0.044715 * GRID**3))),
    "HardSigmoid(0.166667,0.5)": np.clip(GRID / 6 + 0.5, 0.0, 1.0),
    "HardSwish": GRID * np.clip(GRID / 6 + 0.5, 0.0, 1.0),
    "Mish": GRID * np.tanh(np.logaddexp(0.0, GRID)),
    "Sigmoid": special.expit(GRID),
    "Silu": GRID * special.expit(GRID),
    "Softplus": np.logaddexp(0.0, GRID),
    "Tanh": np.tanh(GRID),
}
"""What is often written in several nodes."""

ATTRIBUTES: Mapping[str, tuple[tuple[str, float], ...]] = {
    "Celu": (("alpha", 1.0),),
    "Elu": (("alpha", 1.0),),
    "HardSigmoid": (("alpha", 0.2), ("beta", 0.5)),
    "LeakyRelu": (("alpha", 0.01),),
    "Selu": (("alpha", 1.67326319217681884765625), ("gamma", 1.05070102214813232421875)),
    "Shrink": (("bias", 0.0), ("lambd", 0.5)),
    "Swish": (("alpha", 1.0),),
    "ThresholdedRelu": (("alpha", 1.0),),
}
"""Operator -> its attributes, in the order in which a name lists them, with their defaults."""

SUMS = frozenset({"Add", "Mean", "Sub", "Sum"})
IDEMPOTENT = ("Relu", "Clip(")
SIGMOIDS = ("Sigmoid", "HardSigmoid(", "Clip(0,1)")
CARRYING = frozenset({"constant", "movement", "pool", "shape"})
"""Kinds of rules whose nodes pass channels on, from place to place or as a mean or maximum over places."""

TRAINED = frozenset({"PRelu"})
"""Functions of trained parameters: what they compute today says nothing of tomorrow."""

UNNAMED = frozenset({"Cast"})
"""Functions of one input that are told by what they compute alone."""


class Passed(NamedTuple):
    """By group: the functions that its channels pass, and those as which they are read (see `groups.Group`)."""

    activations: list[tuple[str, ...]]
    read_as: list[tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class _Form:
    """A value as a function of another one, its base.

    Attributes:
        base: name of the base.
        name: of the function.
        values: of the function on the grid, or None where it is not known.
        parts: names and values of the single operators in it.
        operators: their types in graph order.
    """

    base: str
    name: str = IDENTITY
    values: np.ndarray | None = None
    parts: Mapping[str, np.ndarray] | None = None
    operators: tuple[str, ...] = ()


class _Track(NamedTuple):
    """What a group's channels are in one value.

    Attributes:
        read_as: as what functions of their last norm (or filter), without repeats.
        history: (index of the node, function) of all that they passed since.
    """

    read_as: tuple[str, ...] = (IDENTITY,)
    history: frozenset[tuple[int, str]] = frozenset()


_Tracks = dict[int, _Track]


def find_activations(tb: Tables, known: Known, positions: Positions, group_of: Ids, count: int) -> Passed:
    """Return what the channels of each of ``count`` groups pass; ``group_of`` is by position, -1 for none."""
    walk = _Walk(tb, known, positions, group_of, count)
    for node in tb.nodes:
        walk.step(node)
    in_order = [[name for _, name in sorted(history)] for history in walk.passed]
    return Passed([tuple(dict.fromkeys(names)) for names in in_order], [tuple(names) for names in walk.read])


class _Walk:
    """One sweep over the nodes in topological order."""

    def __init__(self, tb: Tables, known: Known, positions: Positions, group_of: Ids, count: int) -> None:
        self._known = known
        self._positions = positions
        self._group_of = group_of
        self._forms: dict[str, _Form] = {operand.name: _Form(operand.name, values=GRID) for operand in tb.inputs}
        self._tracks: dict[str, _Tracks] = {operand.name: {} for operand in tb.inputs}  # by base
        self._sums: set[str] = set()
        self._made_by: dict[str, int] = {out.name: node.index for node in tb.nodes for out in node.outputs if out.name}
        self.passed: list[set[tuple[int, str]]] = [set() for _ in range(count)]
        self.read: list[dict[str, None]] = [{} for _ in range(count)]

    def step(self, node: Node) -> None:
        """Find what the node's outputs are, given its inputs."""
        form = self._function(node)
        if form is not None:
            self._forms[node.outputs[0].name] = form
            return
        read = [self._tracks_of(operand.name) for operand in node.inputs if operand.is_value]
        rule = self._known.rules[node.index]
        kind = rule.kind if rule is not None else "opaque"
        through = _united(read)
        if kind in ("linear", "norm"):
            self._pass(through)
            through = self._behind_layer(node, kind, through)
        elif node.op_type in SUMS and not node.domain:
            self._sums.update(operand.name for operand in node.outputs)
            through = _summed(node, read)
        elif node.op_type == "Mul" and not node.domain:
            through = _united(self._without_gates(node, read), gate=True)
        elif kind not in CARRYING:
            through = _united(read, gate=True)
        for operand in node.outputs:
            if operand.name:
                self._forms[operand.name] = _Form(operand.name, values=GRID)
                groups = self._groups(operand)
                self._tracks[operand.name] = {group: through.get(group, _Track()) for group in groups}

    def _groups(self, operand: Operand) -> list[int]:
        fact = self._known.view.facts.get(operand.name)
        axes = range(len(fact.shape)) if fact is not None else range(0)
        found = [ids for axis in axes if (ids := self._positions.ids(operand.name, axis)) is not None]
        groups = np.unique(self._group_of[np.concatenate(found)]) if found else np.zeros(0, dtype=np.int64)
        return [group for group in groups.tolist() if group >= 0]

    def _tracks_of(self, value: str) -> _Tracks:
        """Return what the groups' channels are in a value: the function that it is, of what they are in its base."""
        form = self._forms.get(value)
        if form is None:  # it is computed in no node of this graph
            return {}
        tracks = self._tracks[form.base]
        if form.name == IDENTITY:
            return tracks
        step = (self._made_by[value], form.name)
        is_sum = form.base in self._sums
        return {
            group: _Track(_composed(form.name, track.read_as, is_sum), track.history | {step})
            for group, track in tracks.items()
        }

    def _pass(self, tracks: _Tracks) -> None:
        for group, track in tracks.items():
            self.passed[group] |= track.history

    def _behind_layer(self, node: Node, kind: str, tracks: _Tracks) -> _Tracks:
        """Note who reads what, and return what channels are behind a layer: new ones, but for a depthwise one's."""
        rule = self._known.rules[node.index]
        work = rule.work(node, self._known.view) if rule is not None and kind == "linear" else None
        if work is not None and work.into is None:  # no reader: it goes with its input
            return {group: _Track(track.read_as) for group, track in tracks.items()}
        for group, track in tracks.items() if kind == "linear" else ():
            self.read[group].update(dict.fromkeys(track.read_as))
        return {}

    def _without_gates(self, node: Node, read: list[_Tracks]) -> list[_Tracks]:
        """Return the factors' tracks without those of a gate: a sigmoid, or broadcast over the places of another."""
        operands = [operand for operand in node.inputs if operand.is_value]
        broadcast = [_is_broadcast(operand, node.outputs[0]) for operand in operands]
        kept: list[_Tracks] = [{} for _ in read]
        for group in {group for tracks in read for group in tracks}:
            holders = [index for index, tracks in enumerate(read) if group in tracks]
            gates = [i for i in holders if broadcast[i] or _all_sigmoids(read[i][group])]
            for index in [i for i in holders if i not in gates] or holders:
                kept[index][group] = read[index][group]
        return kept

    # --- functions of one value ---------------------------------------------------------------------------------------

    def _function(self, node: Node) -> _Form | None:
        """Return the node's output as a function of one base, or None where it is not one."""
        if node.domain or node.captured or self._known.rules[node.index] is None:
            return None
        apply = _apply(node)
        if apply is None:
            return None
        names = [operand.name for operand in node.inputs if operand.is_value]
        forms = [self._forms[name] for name in names if name in self._forms]
        if len(forms) < len(names) or len({form.base for form in forms}) != 1:
            return None
        values = _evaluated(node, apply, forms) if node.op_type not in TRAINED else None
        label = _label(node)
        parts = {name: found for form in forms for name, found in (form.parts or {}).items()}
        if label is not None and node.op_type not in TRAINED:
            parts[label] = _on_grid(apply, [GRID])
        types = dict.fromkeys([*(op for form in forms for op in form.operators), node.op_type])
        name = _named(label, forms, values, parts, tuple(types))
        return _Form(forms[0].base, name, values, parts, tuple(types))


_Apply = Callable[[list[np.ndarray]], np.ndarray]


def _apply(node: Node) -> _Apply | None:
    """Return what an elementwise node computes from its computed inputs, or None where that is no function of these."""
    if node.op_type in FUNCTIONS:
        function = FUNCTIONS[node.op_type](node)
        return _of_first(function) if isinstance(function, Function) else None
    if node.op_type == "CastLike":
        return _of_first(Function(lambda x: x))
    operator = OPERATORS.get(node.op_type)
    constants = [operand.array for operand in node.inputs if operand.array is not None]
    if operator is None or (any(array.size != 1 for array in constants) and node.op_type not in TRAINED):
        return None

    def apply(arrays: list[np.ndarray]) -> np.ndarray:
        given = iter(arrays)
        operands = [operand for operand in node.inputs if operand.name]
        filled = [next(given) if o.array is None else o.array.astype(np.float64).ravel() for o in operands]
        return operator.evaluate(node, filled)

    return apply


def _of_first(function: Function) -> _Apply:
    return lambda arrays: function.apply(arrays[0])


def _evaluated(node: Node, apply: _Apply, forms: list[_Form]) -> np.ndarray | None:
    arrays = [form.values for form in forms if form.values is not None]
    return _on_grid(apply, arrays) if len(arrays) == len(forms) else None


def _on_grid(apply: _Apply, arrays: list[np.ndarray]) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.broadcast_to(np.asarray(apply(arrays), dtype=np.float64), GRID.shape)


def _label(node: Node) -> str | None:
    """Return the name of a function of one input with its attributes, or None where it has no name of its own."""
    if node.op_type in TRAINED:
        return node.op_type
    if node.op_type not in FUNCTIONS or node.op_type in UNNAMED:
        return None
    if node.op_type == "Clip":
        return "Clip({:g},{:g})".format(*(clip_bounds(node) or (-np.inf, np.inf)))
    if node.op_type == "Gelu" and node.attribute("approximate", "none") != "none":
        return f"Gelu({node.attribute('approximate')})"
    numbers = [f"{float(node.attribute(name, default)):g}" for name, default in ATTRIBUTES.get(node.op_type, ())]
    return f"{node.op_type}({','.join(numbers)})" if numbers else node.op_type


def _named(
    label: str | None,
    forms: list[_Form],
    values: np.ndarray | None,
    parts: Mapping[str, np.ndarray],
    operators: tuple[str, ...],
) -> str:
    """Return the name of a function: of its one operator, of what computes the same, or of its operators."""
    if label is not None and forms[0].name == IDENTITY:
        return label
    found = _recognised(values, parts) if values is not None else None
    if found is None and label is not None:
        found = f"{label}{OF}{forms[0].name}"
    return found or "-".join(operators)


def _recognised(values: np.ndarray, parts: Mapping[str, np.ndarray]) -> str | None:
    shift = float(values[GRID == 0][0])
    slope = float(values[GRID == 1][0]) - shift
    if np.isfinite(shift) and np.isfinite(slope) and _same(values, slope * GRID + shift):
        near = abs(slope - 1) < TOLERANCE and abs(shift) < TOLERANCE
        return IDENTITY if near else f"Affine({slope:g},{shift:g})"
    return next((name for name, known in {**parts, **COMMON}.items() if _same(values, known)), None)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two functions agree wherever both are finite, which is almost everywhere."""
    finite = np.isfinite(one) & np.isfinite(other)
    return bool(finite.mean() > 0.9 and np.allclose(one[finite], other[finite], rtol=TOLERANCE, atol=TOLERANCE))


# --- what becomes of channels -----------------------------------------------------------------------------------------


def _composed(outer: str, inner: tuple[str, ...], is_sum: bool) -> tuple[str, ...]:
    """Return what an activation makes of channels; that of a sum is one of the sum, whatever its addends passed."""
    if is_sum:
        return (gated(outer) if any(name.startswith(GATED) for name in inner) else outer,)
    return tuple(dict.fromkeys(_composed_one(outer, name) for name in inner))


def _composed_one(outer: str, inner: str) -> str:
    if inner.startswith(GATED):
        return gated(_composed_one(outer, ungated(inner)))
    if inner == IDENTITY or (inner == outer and outer.startswith(IDEMPOTENT)):
        return outer
    return f"{outer}{OF}{inner}"


def _united(read: Iterable[_Tracks], gate: bool = False) -> _Tracks:
    """Return what channels are that come from several values; ``gate``: and that something else then changes."""
    found: _Tracks = {}
    for tracks in read:
        for group, track in tracks.items():
            names = [gated(name) for name in track.read_as] if gate else track.read_as
            before = found.get(group, _Track(()))
            both = tuple(dict.fromkeys([*before.read_as, *names]))
            found[group] = _Track(both, before.history | track.history)
    return found


def _summed(node: Node, read: list[_Tracks]) -> _Tracks:
    """Return what the channels of a sum are; what else is added to a group's channels changes them."""
    whole = len(read) == sum(1 for operand in node.inputs if operand.name and not _is_one_number(operand))
    plain, changed = _united(read), _united(read, gate=True)
    own = {group: whole and all(group in tracks for tracks in read) for group in plain}
    return {group: plain[group] if own[group] else changed[group] for group in plain}


def _is_one_number(operand: Operand) -> bool:
    return operand.array is not None and operand.array.size == 1


def _is_broadcast(operand: Operand, output: Operand) -> bool:
    own, wide = operand.shape or (), output.shape or ()
    return len(own) < len(wide) or any(a == 1 and b != 1 for a, b in zip(own, wide, strict=False))


def _all_sigmoids(track: _Track) -> bool:
    return all(ungated(name).startswith(SIGMOIDS) for name in track.read_as)
