"""Channel shuffles: one permutation while channels go, a shuffle again where the groups stay even."""

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.small import copy_of, graph, initializer, kept, operators, slim_and_verify, weights
from prune2deploy.graph.normal import normalise, to_model
from prune2deploy.graph.rewrite import remove_dead_channels

TRIPLE = ["Reshape", "Transpose", "Reshape"]


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def shuffle(source: str, made: str, groups: int, channels: int, size: int = 6) -> tuple[list[onnx.NodeProto], dict]:
    """Return the nodes and shapes of a channel shuffle as exporters write it; the batch is open."""
    constants = {
        f"{made}_split": ints(-1, groups, channels // groups, size, size),
        f"{made}_merge": ints(-1, channels, size, size),
    }
    nodes = [
        node("Reshape", [source, f"{made}_split"], [f"{made}_a"], name=f"{made}_first", allowzero=1),
        node("Transpose", [f"{made}_a"], [f"{made}_b"], perm=[0, 2, 1, 3, 4], name=f"{made}_turn"),
        node("Reshape", [f"{made}_b", f"{made}_merge"], [made], name=f"{made}_last"),
    ]
    return nodes, constants


def shuffled(zero: tuple[int, ...], groups: int = 2, channels: int = 12) -> onnx.ModelProto:
    """Return: a convolution with these dead filters, a shuffle, a convolution."""
    nodes, constants = shuffle("a", "s", groups, channels)
    constants |= {"w": weights(channels, 3, 1, 1, zero=zero), "v": weights(2, channels, 1, 1, seed=1)}
    nodes = [node("Conv", ["x", "w"], ["a"]), *nodes, node("Conv", ["s", "v"], ["y"])]
    return graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6]})


def test_uneven_survivors_go_completely_into_the_weights_of_the_convolution_before() -> None:
    model = shuffled(zero=(1, 2, 3, 7))
    slimmed = slim_and_verify(model)
    assert operators(slimmed.model) == ["Conv", "Conv"]
    assert [row.after for row in slimmed.layers] == [8, 2]
    assert slimmed.analysis.idle_classes() == 0
    rows = [0, 6, 8, 9, 4, 10, 5, 11]  # what is left of 0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11
    assert slimmed.kept["values"]["a"] == {"1": rows}
    assert slimmed.kept["initializers"]["w"]["0"] == rows
    assert np.array_equal(initializer(slimmed.model, "w"), initializer(model, "w")[rows])
    columns = slimmed.kept["initializers"]["v"]["1"]
    assert columns == slimmed.kept["values"]["s"]["1"] == [0, 1, 5, 7, 8, 9, 10, 11]
    assert np.array_equal(initializer(slimmed.model, "v"), initializer(model, "v")[:, columns])


def around(before: list[onnx.NodeProto], after: list[onnx.NodeProto], **more: np.ndarray) -> onnx.ModelProto:
    """Return an uneven shuffle of "a" into "s" between these nodes, from x to y of two channels each."""
    nodes, constants = shuffle("a", "s", 2, 12)
    constants |= {"w": weights(12, 3, 1, 1, zero=(1, 2, 3, 7)), "v": weights(2, 12, 3, 3, seed=1)}
    constants |= {name: weights(12, seed=seed) for seed, name in enumerate("bfm", 2)}
    constants |= {"low": np.float32(-0.5), "high": np.float32(0.5), "var": np.full(12, 2, np.float32)} | more
    constants = {name: array for name, array in constants.items() if name in _read([*before, *nodes, *after])}
    return graph([*before, *nodes, *after], constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6]})


def _read(nodes: list[onnx.NodeProto]) -> set[str]:
    return {name for item in nodes for name in item.input}


READER = node("Conv", ["s", "v"], ["y"], pads=[1, 1, 1, 1])
CONV = node("Conv", ["x", "w"], ["c"])


def test_what_treats_channels_alone_goes_along_with_the_convolution_before() -> None:
    before = [node("Conv", ["x", "w", "b"], ["c"]), node("BatchNormalization", ["c", "f", "m", "m", "var"], ["n"])]
    dead = {name: np.where(np.isin(np.arange(12), (1, 2, 3, 7)), 0, weights(12, seed=9)) for name in "bfm"}
    model = around([*before, node("Clip", ["n", "low", "high"], ["a"])], [READER], **dead)
    slimmed = slim_and_verify(model)
    assert operators(slimmed.model) == ["Conv", "BatchNormalization", "Clip", "Conv"]
    rows = slimmed.kept["initializers"]["w"]["0"]
    assert rows == [0, 6, 8, 9, 4, 10, 5, 11]
    for name in ("b", "f", "m"):
        assert slimmed.kept["initializers"][name]["0"] == rows
        assert np.array_equal(initializer(slimmed.model, name), dead[name][rows])
    assert all(slimmed.kept["values"][name] == {"1": rows} for name in ("c", "n", "a"))


