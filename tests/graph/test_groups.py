"""Groups of dense graphs: small ones that can be read, and ResNet-20 as torch exports it."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.helper import make_node as node

from graph.small import copy_of, graph, slim_and_verify, weights
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.layers import totals
from prune2deploy.groups import SILENCED_ROLES, Group, Groups, Layer

IMAGE = ["N", 3, 6, 6]


def members(group: Group) -> list[tuple[str, int, str]]:
    return [(member.parameter, member.axis, member.role) for member in group.members]


def layer(groups: Groups, name: str) -> Layer:
    return next(layer for layer in groups.layers if layer.name == name)


def silence(model: onnx.ModelProto, groups: Groups, masks: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Return the model with every channel that a mask lets go zeroed where masks act."""
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    for group_id, mask in masks.items():
        for member in groups[group_id].of_role(*SILENCED_ROLES):
            index = [slice(None)] * arrays[member.parameter].ndim
            index[member.axis] = member.indices[~mask].ravel()  # type: ignore[call-overload]
            arrays[member.parameter][tuple(index)] = 0
    masked = copy_of(model)
    del masked.graph.initializer[:]
    masked.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return masked


def check_promise(model: onnx.ModelProto, *, seed: int = 0, step: int = 1) -> None:
    """Silencing channels and slimming gives exactly the costs that the polynomial promises."""
    groups = find_groups(copy_of(model))
    random = np.random.default_rng(seed)
    masks = {}
    for group in groups.prunable:
        keep = max(1, int(random.integers(1, group.size + 1)) // step * step)
        masks[group.id] = np.isin(np.arange(group.size), random.permutation(group.size)[:keep])
    slimmed = slim_and_verify(silence(model, groups, masks))
    widths = groups.full_widths() | {name: int(mask.sum()) for name, mask in masks.items()}
    after = totals(slimmed.layers, "after")
    assert after.macs == groups.cost.macs(widths)
    assert after.parameters == groups.cost.parameters(widths)


def residual() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "stem.weight"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "inner.weight"], ["b"], pads=[1] * 4),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "outer.weight"], ["d"], pads=[1] * 4),
        node("Add", ["d", "r"], ["s"]),
        node("Conv", ["s", "head.weight"], ["y"]),
    ]
    constants = {
        "stem.weight": weights(8, 3, 3, 3),
        "inner.weight": weights(6, 8, 3, 3),
        "outer.weight": weights(8, 6, 3, 3),
        "head.weight": weights(2, 8, 1, 1),
    }
    return graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})


def test_a_residual_block_has_a_trunk_and_an_inner_group() -> None:
    groups = find_groups(residual())
    assert groups.full_widths() == {"stem": 8, "inner": 6}
    assert members(groups["stem"]) == [
        ("stem.weight", 0, "filter"),
        ("inner.weight", 1, "reader"),
        ("outer.weight", 0, "filter"),
        ("head.weight", 1, "reader"),
    ]
    assert groups["inner"].activations == ("Relu",)
    assert groups.cost.macs(groups.full_widths()) == 36 * (9 * 3 * 8 + 9 * 8 * 6 + 9 * 6 * 8 + 8 * 2)
    check_promise(residual())


def test_the_network_output_is_no_group() -> None:
    groups = find_groups(residual())
    assert all(
        member.parameter != "head.weight" or member.role == "reader" for g in groups.groups for member in g.members
    )


def depthwise() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "expand.weight"], ["a"]),
        node("Clip", ["a", "low", "high"], ["b"]),
        node("Conv", ["b", "deep.weight"], ["c"], group=8, pads=[1] * 4),
        node("BatchNormalization", ["c", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"], ["d"]),
        node("Conv", ["d", "project.weight"], ["y"]),
    ]
    constants = {
        "expand.weight": weights(8, 3, 1, 1),
        "deep.weight": weights(8, 1, 3, 3),
        "norm.weight": weights(8),
        "norm.bias": weights(8, seed=1),
        "norm.running_mean": weights(8, seed=2),
        "norm.running_var": np.abs(weights(8, seed=3)) + 1,
        "project.weight": weights(2, 8, 1, 1),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    return graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})


def test_a_depthwise_convolution_goes_with_its_input() -> None:
    groups = find_groups(depthwise())
    assert groups.full_widths() == {"expand": 8}
    assert members(groups["expand"]) == [
        ("expand.weight", 0, "filter"),
        ("deep.weight", 0, "filter"),
        ("norm.weight", 0, "scale"),
        ("norm.bias", 0, "shift"),
        ("norm.running_mean", 0, "mean"),
        ("norm.running_var", 0, "var"),
        ("project.weight", 1, "reader"),
    ]
    assert groups["expand"].activations == ("Clip(0,6)",)
    assert layer(groups, "deep").norm == "norm"


def test_a_grouped_convolution_ties_channel_k_of_every_group() -> None:
    nodes = [
        node("Conv", ["x", "first.weight"], ["a"]),
        node("Conv", ["a", "grouped.weight"], ["b"], group=2),
        node("Conv", ["b", "last.weight"], ["y"]),
    ]
    constants = {
        "first.weight": weights(8, 3, 1, 1),
        "grouped.weight": weights(6, 4, 1, 1),
        "last.weight": weights(2, 6, 1, 1),
    }
    model = graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})
    groups = find_groups(copy_of(model))
    assert groups.full_widths() == {"first": 4, "grouped": 3}
    assert groups["first"].of_role("filter")[0].indices.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    check_promise(model)


