"""DepthToSpace and SpaceToDepth: b*b channels that become one channel of b*b phases, and back, all with one fate."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prune2deploy.graph.constraints import Constraint, Equal, Positions
from prune2deploy.graph.fact import Fact, expand, layout_key, make
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Demand, Rule, View, freeze, tie_axes
from prune2deploy.graph.rules.channelwise import nothing_to_drop
from prune2deploy.graph.rules.pool import linear_window
from prune2deploy.graph.rules.sources import MOVED


def _phases(node: Node, deep: int) -> np.ndarray:
    """Return the deep channels as [channels, phases]; a phase is row * b + column of its place in a block."""
    count = int(node.attribute("blocksize")) ** 2
    if node.op_type == "DepthToSpace" and node.attribute("mode", "DCR") == "CRD":
        return np.arange(deep).reshape(-1, count)
    return np.arange(deep).reshape(count, -1).T


def _input(node: Node, view: View) -> Fact | str:
    """Return the input's fact with positions along the channels, and along nothing else."""
    fact, shape = view.of(node.inputs[0]), node.inputs[0].shape or ()
    if len(shape) != 4 or any(size > 1 for axis, size in enumerate(fact.shape) if axis != 1):
        return "an axis other than the channels has positions"
    return expand(fact, 1, shape[1], shape, view.numbers) if isinstance(shape[1], int) else "its channels are not known"


def _deep_facts(node: Node, view: View) -> list[Fact] | str:
    """Return the facts of DepthToSpace: an output is the combination of its inputs."""
    fact = _input(node, view)
    if isinstance(fact, str):
        return fact
    table = _phases(node, fact.shape[1])
    phases = [fact.map(lambda array, column=column: array[:, column]) for column in table.T]  # type: ignore[misc]
    same = np.logical_and.reduce([phase.constant & (phase.shift == phases[0].shift) for phase in phases])
    signature = ("DepthToSpace", layout_key(node.inputs[0].shape or (), fact))
    number = view.numbers.of_facts(signature, *phases)
    return [make(number, np.where(same, 0.0, 1.0), np.where(same, phases[0].shift, 0.0))]


def _space_facts(node: Node, view: View) -> list[Fact] | str:
    """Return the facts of SpaceToDepth: an output is its input at one place of every block."""
    fact = _input(node, view)
    if isinstance(fact, str):
        return fact
    signature = ("SpaceToDepth", int(node.attribute("blocksize")), layout_key(node.inputs[0].shape or (), fact))
    phases = [
        linear_window(fact, (*signature, phase), border=False, view=view)
        for phase in range(int(node.attribute("blocksize")) ** 2)
    ]
    parts = ([phase.number, phase.scale, phase.shift] for phase in phases)
    return [Fact(*(np.concatenate(column, axis=1) for column in zip(*parts, strict=True)))]


def _deep_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    assert outs[0] is not None
    channels = outs[0].shape[1]
    table = _phases(node, channels * int(node.attribute("blocksize")) ** 2)
    mask = np.zeros((1, table.size, 1, 1), dtype=bool)
    mask[:, table] = outs[0].reshape(1, channels, 1, 1, 1)
    return {0: Demand(mask)}


def _space_live(node: Node, outs: list[np.ndarray | None], view: View) -> dict[int, Demand]:
    assert outs[0] is not None
    return {0: Demand(np.asarray(outs[0][:, _phases(node, outs[0].shape[1])].any(axis=2)))}


def _ties(node: Node, positions: Positions, view: View, needed: frozenset[int]) -> Iterable[Constraint]:
    output, operand = node.outputs[0], node.inputs[0]
    deep, wide = (operand, output) if node.op_type == "DepthToSpace" else (output, operand)
    yield from tie_axes(positions, (output.name, 0), (operand.name, 0))
    many, few = positions.ids(deep.name, 1), positions.ids(wide.name, 1)
    if many is None or few is None:
        yield freeze(few if many is None else many)
        return
    for phase in _phases(node, len(many)).T:
        yield Equal(few, many[phase])


DEPTH_TO_SPACE = Rule(_deep_facts, _deep_live, _ties, nothing_to_drop, "movement", types=MOVED)
SPACE_TO_DEPTH = Rule(_space_facts, _space_live, _ties, nothing_to_drop, "movement", types=MOVED)
