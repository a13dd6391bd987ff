"""Stages of a network: inner groups in a row, where each stage ends, and the best widths for stages that add up."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from prune2deploy.budget import Budget, Target
from prune2deploy.cost import Term
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.masks import Masks
from prune2deploy.methods.base import Weights
from prune2deploy.methods.filters import producers
from prune2deploy.rounding import build_ladders

Losses = Mapping[tuple[int, ...], float]
"""Widths of a stage's groups, in their order -> its loss."""


@dataclass(frozen=True)
class Cut:
    """A layer that reads a stage: what it gives, behind its norm if it has one, is what the rest sees of the stage.

    Attributes:
        layer: its name.
        module: path of the torch module that gives it: the norm's, or the layer's own.
    """

    layer: str
    module: str


@dataclass(frozen=True)
class Stage:
    """Groups whose widths are chosen together, in graph order, and the layers that read them from outside."""

    groups: tuple[str, ...]
    cuts: tuple[Cut, ...]


def find_stages(weights: Weights, groups: Groups, longest: int) -> list[Stage]:
    """Return the network's stages in graph order.

    The free groups are those that one layer makes; a tensor that several layers add to (a residual stage) is a boundary
    and stays whole. Free groups in a row, each read by nothing but the layer that makes the next, are one stage: the
    two inner groups of a bottleneck, say. A longer row is cut after every ``longest`` groups (a network without
    residual connections is one long row).
    """
    free = {
        group.id: made_by[0].layer
        for group in groups.prunable
        if len(made_by := producers(weights, groups, group)) == 1 and group.of_role("reader")
    }
    read_by = {group: tuple(dict.fromkeys(m.layer for m in groups[group].of_role("reader"))) for group in free}
    rows: list[list[str]] = []
    row_of: dict[str, list[str]] = {}
    for group, maker in free.items():
        before = [other for other in free if maker in read_by[other]]
        alone = len(before) == 1 and read_by[before[0]] == (maker,) and before[0] in row_of
        if alone and _makes_only(groups, maker, group) and len(row_of[before[0]]) < longest:
            row = row_of[before[0]]
        else:
            rows.append(row := [])
        row.append(group)
        row_of[group] = row
    return [_stage(groups, row, read_by, {free[group] for group in row}) for row in rows]


def _makes_only(groups: Groups, layer: str, group: str) -> bool:
    out = groups.layer_by_name[layer].out_width if layer in groups.layer_by_name else None
    return out is not None and out.constant == 0 and {name for name, _ in out.terms} == {group}


def _stage(groups: Groups, row: list[str], read_by: Mapping[str, tuple[str, ...]], makers: set[str]) -> Stage:
    readers = dict.fromkeys(layer for group in row for layer in read_by[group] if layer not in makers)
    return Stage(tuple(row), tuple(Cut(layer, _module(groups, layer)) for layer in readers))


def _module(groups: Groups, name: str) -> str:
    """Return the path of the torch module whose output is the layer's, behind its norm."""
    layer = groups.layer_by_name[name]
    last = groups.layer_by_name[layer.norm] if layer.norm else layer
    parameter = last.weight or last.bias or last.mean or last.var
    return (parameter or last.name).rpartition(".")[0] or last.name


def width_choices(groups: Groups, free: Iterable[str], steps: int, budget: Budget) -> dict[str, list[int]]:
    """Return group id -> the widths nearest ``size / steps, 2 size / steps, ... size``, ascending, for the free groups.

    They keep the budget's rounding and floors; all other groups are whole.
    """
    chosen = set(free)
    held = replace(
        groups,
        groups=tuple(
            group if group.id in chosen else replace(group, kept_because=group.kept_because or "it is a boundary")
            for group in groups.groups
        ),
    )
    lowest = {
        group.id: min(group.size, max(1, budget.min_keep, budget.floors.get(group.id, 1))) for group in held.prunable
    }
    rungs = build_ladders(held, budget.round_to, lowest).rungs
    shares = [step / steps for step in range(1, steps + 1)]
    return {
        group: sorted({min(widths, key=lambda width: abs(width - part * groups[group].size)) for part in shares})
        for group, widths in rungs.items()
    }


