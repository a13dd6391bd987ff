"""Windows that are cut out of a batch of channels: Reshape, Transpose, Reshape with the batch and the channels apart.

``[N, C, H, W]`` as ``[N * C * H/p, p, W/p, p]`` (MobileViT unfolds its maps so) hides the channels in the batch, of
which the size is not known. While channels are removed, the triple stands as ``[N, C, H/p, p, W/p, p]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.names import fresh
from prune2deploy.graph.sizes import is_open
from prune2deploy.graph.triples import Chain, chains

WINDOWS = "prune2deploy_windows"
"""On a Transpose: what the Reshape before it read as its target."""


def part_windows(graph: gs.Graph) -> None:
    """Take the channels out of the batch in every such triple of a sorted graph."""
    names: set[str] | None = None
    for nodes in chains(graph, "Transpose"):
        inner = _inner(nodes)
        if inner:
            names = set(graph.tensors()) if names is None else names
            _part(nodes, inner, names)


def _inner(nodes: Chain) -> list[int]:
    """Return the sizes that the first axis of the triple's middle holds besides the batch; none where it is not one."""
    first, turn, last = nodes
    before, split = first.inputs[0].shape, first.outputs[0].shape
    targets = [node.inputs[1] for node in (first, last)]
    if before is None or split is None or not all(isinstance(target, gs.Constant) for target in targets):
        return []
    if not before or not split or not isinstance(before[0], str) or is_open(before[0]) or isinstance(split[0], int):
        return []
    if not all(isinstance(size, int) and size > 0 for size in (*before[1:], *split[1:])):
        return []
    if turn.attrs.get("perm", [-1])[0] != 0 or 0 in targets[1].values:
        return []
    rest, odd = divmod(int(np.prod(before[1:])), int(np.prod(split[1:])))
    if odd:
        return []
    found: list[int] = []
    for size in before[1:]:
        if rest > 1:
            part = size if rest % size == 0 else rest
            if size % part:
                return []
            found.append(part)
            rest //= part
    return found


def _part(nodes: Chain, inner: Sequence[int], names: set[str]) -> None:
    first, turn, _ = nodes
    split, turned = first.outputs[0], turn.outputs[0]
    target = gs.Constant(fresh(f"{split.name}_windows", names), np.array([0, *inner, *split.shape[1:]], dtype=np.int64))
    batch = first.inputs[0].shape[0]
    whole, first.inputs[1] = first.inputs[1], target
    first.attrs.pop("allowzero", None)
    perm = [0, *range(1, len(inner) + 1), *(axis + len(inner) for axis in turn.attrs["perm"][1:])]
    turn.attrs |= {"perm": perm, WINDOWS: whole}
    split.shape = [batch, *inner, *split.shape[1:]]
    turned.shape = [split.shape[axis] for axis in perm]


def join_windows(graph: gs.Graph) -> None:
    """Put the channels back into the batch in every triple that `part_windows` changed and that is still there."""
    marked = [node for node in graph.nodes if WINDOWS in node.attrs]
    names = set(graph.tensors()) if marked else set()
    for turn in marked:
        whole = turn.attrs.pop(WINDOWS)
        first = turn.inputs[0].inputs[0] if turn.inputs and turn.inputs[0].inputs else None
        if first is None or first.op != "Reshape" or not isinstance(first.inputs[1], gs.Constant):
            continue  # what it turned became a constant
        sizes = first.inputs[1].values.ravel()
        count = len(sizes) - whole.values.size
        if sizes[count + 1 :].tolist() != whole.values.ravel()[1:].tolist():
            whole = gs.Constant(fresh(f"{whole.name}_joined", names), np.array([-1, *sizes[count + 1 :]]))
        first.inputs[1] = whole
        turn.attrs["perm"] = [0, *(axis - count for axis in turn.attrs["perm"][count + 1 :])]
        first.outputs[0].shape = turn.outputs[0].shape = None
