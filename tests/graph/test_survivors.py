"""Graphs that a broken analysis gets wrong and no other test had noticed: each kills a mutant of tools/mutants.py."""

import numpy as np
import onnx
from onnx.helper import make_node as node

from graph.small import graph, operators, slim_and_verify, weights
from prune2deploy.graph.rewrite import Slimmed


def test_a_row_that_cancels_holds_its_constant_where_its_columns_stay() -> None:
    """x1 = x0 + 0.5, and both are outputs: a row x0 - x1 reads neither, so -0.5 has to be its bias."""
    first = np.repeat(weights(1, 3, 1, 1, seed=1), 2, axis=0)
    second = np.array([[1, -1], [1, 2]], np.float32).reshape(2, 2, 1, 1)
    nodes = [
        node("Conv", ["input", "first", "offset"], ["x"]),
        node("Conv", ["x", "second"], ["y"]),
        node("Conv", ["input", "silent"], ["h"]),
        node("Conv", ["h", "third"], ["z"]),
        node("Add", ["y", "z"], ["out"]),
    ]
    constants = {"first": first, "offset": np.array([0, 0.5], np.float32), "second": second}
    constants |= {"silent": weights(3, 3, 1, 1, seed=2, zero=(1,)), "third": weights(2, 3, 1, 1, seed=3)}
    slimmed = slim_and_verify(graph(nodes, constants, {"input": ["N", 3, 4, 4]}, ["x", "out"]))
    assert slimmed.removed_channels == 1  # of h; without it nothing would be written


def test_convolutions_that_differ_in_their_strides_are_not_equal() -> None:
    """Of 4 pixels a stride of 2 takes 0 and 2, a stride of 3 takes 0 and 3: the results have one shape."""
    nodes = [
        node("Conv", ["input", "w"], ["a"], strides=[2, 2]),
        node("Conv", ["input", "w"], ["b"], strides=[3, 3]),
        node("Concat", ["a", "b"], ["c"], axis=1),
        node("Conv", ["c", "reader"], ["out"]),
    ]
    constants = {"w": weights(4, 3, 1, 1), "reader": weights(2, 8, 1, 1, seed=1)}
    slimmed = slim_and_verify(graph(nodes, constants, {"input": ["N", 3, 4, 4]}, ["out"]))
    assert slimmed.removed_channels == 0


def test_channels_that_became_space_stay_where_nothing_is_read() -> None:
    """The last convolution reads nothing, but its output is as high as the first one has channels.

    Its width is not known, so no constant can be written in its place.
    """
    nodes = [
        node("Conv", ["input", "w"], ["a"]),
        node("Transpose", ["a"], ["turned"], perm=[0, 2, 1, 3]),
        node("Conv", ["turned", "zeros", "bias"], ["out"]),
    ]
    constants = {"w": weights(6, 3, 3, 3), "zeros": np.zeros((2, 4, 1, 1), np.float32)}
    constants["bias"] = np.array([1, 2], np.float32)
    slim_and_verify(graph(nodes, constants, {"input": ["N", 3, 6, "W"]}, ["out"]))


