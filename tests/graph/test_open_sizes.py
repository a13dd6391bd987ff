"""Sizes that exporters leave open: the batch behind a Reshape, windows, slices of the whole batch."""

import time

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.helper import make_node as node

from graph.small import copy_of, graph, initializer, operators, parse, slim_and_verify, weights
from prune2deploy.graph.normal import normalise, to_model
from prune2deploy.graph.rewrite import Slimmed
from prune2deploy.graph.sizes import is_open, product, quotient


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("whole", "part", "left"),
    [
        (12, 4, 3),
        ("batch", "batch", 1),
        ("4 x batch", 2, "2 x batch"),
        ("4 x batch", "batch", 4),
        ("batch x height", "height", "batch"),
        ("batch", "height", None),
        ("batch", 2, None),
        (12, 5, None),
        (0, 4, None),
        (None, 4, None),
    ],
)
def test_a_quotient_of_sizes(whole: int | str | None, part: int | str, left: int | str | None) -> None:
    assert quotient(whole, part) == left
    if left is not None:
        assert product([left, part]) == whole


def test_the_symbol_of_an_open_size_stays_open_in_a_product() -> None:
    assert is_open(product([4, "unk__3"]))
    assert product(["batch", None]) is None


def slimmed_to(model: onnx.ModelProto, *widths: int) -> Slimmed:
    """Slim, verify, and require these widths of the layers and that nothing was opaque."""
    slimmed = slim_and_verify(model)
    assert [row.after for row in slimmed.layers] == list(widths)
    assert not slimmed.opaque
    return slimmed


CONVOLVED = "a = Conv (x, w)  s = Shape (a)  n = Gather <axis = 0> (s, zero)"
"""A convolution and the scalar size of its batch."""


def model(nodes: str, size: int = 4, **constants: np.ndarray) -> onnx.ModelProto:
    """Return a pointwise convolution ``a`` with dead filters 1, 2 and 5 of 8, these nodes, and a reader of ``z``."""
    constants |= {"w": weights(8, 3, 1, 1, zero=(1, 2, 5)), "v": weights(2, 8, 1, 1, seed=1), "zero": np.array(0)}
    text = f"small (float[N,3,{size},{size}] x) => (float[M,2,H,W] y) {{ {CONVOLVED} {nodes} y = Conv (z, v) }}"
    return parse(text, **constants)


def test_channels_pass_where_the_batch_is_named_behind_an_open_reshape() -> None:
    """ECA's view(N, 1, -1) behind a view(N, -1): the second batch is the first."""
    nodes = """
        m = ReduceMean <keepdims = 0> (a, space)
        b = Unsqueeze (n, zeros)
        t = Concat <axis = 0> (b, one, rest)
        r = Reshape (m, t)
        u = Transpose <perm = [0, 2, 1]> (r)
        g = Unsqueeze (u, last)
        z = Mul (a, g)
    """
    slimmed_to(model(nodes, space=ints(2, 3), zeros=ints(0), one=ints(1), rest=ints(-1), last=ints(3)), 5, 2)


def test_channels_pass_windows_whose_number_is_a_multiple_of_the_batch() -> None:
    """EfficientViT cuts its maps into windows and asks for the number of windows again."""
    nodes = """
        h = Transpose <perm = [0, 2, 3, 1]> (a)
        b = Unsqueeze (n, zeros)
        t = Concat <axis = 0> (b, split)
        p = Reshape (h, t)
        q = Transpose <perm = [0, 1, 3, 2, 4, 5]> (p)
        c = Mul (n, four)
        d = Unsqueeze (c, zeros)
        e = Concat <axis = 0> (d, window)
        f = Reshape (q, e)
        k = Transpose <perm = [0, 3, 1, 2]> (f)
        s2 = Shape (k)
        n2 = Gather <axis = 0> (s2, zeros)
        e2 = Concat <axis = 0> (n2, rest)
        z = Reshape (k, e2)
    """
    constants = {"split": ints(2, 2, 2, 2, 8), "window": ints(2, 2, 8), "rest": ints(-1, 2, 2)}
    slimmed_to(model(nodes, zeros=ints(0), four=np.array(4), **constants), 5, 2)


def unfolded(first: list[int]) -> onnx.ModelProto:
    """MobileViT's unfolding: the channels are part of the first axis between the Reshapes."""
    nodes = """
        p = Reshape (a, first)
        q = Transpose <perm = [0, 2, 1, 3]> (p)
        z = Reshape (q, last)
    """
    return model(nodes, first=ints(*first), last=ints(-1, 8, 4, 4))


