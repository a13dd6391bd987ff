"""Exported group norms: one node while channels are removed, three again in every file."""

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import make_node as node
from torch import nn

from graph.rule_check import check_facts, dense, f32, ints
from graph.small import analysis_of, copy_of, graph, initializer, kept, operators, run, slim_and_verify, weights
from prune2deploy.exporter import export_network
from prune2deploy.graph.bound import output_bound
from prune2deploy.graph.facts import channel_facts
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.masking import apply_masks, write
from prune2deploy.graph.node import tables
from prune2deploy.graph.normal import normalise, to_model
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.verify import verify
from prune2deploy.groups import Groups
from prune2deploy.masks import Masks

TRIPLE = ["Reshape", "InstanceNormalization", "Reshape"]
Parts = tuple[list[onnx.NodeProto], dict[str, Any]]


def group_norm(
    source: str, made: str, groups: int, channels: int, *, whole: Any = None, split: Any = None, seed: int = 8
) -> Parts:
    """Return an exported group norm with its scale and bias; its shape is computed unless ``whole`` gives it."""
    constants = {
        f"{made}_split": ints(0, groups, -1) if split is None else split,
        f"{made}_ones": np.ones(groups, f32),
        f"{made}_zeros": np.zeros(groups, f32),
        f"{made}_g": dense(channels, 1, 1, seed=seed),
        f"{made}_b": dense(channels, 1, 1, seed=seed + 1),
    }
    if whole is not None:
        constants[f"{made}_shape"] = whole
    nodes = [
        node("Reshape", [source, f"{made}_split"], [f"{made}_i"], name=f"{made}_first"),
        node("InstanceNormalization", [f"{made}_i", f"{made}_ones", f"{made}_zeros"], [f"{made}_j"], name=f"{made}_n"),
        *([] if whole is not None else [node("Shape", [source], [f"{made}_shape"], name=f"{made}_size")]),
        node("Reshape", [f"{made}_j", f"{made}_shape"], [f"{made}_k"], name=f"{made}_last"),
        node("Mul", [f"{made}_k", f"{made}_g"], [f"{made}_m"], name=f"{made}_mul"),
        node("Add", [f"{made}_m", f"{made}_b"], [made], name=f"{made}_add"),
    ]
    nodes[1].attribute.append(onnx.helper.make_attribute("epsilon", 1e-3))
    return nodes, constants


def normed(*dead: int, size: Any = (5, 5), batch: Any = "N", stride: int = 1, **options: Any) -> onnx.ModelProto:
    """Return: a convolution of 12 channels with these dead filters, a group norm in 4 groups, a convolution."""
    nodes, constants = group_norm("a", "n", 4, 12, **options)
    constants |= {"w": weights(12, 3, 1, 1, zero=dead), "v": weights(2, 12, 1, 1, seed=1)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="one", strides=[stride] * 2),
        *nodes,
        node("Conv", ["n", "v"], ["y"], name="two"),
    ]
    return graph(nodes, constants, {"x": [batch, 3, *size]}, ["y"])