def two_multiples(scales: tuple[float, float], shift: float) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Return nodes that make ``x``: two multiples of one function, each with this shift added."""
    nodes = [
        node("Conv", ["input", "once"], ["f"]),
        node("Mul", ["f", "scales"], ["g"]),
        node("Add", ["g", "shift"], ["x"]),
    ]
    column = np.array(scales, np.float32).reshape(2, 1, 1)
    once = np.repeat(weights(1, 3, 1, 1, seed=4), 2, axis=0)
    return nodes, {"once": once, "scales": column, "shift": np.full((1, 1, 1), shift, np.float32)}


def slim_with_reader(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], value: str, size: int) -> Slimmed:
    """Slim a graph that ends in a convolution over this value."""
    more = [*nodes, node("Conv", [value, "reader"], ["out"])]
    constants = constants | {"reader": weights(2, size, 1, 1, seed=5)}
    return slim_and_verify(graph(more, constants, {"input": ["N", 3, 4, 4]}, ["out"]))


def test_activations_that_differ_in_an_attribute_are_not_equal() -> None:
    nodes = [
        node("Conv", ["input", "w"], ["x"]),
        node("LeakyRelu", ["x"], ["a"], alpha=0.1),
        node("LeakyRelu", ["x"], ["b"], alpha=0.3),
        node("Concat", ["a", "b"], ["c"], axis=1),
    ]
    slimmed = slim_with_reader(nodes, {"w": weights(3, 3, 1, 1)}, "c", 6)
    assert slimmed.removed_channels == 0


def test_an_activation_passes_no_scale_where_a_shift_is_added_first() -> None:
    """relu(2 f + 1) is no multiple of relu(f + 1)."""
    nodes, constants = two_multiples((1.0, 2.0), 1.0)
    slim_with_reader([*nodes, node("Relu", ["x"], ["y"])], constants, "y", 2)


def test_a_product_passes_no_scale_where_a_shift_is_added_first() -> None:
    """(2 f + 1) g is no multiple of (f + 1) g."""
    nodes, constants = two_multiples((1.0, 2.0), 1.0)
    nodes += [node("Conv", ["input", "other"], ["h"]), node("Mul", ["x", "h"], ["y"])]
    constants["other"] = np.repeat(weights(1, 3, 1, 1, seed=6), 2, axis=0)
    slim_with_reader(nodes, constants, "y", 2)


def test_of_two_zero_factors_one_is_kept_right() -> None:
    """Both first channels are differences that cancel; with neither kept right the product would not be 0."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {"half": np.array([0.5, 0], np.float32).reshape(2, 1, 1)}
    for name, seed in (("a", 7), ("b", 8)):
        whole = weights(2, 3, 1, 1, seed=seed)
        other = np.concatenate([whole[:1], weights(1, 3, 1, 1, seed=seed + 2)])
        constants |= {f"{name}w": whole, f"{name}v": other}
        nodes += [
            node("Conv", ["input", f"{name}w", "bias"], [f"{name}x"]),
            node("Conv", ["input", f"{name}v"], [f"{name}y"]),
            node("Add", [f"{name}y", "half"], [f"{name}z"]),
            node("Sub", [f"{name}x", f"{name}z"], [name]),
        ]
    constants["bias"] = np.array([0.5, 0], np.float32)
    constants |= {"silent": weights(2, 3, 1, 1, seed=11, zero=(1,)), "last": weights(2, 2, 1, 1, seed=12)}
    nodes += [node("Mul", ["a", "b"], ["p"]), node("Conv", ["input", "silent"], ["s"])]
    nodes += [node("Conv", ["s", "last"], ["t"]), node("Add", ["p", "t"], ["out"])]
    slimmed = slim_and_verify(graph(nodes, constants, {"input": ["N", 3, 4, 4]}, ["p", "out"]))
    assert slimmed.removed_channels > 0


def test_a_maximum_passes_no_negative_scale() -> None:
    """The largest of -f is no multiple of the largest of f."""
    nodes, constants = two_multiples((1.0, -1.0), 0.0)
    nodes.append(node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2]))
    slim_with_reader(nodes, constants, "y", 2)


def test_zero_less_an_integer_is_not_that_integer() -> None:
    nodes = [
        node("Conv", ["input", "w"], ["x"]),
        node("Cast", ["x"], ["whole"], to=onnx.TensorProto.INT32),
        node("Sub", ["zeros", "whole"], ["less"]),
        node("Concat", ["whole", "less"], ["both"], axis=1),
        node("Cast", ["both"], ["c"], to=onnx.TensorProto.FLOAT),
    ]
    constants = {"w": 5 * weights(3, 3, 1, 1), "zeros": np.zeros((3, 1, 1), np.int32)}
    slim_with_reader(nodes, constants, "c", 6)