@pytest.mark.parametrize("first", [[-1, 2, 2, 2], [-1, 4, 2, 2], [-1, 1, 8, 2]])
def test_channels_pass_windows_that_hide_them_in_the_batch(first: list[int]) -> None:
    slimmed = slimmed_to(unfolded(first), 5, 2)
    made = [node for node in slimmed.model.graph.node if node.op_type == "Transpose"]
    assert [helper.get_attribute_value(node.attribute[0]) for node in made] == [[0, 2, 1, 3]]
    target = next(node for node in slimmed.model.graph.node if node.output[0] == "p").input[1]
    assert initializer(slimmed.model, target).tolist() == first


def test_windows_are_as_they_were_where_nothing_is_removed() -> None:
    before = unfolded([-1, 2, 2, 2])
    after = to_model(normalise(copy_of(before)), before)
    nodes = [
        [(node.op_type, list(node.input)) for node in one.graph.node if node.op_type != "Shape"][-4:]
        for one in (before, after)
    ]
    assert nodes[0] == nodes[1]


def test_windows_of_channels_that_are_all_constant_go() -> None:
    dead = unfolded([-1, 2, 2, 2])
    dead.graph.initializer.remove(next(tensor for tensor in dead.graph.initializer if tensor.name == "w"))
    dead.graph.initializer.append(onnx.numpy_helper.from_array(weights(8, 3, 1, 1, zero=tuple(range(8))), "w"))
    assert "Reshape" not in operators(slim_and_verify(dead).model)


def test_channels_pass_a_slice_of_the_whole_batch_that_is_written() -> None:
    """GhostNet's x[:] = x + y becomes a ScatterND of all rows."""
    nodes = """
        r = Range (zero, n, step)
        i = Unsqueeze (r, last)
        t = Relu (a)
        u = Add (a, t)
        z = ScatterND (a, i, u)
    """
    slimmed = slimmed_to(model(nodes, step=np.array(1), last=ints(-1)), 5, 2)
    assert "ScatterND" not in operators(slimmed.model)


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_rows_that_are_not_all_written_stay(reduction: str) -> None:
    nodes = f"""
        r = Range (start, n, step)
        i = Unsqueeze (r, last)
        u = Relu (a)
        z = ScatterND <reduction = "{reduction}"> (a, i, u)
    """
    start = np.array(int(reduction == "none"))
    made = model(nodes, step=np.array(1), last=ints(-1), start=start)
    assert "ScatterND" in [node.op for node in normalise(made).nodes]


def test_channels_pass_an_expand_and_a_resize_to_computed_sizes() -> None:
    nodes = """
        m = ReduceMean <keepdims = 1> (a, channels)
        b = Unsqueeze (n, zeros)
        t = Concat <axis = 0> (b, wide)
        e = Expand (m, t)
        c = Div (a, e)
        big = Concat <axis = 0> (b, larger)
        l = Resize <mode = "nearest"> (c, , , big)
        v2 = Concat <axis = 0> (b, rest)
        z = Reshape (l, v2)
    """
    constants = {"wide": ints(8, 4, 4), "larger": ints(8, 8, 8), "rest": ints(8, 4, 16)}
    made = model(nodes, channels=ints(1), zeros=ints(0), **constants)
    shapes = [tensor.shape for node in normalise(copy_of(made)).nodes for tensor in node.outputs if node.op != "Shape"]
    assert not [shape for shape in shapes if any(is_open(size) for size in shape)]


def whole(made: onnx.ModelProto) -> bool:
    """Whether every size of a graph in normal form is known by number or name."""
    shapes = [tensor.shape for each in normalise(copy_of(made)).nodes for tensor in each.outputs]
    return not any(shape is None or any(is_open(size) for size in shape) for shape in shapes)


@pytest.mark.parametrize("scales", [(1, 1, 2, 2), (1, 1, 2, 1.5)])
def test_the_batch_passes_a_resize_by_factors(scales: tuple[float, ...]) -> None:
    nodes = 'r = Resize <mode = "linear"> (a, , scales)  z = Relu (r)'
    made = model(nodes, scales=np.array(scales, dtype=np.float32))
    assert whole(made)
    shapes = {tensor.name: tensor.shape for each in normalise(copy_of(made)).nodes for tensor in each.outputs}
    assert shapes["r"] == shapes["z"] == ["N", 8, *(int(4 * scale) for scale in scales[2:])]
    slimmed_to(made, 5, 2)


@pytest.mark.parametrize("made_by", ["Expand (one, t)", "ConstantOfShape (t)", "Tile (single, t)"])
def test_the_batch_passes_constants_of_its_size(made_by: str) -> None:
    nodes = f"""
        b = Reshape (n, all)
        t = Concat <axis = 0> (b, rest)
        e = {made_by}
        h = Slice (a, four, eight, first)
        z = Concat <axis = 1> (h, e)
    """
    constants = {"rest": ints(4, 4, 4), "four": ints(4), "eight": ints(8), "first": ints(1)}
    constants |= {"one": np.ones((1, 1), np.float32), "single": np.ones((1, 1, 1, 1), np.float32)}
    made = model(nodes, all=ints(-1), **constants)
    assert whole(made)
    slim_and_verify(made)