def test_the_parts_of_a_concat_stay_groups_of_their_own() -> None:
    nodes = [
        node("Conv", ["x", "left.weight"], ["a"]),
        node("Conv", ["x", "right.weight"], ["b"]),
        node("Concat", ["a", "b", "a"], ["c"], axis=1),
        node("Conv", ["c", "head.weight"], ["y"]),
    ]
    constants = {
        "left.weight": weights(3, 3, 1, 1),
        "right.weight": weights(5, 3, 1, 1, seed=1),
        "head.weight": weights(2, 11, 1, 1),
    }
    model = graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})
    groups = find_groups(copy_of(model))
    assert groups.full_widths() == {"left": 3, "right": 5}
    assert groups["left"].of_role("reader")[0].indices.tolist() == [[0, 8], [1, 9], [2, 10]]
    assert layer(groups, "head").in_width.at({"left": 2, "right": 4}) == 8


def test_a_flattened_channel_takes_all_its_features_along() -> None:
    nodes = [
        node("Conv", ["x", "c.weight"], ["a"]),
        node("Flatten", ["a"], ["f"]),
        node("Gemm", ["f", "l.weight", "l.bias"], ["y"], transB=1),
    ]
    constants = {"c.weight": weights(4, 3, 5, 5), "l.weight": weights(3, 16), "l.bias": weights(3)}
    model = graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 3]})
    groups = find_groups(copy_of(model))
    assert groups["c"].of_role("reader")[0].indices.tolist() == np.arange(16).reshape(4, 4).tolist()
    check_promise(model)


@pytest.mark.parametrize("opaque", [True, False])
def test_what_an_opaque_node_or_a_softmax_reads_is_in_no_group(opaque: bool) -> None:
    nodes = [
        node("Conv", ["x", "c.weight"], ["a"]),
        node("CenterCropPad", ["a", "size"], ["s"], axes=[2, 3]) if opaque else node("Softmax", ["a"], ["s"], axis=1),
        node("Conv", ["s", "d.weight"], ["y"]),
    ]
    constants = {"c.weight": weights(4, 3, 1, 1), "d.weight": weights(2, 4, 1, 1)}
    sizes = {"size": np.array([6, 6])} if opaque else {}
    assert find_groups(graph(nodes, constants | sizes, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})).groups == ()


def test_groups_of_one_weight_that_two_nodes_share_count_it_once() -> None:
    nodes = [
        node("Conv", ["x", "first.weight"], ["a"]),
        node("Conv", ["a", "w.weight"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "w.weight"], ["d"]),
        node("Conv", ["d", "last.weight"], ["y"]),
    ]
    constants = {
        "first.weight": weights(4, 3, 1, 1),
        "w.weight": weights(4, 4, 1, 1),
        "last.weight": weights(2, 4, 1, 1),
    }
    groups = find_groups(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert groups.cost.parameters(groups.full_widths()) == 12 + 16 + 8
    filters = [g.id for g in groups.groups for m in g.members if (m.parameter, m.role) == ("w.weight", "filter")]
    assert len(set(filters)) == 1, "design: parameters shared by two nodes tie them in the groups"


# --- ResNet-20, exported ----------------------------------------------------------------------------------------------


@cache
def resnet20() -> onnx.ModelProto:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from prune2deploy.exporter import export_network
    from prune2deploy.networks.cifar_resnet import resnet20 as build

    torch.manual_seed(0)
    net = build()
    for module in net.modules():  # norms that have seen data: no two channels alike
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(values, 0.5, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return export_network(net, (torch.randn(2, 3, 32, 32),), fuse=False).model


def test_resnet20_with_padded_shortcuts_has_16_channels_of_three_stages_16_of_two_and_32_of_the_last() -> None:
    groups = find_groups(copy_of(resnet20()))
    trunk = {g.id: g for g in groups.prunable if len(g.of_role("filter")) > 1}
    assert sorted((g.size, len({m.layer.split(".")[0] for m in g.of_role("filter")})) for g in trunk.values()) == [
        (16, 2),
        (16, 4),  # the stem and three stages
        (32, 1),
    ]
    inner = [g for g in groups.prunable if g.id not in trunk]
    assert sorted(g.size for g in inner) == [16] * 3 + [32] * 3 + [64] * 3


def test_resnet20_costs_what_hooks_count() -> None:
    import torch

    from prune2deploy.networks.cifar_resnet import resnet20 as build

    counted = []

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        per_output = module.weight[0].numel()  # type: ignore[index, operator, union-attr]
        counted.append(per_output * output[0].numel())

    net = build().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    groups = find_groups(copy_of(resnet20()))
    assert groups.cost.macs(groups.full_widths()) == sum(counted) == 40_551_040
    assert groups.cost.parameters(groups.full_widths()) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_resnet20_slims_to_exactly_what_its_cost_model_promises(seed: int) -> None:
    check_promise(resnet20(), seed=seed)


def test_groups_survive_their_file(tmp_path: Path) -> None:
    groups = find_groups(copy_of(resnet20()))
    path = tmp_path / "groups.json"
    groups.save(path)
    again = Groups.load(path)
    assert again.cost == groups.cost
    assert again.layers == groups.layers
    assert [members(g) for g in again.groups] == [members(g) for g in groups.groups]
