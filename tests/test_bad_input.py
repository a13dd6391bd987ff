"""What the user can get wrong: an exit code, one line that says what and where, and nothing half-written."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command_line import ENVIRONMENT, command, done, p2d, p2d_process, refused, small_network, write_recipe
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prune2deploy.methods import METHODS
from prune2deploy.networks import NETWORKS

# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run(small: Path) -> Path:
    return small


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder; the checks of this module look at what a refused command left in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "own"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


# --- ONNX files -------------------------------------------------------------------------------------------------------

DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "short of three bytes": lambda data: data[:-3],
    "text": lambda data: b"this is not a graph\n",
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(100),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_onnx_file_is_named(damage: object, run: Path, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damage((run / "dense.onnx").read_bytes()))  # type: ignore[operator]
    for arguments in (("slim", path, "-o", out / "slim.onnx"), ("inspect", path), ("verify", path, run / "dense.onnx")):
        refused(p2d(*arguments), 2, str(path), "is not an ONNX file")
    assert contents(out) == {}


@pytest.mark.parametrize("name", ["slim", "verify", "bench", "inspect"])
def test_a_missing_file_and_a_folder_in_its_place_are_named(name: str, run: Path, tmp_path: Path, out: Path) -> None:
    ends = {"slim": ("-o", out / "slim.onnx"), "verify": (run / "dense.onnx",), "bench": (run / "dense.onnx",)}
    rest = ends.get(name, ())
    refused(p2d(name, tmp_path / "none.onnx", *rest), 2, "none.onnx", "does not exist", "check the path")
    refused(p2d(name, tmp_path, *rest), 2, str(tmp_path))
    assert contents(out) == {}


def test_a_file_of_another_kind_is_no_onnx_file_whatever_its_name_ends_in(run: Path, tmp_path: Path, out: Path) -> None:
    for name in ("report.json", "model.txt", "model.textproto", "model.onnxtxt"):
        path = tmp_path / name
        shutil.copy(run / "report.json", path)
        refused(p2d("slim", path, "-o", out / "slim.onnx"), 2, str(path), "not an ONNX file")


def test_an_onnx_file_may_have_any_name(run: Path, tmp_path: Path, out: Path) -> None:
    shutil.copy(run / "masked.onnx", tmp_path / "model.json")
    done("slim", tmp_path / "model.json", "-o", out / "slim.onnx")


@pytest.mark.parametrize("version", [5, 8, 99])
def test_an_operator_set_that_is_not_supported_is_refused(version: int, run: Path, tmp_path: Path, out: Path) -> None:
    model = onnx.load(run / "dense.onnx")
    model.opset_import[0].version = version
    path = saved(model, tmp_path / "old.onnx")
    refused(p2d("slim", path, "-o", out / "slim.onnx"), 2, str(path), f"operator set {version}", "version_converter")
    assert contents(out) == {}


@pytest.fixture
def external(run: Path, tmp_path: Path) -> Path:
    """The dense graph with its large weights in a file beside it."""
    folder = tmp_path / "external"
    folder.mkdir()
    model = onnx.load(run / "masked.onnx")
    onnx.save_model(model, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=256)
    assert (folder / "w.bin").stat().st_size > 0
    return folder / "m.onnx"


def moved(external: Path, location: str) -> Path:
    model = onnx.load(external, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    return saved(model, external)


def test_external_data_beside_the_file_is_read(external: Path, run: Path, out: Path) -> None:
    done("slim", external, "-o", out / "slim.onnx")
    done("verify", run / "slim.onnx", out / "slim.onnx")


def test_external_data_that_is_missing_or_short_is_named(external: Path, out: Path) -> None:
    with (external.parent / "w.bin").open("r+b") as stream:
        stream.truncate(64)
    refused(p2d("slim", external, "-o", out / "slim.onnx"), 2, str(external), "external data")
    (external.parent / "w.bin").unlink()
    refused(p2d("slim", external, "-o", out / "slim.onnx"), 2, str(external), "w.bin", "not beside it")
    assert contents(out) == {}


@pytest.mark.parametrize("location", ["../secret", "link", "sub/../../secret"])
def test_external_data_outside_the_folder_is_never_read(location: str, external: Path, out: Path) -> None:
    (external.parents[1] / "secret").write_bytes(bytes(1_000_000))
    (external.parent / "link").symlink_to("../secret")
    (external.parent / "sub").mkdir()
    path = moved(external, location)
    for arguments in (("slim", path, "-o", out / "slim.onnx"), ("inspect", path), ("verify", path, path)):
        refused(p2d(*arguments), 2, str(path), location, "outside its folder")
    refused(p2d("slim", moved(external, str(external.parents[1] / "secret")), "-o", out / "s.onnx"), 2, "outside")
    assert contents(out) == {}


def without_producer(model: onnx.ModelProto) -> None:
    model.graph.node[3].input[0] = "nobody"


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = "Frobnicate"


def unfit_weight(model: onnx.ModelProto) -> None:
    tensor = next(one for one in model.graph.initializer if one.name == "left.weight")
    tensor.CopyFrom(numpy_helper.from_array(np.ones((6, 13, 3, 3), np.float32), tensor.name))


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[3].output[0]


INVALID = (without_producer, unknown_operator, unfit_weight, cyclic)


@pytest.mark.parametrize("damage", INVALID, ids=lambda one: one.__name__)
def test_a_graph_that_is_not_valid_is_the_users_input(damage: object, run: Path, tmp_path: Path, out: Path) -> None:
    model = onnx.load(run / "dense.onnx")
    damage(model)  # type: ignore[operator]
    path = saved(model, tmp_path / "invalid.onnx")
    refused(p2d("slim", path, "-o", out / "slim.onnx"), 2, str(path))
    refused(p2d("verify", path, run / "dense.onnx"), 2, str(path))
    if damage is not unfit_weight:  # its layers are opaque: only a runtime knows for sure that the sizes cannot fit
        refused(p2d("inspect", path), 2, str(path))
    assert contents(out) == {}


def test_weights_that_are_not_finite_are_left_alone(run: Path, tmp_path: Path, out: Path) -> None:
    model = onnx.load(run / "masked.onnx")
    tensor = next(one for one in model.graph.initializer if one.name == "left.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = saved(model, tmp_path / "nan.onnx")
    done("slim", path, "-o", out / "slim.onnx")
    slim = {one.name: numpy_helper.to_array(one) for one in onnx.load(out / "slim.onnx").graph.initializer}
    assert np.isnan(slim["left.weight"]).sum() == 1


def test_verify_of_graphs_that_differ_exits_with_3(run: Path, tmp_path: Path) -> None:
    model = onnx.load(run / "dense.onnx")
    tensor = next(one for one in model.graph.initializer if one.name == "head.bias")
    values = numpy_helper.to_array(tensor).copy()
    values[7] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = saved(model, tmp_path / "other.onnx")
    refused(p2d("verify", run / "dense.onnx", path), 3, "output", "differs")
    done("verify", run / "dense.onnx", path, "--rtol", "1")
    renamed = onnx.load(run / "dense.onnx")
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = "other"
    refused(p2d("verify", run / "dense.onnx", saved(renamed, tmp_path / "renamed.onnx")), 3, "outputs differ")


def test_a_folder_or_a_file_in_the_way_of_the_result_is_named(run: Path, out: Path) -> None:
    refused(p2d("slim", run / "dense.onnx", "-o", out), 2, str(out), "is a folder")
    (out / "file").write_text("mine")
    refused(p2d("slim", run / "dense.onnx", "-o", out / "file" / "slim.onnx"), 2, "file")
    refused(p2d("prune", "resnet_digits", "-o", out / "file"), 2, str(out / "file"), "is a file")
    refused(p2d("report", run, "-o", out / "file" / "page.html"), 2, "file")
    assert contents(out) == {"file": b"mine"}


def test_a_result_that_would_overwrite_something_else_is_refused(run: Path, out: Path) -> None:
    refused(p2d("slim", run / "masked.onnx", "-o", out / "slim.json"), 2, "slim.json", ".onnx")
    assert contents(out) == {}


# --- networks, weights and data ---------------------------------------------------------------------------------------

UNKNOWN = {
    "network": (("resnet57",), ("resnet57", "resnet56")),
    "network file": (("nowhere.py:net",), ("nowhere.py", "does not exist")),
    "method": (("resnet_digits", "--method", "l7"), ("l7", ", ".join(sorted(METHODS)))),
    "method option": (("resnet_digits", "--method", "bn", "--option", "scoer=std"), ("scoer", "score", "mean_fold")),
    "option of a method without any": (("resnet_digits", "--option", "p=1"), ("method 'l1'", "'p'", "none")),
    "option's value": (("resnet_digits", "--method", "bn", "--option", "score=x"), ("'x'", "mean, rms, std")),
    "option's form": (("resnet_digits", "--option", "score"), ("KEY=VALUE",)),
    "data": (("resnet_digits", "--data", "cifar11:x"), ("cifar11:x", "did you mean cifar10", "imagefolder:DIR")),
    "data folder": (("resnet20", "--data", "cifar10:nowhere"), ("nowhere",)),
    "data folder left out": (("resnet20", "--data", "cifar10"), ("cifar10:DIR",)),
    "device": (("resnet_digits", "--device", "toaster"), ("toaster", "cpu")),
    "kept parameter": (("resnet_digits", "--keep", "nothing.*"), ("nothing.*", "matches no parameter")),
    "floor": (("resnet_digits", "--floor", "nothing.*=3"), ("nothing.*", "matches no group")),
    "floor above the size": (("resnet_digits", "--floor", "layer1.*=17"), ("layer1.*", "is 17", "has 16 channels")),
    "file of floors": (("resnet_digits", "--floors", "f.json"), ("f.json", "does not exist")),
    "precision": (("resnet_digits", "--round-to", "fp12"), ("--round-to 'fp12'", "fp16 (8)", "int8 (16)")),
    "multiple": (("resnet_digits", "--round-to", "0"), ("--round-to '0'", "whole number from 1")),
    "ranking": (("resnet_digits", "--ranking", "best"), ("'ranking' is 'best'", "'uniform' or 'global'")),
    "run whose widths are wanted": (("resnet_digits", "--widths-of", "no/run"), ("no/run", "is not a run")),
    "weights": (("resnet_digits", "--weights", "w.safetensors"), ("w.safetensors", "does not exist")),
    "weights' kind": (("resnet_digits", "--weights", __file__), ("must end in", ".safetensors")),
}


@pytest.mark.parametrize(("arguments", "says"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_unknown_is_named_with_what_is_known(
    arguments: tuple[str, ...], says: tuple[str, ...], tmp_path: Path
) -> None:
    refused(p2d("prune", *arguments, "-o", tmp_path / "run"), 2, *says)
    assert not (tmp_path / "run" / "recipe.toml").exists()


TARGETS = ("macs=0", "macs=1", "macs=1.5", "macs=-0.1", "macs=nan", "macs", "macs=half", "=0.5", "flops=0.5", "0.5", "")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_out_of_range_or_form_is_refused(target: str, tmp_path: Path) -> None:
    refused(p2d("prune", "resnet_digits", "--target", target, "-o", tmp_path / "run"), 2, "target", "macs=")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["latency=0.5", "latency=3.2ms"])
def test_a_latency_target_is_refused_with_what_there_is(target: str, tmp_path: Path) -> None:
    refused(p2d("prune", "resnet_digits", "--target", target, "-o", tmp_path / "run"), 2, target, "macs=SHARE")


def test_an_unreachable_target_names_what_is_reachable(tmp_path: Path) -> None:
    spec = small_network(tmp_path)
    outcome = p2d("prune", spec, "--target", "macs=0.0001", "-o", tmp_path / "run")
    refused(outcome, 2, "macs=0.0001", "smallest reachable is macs=")
    smallest = outcome.err.split("smallest reachable is macs=")[1].split(":")[0]
    done("prune", spec, "--target", f"macs={smallest}", "-o", tmp_path / "run")
    assert contents(tmp_path / "run")


def test_floors_that_make_a_target_unreachable_are_said_to(tmp_path: Path) -> None:
    call = ("prune", small_network(tmp_path), "--target", "macs=0.3", "--floor", "*=0.8", "-o", tmp_path / "run")
    refused(
        p2d(*call), 2, "macs=0.3 cannot be met", "with these floors is macs=0.", "lower a floor, or raise the target"
    )
    assert not (tmp_path / "run" / "recipe.toml").exists()


@pytest.mark.parametrize("floor", ["stem", "=3", "stem=", "stem=half", "stem=0", "stem=-1", "stem=1.5", "stem=nan", ""])
def test_a_floor_that_is_none_is_refused_before_anything_is_loaded(floor: str, tmp_path: Path) -> None:
    outcome = p2d("prune", "resnet_digits", "--floor", floor, "-o", tmp_path / "run")
    refused(outcome, 2, f"--floor '{floor}' is not PATTERN=WIDTH", "'layer1.*=0.5'")
    assert not (tmp_path / "run").exists()


def test_widths_of_a_run_of_another_network_are_refused(run: Path, tmp_path: Path) -> None:
    outcome = p2d("prune", "resnet_digits", "--widths-of", run, "-o", tmp_path / "run")
    refused(outcome, 2, f"--widths-of '{run}'", "net.py:small", "'resnet_digits'", "a run of the same network")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "other", [("--target", "macs=0.5"), ("--round-to", "8"), ("--ranking", "global"), ("--floor", "stem=3")]
)
def test_widths_of_a_run_leave_nothing_else_to_choose(other: tuple[str, str], run: Path, tmp_path: Path) -> None:
    spec = json.loads((run / "report.json").read_text())["prune"]["network"]
    outcome = p2d("prune", spec, "--widths-of", run, *other, "-o", tmp_path / "run")
    refused(outcome, 2, "--widths-of takes another run's widths as they are", f"leave {other[0]} out")


def test_a_device_that_is_not_there_exits_with_4(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(p2d("prune", "resnet_digits", "--device", "cuda", "-o", tmp_path / "run"), 4, "cuda")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_an_onnx_file_cannot_be_trained_and_the_message_says_so(run: Path, tmp_path: Path) -> None:
    outcome = p2d("prune", run / "dense.onnx", "--finetune-epochs", 1, "-o", tmp_path / "run")
    refused(outcome, 2, "is an ONNX file", "--finetune-epochs")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--mean", "0.5,x"), ("--mean", "0.5,0.5"), ("--std", ""), ("--input", "3,8,8"), ("--input", "input:1,x,8")],
)
def test_malformed_numbers_are_named(option: str, value: str, tmp_path: Path) -> None:
    refused(p2d("prune", "resnet_digits", option, value, "-o", tmp_path / "run"), 2, option)


def test_weights_that_do_not_fit_name_the_first_three_keys(tmp_path: Path) -> None:
    own = load_file(small_weights(tmp_path))
    changed = {name: tensor for name, tensor in own.items() if name not in ("stem.weight", "norm.weight")}
    save_file(changed | {"extra": torch.zeros(1), "head.bias": torch.zeros(11)}, tmp_path / "unfit.safetensors")
    outcome = p2d("prune", small_network(tmp_path), "--weights", tmp_path / "unfit.safetensors", "-o", tmp_path / "run")
    refused(outcome, 2, "'stem.weight' is missing", "'norm.weight' is missing", "'extra' is unexpected", "and 1 more")
    assert not (tmp_path / "run").exists()


def small_weights(folder: Path) -> Path:
    from prune2deploy.networks import load_network, save_weights

    network = load_network(small_network(folder), num_classes=10, input_shape=(1, 8, 8))
    save_weights(network.module.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_that_needs_code_is_refused_and_its_code_does_not_run(wrapped: bool, tmp_path: Path) -> None:
    bomb, path = Bomb(tmp_path / "boom"), tmp_path / "evil.pt"
    if wrapped:
        torch.save({"state_dict": {"stem.weight": torch.zeros(1), "optimizer": bomb}}, path)
    else:
        path.write_bytes(pickle.dumps(bomb))
    outcome = p2d("prune", small_network(tmp_path), "--weights", path, "-o", tmp_path / "run")
    refused(outcome, 2, str(path), "safetensors")
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "run").exists()
    with suppress(RuntimeError):
        torch.load(path, weights_only=False)  # the bomb is a real one
    assert (tmp_path / "boom").is_dir()


CONTROL_FLOW = """
import torch
from torch import nn


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 10)

    def forward(self, image):
        x = self.conv(image).mean((2, 3))
        if x.sum() > 0:
            x = x * 2
        return self.head(x)


