"""CaP: channels whose loss the readers' other inputs can make up for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, final

import numpy as np

from prune2deploy.budget import Budget, Ranking
from prune2deploy.groups import Group, Groups, Member
from prune2deploy.masks import widths as widths_of
from prune2deploy.methods.base import (
    NO_CONTEXT,
    Context,
    Method,
    Needs,
    PruneResult,
    Range,
    Weights,
    of_channels,
    plan_report,
)
from prune2deploy.methods.filters import in_scope
from prune2deploy.methods.readers import Pruned, Reader, Watch, first_batches, is_watched
from prune2deploy.methods.reconstruction import Moments, Reading, compensation, factor, inverse, removal_order, ridged
from prune2deploy.methods.samples import columns, some_positions, some_windows
from prune2deploy.silence import FoldPlace

if TYPE_CHECKING:
    from torch import Tensor, nn


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

    A channel is as many inputs as the kernel has taps (H_ii is a block), so that E is what the layer's outputs lose.
    With ``taps="shared"`` it is one, with one regression for all taps: E is then a score, exact for 1x1 convolutions
    and linear layers alone. So it is in any case for transposed convolutions, and for linear layers behind a flattened
    map, whose positions share a regression. The constant goes to the norm behind the reader, else to its bias; where it
    has no place, the regression is one without a constant.

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
    ) -> tuple[dict[str, "_Curve"], "Measured"]:
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

    def _measure(self, network: Pruned, groups: Sequence[Group]) -> "Measured":
        """Return the moments of what the groups' readers read now."""
        import torch

        taps = {name: taps_of(reader) if self.taps == "own" else 1 for name, reader in network.readers.items()}
        wanted: dict[str, dict[str, np.ndarray | None]] = {}
        moments = {}
        for group in groups:
            for member in group.of_role("reader"):
                name, reader = member.parameter, network.readers[member.parameter]
                if is_watched(reader):
                    flat = member.indices.shape[1] > 1 and not reader.refused
                    shape = member.indices.shape if flat else (inputs_of(reader, network) * taps[name], 1)
                    moments[name, _key(group, flat)] = Moments(*shape)
                    wanted.setdefault(name, {})[_key(group, flat)] = member.indices if flat else None
        generator = torch.Generator().manual_seed(self.seed)

        def visit(name: str, owner: "nn.Module", values: "Tensor", _: int) -> None:
            if taps[name] > 1:
                rows = some_windows(owner, values, self.positions, generator).flatten(1)
            else:
                rows = some_positions(columns(owner, values), self.positions, generator)
            samples = rows.cpu().numpy()
            for key, indices in wanted[name].items():
                moments[name, key].add(samples[:, :, None] if indices is None else samples[:, indices])

        Watch(network.module, [network.readers[name] for name in wanted], visit).run(network.batches)
        return Measured(moments, taps, self.ridge)


@dataclass(frozen=True, eq=False)
class Measured:
    """What readers read.

    Attributes:
        moments: (weight, group) -> of a group's places in a flattened map; (weight, "") -> of all that a reader reads.
        taps: weight -> how many variables an input is.
        ridge: as `CaP.ridge`.
    """

    moments: Mapping[tuple[str, str], Moments]
    taps: Mapping[str, int]
    ridge: float


class _Curve(NamedTuple):
    """How a group would shrink: the channels in the order in which they go, and every channel's loss, [channels]."""

    order: np.ndarray
    losses: np.ndarray


def _key(group: Group, flat: bool) -> str:
    return group.id if flat else ""


def taps_of(reader: Reader) -> int:
    """Return how many inputs a channel is to a reader where every tap counts."""
    if reader.refused or any(getattr(owner, "transposed", False) for owner in reader.owners):
        return 1
    return math.prod(getattr(reader.owners[0], "kernel_size", ()))


def inputs_of(reader: Reader, network: Pruned) -> int:
    """Return how many channels a reader's module reads."""
    return len(network.alive[reader.parameter]) * reader.blocks