FORMS: dict[str, dict[str, Any]] = {
    "open batch": {"whole": ints(0, 12, 5, 5)},
    "written batch": {"batch": 2, "whole": ints(2, 12, 5, 5), "split": ints(2, 4, -1)},
    "batch left over": {"whole": ints(-1, 12, 5, 5), "split": ints(-1, 4, 75)},
    "height left over": {"whole": ints(0, 12, -1, 5)},
    "groups left over": {"whole": ints(0, -1, 5, 5), "split": ints(0, -1, 75)},
    "the shape of what came in": {},
    "of unknown size": {"size": ("H", "W"), "stride": 2},
    "sizes of the input": {"size": ("H", "W")},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_dead_group_goes_and_three_nodes_come_back(form: str) -> None:
    model = normed(3, 4, 5, **FORMS[form])
    assert kept(model, "a") == [True] * 3 + [False] * 3 + [True] * 6
    slimmed = slim_and_verify(model)
    assert [name for name in operators(slimmed.model) if name in TRIPLE] == TRIPLE
    assert initializer(slimmed.model, "n_ones").shape == initializer(slimmed.model, "n_zeros").shape == (3,)
    norm = next(item for item in slimmed.model.graph.node if item.op_type == "InstanceNormalization")
    assert onnx.helper.get_node_attr_value(norm, "epsilon") == pytest.approx(1e-3)
    assert slimmed.kept["initializers"]["n_ones"] == slimmed.kept["initializers"]["n_zeros"] == {"0": [0, 2, 3]}
    assert slimmed.removed_channels == 3
    assert remove_dead_channels(copy_of(slimmed.model)).analysis.keep.removed == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_group_with_a_live_channel_stays(form: str) -> None:
    model = normed(3, 4, 6, 7, **FORMS[form])
    assert kept(model, "a") == [True] * 12
    slim_and_verify(model)


@pytest.mark.parametrize("form", FORMS)
def test_the_facts_hold(form: str) -> None:
    nodes, constants = group_norm("a", "n", 4, 12, **{k: v for k, v in FORMS[form].items() if k in ("whole", "split")})
    weight, bias = weights(12, 3, 1, 1, zero=(0, 1, 2, 6)), np.zeros(12, f32)
    weight[9:12], bias[6] = weight[3:6], 0.7
    constants |= {"w": weight, "wb": bias}
    size, batch = FORMS[form].get("size", (5, 5)), FORMS[form].get("batch", "N")
    strides = [FORMS[form].get("stride", 1)] * 2
    nodes = [node("Conv", ["x", "w", "wb"], ["a"], strides=strides), *nodes]
    model = graph(nodes, constants, {"x": [batch, 3, *size]}, ["a", "n_k", "n"])
    known = channel_facts(tables(normalise(copy_of(model))))
    values = run(model, {"x": np.random.default_rng(0).standard_normal((2, 3, 5, 5)).astype(f32)})
    check_facts(known, {name: values[name] for name in ("a", "n_k", "n")})
    fact = known.view.facts["n_k"]
    assert fact.constant.ravel().tolist() == [True] * 3 + [False] * 9
    number = fact.number.ravel()
    assert (number[3:6] == number[9:12]).all()  # equal groups
    assert len(set(number[3:9].tolist())) == 6  # the same channels among others


def two_norms() -> onnx.ModelProto:
    """Return two norms that share their constants, whose nodes stand between those of others."""
    first, constants = group_norm("a", "s", 4, 12)
    second, more = group_norm("b", "t", 4, 12)
    for item, share in ((0, "s_split"), (1, "s_ones")):
        second[item].input[1] = share
    second[1].input[2] = "s_zeros"
    constants |= {name: array for name, array in more.items() if name in ("t_g", "t_b")}
    constants |= {"w": weights(12, 3, 1, 1), "u": weights(12, 12, 1, 1), "v": weights(2, 12, 1, 1)}
    size = next(item for item in first if item.op_type == "Shape")
    first.remove(size)
    nodes = [node("Conv", ["x", "w"], ["a"], name="one", strides=[2, 2]), size]
    nodes += [first[0], node("Conv", ["a", "u"], ["b"], name="two"), second[0], *first[1:], *second[1:]]
    nodes += [node("Conv", [made, "v"], [out], name=out) for made, out in (("s", "y"), ("t", "z"))]
    return graph(nodes, constants, {"x": ["N", 3, "H", "W"]}, ["y", "z"])


def test_an_untouched_graph_comes_back_as_it_was() -> None:
    model = two_norms()
    assert operators(to_model(normalise(copy_of(model)), model)).count("InstanceNormalization") == 2
    assert [item.op for item in normalise(copy_of(model)).nodes].count("GroupNormalization") == 2
    for made in (to_model(normalise(copy_of(model)), model), remove_dead_channels(copy_of(model)).model):
        assert [item.name for item in made.graph.node] == [item.name for item in model.graph.node]
        assert [item.SerializeToString() for item in made.graph.node] == [
            item.SerializeToString() for item in model.graph.node
        ]
        assert sorted(item.SerializeToString() for item in made.graph.initializer) == sorted(
            item.SerializeToString() for item in model.graph.initializer
        )


def test_constants_that_two_norms_share_are_cloned_when_one_shrinks() -> None:
    model = two_norms()
    model.graph.initializer.remove(next(item for item in model.graph.initializer if item.name == "u"))
    array = weights(12, 12, 1, 1, zero=(0, 1, 2))
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, "u"))
    slimmed = slim_and_verify(model)
    assert slimmed.removed_channels == 3
    sizes = [
        initializer(slimmed.model, item.input[1]).size
        for item in slimmed.model.graph.node
        if item.op_type == "InstanceNormalization"
    ]
    assert sizes == [4, 3]
    names = [item.name for item in slimmed.model.graph.initializer]
    assert len(names) == len(set(names))


def test_scales_by_group_are_kept_and_an_unscaled_group_reads_nothing() -> None:
    model = normed(whole=ints(0, 12, 5, 5))
    for tensor in model.graph.initializer:
        if tensor.name in ("n_ones", "n_zeros"):
            own = np.array([1.5, 0.0, -2.0, 0.5], f32) if tensor.name == "n_ones" else dense(4)
            tensor.CopyFrom(onnx.numpy_helper.from_array(own, tensor.name))
    assert kept(model, "a") == [True] * 3 + [False] * 3 + [True] * 6
    slimmed = slim_and_verify(model)
    assert initializer(slimmed.model, "n_ones").tolist() == [1.5, -2.0, 0.5]


