"""Masks on ONNX graphs: the same arrays become zero as in torch, and what layers share is set apart first."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import SMALL_NETWORK
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node as node
from torch import nn

from graph.small import copy_of, graph, initializer, parse, run, slim_and_verify, weights
from prune2deploy.apply import apply_masks as torch_apply_masks
from prune2deploy.apply import fold_offsets as torch_fold_offsets
from prune2deploy.apply import set_weights as torch_set_weights
from prune2deploy.apply import weights_of as torch_weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.errors import InputError
from prune2deploy.exporter import export_network
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.layers import totals
from prune2deploy.graph.masking import apply_masks, fold_offsets, separate_layers, set_weights, weights_of
from prune2deploy.graph.normal import normalise, to_model
from prune2deploy.groups import Groups
from prune2deploy.methods import load_method


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A gain, a depthwise convolution, a concatenation, a sigmoid and a flattened map, with norms that do something."""
    space: dict[str, Any] = {}
    exec(SMALL_NETWORK, space)
    torch.manual_seed(1)
    made: nn.Module = space["small"](10)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                assert tensor is not None
                tensor.add_(torch.rand(tensor.shape))
    return made.eval()


@pytest.fixture(scope="module")
def dense(net: nn.Module) -> onnx.ModelProto:
    return export_network(net, (torch.zeros(2, 1, 8, 8),), fuse=False).model


def in_normal_form(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = copy_of(model)
    return to_model(normalise(copy), copy)


def planned(model: onnx.ModelProto, method: str = "l1", **options: Any) -> tuple[Groups, Any]:
    groups = find_groups(copy_of(model))
    return groups, load_method(method, **options).plan(weights_of(model), groups, Budget(Target("macs", 0.4)))


@pytest.mark.parametrize(
    ("method", "options"), [("l1", {}), ("bn", {"score": "std", "mean_fold": True}), ("epruner", {"scope": "all"})]
)
def test_the_same_arrays_change_as_in_torch(
    method: str, options: dict[str, Any], net: nn.Module, dense: onnx.ModelProto
) -> None:
    model = in_normal_form(dense)
    groups, result = planned(model, method, **options)
    twin = type(net)(10)
    twin.load_state_dict(net.state_dict())
    set_weights(model, result.weights)
    torch_set_weights(twin, result.weights)
    skipped = fold_offsets(model, groups, result.keep, result.offsets)
    assert skipped == torch_fold_offsets(twin, groups, result.keep, result.offsets)
    apply_masks(model, groups, result.keep)
    torch_apply_masks(twin, groups, result.keep)
    expected = {name: array for name, array in torch_weights_of(twin).items() if name in weights_of(model)}
    assert len(expected) == 21  # all but the gain, which is reshaped
    moved = 0
    for name, array in expected.items():
        np.testing.assert_array_equal(initializer(model, name).reshape(array.shape), array, err_msg=name)
        moved += not np.array_equal(array, torch_weights_of(net)[name])
    assert moved > 8
    image = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        np.testing.assert_allclose(
            run(model, {"input": image.numpy()})["output"], twin.eval()(image).numpy(), rtol=1e-4, atol=1e-5
        )


def test_a_masked_file_slims_to_what_the_cost_model_promised(dense: onnx.ModelProto) -> None:
    model = in_normal_form(dense)
    groups, result = planned(model)
    apply_masks(model, groups, result.keep)
    slimmed = slim_and_verify(model)
    kept = {name: int(mask.sum()) for name, mask in result.keep.items()}
    assert totals(slimmed.layers, "after").macs == groups.cost.macs(kept)
    assert totals(slimmed.layers, "after").parameters == groups.cost.parameters(kept)


def test_a_file_whose_nodes_have_no_names_and_whose_weights_are_constant_nodes() -> None:
    model = parse(
        """small (float[batch,3,6,6] x) => (float[batch,2,6,6] y) {
            w = Constant <value_floats = [0.0]> ()
            a = Conv(x, first)  b = Relu(a)  y = Conv(b, second)
        }""",
        first=weights(6, 3, 1, 1),
        second=weights(2, 6, 1, 1, seed=1),
    )
    tensor = model.graph.initializer[0]
    model.graph.node[0].CopyFrom(node("Constant", [], ["first"], value=tensor))
    del model.graph.initializer[0]
    for one in model.graph.node:
        one.name = ""
    own = in_normal_form(model)
    groups = find_groups(copy_of(own))
    (group,) = groups.prunable
    assert {member.parameter for member in group.members} == {"first", "second"}
    mask = np.arange(6) > 2
    apply_masks(own, groups, {group.id: mask})
    assert initializer(slim_and_verify(own).model, "first").shape == (3, 3, 1, 1)


def test_weights_that_do_not_fit_are_refused(dense: onnx.ModelProto) -> None:
    model = in_normal_form(dense)
    before = weights_of(model)
    with pytest.raises(InputError, match="no initializer 'other'"):
        set_weights(model, {"other": np.zeros(3)})
    with pytest.raises(InputError, match=r"'stem\.weight' has shape .*, not \[3\]"):
        set_weights(model, {"stem.weight": np.zeros(3)})
    assert all(np.array_equal(before[name], values) for name, values in weights_of(model).items())


def test_masks_that_do_not_fit_are_refused(dense: onnx.ModelProto) -> None:
    model = in_normal_form(dense)
    groups, _ = planned(model)
    name = groups.prunable[0].id
    mask = {name: np.arange(groups[name].size) > 0}
    with pytest.raises(InputError, match="a group 'other'"):
        apply_masks(model, groups, {"other": np.ones(3, dtype=np.bool_)})
    short = copy_of(model)
    for tensor in short.graph.initializer:
        if tensor.name == "stem.weight":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((0, 1, 3, 3), np.float32), "stem.weight"))
    with pytest.raises(InputError, match=r"'stem\.weight' has shape"):
        apply_masks(short, groups, mask)
    del short.graph.initializer[:]
    with pytest.raises(InputError, match=r"no initializer 'stem\.weight'"):
        apply_masks(short, groups, mask)


