"""Narrow without changing the nodes: what the network's own code needs, run on smaller weights.

`rewrite` leaves layers out, adds Gathers, divides convolutions and changes the bounds of slices; code that somebody
else wrote does none of it. Here every node stays and only parameters shrink. Where that cannot be, the channels around
the node are kept whole, and the node is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from prune2deploy.graph.constraints import Constraint, Count, Equal, Positions
from prune2deploy.graph.facts import Known, channel_facts
from prune2deploy.graph.keep import Analysis, Whole, settle
from prune2deploy.graph.layers import Totals, layer_rows, totals
from prune2deploy.graph.model import copy_of
from prune2deploy.graph.node import Node, Tables, tables
from prune2deploy.graph.normal import normalise, to_model
from prune2deploy.graph.rewrite import Indices, Writer, apply_kept, kept_initializers
from prune2deploy.graph.rules.select import SHUFFLE

BIASED = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
"""The slot of the bias, which a layer without one may be given."""

NAMES_WIDTHS = "it names channels or widths of its own"

Held = dict[tuple[int, int], np.ndarray]


@dataclass(frozen=True)
class Code:
    """What is known of the code that made a graph.

    Attributes:
        parameters: the constants that are the network's own and may shrink.
        layers: the nodes whose layer can be given a bias.
        adaptable: the nodes of modules that can be told which channels are kept.
        chunks: whether equal parts of a Split are shares of whatever is there, as ``chunk`` makes them; a graph does
            not tell them from parts of a size that the code names.
    """

    parameters: Set[str]
    layers: Set[str] = frozenset()
    adaptable: Set[str] = frozenset()
    chunks: bool = True


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A graph of the same nodes on fewer channels.

    Attributes:
        model: the narrow graph.
        before: the graph's normal form.
        analysis: the kept positions.
        arrays: the contents of every parameter that changed.
        kept: the kept old indices of every parameter's axis that shrank, as in ``slim.json``.
        biases: node -> the bias that a layer without one needs.
        groups: node -> the number of groups of a convolution, where it changed.
        whole: node -> why the channels around it are kept whole.
    """

    model: onnx.ModelProto
    before: onnx.ModelProto
    analysis: Analysis
    arrays: dict[str, np.ndarray]
    kept: dict[str, dict[str, Indices]]
    biases: dict[str, np.ndarray]
    groups: dict[str, int]
    whole: dict[str, str]

    def after(self) -> Totals:
        """Return the MACs and parameters of the convolutions and linear layers."""
        return totals(layer_rows(self.analysis), "after")

    def kept_channels(self, value: str, axis: int = 1) -> list[int] | None:
        """Return the kept old indices of a value's axis in order, or None where it has none of its own."""
        mask = self.analysis.keep.kept.get((value, axis))
        return None if mask is None else np.flatnonzero(mask).tolist()


def narrow(model: onnx.ModelProto, code: Code) -> Narrowed:
    """Return the narrow graph of a model whose channels were silenced; the given one is left as it is."""
    base = normalise(copy_of(model))
    before = to_model(normalise(copy_of(model)), model)
    analysed = tables(base)
    known = channel_facts(analysed)
    held: Held = {}
    whole: dict[str, str] = {}
    while True:
        graph = normalise(copy_of(model))
        shuffles = {index for index, node in enumerate(graph.nodes) if SHUFFLE in node.attrs}
        ties = _ties_of(shuffles, code, analysed)
        analysis = settle(analysed, known, whole=Whole(held, ties))
        targets = list(graph.nodes)
        writer, _ = apply_kept(graph, analysis)
        arrays = _arrays(analysis, writer)
        reasons = {**_irregular(analysis, writer, shuffles, code), **_disagreeing(analysis, arrays, code)}
        more = _around(reasons, analysed, known)
        if not more.keys() - held.keys():
            break
        held |= more
        whole |= {analysed.nodes[index].name: why for index, why in reasons.items()}
    return Narrowed(
        model=to_model(graph, model),
        before=before,
        analysis=analysis,
        arrays={name: array for name, array, _ in _own(analysis, arrays, code)},
        kept=kept_initializers(analysis, {}, {}),
        biases=_biases(analysis, writer),
        groups=_groups(analysed, targets),
        whole=whole,
    )


