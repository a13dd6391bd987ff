"""Three nodes in a row that stand as one while channels are removed, and come back afterwards as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from prune2deploy.graph.fact import Shape
from prune2deploy.graph.names import fresh
from prune2deploy.graph.order import outputs_within

Chain = tuple[gs.Node, gs.Node, gs.Node]


@dataclass(frozen=True, eq=False)
class Place:
    """Where a node stood that was taken out of the graph: before which node that stayed, and at which index."""

    node: gs.Node
    anchor: gs.Node
    index: int


@dataclass(frozen=True, eq=False)
class Triple:
    """The nodes that another stands for, taken out of the graph, with what they read and write between them.

    The outer two are Reshapes, and ``targets`` are what they read besides. ``places`` are those of the first two nodes,
    and of the nodes that computed a target for nobody else.
    """

    nodes: Chain
    targets: tuple[gs.Tensor, gs.Tensor]
    between: tuple[gs.Variable, gs.Variable]
    places: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class Return:
    """A triple that takes its place again, with the targets of its Reshapes and what its middle node reads besides.

    ``before`` are new nodes that must stand before the last of the three.
    """

    stand_in: gs.Node
    triple: Triple
    targets: tuple[gs.Tensor, gs.Tensor]
    parameters: Sequence[gs.Tensor] = ()
    before: Sequence[gs.Node] = ()


def chains(graph: gs.Graph, middle: str) -> Iterator[Chain]:
    """Yield every Reshape, ``middle``, Reshape that nobody else looks into."""
    outputs = {id(tensor) for tensor in graph.outputs}
    for last in graph.nodes:
        chain = [last]
        for op in ("Reshape", middle, "Reshape"):
            node = chain[-1]
            source = node.inputs[0] if node.op == op and not node.domain and node.inputs else None
            if source is None:
                break
            alone = len(source.outputs) == 1 and id(source) not in outputs
            if len(chain) == 3:
                yield chain[2], chain[1], chain[0]
                break
            if not alone or not source.inputs:
                break
            chain.append(source.inputs[0])


def replace(graph: gs.Graph, found: Sequence[tuple[Chain, gs.Node]]) -> list[Triple]:
    """Put one node in the place of each chain, and return the chains, cut off; the new nodes take their outputs.

    The new nodes must read what they read already: what nobody reads any more goes with the chains.
    """
    index = {id(node): number for number, node in enumerate(graph.nodes)}
    parts = [_cut(nodes, stand_in) for nodes, stand_in in found]
    outputs = outputs_within(graph)
    asides = [_unread(targets, outputs) for targets, _ in parts]
    hidden = {id(node) for (nodes, _), aside in zip(found, asides, strict=True) for node in (*nodes[:2], *aside)}
    instead = {id(nodes[2]): stand_in for nodes, stand_in in found}
    after: dict[int, gs.Node] = {}
    follower: gs.Node | None = None
    for node in reversed(graph.nodes):
        if id(node) not in hidden:
            follower = instead.get(id(node), node)
        elif follower is not None:
            after[id(node)] = follower
    graph.nodes = [instead.get(id(node), node) for node in graph.nodes if id(node) not in hidden]
    return [
        Triple(
            nodes=nodes,
            targets=targets,
            between=between,
            places=tuple(Place(node, after[id(node)], index[id(node)]) for node in (*nodes[:2], *aside)),
        )
        for (nodes, _), (targets, between), aside in zip(found, parts, asides, strict=True)
    ]


def _cut(nodes: Chain, stand_in: gs.Node) -> tuple[tuple[gs.Tensor, gs.Tensor], tuple[gs.Variable, gs.Variable]]:
    """Take the output of a chain over, and return its targets and what it had between its nodes."""
    first, middle, last = nodes
    output, targets = last.outputs[0], (first.inputs[1], last.inputs[1])
    between = (first.outputs[0], middle.outputs[0])
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()
    stand_in.outputs = [output]
    return targets, between


def _unread(targets: Sequence[gs.Tensor], outputs: set[int]) -> list[gs.Node]:
    """Return the nodes that computed targets and that nobody reads any more."""
    gone: dict[int, gs.Node] = {}
    stack = [maker for tensor in targets for maker in tensor.inputs]
    while stack:
        node = stack.pop()
        read = any(id(out) in outputs or any(id(by) not in gone for by in out.outputs) for out in node.outputs)
        if not read and id(node) not in gone:
            gone[id(node)] = node
            stack += [maker for tensor in node.inputs for maker in tensor.inputs]
    return list(gone.values())


class Targets:
    """Rewrites the target shapes of Reshapes; those that share one go on sharing what it becomes."""

    def __init__(self, graph: gs.Graph) -> None:
        self.tensors: dict[str, gs.Tensor] = graph.tensors()
        self._written: dict[tuple[int, tuple[int, ...]], gs.Constant] = {}

    def rewritten(self, old: gs.Constant, sizes: np.ndarray) -> gs.Constant:
        """Return a constant with these sizes, under the old one's name where that is free; the old one if it fits."""
        key = (id(old), tuple(sizes.ravel().tolist()))
        if key not in self._written:
            same = bool((old.values == sizes).all()) and self.tensors.get(old.name, old) is old
            name = old.name if same or old.name not in self.tensors else fresh(old.name, set(self.tensors))
            self._written[key] = old if same else gs.Constant(name, sizes)
            self.tensors[name] = self._written[key]
        return self._written[key]


