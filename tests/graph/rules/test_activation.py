"""Lines of the family activation: functions of one input."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx.helper import make_node as node

from graph.rule_check import Line, check_line, f32, label
from graph.small import analysis_of, graph, kept, operators, run, slim_and_verify, weights
from prune2deploy.graph.fact import Fact
from prune2deploy.graph.rules.activation import FUNCTIONS

SINCE = {
    "Celu": (12, 18),
    "HardSwish": (14, 18, 22),
    "Mish": (18, 22),
    "Round": (11, 18, 22),
    "Swish": (24,),
    "ThresholdedRelu": (10, 18, 22),
}
PARTIAL = ("Acos", "Asin", "Atanh", "Log", "Reciprocal", "Sqrt")
"""Functions that are not finite everywhere, but are between 0 and 1."""
PLAIN = sorted({*FUNCTIONS} - {*PARTIAL, "Acosh", "Cast", "Clip", "IsInf", "IsNaN", "Not", "Gelu"})

LINES: list[Line] = [
    *((op, ("x",), {"opset": opset}) for op in PLAIN for opset in SINCE.get(op, (9, 13, 18, 23))),
    *((op, ("x~",), {"opset": opset}) for op in PARTIAL for opset in (9, 18)),
    *((op, ("x",), {"spatial": (), "opset": 24}) for op in ("Relu", "Sigmoid", "Swish", "Sign")),
    *((op, ("x",), {"via": TensorProto.FLOAT16}) for op in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Softplus")),
    *((op, ("x",), {"via": TensorProto.DOUBLE}) for op in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Abs", "Exp")),
    *((op, ("x",), {"via": TensorProto.INT32}) for op in ("Relu", "Abs", "Sign")),
    ("LeakyRelu", ("x",), {"alpha": 0.3}),
    ("LeakyRelu", ("x",), {"alpha": -0.3}),
    ("LeakyRelu", ("x",), {"alpha": float("inf"), "opaque": True, "removes": False}),
    ("Elu", ("x",), {"alpha": 0.5}),
    ("Celu", ("x",), {"alpha": 0.5}),
    ("Selu", ("x",), {"alpha": 1.5, "gamma": 1.2}),
    ("HardSigmoid", ("x",), {"alpha": 1 / 6, "beta": 0.5}),
    ("ThresholdedRelu", ("x",), {"alpha": 0.0}),
    ("ThresholdedRelu", ("x",), {"alpha": 0.4}),
    ("Shrink", ("x",), {"lambd": 0.3, "bias": 0.1}),
    ("Gelu", ("x",), {"opset": 20}),
    ("Gelu", ("x",), {"opset": 20, "approximate": "tanh"}),
    ("Swish", ("x",), {"opset": 24, "alpha": 1.7}),
    ("Clip", ("x", f32(0.1), f32(0.6)), {}),
    ("Clip", ("x", f32(0.1), f32(6)), {"opset": 11}),
    ("Clip", ("x", "", f32(0.5)), {"opset": 12}),
    ("Clip", ("x", f32(0)), {"opset": 13}),
    ("Clip", ("x", f32(0.5), f32(-0.5)), {}),
    ("Clip", ("x",), {}),
    ("Clip", ("x",), {"min": 0.1, "max": 0.6, "opset": 9}),
    ("Clip", ("x",), {"max": 0.6, "opset": 10}),
    ("Clip", ("x", np.int32(0), np.int32(1)), {"via": TensorProto.INT32}),
    *((op, ("x",), {"opaque": True, "removes": False}) for op in ("Log", "Reciprocal", "Acosh")),
    *(("Cast", ("x",), {"to": to}) for to in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)),
    *(("Cast", ("x",), {"to": to}) for to in (TensorProto.INT32, TensorProto.UINT8, TensorProto.BOOL)),
    ("Cast", ("x",), {"to": TensorProto.FLOAT, "via": TensorProto.INT32}),
    ("Cast", ("x",), {"to": TensorProto.FLOAT, "via": TensorProto.BOOL}),
    ("Cast", ("x",), {"to": TensorProto.FLOAT, "opset": 9}),
    ("CastLike", ("x", "z"), {"opset": 15}),
    ("CastLike", ("x", np.float16(1)), {"opset": 19}),
    ("CastLike", ("x", np.int32(1)), {"opset": 23}),
    ("Not", ("x>",), {}),
    ("IsNaN", ("x",), {}),
    ("IsInf", ("x",), {"detect_negative": 0}),
]


@pytest.mark.parametrize("line", LINES, ids=label)
def test_rule(line: Line) -> None:
    check_line(line)


IMAGE = ["N", 3, 6, 6]
Array = np.ndarray


def fact_of(op: str, weight: Array, *constants: Any, bias: Any = 0, factors: Any = 1, **attributes: Any) -> Fact:
    """Return the fact of an operator's result on multiples of a convolution's channels."""
    held = {f"k{slot}": np.asarray(array) for slot, array in enumerate(constants)}
    opset = attributes.pop("opset", 20)
    nodes = [node("Conv", ["x", "w", "b"], ["a"])]
    nodes += [node("Mul", ["a", "factors"], ["m"]), node(op, ["m", *held], ["y"], **attributes)]
    own = {"w": weight, "b": np.asarray(bias, np.float32), "factors": np.asarray(factors, np.float32)}
    own["b"] = np.resize(own["b"], len(weight))
    return analysis_of(graph(nodes, held | own, {"x": IMAGE}, ["y"], opset=opset)).known.view.facts["y"]


@pytest.mark.parametrize(
    ("op", "constants", "functions"),
    [
        ("Relu", (), 2),
        ("LeakyRelu", (), 2),
        ("Abs", (), 1),
        ("Neg", (), 1),
        ("Sign", (), 1),
        ("Reciprocal", (), 1),
        ("Sqrt", (), 2),
        ("Tanh", (), 2),
        ("Cos", (), 2),
        ("Sigmoid", (), 4),
        ("Gelu", (), 4),
        ("HardSwish", (), 4),
        ("Clip", (f32(0),), 2),
        ("Clip", (f32(0), f32(6)), 4),
        ("Pow", (f32(2),), 1),
        ("Pow", (f32(3),), 1),
        ("Pow", (f32(0.5),), 3),
        ("PRelu", (f32(0.1),), 2),
        ("PRelu", (np.full((4, 1, 1), 0.1, f32),), 2),
        ("PRelu", (np.array([0.1, 0.2, 0.1, 0.2], f32)[:, None, None],), 4),
        ("Max", (f32(0),), 2),
        ("Min", (f32(1),), 4),
        ("Mul", (f32(3),), 1),
        ("Div", (f32(3),), 1),
        ("Cast", (), 4),
    ],
)
def test_multiples_of_one_function_stay_multiples_where_the_operator_passes_them(
    op: str, constants: tuple[Any, ...], functions: int
) -> None:
    weight, factors = np.stack([weights(3, 1, 1)] * 4), np.reshape([1, 2, -1, -2], (4, 1, 1))
    attributes = {"to": TensorProto.FLOAT16} if op == "Cast" else {}
    fact = fact_of(op, weight, *constants, factors=factors, **attributes)
    assert len(np.unique(fact.number)) == functions


CONSTANTS = np.array([0, 0.25, -0.75, 1e-3, 3, -3, 0.7, 11, -11, 0.5, 1, -1], np.float32)


@pytest.mark.parametrize("op", sorted({*FUNCTIONS} - {"Cast", "Not", "IsInf", "IsNaN"}))
def test_a_constant_has_the_value_that_the_runtime_computes(op: str) -> None:
    values = CONSTANTS
    if op in PARTIAL:
        values = np.array([0.1, 0.25, 0.5, 0.7, 0.9, 0.99], np.float32)
    elif op == "Acosh":
        values = np.array([1.5, 2, 3, 20], np.float32)
    weight = np.zeros((len(values), 3, 1, 1), np.float32)
    fact = fact_of(op, weight, bias=values, opset=24)
    model = graph([node(op, ["v"], ["y"])], {}, {"v": [len(values)]}, ["y"], opset=24)
    want = run(model, {"v": values})["y"]
    sure = fact.constant.ravel()
    assert sure.sum() >= len(values) - 7, "all but those on a jump"
    np.testing.assert_allclose(fact.shift.ravel()[sure], want[sure], rtol=4e-7, atol=3e-7)


@pytest.mark.parametrize(
    ("op", "constant", "sure"),
    [
        ("Floor", 0.0, True),
        ("Floor", 2.0, False),
        ("Floor", 1.99, True),
        ("Ceil", 0.0, True),
        ("Ceil", 1e-6, False),
        ("Round", 0.0, True),
        ("Round", 0.5, False),
        ("Sign", 0.0, True),
        ("Sign", 1e-6, False),
        ("Sign", 0.1, True),
        ("ThresholdedRelu", 1.0, False),
        ("ThresholdedRelu", 0.0, True),
        ("Shrink", 0.5, False),
        ("Shrink", 0.0, True),
    ],
)
def test_a_constant_at_a_jump_is_not_taken_for_one(op: str, constant: float, sure: bool) -> None:
    fact = fact_of(op, np.zeros((2, 3, 1, 1), np.float32), bias=[constant, constant])
    assert fact.constant.all() == fact.constant.any() == sure


@pytest.mark.parametrize("op", ["Sigmoid", "HardSigmoid", "Softplus", "Exp", "Clip", "Cos", "Acos"])
@pytest.mark.parametrize("pad", [0, 1])
def test_a_zero_channel_behind_a_function_with_f0_not_0_keeps_its_part(op: str, pad: int) -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=(1, 2)), "v": weights(2, 4, 3, 3)}
    constants |= {"low": f32(0.1), "high": f32(6)} if op == "Clip" else {}
    bounds = ["low", "high"] if op == "Clip" else []
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Tanh", ["a"], ["t"]), node(op, ["t", *bounds], ["r"])]
    nodes.append(node("Conv", ["r", "v"], ["y"], pads=[pad] * 4))
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, ["y"]))
    assert slimmed.removed_channels == (1 if pad else 2), "under padding one constant channel stays"


def test_a_value_that_only_gives_a_type_is_not_computed() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=(1, 2)), "u": weights(5, 3, 1, 1), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["x", "u"], ["only_type"]),
        node("CastLike", ["a", "only_type"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, ["y"]))
    assert slimmed.removed_channels == 2 + 5
    assert operators(slimmed.model).count("Conv") == 2


def test_a_clip_whose_bound_is_computed_is_opaque() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=(1, 2)), "v": weights(2, 4, 1, 1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("ReduceMax", ["x"], ["bound"], keepdims=0),
        node("Clip", ["a", "", "bound"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    assert slim_and_verify(graph(nodes, constants, {"x": IMAGE}, ["y"])).opaque["Clip"] == 1


def test_a_clip_whose_bound_is_computed_from_constants_is_none() -> None:
    constants = {"w": weights(4, 3, 1, 1, zero=(1, 2)), "v": weights(2, 4, 1, 1), "half": f32(3)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Add", ["half", "half"], ["six"]),
        node("Clip", ["a", "", "six"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    assert kept(graph(nodes, constants, {"x": IMAGE}, ["y"]), "a") == [True, False, False, True]
