"""Widths that climb ladders to a target.

All groups start on their lowest rung and climb in one order; a step that would pass the target is refused. Cost never
falls when widths grow, so a refused step stays refused, and at the end no group can take one more step.

Ladders with every width are climbed in the caller's order: that of a common share, or best score first. Of ladders with
gaps (multiples) the widths reached without the gaps are wanted. Several orders are climbed then (see `_ORDERS`), since
a trunk that costs much may refuse what many branches could share; the widths nearest to the wanted ones are taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prune2deploy.cost import Term, Widths
from prune2deploy.groups import Groups
from prune2deploy.rounding import Ladders

Order = Callable[[str, float], float]
"""When a group may pass a width (half way between two rungs), by a common share or by scores: lower is earlier."""


def climb(groups: Groups, kind: str, share: float, ladders: Ladders, order: Order) -> dict[str, int]:
    """Return a width for every group, on its ladder, with at most ``share`` of the dense network's MACs or parameters.

    Args:
        groups: the network's groups with its cost model; those without a ladder keep their size.
        kind: what is counted: ``macs`` or ``params``.
        share: how much of it may remain; the lowest rungs keep it.
        ladders: the widths each group may take.
        order: when a group may pass a width.
    """
    bill = _Bill(groups, kind, share)
    every = Ladders({group: range(rungs[0], groups[group].size + 1) for group, rungs in ladders.rungs.items()}, ())
    wanted = _climb(groups, bill, every, _steps(groups, every, lambda g, low, high: order(g, (low + high) / 2)))
    if all(len(rungs) == len(every.rungs[group]) for group, rungs in ladders.rungs.items()):
        return wanted
    seen: dict[tuple[str, int, int], _Step] = {}

    def step(group: str, low: int, high: int) -> _Step:
        if (group, low, high) not in seen:
            middle, cost = (low + high) / 2, bill.of_step(wanted | {group: low}, {group: high}) / bill.dense
            seen[group, low, high] = _Step(order(group, middle), (middle - wanted[group]) / (high - low), cost)
        return seen[group, low, high]

    found = (_climb(groups, bill, ladders, _steps(groups, ladders, _by(key, step))) for key in _ORDERS)
    return min(found, key=lambda widths: distance(widths, wanted, ladders))


def distance(widths: Mapping[str, int], wanted: Mapping[str, int], ladders: Ladders) -> float:
    """Return the root of the mean square of how far widths lie from others, in steps of each group's ladder."""
    steps = {group: rungs[1] - rungs[0] for group, rungs in ladders.rungs.items() if len(rungs) > 1}
    squares = [((widths[group] - wanted[group]) / step) ** 2 for group, step in steps.items()]
    return float((sum(squares) / max(1, len(squares))) ** 0.5)


@dataclass(frozen=True)
class _Step:
    """One step on a ladder, as the orders of `_ORDERS` look at it.

    Attributes:
        order: when it comes by `Order`.
        beyond: how far its middle lies above the wanted width, in steps: below 0 it leads nearer to that width, at
            -0.5 and below it ends under it.
        cost: what it adds to the dense network's share, with all other groups at their wanted widths.
    """

    order: float
    beyond: float
    cost: float


_Key = Callable[[_Step], tuple[float, ...]]

_ORDERS: tuple[_Key, ...] = (
    lambda step: (step.order,),
    lambda step: (step.beyond, step.order),
    # What ends under the wanted width, then what brings most nearness, or takes least of it, for what it costs.
    lambda step: (step.beyond > -0.5, step.beyond / step.cost if step.cost else step.beyond, step.order),
)
"""In which orders the steps to multiples are tried: as without gaps, nearest first, and nearest for its cost."""


def _by(key: _Key, step: Callable[[str, int, int], _Step]) -> Callable[[str, int, int], tuple[float, ...]]:
    return lambda group, low, high: key(step(group, low, high))


class _Bill:
    """What widths cost, and what a step adds, without summing up the whole network again."""

    def __init__(self, groups: Groups, kind: str, share: float) -> None:
        self._cost, self._kind, self._share = groups.cost, kind, share
        self.dense = self.of(groups.full_widths())
        self._terms_of: dict[str, list[Term]] = {group.id: [] for group in groups.groups}
        for term in groups.cost.terms(kind):
            for group in {name for factor in term.factors for name, _ in factor.terms}:
                self._terms_of[group].append(term)

    def of(self, widths: Widths) -> Any:
        """Return the cost of all widths."""
        return self._cost.of(self._kind, widths)

    def of_step(self, widths: Widths, step: Mapping[str, int]) -> Any:
        """Return by how much the cost grows when some groups take other widths."""
        touched = {id(term): term for group in step for term in self._terms_of[group]}.values()
        raised = {**widths, **step}
        return sum(term.at(raised) - term.at(widths) for term in touched)

    def allows(self, cost: float) -> bool:
        """Return whether a cost keeps the share."""
        return not self.dense or cost / self.dense <= self._share


def _climb(groups: Groups, bill: _Bill, ladders: Ladders, steps: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the widths after all steps that keep the share, tried in their order from the lowest rungs."""
    widths = groups.full_widths() | {group: rungs[0] for group, rungs in ladders.rungs.items()}
    spent = bill.of(widths)
    for wanted in steps:
        step = {group: width for group, width in wanted.items() if width > widths[group]}
        after = spent + bill.of_step(widths, step)
        if bill.allows(after):
            widths, spent = widths | step, after
    return widths


def _steps(groups: Groups, ladders: Ladders, key: Callable[[str, int, int], Any]) -> list[dict[str, int]]:
    """Return all steps of all ladders in the order of ``key(group, from, to)`` in which they are to be tried."""
    sizes = groups.full_widths()
    keyed = [
        (key(group, low, high), {group: high})
        for group, rungs in ladders.rungs.items()
        for low, high in pairwise(rungs)
    ]
    for together in ladders.together:
        last = [(group, ladders.rungs[group][-1], sizes[group]) for group in sorted(together)]
        slowest = max(key(*step) for step in last if step[1] < step[2])  # who is full on its ladder takes no step
        keyed.append((slowest, {group: sizes[group] for group in sorted(together)}))
    return [step for _, step in sorted(keyed, key=lambda pair: pair[0])]
