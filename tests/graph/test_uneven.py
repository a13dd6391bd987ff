"""Grouped convolutions whose groups need different numbers of channels: even, divided, or with whole groups removed."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.small import graph, initializer, operators, slim_and_verify, weights
from prune2deploy.graph.rewrite import Slimmed

GROUPS, INTO, OUT = 4, 4, 6
"""Groups, and channels of one group on either side."""


def resnext(
    reads: dict[int, int], *, bias: bool = False, opset: int = 18, op: str = "Conv", **attributes: Any
) -> Slimmed:
    """Slim 1x1 -> grouped 3x3 -> 1x1, verified; ``reads`` are how many channels of which group the last one reads.

    The grouped one reads as many of its own inputs, at most all.
    """
    shape = (GROUPS * OUT, INTO, 3, 3) if op == "Conv" else (GROUPS * INTO, OUT, 3, 3)
    constants = {
        "stem": weights(GROUPS * INTO, 3, 1, 1),
        "w": weights(*shape, seed=1),
        "last": weights(5, GROUPS * OUT, 1, 1),
    }
    for group in range(GROUPS):
        count = reads.get(group, 0)
        constants["last"][:, group * OUT + count : (group + 1) * OUT] = 0
        if op == "Conv":
            constants["w"][group * OUT : (group + 1) * OUT, count:] = 0
        else:
            constants["w"][group * INTO + count : (group + 1) * INTO] = 0
    if bias:
        constants["b"] = weights(GROUPS * OUT, seed=2)
    nodes = [
        node("Conv", ["x", "stem"], ["a"], name="stem"),
        node("Relu", ["a"], ["r"]),
        node(op, ["r", "w", *(["b"] if bias else [])], ["g"], name="grouped", group=GROUPS, **attributes),
        node("Relu", ["g"], ["s"]),
        node("Conv", ["s", "last"], ["y"], name="last"),
    ]
    return slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, ["y"], opset=opset))


def shapes(slimmed: Slimmed, name: str) -> list[tuple[int, ...]]:
    """Return the shapes of the weights of all parts of a layer."""
    made = {tensor.name: tuple(tensor.dims) for tensor in slimmed.model.graph.initializer}
    return [made[item.input[1]] for item in slimmed.model.graph.node if item.name.startswith(name)][:4]


def convolutions(model: onnx.ModelProto) -> int:
    return operators(model).count("Conv")


def macs(slimmed: Slimmed) -> dict[str, int | None]:
    return {row.name: row.macs_after for row in slimmed.layers}


def test_equal_groups_stay_one_convolution() -> None:
    slimmed = resnext(dict.fromkeys(range(GROUPS), 2))
    assert convolutions(slimmed.model) == 3
    assert slimmed.groups == []
    assert initializer(slimmed.model, "w").shape == (8, 2, 3, 3)


def test_whole_groups_go() -> None:
    slimmed = resnext({1: 3, 2: 3})
    assert convolutions(slimmed.model) == 3
    assert slimmed.groups == []
    assert initializer(slimmed.model, "w").shape == (6, 3, 3, 3)


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("bias", [False, True])
def test_one_full_group_among_three_small_ones_is_divided_off(opset: int, bias: bool) -> None:
    slimmed = resnext({0: 1, 1: 1, 2: 1, 3: 4}, bias=bias, opset=opset)
    (choice,) = slimmed.groups
    assert (choice.layer, choice.choice, choice.parts) == ("grouped", "split", 2)
    assert choice.macs_split == 16 * 9 * (3 * 1 * 1 + 4 * 4)
    assert choice.macs_even == 16 * 9 * 4 * 4 * 4
    assert macs(slimmed)["grouped"] == choice.macs_split
    assert macs(slimmed)["stem"] == 36 * 3 * 7
    assert operators(slimmed.model) == ["Conv", "Relu", "Split", "Conv", "Conv", "Concat", "Relu", "Conv"]
    assert slimmed.report()["groups"] == [choice.to_json()]
    written = sum(row.parameters_after for row in slimmed.layers)
    assert written == sum(
        int(np.prod(tensor.dims)) for tensor in slimmed.model.graph.initializer if tensor.data_type == 1
    )


def test_a_group_that_is_gone_between_two_makes_no_part() -> None:
    slimmed = resnext({0: 4, 1: 0, 2: 4, 3: 1})
    (choice,) = slimmed.groups
    assert choice.parts == 2


def test_nearly_equal_groups_are_kept_even() -> None:
    slimmed = resnext({0: 4, 1: 4, 2: 4, 3: 3})
    (choice,) = slimmed.groups
    assert (choice.choice, choice.parts) == ("even", 2)
    assert convolutions(slimmed.model) == 3
    assert macs(slimmed)["grouped"] == choice.macs_even


def test_a_divided_transposed_convolution() -> None:
    slimmed = resnext({0: 4, 1: 1, 2: 1, 3: 1}, op="ConvTranspose", bias=True, strides=[2, 2])
    assert [choice.choice for choice in slimmed.groups] == ["split"]
    assert operators(slimmed.model).count("ConvTranspose") == 2


def test_what_was_divided_stays_as_it_is() -> None:
    once = resnext({0: 1, 1: 1, 2: 1, 3: 4}, bias=True)
    again = slim_and_verify(once.model)
    assert again.removed_channels == 0
    assert operators(again.model) == operators(once.model)


def test_a_group_of_constants_that_are_given_out_is_no_layer_of_zeros() -> None:
    """Its own channels could all go, but alone it would be a convolution that computes nothing."""
    constants = {"stem": weights(8, 3, 1, 1), "w": weights(2, 4, 3, 3, seed=1, zero=(1,))}
    nodes = [node("Conv", ["x", "stem"], ["a"]), node("Conv", ["a", "w"], ["y"], name="grouped", group=2)]
    once = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 6, 6]}, ["y"]))
    assert [choice.choice for choice in once.groups] == []
    assert convolutions(once.model) == 2
    again = slim_and_verify(once.model)
    assert (again.removed_channels, again.removed_layers) == (0, [])


def test_the_kept_columns_of_grouped_weights_are_told_by_group_where_they_differ() -> None:
    def kept_of(zero: tuple[int, ...], silent: tuple[int, ...] = ()) -> tuple[Any, np.ndarray, np.ndarray]:
        nodes = [
            node("Conv", ["x", "w"], ["a"]),
            node("Conv", ["a", "k"], ["b"], group=2),
            node("Conv", ["b", "v"], ["y"]),
        ]
        constants = {"w": weights(6, 3, 1, 1, zero=zero), "k": weights(6, 3, 1, 1, seed=2, zero=silent)}
        constants |= {"v": weights(2, 6, 1, 1, seed=4)}
        slimmed = slim_and_verify(graph(nodes, constants, {"x": ["N", 3, 4, 4]}, {"y": ["N", 2, 4, 4]}))
        return slimmed.kept["initializers"]["k"], constants["k"], initializer(slimmed.model, "k")

    found, before, after = kept_of(zero=(0, 4))
    assert found == {"1": [[1, 2], [0, 2]]}
    assert np.array_equal(after, np.concatenate([before[:3, [1, 2]], before[3:, [0, 2]]]))
    found, before, after = kept_of(zero=(1, 4))
    assert found == {"1": [0, 2]}
    assert np.array_equal(after, before[:, [0, 2]])
    found, before, after = kept_of(zero=(), silent=(0, 1, 2))
    assert found == {"0": [3, 4, 5], "1": [0, 1, 2]}
    assert np.array_equal(after, before[3:])
