"""Drops: channels named in a file are silenced first, what they change is told, and the rest is proved as ever."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node as node
from torch import Tensor, nn
from torch.nn.utils import prune

from graph.small import copy_of, graph, initializer, operators, run, slim_and_verify, weights
from prune2deploy.errors import InputError
from prune2deploy.exporter import export_network
from prune2deploy.graph.drops import Dropped, apply_drops, load_drops
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.layers import totals
from prune2deploy.graph.rewrite import Slimmed
from prune2deploy.masks import save_masks
from prune2deploy.slim import Options, slim_file


def drop(model: onnx.ModelProto, document: object, folder: Path) -> Dropped:
    path = folder / "drop.json"
    path.write_text(json.dumps(document))
    return apply_drops(copy_of(model), load_drops(path))


def widths(slimmed: Slimmed) -> dict[str, int]:
    return {row.name: row.after for row in slimmed.layers}


def chain() -> onnx.ModelProto:
    """Conv with bias, norm, Relu, Conv, Add of a bias, Relu, Conv."""
    nodes = [
        node("Conv", ["x", "first", "first_bias"], ["a"]),
        node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "second"], ["d"]),
        node("Add", ["d", "second_bias"], ["e"]),
        node("Relu", ["e"], ["f"]),
        node("Conv", ["f", "third"], ["y"]),
    ]
    constants = {
        "first": weights(4, 3, 3, 3, seed=1),
        "first_bias": weights(4, seed=2),
        "scale": weights(4, seed=3),
        "shift": weights(4, seed=4),
        "mean": weights(4, seed=5),
        "var": np.abs(weights(4, seed=6)) + 1,
        "second": weights(5, 4, 1, 1, seed=7),
        "second_bias": weights(1, 5, 1, 1, seed=8),
        "third": weights(2, 5, 1, 1, seed=9),
    }
    return graph(nodes, constants, {"x": ["batch", 3, 6, 6]}, ["y"])


IMAGE = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)


def changed(before: onnx.ModelProto, after: onnx.ModelProto) -> dict[str, list[int]]:
    """Return which indices along the axis of channels of which initializer were zeroed; nothing else may differ."""
    found = {}
    for tensor in before.graph.initializer:
        old, new = numpy_helper.to_array(tensor), initializer(after, tensor.name)
        if not np.array_equal(old, new):
            axis = 1 if old.ndim == 4 and len(old) == 1 else 0
            rows = [i for i in range(old.shape[axis]) if not np.array_equal(old.take(i, axis), new.take(i, axis))]
            assert not new.take(rows, axis).any()
            found[tensor.name] = rows
    return found


@pytest.mark.parametrize(
    ("document", "zeroed"),
    [
        ({"first": [0, 2]}, {"first": [0, 2], "first_bias": [0, 2], "scale": [0, 2], "shift": [0, 2]}),
        ({"scale": [3]}, {"scale": [3], "shift": [3]}),
        ({"second": [4]}, {"second": [4], "second_bias": [4]}),
        ({"scale": [1], "second": [0, 1]}, {"scale": [1], "shift": [1], "second": [0, 1], "second_bias": [0, 1]}),
    ],
)
def test_a_layers_channels_go_with_all_that_is_theirs_alone(
    document: dict[str, list[int]], zeroed: dict[str, list[int]], tmp_path: Path
) -> None:
    model = chain()
    dropped = drop(model, document, tmp_path)
    assert changed(model, dropped.model) == zeroed
    assert dropped.channels == {name: len(indices) for name, indices in document.items()}
    slimmed = slim_and_verify(dropped.model)
    assert initializer(slimmed.model, "first").shape[0] == 4 - len(zeroed.get("scale", []))
    assert initializer(slimmed.model, "third").shape[1] == 5 - len(zeroed.get("second", []))


def test_a_value_is_multiplied_before_all_its_readers(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["left"]),
        node("Sigmoid", ["a"], ["right"]),
        node("Concat", ["left", "right"], ["both"], axis=1),
        node("Conv", ["both", "v"], ["y"]),
    ]
    constants = {"w": weights(4, 3, 1, 1), "v": weights(2, 8, 1, 1, seed=1)}
    model = graph(nodes, constants, {"x": ["batch", 3, 6, 6]}, ["y"])
    dropped = drop(model, {"a": [1, 2]}, tmp_path)
    onnx.checker.check_model(dropped.model, full_check=True)
    zeroed = copy_of(model)
    array = constants["w"].copy()
    array[[1, 2]] = 0
    zeroed.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))
    expected = run(zeroed, {"x": IMAGE})["y"]
    np.testing.assert_allclose(run(dropped.model, {"x": IMAGE})["y"], expected, rtol=1e-5, atol=1e-5)
    slimmed = slim_and_verify(dropped.model)
    assert widths(slimmed)["Conv_0"] == 2
    assert operators(slimmed.model) == operators(model)  # all that is left is multiplied by 1: by nothing


def test_one_of_two_readers_of_a_value_loses_channels_that_the_other_keeps(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
        node("Sigmoid", ["a"], ["z"]),
    ]
    constants = {"w": weights(4, 3, 1, 1), "v": weights(2, 4, 1, 1, seed=1)}
    model = graph(nodes, constants, {"x": ["batch", 3, 6, 6]}, ["y", "z"])
    dropped = drop(model, {"b": [0, 3]}, tmp_path)
    before, after = (run(one, {"x": IMAGE}) for one in (model, dropped.model))
    np.testing.assert_array_equal(before["z"], after["z"])
    assert np.abs(before["y"] - after["y"]).max() > 0.1
    assert widths(slim_and_verify(dropped.model))["Conv_0"] == 4


def test_an_input_of_the_graph_can_lose_channels_and_keeps_its_shape(tmp_path: Path) -> None:
    dropped = drop(chain(), {"x": [1]}, tmp_path)
    slimmed = slim_and_verify(dropped.model)
    assert [dim.dim_value for dim in slimmed.model.graph.input[0].type.tensor_type.shape.dim][1:] == [3, 6, 6]
    other = IMAGE.copy()
    other[:, 1] = 7
    for model in (dropped.model, slimmed.model):
        np.testing.assert_array_equal(run(model, {"x": other})["y"], run(model, {"x": IMAGE})["y"])


def test_channels_of_a_sequence_lie_along_its_last_axis(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Add", ["a", "bias"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("MatMul", ["c", "v"], ["y"]),
    ]
    constants = {"w": weights(3, 6), "bias": weights(6, seed=1), "v": weights(6, 2, seed=2)}
    model = graph(nodes, constants, {"x": ["batch", 4, 3]}, ["y"])
    for name, left in (("w", 4), ("c", 4)):
        slimmed = slim_and_verify(drop(model, {name: [0, 5]}, tmp_path).model)
        assert initializer(slimmed.model, "w").shape == (3, left)
        assert initializer(slimmed.model, "bias").shape == (left,)


@pytest.mark.parametrize("shared", ["w", "bias"])
def test_what_another_node_shares_stays_as_it_is_there(shared: str, tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w", "bias"], ["a"]),
        node("Conv", ["x", "w" if shared == "w" else "other", "bias" if shared == "bias" else "zero"], ["b"]),
        node("BatchNormalization", ["a", "scale", "bias", "zero", "one"], ["c"]),
        node("Concat", ["c", "b"], ["y"], axis=1),
    ]
    constants: dict[str, np.ndarray] = {
        "w": weights(4, 3, 1, 1),
        "bias": weights(4, seed=1),
        "scale": weights(4, seed=2),
        "zero": np.zeros(4, np.float32),
        "one": np.ones(4, np.float32),
    }
    if shared == "bias":
        constants["other"] = weights(4, 3, 1, 1, seed=3)
    model = graph(nodes, constants, {"x": ["batch", 3, 6, 6]}, ["y"])
    name = {"w": "scale", "bias": "w"}[shared]
    before, after = (run(one, {"x": IMAGE})["y"] for one in (model, drop(model, {name: [2]}, tmp_path).model))
    same = [0, 1, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(before[:, same], after[:, same])
    assert not after[:, 2].any()
    assert before[:, 2].any()


def test_a_bias_that_is_one_number_for_all_channels_becomes_one_for_each(tmp_path: Path) -> None:
    nodes = [
        node("Gemm", ["x", "w", "bias"], ["a"], transB=1),
        node("Sigmoid", ["a"], ["b"]),
        node("Gemm", ["b", "v"], ["y"]),
    ]
    constants = {"w": weights(4, 3), "bias": np.array([2.0], np.float32), "v": weights(4, 2, seed=1)}
    model = graph(nodes, constants, {"x": ["batch", 3]}, ["y"])
    dropped = drop(model, {"w": [1, 3]}, tmp_path)
    np.testing.assert_array_equal(initializer(dropped.model, "bias"), [2, 0, 2, 0])
    assert widths(slim_and_verify(dropped.model))["Gemm_0"] == 2


def test_names_of_constant_nodes_and_of_weights_in_a_reader_of_a_subgraph(tmp_path: Path) -> None:
    then = helper.make_graph(
        [node("Identity", ["a"], ["t"])], "then", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [node("Neg", ["a"], ["e"])], "else", [], [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)]
    )
    array = weights(4, 3, 1, 1)
    nodes = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(array)),
        node("Conv", ["x", "w"], ["a"]),
        node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])]
    model = helper.make_model(
        helper.make_graph(nodes, "small", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    feeds = {"x": IMAGE[:1], "flag": np.array(True)}
    before = run(model, feeds)["y"]
    for name in ("w", "a"):
        after = run(drop(model, {name: [1]}, tmp_path).model, feeds)["y"]
        assert not after[:, 1].any(), name
        np.testing.assert_array_equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]])


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[object, str]] = {
    "an unknown name": ({"frist": [0]}, "no weight or value 'frist'.*close names: first"),
    "an index beyond the channels": ({"first": [0, 4]}, "'first' has 4 channels, 0 to 3, but 4"),
    "a negative index": ({"first": [-1]}, "'first' has 4 channels, 0 to 3, but -1"),
    "an index twice": ({"first": [1, 1]}, "channel 1 of 'first' is to be dropped twice"),
    "all channels": ({"second": [0, 1, 2, 3, 4]}, "all 5 channels of 'second'"),
    "an output of the graph": ({"y": [0]}, "'y' is an output of the graph"),
    "a bias": ({"first_bias": [0]}, "'first_bias' is not the weight of a layer.*value 'a' that 'Conv' makes"),
    "a value beyond its channels": ({"c": [9]}, "'c' has 4 channels, 0 to 3, but 9"),
    "no list": ({"first": 3}, "holds no channels to drop; give .*pruning_history"),
    "an empty list": ({"first": []}, "holds no channels to drop"),
    "a fraction": ({"first": [1.5]}, "holds no channels to drop"),
    "a truth value": ({"first": [True]}, "holds no channels to drop"),
    "nothing": ({}, "holds no channels to drop"),
    "a number": (3, "holds no channels to drop"),
    "a history of something else": ([["first", [0]]], "holds no channels to drop"),
}


@pytest.mark.parametrize(("document", "message"), REFUSED.values(), ids=REFUSED)
def test_a_drop_that_does_not_fit_is_refused_in_one_line(document: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        drop(chain(), document, tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_drop_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_drops(tmp_path / "none.json")
    path = tmp_path / "drop.json"
    for text, message in (("{", "as JSON"), ("\xff", "as JSON"), ('{"a": [0], "a": [1]}', "'a' is there twice")):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=message):
            load_drops(path)


# --- Torch-Pruning ----------------------------------------------------------------------------------------------------


class Pruned(nn.Module):
    """What Torch-Pruning 1.6.1 pruned: a residual stage, a depthwise convolution, a concatenation, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(6)
        self.back = nn.Conv2d(6, 8, 1, bias=False)
        self.back_norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left = nn.Conv2d(8, 5, 1)
        self.right = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(9, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(image)))
        x = F.relu(x + self.back_norm(self.back(F.relu(self.inner_norm(self.inner(x))))))
        x = F.relu(self.depth(x))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.last(F.relu(self.head(x.mean((2, 3)))))


