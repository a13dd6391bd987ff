"""From a target to widths, and from scores to masks. How widths climb to a target says `climb`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, get_args

import numpy as np

from prune2deploy.climb import climb
from prune2deploy.cost import Widths
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
from prune2deploy.rounding import Ladders, build_ladders

Scores = Mapping[str, np.ndarray]
"""Group id -> float64 [channels of the group]; higher keeps."""

Ranking = Literal["uniform", "global"]
"""``uniform``: all groups keep one common share; ``global``: channels of all groups compete by their scores."""

TargetKind = Literal["macs", "params"]


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
                raise InputError(
                    f"group '{name}' cannot be given {width} channels: {_misfit(group)}; take this network's widths"
                )
            if group.prunable:
                found[name] = width
        return found


def _misfit(group: Group | None) -> str:
    """Return why a group cannot have just any width."""
    if group is None:
        return "the network has no such group"
    return f"it has {group.size}" if group.prunable else f"it cannot be pruned, since {group.kept_because}"


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
    ladders = _ladders(groups, target, round_to, floors, min_keep)
    return climb(groups, target.kind, target.share, ladders, lambda group, width: width / sizes[group])


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
    ladders = _ladders(groups, target, round_to, floors, min_keep)

    def best(group: str, width: float) -> float:
        # The rung nearest to a count is reached at half way: by the score of that channel, counted from the best.
        return -float(ranked[group][math.ceil(width) - 1])

    return climb(groups, target.kind, target.share, ladders, best)


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
    held = hold(
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
            raise InputError(
                f"--keep '{pattern}' matches no parameter; parameters with close names are {_close(pattern, names)}"
            )
        for group in groups.prunable:
            if _made_by(group, pattern):
                reasons.setdefault(group.id, f"kept by --keep '{pattern}'")
    return hold(groups, reasons)


def resolve_floors(groups: Groups, floors: Mapping[str, float]) -> dict[str, int]:
    """Return the smallest width of every prunable group that a floor speaks of; where several do, the largest.

    Args:
        groups: the network's groups.
        floors: the id of a group, or a pattern (fnmatch) of ids or of parameters that make or carry channels, to a
            number of channels (int) or to a share of the group's (float, such as 0.5).

    Raises:
        InputError: if a pattern matches nothing, or a floor is above a group's size.
    """
    found: dict[str, int] = {}
    for pattern, floor in floors.items():
        matched = [one for one in groups.groups if pattern == one.id]
        matched = matched or [one for one in groups.groups if fnmatchcase(one.id, pattern) or _made_by(one, pattern)]
        if not matched:
            raise InputError(
                f"the floor '{pattern}' matches no group and no parameter that makes one; groups with close names are "
                f"{_close(pattern, groups.by_id)}"
            )
        for group in matched:
            width = floor if isinstance(floor, int) else math.ceil(floor * group.size)
            if not 1 <= width <= group.size:
                raise InputError(
                    f"the floor '{pattern}' is {floor:g}, but group '{group.id}' has {group.size} channels; give a "
                    f"number from 1 to {group.size}, or a share such as 0.5"
                )
            if group.prunable:
                found[group.id] = max(width, found.get(group.id, 1))
    return found


def _made_by(group: Group, pattern: str) -> bool:
    """Return whether a parameter that makes or carries a group's channels matches."""
    return any(fnmatchcase(one.parameter, pattern) for one in group.members if one.role != "reader")


def _close(pattern: str, names: Iterable[str]) -> str:
    known = sorted(names)
    return ", ".join(get_close_matches(pattern.strip("*"), known, n=3, cutoff=0.3) or known[:3])


def hold(groups: Groups, reasons: Mapping[str, str]) -> Groups:
    """Return the groups with those named in ``reasons`` not prunable; those that were not before keep their reasons."""
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


def _ladders(groups: Groups, target: Target, round_to: int, floors: Mapping[str, int] | None, min_keep: int) -> Ladders:
    """Return the widths each group may take, if the smallest of them keep the target."""
    ladders = build_ladders(groups, round_to, _lowest(groups, floors, min_keep))
    smallest = share(groups, target.kind, groups.full_widths() | {g: rungs[0] for g, rungs in ladders.rungs.items()})
    if smallest > target.share:
        raise InputError(_unreachable(groups, target, round_to, smallest, has_floors=bool(floors)))
    return ladders


def _unreachable(groups: Groups, target: Target, round_to: int, smallest: float, *, has_floors: bool) -> str:
    if not groups.prunable:
        reasons = "; ".join(f"{group.id}: {group.kept_because}" for group in groups.groups[:3]) or "it has no groups"
        return f"target {target} cannot be met: no group of the network can be pruned ({reasons})"
    limits = [
        *([f"--round-to {round_to}"] if round_to > 1 else []),
        *(["these floors"] if has_floors else []),
    ]
    ways = [
        *(["lower --round-to"] if round_to > 1 else []),
        *(["lower a floor"] if has_floors else []),
        *(["drop a --keep"] if any("--keep" in (group.kept_because or "") for group in groups.groups) else []),
    ]
    within = f" with {' and '.join(limits)}" if limits else ""
    reachable = f"{target.kind}={math.ceil(smallest * 1e4) / 1e4:g}"
    hint = f"{', '.join(ways)}, or raise the target" if ways else "raise the target"
    return f"target {target} cannot be met; the smallest reachable{within} is {reachable}: {hint}"
