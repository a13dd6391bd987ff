"""CaP: channels whose loss the readers' other inputs can make up for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, final

import numpy as np

from prune2deploy.budget import Budget, Ranking
from prune2deploy.groups import Group, Groups
from prune2deploy.masks import widths as widths_of
from prune2deploy.methods.base import (
    NO_CONTEXT,
    Context,
    Method,
    Needs,
    PruneResult,
    Range,
    Weights,
    plan_report,
)
from prune2deploy.methods.compensation import Measured, readings, remove
from prune2deploy.methods.filters import in_scope
from prune2deploy.methods.readers import Pruned, first_batches
from prune2deploy.methods.reconstruction import removal_order


@final
@dataclass(frozen=True)
class CaP(Method):
    """Remove what can be compensated (Xie, Fu, Tian, Zhou, Chen, CaP: Pruning with Compensation, 2021).

    arXiv 2108.13728. Read: the abstract. A layer that loses inputs gets new weights for the others that reconstruct
    its outputs best; channels go that are redundant or weakly weighted, by the loss left after compensation; how many
    go from which layer is searched for the whole network under a step constraint. There is no training. The algebra is
    a reconstruction:

        S = covariance of a reader's inputs + ridge,  H = S^-1
        one channel:       E(i) = tr(W_i H_ii^-1 W_i^T)
        greedy step:       W <- W - W_i H_ii^-1 H_i.,    H <- H - H_.i H_ii^-1 H_i.
        removed P, kept K: W_K <- W_K + W_P A,  A = S_PK S_KK^-1,   bias + sum over taps of (W - W') mean

    A channel is as many inputs as the kernel has taps (H_ii is a block), so that E is what the layer's outputs lose;
    times its places, where grouped convolutions tie filters to each other. With ``taps="shared"`` a place is one input,
    with one regression for all taps: E is then a score, exact for 1x1 convolutions and linear layers alone. So it is in
    any case for transposed convolutions, and for linear layers behind a flattened map, where the positions of a place
    share a regression. The constant goes to the norm behind the reader, else to its bias; where it has no place, the
    regression is one without a constant.

    Ours: a group's loss is the sum over its readers of E relative to the variance of their outputs; every reader has
    its own regression, on all its inputs that are left (also those of other groups). The search measures the whole
    network once a sweep, finds the tolerance at which the target is met exactly (by sorting what removals cost, which
    is where bisection would end), and lets no group shed more than ``step`` before the next sweep measures anew. Then
    the widths are applied to the dense network, group by group in graph order, measured on what is pruned so far.
    Grouped convolutions are not compensated (the report names them); there a channel counts by its weights and its
    mean square.

    Attributes:
        images: how many images are looked at; their labels are not.
        positions: how many positions of each map, at random; 0 takes all.
        taps: ``own``: every tap of a kernel has its own regression, as large as kernels are; ``shared`` is faster.
        ridge: share of the mean variance that is added to every variance.
        step: largest share of a group's width that it may shed in one sweep of the search; 1 measures once.
        scope: ``all`` groups, or ``inner``: those that one layer makes.
        seed: chooses the positions.
    """

    needs: ClassVar[Needs] = Needs(data=True, pretrained=True)
    ranking: ClassVar[Ranking] = "global"

    images: Annotated[int, Range(low=1)] = 512
    positions: Annotated[int, Range(low=0)] = 64
    taps: Literal["own", "shared"] = "own"
    ridge: Annotated[float, Range(low=1e-12, high=1)] = 1e-3
    step: Annotated[float, Range(low=0.01, high=1)] = 0.1
    scope: Literal["all", "inner"] = "all"
    seed: Annotated[int, Range(low=0)] = 0

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> relative loss once the channel is gone, with those that go before it; [channels].

        Raises:
            InputError: if there are no images.
        """
        network = self._copy(groups, context)
        return {group: curve.losses for group, curve in self._curves(network, weights, {})[0].items()}

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return masks within the budget with the weights of what reads the kept channels, as `Method.plan`."""
        widths, search = self._widths(weights, groups, budget, context)
        network = self._copy(groups, context)
        lost = {}
        for group in groups.prunable:
            gone = group.size - widths[group.id]
            if gone:
                measured = self._measure(network, [group])
                bearing = readings(network, group, measured)
                order, losses = removal_order(bearing, np.arange(group.size), gone)
                remove(network, group, order, measured)
                lost[group.id] = float(losses[-1])
        report = plan_report(groups, budget, network.kept) | {
            "ranking": budget.ranking or self.ranking,
            "search": search,
            "losses": lost,
            "images": sum(len(images) for images, _ in network.batches),
            "scope": self.scope,
            "not_compensated": network.not_fitted(),
        }
        return PruneResult(network.kept, weights=network.new_weights(), report=report)

    def _copy(self, groups: Groups, context: Context) -> Pruned:
        module, images = context.network("cap")
        return Pruned(module, groups, first_batches(images, self.images, "cap"))

    def _scored(self, weights: Weights, groups: Groups) -> list[Group]:
        return [
            group
            for group in groups.prunable
            if group.of_role("reader") and in_scope(weights, groups, group, self.scope)
        ]

    def _widths(
        self, weights: Weights, groups: Groups, budget: Budget, context: Context
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """Return how many channels each group keeps, and what the search found."""
        if budget.widths is not None or (budget.ranking or self.ranking) == "uniform":
            alike = {group.id: np.zeros(group.size) for group in self._scored(weights, groups)}
            return widths_of(budget.masks(alike, groups, "uniform")), {"sweeps": 0}
        network = self._copy(groups, context)
        losses: dict[str, np.ndarray] = {}
        sweeps = 0
        moved = True
        while moved:
            sweeps += 1
            curves, measured = self._curves(network, weights, losses)
            wanted = widths_of(budget.masks({group: curve.losses for group, curve in curves.items()}, groups, "global"))
            moved = False
            for group, curve in curves.items():
                width = int(network.kept[group].sum())
                fewer = max(wanted[group], width - max(1, int(self.step * len(curve.losses))))
                if fewer < width:
                    gone = curve.order[: width - fewer]
                    losses.setdefault(group, np.zeros(len(curve.losses)))[gone] = curve.losses[gone]
                    remove(network, groups[group], gone, measured)
                    moved = True
        ends = (np.sort(curve.losses)[: len(curve.losses) - wanted[group]] for group, curve in curves.items())
        return wanted, {"sweeps": sweeps, "tolerance": max((float(end[-1]) for end in ends if len(end)), default=0.0)}

    def _curves(
        self, network: Pruned, weights: Weights, before: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, "_Curve"], Measured]:
        """Return in which order each group's channels would go with the losses, and what that was measured from.

        ``before`` has the losses of channels that are gone already.
        """
        groups = self._scored(weights, network.groups)
        measured = self._measure(network, groups)
        curves = {}
        for group in groups:
            losses = before.get(group.id, np.zeros(group.size)).copy()
            order, added = removal_order(readings(network, group, measured), np.flatnonzero(network.kept[group.id]))
            losses[order] = losses.max() + added
            curves[group.id] = _Curve(order, losses)
        return curves, measured

    def _measure(self, network: Pruned, groups: Sequence[Group]) -> Measured:
        return Measured.of(
            network, groups, own_taps=self.taps == "own", positions=self.positions, ridge=self.ridge, seed=self.seed
        )


class _Curve(NamedTuple):
    """How a group would shrink: the channels in the order in which they go, and every channel's loss, [channels]."""

    order: np.ndarray
    losses: np.ndarray