def candidates(stage: Stage, choices: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
    """Return all widths that a stage's groups can have together."""
    return list(itertools.product(*(choices[group] for group in stage.groups)))


def first_channels(order: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> Masks:
    """Return masks that keep the first ``widths[group]`` channels of each group in its order, int64 [channels]."""
    masks = {}
    for group, width in widths.items():
        mask = np.zeros(len(order[group]), dtype=np.bool_)
        mask[order[group][:width]] = True
        masks[group] = mask
    return masks


class Found(NamedTuple):
    """The best widths, their loss, and whether every combination was looked at (by dominance or one by one)."""

    widths: dict[str, int]
    loss: float
    exact: bool


class _Path(NamedTuple):
    cost: float
    loss: float
    widths: tuple[int, ...]


def best_widths(
    stages: Sequence[Stage], losses: Sequence[Losses], groups: Groups, target: Target, *, most: int = 4096
) -> Found:
    """Return the widths of least total loss that meet the target, by dynamic programming over the stages.

    Stage after stage every path so far is continued with every choice. Of two paths that look the same to the stages
    still to come (the same widths of the groups that share a term of the cost with them), one that costs and loses no
    less than the other is dropped, so the best is found exactly. Where more than ``most`` paths remain, the cost is put
    in as many steps, and the best path of each step goes on.

    Args:
        stages: in graph order.
        losses: of each stage, for the widths that it may have.
        groups: the network's groups; those of no stage stay whole.
        target: what may remain.
        most: how many paths go from stage to stage.

    Raises:
        InputError: if no widths meet the target.
    """
    free = [group for stage in stages for group in stage.groups]
    bills = _bills(stages, groups, target)
    dense = groups.cost.of(target.kind, groups.full_widths())
    paths, exact = [_Path(0, 0.0, ())], True
    for number, (bill, table) in enumerate(zip(bills, losses, strict=True)):
        priced: dict[tuple[int, ...], float] = {}
        longer = []
        for path, (widths, loss) in itertools.product(paths, table.items()):
            chosen = path.widths + widths
            key = tuple(chosen[place] for place in bill.reads)
            if key not in priced:
                priced[key] = bill.at(dict(zip(free, chosen, strict=False)))
            longer.append(_Path(path.cost + priced[key], path.loss + loss, chosen))
        open_places = _still_read(bills[number + 1 :], len(longer[0].widths))
        paths = _undominated(longer, open_places)
        if len(paths) > most:
            paths, exact = _thinned(paths, open_places, most), False
    constant = dense - sum(bill.at(groups.full_widths()) for bill in bills)
    fitting = [path for path in paths if (constant + path.cost) / dense <= target.share] if dense else []
    if not fitting:
        raise InputError(_unreachable(target, (constant + min(path.cost for path in paths)) / dense if dense else 1.0))
    best = min(fitting, key=lambda path: (path.loss, path.cost))
    return Found(dict(zip(free, best.widths, strict=True)), best.loss, exact)


@dataclass(frozen=True, eq=False)
class _Bill:
    """The terms of the cost that are known once a stage is decided.

    Attributes:
        terms: those.
        reads: places of the groups that they depend on, among all free groups in order.
        full: the dense widths.
    """

    terms: tuple[Term, ...]
    reads: tuple[int, ...]
    full: Mapping[str, int]

    def at(self, widths: Mapping[str, int]) -> float:
        there = {**self.full, **widths}
        return float(sum(term.at(there) for term in self.terms))


def _bills(stages: Sequence[Stage], groups: Groups, target: Target) -> list[_Bill]:
    places = {group: place for place, group in enumerate(group for stage in stages for group in stage.groups)}
    stage_of = {group: number for number, stage in enumerate(stages) for group in stage.groups}
    terms: list[list[Term]] = [[] for _ in stages]
    reads: list[set[int]] = [set() for _ in stages]
    for term in groups.cost.macs_terms if target.kind == "macs" else groups.cost.parameter_terms:
        involved = {group for factor in term.factors for group, _ in factor.terms if group in stage_of}
        if involved:
            last = max(stage_of[group] for group in involved)
            terms[last].append(term)
            reads[last] |= {places[group] for group in involved}
    full = groups.full_widths()
    return [_Bill(tuple(own), tuple(sorted(read)), full) for own, read in zip(terms, reads, strict=True)]


def _still_read(bills: Sequence[_Bill], decided: int) -> tuple[int, ...]:
    """Return the places already decided that later bills depend on."""
    return tuple(sorted({place for bill in bills for place in bill.reads if place < decided}))


def _undominated(paths: list[_Path], open_places: tuple[int, ...]) -> list[_Path]:
    """Return the paths that no other with the same open widths beats or equals in both cost and loss."""
    best: dict[tuple[int, ...], float] = {}
    kept = []
    for path in sorted(paths):
        key = tuple(path.widths[place] for place in open_places)
        if path.loss < best.get(key, np.inf):
            best[key] = path.loss
            kept.append(path)
    return kept


def _thinned(paths: list[_Path], open_places: tuple[int, ...], most: int) -> list[_Path]:
    """Return the best path of each step of cost, and the cheapest, for each of the open widths or for all together."""
    by_key: dict[tuple[int, ...], list[_Path]] = {}
    for path in paths:  # ascending in cost
        by_key.setdefault(tuple(path.widths[place] for place in open_places), []).append(path)
    if len(by_key) > most // 2:  # too many open widths to follow each
        by_key = {(): paths}
    share = max(1, most // len(by_key))
    found = []
    for own in by_key.values():
        low, step = own[0].cost, (own[-1].cost - own[0].cost) / share or 1.0
        steps = itertools.groupby(own, key=lambda path: int((path.cost - low) / step))
        found += [own[0], *(min(list(one)[::-1], key=lambda path: path.loss) for _, one in steps)]
    return sorted(set(found))


def _unreachable(target: Target, smallest: float) -> str:
    return (
        f"target {target} cannot be met by inner widths of these choices; the smallest reachable is "
        f"{target.kind}={np.ceil(smallest * 1e4) / 1e4:g}: raise the target, take more --option steps, or drop a --keep"
    )
