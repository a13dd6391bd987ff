"""Values that are constant wherever they are live: written down in place of the branch that computed them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.keep import Analysis
from prune2deploy.graph.node import Operand
from prune2deploy.graph.order import redirect
from prune2deploy.graph.shapes import Sizes

INLINE = 1024
"""Constants of up to so many elements are stored whole; a larger one is stored by channel and expanded."""


def write_constants(graph: gs.Graph, analysis: Analysis) -> None:
    """Replace every constant value of an analysed graph; the nodes that computed them lose their output."""
    tensors = graph.tensors()
    operands = {out.name: out for node in analysis.tables.nodes for out in node.outputs}
    sizes = Sizes(graph)
    made: list[gs.Node] = []
    for name in sorted(analysis.liveness.constants):
        variable, operand = tensors[name], operands[name]
        variable.inputs.clear()
        channels, shape = constant_of(operand, analysis)
        is_output = any(variable is output for output in graph.outputs)
        static = [size for size in shape if isinstance(size, int)]
        if len(static) == len(shape) and np.prod(static, dtype=np.int64) <= INLINE:
            whole = gs.Constant(
                sizes.fresh(f"{name}_constant"), np.ascontiguousarray(np.broadcast_to(channels, static))
            )
            if is_output:
                made.append(gs.Node("Identity", f"{name}_constant", {}, [whole], [variable]))
            else:
                redirect(variable, whole)
            continue
        small = gs.Constant(sizes.fresh(f"{name}_constant"), channels)
        made.append(gs.Node("Expand", f"{name}_constant", {}, [small, sizes.vector(shape)], [variable]))
    graph.nodes = [*sizes.nodes, *made, *graph.nodes]


def constant_of(operand: Operand, analysis: Analysis) -> tuple[np.ndarray, list[int | str]]:
    """Return a constant value's kept positions in its own type (size 1 along collapsed axes), and its new shape."""
    fact = analysis.known.view.of(operand)
    values = np.where(fact.constant, fact.shift, 0.0)
    shape: list[int | str] = []
    for axis, size in enumerate(operand.shape or ()):
        kept = analysis.keep.indices(operand.name, axis)
        if kept is not None:
            values, size = np.take(values, kept, axis=axis), len(kept)
        assert size is not None
        shape.append(size)
    return values.astype(operand.dtype), shape
