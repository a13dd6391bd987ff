"""Which widths groups may take so that every tensor's width is a multiple, or full.

A tensor's width is a sum over groups, so groups are rounded together. Each group gets one residue class of widths, its
ladder; the classes are solved tensor by tensor so that every sum of allowed widths is a multiple.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prune2deploy.errors import InputError
from prune2deploy.groups import Groups

MULTIPLES: Mapping[str, int] = {"fp32": 4, "tf32": 4, "fp16": 8, "bf16": 8, "int8": 16}
"""Precision -> the multiple that tensor cores want widths to be: as many channels as fill 16 bytes.

NVIDIA's deep learning performance guide asks for 4 in TF32, 8 in FP16 and 16 in INT8; the fp32 rule is that of vector
loads, which are as wide.
"""

RoundTo = int | str
"""A multiple, or the precision (of `MULTIPLES`) whose multiple is wanted."""


def multiple_of(round_to: RoundTo) -> int:
    """Return the multiple that ``--round-to`` asks for.

    Raises:
        InputError: if it is neither a whole number from 1 nor a precision.
    """
    if isinstance(round_to, int) and not isinstance(round_to, bool) and round_to >= 1:
        return round_to
    if isinstance(round_to, str) and round_to in MULTIPLES:
        return MULTIPLES[round_to]
    known = ", ".join(f"{name} ({multiple})" for name, multiple in MULTIPLES.items())
    raise InputError(f"--round-to '{round_to}' is neither a whole number from 1 nor a precision; there are {known}")


@dataclass(frozen=True)
class _Tensor:
    """The width of a tensor that must become a multiple: ``constant + sum(factors[g] * n_g)`` over prunable groups."""

    constant: int
    factors: Mapping[str, int]


@dataclass(frozen=True)
class Ladders:
    """What widths groups may take.

    Attributes:
        rungs: prunable group -> allowed widths, ascending, never empty.
        together: sets of groups that may only become full together (full, one of them is between two multiples).
    """

    rungs: Mapping[str, Sequence[int]]
    together: Sequence[frozenset[str]]


def _tensors(groups: Groups) -> list[_Tensor]:
    prunable = {group.id for group in groups.prunable}
    found: dict[tuple[int, frozenset[tuple[str, int]]], _Tensor] = {}
    for layer in groups.layers:
        constant, factors = layer.out_width.constant, dict[str, int]()
        for group, factor in layer.out_width.terms:
            if group in prunable:
                factors[group] = factors.get(group, 0) + factor
            else:
                constant += factor * groups[group].size
        if factors:
            found.setdefault((constant, frozenset(factors.items())), _Tensor(constant, factors))
    return sorted(found.values(), key=lambda tensor: len(tensor.factors))


def build_ladders(groups: Groups, round_to: int, lowest: Mapping[str, int]) -> Ladders:
    """Return the widths each group may take so that every tensor is a multiple of ``round_to`` or full.

    Groups for which there is no such width but the full one keep it, and count as a constant for the others.
    """
    if round_to < 1:
        raise InputError(f"--round-to is {round_to}; it must be 1 or more")
    sizes = {group.id: group.size for group in groups.prunable}
    tensors = _tensors(groups) if round_to > 1 else []
    full: set[str] = set()
    while True:
        rungs, stuck = _rungs(sizes, tensors, round_to, lowest, full)
        if not stuck:
            return Ladders(rungs, _full_together(sizes, tensors, round_to, rungs))
        full |= stuck


def _rungs(
    sizes: Mapping[str, int], tensors: Sequence[_Tensor], round_to: int, lowest: Mapping[str, int], full: set[str]
) -> tuple[dict[str, list[int]], set[str]]:
    """Return the widths of each group in one residue class, and the groups that have none and must become ``full``.

    Steps of a period leave every tensor's width modulo ``round_to`` as it is, so residues can be fixed once, tensor by
    tensor: those of few groups first. Where there is a choice the full width's residue is taken.
    """
    period = {
        group: math.lcm(*(round_to // math.gcd(t.factors[group], round_to) for t in tensors if group in t.factors))
        for group in sizes
    }
    residue: dict[str, int] = {}
    for tensor in tensors:
        known = {group: sizes[group] if group in full else residue.get(group) for group in tensor.factors}
        # The last one is solved for, so it is the one whose factor shares least with round_to.
        unknown = sorted(
            (group for group, value in known.items() if value is None),
            key=lambda group: -math.gcd(tensor.factors[group], round_to),
        )
        for group in unknown[:-1]:
            known[group] = residue[group] = sizes[group] % period[group]
        rest = tensor.constant + sum(
            tensor.factors[group] * value for group, value in known.items() if value is not None
        )
        free = {group for group in tensor.factors if group not in full}
        if unknown:
            last = unknown[-1]
            fitting = [x for x in range(period[last]) if (rest + tensor.factors[last] * x) % round_to == 0]
            if not fitting:
                return {}, free
            residue[last] = sizes[last] % period[last] if sizes[last] % period[last] in fitting else fitting[0]
        elif free and rest % round_to:
            return {}, free
    rungs = {
        group: [size]
        if group in full
        else [n for n in range(lowest[group], size + 1) if (n - residue.get(group, 0)) % period[group] == 0]
        for group, size in sizes.items()
    }
    return rungs, {group for group, widths in rungs.items() if not widths}


def _full_together(
    sizes: Mapping[str, int], tensors: Sequence[_Tensor], round_to: int, rungs: Mapping[str, Sequence[int]]
) -> list[frozenset[str]]:
    """Return for each group whose full width is not on its ladder the groups that must be full with it.

    These are the groups of every tensor that its full width takes off the multiples, and so on from group to group.
    """
    between = {group for group, size in sizes.items() if size not in rungs[group]}
    sets: dict[frozenset[str], None] = {}
    for start in sorted(between):
        reached, queue = {start}, [start]
        while queue:
            group = queue.pop()
            beyond = sizes[group] - rungs[group][0]
            off = [t for t in tensors if t.factors.get(group, 0) * beyond % round_to]
            new = {other for t in off for other in t.factors} - reached
            reached |= new
            queue += new
        sets[frozenset(reached)] = None
    return list(sets)
