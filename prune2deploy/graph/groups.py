"""Groups of a network, from the constraints of its dense graph: sets of positions that can only go together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx

from prune2deploy.cost import Cost, Term, Width
from prune2deploy.graph.activations import find_activations
from prune2deploy.graph.constraints import FROZEN, Constraint, Equal, Ids, Positions, classes
from prune2deploy.graph.facts import Known, channel_facts
from prune2deploy.graph.keep import node_constraints
from prune2deploy.graph.layers import layer_name
from prune2deploy.graph.node import Node, Tables, tables
from prune2deploy.graph.normal import normalise
from prune2deploy.graph.rules.base import Axis, Part, Work
from prune2deploy.graph.rules.norm import UNIT
from prune2deploy.graph.validity import blaming_the_file
from prune2deploy.groups import Group, Groups, Layer, Member

COUNTED_ROLES = frozenset({"filter", "bias", "scale", "shift", "reader"})


@blaming_the_file
def find_groups(model: onnx.ModelProto) -> Groups:
    """Return the groups, layers and cost model of a dense graph whose initializers carry parameter names."""
    tb = tables(normalise(model))
    known = channel_facts(tb)
    sorting = _sort_positions(tb, known)
    members = _members(tb, known, sorting)
    names = _names(members, len(sorting.sizes))
    passed = find_activations(tb, known, sorting.positions, sorting.group_of, len(sorting.sizes))
    groups = tuple(
        Group(
            id=names[index],
            size=size,
            members=tuple(members[index]),
            activations=passed.activations[index],
            kept_because=_kept_because(members[index]),
            read_as=passed.read_as[index],
        )
        for index, size in enumerate(sorting.sizes)
    )
    forms = _Forms(sorting, names)
    return Groups(groups, _layers(tb, known, forms), _cost(tb, known, forms))


@dataclass(frozen=True, eq=False)
class _Sorting:
    """Every position's group and channel in it (-1: frozen), and the groups' sizes."""

    positions: Positions
    group_of: Ids
    channel_of: Ids
    sizes: list[int]


def _sort_positions(tb: Tables, known: Known) -> _Sorting:
    positions = Positions()
    for operand in (*tb.inputs, *(operand for node in tb.nodes for operand in node.outputs if operand.name)):
        positions.add(operand.name, known.view.facts[operand.name].shape)
    constraints: list[Constraint] = []
    for operand in tb.outputs:
        constraints += _frozen(operand.name, known, positions)
    for node in tb.nodes:
        if known.rules[node.index] is None:
            for name in [operand.name for operand in node.inputs if operand.is_value] + list(node.captured):
                constraints += _frozen(name, known, positions)
        else:
            constraints += node_constraints(node, known, positions, frozenset(node.value_slots))
    constraints += _shared_parameters(tb, known, positions)
    class_of = classes(positions.count, constraints, also_implied=True)
    return _by_signature(positions, class_of)


def _shared_parameters(tb: Tables, known: Known, positions: Positions) -> list[Constraint]:
    """Tie the positions that follow one parameter in several nodes: its mask is one."""
    first: dict[tuple[str, int], Ids] = {}
    found: list[Constraint] = []
    for node in tb.nodes:
        for part in _parameter_parts(node, known):
            ids = positions.ids(part.axis.value, part.axis.axis)
            own = np.full(len(part.of), FROZEN) if ids is None else ids[part.of]
            other = first.setdefault((node.inputs[part.slot].name, part.constant_axis), own)
            if other is not own:
                found.append(Equal(other, own))
    return found


def _parameter_parts(node: Node, known: Known) -> list[Part]:
    rule = known.rules[node.index]
    return [] if rule is None else [part for part in rule.parts(node, known.view) if part.role != UNIT]


def _frozen(value: str, known: Known, positions: Positions) -> list[Constraint]:
    fact = known.view.facts.get(value)
    axes = range(len(fact.shape)) if fact is not None else range(0)
    return [Equal(ids, np.full(len(ids), FROZEN)) for axis in axes if (ids := positions.ids(value, axis)) is not None]


def _by_signature(positions: Positions, class_of: Ids) -> _Sorting:
    """Sort classes into groups: those with the same number of positions in the same blocks are interchangeable."""
    block_of = np.zeros(positions.count, dtype=np.int64)
    for number, (_, _, first, size) in enumerate(positions.blocks()):
        block_of[first : first + size] = number
    order = np.lexsort((block_of, class_of))
    starts = np.searchsorted(class_of[order], np.arange(int(class_of.max()) + 2))
    groups: dict[bytes, int] = {}
    sizes: list[int] = []
    group_of = np.full(positions.count, -1, dtype=np.int64)
    channel_of = np.full(positions.count, -1, dtype=np.int64)
    first_seen = np.unique(class_of, return_index=True)
    for class_id in first_seen[0][np.argsort(first_seen[1])].tolist():  # in the order of their first position
        members = order[starts[class_id] : starts[class_id + 1]]
        if class_id == class_of[FROZEN]:
            continue
        group = groups.setdefault(block_of[members].tobytes(), len(groups))
        if group == len(sizes):
            sizes.append(0)
        group_of[members], channel_of[members] = group, sizes[group]
        sizes[group] += 1
    return _Sorting(positions, group_of, channel_of, sizes)


def _members(tb: Tables, known: Known, sorting: _Sorting) -> list[list[Member]]:
    found: list[list[Member]] = [[] for _ in sorting.sizes]
    for node in tb.nodes:
        for part in _parameter_parts(node, known):
            for group, indices in _split(part, sorting):
                parameter = node.inputs[part.slot].name
                found[group].append(Member(parameter, part.constant_axis, part.role, indices, layer_name(node)))
    return found


def _split(part: Part, sorting: _Sorting) -> list[tuple[int, np.ndarray]]:
    """Return (group, indices [channels, k]) for every group that a parameter's axis carries."""
    ids = sorting.positions.ids(part.axis.value, part.axis.axis)
    if ids is None:
        return []
    group, channel = sorting.group_of[ids[part.of]], sorting.channel_of[ids[part.of]]
    found = []
    for index in np.unique(group[group >= 0]).tolist():
        places = np.flatnonzero(group == index)
        ordered = places[np.argsort(channel[places], kind="stable")]
        found.append((index, ordered.reshape(sorting.sizes[index], -1)))
    return found


