"""Constants that a graph keeps quantised: integers behind a DequantizeLinear, or floats behind a pair with Quantize.

Folding them would be exact, but the runtime's integer kernels start from the pair, so they stay. The analysis sees
the dequantised values, and knows that nothing but a part of the stored integers may be written in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32"})
"""Types of stored integers that are covered."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A quantised constant: ``values = scale * (integers - zero_point)``, along ``axis`` or with one scale for all.

    Attributes:
        integers: what the DequantizeLinear reads.
        scale: [] or [1], or one per index of ``axis``.
        zero_point: shaped like the scale, or None where it is absent (0).
        axis: the axis that scale and zero point follow; None where there is one of each.
        source: the name of the constant that is stored: the integers, or the floats that are quantised at run time.
    """

    integers: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    axis: int | None
    source: str

    def values(self) -> np.ndarray:
        """Return the dequantised values, computed in the scale's precision as the operator does."""
        scale, zero_point = self.aligned()
        return np.asarray((self.integers.astype(np.int64) - zero_point).astype(scale.dtype) * scale)

    def aligned(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and zero point (int64) so that they broadcast with the integers."""
        zero_point = np.zeros(self.scale.shape, np.int64) if self.zero_point is None else self.zero_point
        if self.axis is None:
            return self.scale.reshape(()), zero_point.reshape(()).astype(np.int64)
        column = [1] * self.integers.ndim
        column[self.axis] = -1
        return self.scale.reshape(column), zero_point.reshape(column).astype(np.int64)

    def part(self, integers: np.ndarray, indices: np.ndarray | None) -> Stored:
        """Return this with other integers, for which ``indices`` of the axis are kept (None: all)."""
        if self.axis is None or indices is None:
            return Stored(integers, self.scale, self.zero_point, self.axis, self.source)
        zero_point = None if self.zero_point is None else self.zero_point[indices]
        return Stored(integers, self.scale[indices], zero_point, self.axis, self.source)

    def of_values(self, values: np.ndarray) -> Stored | None:
        """Return this with the integers that stand for ``values`` exactly, or None where there are none."""
        if self.axis is not None and values.shape[self.axis : self.axis + 1] != self.scale.shape:
            return None
        limits = np.iinfo(self.integers.dtype)
        made = Stored(np.empty((0,) * values.ndim, self.integers.dtype), self.scale, self.zero_point, self.axis, "")
        scale, zero_point = made.aligned()
        with np.errstate(all="ignore"):
            integers = np.rint(values.astype(np.float64) / scale.astype(np.float64)) + zero_point
        if not (np.isfinite(integers).all() and (integers >= limits.min).all() and (integers <= limits.max).all()):
            return None
        found = Stored(integers.astype(self.integers.dtype), self.scale, self.zero_point, self.axis, self.source)
        again = found.values()
        return found if again.dtype == values.dtype and np.array_equal(again, values) else None


def stored_in(tensor: gs.Tensor) -> Stored | None:
    """Return what a value is a dequantised constant of, or None where it is anything else."""
    maker = _maker(tensor)
    if maker is None or not keeps_quantised(maker):
        return None
    parameters = _parameters(maker)
    if parameters is None:
        return None
    scale, zero_point = parameters
    first = maker.inputs[0]
    floats = None if isinstance(first, gs.Constant) else first.inputs[0]
    source = first if floats is None else floats.inputs[0]
    axis = None if scale.size == 1 else int(maker.attrs.get("axis", 1)) % np.ndim(source.values)
    if floats is None:
        integers = np.asarray(first.values)
    else:
        made = _quantised(floats, maker, scale, zero_point, axis)
        if made is None:
            return None
        integers = made
    if str(integers.dtype) not in INTEGERS or (axis is not None and integers.shape[axis] != scale.size):
        return None
    found = Stored(integers, scale, zero_point, axis, source.name)
    return found if np.isfinite(scale).all() and (scale > 0).all() else None


def _maker(tensor: gs.Tensor) -> gs.Node | None:
    return None if isinstance(tensor, gs.Constant) or len(tensor.inputs) != 1 else tensor.inputs[0]


def keeps_quantised(node: gs.Node) -> bool:
    """Whether a node dequantises a constant, or floats that a QuantizeLinear before it quantises."""
    if node.op != "DequantizeLinear" or node.domain not in (None, "", "ai.onnx"):
        return False
    if not all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in node.inputs[1:]):
        return False
    return isinstance(node.inputs[0], gs.Constant) or _quantises_constant(_maker(node.inputs[0]))


def _quantises_constant(node: gs.Node | None) -> bool:
    return (
        node is not None
        and node.op == "QuantizeLinear"
        and all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in node.inputs)
    )


def feeds_quantised(node: gs.Node) -> bool:
    """Whether a node's result is, directly, a quantised constant that stays: it must not be folded."""
    if keeps_quantised(node):
        return True
    return _quantises_constant(node) and any(reader.op == "DequantizeLinear" for reader in node.outputs[0].outputs)


def _parameters(node: gs.Node) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Return scale and zero point, or None for scales by block and for types that are not covered."""
    scale = np.asarray(node.inputs[1].values)
    zero_point = None
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        zero_point = np.asarray(node.inputs[2].values)
        if str(zero_point.dtype) not in INTEGERS or zero_point.size != scale.size:
            return None
    if node.attrs.get("block_size", 0) or scale.ndim > 1 or str(scale.dtype) not in ("float32", "float16"):
        return None
    return (scale, zero_point) if node.outputs[0].dtype == scale.dtype else None


def _quantised(
    quantise: gs.Node, dequantise: gs.Node, scale: np.ndarray, zero_point: np.ndarray | None, axis: int | None
) -> np.ndarray | None:
    """Return the integers that a QuantizeLinear makes of its floats; None where the pair does not match."""
    own = _parameters_of_pair(quantise)
    floats = np.asarray(quantise.inputs[0].values)
    if own is None or zero_point is None or len(dequantise.inputs[0].outputs) != 1:
        return None
    same = np.array_equal(own[0], scale) and np.array_equal(own[1], zero_point) and own[1].dtype == zero_point.dtype
    if (
        not same
        or floats.dtype != scale.dtype
        or (axis is not None and quantise.attrs.get("axis", 1) % floats.ndim != axis)
    ):
        return None
    column = [1] * floats.ndim
    if axis is not None:
        column[axis] = -1
    limits = np.iinfo(zero_point.dtype)
    shape = column if axis is not None else ()
    rounded = np.rint(floats / scale.reshape(shape)).astype(np.float64) + zero_point.reshape(shape)
    return np.asarray(np.clip(rounded, limits.min, limits.max).astype(zero_point.dtype))


def _parameters_of_pair(quantise: gs.Node) -> tuple[np.ndarray, np.ndarray] | None:
    if len(quantise.inputs) < 3 or quantise.inputs[2].is_empty() or quantise.attrs.get("block_size", 0):
        return None
    return np.asarray(quantise.inputs[1].values), np.asarray(quantise.inputs[2].values)


def absorb_transposes(graph: gs.Graph) -> None:
    """Store transposed what a Transpose turns after a DequantizeLinear, so that the layer reads the pair itself."""
    for node in list(graph.nodes):
        if node.op != "Transpose" or node.domain not in (None, "", "ai.onnx"):
            continue
        stored, output = stored_in(node.inputs[0]), node.outputs[0]
        maker = _maker(node.inputs[0])
        if stored is None or maker is None or not isinstance(maker.inputs[0], gs.Constant):
            continue
        perm = [int(axis) for axis in node.attrs.get("perm", range(stored.integers.ndim)[::-1])]
        turned = gs.Constant(f"{output.name}_stored", np.ascontiguousarray(stored.integers.transpose(perm)))
        attributes = dict(maker.attrs)
        if stored.axis is not None:
            attributes["axis"] = perm.index(stored.axis)
        node.inputs.clear()
        node.outputs.clear()
        place = graph.nodes.index(node)
        graph.nodes[place] = gs.Node("DequantizeLinear", node.name, attributes, [turned, *maker.inputs[1:]], [output])
