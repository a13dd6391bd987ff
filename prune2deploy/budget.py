"""From a target to widths, and from scores to masks.

Every group climbs a ladder of allowed widths. All groups start on their lowest rung and climb in one order; a step
that would pass the target is refused. Cost never falls when widths grow, so a refused step stays refused, and at the
end no group can take one more step under the target.

Without rounding the ladder has every width, and the order is that of a common share, or best score first. With
``round_to`` the ladder has the widths that make every tensor the group is part of a multiple. Then those widths that
are reached without rounding are wanted, and the order is that of nearness: first the steps that end below the wanted
width, then those that end at the multiple nearest to it, then those that end at the one above, and so on, each counted
in steps of its own ladder. So every group is at most about one multiple off, whether rounding cuts a little or a half.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from prune2deploy.cost import Cost, Term, Widths
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.rounding import Ladders, build_ladders

Scores = Mapping[str, np.ndarray]
"""Group id -> float64 [channels of the group]; higher keeps."""

Ranking = Literal["uniform", "global"]
"""``uniform``: all groups keep one common share; ``global``: channels of all groups compete by their scores."""

TargetKind = Literal["macs", "params"]

_TERMS: dict[str, Callable[[Cost], tuple[Term, ...]]] = {
    "macs": lambda cost: cost.macs_terms,
    "params": lambda cost: cost.parameter_terms,
}


@dataclass(frozen=True, init=False)
class Target:
    """The share of the dense network's MACs or parameters that may remain; met from below.

    Written ``Target(macs=0.5)``, ``Target(params=0.5)`` or ``Target("macs", 0.5)``.
    """

    kind: TargetKind
    share: float

    def __init__(
        self,
        kind: TargetKind | None = None,
        share: float | None = None,
        *,
        macs: float | None = None,
        params: float | None = None,
    ) -> None:
        given = [pair for pair in (("macs", macs), ("params", params), (kind, share)) if pair[1] is not None]
        if len(given) != 1:
            raise InputError("a target is one share; give Target(macs=0.5) or Target(params=0.5)")
        object.__setattr__(self, "kind", given[0][0])
        object.__setattr__(self, "share", given[0][1])
        self._require_valid()

    def _require_valid(self) -> None:
        if self.kind not in get_args(TargetKind):
            raise InputError(f"target '{self.kind}' is not known; give macs=SHARE or params=SHARE")
        if not 0 < self.share < 1:
            raise InputError(
                f"target {self} is out of range; the share of the dense {self.kind} must be above 0 and below 1, "
                f"such as {self.kind}=0.5"
            )

    def __str__(self) -> str:
        return f"{self.kind}={self.share:g}"

    @staticmethod
    def parse(text: str) -> "Target":
        """Return the target written as ``macs=0.5`` or ``params=0.5``.

        Raises:
            InputError: if the text is not of that form, or the share is not above 0 and below 1.
        """
        kind, _, share = (part.strip() for part in text.partition("="))
        if kind == "latency":
            raise InputError(
                f"target '{text}': latency targets are not in this version; give macs=SHARE or params=SHARE"
            )
        try:
            return Target(kind, float(share))  # type: ignore[arg-type]  # __post_init__ checks it
        except ValueError:
            raise InputError(f"target '{text}' cannot be read; write it as macs=0.5 or params=0.5") from None


@dataclass(frozen=True)
class Budget:
    """What a pruned network may keep.

    Attributes:
        target: met from below, within one step; None where ``widths`` are given.
        round_to: every tensor's width becomes a multiple of this, or stays full.
        floors: group id -> smallest width.
        min_keep: smallest width of every group.
        ranking: how groups compete; None leaves it to the method.
        widths: group id -> exactly how many channels stay, in place of a target; groups that are not named stay whole.
    """

    target: Target | None
    round_to: int = 1
    floors: Mapping[str, int] = field(default_factory=dict)
    min_keep: int = 1
    ranking: Ranking | None = None
    widths: Mapping[str, int] | None = None

    def __str__(self) -> str:
        return "given widths" if self.target is None else str(self.target)

    def masks(self, scores: Scores, groups: Groups, ranking: Ranking = "uniform") -> dict[str, np.ndarray]:
        """Return masks for every group that keep the best channels; ``ranking`` holds where the budget has none.

        Raises:
            InputError: if the target cannot be reached, or the widths do not fit the groups.
        """
        if self.widths is not None:
            sizes = groups.full_widths()
            narrow = {group: width for group, width in self.exact_widths(groups).items() if width < sizes[group]}
            keep = choose_masks({group: _checked(scores, group, sizes[group]) for group in narrow}, narrow)
            return {group.id: keep.get(group.id, np.ones(group.size, dtype=np.bool_)) for group in groups.groups}
        assert self.target is not None, "a budget has a target or widths"
        return masks_to_budget(
            scores,
            groups,
            self.target,
            ranking=self.ranking or ranking,
            round_to=self.round_to,
            floors=self.floors,
            min_keep=self.min_keep,
        )

    def common_widths(self, groups: Groups) -> dict[str, int]:
        """Return the widths that methods take which are given widths: one common share, or those of the budget.

        Raises:
            InputError: if the target cannot be reached, or the widths do not fit the groups.
        """
        if self.widths is not None:
            return groups.full_widths() | self.exact_widths(groups)
        assert self.target is not None, "a budget has a target or widths"
        return choose_widths(groups, self.target, round_to=self.round_to, floors=self.floors, min_keep=self.min_keep)

    def exact_widths(self, groups: Groups) -> dict[str, int]:
        """Return the given widths of the groups that can be pruned.

        Raises:
            InputError: if a group is not there, cannot be pruned, or is not that wide.
        """
        found = {}
        for name, width in (self.widths or {}).items():
            group = groups.by_id.get(name)
            if group is None or not 1 <= width <= group.size or (width < group.size and not group.prunable):
                reason = "is not there" if group is None else group.kept_because or f"has {group.size} channels"
                raise InputError(f"group '{name}' cannot be given {width} channels: it {reason}; use this network's")
            if group.prunable:
                found[name] = width
        return found


def share(groups: Groups, kind: TargetKind, widths: Widths) -> float:
    """Return the share of the dense network's MACs or parameters that these group widths have."""
    dense = groups.cost.of(kind, groups.full_widths())
    return float(groups.cost.of(kind, widths) / dense) if dense else 1.0


