"""What is live and what is kept, on graphs that can be read."""

import numpy as np
import pytest
from onnx.helper import make_node as node

from graph.small import analysis_of, graph, initializer, kept, operators, parse, slim_and_verify, weights
from prune2deploy.graph.liveness import GRAPH_OUTPUT, NOBODY
from prune2deploy.graph.node import tables
from prune2deploy.graph.normal import normalise
from prune2deploy.graph.rewrite import remove_dead_channels

IMAGE = ["N", 3, 6, 6]


def test_an_add_keeps_a_zero_channel_that_the_other_input_needs() -> None:
    model = parse(
        """g (float[1,2,4,4] x) => (float[1,2,4,4] y) <float[2,2,1,1] w = {1,0,0,0}>
        { a = Conv(x, w)  y = Add(a, x) }"""
    )
    assert kept(model, "a") == [True, True]


def test_a_residual_branch_with_one_dead_channel_keeps_it() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,2,6,6] y)
        { s = Conv(x, stem)  b = Conv(s, branch)  t = Add(s, b)  y = Conv(t, head) }""",
        stem=weights(4, 3, 1, 1),
        branch=weights(4, 4, 1, 1, zero=(2,)),
        head=weights(2, 4, 1, 1),
    )
    assert kept(model, "s") == [True] * 4
    assert slim_and_verify(model).removed_channels == 0


def test_a_channel_that_is_dead_in_both_branches_goes() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,2,6,6] y)
        { s = Conv(x, stem)  b = Conv(s, branch)  t = Add(s, b)  y = Conv(t, head) }""",
        stem=weights(4, 3, 1, 1, zero=(2,)),
        branch=weights(4, 4, 1, 1, zero=(2,)),
        head=weights(2, 4, 1, 1),
    )
    assert kept(model, "t") == [True, True, False, True]
    assert initializer(slim_and_verify(model).model, "branch").shape == (3, 3, 1, 1)


def test_a_branch_that_is_dead_as_a_whole_is_cut() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,2,6,6] y)
        { s = Conv(x, stem)  r = Relu(s)  b = Conv(r, branch)  t = Add(b, s)  y = Conv(t, head) }""",
        stem=weights(4, 3, 1, 1),
        branch=np.zeros((4, 4, 1, 1), np.float32),
        head=weights(2, 4, 1, 1),
    )
    slimmed = slim_and_verify(model)
    assert operators(slimmed.model) == ["Conv", "Conv"]
    assert slimmed.removed_layers == ["Conv_2"]


def test_a_branch_that_is_constant_becomes_that_constant() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,4,6,6] y) <float[4] b = {1, 2, 3, 4}>
        { s = Conv(x, stem)  c = Conv(s, branch, b)  y = Add(c, s) }""",
        stem=weights(4, 3, 1, 1),
        branch=np.zeros((4, 4, 1, 1), np.float32),
    )
    assert operators(slim_and_verify(model).model) == ["Conv", "Add"]


def test_constants_through_zero_padding_keep_the_one_of_largest_magnitude() -> None:
    bias = np.array([0, 1, -3, 0.5, 0, 2], np.float32)
    model = parse(
        "g (float[N,3,6,6] x) => (float[N,2,6,6] y) { a = Conv(x, w, b)  y = Conv<pads = [1, 1, 1, 1]>(a, v) }",
        w=weights(6, 3, 1, 1, zero=(1, 2, 3, 5)),
        b=bias,
        v=weights(2, 6, 3, 3),
    )
    assert kept(model, "a") == [True, False, True, False, True, False]
    slim_and_verify(model)


def test_constants_without_padding_all_go() -> None:
    model = parse(
        "g (float[N,3,6,6] x) => (float[N,2,4,4] y) { a = Conv(x, w, b)  y = Conv(a, v) }",
        w=weights(6, 3, 1, 1, zero=(1, 2, 3, 5)),
        b=np.array([0, 1, -3, 0.5, 0, 2], np.float32),
        v=weights(2, 6, 3, 3),
    )
    assert kept(model, "a") == [True, False, False, False, True, False]
    slim_and_verify(model)


