"""Whole architectures: they slim and verify, and nothing is left behind that a smaller network would not have."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph.small import copy_of, slim_and_verify
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.layers import totals
from prune2deploy.graph.model import load_model

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    """Return a developer script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


zoo = tool("slim_zoo")


# --- real files and built-in networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.names_of("onnx"))
def test_a_trained_detector_slims_as_it_is(name: str, data_dir: Path) -> None:
    path = data_dir / "onnx" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"no '{path}'")
    slimmed = slim_and_verify(load_model(path))
    assert totals(slimmed.layers, "after").macs <= totals(slimmed.layers, "before").macs


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names_of("onnx"))
def test_a_trained_detector_slims_with_half_of_its_channels_silent(name: str, data_dir: Path) -> None:
    path = data_dir / "onnx" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"no '{path}'")
    model = load_model(path)
    check_planted(model)
    zoo.plant_filters(model)
    assert slim_and_verify(model).removed_channels > 0


def check_planted(dense: onnx.ModelProto) -> None:
    """Silence half of every prunable group: exactly that goes, by the cost model of the groups."""
    groups = find_groups(copy_of(dense))
    model = copy_of(dense)
    widths = zoo.plant_groups(model, groups)
    assert sum(widths.values()) < sum(groups.full_widths().values())
    slimmed = slim_and_verify(model)
    assert totals(slimmed.layers, "before").macs == groups.cost.macs(groups.full_widths())
    assert totals(slimmed.layers, "after").macs == groups.cost.macs(widths)
    assert totals(slimmed.layers, "after").parameters == groups.cost.parameters(widths)


def built_in(name: str) -> onnx.ModelProto:
    import torch

    from prune2deploy.networks import load_network

    network = load_network(name.partition(":")[0])
    torch.manual_seed(0)
    example = torch.randn(2, *zoo.input_size("builtin", name, network.module))
    zoo.randomise(network.module, example)
    model: onnx.ModelProto = zoo.export(network.module, example, "dynamo")
    return model


def test_a_built_in_network_loses_what_was_silenced() -> None:
    check_planted(built_in("resnet_digits"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.names_of("builtin") if name != "resnet_digits"])
def test_every_built_in_network_loses_what_was_silenced(name: str) -> None:
    check_planted(built_in(name))


