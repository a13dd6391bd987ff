"""What an integer vector (or scalar) holds that is computed from sizes: shapes, picked apart and put together again."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from prune2deploy.graph.sizes import Size, product, quotient

MOST = 64
"""Constants of more elements are no arithmetic on sizes."""
MOST_READ = 200
"""Values that are looked at to know one vector."""
INTEGERS = (np.int64, np.int32)
Entries = list[Size]
"""By number or name, or None where the entry is not known."""


Known = dict[int, Entries | None]
"""By the identity of a value."""


def entries_of(tensor: gs.Tensor, known: Known | None = None) -> Entries | None:
    """Return what an integer vector (or scalar) holds, sizes by number or name, or None where that is not known.

    ``known`` is what was found on the way: a value may be read many times.
    """
    known = {} if known is None else known
    if id(tensor) not in known:
        known[id(tensor)] = None  # until it is known
        known[id(tensor)] = _read(tensor, known)
    return known[id(tensor)]


def _read(tensor: gs.Tensor, known: Known) -> Entries | None:
    if tensor.shape is not None and len(tensor.shape) > 1:  # what selects from it would take whole rows
        return None
    if isinstance(tensor, gs.Constant):
        values = np.ravel(tensor.values)
        if len(values) > MOST or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            return None
        return [int(value) for value in values] if (values == np.trunc(values)).all() else None  # 1.5 times a size
    if not tensor.inputs or len(known) > MOST_READ:
        return None
    node = tensor.inputs[0]
    read = READERS.get(node.op) if not node.domain else None
    found = None if read is None else read(node, known)
    return [None] if found is None and tensor.shape is not None and list(tensor.shape) in ([], [1]) else found


def _shape_entries(node: gs.Node, known: Known) -> Entries | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    return list(shape)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]


def _gathered(node: gs.Node, known: Known) -> Entries | None:
    whole, index = entries_of(node.inputs[0], known), node.inputs[1]
    if whole is None or not isinstance(index, gs.Constant) or np.ndim(index.values) > 1:
        return None
    return [whole[int(place)] for place in np.ravel(index.values)]


def _sliced(node: gs.Node, known: Known) -> Entries | None:
    whole = entries_of(node.inputs[0], known)
    if "starts" in node.attrs:
        bounds = [node.attrs["starts"], node.attrs["ends"]]
    elif all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        bounds = [np.ravel(tensor.values).tolist() for tensor in node.inputs[1:]]
    else:
        return None
    step = bounds[3][0] if len(bounds) > 3 else 1
    return None if whole is None or len(bounds[0]) != 1 else whole[bounds[0][0] : bounds[1][0] : step]


def _joined(node: gs.Node, known: Known) -> Entries | None:
    parts = [entries_of(tensor, known) for tensor in node.inputs]
    found = [part for part in parts if part is not None]
    return [entry for part in found for entry in part] if len(found) == len(parts) else None


def _passed(node: gs.Node, known: Known) -> Entries | None:
    return entries_of(node.inputs[0], known)


WHOLE_NUMBERS = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.DOUBLE}
)
"""Types that hold the sizes of tensors exactly."""


def _cast(node: gs.Node, known: Known) -> Entries | None:
    return entries_of(node.inputs[0], known) if node.attrs.get("to") in WHOLE_NUMBERS else None


def _arithmetic(function: Callable[[int, int], int]) -> Callable[[gs.Node, Known], Entries | None]:
    def read(node: gs.Node, known: Known) -> Entries | None:
        a, b = _operands(node, known)
        return [function(a, b)] if isinstance(a, int) and isinstance(b, int) else None

    return read


def _operands(node: gs.Node, known: Known) -> tuple[Size, Size]:
    a, b = (entries_of(tensor, known) for tensor in node.inputs)
    return (a[0], b[0]) if a is not None and b is not None and len(a) == len(b) == 1 else (None, None)


def _multiplied(node: gs.Node, known: Known) -> Entries | None:
    a, b = _operands(node, known)
    return None if a is None or b is None else [product([a, b])]


def _divided(node: gs.Node, known: Known) -> Entries | None:
    """Return a quotient where it is the same for integers and for floats that were cast from them."""
    a, b = _operands(node, known)
    if isinstance(a, int) and isinstance(b, int) and node.outputs[0].dtype in INTEGERS:
        return [a // b] if a >= 0 and b > 0 else None
    return [quotient(a, b)] if isinstance(b, str) or (isinstance(b, int) and b > 0) else None


READERS: dict[str, Callable[[gs.Node, Known], Entries | None]] = {
    "Shape": _shape_entries,
    "Gather": _gathered,
    "Slice": _sliced,
    "Concat": _joined,
    "Unsqueeze": _passed,
    "Squeeze": _passed,
    "Reshape": _passed,
    "Identity": _passed,
    "Cast": _cast,
    "Floor": _passed,
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _multiplied,
    "Div": _divided,
}
