"""Rows of linear layers: equal ones share a number, across nodes too, and no others do."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node as node

from graph.small import copy_of, graph, slim_and_verify, weights
from prune2deploy.graph.facts import channel_facts
from prune2deploy.graph.node import tables
from prune2deploy.graph.normal import normalise

IMAGE = ["N", 3, 6, 6]


def two_branches(first: np.ndarray, second: np.ndarray, **attributes: Any) -> onnx.ModelProto:
    """Return two convolutions of one input, joined and read by a third."""
    count = len(first) + len(second)
    nodes = [
        node("Conv", ["x", "first"], ["a"], name="first", **attributes),
        node("Conv", ["x", "second"], ["b"], name="second", **attributes),
        node("Concat", ["a", "b"], ["c"], axis=1),
        node("Conv", ["c", "last"], ["y"], name="last"),
    ]
    constants = {"first": first, "second": second, "last": weights(2, count, 1, 1, seed=5)}
    return graph(nodes, constants, {"x": IMAGE}, ["y"])


def numbers(model: onnx.ModelProto, *values: str) -> list[list[int]]:
    facts = channel_facts(tables(normalise(copy_of(model)))).view.facts
    return [facts[value].number.ravel().tolist() for value in values]


def test_equal_rows_of_two_nodes_share_a_number_and_one_goes() -> None:
    first, second = weights(4, 3, 3, 3), weights(4, 3, 3, 3, seed=1)
    second[[0, 2]] = first[[3, 1]]
    model = two_branches(first, second)
    a, b = numbers(model, "a", "b")
    assert (b[0], b[2]) == (a[3], a[1])
    assert len({*a, *b}) == 6
    assert slim_and_verify(model).removed_channels == 2


def test_rows_that_hold_the_same_weights_in_other_places_are_different() -> None:
    """Sum and exclusive or of their bits agree: only the digests tell them apart."""
    first = weights(3, 3, 3, 3)
    first[1] = first[0, :, ::-1]
    first[2] = first[0, [1, 2, 0]]
    second = first[:, :, :, ::-1].copy()
    model = two_branches(first, second)
    assert len({number for row in numbers(model, "a", "b") for number in row}) == 6
    assert slim_and_verify(model).removed_channels == 0


def test_one_of_three_rows_with_one_fingerprint_is_equal() -> None:
    first = weights(3, 3, 3, 3)
    first[1] = first[0, :, ::-1]
    first[2] = first[1]
    (a,) = numbers(two_branches(first, first[:1]), "a")
    assert a[0] != a[1] == a[2]


def test_a_row_with_zero_columns_equals_one_elsewhere() -> None:
    """Equal rows; in one layer another row reads the column that these leave out."""
    first, second = weights(4, 3, 3, 3), weights(4, 3, 3, 3, seed=1)
    first[:2, 1] = 0
    first[1] = np.where(first[1] == 0, np.float32(-0.0), first[1])
    second[3] = first[1]
    second[:, 1] = 0
    model = two_branches(first, second)
    a, b = numbers(model, "a", "b")
    assert b[3] == a[1]
    assert len({*a, *b}) == 7
    assert slim_and_verify(model).removed_channels == 1


def test_the_same_weights_with_other_attributes_are_another_function() -> None:
    first = weights(4, 3, 3, 3)
    model = two_branches(first, first)
    next(item for item in model.graph.node if item.name == "second").attribute.extend(
        node("Conv", ["x"], ["y"], dilations=[1, 1], pads=[0, 0, 0, 0], strides=[1, 1]).attribute
    )
    a, b = numbers(model, "a", "b")
    assert not set(a) & set(b)


def test_two_analyses_hand_out_the_same_numbers() -> None:
    first, second = weights(6, 3, 3, 3), weights(6, 3, 3, 3, seed=1)
    second[[0, 2]] = first[[3, 1]]
    model = two_branches(first, second)
    assert numbers(model, "a", "b", "y") == numbers(model, "a", "b", "y")


def test_sums_that_overflow_are_not_taken_for_those_of_other_inputs() -> None:
    """Equal inputs whose columns cannot be added up in float16 keep apart, and keep what they read in their keys."""
    half = np.float16
    nodes, constants = [], {}
    for seed, name in enumerate("ab"):
        source = weights(3, 3, 1, 1, seed=seed).astype(half)
        source[1] = source[0]
        constants[f"{name}_w"] = source
        nodes.append(node("Conv", ["x", f"{name}_w"], [name]))
        nodes.append(node("Conv", [name, "large"], [f"{name}_out"]))
    constants["large"] = np.full((2, 3, 1, 1), 60000, half)
    nodes.append(node("Add", ["a_out", "b_out"], ["y"]))
    model = graph(nodes, constants, {"x": IMAGE}, ["y"], element=TensorProto.FLOAT16)
    a, b, of_a, of_b = numbers(model, "a", "b", "a_out", "b_out")
    assert (a[0], b[0]) == (a[1], b[1])
    assert of_a[0] == of_a[1] != of_b[0]


def test_wide_rows_are_looked_at_in_blocks() -> None:
    """More weights than are looked at in one go: the last row of a later block equals the first row of all."""
    wide = weights(40, 200, 13, 13)
    wide[-1], wide[7] = wide[0], 0
    constants = {"stem": weights(200, 3, 1, 1), "wide": wide, "last": weights(2, 40, 1, 1)}
    nodes = [
        node("Conv", ["x", "stem"], ["a"]),
        node("Conv", ["a", "wide"], ["b"], name="wide", pads=[6] * 4),
        node("Conv", ["b", "last"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, ["y"]))
    assert [row.after for row in slimmed.layers] == [200, 38, 2]


@pytest.mark.parametrize(("factor", "alias"), [(2, True), (-0.5, True), (3, True), (1 / 3, False)])
@pytest.mark.parametrize("group", [1, 3])
def test_exactly_proportional_rows_are_multiples_of_one_function(factor: float, alias: bool, group: int) -> None:
    """Weights of few bits, whose threefold is exact; a third is rounded, and so another function."""
    first = np.round(64 * weights(6, 3 // group, 3, 3)) / 64
    first[1] = (first[0] * np.float32(factor)).astype(np.float32)
    model = two_branches(first, first) if group == 1 else grouped(first)
    fact = channel_facts(tables(normalise(copy_of(model)))).view.facts["a"]
    number, scale = fact.number.ravel(), fact.scale.ravel()
    assert (number[0] == number[1]) == alias
    if alias:
        assert scale[1] / scale[0] == factor
    slim_and_verify(model)


def grouped(weight: np.ndarray) -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "stem"], ["s"]),
        node("Conv", ["s", "w"], ["a"], group=3),
        node("Conv", ["a", "last"], ["y"]),
    ]
    constants = {"stem": weights(3, 3, 1, 1, seed=5), "w": weight, "last": weights(2, 6, 1, 1, seed=6)}
    return graph(nodes, constants, {"x": IMAGE}, ["y"])


@pytest.mark.parametrize("seed", range(4))
def test_multiples_of_one_channel_with_a_shift_are_one_under_padding(seed: int) -> None:
    """Each multiple's shift is rounded on its own: -0.49 x and 0.89 x of a shift are no longer in their exact ratio."""
    constants = {"one": weights(1, 3, 1, 1, seed=seed), "b": weights(1, seed=seed + 9)}
    constants |= {"many": weights(12, 1, 1, 1, seed=seed + 19), "last": weights(2, 12, 3, 3, seed=seed + 29)}
    nodes = [
        node("Conv", ["x", "one", "b"], ["a"]),
        node("Conv", ["a", "many"], ["c"]),
        node("Conv", ["c", "last"], ["y"], pads=[1] * 4),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, ["y"]))
    assert [row.after for row in slimmed.layers] == [1, 1, 2]
