"""Networks that ONNX Runtime quantised: they stay quantised, and lose what the float network loses."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from graph.small import copy_of, graph, slim_and_verify
from prune2deploy.graph.rewrite import Slimmed, remove_dead_channels

quantization = pytest.importorskip("onnxruntime.quantization")

f32 = np.float32
INTEGER_OPERATORS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
    | {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
)


class Network:
    """Writes a network layer by layer; half of the outputs of every hidden layer are silenced."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(node(op_type, inputs, [name], name=name, **attributes))
        return name

    def layer(self, op_type: str, value: str, shape: tuple[int, ...], *, last: bool = False, **attributes: Any) -> str:
        spread = np.sqrt(2 / np.prod(shape[1:]))
        weight = self.random.standard_normal(shape) * spread
        bias = self.random.standard_normal(shape[0]) * 0.1
        if not last:
            dead = self.random.choice(shape[0], shape[0] // 2, replace=False)
            weight[dead], bias[dead] = 0, 0
        names = [f"layer{len(self.nodes)}.weight", f"layer{len(self.nodes)}.bias"]
        self.constants |= dict(zip(names, (weight.astype(f32), bias.astype(f32)), strict=True))
        made = self.add(op_type, [value, *names], **attributes)
        return made if last else self.add("Relu", [made])


def cnn(*, residual: bool) -> onnx.ModelProto:
    """Return a small network; with ``residual`` it has an addition, a depthwise layer and a concatenation."""
    net = Network()
    padded = {"pads": [1] * 4}
    value = net.layer("Conv", "x", (16, 3, 3, 3), **padded)
    value = net.layer("Conv", value, (24, 16, 3, 3), strides=[2, 2], **padded)
    if residual:
        value = net.add("Add", [value, net.layer("Conv", value, (24, 24, 3, 3), **padded)])
        depthwise = net.layer("Conv", value, (24, 1, 3, 3), group=24, **padded)
        value = net.add("Concat", [net.layer("Conv", value, (20, 24, 1, 1)), depthwise], axis=1)
        value = net.layer("Conv", value, (24, 44, 1, 1))
    value = net.add("MaxPool", [value], kernel_shape=[2, 2], strides=[2, 2])
    value = net.layer("Conv", value, (32, 24, 3, 3), **padded)
    value = net.add("Flatten", [net.add("GlobalAveragePool", [value])])
    value = net.layer("Gemm", value, (40, 32), transB=1)
    value = net.layer("Gemm", value, (10, 40), transB=1, last=True)
    return graph(net.nodes, net.constants, {"x": ["N", 3, 32, 32]}, {value: ["N", 10]}, opset=17)


class Calibration:
    """Random inputs, as the quantiser asks for them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        value = model.graph.input[0]
        shape = [axis.dim_value or 2 for axis in value.type.tensor_type.shape.dim]
        random = np.random.default_rng(1)
        self._feeds = iter([{value.name: random.standard_normal(shape).astype(f32)} for _ in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def quantised(model: onnx.ModelProto, folder: Path, form: str, *, per_channel: bool, **options: Any) -> onnx.ModelProto:
    before, after = folder / "float.onnx", folder / "quantised.onnx"
    onnx.save(model, before)
    kinds = quantization.QuantType
    if form == "dynamic":
        quantization.quantize_dynamic(before, after, per_channel=per_channel, weight_type=kinds.QInt8)
    else:
        quantization.quantize_static(
            before,
            after,
            Calibration(model),
            quant_format=quantization.QuantFormat[form],
            per_channel=per_channel,
            weight_type=kinds.QInt8,
            activation_type=kinds.QInt8 if options else kinds.QUInt8,
            extra_options=options,
        )
    return onnx.load(after)


def widths(slimmed: Slimmed) -> list[int]:
    return [row.after for row in slimmed.layers if row.kind == "linear"]


def integer_operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(item.op_type for item in model.graph.node if item.op_type in INTEGER_OPERATORS)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("ERROR"):
        yield


PAIRS = {"ActivationSymmetric": True, "AddQDQPairToWeight": True}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("form", "per_channel", "options"),
    [("QDQ", False, {}), ("QDQ", True, {}), ("QDQ", True, PAIRS), ("dynamic", False, {}), ("dynamic", True, {})],
    ids=["tensor", "channel", "pairs", "dynamic", "dynamic-channel"],
)
def test_a_quantised_network_loses_what_the_float_one_loses(
    tmp_path: Path, form: str, per_channel: bool, options: dict[str, bool], residual: bool
) -> None:
    model = cnn(residual=residual)
    whole = quantised(model, tmp_path, form, per_channel=per_channel, **options)
    slimmed = slim_and_verify(whole)
    float_widths = widths(remove_dead_channels(copy_of(model)))
    if form == "dynamic" and residual:  # a constant behind the depthwise layer sets the range of what it is joined to
        assert all(have >= want for have, want in zip(widths(slimmed), float_widths, strict=True))
        assert slimmed.removed_channels > 70
    else:
        assert widths(slimmed) == float_widths
    assert integer_operators(slimmed.model) == integer_operators(whole)
    assert not slimmed.opaque
    again = remove_dead_channels(copy_of(slimmed.model))
    assert again.model.SerializeToString() == slimmed.model.SerializeToString()


@pytest.mark.parametrize("per_channel", [False, True])
def test_operators_on_integers_lose_channels_up_to_the_first_of_another_domain(
    tmp_path: Path, per_channel: bool
) -> None:
    whole = quantised(cnn(residual=False), tmp_path, "QOperator", per_channel=per_channel)
    slimmed = slim_and_verify(whole)
    assert widths(slimmed) == [8, 12, 32]  # then comes an operator of ONNX Runtime's own
    assert integer_operators(slimmed.model) == integer_operators(whole)


def test_a_detector_stays_quantised(tmp_path: Path, data_dir: Path) -> None:
    model = onnx.version_converter.convert_version(onnx.load(data_dir / "onnx" / "nanodet_m_320.onnx"), 13)
    random = np.random.default_rng(1)
    weights = {item.name: item for item in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    for item in model.graph.node:
        if item.op_type == "Conv" and item.output[0] not in outputs:
            rows = weights[item.input[1]].dims[0]
            dead = random.choice(rows, rows * 3 // 10, replace=False)
            for name in item.input[1:]:
                array = onnx.numpy_helper.to_array(weights[name]).copy()
                array[dead] = 0
                weights[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    whole = quantised(model, tmp_path, "dynamic", per_channel=False)
    slimmed = slim_and_verify(whole)
    assert integer_operators(slimmed.model) == integer_operators(whole)
    assert slimmed.removed_channels > 1000
