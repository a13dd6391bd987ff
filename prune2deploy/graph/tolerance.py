"""Near-dead weights set to zero: those below a share of the largest weight of their layer.

Training with weight decay leaves filters of 1e-17 that no exact analysis may call dead. With a tolerance they are
zeroed first; `output_bound` then says how far the outputs can have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from prune2deploy.errors import InputError
from prune2deploy.graph.layers import layer_name
from prune2deploy.graph.model import copy_of
from prune2deploy.graph.node import FLOATS, Node, tables
from prune2deploy.graph.normal import normalise, to_model
from prune2deploy.graph.validity import blaming_the_file


@dataclass(frozen=True)
class ZeroedLayer:
    """What was set to zero in one layer.

    Attributes:
        name: the layer's name, as in the layer table.
        op_type: its operator.
        weights: how many weights that were not 0 are now.
        filters: how many filters (channels of a BatchNormalization) hold nothing but 0 now, and did not before.
        largest: the largest magnitude among the zeroed weights.
        limit: what they were held against: EPS times the largest weight of the layer.
    """

    name: str
    op_type: str
    weights: int
    filters: int
    largest: float
    limit: float


@dataclass(frozen=True, eq=False)
class Zeroed:
    """A model whose near-dead weights are zero, and the layers in which any were."""

    model: onnx.ModelProto
    layers: tuple[ZeroedLayer, ...]

    @property
    def weights(self) -> int:
        """How many weights were set to zero; those that layers share count once for each."""
        return sum(layer.weights for layer in self.layers)

    @property
    def filters(self) -> int:
        """How many filters became zero altogether."""
        return sum(layer.filters for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return what was zeroed as a JSON object."""
        return {"weights": self.weights, "filters": self.filters, "layers": [asdict(layer) for layer in self.layers]}


@blaming_the_file
def zero_near_dead(model: onnx.ModelProto, eps: float) -> Zeroed:
    """Return the model in normal form with every weight below ``eps`` times its tensor's largest set to zero.

    Weights of Conv, ConvTranspose, Gemm and MatMul, and the scales of BatchNormalization. A weight that several layers
    share has one limit and is zeroed for all. Tensors that are not finite stay. The given model is left as it is.

    Raises:
        InputError: if ``eps`` does not lie between 0 and 1.
    """
    if not 0 < eps < 1:
        raise InputError(
            f"--tolerance is a share of a layer's largest weight, between 0 and 1, not {eps:g}; give for example 1e-12"
        )
    copy = copy_of(model)
    graph = normalise(copy)
    before: dict[str, np.ndarray] = {}
    layers = []
    for node, target in zip(tables(graph).nodes, graph.nodes, strict=True):
        for slot, filters in _weights(node):
            tensor = target.inputs[slot]
            old = before.setdefault(tensor.name, np.asarray(tensor.values))
            limit = eps * float(np.abs(old.astype(np.float64)).max(initial=0.0))
            small = (old != 0) & (np.abs(old.astype(np.float64)) < limit)
            if not np.isfinite(limit) or not small.any():
                continue
            tensor.values = np.where(small, np.zeros_like(old), old)
            layers.append(_layer(node, old, small, filters(old), limit))
    return Zeroed(to_model(graph, copy), tuple(layers))


def _layer(node: Node, old: np.ndarray, small: np.ndarray, filters: np.ndarray, limit: float) -> ZeroedLayer:
    """Return the report of a layer; ``filters`` says of every weight to which filter it belongs."""
    count = int(filters.max()) + 1
    left, had = (np.bincount(filters[mask], minlength=count) for mask in ((old != 0) & ~small, old != 0))
    return ZeroedLayer(
        name=layer_name(node),
        op_type=node.op_type,
        weights=int(small.sum()),
        filters=int(((left == 0) & (had > 0)).sum()),
        largest=float(np.abs(old[small].astype(np.float64)).max()),
        limit=limit,
    )


Filters = Callable[[np.ndarray], np.ndarray]
"""weights -> for every weight the number of the filter that it belongs to."""


def _along(axis: int) -> Filters:
    def filters(weights: np.ndarray) -> np.ndarray:
        at = axis % weights.ndim
        shape = [-1 if a == at else 1 for a in range(weights.ndim)]
        return np.broadcast_to(np.arange(weights.shape[at]).reshape(shape), weights.shape)

    return filters


def _transposed(groups: int) -> Filters:
    """Return the filters of a ConvTranspose, whose weights are ``[inputs, outputs per group, ...]``."""

    def filters(weights: np.ndarray) -> np.ndarray:
        inputs, outputs = weights.shape[:2]
        group = np.arange(inputs) // (inputs // groups)
        numbers = group[:, None] * outputs + np.arange(outputs)
        return np.broadcast_to(numbers.reshape(inputs, outputs, *(1,) * (weights.ndim - 2)), weights.shape)

    return filters


def _weights(node: Node) -> Iterator[tuple[int, Filters]]:
    """Yield the slots of a node's weights, each with what tells its filters apart."""
    find = _WEIGHTS.get(node.op_type) if node.domain == "" else None
    for slot, filters in find(node) if find is not None else ():
        operand = node.input(slot)
        if operand is None or operand.array is None or operand.stored is not None:  # integers are what they are
            continue
        if operand.dtype in FLOATS and operand.array.ndim:
            yield slot, filters


_WEIGHTS: dict[str, Callable[[Node], list[tuple[int, Filters]]]] = {
    "BatchNormalization": lambda node: [(1, _along(0))],
    "Conv": lambda node: [(1, _along(0))],
    "ConvTranspose": lambda node: [(1, _transposed(int(node.attribute("group", 1))))],
    "Gemm": lambda node: [
        (0, _along(1 if node.attribute("transA", 0) else 0)),
        (1, _along(0 if node.attribute("transB", 0) else 1)),
    ],
    "MatMul": lambda node: [(0, _along(-2 if len(node.inputs[0].shape or ()) > 1 else 0)), (1, _along(-1))],
}