def put_back(graph: gs.Graph, returns: Sequence[Return], targets: Targets) -> None:
    """Put triples back in the place of the nodes that stand for them, each node where it stood if that is possible."""
    position = {id(node): index for index, node in enumerate(graph.nodes)}
    before: dict[int, list[tuple[int, gs.Node]]] = {}
    new: dict[int, Sequence[gs.Node]] = {}
    instead: dict[int, gs.Node] = {}
    placed: set[int] = set()
    for item in returns:
        source = item.stand_in.inputs[0]
        made = max((position.get(id(node), -1) for node in source.inputs), default=-1)
        _connect(item, targets.tensors)
        own = {id(node) for node in item.triple.nodes}
        reading = [one for one in item.triple.places if id(one.node) in own or source in one.node.inputs]
        late = {id(one.node) for one in reading if made >= position.get(id(one.anchor), -1)}
        for place in item.triple.places:
            if id(place.node) not in placed:
                moved = bool(late and place in reading) or id(place.anchor) not in position
                anchor = item.stand_in if moved else place.anchor
                before.setdefault(id(anchor), []).append((place.index, place.node))
                placed.add(id(place.node))
        new[id(item.stand_in)] = item.before
        instead[id(item.stand_in)] = item.triple.nodes[2]
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        nodes += [earlier for _, earlier in sorted(before.get(id(node), ()), key=lambda pair: pair[0])]
        nodes += [*new.get(id(node), ()), instead.get(id(node), node)]
    graph.nodes = nodes


def _connect(item: Return, tensors: dict[str, gs.Tensor]) -> None:
    source, output = item.stand_in.inputs[0], item.stand_in.outputs[0]
    item.stand_in.inputs.clear()
    item.stand_in.outputs.clear()
    first, middle, last = item.triple.nodes
    split, joined = item.triple.between
    for tensor in item.triple.between:
        if tensors.setdefault(tensor.name, tensor) is not tensor:
            tensor.name = fresh(tensor.name, set(tensors))
            tensors[tensor.name] = tensor
    first.inputs, first.outputs = [source, item.targets[0]], [split]
    middle.inputs, middle.outputs = [split, *item.parameters], [joined]
    last.inputs, last.outputs = [joined, item.targets[1]], [output]


def shape_of(tensor: gs.Tensor) -> Shape | None:
    """Return a tensor's shape as the analysis has it, or None where not even its rank is known."""
    if tensor.shape is None:
        return None
    return tuple(
        (size or None) if isinstance(size, str) else None if size is None or int(size) < 0 else int(size)
        for size in tensor.shape
    )