def net():
    return Branching()


def raising():
    raise RuntimeError("no licence today")


def number():
    return 5


class Broken(Branching):
    def forward(self, image):
        return self.head(image)


def broken():
    return Broken()
"""


def test_a_network_that_cannot_be_exported_gives_the_exporters_reason(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CONTROL_FLOW)
    outcome = p2d_process("prune", f"{tmp_path / 'net.py'}:net", "-o", tmp_path / "run")  # torch logs past sys.stderr
    refused(outcome, 2, "cannot be exported", "data-dependent", "forward()")
    assert len(outcome.err) < 400
    assert not (tmp_path / "run" / "recipe.toml").exists()


@pytest.mark.parametrize(
    ("function", "says"),
    [("raising", "no licence today"), ("number", "5"), ("absent", "net, raising"), ("broken", "[2, 1, 8, 8]")],
)
def test_a_factory_that_gives_no_network_is_named(function: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(CONTROL_FLOW)
    outcome = p2d("prune", f"{tmp_path / 'net.py'}:{function}", "-o", tmp_path / "run")
    refused(outcome, 2, "net.py", says if function != "number" else "int")


def test_the_wrong_number_of_channels_is_named(tmp_path: Path) -> None:
    assert NETWORKS["resnet20"].input_shape == (3, 32, 32)
    refused(p2d("prune", "resnet_digits", "--input", "input:3,8,8", "-o", tmp_path / "run"), 2, "[3, 8, 8]", "1")


# --- recipes and runs -------------------------------------------------------------------------------------------------

RECIPES = {
    "missing": (None, "does not exist"),
    "no TOML": ("network = ", "is not TOML"),
    "not UTF-8": (b"\xff\xfe", "is not TOML"),
    "unknown key": ('network = "resnet8"\nmethud = "l1"', "unknown key 'methud'"),
    "unknown key in a section": ('network = "resnet8"\n[finetune]\nepoch = 3', "unknown key 'finetune.epoch'"),
    "wrong type": ("network = 5", "'network' is 5"),
    "a number as text": ('network = "resnet8"\nround_to = "eight"', "'round_to'"),
    "out of range": ('network = "resnet8"\n[bench]\nsessions = 2', "'bench.sessions' is 2"),
    "without a network": ('data = "digits"', "'network'"),
    "unknown method": ('network = "resnet_digits"\nmethod = "l7"', "l7"),
    "unknown precision": ('network = "resnet_digits"\n[finetune]\nepochs = 1\nprecision = "fp7"', "fp7"),
    "unknown backend": ('network = "resnet_digits"\n[bench]\nbackend = "abacus"', "abacus"),
}


@pytest.mark.parametrize(("text", "says"), RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_cannot_be_carried_out_is_named(text: str | bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(p2d("run", path, "-o", tmp_path / "run"), 2, says)
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize("arguments", [("export", "RUN"), ("bench", "RUN"), ("inspect", "RUN"), ("report", "RUN")])
def test_a_folder_that_is_no_run_is_named(arguments: tuple[str, ...], tmp_path: Path, out: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    rest = ("-o", out / "page.html") if arguments[0] == "report" else ()
    for folder in (empty, tmp_path / "none"):
        refused(p2d(arguments[0], folder, *rest), 2, str(folder))
    assert contents(out) == {}
    assert contents(empty) == {}


@pytest.mark.parametrize("section", [None, "prune"])
def test_a_run_whose_pruning_was_not_finished_is_refused(section: str | None, own: Path) -> None:
    report = own / "report.json"
    if section is None:
        report.unlink()
    else:
        document = json.loads(report.read_text())
        del document[section]
        report.write_text(json.dumps(document))
    refused(p2d("export", own), 2, str(own), "p2d prune")


@pytest.mark.parametrize(
    "name", ["masks.safetensors", "weights.safetensors", "dense.safetensors", "recipe.toml", "report.json"]
)
def test_a_damaged_file_of_a_run_is_named(name: str, own: Path) -> None:
    (own / name).write_bytes(b"\x80 damaged")
    before = contents(own)
    refused(p2d("export", own), 2, name)
    assert {path: data for path, data in contents(own).items() if path != "lock"} == {
        path: data for path, data in before.items() if path != "lock"
    }


def test_a_report_of_another_version_is_refused(own: Path, out: Path) -> None:
    document = json.loads((own / "report.json").read_text())
    (own / "report.json").write_text(json.dumps(document | {"schema_version": 99}))
    refused(p2d("report", own, "-o", out / "page.html"), 2, "report.json", "99")
    assert contents(out) == {}


def test_trt_without_tensorrt_leaves_the_slim_graph_and_exits_with_4(own: Path) -> None:
    if shutil.which("trtexec") or _has_tensorrt():
        pytest.skip("TensorRT is installed")
    expected = (own / "slim.onnx").read_bytes()
    (own / "slim.onnx").unlink()
    outcome = p2d("export", own, "--trt")
    refused(outcome, 4, "TensorRT", "pip install")
    assert (own / "slim.onnx").read_bytes() == expected
    assert not list(own.glob("engines/*.engine"))


def _has_tensorrt() -> bool:
    from importlib.util import find_spec

    return find_spec("tensorrt") is not None


def test_an_unknown_precision_is_refused_whether_or_not_tensorrt_is_there(own: Path) -> None:
    refused(p2d("export", own, "--trt", "--precision", "fp3"), 2, "fp3", "fp32")


@pytest.mark.parametrize(("backend", "code"), [("abacus", 2), ("tensorrt", 2)])
def test_a_backend_that_cannot_measure_is_named(backend: str, code: int, run: Path) -> None:
    refused(p2d("bench", run, "--backend", backend), code, backend, "ort-cpu")


def test_models_with_different_inputs_cannot_be_compared(run: Path, tmp_path: Path) -> None:
    model = onnx.load(run / "dense.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = "picture"
    refused(p2d("bench", run / "dense.onnx", saved(model, tmp_path / "other.onnx"), "--iterations", "5"), 2, "input")


def test_against_a_report_that_cannot_serve_is_refused_before_measuring(run: Path, tmp_path: Path) -> None:
    arms = (run / "dense.onnx", run / "slim.onnx")
    (tmp_path / "empty.json").write_text("{}")
    start = time.perf_counter()
    for path, says in (
        (tmp_path / "none.json", "does not exist"),
        (tmp_path / "empty.json", "no measurement of 'slim'"),
    ):
        outcome = p2d("bench", *arms, "--seconds", "5", "--against", path)
        refused(outcome, 2, str(path), says)
        assert outcome.out == ""
    assert time.perf_counter() - start < 10, "it measured first"


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_earlier_slim_graph(
    tiny_disk: Path, run: Path, tmp_path: Path, digits_run: Path
) -> None:
    large = digits_run / "masked.onnx"  # 700 KB, of which half remain
    done("slim", run / "masked.onnx", "-o", tiny_disk / "slim.onnx")
    earlier = contents(tiny_disk)
    refused(p2d("slim", large, "-o", tiny_disk / "slim.onnx"), 2, "slim.onnx", "free some space")
    assert contents(tiny_disk) == earlier
    refused(p2d("prune", small_network(tmp_path), "-o", tiny_disk / "run"), 2, "free some space")
    assert not list(tiny_disk.glob("run/*.part"))
    refused(p2d("report", run, "-o", tiny_disk / "page.html"), 2, "page.html", "free some space")
    assert "run/report.json" not in contents(tiny_disk)
    require_whole(tiny_disk / "run")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["p2d", *sys.argv[2:]]
from prune2deploy.cli import main
main()
"""


