"""ONNX files in and out: what cannot be used is refused in one line, and the normal form computes the same."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node as node

import prune2deploy.graph.model as model_module
from graph.small import copy_of, graph, initializer, operators, parse, run, slim_and_verify, weights
from prune2deploy.errors import InputError
from prune2deploy.graph.model import load_model, save_model
from prune2deploy.graph.normal import normalise, to_model
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.verify import verify

IMAGE = ["N", 3, 6, 6]


def plain() -> onnx.ModelProto:
    return graph([node("Conv", ["x", "w"], ["y"])], {"w": weights(4, 3, 3, 3)}, {"x": IMAGE}, {"y": ["N", 4, 4, 4]})


def with_opset(version: int) -> bytes:
    model = plain()
    model.opset_import[0].version = version
    return model.SerializeToString()


def without_opset() -> bytes:
    model = plain()
    del model.opset_import[:]
    return model.SerializeToString()


def external(folder: Path, location: str = "weights.bin") -> onnx.ModelProto:
    model = plain()
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location=location, size_threshold=0)
    return onnx.load(folder / "model.onnx", load_external_data=False)


BAD_FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("bad.onnx", lambda: b""),
    "text": ("bad.onnx", lambda: b"this is a text file\n" * 20),
    "picture": ("bad.onnx", lambda: b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "pickle": ("bad.onnx", lambda: b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."),
    "truncated": ("bad.onnx", lambda: plain().SerializeToString()[:-100]),
    "cut in half": ("bad.onnx", lambda: plain().SerializeToString()[:200]),
    "opset 7": ("bad.onnx", lambda: with_opset(7)),
    "opset 99": ("bad.onnx", lambda: with_opset(99)),
    "no opset": ("bad.onnx", without_opset),
    "text called json": ("bad.json", lambda: b"hello"),
    "text called textproto": ("bad.textproto", lambda: b"hello {"),
    "text called onnxtxt": ("bad.onnxtxt", lambda: b"hello"),
}


@pytest.mark.filterwarnings("ignore:The onnxtxt format is experimental")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_supported_model_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    name, data = BAD_FILES[kind]
    path = tmp_path / name
    path.write_bytes(data())
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_path_that_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "nowhere.onnx"
    with pytest.raises(InputError, match="folder" if kind == "folder" else "does not exist"):
        load_model(path)


def test_external_data_is_read(tmp_path: Path) -> None:
    external(tmp_path)
    np.testing.assert_array_equal(initializer(load_model(tmp_path / "model.onnx"), "w"), weights(4, 3, 3, 3))


def test_external_data_that_is_missing_or_short_is_refused(tmp_path: Path) -> None:
    external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be read") as caught:
        load_model(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"weights\.bin"):
        load_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin"])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    model = external(folder)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(InputError, match="outside its folder"):
        load_model(folder / "model.onnx")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    external(folder)
    (folder / "weights.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(InputError, match="outside its folder"):
        load_model(folder / "model.onnx")


def test_a_graph_with_a_cycle_is_refused() -> None:
    nodes = [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, IMAGE) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:]))
    with pytest.raises(InputError, match="cycle"):
        remove_dead_channels(model)


def test_nodes_in_any_order_are_sorted() -> None:
    names, nodes, constants = ["x"], [], {}
    for i in range(30):  # densely connected, as DenseNet
        nodes += [node("Concat", [*names], [f"c{i}"], axis=1), node("Conv", [f"c{i}", f"w{i}"], [f"v{i}"])]
        constants[f"w{i}"] = weights(1, 3 + i, 1, 1)
        names.append(f"v{i}")
    model = graph(nodes, constants, {"x": IMAGE}, {"v29": ["N", 1, 6, 6]})
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])
    slim = remove_dead_channels(model).model
    onnx.checker.check_model(slim)
    assert len(slim.graph.node) == 60


def test_initializers_that_are_listed_as_inputs_become_plain() -> None:
    model = plain()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    slim = remove_dead_channels(model).model
    assert [value.name for value in slim.graph.input] == ["x"]
    np.testing.assert_array_equal(initializer(slim, "w"), weights(4, 3, 3, 3))


def test_the_normal_form_has_no_node_that_only_passes_its_input_on() -> None:
    model = parse(
        """g (float[N,3,6,6] x) => (float[N,3,6,6] y, float[N,3,6,6] z) {
        two = Constant<value_float = 2.0>()  three = Add(two, two)
        a = Identity(x)  b = Dropout(a)  c = Relu(b)  d = Mul(c, three)  y = Identity(d)  z = Identity(c) }"""
    )
    normal = to_model(normalise(copy_of(model)), model)
    assert sorted(operators(normal)) == ["Identity", "Identity", "Mul", "Relu"]
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    want, got = run(model, feeds), run(normal, feeds)
    assert all(np.array_equal(want[name], got[name]) for name in want)


def test_an_identity_that_a_subgraph_reads_is_passed_by() -> None:
    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    then = helper.make_graph([node("Relu", ["i"], ["t"])], "then", [], [info("t")])
    other = helper.make_graph([node("Neg", ["i"], ["e"])], "else", [], [info("e")])
    nodes = [
        node("Identity", ["x"], ["i"]),
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Cast", ["sum"], ["which"], to=TensorProto.BOOL),
        node("If", ["which"], ["y"], then_branch=then, else_branch=other),
    ]
    model = graph(nodes, {}, {"x": IMAGE}, {"y": IMAGE})
    verify(model.SerializeToString(), remove_dead_channels(copy_of(model)).model.SerializeToString())


def test_local_functions_are_inlined() -> None:
    function = helper.make_function(
        "own", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, IMAGE) for name in "xy"]
    made = helper.make_graph([helper.make_node("Twice", ["x"], ["y"], domain="own")], "g", info[:1], info[1:])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    model = helper.make_model(made, functions=[function], opset_imports=imports, ir_version=10)
    slimmed = remove_dead_channels(copy_of(model))
    assert slimmed.opaque == {}
    verify(model.SerializeToString(), slimmed.model.SerializeToString())


def test_inputs_outputs_and_metadata_come_back_as_they_were() -> None:
    model = plain()
    model.producer_name, model.doc_string = "someone", "about it"
    model.metadata_props.add(key="mean", value="0.5")
    slim = remove_dead_channels(copy_of(model)).model
    assert (slim.producer_name, slim.doc_string, slim.ir_version) == ("someone", "about it", model.ir_version)
    assert list(slim.graph.input) == list(model.graph.input)
    assert list(slim.graph.output) == list(model.graph.output)
    assert {entry.key: entry.value for entry in slim.metadata_props}["mean"] == "0.5"


def test_an_output_of_open_shape_does_not_hide_the_last_layer() -> None:
    model = plain()
    model.graph.output[0].type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
    for _ in range(4):
        model.graph.output[0].type.tensor_type.shape.dim.add()
    assert remove_dead_channels(model).opaque == {}


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    save_model(plain(), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert load_model(tmp_path / "m.onnx") == plain()


def test_a_large_model_keeps_its_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "SINGLE_FILE_BYTES", 1000)
    big = graph([node("Conv", ["x", "w"], ["y"])], {"w": weights(40, 3, 3, 3)}, {"x": IMAGE}, {"y": ["N", 40, 4, 4]})
    before = big.SerializeToString()
    path = tmp_path / "m.onnx"
    save_model(big, path)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 1000
    np.testing.assert_array_equal(initializer(load_model(path), "w"), weights(40, 3, 3, 3))
    verify(before, path)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    assert len(modes) == 1, "whoever may read the model may read its weights"
    assert big.SerializeToString() == before, "the model in memory is left as it is"


def test_an_initializer_of_every_type_survives(tmp_path: Path) -> None:
    model = parse("g (float[N,3,6,6] x) => (float[N,3,6,6] y) { y = Relu(x) }")
    for kind in (np.float16, np.float64, np.int8, np.bool_):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(3, kind), np.dtype(kind).name))
    save_model(model, tmp_path / "m.onnx")
    assert load_model(tmp_path / "m.onnx") == model


@pytest.mark.parametrize(("condition", "width"), [(True, 4), (False, 5)])
def test_an_if_with_a_constant_condition_is_its_branch(condition: bool, width: int) -> None:
    def branch(weight: str) -> onnx.GraphProto:
        inner = [node("Conv", ["a", weight], ["t"]), node("Relu", ["t"], ["o"])]
        return onnx.helper.make_graph(inner, weight, [], [onnx.helper.make_tensor_value_info("o", 1, None)])

    constants = {
        "w": weights(4, 3, 1, 1, zero=(1,)),
        "c": np.array(condition),
        "v": weights(5, 4, 1, 1, zero=(2,)),
        "u": weights(5, 4, 1, 1),
        "z": weights(2, 5, 1, 1),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("If", ["c"], ["i"], then_branch=branch("v"), else_branch=branch("u")),
        node("Conv", ["i", "z"], ["y"]),
    ]
    slimmed = slim_and_verify(graph(nodes, constants, {"x": IMAGE}, {"y": ["N", 2, 6, 6]}))
    assert [row.after for row in slimmed.layers] == [3, width, 2]
    assert slimmed.opaque == {}


def test_sparse_initializers_are_read() -> None:
    dense = weights(4, 3, 1, 1, zero=(1, 2))
    model = graph(
        [node("Conv", ["x", "w"], ["a"]), node("Conv", ["a", "v"], ["y"])],
        {"w": dense, "v": weights(2, 4, 1, 1)},
        {"x": IMAGE},
        {"y": ["N", 2, 6, 6]},
    )
    places = np.flatnonzero(dense)
    values = onnx.numpy_helper.from_array(dense.ravel()[places], "w")
    indices = onnx.numpy_helper.from_array(places.astype(np.int64), "w_indices")
    sparse = onnx.helper.make_sparse_tensor(values, indices, dense.shape)
    model.graph.initializer.remove(next(tensor for tensor in model.graph.initializer if tensor.name == "w"))
    model.graph.sparse_initializer.append(sparse)
    slimmed = slim_and_verify(model)
    assert [row.after for row in slimmed.layers] == [2, 2]


@pytest.mark.parametrize("element", ["int4", "uint4", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3fn"])
@pytest.mark.parametrize("places", [12, 1100])
def test_constants_of_small_types_come_back_bit_for_bit(element: str, places: int) -> None:
    """Also large ones, in a graph that is read twice because of its Shape."""
    table = (np.arange(places) % 7).astype(element)
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        *(node("Shape", ["a"], ["s"]), node("Reshape", ["a", "s"], ["y"])),
        *(node("DequantizeLinear", ["table", "scale"], ["d"]), node("ReduceSum", ["x"], ["r"], keepdims=0)),
        node("Add", ["d", "r"], ["z"]),
    ]
    constants = {"w": weights(4, 3, 1, 1, zero=(1,)), "scale": np.float32(0.5)}
    model = graph(nodes, constants | {"table": table}, {"x": IMAGE}, {"y": ["N", 4, 6, 6], "z": [places]}, opset=21)
    slimmed = slim_and_verify(model)
    found = initializer(slimmed.model, "table")
    assert found.dtype == table.dtype
    assert found.tobytes() == table.tobytes()


def test_strings_pass_through() -> None:
    nodes = [node("Conv", ["x", "w"], ["y"]), node("Shape", ["x"], ["b"], start=0, end=1)]
    nodes += [node("Gather", ["names", "b"], ["t"]), node("Equal", ["t", "t"], ["z"])]
    names = np.array([f"name {index}" for index in range(40)], dtype=object)
    outputs = {"y": ["N", 4, 6, 6], "z": [1]}
    types = {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT, "z": TensorProto.BOOL}
    constants = {"w": weights(4, 3, 1, 1), "names": names}
    slim_and_verify(graph(nodes, constants, {"x": IMAGE}, outputs, opset=21, element=types))
