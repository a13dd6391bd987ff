"""What is said of removed and of kept channels is true."""

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, note
from onnx.helper import make_node as node
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

from graph.random_graphs import PLAIN, models
from graph.small import copy_of, graph, run, weights
from graph.test_property import examples
from prune2deploy.graph.explain import LayerReasons, explain
from prune2deploy.graph.rewrite import Slimmed, remove_dead_channels
from prune2deploy.graph.verify import verify

IMAGE = ["N", 3, 6, 6]


def reasons(model: onnx.ModelProto, **options: int) -> dict[str, LayerReasons]:
    return {one.layer: one for one in explain(remove_dead_channels(copy_of(model), **options).analysis)}


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = [size.dim_value or 2 for size in model.graph.input[0].type.tensor_type.shape.dim]
    return {model.graph.input[0].name: random.standard_normal(sizes).astype(np.float32)}


def disturbed(model: onnx.ModelProto, value: str, like: np.ndarray, axis: int, channel: int) -> onnx.ModelProto:
    """Return the graph with something added to one channel of a value, for all its readers."""
    changed = copy_of(model)
    noise = np.zeros([size if place == axis else 1 for place, size in enumerate(like.shape)], like.dtype)
    noise.flat[channel] = 4
    changed.graph.initializer.append(onnx.numpy_helper.from_array(noise, "noise"))
    place = next(index for index, item in enumerate(changed.graph.node) if value in item.output)
    for item in changed.graph.node:
        for slot, name in enumerate(item.input):
            if name == value:
                item.input[slot] = "disturbed"
    changed.graph.node.insert(place + 1, node("Add", [value, "noise"], ["disturbed"]))
    return changed


def check_reasons(model: onnx.ModelProto, slimmed: Slimmed, seen: Counter[str]) -> None:
    outputs = {one.name for one in model.graph.output}
    by_layer = {item.name: item for item in slimmed.analysis.tables.nodes}
    shown = copy_of(model)
    shown.graph.output.extend(
        make_tensor_value_info(item.outputs[0].name, np_dtype_to_tensor_dtype(np.dtype(item.outputs[0].dtype)), None)
        for item in by_layer.values()
        if item.outputs[0].name not in outputs
    )
    values = run(shown, feeds_of(model))
    for layer in explain(slimmed.analysis):
        name = by_layer[layer.layer].outputs[0].name
        value = values[name]
        for reason in layer.removed:
            kind = reason.details["kind"]
            seen[kind] += 1
            k = reason.channels[0]
            if kind == "constant":
                np.testing.assert_allclose(value.take(k, layer.axis), reason.details["value"], rtol=1e-5, atol=1e-6)
            elif kind == "alias":
                other = value.take(reason.details["of"], layer.axis)
                want = reason.details["scale"] * other + reason.details["shift"]
                np.testing.assert_allclose(value.take(k, layer.axis), want, rtol=1e-4, atol=1e-4)
            elif name not in outputs:
                moved = disturbed(model, name, value, layer.axis, k)
                verify(model.SerializeToString(), moved.SerializeToString())
        for reason in layer.kept:
            seen["kept: " + reason.details["kind"]] += 1


@examples(60)
@given(models(families=PLAIN))
def test_what_is_said_of_a_removed_channel_is_true(model: onnx.ModelProto) -> None:
    note("the graph:\n" + onnx.printer.to_text(model))
    check_reasons(model, remove_dead_channels(copy_of(model)), Counter())


def test_random_graphs_give_every_reason() -> None:
    seen: Counter[str] = Counter()

    @examples(200)
    @given(models(families=PLAIN))
    def collect(model: onnx.ModelProto) -> None:
        check_reasons(model, remove_dead_channels(copy_of(model)), seen)

    collect()
    wanted = {"constant", "alias", "unread", "kept: tied", "kept: read", "kept: output"}
    assert wanted <= set(seen), seen


