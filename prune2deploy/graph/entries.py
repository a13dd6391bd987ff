"""What an integer vector (or scalar) holds that is computed from sizes: shapes, picked apart and put together again."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.sizes import Size, product, quotient

MOST = 64
"""Constants of more elements are no arithmetic on sizes."""
DEEPEST = 40
INTEGERS = (np.int64, np.int32)
Entries = list[Size]
"""By number or name, or None where the entry is not known."""


def entries_of(tensor: gs.Tensor, depth: int = 0) -> Entries | None:
    """Return what an integer vector (or scalar) holds, sizes by number or name, or None where that is not known."""
    if tensor.shape is not None and len(tensor.shape) > 1:  # what selects from it would take whole rows
        return None
    if isinstance(tensor, gs.Constant):
        values = np.ravel(tensor.values)
        if len(values) > MOST or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            return None
        return [int(value) for value in values] if (values == np.trunc(values)).all() else None  # 1.5 times a size
    if not tensor.inputs or depth > DEEPEST:
        return None
    node = tensor.inputs[0]
    read = READERS.get(node.op) if not node.domain else None
    found = None if read is None else read(node, depth + 1)
    return [None] if found is None and tensor.shape is not None and list(tensor.shape) in ([], [1]) else found


def _shape_entries(node: gs.Node, depth: int) -> Entries | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    return list(shape)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]


def _gathered(node: gs.Node, depth: int) -> Entries | None:
    whole, index = entries_of(node.inputs[0], depth), node.inputs[1]
    if whole is None or not isinstance(index, gs.Constant) or np.ndim(index.values) > 1:
        return None
    return [whole[int(place)] for place in np.ravel(index.values)]


def _sliced(node: gs.Node, depth: int) -> Entries | None:
    whole = entries_of(node.inputs[0], depth)
    if "starts" in node.attrs:
        bounds = [node.attrs["starts"], node.attrs["ends"]]
    elif all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        bounds = [np.ravel(tensor.values).tolist() for tensor in node.inputs[1:]]
    else:
        return None
    step = bounds[3][0] if len(bounds) > 3 else 1
    return None if whole is None or len(bounds[0]) != 1 else whole[bounds[0][0] : bounds[1][0] : step]


def _joined(node: gs.Node, depth: int) -> Entries | None:
    parts = [entries_of(tensor, depth) for tensor in node.inputs]
    known = [part for part in parts if part is not None]
    return [entry for part in known for entry in part] if len(known) == len(parts) else None


def _passed(node: gs.Node, depth: int) -> Entries | None:
    return entries_of(node.inputs[0], depth)


def _arithmetic(function: Callable[[int, int], int]) -> Callable[[gs.Node, int], Entries | None]:
    def read(node: gs.Node, depth: int) -> Entries | None:
        a, b = _operands(node, depth)
        return [function(a, b)] if isinstance(a, int) and isinstance(b, int) else None

    return read


def _operands(node: gs.Node, depth: int) -> tuple[Size, Size]:
    a, b = (entries_of(tensor, depth) for tensor in node.inputs)
    return (a[0], b[0]) if a is not None and b is not None and len(a) == len(b) == 1 else (None, None)


def _multiplied(node: gs.Node, depth: int) -> Entries | None:
    return [product(_operands(node, depth))]


def _divided(node: gs.Node, depth: int) -> Entries | None:
    """Return a quotient where it is the same for integers and for floats that were cast from them."""
    a, b = _operands(node, depth)
    if isinstance(a, int) and isinstance(b, int) and node.outputs[0].dtype in INTEGERS:
        return [a // b] if a >= 0 and b > 0 else None
    return [quotient(a, b)] if isinstance(b, str) or (isinstance(b, int) and b > 0) else None


READERS: dict[str, Callable[[gs.Node, int], Entries | None]] = {
    "Shape": _shape_entries,
    "Gather": _gathered,
    "Slice": _sliced,
    "Concat": _joined,
    "Unsqueeze": _passed,
    "Squeeze": _passed,
    "Reshape": _passed,
    "Identity": _passed,
    "Cast": _passed,
    "Floor": _passed,
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _multiplied,
    "Div": _divided,
}
