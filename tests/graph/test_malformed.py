"""Malformed models: each ends in one line for the user or in a slim graph that was verified, and in nothing else."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Ignoring unknown external data key")  # onnx's own word to the user


def tool(name: str) -> ModuleType:
    """Return a developer script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


fuzz = tool("fuzz_bytes")
EACH = 8
"""Cases of every kind of damage."""


def check(case: "fuzz.Damaged", folder: Path) -> str:
    """Slim a case; two graphs that differ are an answer only where sums overflow, as those of huge weights do."""
    outcome: str = fuzz.slim_end_to_end(case, folder)
    assert fuzz.settled(outcome) != "VerifyError: differs" or fuzz.extreme(case), outcome
    return outcome


@pytest.mark.parametrize("number", range(len(fuzz.valid_models())))
def test_the_models_that_damage_starts_from_are_valid(number: int, tmp_path: Path) -> None:
    assert check(fuzz.valid_models()[number], tmp_path) == "verified"


@pytest.mark.parametrize("damage", fuzz.BYTES, ids=lambda damage: damage.__name__)
def test_damaged_bytes_end_in_a_line_for_the_user(damage: "fuzz.ByteDamage", tmp_path: Path) -> None:
    models = fuzz.valid_models()
    for seed in range(EACH):
        for number, case in enumerate(fuzz.valid_models()):
            random = np.random.default_rng((11, seed, number))
            fuzz.break_bytes(case, damage, fuzz.pick(random, models).data, random)
            check(case, tmp_path)


@pytest.mark.parametrize("damage", fuzz.FIELDS, ids=lambda damage: damage.__name__)
def test_damaged_fields_end_in_a_line_for_the_user(damage: "fuzz.FieldDamage", tmp_path: Path) -> None:
    for seed in range(EACH):
        for number, case in enumerate(fuzz.valid_models()):
            fuzz.break_fields(case, [damage], np.random.default_rng((12, seed, number)))
            check(case, tmp_path)


def changed(change: Callable[[onnx.ModelProto], None], number: int = 0) -> "fuzz.Damaged":
    case = fuzz.valid_models()[number]
    model = onnx.load_from_string(case.data)
    change(model)
    case.data = model.SerializeToString()
    return case


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.name == name)