def test_a_gemm_that_scales_its_weights_takes_no_folded_mean() -> None:
    nodes = [
        node("Gemm", ["x", "w", "shift"], ["a"]),
        node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Gemm", ["c", "v", "bias"], ["y"], alpha=0.5),
    ]
    constants = {
        "w": weights(3, 6),
        "scale": weights(6, seed=1),
        "shift": weights(6, seed=2),
        "mean": np.zeros(6, np.float32),
        "var": np.ones(6, np.float32),
        "v": weights(6, 2, seed=3),
        "bias": weights(2, seed=4),
    }
    model = graph(nodes, constants, {"x": ["batch", 3]}, ["y"])
    separate_layers(model)
    groups, result = planned(model, "bn", mean_fold=True)
    assert result.offsets
    (line,) = fold_offsets(model, groups, result.keep, result.offsets)
    assert "'v' is read by a Gemm that scales it" in line


# --- what layers share ------------------------------------------------------------------------------------------------


def shared() -> onnx.ModelProto:
    """Two convolutions and two norms whose zero and one vectors were stored once, as exporters do."""
    nodes = [
        node("Conv", ["x", "w", "zero"], ["a"]),
        node("BatchNormalization", ["a", "one", "zero", "zero", "one"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "v", "zero"], ["d"]),
        node("BatchNormalization", ["d", "scale", "zero", "zero", "one"], ["e"]),
        node("Add", ["e", "zero_map"], ["f"]),
        node("Relu", ["f"], ["g"]),
        node("Conv", ["g", "u"], ["y"]),
    ]
    constants = {
        "w": weights(4, 3, 1, 1),
        "v": weights(4, 4, 1, 1, seed=1),
        "u": weights(2, 4, 1, 1, seed=2),
        "scale": weights(4, seed=3),
        "zero": np.zeros(4, np.float32),
        "one": np.ones(4, np.float32),
        "zero_map": np.zeros((4, 1, 1), np.float32),
    }
    return graph(nodes, constants, {"x": ["batch", 3, 6, 6]}, ["y"])


def test_layers_that_share_vectors_can_lose_different_channels() -> None:
    tied = find_groups(shared())
    assert [group.size for group in tied.prunable] == [4]
    model = shared()
    separate_layers(model)
    onnx.checker.check_model(model, full_check=True)
    groups = find_groups(copy_of(model))
    assert [group.size for group in groups.prunable] == [4, 4]
    image = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    np.testing.assert_array_equal(run(model, image)["y"], run(shared(), image)["y"])
    first, second = groups.prunable
    apply_masks(model, groups, {first.id: np.arange(4) > 0, second.id: np.arange(4) > 2})
    slimmed = slim_and_verify(model)
    assert initializer(slimmed.model, "w").shape[0] == 3
    assert initializer(slimmed.model, "v").shape == (1, 3, 1, 1)


def test_a_layer_that_is_applied_twice_keeps_its_vectors_in_common() -> None:
    nodes = [
        node("Conv", ["x", "w", "bias"], ["a"]),
        node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        node("Conv", ["b", "w", "bias"], ["c"]),
        node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"]),
    ]
    constants = {name: weights(3, seed=number) for number, name in enumerate(("bias", "scale", "shift", "mean"))}
    constants |= {"w": weights(3, 3, 1, 1), "var": np.ones(3, np.float32)}
    model = graph(nodes, constants, {"x": ["batch", 3, 6, 6]}, ["y"])
    before = model.SerializeToString()
    separate_layers(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("inside", [False, True])
def test_what_other_operators_read_is_not_zeroed(inside: bool) -> None:
    """The matrix of a head that an embedding reads too, and one that a subgraph reads."""
    then = helper.make_graph(
        [node("Identity", ["w"], ["t"])], "then", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [node("Neg", ["w"], ["e"])], "else", [], [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)]
    )
    reader = node("Gather", ["w", "i"], ["z"])
    if inside:
        reader = node("If", ["flag"], ["z"], then_branch=then, else_branch=other)
    nodes = [node("Gemm", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("Gemm", ["b", "v"], ["y"]), reader]
    constants: dict[str, Any] = {"w": weights(5, 4), "v": weights(4, 2, seed=1), "i": np.array([0, 2])}
    if inside:
        constants["flag"] = np.array(True)
    model = graph(nodes, constants, {"x": ["batch", 5]}, {"y": ["batch", 2], "z": [None, None]})
    separate_layers(model)
    groups = find_groups(copy_of(model))
    (group,) = groups.prunable
    apply_masks(model, groups, {group.id: np.arange(4) > 1})
    feeds = {"x": np.ones((1, 5), np.float32)}
    np.testing.assert_array_equal(run(model, feeds)["z"], constants["w"] if inside else constants["w"][[0, 2]])
    assert [array.shape for array in weights_of(slim_and_verify(model).model).values()].count((5, 2)) == 1
