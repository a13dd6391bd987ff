"""Recalibration on ONNX: the same statistics as torch's training mode gives, in every form that a norm has."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from graph.small import graph, initializer, weights
from prune2deploy.data import load_data, normalise
from prune2deploy.errors import InputError
from prune2deploy.exporter import export_network
from prune2deploy.graph.recalibrate import recalibrate
from prune2deploy.train import recalibrate as torch_recalibrate

LIMIT = 1e-4


class Normed(nn.Module):
    """Norms over maps and over vectors, one behind a depthwise convolution, one on a sum, one applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6, eps=1e-3)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.depth_norm = nn.BatchNorm2d(6)
        self.same = nn.Conv2d(6, 6, 1)
        self.twice = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 5)
        self.flat_norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(image)))
        x = x + F.relu(self.depth_norm(self.depth(x)))
        x = F.relu(self.twice(self.same(self.twice(x))))
        return self.head(F.relu(self.flat_norm(self.hidden(x.mean((2, 3))))))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return Normed().eval()


@pytest.fixture(scope="module")
def exported(net: nn.Module) -> onnx.ModelProto:
    return export_network(net, (torch.zeros(2, 1, 8, 8),), fuse=False).model


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    return onnx.load_from_string(model.SerializeToString())


def test_the_statistics_are_those_that_torch_measures(net: nn.Module, exported: onnx.ModelProto) -> None:
    data = load_data("digits")
    expected = copy.deepcopy(net)
    assert torch_recalibrate(expected, data.train, data.mean, data.std, images=300, batch_size=64, seed=5) == 4
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(5))[:256]  # 300 are 4 whole 64s
    batches = [
        {"input": normalise(data.train.images(rows), data.mean, data.std).numpy()} for rows in torch.split(chosen, 64)
    ]
    model = copied(exported)
    assert recalibrate(model, batches) == 4
    checked = 0
    for name, tensor in expected.state_dict().items():
        got = initializer(model, name) if "num_batches" not in name else None
        if got is None:
            continue
        scale = float(tensor.abs().max())
        assert np.abs(got - tensor.numpy()).max() <= LIMIT * scale, name
        moved = np.abs(got - initializer(exported, name)).max() > 0
        assert moved == ("running" in name), name
        checked += moved
    assert checked == 8


def batches_of(shape: tuple[int, ...], count: int = 3) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    for _ in range(count):
        yield {"x": (random.standard_normal(shape) * 2 + 1).astype(np.float32)}


def normed(opset: int = 18, element: int = TensorProto.FLOAT, dims: tuple[Any, ...] = ("batch", 3, 5, 5)) -> Any:
    dtype = helper.tensor_dtype_to_np_dtype(element)
    nodes = [
        helper.make_node("BatchNormalization", ["x", "scale", "shift", "mean", "var"], ["y"], epsilon=1e-3),
        helper.make_node("BatchNormalization", ["y", "scale2", "shift2", "mean2", "var2"], ["z"]),
    ]
    vectors = {
        f"{name}{number}": np.full(3, value, dtype)
        for number, values in (("", (2, 1, 0, 1)), ("2", (1, 0, 0, 1)))
        for name, value in zip(("scale", "shift", "mean", "var"), values, strict=True)
    }
    return graph(nodes, vectors, {"x": list(dims)}, {"z": list(dims)}, opset=opset, element=element)


@pytest.mark.parametrize("opset", [9, 13, 15, 17, 18, 21])
def test_every_operator_set_measures_the_same(opset: int) -> None:
    model = normed(opset)
    recalibrate(model, batches_of((4, 3, 5, 5)))
    seen = [batch["x"].astype(np.float64) for batch in batches_of((4, 3, 5, 5))]
    axes = (0, 2, 3)
    np.testing.assert_allclose(initializer(model, "mean"), np.mean([x.mean(axes) for x in seen], 0), rtol=1e-5)
    np.testing.assert_allclose(initializer(model, "var"), np.mean([x.var(axes, ddof=1) for x in seen], 0), rtol=1e-5)
    np.testing.assert_allclose(initializer(model, "mean2"), np.ones(3), rtol=1e-5)  # normal, times 2, plus 1
    second = [4 * x.var(axes) / (x.var(axes) + 1e-3) * 100 / 99 for x in seen]
    np.testing.assert_allclose(initializer(model, "var2"), np.mean(second, 0), rtol=1e-5)