def test_a_transposed_convolution_takes_a_shuffle_too() -> None:
    before = [node("ConvTranspose", ["x", "t", "b"], ["a"])]
    rows = weights(12, 3, 1, 1, zero=(1, 2, 3, 7))
    dead = np.where(np.isin(np.arange(12), (1, 2, 3, 7)), 0, weights(12, seed=9))
    up = node("ConvTranspose", ["s", "u"], ["y"])
    slimmed = slim_and_verify(around(before, [up], t=rows.transpose(1, 0, 2, 3), b=dead, u=weights(12, 2, 1, 1)))
    assert operators(slimmed.model) == ["ConvTranspose", "ConvTranspose"]
    summed = [CONV, node("Conv", ["x", "z"], ["d"]), node("Add", ["c", "d"], ["a"])]
    slimmed = slim_and_verify(around(summed, [up], z=weights(12, 3, 1, 1, zero=(1, 2, 3, 7)), u=weights(12, 2, 1, 1)))
    assert operators(slimmed.model) == ["Conv", "Conv", "Add", "ConvTranspose"]


def test_the_convolutions_after_a_shuffle_take_it_where_none_before_can() -> None:
    before = [CONV, node("Conv", ["x", "z"], ["d"]), node("Add", ["c", "d"], ["a"])]
    after = [
        node("BatchNormalization", ["s", "f", "m", "m", "var"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "v"], ["p"]),
        node("Conv", ["s", "v"], ["q"]),
        node("Add", ["p", "q"], ["y"]),
    ]
    dead = weights(12, 3, 1, 1, seed=7, zero=(1, 2, 3, 7))
    model = around(before, after, z=dead, v=weights(2, 12, 1, 1, seed=1))
    slimmed = slim_and_verify(model)
    assert "Gather" not in operators(slimmed.model)
    assert slimmed.kept["values"]["c"]["1"] == [0, 4, 5, 6, 8, 9, 10, 11]
    columns = slimmed.kept["initializers"]["v"]["1"]  # where 0, 4, 5, 6, 8 ... are after the shuffle
    assert columns == [0, 8, 10, 1, 5, 7, 9, 11]
    assert np.array_equal(initializer(slimmed.model, "v"), initializer(model, "v")[:, columns])
    assert np.array_equal(initializer(slimmed.model, "f"), initializer(model, "f")[columns])
    assert all(slimmed.kept["values"][name] == {"1": columns} for name in ("s", "n", "r"))


def test_weights_that_another_convolution_shares_are_turned_for_one_alone() -> None:
    before = [node("Conv", ["x", "w", "b"], ["a"]), node("Conv", ["x", "w", "b"], ["d"])]
    dead = np.where(np.isin(np.arange(12), (1, 2, 3, 7)), 0, weights(12, seed=9))
    after = [node("Conv", ["s", "v"], ["p"]), node("Conv", ["d", "v"], ["q"]), node("Add", ["p", "q"], ["y"])]
    model = around(before, after, b=dead, v=weights(2, 12, 1, 1, seed=1))
    slimmed = slim_and_verify(model)
    assert operators(slimmed.model) == ["Conv", "Conv", "Conv", "Conv", "Add"]
    assert len(slimmed.model.graph.initializer) == 6
    turned = [0, 6, 8, 9, 4, 10, 5, 11]
    found = [array for array in slimmed.kept["initializers"].values() if array.get("0") == turned]
    assert len(found) == 2  # weights and bias


def test_two_shuffles_in_a_row_go_into_one_convolution() -> None:
    second, constants = shuffle("s", "t", 3, 12)
    model = around(
        [CONV, node("Relu", ["c"], ["a"])],
        [*second, node("Conv", ["t", "v"], ["y"])],
        v=weights(2, 12, 1, 1, seed=1),
        **constants,
    )
    slimmed = slim_and_verify(model)
    assert operators(slimmed.model) == ["Conv", "Relu", "Conv"]
    rows = slimmed.kept["initializers"]["w"]["0"]
    assert np.array_equal(initializer(slimmed.model, "w"), initializer(model, "w")[rows])


