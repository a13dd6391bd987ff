"""What random graphs are built with: values, nodes in the form of their operator set, and planted weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

DENSE = ("dense",)
PLANTED = ("dense", "rows", "rows", "repeat", "columns", "all", "scaled")
FAR = 2**31 - 1


@dataclass(frozen=True)
class Value:
    """A map [N, channels, size, size], or a flat value [N, channels].

    ``exact``: each element is a small multiple of a power of two, so that sums of products have no rounding, and a
    function that jumps gives the same for every order of a sum.
    """

    name: str
    channels: int
    size: int
    flat: bool = False
    exact: bool = False
    element: int = TensorProto.FLOAT

    def like(self, other: Value) -> bool:
        return (self.channels, self.size, self.flat) == (other.channels, other.size, other.flat)

    def to(self, name: str, **changes: Any) -> Value:
        """Return a value like this one; what was exact is not taken to be so any more."""
        return replace(self, name=name, **{"exact": False, **changes})


@dataclass
class Builder:
    """Collects nodes and weights; the names of nodes begin with the family that wrote them."""

    seed: int
    batch: int | str = "N"
    patterns: tuple[str, ...] = PLANTED
    sharing: bool = True
    integers: bool = True
    opset: int = 18
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    weights: dict[tuple[int, ...], str] = field(default_factory=dict)
    family: str = "start"
    count: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = self.name("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def weight(self, draw: Any, array: np.ndarray) -> str:
        """Return a weight's name; now and then that of an earlier weight of this shape, which is then shared."""
        if self.sharing and array.shape in self.weights and draw(st.integers(0, 3)) == 0:
            return self.weights[array.shape]
        self.weights[array.shape] = name = self.constant(array)
        return name

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        return self.nodes_out(op, inputs, 1, **attributes)[0]

    def nodes_out(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs, and return their names."""
        names = [self.name("v") for _ in range(outputs)]
        label = f"{self.family}.{op.lower()}{self.count}"
        self.nodes.append(helper.make_node(op, list(inputs), names, name=label, **attributes))
        return names

    # --- operators whose attributes became inputs ---------------------------------------------------------------------

    def with_axes(self, op: str, x: str, axes: Sequence[int], since: int, **attributes: Any) -> str:
        if self.opset < since:
            return self.node(op, [x], axes=list(axes), **attributes)
        return self.node(op, [x, self.ints(*axes)], **attributes)

    def squeeze(self, x: str, *axes: int) -> str:
        return self.with_axes("Squeeze", x, axes, 13)

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.with_axes("Unsqueeze", x, axes, 13)

    def reduce(self, op: str, x: str, axes: Sequence[int], keepdims: int = 1) -> str:
        return self.with_axes(op, x, axes, 13 if op == "ReduceSum" else 18, keepdims=keepdims)

    def clip(self, x: str, low: float | None, high: float | None) -> str:
        bounds = {name: bound for name, bound in (("min", low), ("max", high)) if bound is not None}
        if self.opset < 11:
            return self.node("Clip", [x], **bounds)
        return self.node("Clip", [x, *("" if bound is None else self.constant(bound) for bound in (low, high))])

    def pad(self, x: str, pads: Sequence[int], mode: str, fill: float) -> str:
        if self.opset < 11:
            return self.node("Pad", [x], pads=list(pads), mode=mode, value=fill)
        return self.node("Pad", [x, self.ints(*pads), self.constant(fill)], mode=mode)

    def slice(self, x: str, axes: Sequence[int], starts: Sequence[int], ends: Sequence[int], step: int = 1) -> str:
        if self.opset < 10:
            return self.node("Slice", [x], axes=list(axes), starts=list(starts), ends=list(ends))
        return self.node("Slice", [x, *(self.ints(*part) for part in (starts, ends, axes, [step] * len(axes)))])

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        if self.opset < 13:
            return self.nodes_out("Split", [x], len(sizes), axis=axis, split=list(sizes))
        return self.nodes_out("Split", [x, self.ints(*sizes)], len(sizes), axis=axis)

    def reshape(self, x: str, *target: int) -> str:
        return self.node("Reshape", [x, self.ints(*target)])

    def transpose(self, x: str, *order: int) -> str:
        return self.node("Transpose", [x], perm=list(order))

    # --- the model ----------------------------------------------------------------------------------------------------

    def shape(self, value: Value) -> list[int | str]:
        return [self.batch, value.channels] if value.flat else [self.batch, value.channels, value.size, value.size]

    def model(self, inputs: list[Value], outputs: list[Value]) -> onnx.ModelProto:
        infos = [
            [helper.make_tensor_value_info(value.name, value.element, self.shape(value)) for value in values]
            for values in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "random", *infos, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.checker.check_model(model, full_check=not self.uses("GroupNormalization"))
        return model

    def uses(self, op: str) -> bool:
        return any(node.op_type == op for node in self.nodes)


def planted(builder: Builder, draw: Any, rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw weights with whole filters zeroed, filters repeated, or input columns zeroed."""
    weight = builder.random.standard_normal((rows, *shape)) / np.sqrt(max(1, np.prod(shape)))
    pattern = draw(st.sampled_from(builder.patterns))
    chosen = builder.random.random(rows) < 0.5
    if pattern == "rows":
        weight[chosen] = 0
    elif pattern == "all":
        weight[:] = 0
    elif pattern == "repeat":
        weight[chosen] = weight[0]
    elif pattern == "scaled":
        weight[chosen] = 2 * weight[0]
    elif pattern == "columns":
        weight[:, builder.random.random(shape[0]) < 0.5] = 0
    return weight


def planted_bias(builder: Builder, draw: Any, rows: int) -> np.ndarray:
    bias = builder.random.standard_normal(rows)
    if builder.patterns == DENSE:
        return bias
    pattern = draw(st.sampled_from(("dense", "zero", "mixed", "same")))
    if pattern == "zero":
        bias[:] = 0
    elif pattern == "mixed":
        bias[builder.random.random(rows) < 0.6] = 0
    elif pattern == "same":
        bias[:] = bias[0]
    return bias


def planted_constant(builder: Builder, draw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a constant operand, with some of its elements zero."""
    array = np.asarray(builder.random.standard_normal(shape))
    if draw(st.booleans()) and builder.patterns != DENSE:
        array = np.where(builder.random.random(shape) < 0.4, 0.0, array)
    return array


def constant_shape(draw: Any, x: Value) -> tuple[int, ...]:
    """Draw the shape of a constant that is broadcast against a value."""
    c, n = x.channels, x.size
    if x.flat:
        return draw(st.sampled_from(((c,), (c,), (1, c), (1,), ())))
    return draw(st.sampled_from(((c, 1, 1), (1, c, 1, 1), (1, 1, 1), (), (1, 1, n, n), (n,), (c, n, n))))