@pytest.mark.parametrize("spatial", [(), (7,), (2, 3, 4)])
def test_values_of_any_rank(spatial: tuple[int, ...]) -> None:
    nodes, constants = group_norm("a", "n", 2, 6, whole=ints(0, 6, *spatial))
    for name in ("n_g", "n_b"):
        constants[name] = constants[name].reshape(6, *(1 for _ in spatial))
    constants |= {"w": weights(6, 3, *(1 for _ in spatial), zero=(0, 1, 2))}
    first = (
        node("Conv", ["x", "w"], ["a"], name="one")
        if spatial
        else node("Gemm", ["x", "w"], ["a"], name="one", transB=1)
    )
    constants["v"] = weights(6, 2, seed=1)
    turned = node("Transpose", ["n"], ["t"], perm=[0, *range(2, len(spatial) + 2), 1], name="turn")
    nodes = [first, *nodes, turned, node("MatMul", ["t", "v"], ["y"], name="two")]
    model = graph(nodes, constants, {"x": ["N", 3, *spatial]}, ["y"])
    assert kept(model, "a") == [False] * 3 + [True] * 3
    assert initializer(slim_and_verify(model).model, "n_ones").shape == (1,)


def test_channels_that_lie_behind_the_measured_ones_are_all_read() -> None:
    """The last axis of a transposed map holds channels too; the norm measures over them."""
    nodes, constants = group_norm("t", "n", 1, 5, whole=ints(0, 5, 6))
    constants["n_g"], constants["n_b"] = dense(5, 1), dense(5, 1)
    constants |= {"w": weights(3, 6), "v": weights(6, 2, seed=1)}
    constants["w"][:, [1, 4]] = 0
    nodes = [node("MatMul", ["x", "w"], ["t"], name="one"), *nodes, node("MatMul", ["n", "v"], ["y"], name="two")]
    model = graph(nodes, constants, {"x": ["N", 5, 3]}, ["y"])
    assert not analysis_of(model).known.opaque
    assert kept(model, "t", axis=2) == [True] * 6
    slim_and_verify(model)


def test_a_norm_of_constant_groups_becomes_its_bias() -> None:
    model = normed(*range(12))
    slimmed = slim_and_verify(model)
    assert not any(name in TRIPLE for name in operators(slimmed.model))


def altered(case: str) -> onnx.ModelProto:
    model = normed(3, 4, 5, whole=ints(0, 12, 5, 5))
    tensors = {item.name: item for item in model.graph.initializer}
    if case == "somebody reads the groups":
        model.graph.node.append(node("Relu", ["n_j"], ["z"], name="more"))
        model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["N", 4, 75]))
    elif case == "a group is an output":
        model.graph.output.append(onnx.helper.make_tensor_value_info("n_i", 1, ["N", 4, 75]))
    elif case == "the result has another shape":
        tensors["n_shape"].CopyFrom(onnx.numpy_helper.from_array(ints(0, 12, 25, 1), "n_shape"))
        model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", 1, ["N", 2, 25, 1]))
    elif case == "the groups cut channels":
        tensors["n_split"].CopyFrom(onnx.numpy_helper.from_array(ints(0, 5, -1), "n_split"))
        for name, array in (("n_ones", np.ones(5, f32)), ("n_zeros", np.zeros(5, f32))):
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    elif case == "the scale is computed":
        model.graph.node.insert(0, node("Mul", ["n_ones", "factor"], ["n_scale"], name="scale"))
        model.graph.input.append(onnx.helper.make_tensor_value_info("factor", 1, [1]))
        next(item for item in model.graph.node if item.name == "n_n").input[1] = "n_scale"
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize(
    "case",
    [
        "somebody reads the groups",
        "a group is an output",
        "the result has another shape",
        "the groups cut channels",
        "the scale is computed",
    ],
)
def test_what_only_looks_like_a_group_norm_stays_three_nodes(case: str) -> None:
    model = altered(case)
    assert "GroupNormalization" not in [item.op for item in normalise(copy_of(model)).nodes]
    slim_and_verify(model)


def test_a_shape_of_another_value_is_no_shape_of_this_one() -> None:
    """It would be too small, or too large, as soon as one of the two loses channels and the other does not."""
    model = normed(3, 4, 5, size=("H", "W"), stride=2)
    for item in model.graph.node:
        if item.op_type == "Shape":
            item.input[0] = "other"
    model.graph.node.insert(0, node("Conv", ["x", "u"], ["other"], strides=[2, 2], name="aside"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights(12, 3, 1, 1, zero=(1,)), "u"))
    assert "GroupNormalization" not in [item.op for item in normalise(copy_of(model)).nodes]
    slim_and_verify(model)