def chain(*between: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """Return Conv (channel 1 is zero, 4 holds a constant) -> the nodes, from ``a`` to ``z`` -> Conv."""
    bias = np.zeros(6, np.float32)
    bias[4] = 0.5
    own = {"w": weights(6, 3, 1, 1, zero=(1, 4)), "b": bias, "v": weights(2, 6, 1, 1)}
    nodes = [node("Conv", ["x", "w", "b"], ["a"], name="first"), *between, node("Conv", ["z", "v"], ["y"], name="last")]
    return graph(nodes, own | constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]})


def test_a_softmax_over_channels_is_named() -> None:
    found = reasons(chain(node("Softmax", ["a"], ["z"], axis=1, name="attention")))["first"]
    assert [one.channels for one in found.kept] == [[1, 4]]
    assert found.kept[0].details["node"] == "attention"


def test_a_custom_operator_is_named_as_opaque() -> None:
    model = chain(node("Relu", ["a"], ["z"], name="strange"))
    model.graph.node[1].domain = "my.own"
    model.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    (kept,) = reasons(model)["first"].kept
    assert kept.details["kind"] == "opaque"
    assert "Relu 'strange'" in kept.why
    assert "no rule covers" in kept.why


def test_a_residual_add_names_the_live_channel_that_it_ties_to() -> None:
    model = chain(
        node("Conv", ["x", "u"], ["c"], name="other"),
        node("Add", ["a", "c"], ["z"], name="join"),
        u=weights(6, 3, 1, 1),
    )
    (kept,) = reasons(model)["first"].kept
    assert (kept.channels, kept.details["kind"], kept.details["node"]) == ([1, 4], "read", "join")
    assert "joins it with a channel that is needed" in kept.why


def test_a_tie_names_the_live_channel_at_its_other_end() -> None:
    """A gate of zero makes the first convolution's channel irrelevant; behind the add that channel is needed."""
    model = chain(
        node("Conv", ["x", "u"], ["c"], name="other"),
        node("Mul", ["a", "gate"], ["g"], name="gate"),
        node("Add", ["g", "c"], ["z"], name="join"),
        u=weights(6, 3, 1, 1),
        gate=np.array([1, 1, 0, 1, 1, 1], np.float32)[:, None, None],
    )
    kept = {tuple(one.channels): one for one in reasons(model)["first"].kept}
    tied = kept[(2,)]
    assert (tied.details["kind"], tied.details["channel"]) == ("tied", 2)
    assert "ties it to channel 2 of 'g'" in tied.why


def test_rounding_is_named() -> None:
    (kept,) = reasons(chain(node("Relu", ["a"], ["z"])), round_to=3)["first"].kept
    assert len(kept.channels) == 2
    assert "rounded to a multiple of 3" in kept.why


def test_an_output_is_named() -> None:
    model = graph(
        [node("Conv", ["x", "w"], ["y"], name="only")],
        {"w": weights(4, 3, 1, 1, zero=(2,))},
        {"x": IMAGE},
        {"y": ["N", 4, 6, 6]},
    )
    (kept,) = reasons(model)["only"].kept
    assert (kept.channels, kept.details["kind"]) == ([2], "output")


def test_the_source_line_of_a_node_is_shown() -> None:
    slimmed = remove_dead_channels(chain(node("Softmax", ["a"], ["z"], axis=1, name="attention")))
    places = {"attention": {"module": "head.mixer", "source": "net.py:12 in forward"}}
    (kept,) = explain(slimmed.analysis, places)[0].kept
    assert "(head.mixer, net.py:12 in forward)" in kept.why
    assert kept.details["module"] == "head.mixer"


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (2.0, 0.5)])
def test_an_alias_names_its_channel_and_the_relation(slope: float, shift: float) -> None:
    first = weights(6, 3, 1, 1)
    first[3] = slope * first[0]
    bias = np.zeros(6, np.float32)
    bias[3] = shift
    model = chain(node("Conv", ["x", "u", "c"], ["z"], name="twins"), u=first, c=bias)
    (removed,) = reasons(model)["twins"].removed
    got = tuple(removed.details[key] for key in ("kind", "of", "scale", "shift"))
    assert got in (("alias", 0, slope, shift), ("alias", 3, 1 / slope, -shift / slope))
