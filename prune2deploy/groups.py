"""Groups: channels with one fate, and everything of the network that goes with them.

A group is found by the channel analysis of the dense ONNX export, whose initializers carry the names of the
torch parameters; so the same group speaks of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prune2deploy.cost import Cost, Term, Width
from prune2deploy.errors import InputError
from prune2deploy.files import read_json, write_json

SCHEMA_VERSION = 1

NO_WIDTH = Width(0)

SILENCED_ROLES = frozenset({"filter", "bias", "scale", "shift"})
"""The roles that a mask zeroes: a channel's filter and bias, and the scale and shift of every norm that carries it."""

COPIED_ROLES = ("filter", "bias", "scale", "shift", "constant", "mean", "var")
"""The roles in which merged channels are equal: all that makes or carries a channel."""

IDENTITY = "Identity"
OF = " of "
GATED = "Gated("
"""How `Group.read_as` writes that nothing lies between, that one function follows another, and that more follows."""


def gated(activation: str) -> str:
    """Return how an activation is written that something else then changes."""
    return activation if activation.startswith(GATED) else f"{GATED}{activation})"


def ungated(activation: str) -> str:
    """Return an activation without what then changes it."""
    return activation[len(GATED) : -1] if activation.startswith(GATED) else activation


@dataclass(frozen=True, eq=False)
class Member:
    """The part of one parameter that belongs to a group's channels.

    Attributes:
        parameter: name of the initializer, which is the name of the torch parameter or buffer.
        axis: the parameter's axis that the channels index.
        role: ``filter`` (a producer's output axis), ``bias``, ``scale``, ``shift``, ``mean``, ``var`` (of a norm),
            ``reader`` (a consumer's input axis) or ``constant`` (an operand of an elementwise operator).
        indices: int [channels, k]: the indices along ``axis`` of each channel; k > 1 where a channel spans several
            (a flattened map, a channel that a padded shortcut carries into a wider stage).
        layer: name of the layer (`Layer.name`) that the parameter belongs to.
    """

    parameter: str
    axis: int
    role: str
    indices: np.ndarray
    layer: str


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are interchangeable: each is kept or removed as a whole, in every tensor that carries it.

    Attributes:
        id: name of the group, from its first filter.
        size: number of channels.
        members: the parameter slices that go with the channels, in graph order.
        activations: the activations that the channels pass, in graph order and without repeats, such as ``Relu``,
            ``Clip(0,6)``, ``LeakyRelu(0.01)``, ``Silu``: operators with their attributes, and what several operators
            compute by the name of one that computes the same (``Affine(a,b)``: a x + b), or by theirs
            (``Tanh-Sub``). What only computes a gate, such as a squeeze-and-excitation's sigmoid, is not among them.
        kept_because: why the group cannot be pruned, or None if it can.
        read_as: as what functions of their last norm (or filter) the channels are read, over all readers: ``Identity``
            where nothing lies between, ``Log of Sigmoid`` where both do. Of a sum it is the activation behind it, and
            without one those of the addends. ``Gated(Relu)`` is a ReLU that something else then changes: a gate, or a
            constant for each channel. Empty where nothing reads the channels; None in files written before it was.
    """

    id: str
    size: int
    members: tuple[Member, ...]
    activations: tuple[str, ...]
    kept_because: str | None = None
    read_as: tuple[str, ...] | None = None

    @property
    def prunable(self) -> bool:
        """Whether a mask may remove channels of this group."""
        return self.kept_because is None

    def of_role(self, *roles: str) -> list[Member]:
        """Return the members that play one of these roles, in graph order."""
        return [member for member in self.members if member.role in roles]


@dataclass(frozen=True)
class Layer:
    """A convolution, linear layer or norm of the analysed graph, by the names of its parameters (None: it has none).

    ``norm`` names the norm layer that directly and alone reads this layer's output.
    """

    name: str
    op_type: str
    weight: str | None = None
    bias: str | None = None
    mean: str | None = None
    var: str | None = None
    epsilon: float | None = None
    norm: str | None = None
    out_width: Width = NO_WIDTH
    in_width: Width = NO_WIDTH
    padded: bool = False


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups of a network with its layers and its cost model."""

    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    cost: Cost

    def __getitem__(self, group_id: str) -> Group:
        return self.by_id[group_id]

    @cached_property
    def by_id(self) -> dict[str, Group]:
        """The groups by id."""
        return {group.id: group for group in self.groups}

    @property
    def prunable(self) -> list[Group]:
        """The groups that a mask may touch."""
        return [group for group in self.groups if group.prunable]

    def full_widths(self) -> dict[str, int]:
        """Return the dense width of every group."""
        return {group.id: group.size for group in self.groups}

    @cached_property
    def layer_by_name(self) -> dict[str, Layer]:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    def save(self, path: Path) -> None:
        """Write ``groups.json``."""
        write_json(path, {"schema_version": SCHEMA_VERSION, **_to_json(self)})

    @staticmethod
    def load(path: Path) -> "Groups":
        """Read ``groups.json``.

        Raises:
            InputError: if the file is missing, not JSON, or of another schema.
        """
        document = read_json(path)
        if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
            raise InputError(f"'{path}' is not a groups file of schema {SCHEMA_VERSION}; run 'p2d prune' again")
        return _from_json(document)


def _width_to_json(width: Width) -> list[Any]:
    return [width.constant, [list(term) for term in width.terms]]


def _width_from_json(document: Sequence[Any]) -> Width:
    return Width(document[0], tuple((str(group), int(factor)) for group, factor in document[1]))


def _term_to_json(term: Term) -> dict[str, Any]:
    factors = [_width_to_json(width) for width in term.factors]
    return {"layer": term.layer, "coefficient": term.coefficient, "factors": factors, "divisor": term.divisor}


def _term_from_json(document: dict[str, Any]) -> Term:
    factors = tuple(_width_from_json(width) for width in document["factors"])
    return Term(document["layer"], document["coefficient"], factors, document["divisor"])


_LAYER_WIDTHS = ("out_width", "in_width")


def _to_json(groups: Groups) -> dict[str, Any]:
    return {
        "groups": [
            {
                "id": group.id,
                "size": group.size,
                "activations": list(group.activations),
                "kept_because": group.kept_because,
                "read_as": None if group.read_as is None else list(group.read_as),
                "members": [{**vars(member), "indices": member.indices.tolist()} for member in group.members],
            }
            for group in groups.groups
        ],
        "layers": [
            {**vars(layer), **{key: _width_to_json(getattr(layer, key)) for key in _LAYER_WIDTHS}}
            for layer in groups.layers
        ],
        "macs": [_term_to_json(term) for term in groups.cost.macs_terms],
        "parameters": [_term_to_json(term) for term in groups.cost.parameter_terms],
    }


def _from_json(document: dict[str, Any]) -> Groups:
    return Groups(
        groups=tuple(
            Group(
                id=group["id"],
                size=group["size"],
                members=tuple(
                    Member(**{**member, "indices": np.array(member["indices"], dtype=np.int64)})
                    for member in group["members"]
                ),
                activations=tuple(group["activations"]),
                kept_because=group["kept_because"],
                read_as=None if group.get("read_as") is None else tuple(group["read_as"]),
            )
            for group in document["groups"]
        ),
        layers=tuple(
            Layer(**{**layer, **{key: _width_from_json(layer[key]) for key in _LAYER_WIDTHS}})
            for layer in document["layers"]
        ),
        cost=Cost(
            macs_terms=tuple(_term_from_json(term) for term in document["macs"]),
            parameter_terms=tuple(_term_from_json(term) for term in document["parameters"]),
        ),
    )