def test_what_a_change_before_the_norm_does_is_bounded() -> None:
    model = normed(whole=ints(0, 12, 5, 5))
    changed = copy_of(model)
    tensor = next(item for item in changed.graph.initializer if item.name == "w")
    write(tensor, onnx.numpy_helper.to_array(tensor) * f32(1.001))
    bound = output_bound(model, changed, {"x": (-1.0, 1.0)})["y"]
    assert bound.unbounded_by is None
    assert 0 < bound.largest < 10


def test_no_position_is_taken_for_a_place_of_the_map() -> None:
    """Not 200,704 for each norm, which cost seconds and hundreds of megabytes."""
    nodes, constants = group_norm("a", "n", 32, 64, whole=ints(0, 64, 56, 56))
    constants |= {"w": weights(64, 3, 1, 1, zero=(2, 3)), "v": weights(2, 64, 1, 1)}
    nodes = [node("Conv", ["x", "w"], ["a"], name="one"), *nodes, node("Conv", ["n", "v"], ["y"], name="two")]
    analysis = analysis_of(graph(nodes, constants, {"x": ["N", 3, 56, 56]}, ["y"]))
    assert max(fact.number.size for fact in analysis.known.view.facts.values()) == 64
    assert analysis.keep.kept["a", 1].sum() == 62


# --- networks as both exporters write them ----------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with group norms."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = (nn.GroupNorm(groups, width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm_one(self.one(x)))
        return torch.relu(x + self.norm_two(self.two(y)))


class Net(nn.Module):
    """A stem, two blocks with a norm without parameters between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.GroupNorm(4, 12)
        self.blocks = nn.Sequential(Block(12, 4), nn.GroupNorm(6, 12, affine=False), Block(12, 4))
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            nn.init.uniform_(parameter, -1, 1)
    return net


def exported(net: nn.Module, how: str) -> onnx.ModelProto:
    example = torch.randn(2, 3, 16, 16)
    if how.startswith("dynamo"):
        return export_network(net, [example], fuse=how == "dynamo, fused").model
    opset = int(how.split()[1])
    axes = {"x": {0: "N", 2: "H", 3: "W"} if how.endswith("open") else {0: "N"}, "y": {0: "N"}}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated
        torch.onnx.export(
            net,
            (example,),
            file,
            dynamo=False,
            opset_version=opset,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=axes,
        )
    return onnx.load_from_string(file.getvalue())


EXPORTS = ["dynamo", "dynamo, fused", "legacy 13", "legacy 13 open", "legacy 18", "legacy 18 open"]


def silence_scales(model: onnx.ModelProto, groups: Groups, masks: Masks) -> None:
    """Zero what the norms multiply removed channels with and add to them: exporters write both as plain operators."""
    tensors = {item.name: item for item in model.graph.initializer}
    for group in groups.groups:
        for member in group.of_role("constant"):
            array = onnx.numpy_helper.to_array(tensors[member.parameter]).copy()
            np.moveaxis(array, member.axis, 0)[member.indices[~masks[group.id]].ravel()] = 0
            write(tensors[member.parameter], array)


@pytest.mark.parametrize("how", EXPORTS)
def test_masked_groups_of_a_network_go_whoever_exported_it(net: nn.Module, how: str) -> None:
    model = exported(net, how)
    groups = find_groups(copy_of(model))
    # the stem's stage in 2 classes, since its norms have groups of 3 and of 2 channels; each block's inner width in 4
    assert sorted(group.size for group in groups.groups) == [2, 4, 4]
    masks = {group.id: np.arange(group.size) % 2 == 0 for group in groups.groups}
    masked = to_model(normalise(copy_of(model)), model)
    assert "GroupNormalization" not in operators(masked)
    apply_masks(masked, groups, masks)
    silence_scales(masked, groups, masks)
    slimmed = remove_dead_channels(copy_of(masked))
    verify(masked.SerializeToString(), slimmed.model.SerializeToString())
    assert "GroupNormalization" not in operators(slimmed.model)
    assert {row.after for row in slimmed.layers if row.before == 12} == {6}


def test_an_untouched_network_keeps_its_file(net: nn.Module) -> None:
    for how in EXPORTS:
        model = exported(net, how)
        normal = to_model(normalise(copy_of(model)), model)
        again = to_model(normalise(copy_of(normal)), model)
        slim = remove_dead_channels(copy_of(normal)).model
        for made in (again, slim):
            assert [item.SerializeToString() for item in made.graph.node] == [
                item.SerializeToString() for item in normal.graph.node
            ]
            assert [item.SerializeToString() for item in made.graph.initializer] == [
                item.SerializeToString() for item in normal.graph.initializer
            ]
