"""One check for every rule: its facts hold, what it calls dead does not matter, and what it drops is not missed."""

from typing import Any

import numpy as np
import onnx
from onnx.helper import make_node as node

from graph.small import copy_of, graph, run, slim_and_verify
from prune2deploy.graph.facts import Known, channel_facts
from prune2deploy.graph.node import Node, Tables, tables
from prune2deploy.graph.normal import normalise

CHANNELS = 6
Array = np.ndarray


def source(
    name: str, channels: int, spatial: tuple[int, ...], seed: int
) -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Return a producer of channels of all kinds: plain, zero, constant, repeated, a multiple of another, plain.

    With ``seed`` 1 another set: plain, zero, constant, constant, plain, zero.
    """
    random = np.random.default_rng(seed)
    weight = random.standard_normal((channels, 3, *(1 for _ in spatial)))
    bias = np.zeros(channels)
    if seed == 0:
        weight[1:3] = 0
        bias[2] = 0.7
        weight[3], weight[4] = weight[0], 2 * weight[0]
        bias[4] = 0.5
    else:
        weight[[1, 2, 3, 5]] = 0
        bias[2:4] = -0.4, 1.0
    constants = {f"{name}_w": weight.astype(np.float32), f"{name}_b": bias.astype(np.float32)}
    if spatial:
        return [node("Conv", ["input", *constants], [name])], constants
    return [node("Gemm", ["input", *constants], [name], transB=1)], constants


def single(
    op: str,
    inputs: tuple[Any, ...],
    spatial: tuple[int, ...],
    opset: int,
    batch: str | int,
    outputs: int,
    channels: int,
    attributes: dict[str, Any],
    via: int | None = None,
) -> tuple[list[onnx.NodeProto], dict[str, Any], list[Any]]:
    """Return nodes, constants and the graph's input shape of: sources -> the operator -> ``y``.

    ``x`` and ``z`` are sources, in the type ``via`` if one is given; ``x>`` is where one is more than 0.3,
    and ``x~`` its sigmoid, between 0 and 1.
    """
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Any] = {}
    names = []
    made: set[str] = set()
    for slot, item in enumerate(inputs):
        if isinstance(item, str) and item[:1] in ("x", "z"):
            name = item[0]
            if name not in made:
                more, values = source(name, channels, spatial, "xz".index(name))
                nodes += more
                constants |= values
            wanted = name + {">": "_over", "~": "_unit"}.get(item[1:], "" if via is None else "_as")
            if wanted.endswith("_over") and wanted not in made:
                constants["edge"] = np.float32(0.3)
                nodes.append(node("Greater", [name, "edge"], [wanted]))
            elif wanted.endswith("_unit") and wanted not in made:
                nodes.append(node("Sigmoid", [name], [wanted]))
            elif wanted.endswith("_as") and wanted not in made:
                nodes.append(node("Cast", [name], [wanted], to=via))
            made |= {name, wanted}
            names.append(wanted)
        elif isinstance(item, str):
            names.append("")
        else:
            constants[f"k{slot}"] = np.asarray(item)
            names.append(f"k{slot}")
    results = ["y", *(f"y{slot}" for slot in range(1, outputs))]
    return [*nodes, node(op, names, results, name="op", **attributes)], constants, [batch, 3, *spatial]


def check_facts(known: Known, values: dict[str, Array]) -> None:
    """Constants are constant over the collapsed axes, and equal numbers satisfy their affine relation."""
    functions: dict[tuple[int, tuple[int, ...]], Array] = {}
    for name, computed in values.items():
        coarse = 100.0 if computed.dtype == np.float16 else 1.0
        value = computed.astype(np.float64)
        fact = known.view.facts[name]
        full = np.broadcast_to(fact.shift, value.shape)
        constant = np.broadcast_to(fact.constant, value.shape)
        np.testing.assert_allclose(value[constant], full[constant], rtol=coarse * 1e-5, atol=coarse * 1e-6)
        expanded = [axis for axis, size in enumerate(fact.shape) if size > 1]
        moved = np.moveaxis(value, expanded, range(len(expanded)))
        parts = [np.moveaxis(part, expanded, range(len(expanded))) for part in (fact.number, fact.scale, fact.shift)]
        for place in np.ndindex(*moved.shape[: len(expanded)]):
            number, scale, shift = (float(part[place].ravel()[0]) for part in parts)
            if scale == 0:
                continue
            function = (moved[place] - shift) / scale
            seen = functions.setdefault((int(number), function.shape), function)
            np.testing.assert_allclose(function, seen, rtol=coarse * 1e-4, atol=coarse * 1e-4)


def check_liveness(op: Node, table: Tables, known: Known, values: dict[str, Array], model: onnx.ModelProto) -> None:
    """What is dead and neither constant nor an alias may hold anything: the live outputs do not change."""
    rule = known.rules[op.index]
    assert rule is not None
    random = np.random.default_rng(5)
    live_outs = {out.name: random.random(known.view.facts[out.name].shape) < 0.5 for out in op.outputs}
    demands = rule.live(op, list(live_outs.values()), known.view)
    free: dict[str, Array] = {}
    for slot in op.value_slots:
        name = op.inputs[slot].name
        fact = known.view.facts[name]
        here = ~fact.constant
        if slot in demands:
            demand = demands[slot]
            wanted = demand.live.copy()
            for choice in demand.choices:
                wanted.flat[choice.positions] = True
            axes = tuple(a for a, size in enumerate(fact.shape) if size == 1 and wanted.shape[a] > 1)
            here &= ~np.broadcast_to(wanted.any(axis=axes, keepdims=True), fact.shape)
        free[name] = here & free.get(name, True)
    changed = {}
    for name, here in free.items():
        noise = 3 * random.standard_normal(values[name].shape)
        noise = noise > 0 if values[name].dtype == bool else noise.astype(values[name].dtype)
        changed[name] = np.where(np.broadcast_to(here, noise.shape), noise, values[name])
    alone = graph(
        [item for item in model.graph.node if "y" in item.output],
        {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer if item.name.startswith("k")},
        {name: list(array.shape) for name, array in changed.items()},
        list(live_outs),
        opset=op.opset,
        element={name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in changed.items()},
    )
    want, got = (run(alone, {name: given[name] for name in changed}) for given in (values, changed))
    for name, live_out in live_outs.items():
        shown = np.broadcast_to(live_out, want[name].shape)
        np.testing.assert_allclose(got[name][shown], want[name][shown], rtol=1e-5, atol=1e-5)


def reader_of(values: dict[str, Array], known: Known) -> tuple[list[onnx.NodeProto], dict[str, Any]]:
    """Return a linear reader of some of the operator's positions along its first expanded axis."""
    fact, rank = known.view.facts["y"], values["y"].ndim
    axis = next((a for a, size in enumerate(fact.shape) if size > 1), rank - 1)
    size = values["y"].shape[axis]
    if values["y"].dtype == np.int64:
        half = {"from": ints(0), "to": ints(max(size // 2, 1)), "along": ints(axis)}
        return [node("Slice", ["y", *half], ["out"])], half
    weight = np.random.default_rng(3).standard_normal((size, 2)).astype(np.float32)
    weight[max(size // 2, 1) :] = 0
    order = [a for a in range(rank) if a != axis] + [axis]
    nodes = [] if values["y"].dtype == np.float32 else [node("Cast", ["y"], ["as_float"], to=onnx.TensorProto.FLOAT)]
    name = "as_float" if nodes else "y"
    nodes += [node("Transpose", [name], ["turned"], perm=order), node("MatMul", ["turned", "reader"], ["out"])]
    return nodes, {"reader": weight}


def check_rule(
    op: str,
    *inputs: Any,
    spatial: tuple[int, ...] = (6, 6),
    opset: int = 18,
    removes: bool = True,
    opaque: bool = False,
    batch: str | int = "N",
    outputs: int = 1,
    channels: int = CHANNELS,
    via: int | None = None,
    **attributes: Any,
) -> None:
    """Check an operator's rule on one node that reads channels of all kinds (``x``, ``z``) and constants.

    ``removes``: whether a reader of half of its first output lets something go (nobody needs the other ``outputs``).
    ``opaque``: the rule must decline. ``via``: the type that the sources are cast to.
    """
    nodes, constants, shape = single(op, inputs or ("x",), spatial, opset, batch, outputs, channels, attributes, via)
    made = list(nodes[-1].output)
    given = sorted({name for item in nodes[:-1] for name in item.output})
    model = graph(nodes, constants, {"input": shape}, [*made, *given], opset=opset)
    table = tables(normalise(copy_of(model)))
    known = channel_facts(table)
    op_node = next(item for item in table.nodes if "y" in [out.name for out in item.outputs])
    feed = np.random.default_rng(1).standard_normal([2 if isinstance(n, str) else n for n in shape]).astype(np.float32)
    values = run(model, {"input": feed})
    assert (known.rules[op_node.index] is None) == opaque
    check_facts(known, {name: values[name] for name in (*made, *given)})
    if not opaque:
        check_liveness(op_node, table, known, values, model)
    more, reading = reader_of(values, known)
    whole = graph([*nodes, *more], constants | reading, {"input": shape}, ["out"], opset=opset)
    slimmed = slim_and_verify(whole)
    let_go = slimmed.analysis.keep.removed > 0 or bool(slimmed.analysis.liveness.constants)
    assert let_go == removes, [row.after for row in slimmed.layers]


def dense(*shape: int, seed: int = 7) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def planted(*shape: int) -> Array:
    """Weights with a zero row, and a row that repeats."""
    array = dense(*shape)
    array[1], array[3] = 0, array[0]
    return array


f32 = np.float32
Line = tuple[str, tuple[Any, ...], dict[str, Any]]
"""An operator, its inputs and the options of `check_rule`; one line of a family's table."""


def label(line: Line) -> str:
    op, inputs, options = line
    shown = [_shown(item) for item in inputs]
    return (
        " ".join([op, *shown, *(f"{key}={value}" for key, value in options.items())])
        .replace("[", "(")
        .replace("]", ")")
    )


def _shown(item: Any) -> str:
    if isinstance(item, str):
        return item or "-"
    array = np.asarray(item)
    return str(array.tolist()) if array.dtype == np.int64 else "x".join(map(str, array.shape)) or "scalar"


def check_line(line: Line) -> None:
    op, inputs, options = line
    check_rule(op, *inputs, **options)