@dataclass(frozen=True, eq=False)
class Variables:
    """What a reader is regressed on when a group shrinks: what is left of its inputs.

    Attributes:
        inputs: int [inputs, places]: indices along the weight's input axis. One place, or those that a channel has in a
            flattened map; then only the group's own channels are inputs.
        channels: int [channels, taps]: the variables of each channel; of no meaning for those that are gone.
        second: second moment with the ridge, [variables, variables]; covariance where a constant has a place. An input
            is as many variables as the kernel has taps, or one that all of them share.
        mean: [inputs, places, taps].
    """

    inputs: np.ndarray
    channels: np.ndarray
    second: np.ndarray
    mean: np.ndarray

    @staticmethod
    def of(network: Pruned, group: Group, member: Member, measured: Measured) -> "Variables":
        """Return the variables of one reader of a group as things are now."""
        flat = member.indices.shape[1] > 1
        moments, taps = measured.moments[member.parameter, _key(group, flat)], measured.taps[member.parameter]
        left = np.flatnonzero(network.kept[group.id] if flat else network.alive[member.parameter])
        inputs = member.indices[left] if flat else left[:, None]
        own = np.arange(group.size) if flat else member.indices[:, 0]
        centred = isinstance(network.readers[member.parameter].constant, FoldPlace)
        places = _of_inputs(left, taps).ravel()
        return Variables(
            inputs,
            _of_inputs(np.searchsorted(left, own), taps),
            ridged(moments.second(centred=centred)[np.ix_(places, places)], measured.ridge),
            moments.mean[places].reshape(*inputs.shape, taps),
        )

    def rows(self, weight: np.ndarray) -> np.ndarray:
        """Return a weight [inputs, outputs, taps...] as [variables, rows]."""
        own = weight[self.inputs]
        own = np.moveaxis(own.reshape(*own.shape[:3], -1), 3, 1)  # [inputs, taps, places, outputs]
        return np.asarray(own.reshape(len(self.second), -1))

    def set_rows(self, weight: np.ndarray, rows: np.ndarray) -> None:
        """Write rows, as `rows` gives them, into a weight."""
        places, outputs, taps = self.inputs.shape[1], weight.shape[1], weight.shape[2:]
        own = np.moveaxis(rows.reshape(len(self.inputs), -1, places, outputs), 1, 3)
        weight[self.inputs] = own.reshape(len(self.inputs), places, outputs, *taps)

    def constant(self, lost: np.ndarray) -> np.ndarray:
        """Return what a weight [inputs, outputs, taps...] gives of the means, [outputs]."""
        own = lost[self.inputs]
        own = own.reshape(*own.shape[:3], -1)
        return np.asarray(np.einsum("npot,npt->o", own, np.broadcast_to(self.mean, (*own.shape[:2], own.shape[3]))))


def _of_inputs(inputs: np.ndarray, taps: int) -> np.ndarray:
    """Return the variables of inputs, [inputs, taps]."""
    return np.asarray(inputs[:, None] * taps + np.arange(taps))


def readings(network: Pruned, group: Group, measured: Measured) -> list[Reading]:
    """Return how each reader of a group would bear its loss."""
    found = []
    for member in group.of_role("reader"):
        if network.readers[member.parameter].refused:
            found.append(_bare_reading(network, member, measured))
            continue
        own = Variables.of(network, group, member, measured)
        rows = factor(own.rows(network.by_input(member.parameter)[:, network.live_outputs(member.parameter)]).T)
        unit = float(np.einsum("ri,ij,rj->", rows, own.second, rows, optimize=True))
        found.append(Reading(rows, inverse(own.second), own.channels, unit or 1.0))
    return found


def _bare_reading(network: Pruned, member: Member, measured: Measured) -> Reading:
    """Return a reader that is not compensated: a channel counts by its weights, and its mean square where known."""
    reader = network.readers[member.parameter]
    weight = np.moveaxis(network.weight(member.parameter), member.axis, 1)
    moments = measured.moments.get((member.parameter, ""))
    if moments is not None:
        squares = np.diag(moments.second(centred=False)).reshape(reader.blocks, -1)
        by_output = np.repeat(np.sqrt(squares), len(weight) // reader.blocks, axis=0)  # [outputs, inputs of a block]
        weight = weight * by_output.reshape(*by_output.shape, *[1] * (weight.ndim - 2))
    rows = of_channels({"weight": weight}, replace(member, parameter="weight", axis=1)).T
    channels = len(member.indices)
    return Reading(factor(rows), np.eye(channels), np.arange(channels)[:, None], float((rows**2).sum()) or 1.0)


def remove(network: Pruned, group: Group, gone: np.ndarray, measured: Measured) -> None:
    """Mask channels in the copy, and give their readers the weights and the constant that make up for them best."""
    found = {}
    for member in group.of_role("reader"):
        if network.readers[member.parameter].refused:
            continue
        own = Variables.of(network, group, member, measured)
        removed = own.channels[gone].ravel()
        kept = np.setdiff1d(np.arange(len(own.second)), removed)
        before = network.by_input(member.parameter)
        rows = own.rows(before)
        rows[kept] += compensation(own.second, removed, kept).T @ rows[removed]
        rows[removed] = 0.0
        after = before.copy()
        own.set_rows(after, rows)
        found[member.parameter] = after, own.constant(before - after)
    network.silence(group, gone)
    for name, (after, constant) in found.items():
        network.replace_by_input(name, after)
        network.add_constant(name, constant)