# --- constraints ------------------------------------------------------------------------------------------------------


def _ties_of(shuffles: Set[int], code: Code, analysed: Tables) -> _Ties:
    return _Ties(shuffles, {node.index for node in analysed.nodes if node.name in code.adaptable})


@dataclass(frozen=True)
class _Ties:
    """What code that moves channels does with fewer of them: it joins all, splits evenly, and shuffles rectangles."""

    shuffles: Set[int]
    free: Set[int]

    def __call__(self, node: Node, positions: Positions) -> Iterator[Constraint]:
        if node.index in self.free:
            return
        if node.index in self.shuffles:
            yield from _shuffled(node, positions)
        elif node.op_type in ("Concat", "Split") and not node.domain:
            yield from _joined(node, positions)


def _joined(node: Node, positions: Positions) -> Iterator[Constraint]:
    """Tie the whole of a Concat or Split to its parts; equal parts stay equal, as ``chunk`` makes them."""
    parts = node.inputs if node.op_type == "Concat" else node.outputs
    joined = (node.outputs if node.op_type == "Concat" else node.inputs)[0]
    axis = int(node.attribute("axis", 0)) % (joined.rank or 1)
    along = positions.ids(joined.name, axis)
    sizes = [(part.shape or (None,) * (axis + 1))[axis] for part in parts]
    if along is None or not all(isinstance(size, int) for size in sizes):
        return
    spans = np.split(along, np.cumsum([int(size) for size in sizes[:-1] if isinstance(size, int)]))
    for part, span in zip(parts, spans, strict=True):
        own = positions.ids(part.name, axis) if part.array is None else None
        if own is not None:
            yield Equal(span, own)
    if node.op_type == "Split" and len(set(sizes)) == 1:
        yield Count((np.stack(spans),), always=True)


def _shuffled(node: Node, positions: Positions) -> Iterator[Constraint]:
    """Let every group of a channel shuffle keep the same of its channels."""
    order = node.constant(1)
    into = positions.ids(node.inputs[0].name, int(node.attribute("axis", 0)))
    out = positions.ids(node.outputs[0].name, int(node.attribute("axis", 0)))
    if order is None or into is None or out is None:
        return
    yield Equal(out, into[order.ravel()])
    each = int(order.ravel()[1]) if order.size > 1 else 1  # the second one comes from the second group
    rows = into.reshape(-1, each)
    for row in rows[1:]:
        yield Equal(rows[0], row)


# --- what cannot be narrow --------------------------------------------------------------------------------------------


def _irregular(analysis: Analysis, writer: Writer, shuffles: Set[int], code: Code) -> dict[int, str]:
    """Return the nodes that were changed as no other weights change them, and how."""
    found = {}
    nodes = analysis.tables.nodes
    for index in sorted(writer.beside):
        found[index] = "it would need a selection of channels beside it"
    for index in sorted(writer.passed - shuffles):
        rule = analysis.known.rules[index]
        if rule is None or rule.kind != "elementwise":
            found[index] = "it would have to be left out"
    for index, slot in sorted(writer.written):
        node = nodes[index]
        if index not in shuffles and not _follows(node, slot, code):
            found[index] = NAMES_WIDTHS
    for node in () if code.chunks else nodes:
        if node.op_type == "Split" and not node.domain:
            axis = int(node.attribute("axis", 0)) % (node.inputs[0].rank or 1)
            if analysis.keep.indices(node.inputs[0].name, axis) is not None:
                found[node.index] = NAMES_WIDTHS
    return {index: why for index, why in found.items() if nodes[index].name not in code.adaptable}