def choose_widths(
    groups: Groups, target: Target, *, round_to: int = 1, floors: Mapping[str, int] | None = None, min_keep: int = 1
) -> dict[str, int]:
    """Return a width for every group: the largest common share that meets the target, then filled step by step.

    Args:
        groups: the network's groups with its cost model; those that are not prunable keep their size.
        target: what may remain.
        round_to: every tensor's width (`Layer.out_width`) becomes a multiple of this, or stays full.
        floors: group id -> smallest width.
        min_keep: smallest width of every group.

    Raises:
        InputError: if an argument is out of range or the target cannot be reached.
    """
    sizes = groups.full_widths()
    ladders = build_ladders(groups, round_to, _lowest(groups, floors, min_keep))
    return _meet(groups, target, ladders, round_to, lambda group, width: width / sizes[group])


def threshold_to_budget(
    scores: Scores,
    groups: Groups,
    target: Target,
    *,
    round_to: int = 1,
    floors: Mapping[str, int] | None = None,
    min_keep: int = 1,
) -> dict[str, int]:
    """Return a width for every group by one threshold on all scores, then filled, best score first.

    Only for scores that are comparable across groups. Arguments and errors are those of `choose_widths`;
    every prunable group needs scores.
    """
    ranked = {group: -np.sort(-_checked(scores, group, groups[group].size)) for group in _ids(groups)}
    ladders = build_ladders(groups, round_to, _lowest(groups, floors, min_keep))
    return _meet(groups, target, ladders, round_to, lambda group, width: -float(ranked[group][math.ceil(width) - 1]))


