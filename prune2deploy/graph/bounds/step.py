"""What a bound rule sees of one operator: the node in both graphs and the ranges of what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.bounds.interval import Array
from prune2deploy.graph.bounds.ranges import Ranges, constants
from prune2deploy.graph.fact import Shape
from prune2deploy.graph.node import Node, Operand


@dataclass(frozen=True, eq=False)
class Step:
    """One operator: the node in both graphs, the ranges of all values before it, and the node that makes each."""

    node: Node
    changed: Node
    values: Mapping[str, Ranges]
    producers: Mapping[str, Node]

    def has(self, slot: int) -> bool:
        """Whether an input is there."""
        return self.node.input(slot) is not None

    def ranges(self, slot: int) -> Ranges:
        """Return the ranges of an input, computed or constant."""
        operand = self.node.inputs[slot]
        if operand.array is None:
            return self.values[operand.name]
        after = self.changed.inputs[slot].array
        assert after is not None
        return constants(operand.array, after)

    def weights(self, slot: int) -> tuple[Array, Array] | None:
        """Return a constant input in the reference and in the changed graph, as float64; None where it is computed."""
        before, after = self.node.constant(slot), self.changed.constant(slot)
        if before is None or after is None:
            return None
        wide = np.asarray(before, dtype=np.float64)
        return wide, (wide if np.array_equal(before, after) else np.asarray(after, dtype=np.float64))

    def integers(self, slot: int, attribute: str) -> list[int] | None:
        """Return integers that are an attribute in old operator sets and a constant input in new ones."""
        if attribute in self.node.attributes:
            return [int(value) for value in np.ravel(self.node.attributes[attribute])]
        array = self.node.constant(slot)
        return None if array is None else [int(value) for value in array.ravel()]

    def shape(self, slot: int = 0) -> Shape | None:
        """Return an input's shape."""
        return self.node.inputs[slot].shape

    @property
    def output(self) -> Operand:
        """The first output."""
        return self.node.outputs[0]


Found = list[Ranges] | None
"""The ranges of the outputs; None where the rule does not cover the form of the operator."""

BoundRule = Callable[[Step], Found]


def axis_of(step: Step, default: int = 0, slot: int = 0) -> int:
    """Return the attribute ``axis``, not negative."""
    return int(step.node.attribute("axis", default)) % max(len(step.ranges(slot).shape), 1)


def size_of(shape: Shape | None, axis: int) -> int | None:
    """Return a static size, or None."""
    size = None if shape is None or axis >= len(shape) else shape[axis]
    return size if isinstance(size, int) else None