def replace(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    tensor(model, name).CopyFrom(numpy_helper.from_array(array, name))


def shape_that_the_data_does_not_fill(model: onnx.ModelProto) -> None:
    tensor(model, "head").dims[1] = 9


def huge_shape(model: onnx.ModelProto) -> None:
    tensor(model, "w2").dims[0] = 2**40


def negative_shape(model: onnx.ModelProto) -> None:
    tensor(model, "w2").dims[0] = -8


def data_cut_in_an_element(model: onnx.ModelProto) -> None:
    tensor(model, "b1").raw_data = tensor(model, "b1").raw_data[:-1]


def two_outputs_of_one_name(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.output[0])


def sparse_weights(model: onnx.ModelProto) -> None:
    dense = tensor(model, "w1")
    array = numpy_helper.to_array(dense)
    places = np.flatnonzero(array)
    made = helper.make_sparse_tensor(
        numpy_helper.from_array(array.ravel()[places], "w1"), numpy_helper.from_array(places, "i"), list(dense.dims)
    )
    model.graph.sparse_initializer.append(made)
    model.graph.initializer.remove(dense)


def norm_of_another_width(model: onnx.ModelProto) -> None:
    replace(model, "mean", np.zeros(4, np.float32))


def norm_of_another_rank(model: onnx.ModelProto) -> None:
    replace(model, "scale", np.ones((1, 8), np.float32))


def weights_of_integers(model: onnx.ModelProto) -> None:
    replace(model, "w2", np.ones((8, 8, 3, 3), np.int64))


def linear_layer_turned(model: onnx.ModelProto) -> None:
    del model.graph.node[-1].attribute[:]


def bias_that_does_not_fit(model: onnx.ModelProto) -> None:
    replace(model, "hb", np.zeros(3, np.float32))


def empty_weights(model: onnx.ModelProto) -> None:
    replace(model, "w2", np.zeros((0, 8, 3, 3), np.float32))


def huge_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**40


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "s"


def node_without_operator(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type = ""


def domain_that_is_not_imported(model: onnx.ModelProto) -> None:
    model.graph.node[2].domain = "nobody's"


def input_without_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].ClearField("type")


def attribute_of_another_type(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("pads", "all of them"))


def group_that_does_not_divide(model: onnx.ModelProto) -> None:
    model.graph.node[3].attribute.append(helper.make_attribute("group", 3))


def function_that_calls_itself(model: onnx.ModelProto) -> None:
    model.graph.node[2].domain = "own"
    model.opset_import.append(helper.make_opsetid("own", 1))
    body = [helper.make_node("Relu", ["i"], ["o"], domain="own")]
    model.functions.append(helper.make_function("own", "Relu", ["i"], ["o"], body, list(model.opset_import)))


def test_sparse_weights_are_verified(tmp_path: Path) -> None:
    assert check(changed(sparse_weights), tmp_path) == "verified"


REFUSED = (
    *(shape_that_the_data_does_not_fill, huge_shape, negative_shape, data_cut_in_an_element, two_outputs_of_one_name),
    *(norm_of_another_width, norm_of_another_rank, weights_of_integers, linear_layer_turned),
    *(
        bias_that_does_not_fit,
        huge_input,
        cycle,
        node_without_operator,
        domain_that_is_not_imported,
        input_without_type,
    ),
    *(attribute_of_another_type, group_that_does_not_divide, function_that_calls_itself),
)


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_it_is_refused(change: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    assert check(changed(change), tmp_path).startswith("InputError: ")


def test_empty_weights_are_refused_or_verified(tmp_path: Path) -> None:
    assert check(changed(empty_weights), tmp_path).startswith(("InputError: ", "verified"))


def pads_of_terabytes(model: onnx.ModelProto) -> None:
    replace(model, "pads", np.array([0, 2**44, 1, 1, 0, 0, 1, 1]))


def slice_of_nothing(model: onnx.ModelProto) -> None:
    replace(model, "ends", np.array([0]))


@pytest.mark.parametrize("change", [pads_of_terabytes, slice_of_nothing], ids=lambda change: change.__name__)
def test_constants_of_movement_are_refused_or_verified(
    change: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    assert check(changed(change, 1), tmp_path).startswith(("InputError: ", "verified"))


@pytest.mark.parametrize(
    "location", ["../weights.data", "/etc/passwd", "a" * 5000, "two\nlines", "nul\x00inside", "", ".", b"\xff\xfe"]
)
def test_external_data_outside_of_the_folder_is_refused(location: str | bytes, tmp_path: Path) -> None:
    case = fuzz.valid_models()[-1]
    text = location if isinstance(location, bytes) else location.encode()
    assert case.data.count(fuzz.EXTERNAL.encode()) > 1
    model = onnx.load_from_string(case.data)
    for item in model.graph.initializer:
        item.external_data[0].value = "?" * len(text)
    case.data = model.SerializeToString().replace(b"?" * len(text), text) if text else model.SerializeToString()
    assert check(case, tmp_path).startswith("InputError: ")


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-1", "99999999999999999999999", "three", str(2**62)])
def test_wrong_places_of_external_data_are_refused(key: str, value: str, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        for entry in model.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value

    assert check(changed(change, -1), tmp_path).startswith("InputError: ")


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("name", ["w1", "b1", "scale", "var", "head"])
def test_weights_that_are_not_finite_are_left_alone(name: str, value: float, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        array = numpy_helper.to_array(tensor(model, name)).copy()
        array.flat[0] = value
        replace(model, name, array)

    check(changed(change), tmp_path)


@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values())))
def test_weights_of_every_type_end_in_a_line_for_the_user(kind: int, tmp_path: Path) -> None:
    check(changed(lambda model: setattr(tensor(model, "w2"), "data_type", kind)), tmp_path)


def test_every_prefix_of_a_model_is_refused(tmp_path: Path) -> None:
    whole = fuzz.valid_models()[3]
    for size in range(len(whole.data)):
        assert check(fuzz.Damaged(whole.data[:size]), tmp_path).startswith("InputError: ")


@pytest.mark.slow
def test_the_fuzzer_finds_nothing_in_two_thousand_cases(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "fuzz_bytes.py"), "--cases", "2000", "--seed", "7"]
    done = subprocess.run([*command, "--save", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "verified" in done.stdout
