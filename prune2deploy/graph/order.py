"""What keeps a graph in order while it is changed: who reads what, which nodes are dead, which come first."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from prune2deploy.errors import InputError


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of ``old`` read ``new``."""
    for reader in list(old.outputs):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]


def remove_dead_nodes(graph: gs.Graph) -> None:
    """Remove every node that no output depends on; inputs stay."""
    alive: set[int] = set()
    stack = [producer for tensor in graph.outputs for producer in tensor.inputs]
    while stack:
        node = stack.pop()
        if id(node) in alive:
            continue
        alive.add(id(node))
        stack += [producer for tensor in all_inputs(node) for producer in tensor.inputs]
    for node in graph.nodes:
        if id(node) not in alive:
            node.inputs.clear()
            node.outputs.clear()
    graph.nodes = [node for node in graph.nodes if id(node) in alive]


def all_inputs(node: gs.Node) -> Iterable[gs.Tensor]:
    """Yield everything that a node reads, in its subgraphs too."""
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield from value.outputs
            for inner in value.nodes:
                yield from all_inputs(inner)


def outputs_within(graph: gs.Graph) -> set[int]:
    """Return the ids of the outputs of a graph and of those inside it."""
    inner = (value for node in graph.nodes for value in node.attrs.values() if isinstance(value, gs.Graph))
    return {id(tensor) for tensor in graph.outputs}.union(*map(outputs_within, inner))


def sort_nodes(graph: gs.Graph) -> None:
    """Sort the nodes topologically, keeping their order where it is already right."""
    made_by = {id(tensor): node for node in graph.nodes for tensor in node.outputs}
    state: dict[int, str] = {}
    order: list[gs.Node] = []
    for root in graph.nodes:
        stack = [(root, iter(list(all_inputs(root))))] if id(root) not in state else []
        while stack:
            node, inputs = stack[-1]
            state[id(node)] = "open"
            for tensor in inputs:
                maker = made_by.get(id(tensor))
                if maker is None or state.get(id(maker)) == "done":
                    continue
                if state.get(id(maker)) == "open":
                    raise InputError("the graph has a cycle, which ONNX does not allow; export it again")
                stack.append((maker, iter(list(all_inputs(maker)))))
                break
            else:
                state[id(node)] = "done"
                order.append(node)
                stack.pop()
    graph.nodes = order