def filled(net: nn.Module) -> nn.Module:
    """Return the network with weights that are the same everywhere."""
    for number, (name, tensor) in enumerate(net.state_dict().items()):
        if tensor.is_floating_point():
            steps = torch.arange(tensor.numel(), dtype=torch.float64)
            wave = torch.sin(steps * (1.7 + number) + number).reshape(tensor.shape)
            tensor.copy_((wave.abs() + 0.5 if name.endswith("var") else wave).float())
    return net.eval()


# Written by Torch-Pruning 1.6.1 for Pruned(): pruning_history(), and the output of the network that it left.
BY_HAND: list[Any] = [
    ["stem", True, [1, 6]], ["inner", True, [0]], ["back", False, [4, 0]], ["back_norm", True, [5]],
    ["depth", True, [0]], ["right", True, [3]], ["left", True, [2, 0]], ["head", True, [6, 2]],
]  # fmt: skip
IN_TWO_STEPS: list[Any] = [
    ["head", True, [3, 4]], ["right", True, [3]], ["depth", True, [0, 2]], ["inner", True, [4, 5]],
    ["left", True, [0, 4]], ["head", True, [1, 3]], ["right", True, [1]], ["depth", True, [1, 5]],
    ["inner", True, [2]], ["left", True, [1]],
]  # fmt: skip
HISTORIES: dict[str, tuple[list[Any], list[list[float]], dict[str, int]]] = {
    "by hand": (
        BY_HAND,
        [[1.06968856, 1.50214815, -0.17158073], [1.32461286, 1.74440646, 0.05167347]],
        {"stem": 4, "inner": 3, "back": 4, "depth": 4, "left": 3, "right": 3, "head": 5, "last": 3},
    ),
    "in two steps": (
        IN_TWO_STEPS,
        [[2.11066413, 2.81960201, 1.38788199], [1.03371429, 1.70370340, 0.26223069]],
        {"stem": 4, "inner": 3, "back": 4, "depth": 4, "left": 2, "right": 2, "head": 3, "last": 3},
    ),
}