def choose_masks(scores: Scores, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return masks that keep the ``widths[group]`` best channels of every group; of equal scores the first stays.

    A group without scores must have its whole width in ``widths``, and is left out of the result.

    Raises:
        InputError: if a score is not a number.
    """
    masks = {}
    for group in scores:
        values = _checked(scores, group, len(scores[group]))
        mask = np.zeros(len(values), dtype=np.bool_)
        mask[np.argsort(-values, kind="stable")[: widths[group]]] = True
        masks[group] = mask
    return masks


def masks_to_budget(
    scores: Scores,
    groups: Groups,
    target: Target,
    *,
    ranking: Ranking = "uniform",
    round_to: int = 1,
    floors: Mapping[str, int] | None = None,
    min_keep: int = 1,
) -> dict[str, np.ndarray]:
    """Return masks for every group: widths by ``ranking``, and the best channels of each group.

    Groups that are not prunable or have no scores are kept whole. Arguments and errors are those of `choose_widths`.
    """
    held = _hold(
        groups, {group.id: "the method gives it no scores" for group in groups.prunable if group.id not in scores}
    )
    if ranking == "global":
        widths = threshold_to_budget(scores, held, target, round_to=round_to, floors=floors, min_keep=min_keep)
    else:
        widths = choose_widths(held, target, round_to=round_to, floors=floors, min_keep=min_keep)
    chosen = choose_masks({group.id: scores[group.id] for group in held.prunable}, widths)
    return {group.id: chosen.get(group.id, np.ones(group.size, dtype=np.bool_)) for group in groups.groups}


def protect(groups: Groups, patterns: Iterable[str]) -> Groups:
    """Return the groups with those not prunable whose channels a matching parameter makes or carries (fnmatch).

    A layer that only reads a group's channels does not hold them: ``--keep 'head.*'`` leaves the head's own filters
    whole, and what feeds it can still go.

    Raises:
        InputError: if a pattern matches no parameter of the network.
    """
    names = {member.parameter for group in groups.groups for member in group.members}
    names |= {name for layer in groups.layers for name in (layer.weight, layer.bias) if name is not None}
    reasons: dict[str, str] = {}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = get_close_matches(pattern.strip("*"), sorted(names), n=3, cutoff=0.3) or sorted(names)[:3]
            raise InputError(
                f"--keep '{pattern}' matches no parameter; parameters with close names are {', '.join(close)}"
            )
        for group in groups.prunable:
            if any(fnmatchcase(one.parameter, pattern) for one in group.members if one.role != "reader"):
                reasons.setdefault(group.id, f"kept by --keep '{pattern}'")
    return _hold(groups, reasons)


def _hold(groups: Groups, reasons: Mapping[str, str]) -> Groups:
    """Return the groups with those named in ``reasons`` not prunable."""
    changed = (
        replace(group, kept_because=group.kept_because or reasons[group.id]) if group.id in reasons else group
        for group in groups.groups
    )
    return replace(groups, groups=tuple(changed))


def _ids(groups: Groups) -> list[str]:
    return [group.id for group in groups.prunable]


def _checked(scores: Scores, group: str, size: int) -> np.ndarray:
    if group not in scores:
        raise InputError(f"group '{group}' has no scores; score it, or keep it with --keep")
    values = np.asarray(scores[group], dtype=np.float64)
    if values.shape != (size,):
        raise InputError(f"group '{group}' has {size} channels but scores of shape {list(values.shape)}")
    if np.isnan(values).any():
        raise InputError(f"group '{group}' has scores that are not numbers; check that the weights are finite")
    return values


def _lowest(groups: Groups, floors: Mapping[str, int] | None, min_keep: int) -> dict[str, int]:
    """Return the smallest width that each prunable group may have."""
    if min_keep < 1:
        raise InputError(f"min_keep is {min_keep}; a group keeps at least 1 channel")
    floors = floors or {}
    for name, floor in floors.items():
        if name not in groups.by_id:
            close = get_close_matches(name, list(groups.by_id), n=3, cutoff=0.0)
            raise InputError(
                f"there is no group '{name}' to set a floor for; groups with close names are {', '.join(close)}"
            )
        if not 0 <= floor <= groups[name].size:
            raise InputError(f"the floor {floor} of group '{name}' is not within its {groups[name].size} channels")
    return {group.id: min(group.size, max(min_keep, floors.get(group.id, 1))) for group in groups.prunable}


Order = Callable[[str, float], float]
"""When a group may pass a width (half way between two rungs): lower is earlier."""


def _meet(groups: Groups, target: Target, ladders: Ladders, round_to: int, order: Order) -> dict[str, int]:
    """Return the widths on the ladders that keep the target, nearest to those that ``order`` gives without rounding."""
    smallest = share(groups, target.kind, groups.full_widths() | {g: rungs[0] for g, rungs in ladders.rungs.items()})
    if smallest > target.share:
        raise InputError(_unreachable(groups, target, round_to, smallest))
    if round_to == 1:
        steps = _steps(groups, ladders, lambda group, lower, upper: order(group, (lower + upper) / 2))
        return _climb(groups, target, ladders, steps)
    every = Ladders({g: range(rungs[0], groups[g].size + 1) for g, rungs in ladders.rungs.items()}, ())
    wanted = _meet(groups, target, every, 1, order)
    bill = _Bill(groups, target)

    def far(group: str, lower: int, upper: int) -> float:
        return ((lower + upper) / 2 - wanted[group]) / (upper - lower)

    def worth(group: str, lower: int, upper: int) -> tuple[bool, float]:
        away = far(group, lower, upper)
        gain = bill.step(wanted | {group: lower}, {group: upper}) / bill.dense
        return away > -0.5, away / gain if gain else away

    keys = [lambda g, l, u: order(g, (l+u)/2), lambda g,l,u: (far(g,l,u), order(g,(l+u)/2)), lambda g,l,u: (*worth(g,l,u), order(g,(l+u)/2))]
    found = [_climb(groups, target, ladders, _steps(groups, ladders, k)) for k in keys]
    def dev(w):
        d=[(w[g]-wanted[g])/round_to for g in ladders.rungs]
        return (sum(x*x for x in d)/len(d))**.5
    import os
    if os.environ.get('SHOW'): print('    rms', [round(dev(w),3) for w in found], [round(share(groups,target.kind,w),4) for w in found])
    return min(found, key=dev)


class _Bill:
    def __init__(self, groups, target):
        self.dense = groups.cost.of(target.kind, groups.full_widths())
        self.terms_of = {group: [] for group in groups.by_id}
        for term in _TERMS[target.kind](groups.cost):
            for group in {name for factor in term.factors for name, _ in factor.terms}:
                self.terms_of[group].append(term)
    def step(self, widths, step):
        touched = {id(term): term for group in step for term in self.terms_of[group]}.values()
        raised = widths | step
        return sum(term.at(raised) - term.at(widths) for term in touched)


def _climb(groups, target, ladders, steps):
    widths = groups.full_widths() | {group: rungs[0] for group, rungs in ladders.rungs.items()}
    bill = _Bill(groups, target)
    spent = groups.cost.of(target.kind, widths)
    for wanted in steps:
        step = {group: width for group, width in wanted.items() if width > widths[group]}
        after = spent + bill.step(widths, step)
        if after / bill.dense <= target.share:
            widths, spent = widths | step, after
    return widths


def _steps(groups: Groups, ladders: Ladders, key: Callable[[str, int, int], Any]) -> list[dict[str, int]]:
    """Return all steps of all ladders in the order of ``key(group, from, to)`` in which they are to be tried."""
    sizes = groups.full_widths()
    keyed = [
        (key(group, lower, upper), {group: upper})
        for group, rungs in ladders.rungs.items()
        for lower, upper in pairwise(rungs)
    ]
    for together in ladders.together:
        # A group of these may be on a full width that its ladder has: it takes no step.
        last = [(group, ladders.rungs[group][-1], sizes[group]) for group in sorted(together)]
        slowest = max(key(*step) for step in last if step[1] < step[2])
        keyed.append((slowest, {group: sizes[group] for group in sorted(together)}))
    return [step for _, step in sorted(keyed, key=lambda pair: pair[0])]


def _unreachable(groups: Groups, target: Target, round_to: int, smallest: float) -> str:
    if not groups.prunable:
        reasons = "; ".join(f"{group.id}: {group.kept_because}" for group in groups.groups[:3]) or "it has no groups"
        return f"target {target} cannot be met: no group of the network can be pruned ({reasons})"
    rounding = f" with --round-to {round_to}" if round_to > 1 else ""
    reachable = f"{target.kind}={math.ceil(smallest * 1e4) / 1e4:g}"
    hint = "lower --round-to, drop a --keep, or raise the target"
    return f"target {target} cannot be met; the smallest reachable{rounding} is {reachable}: {hint}"