def test_half_precision_is_measured_in_float32() -> None:
    model = normed(element=TensorProto.FLOAT16)
    batches = [{"x": (batch["x"] + 100).astype(np.float16)} for batch in batches_of((64, 3, 5, 5))]
    recalibrate(model, batches)
    seen = [batch["x"].astype(np.float64) for batch in batches]
    assert initializer(model, "var").dtype == np.float16
    np.testing.assert_allclose(
        initializer(model, "var"), np.mean([x.var((0, 2, 3), ddof=1) for x in seen], 0), rtol=2e-3
    )


def test_a_fixed_batch_of_one_is_measured_in_larger_batches() -> None:
    fixed, free = normed(dims=(1, 3, 5, 5)), normed()
    for model in (fixed, free):
        recalibrate(model, batches_of((8, 3, 5, 5)))
    assert fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    for name in ("mean", "var", "mean2", "var2"):
        np.testing.assert_array_equal(initializer(fixed, name), initializer(free, name))


def test_statistics_that_two_norms_had_in_common_become_their_own() -> None:
    nodes = [
        helper.make_node("BatchNormalization", ["x", "scale", "zero", "zero", "one"], ["y"]),
        helper.make_node("BatchNormalization", ["y", "one", "shift", "zero", "one"], ["z"]),
    ]
    vectors = {
        "scale": np.full(3, 3, np.float32),
        "shift": np.full(3, 7, np.float32),
        "zero": np.zeros(3, np.float32),
        "one": np.ones(3, np.float32),
    }
    model = graph(nodes, vectors, {"x": ["batch", 3, 5, 5]}, {"z": ["batch", 3, 5, 5]})
    assert recalibrate(model, batches_of((8, 3, 5, 5))) == 2
    first, second = (list(node.input) for node in model.graph.node)
    assert len({*first[1:], *second[1:]}) == 8
    means = [initializer(model, names[3]) for names in (first, second)]
    assert np.abs(means[0] - 1).max() < 0.5
    assert np.abs(means[1]).max() < 1e-5 + np.abs(means[0]).max()
    onnx.checker.check_model(model, full_check=True)


def test_only_statistics_change_and_the_graph_keeps_its_form(exported: onnx.ModelProto) -> None:
    model = copied(exported)
    recalibrate(model, [{"input": np.random.default_rng(0).standard_normal((8, 1, 8, 8)).astype(np.float32)}])
    assert model.graph.node == exported.graph.node
    assert [value.name for value in model.graph.output] == ["output"]
    for before in exported.graph.initializer:
        if "running" not in before.name:
            assert numpy_helper.to_array(before).tobytes() == initializer(model, before.name).tobytes()


def test_what_cannot_be_measured_is_refused() -> None:
    plain = graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        {"w": weights(2, 3, 1, 1)},
        {"x": ["batch", 3, 5, 5]},
        {"y": ["batch", 2, 5, 5]},
    )
    with pytest.raises(InputError, match="no BatchNormalization"):
        recalibrate(plain, batches_of((4, 3, 5, 5)))
    with pytest.raises(InputError, match="no samples"):
        recalibrate(normed(), [])
    with pytest.raises(InputError, match=r"shape \{'x': \[4, 2, 5, 5\]\}"):
        recalibrate(normed(), batches_of((4, 2, 5, 5)))
    with pytest.raises(InputError, match="2 samples or more"):
        recalibrate(normed(dims=("batch", 3)), batches_of((1, 3)))
    with pytest.raises(InputError, match="not finite"):
        recalibrate(normed(), [{"x": np.full((2, 3, 5, 5), np.nan, np.float32)}])
