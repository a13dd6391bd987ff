"""The layer table: widths, MACs and parameters of every convolution and linear layer, before and after removal."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from prune2deploy.graph.keep import Analysis
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Axis, Part, Work

When = Literal["before", "after"]


@dataclass(frozen=True)
class LayerRow:
    """One layer: its output width, MACs per sample and parameters (weights, bias, norm scale and shift).

    ``kind`` is ``linear`` for convolutions and linear layers, ``norm`` for norms (whose MACs are not counted).
    MACs are None where the output's size is not known before run time. Bytes are those of the parameters as stored.
    """

    name: str
    op_type: str
    kind: str
    before: int
    after: int
    macs_before: int | None
    macs_after: int | None
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, object]:
        """Return the row as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Totals:
    """Sums over all layers; MACs that are not known count as 0 and are named."""

    macs: int
    parameters: int
    unknown_macs: tuple[str, ...]


def layer_rows(
    analysis: Analysis, written: Mapping[tuple[int, int], int] | None = None, gone: Set[int] = frozenset()
) -> list[LayerRow]:
    """Return one row per convolution, linear layer and norm, in graph order; a layer that is gone has width 0.

    ``written`` are the sizes of the constants that a rewrite wrote, by node index and slot (it may add a bias), and
    ``gone`` the indices of nodes that it removed besides those that are dead.
    """
    rows = [_row(node, analysis, written or {}, gone) for node in analysis.tables.nodes]
    return [row for row in rows if row is not None]


def totals(rows: list[LayerRow], when: When) -> Totals:
    """Return the network's MACs and parameters before or after removal."""
    macs = [(row.name, row.macs_before if when == "before" else row.macs_after) for row in rows if row.kind == "linear"]
    return Totals(
        macs=sum(value for _, value in macs if value is not None),
        parameters=sum(row.parameters_before if when == "before" else row.parameters_after for row in rows),
        unknown_macs=tuple(name for name, value in macs if value is None),
    )


def _row(node: Node, analysis: Analysis, written: Mapping[tuple[int, int], int], gone: Set[int]) -> LayerRow | None:
    rule = analysis.known.rules[node.index]
    if rule is None or rule.kind not in ("linear", "norm"):
        return None
    alive = node.index in analysis.liveness.needed and node.index not in gone
    work = rule.work(node, analysis.known.view)
    counted = [part for part in rule.parts(node, analysis.known.view) if part.role not in ("mean", "var")]
    slots = sorted({part.slot for part in counted} | ({1, 2} & set(range(len(node.inputs)))))
    arrays = {slot: array for slot in slots if (array := node.constant(slot)) is not None}
    # A bias that the rewrite added; (a norm's statistics are written too, but are not counted)
    new = [slot for slot in (2,) if rule.kind == "linear" and (node.index, slot) in written and slot not in arrays]
    after = {
        slot: written.get((node.index, slot), 0) or _parameters_kept(slot, array, counted, analysis)
        for slot, array in arrays.items()
    } | {slot: written[node.index, slot] for slot in new}
    width_of = {slot: _bytes_each(node, slot) for slot in after}
    width = _width(node, work, analysis)
    return LayerRow(
        name=layer_name(node),
        op_type=node.op_type,
        kind=rule.kind,
        before=width[0],
        after=width[1] if alive else 0,
        macs_before=None if work is None else _macs(work, work.out_size, work.into_size),
        macs_after=macs_after(work, analysis) if alive else 0,
        parameters_before=sum(array.size for array in arrays.values()),
        parameters_after=sum(after.values()) if alive else 0,
        bytes_before=sum(array.size * width_of[slot] for slot, array in arrays.items()),
        bytes_after=sum(size * width_of[slot] for slot, size in after.items()) if alive else 0,
    )


def _bytes_each(node: Node, slot: int) -> int:
    """Return how many bytes an element of a constant takes; a bias that is added has the type of the weights."""
    own = slot < len(node.inputs) and node.inputs[slot].array is not None
    operand = node.inputs[slot] if own else next(item for item in node.inputs if item.array is not None)
    if operand.stored is not None:
        return int(operand.stored.integers.itemsize)
    assert operand.array is not None
    return int(operand.array.itemsize)


def _parameters_kept(slot: int, array: np.ndarray, parts: list[Part], analysis: Analysis) -> int:
    sizes = list(array.shape)
    for part in parts:
        if part.slot == slot:
            sizes[part.constant_axis] = _kept_of(part.of, part.axis, analysis)
    return int(np.prod(sizes, dtype=np.int64))


def layer_name(node: Node) -> str:
    """Return the module path where the weight is named after one (``layer1.0.conv1.weight``), else the node's name."""
    names = [operand.name for operand in node.inputs if operand.array is not None and operand.array.ndim > 0]
    prefix = next((name.removesuffix(".weight") for name in names if name.endswith(".weight")), "")
    return prefix or node.name


def _width(node: Node, work: Work | None, analysis: Analysis) -> tuple[int, int]:
    layout = analysis.known.view.facts[node.outputs[0].name].shape
    axis = work.out.axis if work is not None else min(1, len(layout) - 1)
    size = work.out_size if work is not None else layout[axis]
    return size, kept_size(Axis(node.outputs[0].name, axis), size, analysis)


def _macs(work: Work, out: int, into: int) -> int | None:
    return None if work.coefficient is None else work.coefficient * out * into // work.divisor


def macs_after(work: Work | None, analysis: Analysis) -> int | None:
    """Return a layer's MACs with the kept channels."""
    if work is None or work.coefficient is None:
        return None
    out = kept_size(work.out, work.out_size, analysis)
    if work.into is None:
        return _macs(work, out, 1)
    into = kept_size(work.into, work.into_size, analysis)
    if work.divisor == 1:
        return _macs(work, out, into)
    pairs = by_group(work.out, work.out_size, work, analysis) * by_group(work.into, work.into_size, work, analysis)
    return work.coefficient * int(pairs.sum())


def by_group(axis: Axis, size: int, work: Work, analysis: Analysis) -> np.ndarray:
    """Return the kept positions of an axis by group of a grouped convolution."""
    mask = analysis.keep.kept.get((axis.value, axis.axis), np.ones(size, dtype=bool))
    return np.asarray(mask.reshape(work.divisor, -1).sum(axis=1))


def kept_size(axis: Axis, size: int, analysis: Analysis) -> int:
    """Return how many positions of an axis are kept; an axis without positions is whole."""
    mask = analysis.keep.kept.get((axis.value, axis.axis))
    return size if mask is None else int(mask.sum())


def _kept_of(of: np.ndarray, axis: Axis, analysis: Analysis) -> int:
    mask = analysis.keep.kept.get((axis.value, axis.axis))
    return len(of) if mask is None else int(mask[of].sum())