UNFOLDABLE = {
    "others read its input, and its output": (
        [CONV, node("Relu", ["c"], ["a"]), node("GlobalMaxPool", ["a"], ["g"])],
        [
            *(node("MaxPool", ["s"], ["h"], kernel_shape=[1, 1]), node("Conv", ["h", "v"], ["p"], pads=[1, 1, 1, 1])),
            *(node("Conv", ["g", "v"], ["q"], pads=[1, 1, 1, 1]), node("Add", ["p", "q"], ["y"])),
        ],
    ),
    "a grouped convolution makes it": (
        [node("Conv", ["x", "wide"], ["e"]), node("Conv", ["e", "grouped"], ["a"], group=2)],
        [node("MaxPool", ["s"], ["h"], kernel_shape=[1, 1]), node("Conv", ["h", "v"], ["y"], pads=[1, 1, 1, 1])],
    ),
}


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_a_shuffle_that_no_plain_convolution_can_take_is_one_gather(name: str) -> None:
    before, after = UNFOLDABLE[name]
    grouped = weights(12, 4, 1, 1, zero=(0, 2, 9, 11))  # even in number, not in place
    slimmed = slim_and_verify(around(before, after, wide=weights(8, 3, 1, 1), grouped=grouped))
    assert operators(slimmed.model).count("Gather") == 1
    assert "Transpose" not in operators(slimmed.model)


@pytest.mark.parametrize("zero", [(1, 7), (0, 2, 9, 11)])
def test_even_survivors_stay_a_shuffle(zero: tuple[int, ...]) -> None:
    slimmed = slim_and_verify(shuffled(zero))
    assert [row.after for row in slimmed.layers] == [12 - len(zero), 2]
    if zero == (1, 7):
        assert operators(slimmed.model) == ["Conv", *TRIPLE, "Conv"]
        shapes = {item.name: onnx.numpy_helper.to_array(item).tolist() for item in slimmed.model.graph.initializer}
        assert shapes["s_split"] == [-1, 2, 5, 6, 6]
        assert shapes["s_merge"] == [-1, 10, 6, 6]
    else:  # even, but the channels of one group do not stand beside those of the other any more
        assert operators(slimmed.model) == ["Conv", "Conv"]


def test_a_shuffle_of_what_is_left_of_one_group_is_none() -> None:
    slimmed = slim_and_verify(shuffled(zero=tuple(range(6, 12))))
    assert operators(slimmed.model) == ["Conv", "Conv"]


def test_a_whole_group_that_goes_leaves_a_shuffle_of_the_others() -> None:
    slimmed = slim_and_verify(shuffled(zero=(4, 5, 6, 7), groups=3))
    assert operators(slimmed.model) == ["Conv", *TRIPLE, "Conv"]


def test_an_untouched_graph_comes_back_as_it_was() -> None:
    first, more = shuffle("a", "s", 2, 12)
    second, others = shuffle("b", "t", 3, 12)
    constants = more | others | {"w": weights(12, 3, 1, 1), "u": weights(12, 12, 1, 1), "v": weights(2, 12, 1, 1)}
    constants["t_merge"] = constants.pop("s_merge")  # the two share a shape
    first[2].input[1] = "t_merge"
    nodes = [node("Conv", ["x", "w"], ["a"], name="one"), first[0], node("Conv", ["a", "u"], ["b"], name="two")]
    nodes += [first[1], second[0], first[2], second[1], node("Conv", ["s", "v"], ["y"], name="three"), second[2]]
    nodes += [node("Conv", ["t", "v"], ["z"], name="four")]
    outputs = {"y": ["N", 2, 6, 6], "z": ["N", 2, 6, 6]}
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, outputs)
    for made in (to_model(normalise(copy_of(model)), model), remove_dead_channels(copy_of(model)).model):
        assert [item.name for item in made.graph.node] == [item.name for item in model.graph.node]
        assert [item.SerializeToString() for item in made.graph.node] == [
            item.SerializeToString() for item in model.graph.node
        ]
        assert sorted(item.name for item in made.graph.initializer) == sorted(constants)


def test_a_shape_that_two_shuffles_share_is_cloned_when_one_shrinks() -> None:
    first, more = shuffle("a", "s", 2, 12)
    second, _ = shuffle("b", "t", 2, 12)
    constants = more | {"w": weights(12, 3, 1, 1, zero=(1, 7)), "u": weights(12, 3, 1, 1), "v": weights(2, 12, 1, 1)}
    second[0].input[1], second[2].input[1] = "s_split", "s_merge"
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Conv", ["x", "u"], ["b"]), *first, *second]
    nodes += [node("Conv", ["s", "v"], ["y"]), node("Conv", ["t", "v"], ["z"])]
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6], "z": ["N", 2, 6, 6]})
    slimmed = slim_and_verify(model)
    assert slimmed.removed_channels == 2
    names = [item.name for item in slimmed.model.graph.initializer]
    assert len(names) == len(set(names))
    assert operators(slimmed.model).count("Transpose") == 2


