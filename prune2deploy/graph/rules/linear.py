"""Conv, ConvTranspose, Gemm and MatMul with constant weights."""

from __future__ import annotations

import numpy as np

from prune2deploy.graph.node import Node
from prune2deploy.graph.rules.base import Edit
from prune2deploy.graph.rules.layer import Linear, linear_rule

# --- Conv -----------------------------------------------------------------------------------------------------------


def read_conv(node: Node) -> Linear | str:
    """Return a convolution with constant weights, or why the rule does not cover it."""
    weight, bias = node.constant(1), node.constant(2)
    why = _uncovered(node)
    if why is not None or weight is None:
        return why or "its weights are computed"
    keys = ("strides", "dilations", "pads", "auto_pad")
    rows = len(weight)
    return Linear(
        weight=weight.reshape(rows, weight.shape[1], -1),
        bias=np.zeros(rows) if bias is None else bias.astype(np.float64),
        groups=int(node.attribute("group", 1)),
        padded=_is_padded(node, weight.shape[2:]),
        slot=0,
        in_axis=1,
        out_axis=1,
        out_rank=weight.ndim,
        signature=("Conv", weight.shape[2:], tuple((key, str(node.attribute(key))) for key in keys)),
    )


def _is_padded(node: Node, kernel: tuple[int, ...]) -> bool:
    auto_pad = node.attribute("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        return bool(max(node.attribute("pads", [0])) > 0)
    return bool(auto_pad != "VALID" and max(kernel) > 1)  # SAME needs nothing around a kernel of one tap


def _uncovered(node: Node) -> str | None:
    """Return why a convolution, transposed or not, is beyond the rule."""
    weight = node.constant(1)
    if weight is None or (node.constant(2) is None and node.input(2) is not None):
        return "its weights are computed"
    if weight.ndim < 3 or not node.inputs[0].is_value:
        return "it convolves a constant or has no spatial axis"
    if min(node.attribute("pads", [0])) < 0:
        return "it has negative pads"
    return None


def write_conv(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
    """Write the new weights of a convolution."""
    old = _old(node, 1)
    if not np.may_share_memory(weight, old):
        edit.set_constant(1, weight.reshape(*weight.shape[:2], *old.shape[2:]))
    if node.input(2) is not None or bias.any():
        edit.set_constant(2, bias.astype(old.dtype))
    edit.set_attribute("group", groups)


def _old(node: Node, slot: int) -> np.ndarray:
    array = node.inputs[slot].array
    assert array is not None
    return array


# --- ConvTranspose --------------------------------------------------------------------------------------------------


def read_conv_transpose(node: Node) -> Linear | str:
    """Return a transposed convolution with constant weights [inputs, outputs of a group, taps], or why not.

    How many taps an output sees depends on its place (stride, border), so a constant input is no constant output: it
    counts as padded, but where each output sees the one tap of its own place.
    """
    weight, bias = node.constant(1), node.constant(2)
    why = _uncovered(node)
    if why is not None or weight is None:
        return why or "its weights are computed"
    groups = int(node.attribute("group", 1))
    inputs, height = weight.shape[:2]
    taps = int(np.prod(weight.shape[2:], dtype=np.int64))
    by_group = weight.reshape(groups, inputs // groups, height, taps).transpose(0, 2, 1, 3)
    plain = taps == 1 and max((*node.attribute("strides", [1]), *(1 + pad for pad in _extent(node)))) == 1
    keys = ("strides", "dilations", "pads", "auto_pad", "output_padding", "output_shape")
    return Linear(
        weight=by_group.reshape(groups * height, inputs // groups, taps),
        bias=np.zeros(groups * height) if bias is None else bias.astype(np.float64),
        groups=groups,
        padded=not plain,
        slot=0,
        in_axis=1,
        out_axis=1,
        out_rank=weight.ndim,
        signature=("ConvTranspose", weight.shape[2:], tuple((key, str(node.attribute(key))) for key in keys)),
        per_input=True,
    )


def _extent(node: Node) -> list[int]:
    """Return what makes the output of a transposed convolution larger or smaller; an asked-for shape counts as 1."""
    asked = node.attribute("output_shape") is not None or node.attribute("auto_pad", "NOTSET") != "NOTSET"
    return [*node.attribute("pads", [0]), *node.attribute("output_padding", [0]), int(asked)]


def write_conv_transpose(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
    """Write the new weights of a transposed convolution."""
    old = _old(node, 1)
    rows, inputs, taps = weight.shape
    by_group = weight.reshape(groups, rows // groups, inputs, taps).transpose(0, 2, 1, 3)
    edit.set_constant(1, by_group.reshape(groups * inputs, rows // groups, *old.shape[2:]))
    if node.input(2) is not None or bias.any():
        edit.set_constant(2, bias.astype(old.dtype))
    edit.set_attribute("group", groups)


def transposed_roles(node: Node) -> list[tuple[int, int, str]]:
    """Return (slot, axis, role) for the axes of the constants of a transposed convolution."""
    depthwise = 1 < int(node.attribute("group", 1)) == len(_old(node, 1))
    channels = [(1, 0, "filter")] if depthwise else [(1, 0, "reader"), (1, 1, "filter")]
    return [*channels, (2, 0, "bias")]


# --- Gemm -----------------------------------------------------------------------------------------------------------


def read_gemm(node: Node) -> Linear | str:
    """Return a Gemm with one constant matrix and a bias that varies by row of that matrix only, or why not."""
    slot = 0 if node.inputs[0].is_value else 1
    matrix, bias = node.constant(1 - slot), node.constant(2)
    if matrix is None or matrix.ndim != 2 or (bias is None and node.input(2) is not None):
        return "its bias is computed"
    turned = [bool(node.attribute(name, 0)) for name in ("transA", "transB")]
    weight = matrix if turned[1 - slot] != (slot == 1) else matrix.T
    in_axis = (0 if turned[0] else 1) if slot == 0 else (1 if turned[1] else 0)
    out_axis, rows = 1 - slot, len(weight)
    offset = np.zeros(rows)
    if bias is not None:
        spread = bias.reshape((1,) * (2 - bias.ndim) + bias.shape)
        if spread.shape[slot] != 1:
            return "its bias varies along an axis that its matrix does not have"
        offset = np.broadcast_to(spread.astype(np.float64).ravel() * node.attribute("beta", 1.0), (rows,)).copy()
    alpha = node.attribute("alpha", 1.0)
    scaled = weight if alpha == 1 else (weight * alpha).astype(weight.dtype)
    return Linear(scaled[:, :, None], offset, 1, False, slot, in_axis, out_axis, 2, ("Gemm", slot, in_axis))


def write_gemm(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
    """Write the new weights of a Gemm, alpha and beta folded in."""
    slot = 0 if node.inputs[0].is_value else 1
    turned = bool(node.attribute("transB" if slot == 0 else "transA", 0))
    old = _old(node, 1 - slot)
    if not np.may_share_memory(weight, old):
        matrix = weight[:, :, 0]
        edit.set_constant(1 - slot, matrix if turned != (slot == 1) else matrix.T)
        edit.set_attribute("alpha", 1.0)
    if node.input(2) is not None or bias.any():
        new = bias.astype(old.dtype)
        edit.set_constant(2, new if slot == 0 else new[:, None])
        edit.set_attribute("beta", 1.0)


def gemm_roles(node: Node) -> list[tuple[int, int, str]]:
    """Return (slot, axis, role) for the axes of the constants of a Gemm."""
    slot = 0 if node.inputs[0].is_value else 1
    turned = bool(node.attribute("transB" if slot == 0 else "transA", 0))
    rows = 0 if turned != (slot == 1) else 1
    bias = node.constant(2)
    along = 0 if slot == 1 or bias is None or not bias.ndim else bias.ndim - 1
    return [(1 - slot, rows, "filter"), (1 - slot, 1 - rows, "reader"), (2, along, "bias")]


# --- MatMul ---------------------------------------------------------------------------------------------------------


def read_matmul(node: Node) -> Linear | str:
    """Return a MatMul with one matrix, or vector, on either side, or why not."""
    slot = 0 if node.inputs[0].is_value else 1
    array, rank = node.inputs[1 - slot].array, node.inputs[slot].rank
    if array is None or rank is None or not rank or not array.ndim:
        return "it does not have one constant operand"
    if array.size != np.prod(array.shape[-2:], dtype=np.int64):
        return "its constant is a batch of matrices"
    if rank == array.ndim == 1:
        return "it is a product of two vectors"
    matrix = array.reshape(array.shape[-2:])
    weight = matrix[None] if array.ndim == 1 else matrix.T if slot == 0 else matrix
    in_axis = rank - 1 if slot == 0 else max(rank - 2, 0)
    out_rank = max(rank, array.ndim) - (1 if 1 in (rank, array.ndim) else 0)
    out_axis = out_rank - 1 if slot == 0 or rank == 1 else out_rank - 2
    if array.ndim == 1:  # no axis is produced: the one row belongs to every place
        out_axis = 0
        if node.outputs[0].shape is None or len(node.outputs[0].shape) != out_rank:
            return "the shape of its result is not known"
    return Linear(
        weight[:, :, None],
        np.zeros(len(weight)),
        1,
        False,
        slot,
        in_axis,
        out_axis,
        out_rank,
        ("MatMul", slot, array.ndim),
    )


def write_matmul(node: Node, edit: Edit, weight: np.ndarray, bias: np.ndarray, groups: int) -> None:
    """Write the new matrix of a MatMul; what constants add goes into an Add behind it."""
    slot = 0 if node.inputs[0].is_value else 1
    old = _old(node, 1 - slot)
    matrix = weight[:, :, 0]
    if not np.may_share_memory(weight, old):
        turned = matrix.T if slot == 0 or old.ndim == 1 else matrix
        edit.set_constant(
            1 - slot, turned.reshape(-1) if old.ndim == 1 else turned.reshape(old.shape[:-2] + turned.shape)
        )
    if bias.any():
        new = bias.astype(matrix.dtype)
        along_last = slot == 0 or old.ndim == 1 or node.inputs[slot].rank == 1
        edit.after("Add", {}, new if along_last else new[:, None])


def matmul_roles(node: Node) -> list[tuple[int, int, str]]:
    """Return (slot, axis, role) for the axes of the constants of a MatMul with a constant."""
    slot = 0 if node.inputs[0].is_value else 1
    last = _old(node, 1 - slot).ndim - 1
    if last == 0:
        return [(1 - slot, 0, "reader")]
    return [
        (1 - slot, last if slot == 0 else last - 1, "filter"),
        (1 - slot, last - 1 if slot == 0 else last, "reader"),
    ]


def conv_roles(node: Node) -> list[tuple[int, int, str]]:
    """Return (slot, axis, role) for the axes of the constants of a convolution."""
    depthwise = int(node.attribute("group", 1)) > 1 and _old(node, 1).shape[1] == 1
    return [(1, 0, "filter"), *([] if depthwise else [(1, 1, "reader")]), (2, 0, "bias")]


CONV = linear_rule(read_conv, write_conv, conv_roles)
CONV_TRANSPOSE = linear_rule(read_conv_transpose, write_conv_transpose, transposed_roles)
GEMM = linear_rule(read_gemm, write_gemm, gemm_roles)
MATMUL = linear_rule(read_matmul, write_matmul, matmul_roles)
