"""Lines of the product of two computed values, and attention blocks with dead dimensions, heads and tokens."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, dense, f32, ints, label
from graph.small import graph, operators, slim_and_verify

LINES: list[Line] = [
    ("MatMul", ("x", "z"), {}),
    ("MatMul", ("x", "x"), {}),
    ("MatMul", ("z", "x"), {"batch": 2, "opset": 9}),
    ("MatMul", ("x", "z"), {"spatial": (6,)}),
    ("MatMul", ("x", "z"), {"spatial": (2, 3, 3)}),
    ("MatMul", ("x", "z"), {"spatial": (), "batch": 6}),
    ("Gemm", ("x", "z"), {"spatial": (), "transB": 1, "batch": 2}),
    ("Gemm", ("x", "z", f32(0.5)), {"spatial": (), "transB": 1, "alpha": -0.5, "beta": 2.0, "batch": 3}),
    ("Gemm", ("x", "z", dense(1, 6)), {"spatial": (), "batch": 6}),
    ("Gemm", ("x", "z"), {"spatial": (), "transA": 1}),
    ("Gemm", ("x", "z", dense(6, 1)), {"spatial": (), "transA": 1, "alpha": 2.0}),
    ("Gemm", ("z", "x", dense(6, 6)), {"spatial": (), "transA": 1}),
    ("Gemm", ("x", "z"), {"spatial": (), "transA": 1, "transB": 1, "batch": 6}),
    ("Gemm", ("x", "z", dense(6)), {"spatial": (), "transB": 1, "batch": 6, "opaque": True, "removes": False}),
    ("Gemm", ("x", "z", "x"), {"spatial": (), "batch": 6, "opaque": True, "removes": False}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


HEADS, SIZE, WIDTH = 3, 4, 6


def attention(weights: dict[str, np.ndarray], *, batch: Any = "N") -> onnx.ModelProto:
    """Return softmax(q k^T) v over 5 tokens with three heads, between a Conv and a MatMul, as exporters write it."""
    constants: dict[str, Any] = {name: weights[name] for name in ("stem", "q", "k", "v", "o")}
    constants |= {f"{name}_bias": weights.get(f"{name}_bias", np.zeros(HEADS * SIZE, f32)) for name in "qkv"}
    constants |= {"split": ints(0, 0, HEADS, SIZE), "join": ints(0, 0, HEADS * SIZE), "scale": f32(0.5)}
    nodes = [node("Conv", ["x", "stem"], ["t"]), node("Transpose", ["t"], ["tokens"], perm=[0, 2, 1])]
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", ["tokens", name], [f"{name}0"]),
            node("Add", [f"{name}0", f"{name}_bias"], [f"{name}1"]),
            node("Reshape", [f"{name}1", "split"], [f"{name}2"]),
            node("Transpose", [f"{name}2"], [f"{name}3"], perm=perm),
        ]
    nodes += [
        node("MatMul", ["q3", "k3"], ["s0"], name="scores"),
        node("Mul", ["s0", "scale"], ["s1"]),
        node("Softmax", ["s1"], ["p"], axis=-1),
        node("MatMul", ["p", "v3"], ["a0"], name="mixed"),
        node("Transpose", ["a0"], ["a1"], perm=[0, 2, 1, 3]),
        node("Reshape", ["a1", "join"], ["a2"]),
        node("MatMul", ["a2", "o"], ["y"]),
    ]
    return graph(nodes, constants, {"x": [batch, 3, 5]}, {"y": [batch, 5, 7]})


def attention_weights() -> dict[str, np.ndarray]:
    inner = HEADS * SIZE
    shapes = {"stem": (WIDTH, 3, 1), "q": (WIDTH, inner), "k": (WIDTH, inner), "v": (WIDTH, inner), "o": (inner, 7)}
    return {name: dense(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def widths(model: onnx.ModelProto, **options: Any) -> dict[str, int]:
    """Return the widths of the projections of the slim model, which is verified."""
    slim = slim_and_verify(model, **options).model
    shapes = {tensor.name: tuple(tensor.dims) for tensor in slim.graph.initializer}
    return {name: shapes[name][0 if name == "o" else 1] for name in ("q", "k", "v", "o")}


def of(heads: range | tuple[int, ...], dims: tuple[int, ...]) -> list[int]:
    return [head * SIZE + dim for head in heads for dim in dims]


@pytest.mark.parametrize("batch", ["N", 2])
def test_whole_attention_stays_whole(batch: Any) -> None:
    assert widths(attention(attention_weights(), batch=batch)) == dict.fromkeys("qkvo", 12)


def test_a_dimension_that_is_zero_in_every_head_goes_from_queries_and_keys() -> None:
    weights = attention_weights()
    weights["q"][:, of(range(HEADS), (1,))] = 0
    assert widths(attention(weights)) == {"q": 9, "k": 9, "v": 12, "o": 12}


def test_a_zero_query_meets_what_a_zero_key_of_another_head_meets() -> None:
    """Dimension 1 is zero in the queries of heads 0 and 1, and in the keys of head 2: no head needs it."""
    weights = attention_weights()
    weights["q"][:, of((0, 1), (1,))] = 0
    weights["k"][:, of((2,), (1,))] = 0
    assert widths(attention(weights)) == {"q": 9, "k": 9, "v": 12, "o": 12}


def test_a_dimension_that_one_head_needs_stays_in_all() -> None:
    weights = attention_weights()
    weights["q"][:, of((0, 1), (1,))] = 0
    assert widths(attention(weights)) == dict.fromkeys("qkvo", 12)


def test_a_constant_query_that_is_not_zero_is_needed() -> None:
    weights = attention_weights()
    weights["q"][:, of(range(HEADS), (1,))] = 0
    weights["q_bias"] = np.full(HEADS * SIZE, 0.3, f32)
    assert widths(attention(weights)) == dict.fromkeys("qkvo", 12)


def test_a_dimension_that_nobody_reads_goes_from_the_values() -> None:
    weights = attention_weights()
    weights["o"][of(range(HEADS), (0, 2))] = 0
    assert widths(attention(weights)) == {"q": 12, "k": 12, "v": 6, "o": 6}


def test_a_head_that_nobody_reads_goes_from_all() -> None:
    weights = attention_weights()
    weights["o"][of((1,), range(SIZE))] = 0  # type: ignore[arg-type]
    assert widths(attention(weights)) == dict.fromkeys("qkvo", 8)


def test_a_head_with_zero_values_goes_from_all() -> None:
    weights = attention_weights()
    weights["v"][:, of((1,), range(SIZE))] = 0  # type: ignore[arg-type]
    assert widths(attention(weights)) == dict.fromkeys("qkvo", 8)


def test_zero_places_that_stay_for_a_width_are_made_zero() -> None:
    """A difference of equal queries is 0; nobody keeps its parts right, and the width of 4 holds the place."""
    inner = HEADS * SIZE
    weights = attention_weights() | {"q_other": dense(WIDTH, inner, seed=9)}
    weights["stem"][[1, 3]] = 0
    dead = of(range(HEADS), (1,))
    weights["q_other"][:, dead] = weights["q"][:, dead]
    model = attention(weights)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights["q_other"], "q_other"))
    scores = next(item for item in model.graph.node if item.name == "scores")
    extra = [
        node("MatMul", ["tokens", "q_other"], ["d0"]),
        node("Sub", ["q0", "d0"], ["d1"]),
        node("Reshape", ["d1", "split"], ["d2"]),
        node("Transpose", ["d2"], ["d3"], perm=[0, 2, 1, 3]),
    ]
    scores.input[0] = "d3"
    kept = [item for item in model.graph.node if item.output[0] not in ("q1", "q2", "q3")]
    place = kept.index(scores)
    del model.graph.node[:]
    model.graph.node.extend([*kept[:place], *extra, *kept[place:]])
    assert widths(model)["k"] == 9
    rounded = slim_and_verify(model, round_to=4).model
    shapes = {tensor.name: tuple(tensor.dims) for tensor in rounded.graph.initializer}
    assert shapes["k"][1] == 12
    assert operators(rounded).count("Mul") == 2


def test_the_scores_of_equal_heads_are_equal() -> None:
    """A third head with the queries, keys and values of the first is read through the first."""
    weights = attention_weights()
    for name in "qkv":
        weights[name][:, of((2,), range(SIZE))] = weights[name][:, of((0,), range(SIZE))]  # type: ignore[arg-type]
    assert widths(attention(weights)) == dict.fromkeys("qkvo", 8)


def test_channel_attention_keeps_its_pairs() -> None:
    """Two zero channels among six: x x^T over space is 0 in their rows and columns."""
    constants = {"w": dense(6, 3, 1), "v": dense(6, 6, 1, seed=2)}
    constants["w"][[1, 4]] = 0
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        node("MatMul", ["a", "b"], ["gram"]),
        node("MatMul", ["gram", "a"], ["c"]),
        node("Conv", ["c", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 5]}, {"y": ["N", 6, 5]}))
    assert [row.after for row in slimmed.layers if row.op_type == "Conv"] == [4, 6]


def test_a_zero_times_a_constant_is_zero_where_the_contracted_axis_has_no_positions() -> None:
    """Attention that weighs all places alike, of values with a dead channel."""
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Flatten", ["a"], ["f"], axis=2),
        node("Transpose", ["f"], ["values"], perm=[0, 2, 1]),
        node("Mul", ["values", "zero"], ["z"]),
        node("MatMul", ["z", "same"], ["scores"]),
        node("Softmax", ["scores"], ["even"], axis=-1),
        node("MatMul", ["even", "values"], ["m"]),
        node("MatMul", ["m", "v"], ["y"]),
    ]
    w = np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)
    w[1] = 0
    constants = {"w": w, "zero": np.float32(0), "same": f32(np.ones((4, 36))), "v": f32(np.ones((4, 2)))}
    nodes[1] = node("Reshape", ["a", "flat"], ["f"])
    model = graph(nodes, constants | {"flat": ints(0, 4, 36)}, {"x": ["N", 3, 6, 6]}, {"y": ["N", 36, 2]})
    slimmed = slim_and_verify(model)
    assert slimmed.analysis.known.view.facts["m"].constant.ravel().tolist() == [False, True, False, False]
