"""Groups of one convolution that could keep different numbers of channels: kept even, or divided into several layers.

A grouped convolution has as many channels in every group, so one full group keeps all others full. Dividing it, into
one layer for each run of neighbouring groups with equal numbers, removes more and adds layers, a Split and a Concat.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import asdict, dataclass, replace

import numpy as np

from prune2deploy.graph.keep import Analysis, settle
from prune2deploy.graph.layers import by_group, layer_name, layer_rows, macs_after, totals
from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Axis, Work

MOST_PARTS = 4
"""Each part is a launch of its own."""

WORTH = 2 / 3
"""A layer is divided where its MACs fall below this share."""


@dataclass(frozen=True)
class GroupChoice:
    """What was done with a grouped convolution whose groups need different numbers of channels.

    Attributes:
        layer: its name.
        choice: ``even`` (all groups keep as many) or ``split`` (several layers).
        parts: the layers that dividing it makes.
        macs_even, macs_split: its MACs either way.
    """

    layer: str
    choice: str
    parts: int
    macs_even: int
    macs_split: int

    def to_json(self) -> dict[str, object]:
        """Return the choice as a JSON object."""
        return asdict(self)


def choose_groups(analysis: Analysis) -> tuple[Analysis, list[GroupChoice]]:
    """Return the analysis with groups divided where that is worth it, and what was chosen for every uneven layer."""
    uneven = _uneven(analysis)
    if not uneven:
        return analysis, []
    trial = _divided(analysis, frozenset(uneven))
    wanted = {
        index
        for index, work in uneven.items()
        if _worth(_macs(work, analysis), _macs(work, trial), _parts(work, trial))
    }
    chosen = _divided(analysis, frozenset(wanted)) if wanted else analysis
    if wanted and _total(chosen) >= _total(analysis):
        wanted, chosen = set(), analysis
    return chosen, [_choice(index, work, wanted, analysis, trial) for index, work in sorted(uneven.items())]


def _choice(index: int, work: Work, wanted: Set[int], even: Analysis, trial: Analysis) -> GroupChoice:
    return GroupChoice(
        layer=layer_name(even.tables.nodes[index]),
        choice="split" if index in wanted else "even",
        parts=_parts(work, trial),
        macs_even=_macs(work, even),
        macs_split=_macs(work, trial),
    )


def _uneven(analysis: Analysis) -> dict[int, Work]:
    """Return the grouped layers that are kept even though their live channels are not."""
    found = {}
    for node in analysis.tables.nodes:
        rule = analysis.known.rules[node.index]
        if rule is None or node.index not in analysis.liveness.needed or not _plain(node):
            continue
        work = rule.work(node, analysis.known.view)
        if work is None or work.divisor == 1 or work.into is None:
            continue
        live = [_live(work.out, work, analysis), _live(work.into, work, analysis)]
        active = (live[0] > 0) | (live[1] > 0)
        if (by_group(work.out, work.out_size, work, analysis) > 0)[live[1] == 0].any():
            continue  # constants that others want: alone they would be a layer of zeros
        if any(len(np.unique(counts[active])) > 1 for counts in live):
            found[node.index] = work if work.coefficient is not None else replace(work, coefficient=1)
    return found


def _plain(node: Node) -> bool:
    """Whether the weights are plain constants; quantised ones keep their layer whole."""
    return all(operand.stored is None for operand in node.inputs)


def _live(axis: Axis, work: Work, analysis: Analysis) -> np.ndarray:
    """Return the live positions of an axis by group."""
    mask = analysis.liveness.live[axis.value]
    others = tuple(other for other in range(mask.ndim) if other != axis.axis)
    size = work.out_size if axis is work.out else work.into_size
    return np.asarray(np.broadcast_to(mask.any(axis=others), (size,)).reshape(work.divisor, -1).sum(axis=1))


def _divided(analysis: Analysis, nodes: frozenset[int]) -> Analysis:
    known = replace(analysis.known, view=replace(analysis.known.view, divided=nodes))
    return settle(analysis.tables, known, round_to=analysis.round_to)


def _parts(work: Work, analysis: Analysis) -> int:
    """Return how many runs of groups with equal numbers there are; groups that are gone do not count."""
    assert work.into is not None
    shapes = np.stack(
        [by_group(work.out, work.out_size, work, analysis), by_group(work.into, work.into_size, work, analysis)]
    )
    shapes = shapes[:, shapes[0] > 0]
    return 1 + int((shapes[:, 1:] != shapes[:, :-1]).any(axis=0).sum())


def _worth(even: int, split: int, parts: int) -> bool:
    return parts <= MOST_PARTS and split < WORTH * even


def _macs(work: Work, analysis: Analysis) -> int:
    return macs_after(work, analysis) or 0


def _total(analysis: Analysis) -> int:
    found = totals(layer_rows(analysis), "after")
    return found.macs + found.parameters  # MACs may not be known before run time