def _names(members: list[list[Member]], count: int) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for index in range(count):
        layers = [member.layer for member in members[index] if member.role == "filter"]
        wanted = layers[0] if layers else f"group{index}"
        # A padded shortcut widens a stage: the new channels are named after the first layer that has only them.
        fresh = next((layer for layer in layers if layer not in seen), wanted)
        seen[fresh] += 1
        names.append(fresh if seen[fresh] == 1 else f"{fresh}#{seen[fresh]}")
    return names


def _kept_because(members: list[Member]) -> str | None:
    return None if any(member.role == "filter" for member in members) else "no filter produces it"


class _Forms:
    """Widths of axes as linear forms in the groups' widths."""

    def __init__(self, sorting: _Sorting, names: list[str]) -> None:
        self._sorting = sorting
        self._names = names

    def of(self, axis: Axis, size: int, of: np.ndarray | None = None) -> Width:
        """Return the width of an axis, or of the positions ``of`` along it; ``size`` where it has no positions."""
        ids = self._sorting.positions.ids(axis.value, axis.axis)
        if ids is None:
            return Width(size)
        group = self._sorting.group_of[ids if of is None else ids[of]]
        terms = tuple(
            (self._names[index], int((group == index).sum()) // self._sorting.sizes[index])
            for index in np.unique(group[group >= 0]).tolist()
        )
        return Width(int((group < 0).sum()), terms)


def _layers(tb: Tables, known: Known, forms: _Forms) -> tuple[Layer, ...]:
    readers = tb.readers()
    outputs = {operand.name for operand in tb.outputs}
    found = []
    for node in tb.nodes:
        rule = known.rules[node.index]
        if rule is None or rule.kind not in ("linear", "norm"):
            continue
        value = node.outputs[0].name
        alone = readers.get(value, []) if value not in outputs else []
        after = tb.nodes[alone[0]] if len(alone) == 1 else None
        found.append(_layer(node, known, forms, after))
    return tuple(found)


def _layer(node: Node, known: Known, forms: _Forms, after: Node | None) -> Layer:
    rule = known.rules[node.index]
    assert rule is not None
    work = rule.work(node, known.view)
    roles = {part.role: node.inputs[part.slot].name for part in rule.parts(node, known.view)}
    is_norm = rule.kind == "norm"
    follows = after if after is not None and _is_norm(after, known) else None
    out = Axis(node.outputs[0].name, work.out.axis if work else 1)
    size = work.out_size if work else int(known.view.of(node.outputs[0]).shape[1])
    return Layer(
        name=layer_name(node),
        op_type=node.op_type,
        weight=roles.get("scale" if is_norm else "filter"),
        bias=roles.get("shift" if is_norm else "bias"),
        mean=roles.get("mean"),
        var=roles.get("var"),
        epsilon=float(node.attribute("epsilon", 1e-5)) if is_norm else None,
        norm=layer_name(follows) if follows is not None else None,
        out_width=forms.of(out, size),
        in_width=_in_width(node, work, known, forms),
        padded=bool(work and work.padded),
    )


def _in_width(node: Node, work: Work | None, known: Known, forms: _Forms) -> Width:
    """Return the number of channels that a layer reads; a norm reads its own."""
    if work is None:
        return Width(1)
    if work.into is not None:
        return forms.of(work.into, work.into_size)
    source = node.inputs[node.value_slots[0]].name  # depthwise: as many as there are
    return forms.of(Axis(source, work.out.axis), known.view.facts[source].shape[work.out.axis])


def _is_norm(node: Node, known: Known) -> bool:
    rule = known.rules[node.index]
    return rule is not None and rule.kind == "norm"


def _cost(tb: Tables, known: Known, forms: _Forms) -> Cost:
    macs: list[Term] = []
    parameters: list[Term] = []
    counted: set[str] = set()
    for node in tb.nodes:
        rule = known.rules[node.index]
        if rule is None or rule.kind not in ("linear", "norm"):
            continue
        name = layer_name(node)
        work = rule.work(node, known.view)
        if work is not None and work.coefficient is not None:
            factors = [forms.of(work.out, work.out_size)]
            factors += [forms.of(work.into, work.into_size)] if work.into is not None else []
            macs.append(Term(name, work.coefficient, tuple(factors), work.divisor))
        parts = [part for part in rule.parts(node, known.view) if part.role in COUNTED_ROLES]
        for slot, operand in enumerate(node.inputs):
            own = [part for part in parts if part.slot == slot]
            floating = operand.array is not None and slot in {*(part.slot for part in parts), 1, 2}
            if operand.array is None or operand.name in counted or not floating or _running(rule.kind, slot):
                continue
            counted.add(operand.name)
            parameters.append(_parameter_term(name, operand.array.shape, own, forms))
    return Cost(tuple(macs), tuple(parameters))


def _running(kind: str, slot: int) -> bool:
    return kind == "norm" and slot > 2


def _parameter_term(layer: str, shape: tuple[int, ...], parts: list[Part], forms: _Forms) -> Term:
    coefficient = 1
    factors = []
    for axis, size in enumerate(shape):
        part = next((part for part in parts if part.constant_axis == axis), None)
        if part is None:
            coefficient *= size
        else:
            factors.append(forms.of(part.axis, size, part.of))
    return Term(layer, coefficient, tuple(factors))