def test_a_file_that_grows_past_the_limit_is_not_left_behind(run: Path, out: Path, digits_run: Path) -> None:
    large = digits_run / "masked.onnx"
    done("slim", run / "masked.onnx", "-o", out / "slim.onnx")
    earlier = contents(out)
    words = [*command()[:1], "-c", LIMITED, "65536", "slim", str(large), "-o", str(out / "slim.onnx")]
    found = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    assert "slim.onnx" in found.stderr
    assert contents(out) == earlier


# --- a kill at any moment ---------------------------------------------------------------------------------------------


def require_whole(folder: Path) -> set[str]:
    """Require that every file under its final name is whole; return their names."""
    names = {path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.name == "lock" or path.is_dir():
            continue
        if path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path), full_check=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np") as stream:
                assert list(stream.keys())
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        else:
            assert path.suffix == ".toml", path
            assert path.read_text().startswith("network = ")
    if (folder / "slim.onnx").exists() and (folder / "masked.onnx").exists():
        done("verify", folder / "masked.onnx", folder / "slim.onnx")
    return names


def killed(arguments: tuple[object, ...], folder: Path, name: str, delay: float = 0.0) -> bool:
    """Start a command and kill it as soon as a file of this name is in the folder; return whether it had to be."""
    with subprocess.Popen(
        command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            if folder.is_dir() and name in os.listdir(folder):
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("rtol", ["nan", "inf", "-1", "2"])
def test_a_relative_tolerance_that_would_prove_nothing_is_refused(rtol: str, run: Path, out: Path) -> None:
    refused(p2d("verify", run / "dense.onnx", run / "masked.onnx", "--rtol", rtol), 2, "--rtol", "between 0 and 1")
    refused(p2d("slim", run / "masked.onnx", "-o", out / "slim.onnx", "--rtol", rtol), 2, "--rtol")
    assert not list(out.iterdir())


@pytest.mark.parametrize("text", ["5", '"source_sha256"', "[]", '{"other": 1}', "[" * 100_000])
def test_a_file_that_is_no_earlier_result_is_not_overwritten(text: str, run: Path, out: Path) -> None:
    (out / "slim.json").write_text(text)
    refused(p2d("slim", run / "masked.onnx", "-o", out / "slim.onnx"), 2, "slim.json")
    assert (out / "slim.json").read_text() == text


def test_json_that_is_nested_too_deep_to_read_drops_nothing(run: Path, out: Path) -> None:
    (out / "drop.json").write_text("[" * 100_000)
    refused(p2d("slim", run / "masked.onnx", "-o", out / "slim.onnx", "--drop", out / "drop.json"), 2, "drop.json")


def test_a_range_that_nothing_asks_for_is_refused(run: Path, out: Path) -> None:
    refused(p2d("slim", run / "masked.onnx", "-o", out / "slim.onnx", "--range", "0,255"), 2, "--range", "--tolerance")


MOMENTS = (".slim.onnx.unverified.onnx", "slim.onnx", "slim.json")


@pytest.mark.parametrize("moment", MOMENTS)
def test_slim_killed_at_any_moment_leaves_whole_files(moment: str, out: Path, digits_run: Path) -> None:
    source = digits_run / "masked.onnx"
    killed(("slim", source, "-o", out / "slim.onnx"), out, moment)
    names = require_whole(out)
    assert names <= {"slim.onnx", "slim.json"}
    if "slim.onnx" in names:
        done("verify", source, out / "slim.onnx")
    done("slim", source, "-o", out / "slim.onnx")
    assert require_whole(out) == {"slim.onnx", "slim.json"}


STAGES = (
    *("lock", "analysis.onnx", "groups.json", "masks.safetensors", "recipe.toml", "report.json"),
    *("dense.onnx", "masked.onnx", ".slim.onnx.unverified.onnx", "slim.onnx", "samples", "report.html"),
)


@pytest.mark.slow
def test_a_walk_killed_at_every_stage_keeps_whole_files_and_can_be_resumed(tmp_path: Path, digits_run: Path) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    kills = 0
    for stage in STAGES:
        if not (run / stage).exists():  # else it was written before the last kill came
            kills += killed(("run", recipe, "-o", run, "--resume"), run, stage)
            require_whole(run)
    assert kills >= len(STAGES) // 2
    done("run", recipe, "-o", run, "--resume")
    assert require_whole(run) >= {"slim.onnx", "report.html", "report.json"}
    for name in ("masks.safetensors", "weights.safetensors", "masked.onnx", "slim.onnx", "slim.json"):
        assert (run / name).read_bytes() == (digits_run / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0])
def test_a_walk_killed_after_any_time_keeps_whole_files_and_can_be_resumed(seconds: float, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "start").touch()
    killed(("run", recipe, "-o", run), run, "start", delay=seconds)
    (run / "start").unlink()
    require_whole(run)
    done("run", recipe, "-o", run, "--resume")
    assert require_whole(run) >= {"slim.onnx", "report.html", "report.json"}