def test_aliases_merge_into_the_one_with_the_largest_multiple() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,2,6,6] y)
        { a = Conv(x, w)  b = BatchNormalization(a, s, z, z, o)  y = Conv(b, v) }""",
        w=np.stack([weights(3, 1, 1)] * 4),
        s=np.array([1, 0.5, 4, -2], np.float32),
        z=np.zeros(4, np.float32),
        o=np.ones(4, np.float32),
        v=weights(2, 4, 1, 1),
    )
    assert kept(model, "b") == [False, False, True, False]
    slim_and_verify(model)


def test_an_alias_that_another_reader_needs_stands_for_its_class() -> None:
    same = np.stack([weights(3, 1, 1)] * 3)
    model = graph(
        [
            node("Conv", ["x", "w"], ["a"]),
            node("Conv", ["a", "v"], ["y"]),
            node("Slice", ["a", "from", "to", "axis"], ["last"]),
            node("Softmax", ["last"], ["z"]),
        ],
        {"w": same, "v": weights(2, 3, 1, 1), "from": np.array([2]), "to": np.array([3]), "axis": np.array([1])},
        {"x": IMAGE},
        {"y": ["N", 2, 6, 6], "z": ["N", 1, 6, 6]},
    )
    assert kept(model, "a") == [False, False, True]
    slim_and_verify(model)


def test_a_concat_of_a_dead_and_a_live_value_reads_the_live_one_only() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,2,6,6] y)
        { a = Conv(x, w)  b = Conv(x, dead)  c = Concat<axis = 1>(b, a)  y = Conv(c, v) }""",
        w=weights(4, 3, 1, 1),
        dead=np.zeros((3, 3, 1, 1), np.float32),
        v=weights(2, 7, 1, 1),
    )
    slimmed = slim_and_verify(model)
    assert [item.op_type for item in slimmed.model.graph.node] == ["Conv", "Conv"]
    assert initializer(slimmed.model, "v").shape == (2, 4, 1, 1)


def test_a_slice_keeps_what_it_takes_and_no_more() -> None:
    model = graph(
        [
            node("Conv", ["x", "w"], ["a"]),
            node("Slice", ["a", "from", "to", "axis"], ["s"]),
            node("Conv", ["s", "v"], ["y"]),
        ],
        {
            "w": weights(6, 3, 1, 1),
            "v": weights(2, 3, 1, 1),
            "from": np.array([2]),
            "to": np.array([5]),
            "axis": np.array([1]),
        },
        {"x": IMAGE},
        {"y": ["N", 2, 6, 6]},
    )
    assert kept(model, "a") == [False, False, True, True, True, False]
    slim_and_verify(model)


def test_a_slice_of_one_channel_keeps_that_channel() -> None:
    model = graph(
        [node("Conv", ["x", "w"], ["a"]), node("Slice", ["a", "from", "to", "axis"], ["y"])],
        {"w": weights(6, 3, 1, 1), "from": np.array([2]), "to": np.array([3]), "axis": np.array([1])},
        {"x": IMAGE},
        {"y": ["N", 1, 6, 6]},
    )
    assert kept(model, "a") == [False, False, True, False, False, False]
    assert initializer(slim_and_verify(model).model, "w").shape == (1, 3, 1, 1)


def test_padded_channels_go_where_nothing_lives_in_them() -> None:
    model = graph(
        [node("Conv", ["x", "w"], ["a"]), node("Pad", ["a", "pads"], ["p"]), node("Conv", ["p", "v"], ["y"])],
        {
            "w": weights(3, 3, 1, 1, zero=(0,)),
            "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]),
            "v": weights(2, 7, 1, 1),
        },
        {"x": IMAGE},
        {"y": ["N", 2, 6, 6]},
    )
    assert kept(model, "p") == [False, False, False, True, True, False, False]
    slim_and_verify(model)


def test_padded_channels_stay_where_the_other_branch_lives_in_them() -> None:
    model = graph(
        [
            node("Conv", ["x", "w"], ["a"]),
            node("Pad", ["a", "pads"], ["p"]),
            node("Conv", ["x", "u"], ["b"]),
            node("Add", ["p", "b"], ["s"]),
            node("Conv", ["s", "v"], ["y"]),
        ],
        {
            "w": weights(2, 3, 1, 1),
            "u": weights(4, 3, 1, 1, zero=(0,)),
            "pads": np.array([0, 1, 0, 0, 0, 1, 0, 0]),
            "v": weights(2, 4, 1, 1),
        },
        {"x": IMAGE},
        {"y": ["N", 2, 6, 6]},
    )
    assert kept(model, "s") == [False, True, True, True]
    slim_and_verify(model)