@pytest.fixture(scope="module")
def pruned() -> onnx.ModelProto:
    return export_network(filled(Pruned()), (torch.zeros(2, 3, 4, 4),), fuse=False).model


@pytest.mark.parametrize(("history", "expected", "left"), HISTORIES.values(), ids=HISTORIES)
def test_a_history_of_torch_pruning_gives_the_network_that_it_left(
    history: list[Any], expected: list[list[float]], left: dict[str, int], pruned: onnx.ModelProto, tmp_path: Path
) -> None:
    image = (torch.sin(torch.arange(2 * 3 * 16, dtype=torch.float64) ** 1.5) * 2).reshape(2, 3, 4, 4).float().numpy()
    dropped = drop(pruned, history, tmp_path)
    slimmed = slim_and_verify(dropped.model)
    for model in (dropped.model, slimmed.model):
        np.testing.assert_allclose(run(model, {"input": image})["output"], expected, rtol=1e-4, atol=1e-4)
    assert {name: width for name, width in widths(slimmed).items() if "norm" not in name} == left


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([["sten", True, [0]]], "no weight 'sten.weight'.*close names: stem"),
        ([["stem", True, [8]]], "'stem'.*has 8 channels"),
        ([["stem", True, [0, 1]], ["stem", True, [6]]], r"'stem' \(what earlier entries left of it\) has 6 channels"),
        ([["stem", True, [0, 0]]], "twice"),
        ([["stem", True, [0, 1, 2, 3]], ["depth", True, [0, 1, 2, 3]]], "all 4 channels"),
        ([["last", True, [0]]], "the outputs of 'last', which must stay"),
        ([["stem", False, [0]]], "the inputs of 'stem', which must stay"),
    ],
)
def test_a_history_of_another_network_is_refused(
    history: list[Any], message: str, pruned: onnx.ModelProto, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        drop(pruned, history, tmp_path)


def test_masks_of_a_run_are_taken_over_the_groups_of_the_file(pruned: onnx.ModelProto, tmp_path: Path) -> None:
    groups = find_groups(copy_of(pruned))
    masks = {group.id: np.arange(group.size) > 1 for group in groups.prunable}
    save_masks(masks, tmp_path / "masks.safetensors")
    dropped = apply_drops(copy_of(pruned), load_drops(tmp_path / "masks.safetensors"))
    assert dropped.channels == dict.fromkeys(masks, 2)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    slimmed = slim_and_verify(dropped.model)
    assert totals(slimmed.layers, "after").macs == groups.cost.macs(groups.full_widths() | kept)
    save_masks({"stme": np.ones(3, dtype=np.bool_)}, tmp_path / "masks.safetensors")
    with pytest.raises(InputError, match=r"a group 'stme'.*close names: stem"):
        apply_drops(copy_of(pruned), load_drops(tmp_path / "masks.safetensors"))


# --- torch.nn.utils.prune ---------------------------------------------------------------------------------------------


def test_filters_that_torch_zeroed_are_removed_whichever_way_they_were_exported() -> None:
    net = filled(Pruned())
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            prune.ln_structured(module, "weight", amount=0.5, n=1, dim=0)
            prune.remove(module, "weight")
            if module.bias is not None:
                module.bias.data[~module.weight.data.flatten(1).any(1)] = 0
    example = (torch.zeros(2, 3, 4, 4),)
    removed = []
    for fuse in (False, True):
        model = export_network(net, example, fuse=fuse).model
        removed.append(widths(slim_and_verify(model)))
        image = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = net(image).numpy()
        got = run(slim_and_verify(model).model, {"input": image.numpy()})["output"]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    for found in removed:  # Behind a norm a zeroed filter is a constant: it goes where its reader can fold it
        assert found["left"] == 3
        assert found["right"] == 2


# --- through the pipeline ---------------------------------------------------------------------------------------------


def test_slim_proves_against_the_silenced_graph_and_tells_the_change(tmp_path: Path) -> None:
    model = chain()
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "drop.json").write_text('{"first": [1], "second": [0, 2]}')
    slimmed = slim_file(tmp_path / "model.onnx", tmp_path / "slim.onnx", Options(drops=tmp_path / "drop.json"))
    section: Any = slimmed.report()["drops"]
    assert section["channels"] == {"first": 1, "second": 2}
    (output,) = section["outputs"]
    assert output["name"] == "y"
    assert 0.1 < output["change"] < 100
    assert output["scale"] > 0
    before, after = (run(onnx.load(tmp_path / f"{name}.onnx"), {"x": IMAGE})["y"] for name in ("model", "slim"))
    assert np.abs(before - after).max() > 0.1
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "drop.json", "slim.onnx", "slim.json"}
    assert operators(onnx.load(tmp_path / "slim.onnx")) == operators(model)


def test_without_drops_the_report_has_none(tmp_path: Path) -> None:
    onnx.save(chain(), tmp_path / "model.onnx")
    assert "drops" not in slim_file(tmp_path / "model.onnx", tmp_path / "slim.onnx").report()
