"""What a rule is: the functions of one operator that the four steps of the analysis call.

A rule's functions are stateless. They read a `Node` and the facts of its values; only `drop` writes, through `Edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, cast

import numpy as np

from prune2deploy.graph.constraints import FROZEN, Constraint, Equal, Ids, Positions
from prune2deploy.graph.fact import Fact, Numbers
from prune2deploy.graph.node import FLOATS, Node, Operand
from prune2deploy.graph.stored import Stored

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class View:
    """The facts that rules read, the numbers that they hand out, and what they worked out before.

    ``divided`` are the grouped layers (by node index) whose groups may keep different numbers of channels.
    """

    facts: Mapping[str, Fact]
    numbers: Numbers
    divided: frozenset[int] = frozenset()
    _cache: dict[tuple[int, str], object] = field(default_factory=dict)

    def once(self, node: Node, what: str, make: Callable[[], T]) -> T:
        """Return what ``make`` gives for this node, made only once; the facts of its inputs must be final."""
        key = (node.index, what)
        if key not in self._cache:
            self._cache[key] = make()
        return cast(T, self._cache[key])

    def of(self, operand: Operand) -> Fact:
        """Return the fact of a value."""
        return self.facts[operand.name]


@dataclass(frozen=True, eq=False)
class Choice:
    """Positions of which at least one must be live, since each can stand for all (aliases, or constants under padding).

    ``positions`` are flat indices into the value's layout; ``weights`` are how large each one's multiple of the common
    function is: a small one cannot stand for a large one without amplifying its rounding.
    """

    positions: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Demand:
    """What a reader needs of one input: the live positions (bool, in the layout of the value's fact), and choices."""

    live: np.ndarray
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Axis:
    """One axis of a value."""

    value: str
    axis: int


@dataclass(frozen=True, eq=False)
class Part:
    """How one axis of a constant operand follows positions: index i belongs to position ``of[i]`` of ``axis``."""

    slot: int
    constant_axis: int
    role: str
    axis: Axis
    of: np.ndarray


@dataclass(frozen=True)
class Work:
    """Multiply-adds of a layer: ``coefficient * (width of out) * (width of in) / divisor``.

    ``coefficient`` is None where sizes are not known before run time.
    ``into`` is None where the number of inputs per output does not change (depthwise); the coefficient holds it.
    ``padded``: zero padding can reach an output.
    """

    coefficient: int | None
    out: Axis
    out_size: int
    into: Axis | None
    into_size: int
    divisor: int = 1
    padded: bool = False


@dataclass(frozen=True, eq=False)
class Piece:
    """One of the nodes that a node is divided into: its share of the input's axis, its constants and attributes."""

    size: int
    constants: dict[int, np.ndarray]
    attributes: dict[str, object]


class Edit(Protocol):
    """The kept positions as a rule's ``drop`` sees them, and the only ways in which it may change its node."""

    view: View
    needed: frozenset[int]

    def kept(self, operand: Operand, axis: int) -> np.ndarray | None:
        """Return the kept old indices along an axis in order, or None where all are kept."""

    def live(self, operand: Operand) -> np.ndarray:
        """Return the live positions of a value (bool, in its layout)."""

    def is_needed(self, operand: Operand) -> bool:
        """Whether anything needs a value."""

    def set_constant(self, slot: int, array: np.ndarray) -> None:
        """Replace (or add) a constant input."""

    def set_stored(self, slot: int, stored: Stored) -> None:
        """Let a quantised constant keep other integers, scales and zero points."""

    def set_attribute(self, name: str, value: object) -> None:
        """Set an attribute; None removes it."""

    def before(self, slot: int, op_type: str, attributes: dict[str, object], *constants: np.ndarray) -> None:
        """Put a node before an input; its other inputs are constants."""

    def after(self, op_type: str, attributes: dict[str, object], *constants: np.ndarray) -> None:
        """Put a node after the first output, which takes the output's name; its other inputs are constants.

        A second one goes between the node and the first.
        """

    def gather(self, slot: int, axis: int, indices: np.ndarray) -> None:
        """Put a Gather before an input."""

    def divide(self, slot: int, axis: int, out_axis: int, pieces: list[Piece]) -> None:
        """Put several nodes in the place of this one: they split an input along ``axis`` and join their outputs."""

    def keep_inputs(self, slots: list[int]) -> None:
        """Remove every input slot that is not listed."""

    def keep_outputs(self, slots: list[int]) -> None:
        """Remove every output slot that is not listed; nothing may read it."""

    def bypass(self, slot: int) -> None:
        """Let the readers of the node's output read this input in its place."""


FactsFn = Callable[[Node, View], list[Fact] | str | None]
LiveFn = Callable[[Node, list[np.ndarray | None], View], dict[int, Demand]]
TiesFn = Callable[[Node, Positions, View, frozenset[int]], Iterable[Constraint]]
DropFn = Callable[[Node, Edit], None]


@dataclass(frozen=True)
class Rule:
    """The rule of one operator.

    Attributes:
        facts: input facts to output facts; where this node is beyond the rule, which makes it opaque, the reason in a
            few words ("its weights are computed"), or None.
        live: live output positions to demands on the inputs; an input slot that is left out is not needed at all.
        ties: constraints between the positions of the inputs that are needed and of the outputs.
        drop: applies the kept positions to the node; it decides nothing.
        parts: how constant operands follow positions (what groups and the cost model are made of).
        work: the layer's multiply-adds, where it has any.
        kind: word for reports: ``linear``, ``norm``, ``activation``, ``elementwise``, ``product``, ``pool``,
            ``movement``, ``shape``, ``constant``.
        types: the types that every output may have.
        constant_first: whether the first input may be a constant.
    """

    facts: FactsFn
    live: LiveFn
    ties: TiesFn
    drop: DropFn
    kind: str
    parts: Callable[[Node, View], list[Part]] = field(default=lambda node, view: [])
    work: Callable[[Node, View], Work | None] = field(default=lambda node, view: None)
    types: frozenset[str] = FLOATS
    constant_first: bool = False


def sliced(array: np.ndarray, output: Operand, edit: Edit) -> np.ndarray:
    """Take the output's kept positions of an array that is broadcast to it; where it has size 1 it stays."""
    start = len(edit.view.of(output).shape) - array.ndim
    for axis, size in enumerate(array.shape):
        kept = edit.kept(output, axis + start)
        if kept is not None and size > 1:
            array = np.take(array, kept, axis=axis)
    return array


def tie_axes(positions: Positions, a: tuple[str, int], b: tuple[str, int]) -> Iterable[Constraint]:
    """Tie position i of axis ``a`` to position i of axis ``b``; an axis without positions freezes the other."""
    ids_a, ids_b = positions.ids(*a), positions.ids(*b)
    if ids_a is None and ids_b is None:
        return
    if ids_a is None or ids_b is None:
        yield freeze(ids_a if ids_b is None else ids_b)
        return
    yield Equal(ids_a, ids_b)


def freeze(ids: Ids | None) -> Equal:
    """Return the constraint that keeps all these positions."""
    some = np.zeros(0, dtype=np.int64) if ids is None else ids
    return Equal(some, np.full(len(some), FROZEN))