def _follows(node: Node, slot: int, code: Code) -> bool:
    """Whether code with narrower parameters computes with this changed constant of its own accord."""
    old = node.input(slot)
    if old is None or not old.name:
        return BIASED.get(node.op_type) == slot and node.name in code.layers
    if old.name in code.parameters:
        return True
    if (node.op_type, slot) == ("Reshape", 1):  # sizes that the code computes, or that make it fail
        return True
    if (node.op_type, slot) == ("Split", 1):
        return old.array is not None and len(set(old.array.ravel().tolist())) == 1
    return False


Arrays = dict[tuple[int, int], np.ndarray]


def _arrays(analysis: Analysis, writer: Writer) -> Arrays:
    """Return what every constant of a node is now, by node and slot."""
    found: Arrays = {}
    view, keep = analysis.known.view, analysis.keep
    for node in analysis.tables.nodes:
        rule = analysis.known.rules[node.index]
        parts = [] if rule is None else rule.parts(node, view)
        for slot, operand in enumerate(node.inputs):
            if operand.array is None or not operand.name:
                continue
            if (node.index, slot) in writer.written:
                found[node.index, slot] = np.asarray(writer.written[node.index, slot].values)
                continue
            array = operand.array
            for part in parts if node.index in writer.passed else ():  # left out, but the code still computes it
                mask = keep.kept.get((part.axis.value, part.axis.axis)) if part.slot == slot else None
                if mask is not None:
                    array = np.take(array, np.flatnonzero(mask[part.of]), axis=part.constant_axis)
            found[node.index, slot] = array
    return found


def _own(analysis: Analysis, arrays: Arrays, code: Code) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yield every parameter's new contents with each node that reads it."""
    for (index, slot), array in arrays.items():
        name = analysis.tables.nodes[index].inputs[slot].name
        if name in code.parameters:
            yield name, array, index


def _disagreeing(analysis: Analysis, arrays: Arrays, code: Code) -> dict[int, str]:
    """Return the nodes that share a parameter but want different things of it."""
    readers: dict[str, list[tuple[np.ndarray, int]]] = {}
    for name, array, index in _own(analysis, arrays, code):
        readers.setdefault(name, []).append((array, index))
    return {
        index: f"it shares '{name}' with another layer that keeps other channels"
        for name, found in readers.items()
        if any(not np.array_equal(found[0][0], array) for array, _ in found[1:])
        for _, index in found
    }


def _around(reasons: Mapping[int, str], analysed: Tables, known: Known) -> Held:
    """Return all positions of what these nodes read, and of what reads their outputs."""
    readers = analysed.readers()
    held: Held = {}

    def hold(index: int, names: Iterable[str]) -> None:
        node, wanted = analysed.nodes[index], set(names)
        for slot in node.value_slots:
            if node.inputs[slot].name in wanted and node.inputs[slot].name in known.view.facts:
                held[index, slot] = np.ones(known.view.of(node.inputs[slot]).shape, dtype=bool)

    for index in reasons:
        node = analysed.nodes[index]
        hold(index, [operand.name for operand in node.inputs])
        outputs = [operand.name for operand in node.outputs]
        for reader in sorted({reader for name in outputs for reader in readers.get(name, ())}):
            hold(reader, outputs)
    return held


# --- results ----------------------------------------------------------------------------------------------------------


def _biases(analysis: Analysis, writer: Writer) -> dict[str, np.ndarray]:
    nodes = analysis.tables.nodes
    return {
        nodes[index].name: np.asarray(constant.values)
        for (index, slot), constant in writer.written.items()
        if BIASED.get(nodes[index].op_type) == slot and nodes[index].input(slot) is None
    }


def _groups(analysed: Tables, targets: list[gs.Node]) -> dict[str, int]:
    """Return the new number of groups of every convolution where it changed."""
    now = [int(target.attrs.get("group", 1)) for target in targets]
    pairs = zip(analysed.nodes, now, strict=True)
    return {node.name: groups for node, groups in pairs if int(node.attribute("group", 1)) != groups}