def test_an_opaque_node_keeps_everything_it_reads_and_is_counted() -> None:
    model = parse(
        "g (float[N,3,6,6] x) => (float[N,4,6,6] y) "
        "{ a = Conv(x, w)  b = CenterCropPad <axes = [2, 3]> (a, s)  y = CenterCropPad <axes = [2, 3]> (b, s) }",
        w=weights(4, 3, 1, 1, zero=(0, 1)),
        s=np.array([6, 6]),
    )
    slimmed = slim_and_verify(model)
    assert slimmed.opaque == {"CenterCropPad": 2}
    assert kept(model, "a") == [True] * 4


def test_an_operator_of_another_domain_is_opaque_under_its_full_name() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[N,3,6,6] x) => (float[N,3,6,6] y) { y = com.microsoft.Gelu(x) }"""
    import onnx

    assert remove_dead_channels(onnx.parser.parse_model(text)).opaque == {"com.microsoft::Gelu": 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_makes_its_node_opaque(bad: float) -> None:
    weight = weights(4, 3, 1, 1, zero=(0,))
    weight[1, 0, 0, 0] = bad
    model = parse(
        "g (float[N,3,6,6] x) => (float[N,2,6,6] y) { a = Conv(x, w)  y = Conv(a, v) }", w=weight, v=weights(2, 4, 1, 1)
    )
    assert remove_dead_channels(model).opaque == {"Conv": 1}


def test_liveness_stores_the_reader_that_needs_a_position() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,1,6,6] y, float[N,3,6,6] z)
        { a = Conv(x, w)  b = Relu(a)  y = Conv(b, v)  z = Conv(x, u) }""",
        w=weights(3, 3, 1, 1),
        v=np.array([[[[1]], [[0]], [[2]]]], np.float32),
        u=weights(3, 3, 1, 1, seed=1),
    )
    analysis = analysis_of(model)
    nodes = {item.outputs[0].name: item.index for item in analysis.tables.nodes}
    reader = {name: array.ravel().tolist() for name, array in analysis.liveness.reader.items()}
    assert reader["b"] == [nodes["y"], NOBODY, nodes["y"]]
    assert reader["a"] == [nodes["b"], NOBODY, nodes["b"]]
    assert reader["z"] == [GRAPH_OUTPUT] * 3


def test_nodes_that_no_output_needs_are_gone_and_counted_nowhere() -> None:
    model = parse(
        "g (float[N,3,6,6] x) => (float[N,2,6,6] y) { d = Conv(x, w)  e = Softmax(d)  y = Conv(x, v) }",
        w=weights(4, 3, 1, 1),
        v=weights(2, 3, 1, 1),
    )
    assert len(tables(normalise(model)).nodes) == 1


@pytest.mark.parametrize("wanted", [None, 1, 3])
def test_one_of_equal_channels_is_enough_for_a_reader_that_does_not_see_their_space(wanted: int | None) -> None:
    """A product along the width gives its result positions there, of which a convolution knows nothing.

    Where another reader wants one of the channels, in one column alone, that one cannot stand for the others.
    """
    rows = weights(5, 3, 1, 1)
    rows[[1, 2, 3]] = rows[0]
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("MatMul", ["a", "nothing"], ["z"]),
        node("Add", ["z", "a"], ["b"]),
        node("Conv", ["b", "v"], ["y"], pads=[1, 1, 1, 1]),
    ]
    constants = {"w": rows, "nothing": np.zeros((4, 4), np.float32), "v": weights(2, 5, 3, 3, seed=1)}
    outputs = {"y": ["N", 2, 4, 4]}
    if wanted is not None:
        nodes.append(node("Slice", ["b", "from", "to", "axes"], ["o"]))
        constants |= {"from": np.array([wanted, 0]), "to": np.array([wanted + 1, 1]), "axes": np.array([1, 3])}
        outputs["o"] = ["N", 1, 4, 1]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 4, 4]}, outputs))
    assert slimmed.analysis.keep.kept["a", 1].sum() == (2 if wanted is None else 3)