OTHERS = [
    *[("timm", name) for name in ("mobilenetv3_small_050:64", "lcnet_050:64", "repvgg_a0:64", "dla46_c:64")],
    *[("timm", name) for name in ("ghostnet_100:64", "convnext_atto:64", "hrnet_w18_small:64", "regnetx_002:64")],
    *[("torchvision", name) for name in ("densenet121:64", "shufflenet_v2_x0_5:64", "squeezenet1_1:96")],
    *[("detection", "ssdlite320_mobilenet_v3_large:96"), ("torchvision", "lraspp_mobilenet_v3_large:64")],
]


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
@pytest.mark.parametrize(("source", "name"), OTHERS)
def test_an_architecture_of_others_slims(source: str, name: str, exporter: str) -> None:
    package = "timm" if source == "timm" else "torchvision"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    rows = zoo.in_a_process(source, name, exporter, 300)
    assert {variant: row.get("error") or row["verify"] for variant, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert rows["groups"]["removed"] > 0
    assert rows["groups"]["left"]["macs"] == 0


# --- nothing left behind ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """A value, and which channels of the whole network's value are not silenced."""

    name: str
    alive: np.ndarray


@dataclass
class Net:
    """Writes a network twice: whole, with the planted groups' channels silenced, or ``small``, without them."""

    planted: frozenset[str] | None
    small: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(0)

    def pattern(self, group: str, width: int) -> np.ndarray:
        """Return the channels of a group that stay: every second one of those that are planted."""
        self.groups[group] = width
        gone = self.planted is None or group in self.planted
        return np.arange(width) % 2 == 0 if gone else np.ones(width, dtype=bool)

    def width(self, alive: np.ndarray) -> int:
        return int(alive.sum()) if self.small else len(alive)

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def vector(self, alive: np.ndarray, around: float = 0.0) -> str:
        """Return a constant per channel that is 0 for the silent ones."""
        array = (around + self.random.uniform(0.2, 0.8, self.width(alive))).astype(np.float32)
        if not self.small:
            array[~alive] = 0
        return self.constant(array)

    def node(self, op: str, inputs: Iterable[str], alive: np.ndarray, outputs: int = 1, **attributes: Any) -> Value:
        names = [f"v{len(self.nodes)}_{slot}" for slot in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"{op}{len(self.nodes)}", **attributes))
        return Value(names[0], alive)

    def conv(
        self, x: Value, alive: np.ndarray, size: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> Value:
        """A convolution with filters for these channels; in every group of a grouped one equally many are alive."""
        for channels in (x.alive, alive):
            assert len(set(channels.reshape(groups, -1).sum(axis=1).tolist())) == 1
        shape = (self.width(alive), self.width(x.alive) // groups, size, size)
        weight = (self.random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        if not self.small:
            weight[~alive] = 0
        inputs = [x.name, self.constant(weight)]
        inputs += [self.vector(alive)] if bias else []
        pads = [size // 2] * 4
        return self.node("Conv", inputs, alive, pads=pads, strides=[stride] * 2, group=groups)

    def depthwise(self, x: Value, stride: int = 1) -> Value:
        weight = self.random.standard_normal((self.width(x.alive), 1, 3, 3)).astype(np.float32)
        if not self.small:
            weight[~x.alive] = 0
        inputs = [x.name, self.constant(weight)]
        return self.node("Conv", inputs, x.alive, pads=[1] * 4, strides=[stride] * 2, group=self.width(x.alive))

    def norm(self, x: Value) -> Value:
        statistics = [self.random.uniform(0.5, 1.5, self.width(x.alive)).astype(np.float32) for _ in range(2)]
        inputs = [x.name, self.vector(x.alive, 0.5), self.vector(x.alive), *map(self.constant, statistics)]
        return self.node("BatchNormalization", inputs, x.alive)

    def relu(self, x: Value) -> Value:
        return self.node("Relu", [x.name], x.alive)

    def relu6(self, x: Value) -> Value:
        return self.node("Clip", [x.name, self.constant(np.float32(0)), self.constant(np.float32(6))], x.alive)

    def add(self, x: Value, y: Value) -> Value:
        assert (x.alive == y.alive).all()
        return self.node("Add", [x.name, y.name], x.alive)

    def pool(self, x: Value, op: str = "MaxPool") -> Value:
        return self.node(op, [x.name], x.alive, kernel_shape=[2, 2], strides=[2, 2])

    def concat(self, *parts: Value) -> Value:
        alive = np.concatenate([part.alive for part in parts])
        return self.node("Concat", [part.name for part in parts], alive, axis=1)

    def halves(self, x: Value) -> tuple[Value, Value]:
        parts = np.split(x.alive, 2)
        sizes = self.constant(np.array([self.width(part) for part in parts]))
        first = self.node("Split", [x.name, sizes], parts[0], outputs=2, axis=1)
        return first, Value(first.name.replace("_0", "_1"), parts[1])

    def shuffle(self, x: Value, groups: int, size: int) -> Value:
        """Deal the channels of the groups in turn; the silent ones are the same in each."""
        grid = x.alive.reshape(groups, -1)
        assert (grid == grid[0]).all()
        columns = self.width(grid[0])
        shapes = [[-1, groups, columns, size, size], [-1, groups * columns, size, size]]
        there, back = (self.constant(np.array(shape)) for shape in shapes)
        y = self.node("Reshape", [x.name, there], x.alive)
        y = self.node("Transpose", [y.name], x.alive, perm=[0, 2, 1, 3, 4])
        return self.node("Reshape", [y.name, back], grid.T.ravel())

    def head(self, x: Value, size: int = 1) -> Value:
        """A linear layer over the map of this size, or over the mean of any."""
        if size == 1:
            x = self.node("GlobalAveragePool", [x.name], x.alive)
        flat = self.node("Flatten", [x.name], x.alive)
        weight = self.random.standard_normal((5, self.width(x.alive) * size * size)).astype(np.float32)
        bias = self.random.standard_normal(5).astype(np.float32)
        everything = np.ones(5, dtype=bool)
        inputs = [flat.name, self.constant(weight), self.constant(bias)]
        return self.node("Gemm", inputs, everything, transB=1)

    def model(self, output: Value, size: int) -> onnx.ModelProto:
        infos = (
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, size, size])],
            [helper.make_tensor_value_info(output.name, TensorProto.FLOAT, ["N", 5])],
        )
        graph = helper.make_graph(self.nodes, "net", *infos, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model


IMAGE = Value("x", np.ones(3, dtype=bool))


def plain(net: Net) -> onnx.ModelProto:
    """Convolutions in a row with biases, norms or both, and a linear layer over a flattened map."""
    x = net.relu(net.conv(IMAGE, net.pattern("one", 8), bias=True))
    x = net.pool(net.relu(net.norm(net.conv(x, net.pattern("two", 12)))))
    x = net.relu(net.norm(net.conv(x, net.pattern("three", 16), 1, bias=True)))
    return net.model(net.head(x, 4), 8)


def residual(net: Net) -> onnx.ModelProto:
    """Two stages of basic blocks, the second with a 1x1 convolution in its shortcut."""
    first = net.pattern("stage one", 8)
    x = net.relu(net.norm(net.conv(IMAGE, first)))
    for block in range(2):
        y = net.relu(net.norm(net.conv(x, net.pattern(f"inside {block}", 8))))
        x = net.relu(net.add(net.norm(net.conv(y, first)), x))
    second = net.pattern("stage two", 16)
    y = net.relu(net.norm(net.conv(x, net.pattern("inside 2", 16), stride=2)))
    x = net.relu(net.add(net.norm(net.conv(y, second)), net.norm(net.conv(x, second, 1, stride=2))))
    return net.model(net.head(x), 8)


def dense(net: Net) -> onnx.ModelProto:
    """Two blocks of layers that read all before them through a norm of their own, and a transition."""
    x = net.conv(IMAGE, net.pattern("stem", 8))
    for block in range(2):
        for layer in range(3):
            y = net.relu(net.norm(net.conv(net.relu(net.norm(x)), net.pattern(f"neck {block}.{layer}", 16), 1)))
            x = net.concat(x, net.conv(y, net.pattern(f"growth {block}.{layer}", 4)))
        x = net.conv(net.relu(net.norm(x)), net.pattern(f"transition {block}", 12), 1)
        x = net.pool(x, "AveragePool")
    return net.model(net.head(net.relu(net.norm(x))), 8)


def mobile(net: Net) -> onnx.ModelProto:
    """MobileNetV2: inverted residuals with depthwise convolutions and ReLU6."""
    stage = net.pattern("stem", 8)
    x = net.relu6(net.norm(net.conv(IMAGE, stage, stride=2)))
    for block, (width, stride) in enumerate([(8, 1), (12, 2), (12, 1)]):
        wide = net.pattern(f"expansion {block}", 24)
        y = net.relu6(net.norm(net.conv(x, wide, 1)))
        y = net.relu6(net.norm(net.depthwise(y, stride)))
        alone = stride > 1 or len(x.alive) != width
        stage = net.pattern(f"projection {block}", width) if alone else x.alive
        y = net.norm(net.conv(y, stage, 1))
        x = y if alone else net.add(x, y)
    x = net.relu6(net.norm(net.conv(x, net.pattern("last", 32), 1)))
    return net.model(net.head(x), 16)


def shuffle_one(net: Net) -> onnx.ModelProto:
    """ShuffleNet v1: grouped 1x1 convolutions with a shuffle between them, and a depthwise one."""
    stage = net.pattern("stem", 16)
    x = net.relu(net.norm(net.conv(IMAGE, stage)))
    for block in range(2):
        inside = net.pattern(f"inside {block}", 8)
        y = net.shuffle(net.relu(net.norm(net.conv(x, inside, 1, groups=2))), 2, 8)
        y = net.norm(net.depthwise(y))
        x = net.relu(net.add(net.norm(net.conv(y, stage, 1, groups=2)), x))
    return net.model(net.head(x), 8)


def shuffle_two(net: Net) -> onnx.ModelProto:
    """ShuffleNet v2: half of the channels pass, the other half is convolved, and both are dealt in turn."""
    x = net.relu(net.norm(net.conv(IMAGE, net.pattern("stem", 8))))
    half = net.pattern("stage", 16)
    left = net.relu(net.norm(net.conv(net.norm(net.depthwise(x, 2)), half, 1)))
    y = net.relu(net.norm(net.conv(x, net.pattern("down", 12), 1)))
    right = net.relu(net.norm(net.conv(net.norm(net.depthwise(y, 2)), half, 1)))
    x = net.shuffle(net.concat(left, right), 2, 4)
    for unit in range(2):
        left, right = net.halves(x)
        y = net.relu(net.norm(net.conv(right, net.pattern(f"inside {unit}", 16), 1)))
        y = net.norm(net.depthwise(y))
        x = net.shuffle(net.concat(left, net.relu(net.norm(net.conv(y, left.alive, 1)))), 2, 4)
    return net.model(net.head(net.relu(net.norm(net.conv(x, net.pattern("last", 24), 1)))), 8)


FAMILIES = (plain, residual, dense, mobile, shuffle_one, shuffle_two)
Family = Callable[[Net], onnx.ModelProto]


def groups_of(family: Family) -> list[str]:
    net = Net(frozenset(), small=False)
    family(net)
    return list(net.groups)


def weights_of(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Return the shapes of all floating constants, sorted."""
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return sorted(array.shape for array in arrays if array.dtype.kind == "f")


def check_nothing_left(family: Family, planted: frozenset[str] | None) -> None:
    slim = slim_and_verify(family(Net(planted, small=False))).model
    small = family(Net(planted, small=True))
    assert weights_of(slim) == weights_of(small)
    assert [node.op_type for node in slim.graph.node] == [node.op_type for node in small.graph.node]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_with_every_group_silenced_it_is_the_smaller_network(family: Family) -> None:
    check_nothing_left(family, None)


ALONE = [(family, group) for family in FAMILIES for group in groups_of(family)]


@pytest.mark.parametrize(("family", "group"), ALONE, ids=[f"{family.__name__}-{group}" for family, group in ALONE])
def test_with_one_group_silenced_it_is_the_network_with_that_one_smaller(family: Family, group: str) -> None:
    check_nothing_left(family, frozenset({group}))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_with_nothing_silenced_it_is_the_network(family: Family) -> None:
    check_nothing_left(family, frozenset())
