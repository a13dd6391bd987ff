"""Near-dead weights: which are set to zero, that shared ones share a decision, and what removal then finds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import done
from onnx import TensorProto
from onnx.helper import make_node as node

from graph.small import copy_of, graph, initializer, run, weights
from prune2deploy.errors import InputError
from prune2deploy.graph.bound import output_bound
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.tolerance import zero_near_dead


def conv_model(weight: np.ndarray, **extra: Any) -> onnx.ModelProto:
    size = weight.shape[1] * int(extra.get("group", 1))
    nodes = [node("Conv", ["x", "w"], ["y"], name="conv", **extra)]
    return graph(nodes, {"w": weight}, {"x": [1, size, 6, 6]}, ["y"])


def test_weights_below_the_share_of_the_layers_largest_are_zeroed_and_no_others() -> None:
    weight = weights(4, 3, 3, 3)
    weight[1] *= 1e-9
    weight[2, 0, 0, 0] = -1e-9
    zeroed = zero_near_dead(conv_model(weight), 1e-6)
    expected = weight.copy()
    expected[1], expected[2, 0, 0, 0] = 0, 0
    np.testing.assert_array_equal(initializer(zeroed.model, "w"), expected)
    (layer,) = zeroed.layers
    assert (layer.name, layer.op_type, layer.weights, layer.filters) == ("conv", "Conv", 28, 1)
    assert layer.largest == np.abs(weight[1]).max()
    assert layer.limit == 1e-6 * float(np.abs(weight).max())
    assert (zeroed.weights, zeroed.filters) == (28, 1)


def test_what_is_not_below_stays_bit_for_bit_and_the_given_model_is_left_alone() -> None:
    weight = weights(4, 3, 3, 3)
    weight[1] *= 1e-9
    model = conv_model(weight)
    before = model.SerializeToString(deterministic=True)
    zeroed = zero_near_dead(model, 1e-12)
    assert zeroed.layers == ()
    np.testing.assert_array_equal(initializer(zeroed.model, "w"), weight)
    zero_near_dead(model, 0.1)
    assert model.SerializeToString(deterministic=True) == before


def test_filters_that_were_zero_before_are_not_counted() -> None:
    weight = weights(4, 3, 1, 1, zero=(0,))
    weight[1] *= 1e-9
    (layer,) = zero_near_dead(conv_model(weight), 1e-6).layers
    assert (layer.weights, layer.filters) == (3, 1)


@pytest.mark.parametrize("eps", [0.0, 1.0, -1e-6, 2.0, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(eps: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1") as error:
        zero_near_dead(conv_model(weights(2, 3, 1, 1)), eps)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_stay() -> None:
    weight = weights(2, 3, 1, 1)
    weight[0, 0] = np.inf
    assert zero_near_dead(conv_model(weight), 0.5).layers == ()


def test_a_shared_weight_has_one_limit() -> None:
    weight = weights(3, 3, 1, 1)
    weight[1] *= 1e-9
    nodes = [node("Conv", ["x", "w"], ["a"], name="first"), node("Conv", ["a", "w"], ["y"], name="second")]
    zeroed = zero_near_dead(graph(nodes, {"w": weight}, {"x": [1, 3, 4, 4]}, ["y"]), 1e-6)
    assert [(layer.name, layer.filters) for layer in zeroed.layers] == [("first", 1), ("second", 1)]
    assert zeroed.layers[0].limit == zeroed.layers[1].limit
    assert not initializer(zeroed.model, "w")[1].any()


FILTERS: list[tuple[str, tuple[int, ...], dict[str, Any], tuple[Any, ...], list[int]]] = [
    ("Gemm", (5, 4), {}, np.index_exp[:, 2], [1, 5]),
    ("Gemm", (4, 5), {"transB": 1}, np.index_exp[2], [1, 5]),
    ("MatMul", (5, 4), {}, np.index_exp[:, 2], [1, 5]),
    ("MatMul", (5, 4), {"swap": True}, np.index_exp[2], [4, 2]),
    ("ConvTranspose", (6, 2, 2, 2), {"group": 3}, np.index_exp[2:4, 1], [1, 6, 4, 4]),
    ("ConvTranspose", (6, 4, 2, 2), {}, np.index_exp[:, 1], [1, 6, 4, 4]),
    ("Conv", (6, 1, 3, 3), {"group": 6}, np.index_exp[3], [1, 6, 4, 4]),
]


@pytest.mark.parametrize(("op", "shape", "attributes", "place", "size"), FILTERS)
def test_a_filter_lies_where_the_operator_has_it(
    op: str, shape: tuple[int, ...], attributes: dict[str, Any], place: tuple[Any, ...], size: list[int]
) -> None:
    weight = weights(*shape)
    weight[place] *= 1e-9
    options = dict(attributes)
    names = ["w", "x"] if options.pop("swap", False) else ["x", "w"]
    model = graph([node(op, names, ["y"], **options)], {"w": weight}, {"x": size}, ["y"])
    (layer,) = zero_near_dead(model, 1e-6).layers
    assert (layer.weights, layer.filters) == (weight[place].size, 1)


def test_a_small_norm_scale_is_zeroed() -> None:
    scale = np.array([1, 1e-20, 0.5], np.float32)
    ones = np.ones(3, np.float32)
    nodes = [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="norm")]
    model = graph(nodes, {"s": scale, "b": ones, "m": ones, "v": ones}, {"x": [1, 3, 4, 4]}, ["y"])
    zeroed = zero_near_dead(model, 1e-12)
    assert [(layer.name, layer.filters) for layer in zeroed.layers] == [("norm", 1)]
    assert initializer(zeroed.model, "s").tolist() == [1, 0, 0.5]


def test_half_precision_weights_stay_half_precision() -> None:
    weight = weights(2, 3, 1, 1).astype(np.float16)
    weight[1] = 6e-8
    model = graph(
        [node("Conv", ["x", "w"], ["y"])], {"w": weight}, {"x": [1, 3, 4, 4]}, ["y"], element=TensorProto.FLOAT16
    )
    found = initializer(zero_near_dead(model, 1e-3).model, "w")
    assert found.dtype == np.float16
    assert not found[1].any()


def test_a_weight_behind_a_constant_transpose_is_found() -> None:
    """As exporters write linear layers: MatMul(x, Transpose(W))."""
    weight = weights(4, 5)
    weight[2] *= 1e-9
    nodes = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    (layer,) = zero_near_dead(graph(nodes, {"w": weight}, {"x": ["N", 5]}, ["y"]), 1e-6).layers
    assert layer.filters == 1


def test_near_dead_filters_go_and_the_change_is_within_the_bound() -> None:
    first, second = weights(8, 3, 3, 3), weights(4, 8, 3, 3, seed=1)
    first[[1, 4, 5]] *= 1e-17
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "v"], ["y"], pads=[1] * 4),
    ]
    model = graph(nodes, {"w": first, "v": second}, {"x": [1, 3, 8, 8]}, ["y"])
    assert remove_dead_channels(copy_of(model)).removed_channels == 0
    zeroed = zero_near_dead(model, 1e-12)
    slim = remove_dead_channels(copy_of(zeroed.model))
    assert slim.removed_channels == 3
    bound = output_bound(model, zeroed.model, {"x": (-1, 1)})["y"].largest
    assert 0 < bound < 1e-14
    feeds = {"x": np.random.default_rng(0).uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)}
    moved = np.abs(run(model, feeds)["y"].astype(float) - run(slim.model, feeds)["y"]).max()
    assert moved <= bound + 1e-5


def told(model: onnx.ModelProto, folder: Path) -> tuple[dict[str, Any], str]:
    """Return what `slim --tolerance 1e-6` says of the change, as JSON and on the screen."""
    onnx.save(model, folder / "model.onnx")
    arguments = ("slim", folder / "model.onnx", "-o", folder / "slim.onnx", "--tolerance", "1e-6")
    found = json.loads(done(*arguments, "--json"))["slim"]["tolerance"]
    return found, " ".join(done(*arguments).split())


def test_a_bound_below_the_rounding_is_shown_beside_it(tmp_path: Path) -> None:
    weight = weights(4, 64, 3, 3)
    weight[:, :32] *= 1e-9
    found, text = told(conv_model(weight), tmp_path)
    (output,) = found["outputs"]
    assert output["computed_in"] == "float32"
    assert output["rounding"] > 0
    bound, measured = output["bound"]["largest"], output["measured"]
    assert f"'y' moves by at most {bound:.2e} in exact arithmetic; measured {measured:.2e}, rounding included" in text
    assert f"(float32: about {output['rounding']:.0e})" in text


def test_a_number_that_is_lost_is_told_as_such(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Div", ["a", "a"], ["y"], name="ratio")]
    weight = weights(2, 1, 1, 1)
    weight[1] = 1e-9
    found, text = told(graph(nodes, {"w": weight}, {"x": [1, 1, 4, 4]}, ["y"]), tmp_path)
    assert found["outputs"][0]["measured"] is None
    assert "'y': no bound on how far it moves is known (because of ratio (Div)); measured no finite number" in text


@pytest.mark.parametrize("element", [TensorProto.UINT8, TensorProto.INT32, TensorProto.BOOL, TensorProto.BFLOAT16])
def test_inputs_of_any_type_that_runs_are_taken(element: int, tmp_path: Path) -> None:
    weight = weights(8, 3, 1, 1)
    weight[[1, 4]] *= 1e-9
    real = element == TensorProto.BFLOAT16
    kind = element if real else TensorProto.FLOAT
    constants = {
        "w": weight.astype(onnx.helper.tensor_dtype_to_np_dtype(kind)),
        "v": weights(2, 8, 1, 1).astype(onnx.helper.tensor_dtype_to_np_dtype(kind)),
    }
    nodes = [
        node("Cast", ["x"], ["f"], to=kind),
        node("Conv", ["f", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    types = {"x": element, "y": kind}
    model = graph(nodes, constants, {"x": ["N", 3, 4, 4]}, {"y": ["N", 2, 4, 4]}, opset=22, element=types)
    found, text = told(model, tmp_path)
    assert found["filters"] == 2
    assert found["range"] == ({"x": [-3, 3]} if real else {})
    assert ("For 'x' in [-3, 3]:" if real else "For any input:") in text
    assert found["outputs"][0]["measured"] is not None
    assert (found["outputs"][0]["bound"]["largest"] is None) == (element == TensorProto.INT32)


@pytest.mark.parametrize(
    ("name", "box", "eps", "weights_zeroed", "filters"),
    [
        ("nanodet_m_320", (-2.2, 2.7), 1e-12, 50593, 286),
        ("nanodet_m_320", (-2.2, 2.7), 1e-6, 54718, 286),
        ("ultraface_rfb_320", (-1.0, 1.0), 1e-6, 3, 0),
        ("yolox_nano", (0.0, 255.0), 1e-6, 18, 0),
    ],
)
def test_the_detectors_move_by_no_more_than_their_bound(
    name: str, box: tuple[float, float], eps: float, weights_zeroed: int, filters: int, data_dir: Path
) -> None:
    model = onnx.load(data_dir / "onnx" / f"{name}.onnx")
    zeroed = zero_near_dead(model, eps)
    assert (zeroed.weights, zeroed.filters) == (weights_zeroed, filters)
    held = {tensor.name for tensor in model.graph.initializer}
    (given,) = (value for value in model.graph.input if value.name not in held)
    bounds = output_bound(model, zeroed.model, {given.name: box})
    shape = [dim.dim_value for dim in given.type.tensor_type.shape.dim]
    feeds = {given.name: np.random.default_rng(0).uniform(*box, shape).astype(np.float32)}
    want, got = run(model, feeds), run(zeroed.model, feeds)
    for output, bound in bounds.items():
        moved = np.abs(want[output].astype(float) - got[output]).max()
        assert moved <= bound.largest + 1e-5 * np.abs(want[output]).max()
        assert bound.lowest <= want[output].min()
        assert want[output].max() <= bound.highest
        assert bound.unbounded_by is None
        if "cls" in output or output == "scores":
            assert bound.largest <= 1 + 1e-9  # behind a Sigmoid or a Softmax
    assert remove_dead_channels(zeroed.model).removed_channels == filters
