"""What layers lose when a group loses channels, and the weights that make up for it best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from prune2deploy.groups import Group, Member
from prune2deploy.methods.base import of_channels
from prune2deploy.methods.readers import Pruned, Reader, Watch, is_watched
from prune2deploy.methods.reconstruction import Moments, Reading, compensation, factor, inverse, ridged
from prune2deploy.methods.samples import columns, some_positions, some_windows
from prune2deploy.silence import FoldPlace

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Measured:
    """What readers read.

    Attributes:
        moments: (weight, group) -> of what a linear layer reads of a group's flattened map (`spread`); (weight, "") ->
            of all that a reader reads.
        taps: weight -> how many variables an input is.
        ridge: share of the mean variance that is added to every variance.
    """

    moments: Mapping[tuple[str, str], Moments]
    taps: Mapping[str, int]
    ridge: float

    @staticmethod
    def of(
        network: Pruned, groups: Sequence[Group], *, own_taps: bool, positions: int, ridge: float, seed: int
    ) -> "Measured":
        """Return what the groups' readers read now, at ``positions`` of each map, chosen by ``seed``; 0 takes all."""
        import torch

        taps = {name: taps_of(reader) if own_taps else 1 for name, reader in network.readers.items()}
        wanted: dict[str, dict[str, np.ndarray | None]] = {}
        moments = {}
        for group in groups:
            for member in group.of_role("reader"):
                name, reader = member.parameter, network.readers[member.parameter]
                if is_watched(reader):
                    flat = None if reader.refused else _flattened(spread(reader, group, member))
                    shape = (inputs_of(reader, network) * taps[name], 1) if flat is None else flat.shape
                    moments[name, _key(group, flat)] = Moments(*shape)
                    wanted.setdefault(name, {})[_key(group, flat)] = flat
        generator = torch.Generator().manual_seed(seed)

        def visit(name: str, owner: "nn.Module", values: "Tensor", _: int) -> None:
            if taps[name] > 1:
                rows = some_windows(owner, values, positions, generator).flatten(1)
            else:
                rows = some_positions(columns(owner, values), positions, generator)
            samples = (rows if rows.dtype == torch.float64 else rows.float()).cpu().numpy()
            for key, indices in wanted[name].items():
                moments[name, key].add(samples[:, :, None] if indices is None else samples[:, indices])

        Watch(network.module, [network.readers[name] for name in wanted], visit).run(network.batches)
        return Measured(moments, taps, ridge)


def _key(group: Group, flat: np.ndarray | None) -> str:
    return "" if flat is None else group.id


def spread(reader: Reader, group: Group, member: Member) -> np.ndarray:
    """Return where a reader finds a group's channels along its weight's input axis, int [channels, places, positions].

    A channel has several places where the blocks of a grouped convolution tie filters to each other; each is an input
    of its own. Positions are those of a flattened map in front of a linear layer, which share a regression; elsewhere
    there is one. (In a flattened map, a place has its positions side by side, or the places take turns.)
    """
    at = member.indices
    places = max((one.indices.shape[1] for one in group.of_role("filter")), default=1)
    if getattr(reader.owners[0], "kernel_size", ()):
        places = at.shape[1]
    elif at.shape[1] % places:
        places = 1
    one_by_one = at.reshape(len(at), places, -1)
    in_turn = at.reshape(len(at), -1, places).swapaxes(1, 2)
    return one_by_one if (np.diff(one_by_one, axis=2) == 1).all() else in_turn


def _flattened(at: np.ndarray) -> np.ndarray | None:
    """Return `spread` as [inputs, positions] where there are positions."""
    return at.reshape(-1, at.shape[2]) if at.shape[2] > 1 else None


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
        inputs: int [inputs, positions]: indices along the weight's input axis. One position, or those of a flattened
            map; then only the group's own channels are inputs.
        channels: int [channels, places and taps]: the variables of each channel; of no meaning for those that are gone.
        second: second moment with the ridge, [variables, variables]; covariance where a constant has a place. An input
            is as many variables as the kernel has taps, or one that all of them share.
        mean: [inputs, positions, taps].
    """

    inputs: np.ndarray
    channels: np.ndarray
    second: np.ndarray
    mean: np.ndarray

    @staticmethod
    def of(network: Pruned, group: Group, member: Member, measured: Measured) -> "Variables":
        """Return the variables of one reader of a group as things are now."""
        at = spread(network.readers[member.parameter], group, member)
        flat = _flattened(at)
        moments, taps = measured.moments[member.parameter, _key(group, flat)], measured.taps[member.parameter]
        if flat is None:
            own, left = at[:, :, 0], np.flatnonzero(network.alive[member.parameter])
            inputs = left[:, None]
        else:
            own = np.arange(len(flat)).reshape(at.shape[:2])
            left = own[network.kept[group.id]].ravel()
            inputs = flat[left]
        centred = isinstance(network.readers[member.parameter].constant, FoldPlace)
        places = _of_inputs(left, taps).ravel()
        return Variables(
            inputs,
            _of_inputs(np.searchsorted(left, own).ravel(), taps).reshape(group.size, -1),
            ridged(moments.second(centred=centred)[np.ix_(places, places)], measured.ridge),
            moments.mean[places].reshape(*inputs.shape, taps),
        )

    def rows(self, weight: np.ndarray) -> np.ndarray:
        """Return a weight [inputs, outputs, taps...] as [variables, rows]."""
        own = weight[self.inputs]
        own = np.moveaxis(own.reshape(*own.shape[:3], -1), 3, 1)  # [inputs, taps, positions, outputs]
        return np.asarray(own.reshape(len(self.second), -1))

    def set_rows(self, weight: np.ndarray, rows: np.ndarray) -> None:
        """Write rows, as `rows` gives them, into a weight."""
        positions, outputs, taps = self.inputs.shape[1], weight.shape[1], weight.shape[2:]
        own = np.moveaxis(rows.reshape(len(self.inputs), -1, positions, outputs), 1, 3)
        weight[self.inputs] = own.reshape(len(self.inputs), positions, outputs, *taps)

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
