"""Borders of minus infinity before a MaxPool: the padding that the operator has of its own.

Exporters write the borders of TensorFlow's "same" padding so where they are uneven. No fact holds of an infinite value.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.order import remove_dead_nodes


def fold_infinite_pads(graph: gs.Graph) -> None:
    """Let every MaxPool behind a Pad by minus infinity along axes of space pad its input itself."""
    found = [(node, pads) for node in graph.nodes if (pads := _pads(node)) is not None]
    for pool, pads in found:
        pool.inputs = [pool.inputs[0].inputs[0].inputs[0]]
        pool.attrs = {key: value for key, value in pool.attrs.items() if key != "auto_pad"} | {"pads": pads}
    if found:
        remove_dead_nodes(graph)


def _pads(pool: gs.Node) -> list[int] | None:
    """Return the padding of a MaxPool and of the Pad before it together; None where it cannot do without the Pad.

    A window that holds nothing but padding has no largest element, and places are counted with the Pad's border.
    """
    if pool.op != "MaxPool" or pool.domain or any(tensor.name for tensor in pool.outputs[1:]):
        return None
    if pool.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or pool.attrs.get("ceil_mode", 0):
        return None
    kernel = list(pool.attrs["kernel_shape"])
    border = _infinite_border(pool.inputs[0], len(kernel) + 2)
    if border is None or max(pool.attrs.get("dilations") or [1]) > 1:
        return None
    own = pool.attrs.get("pads") or [0] * len(border)
    pads = [int(amount) + int(more) for amount, more in zip(own, border, strict=True)]
    return pads if all(amount < size for amount, size in zip(pads, kernel * 2, strict=True)) else None


def _infinite_border(tensor: gs.Tensor, rank: int) -> list[int] | None:
    """Return how far a Pad puts minus infinity before and behind each axis of space, and nothing else anywhere."""
    pad = tensor.inputs[0] if tensor.inputs else None
    if pad is None or pad.op != "Pad" or pad.domain or pad.attrs.get("mode", "constant") != "constant":
        return None
    parts = {slot: part for slot, part in enumerate(pad.inputs) if slot and part.name}
    if not all(isinstance(part, gs.Constant) for part in parts.values()):
        return None
    amounts = parts[1].values if 1 in parts else pad.attrs.get("pads")
    value = parts[2].values if 2 in parts else pad.attrs.get("value", 0.0)
    axes = parts[3].values if 3 in parts else np.arange(rank)
    if amounts is None or np.size(amounts) != 2 * axes.size or np.ravel(value).tolist() != [-np.inf]:
        return None
    border = np.zeros((2, rank), dtype=np.int64)
    border[:, axes] = np.reshape(amounts, (2, -1))
    return None if (border < 0).any() or border[:, :2].any() else border[:, 2:].ravel().tolist()
