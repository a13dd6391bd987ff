"""What feature boosting and suppression gates in a network, and what an image costs whose channels are skipped."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups, Layer
from prune2deploy.methods.bn import activation_moments
from prune2deploy.methods.filters import is_depthwise, producers

if TYPE_CHECKING:
    from torch import nn

    from prune2deploy.train.boosting import Place


ROUNDING = 1e-9
"""What is above a whole number of channels by no more is that number."""


class Gate(NamedTuple):
    """A gated convolution.

    Attributes:
        layer: its name in the groups.
        inputs: how many channels it reads, and its predictor with it.
        channels: how many it makes.
        taps: weights of a kernel.
    """

    layer: str
    inputs: int
    channels: int
    taps: int


@dataclass(frozen=True, eq=False)
class Wiring:
    """Which convolutions of a network are gated, which depthwise ones follow, and what an image costs.

    Attributes:
        groups: of the network without gates.
        gates: by the path of the convolution's module, in graph order.
        followers: name of a depthwise layer -> path of the gate that it follows.
    """

    groups: Groups
    gates: Mapping[str, Gate]
    followers: Mapping[str, str]

    @cached_property
    def path_of(self) -> dict[str, str]:
        """The gate's path for every layer whose channels it suppresses."""
        return {gate.layer: path for path, gate in self.gates.items()} | dict(self.followers)

    @cached_property
    def sparse(self) -> dict[str, str]:
        """Group id -> path of the gate, for groups whose readers see zeros where that gate suppressed a channel.

        Not where several convolutions are added: each drops channels of its own, and the sum is taken as dense.
        """
        found = {}
        for group in self.groups.groups:
            path = self._only_gate(group)
            if path is not None and all(_keeps_zero(one) for one in group.activations):
                found[group.id] = path
        return found

    def _only_gate(self, group: Group) -> str | None:
        filters = {member.layer for member in group.of_role("filter")}
        paths = {self.path_of.get(layer) for layer in filters}
        path = paths.pop() if len(paths) == 1 else None
        if path is None or group.of_role("constant"):
            return None
        known = self.groups.layer_by_name
        norms = {member.layer for member in group.of_role("scale", "shift", "mean", "var")}
        alone = len(known[self.gates[path].layer].out_width.terms) == 1
        return path if alone and norms <= {known[layer].norm for layer in filters} else None

    @cached_property
    def predictor_macs(self) -> int:
        """The multiply-adds of all predictors' matrices."""
        return sum(gate.inputs * gate.channels for gate in self.gates.values())

    @cached_property
    def overhead(self) -> int:
        """What all predictors cost: inputs * channels for the matrix, H * W * channels for the mean over a map."""
        macs = {term.layer: term.coefficient for term in self.groups.cost.macs_terms}
        return self.predictor_macs + sum(macs[gate.layer] // gate.taps * gate.channels for gate in self.gates.values())

    def widths(self, active: Mapping[str, Any]) -> dict[str, Any]:
        """Return how many channels of every group are read, from how many of every gate's are active."""
        full = self.groups.full_widths()
        sparse = {group: active[path] * full[group] / self.gates[path].channels for group, path in self.sparse.items()}
        return full | sparse

    def macs(self, active: Mapping[str, Any], dense: Collection[str] = ()) -> Any:
        """Return the multiply-adds of an image whose suppressed channels are skipped, with what the predictors cost.

        A layer costs its taps and positions times the channels that it makes times those that it reads, both counted
        as far as they are active. (For a grouped convolution that is an average over where they are.)

        Args:
            active: path of a gate -> how many of its channels are active; numbers, or arrays over images.
            dense: names of layers that are taken to read all their channels.
        """
        full, widths = self.groups.full_widths(), self.widths(active)
        total: Any = self.overhead
        for term in self.groups.cost.macs_terms:
            path, read = self.path_of.get(term.layer), full if term.layer in dense else widths
            factors = [factor.at(read) for factor in term.factors[1:]]
            factors += [active[path] if path is not None else factor.at(full) for factor in term.factors[:1]]
            total = total + term.coefficient * np.prod(np.broadcast_arrays(*factors, 1.0), axis=0) / term.divisor
        return total

    def share(self, active: Mapping[str, int]) -> float:
        """Return `macs` as a share of those of the network without gates."""
        return float(self.macs(active) / self.groups.cost.macs(self.groups.full_widths()))

    def readers(self) -> dict[str, Layer]:
        """Return the layers that read channels which the cost takes for skipped, by the paths of their modules."""
        found = {}
        for term in self.groups.cost.macs_terms:
            layer = self.groups.layer_by_name[term.layer]
            read = {group for width in term.factors[1:] for group, _ in width.terms}
            if read & self.sparse.keys():
                found[_path(layer.weight)] = layer
        return found


def _keeps_zero(activation: str) -> bool:
    if activation == "PRelu":  # its moments are not known, but with any slopes it does
        return True
    try:
        zero, _ = activation_moments(np.zeros(1), np.zeros(1), activation)
    except InputError:  # an activation of unknown moments
        return False
    return float(zero[0]) == 0.0


def _path(parameter: str | None) -> str:
    return (parameter or "").rpartition(".")[0]


def find_places(module: "nn.Module", groups: Groups) -> tuple[list["Place"], Wiring]:
    """Return where a network can be gated, and how that hangs together.

    Gated is every convolution of groups that can be pruned, followed directly and alone by a batch norm; a depthwise
    one follows the gate that makes its channels, if there is just one.

    Raises:
        InputError: if there is none.
    """
    from prune2deploy.apply import weights_of
    from prune2deploy.train.boosting import Place, can_be_boosted

    weights = weights_of(module)
    names = [layer.name for layer in groups.layers]
    gates: dict[str, Gate] = {}
    places, depthwise = [], []
    for layer in groups.layers:
        norm = groups.layer_by_name.get(layer.norm or "")
        if layer.op_type != "Conv" or norm is None or names.count(layer.name) > 1 or not _is_prunable(groups, layer):
            continue
        place = Place(_path(layer.weight), _path(norm.mean))
        if can_be_boosted(module, place) and is_depthwise(weights, layer):
            depthwise.append((layer, place))
        elif can_be_boosted(module, place):
            conv: Any = module.get_submodule(place.conv)
            taps = conv.kernel_size[0] * conv.kernel_size[1]
            gates[place.conv] = Gate(layer.name, conv.in_channels, conv.out_channels, taps)
            places.append(place)
    by_layer = {gate.layer: path for path, gate in gates.items()}
    followers = {}
    for layer, place in depthwise:
        makers = producers(weights, groups, groups[layer.out_width.terms[0][0]])
        path = by_layer.get(makers[0].layer) if len(makers) == 1 else None
        if path is not None:
            followers[layer.name] = path
            places.append(replace(place, follows=path))
    if not gates:
        raise InputError(
            "method 'fbs' gates convolutions that a BatchNorm follows directly, and this network has none that can be "
            "pruned; its norms may be folded into the convolutions, or kept by --keep"
        )
    return places, Wiring(groups, gates, followers)


def _is_prunable(groups: Groups, layer: Layer) -> bool:
    width = layer.out_width
    return not width.constant and bool(width.terms) and all(groups[group].prunable for group, _ in width.terms)