def strided(places: np.ndarray, step: int) -> onnx.ModelProto:
    """Return a pooled map that is read by computed indices: ``step`` times the batch's index and ``places``."""
    nodes = """
        m = ReduceMean <keepdims = 1> (a, space)
        f = Reshape (m, all)
        i = Range (zero, n, unit)
        j = Mul (i, step)
        k = Unsqueeze (j, behind)
        l = Add (zero, k)
        o = Add (l, places)
        g = Gather <axis = 0> (f, o)
        z = Reshape (g, image)
    """
    behind = ints(*range(1, places.ndim))
    constants = {"space": ints(2, 3), "all": ints(-1), "unit": np.array(1), "step": np.array(step), "behind": behind}
    return model(nodes, **constants, places=places, image=ints(-1, 8, 1, 1))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 8), (1, 1, 8)])
def test_a_stride_over_all_elements_in_order_is_the_value_itself(shape: tuple[int, ...]) -> None:
    made = strided(np.arange(8).reshape(shape), 8)
    slimmed = slimmed_to(made, 5, 2)
    assert not {"Gather", "Range"} & set(operators(slimmed.model))


@pytest.mark.parametrize(("places", "step"), [(np.arange(8)[::-1], 8), (np.arange(8), 4), (np.arange(8), 0)])
def test_a_stride_in_another_order_stays(places: np.ndarray, step: int) -> None:
    made = strided(places.reshape(1, 8, 1, 1), step)
    assert "Range" in [node.op for node in normalise(copy_of(made)).nodes]
    slim_and_verify(made)


def test_sizes_that_are_doubled_together_stay_two_entries() -> None:
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "two", "four", "zero"], ["hw"]),
        node("Mul", ["hw", "twos"], ["doubled"]),
        node("Slice", ["s", "zero", "one", "zero"], ["n"]),
        node("Concat", ["n", "one", "doubled"], ["t"], axis=0),
        node("Conv", ["x", "w"], ["c"]),
        node("Reshape", ["c", "t"], ["y"]),
    ]
    constants = {"two": ints(2), "four": ints(4), "zero": ints(0), "one": ints(1), "twos": ints(2, 2)}
    constants |= {"w": weights(4, 3, 1, 1)}
    slim_and_verify(graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, {"y": ["N", 1, "H2", "W2"]}))


def test_a_size_that_is_added_to_itself_again_and_again_is_read_once() -> None:
    added = " ".join(f"n{i + 1} = Add (n{i}, n{i})" for i in range(60))
    nodes = f"n0 = Identity (n) {added} b = Unsqueeze (n60, zeros) c = Sub (b, b) t = Concat <axis = 0> (rest, c) " + (
        "u = Reshape (a, rest) z = Identity (a)"
    )
    text = model(nodes, zeros=ints(0), rest=ints(-1))
    start = time.process_time()
    normalise(text)
    assert time.process_time() - start < 5  # each one twice would be for ever


def test_an_input_s_own_name_is_no_product_of_others() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "split"], ["r"]),
        node("Shape", ["r"], ["s"]),
        node("Gather", ["s", "first"], ["n"]),
        node("Concat", ["n", "rest"], ["t"], axis=0),
        node("Reshape", ["other", "t"], ["y"]),
    ]
    constants = {"w": weights(8, 3, 1, 1), "split": ints(-1, 4, 8, 8), "first": ints(0), "rest": ints(-1)}
    inputs = {"x": ["N", 3, 8, 8], "other": ["2 x N", 6]}
    slim_and_verify(graph(nodes, constants, inputs, {"y": ["A", "B"]}))


@pytest.mark.parametrize(
    ("batch", "first", "perm"), [(1, [1, 4, 2, 2, 2], [0, 1, 2, 4, 3]), ("N", [-1, 2, 2, 2], [0, 1, 3, 2])]
)
def test_a_shuffle_of_space_lets_channels_go(batch: int | str, first: list[int], perm: list[int]) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Reshape", ["a", "first"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=perm),
        node("Reshape", ["t", "last"], ["q"]),
        node("Conv", ["q", "v"], ["y"]),
    ]
    constants = {"w": weights(4, 3, 1, 1, zero=(1,)), "v": weights(3, 4, 1, 1, seed=1), "first": ints(*first)}
    constants |= {"last": ints(-1, 4, 2, 4)}
    slimmed_to(graph(nodes, constants, {"x": [batch, 3, 2, 4]}, ["y"]), 3, 3)