def test_a_split_that_somebody_else_reads_stays_a_split() -> None:
    nodes, constants = shuffle("a", "s", 2, 12)
    constants |= {"w": weights(12, 3, 1, 1, zero=(1, 2)), "v": weights(2, 12, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["a"]), *nodes, node("Conv", ["s", "v"], ["y"]), node("Relu", ["s_a"], ["z"])]
    model = graph(nodes, constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 2, 6, 6], "z": ["N", 2, 6, 6, 6]})
    assert [item.op for item in normalise(copy_of(model)).nodes].count("Gather") == 0
    assert slim_and_verify(model).removed_channels == 0


def test_a_shuffle_of_the_last_axis() -> None:
    constants = {
        "w": weights(12, 3, 1, 1, zero=(1, 2, 8)),
        "split": ints(0, 0, 0, 3, 4),
        "merge": ints(0, 0, 0, 12),
        "v": weights(12, 2),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]),
        node("Relu", ["b"], ["r"]),
        node("Reshape", ["r", "split"], ["c"]),
        node("Transpose", ["c"], ["d"], perm=[0, 1, 2, 4, 3]),
        node("Reshape", ["d", "merge"], ["e"]),
        node("MatMul", ["e", "v"], ["y"]),
    ]
    model = graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, {"y": ["N", "H", "W", 2]})
    slimmed = slim_and_verify(model)
    assert slimmed.removed_channels == 3
    assert "Gather" in operators(slimmed.model)


def block(index: int, source: str, size: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Return a ShuffleNet v2 unit on ``size`` channels: split, branch, concat, shuffle; uneven filters are dead."""
    half, b = size // 2, f"b{index}"
    random = np.random.default_rng(index)

    def dead(count: int) -> tuple[int, ...]:
        return tuple(random.choice(half, count, replace=False).tolist())

    constants = {
        f"{b}_sizes": ints(half, half),
        f"{b}_w1": weights(half, half, 1, 1, seed=index, zero=dead(3)),
        f"{b}_w2": weights(half, 1, 3, 3, seed=index + 10),
        f"{b}_w3": weights(half, half, 1, 1, seed=index + 20, zero=dead(2 + index)),
    }
    nodes = [
        node("Split", [source, f"{b}_sizes"], [f"{b}_p", f"{b}_q"], axis=1),
        node("Conv", [f"{b}_q", f"{b}_w1"], [f"{b}_c1"]),
        node("Relu", [f"{b}_c1"], [f"{b}_r1"]),
        node("Conv", [f"{b}_r1", f"{b}_w2"], [f"{b}_c2"], group=half, pads=[1, 1, 1, 1]),
        node("Conv", [f"{b}_c2", f"{b}_w3"], [f"{b}_c3"]),
        node("Relu", [f"{b}_c3"], [f"{b}_r3"]),
        node("Concat", [f"{b}_p", f"{b}_r3"], [f"{b}_cat"], axis=1),
    ]
    more, shapes = shuffle(f"{b}_cat", f"{b}_s", 2, size)
    return [*nodes, *more], constants | shapes


def test_shufflenet_units_leave_nothing_behind() -> None:
    size = 16
    constants = {"w": weights(size, 3, 1, 1, zero=(1, 2, 3, 9)), "v": weights(4, size, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["a"])]
    source = "a"
    for index in range(3):
        more, others = block(index, source, size)
        nodes += more
        constants |= others
        source = f"b{index}_s"
    model = graph([*nodes, node("Conv", [source, "v"], ["y"])], constants, {"x": ["N", 3, 6, 6]}, {"y": ["N", 4, 6, 6]})
    slimmed = slim_and_verify(model)
    assert slimmed.analysis.idle_classes() == 0
    assert slimmed.analysis.keep.kept["a", 1].sum() == size - 4
    for index in range(3):
        zeros = [(constants[f"b{index}_w{n}"].reshape(size // 2, -1) == 0).all(axis=1) for n in (1, 3)]
        assert kept(model, f"b{index}_c1") == (~zeros[0]).tolist()
        assert kept(model, f"b{index}_c3") == (~zeros[1]).tolist()
    again = remove_dead_channels(copy_of(slimmed.model))
    assert again.analysis.keep.removed == 0