def test_parts_of_an_image_lose_the_same_channels() -> None:
    """Another reader keeps all channels of x; what is put beside z must lose those that z loses."""
    nodes = [
        node("Conv", ["input", "first"], ["x"]),
        node("Conv", ["input", "second"], ["z"]),
        node("Concat", ["x", "z"], ["y"], axis=2),
        node("Conv", ["y", "some"], ["a"]),
        node("Conv", ["x", "all"], ["b"]),
    ]
    some = weights(2, 6, 1, 1, seed=1)
    some[:, 3:] = 0
    constants = {"first": weights(6, 3, 1, 1, seed=2), "second": weights(6, 3, 1, 1, seed=3)}
    constants |= {"some": some, "all": weights(2, 6, 1, 1, seed=4)}
    slim_and_verify(graph(nodes, constants, {"input": ["N", 3, 4, 4]}, ["a", "b"]))


def test_a_channel_that_a_group_keeps_for_its_count_is_kept_before_the_split() -> None:
    """The second group reads one channel of two, and keeps the other so that both groups have two."""
    grouped = weights(2, 2, 1, 1, seed=1)
    grouped[1, 1] = 0
    nodes = [
        node("Conv", ["input", "w"], ["x"]),
        node("Split", ["x"], ["left", "right"], axis=1, num_outputs=2),
        node("Conv", ["left", "grouped"], ["a"], group=2),
        node("Conv", ["right", "some"], ["b"]),
    ]
    constants = {"w": weights(8, 3, 1, 1), "grouped": grouped, "some": weights(2, 4, 1, 1, seed=2)}
    constants["some"][:, 1] = 0
    slimmed = slim_and_verify(graph(nodes, constants, {"input": ["N", 3, 4, 4]}, ["a", "b"]))
    assert slimmed.removed_channels > 0


def test_every_second_channel_is_a_slice_with_a_step() -> None:
    """All of x stays for another reader; of channels 1 to 5 every second one is read."""
    nodes = [
        node("Conv", ["input", "w"], ["x"]),
        node("Slice", ["x", "one", "six", "one"], ["y"]),
        node("Conv", ["y", "some"], ["a"]),
        node("Conv", ["x", "all"], ["b"]),
    ]
    some = weights(2, 5, 1, 1, seed=1)
    some[:, 1::2] = 0
    constants = {"w": weights(6, 3, 1, 1), "some": some, "all": weights(2, 6, 1, 1, seed=2)}
    constants |= {"one": np.array([1]), "six": np.array([6])}
    model = graph(nodes, constants, {"input": ["N", 3, 4, 4]}, ["a", "b"])
    assert operators(slim_and_verify(model).model) == ["Conv", "Slice", "Conv", "Conv"]


def test_one_weight_whose_readers_lose_different_channels_becomes_two() -> None:
    """Both lose one of six channels, so the two new weights have one shape, but not one content."""
    nodes = [
        node("Conv", ["input", "first"], ["x"]),
        node("Conv", ["input", "second"], ["z"]),
        node("Conv", ["x", "shared"], ["a"]),
        node("Conv", ["z", "shared"], ["b"]),
    ]
    constants = {"first": weights(6, 3, 1, 1, seed=1, zero=(1,)), "second": weights(6, 3, 1, 1, seed=2, zero=(4,))}
    constants["shared"] = weights(2, 6, 1, 1, seed=3)
    slimmed = slim_and_verify(graph(nodes, constants, {"input": ["N", 3, 4, 4]}, ["a", "b"]))
    assert slimmed.removed_channels == 2


def test_a_sum_of_squares_passes_the_square_of_a_scale() -> None:
    nodes, constants = two_multiples((1.0, 2.0), 0.0)
    nodes.append(node("ReduceSumSquare", ["x", "space"], ["y"], keepdims=1))
    constants["space"] = np.array([2, 3])
    assert slim_with_reader(nodes, constants, "y", 2).removed_channels == 1
