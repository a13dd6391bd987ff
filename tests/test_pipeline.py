"""The whole walk, on real files: what a run holds, that it can be repeated and resumed, and every network."""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import ENVIRONMENT, done, p2d, refused, small_network, write_small_recipe
from onnx import numpy_helper

from prune2deploy import narrow
from prune2deploy.apply import apply_masks, weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.data import load_data, normalise
from prune2deploy.exporter import export_network
from prune2deploy.files import sha256
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.verify import verify
from prune2deploy.groups import SILENCED_ROLES, Groups
from prune2deploy.masks import load_masks, widths
from prune2deploy.methods import load_method
from prune2deploy.networks import NETWORKS, load_network, load_weights
from prune2deploy.pipeline import NARROW, normal_form, prune
from prune2deploy.recipe import load_recipe

FILES = {
    *("recipe.toml", "groups.json", "masks.safetensors", "weights.safetensors", "dense.safetensors", "analysis.onnx"),
    "dense.onnx",
    *("masked.onnx", "slim.onnx", "slim.json", "source_map.json", "report.json", "report.html", "log.jsonl", "lock"),
    "samples/bench.json",
}
REPEATED = FILES - {"report.json", "report.html", "log.jsonl", "lock", "samples/bench.json"}
"""Files that the same recipe writes again byte by byte."""


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """A copy of a run that a test may change."""
    return Path(shutil.copytree(small, tmp_path / "own"))


def report(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "report.json").read_text())
    return document


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def outputs(model: Path | bytes, images: np.ndarray) -> np.ndarray:
    source = str(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": images})[0])


def counted_macs(path: Path) -> int:
    """Count the multiply-adds of convolutions and linear layers for one sample, by hand."""
    model = onnx.load(path)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.value_info
    }
    for value in model.graph.output:
        shapes[value.name] = [1, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])]
    arrays = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += int(np.prod(arrays[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "Gemm":
            total += int(np.prod(arrays[node.input[1]]))
        else:
            assert node.op_type not in ("MatMul", "ConvTranspose", "Einsum"), "not counted here"
    return total


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_data("digits")
    split = data.test
    rows = torch.arange(len(split))
    return normalise(split.images(rows), data.mean, data.std).numpy(), split.labels.numpy()


# --- what a run holds -------------------------------------------------------------------------------------------------


def test_a_run_holds_every_file_of_the_contract_and_no_leftover(run: Path) -> None:
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert found == FILES


def test_the_report_has_every_section_and_its_schema(run: Path) -> None:
    document = report(run)
    assert document["schema_version"] == 1
    assert document["tool"]["name"] == "prune2deploy"
    assert set(document) == {*("prune", "export", "slim", "verify", "bench", "environment"), "schema_version", "tool"}
    assert document["export"]["opset"] == 18
    assert document["slim"]["opaque"] == {}
    assert document["prune"]["weights_sha256"] is not None
    assert document["environment"]["packages"]["torch"]


def test_slim_computes_what_masked_does_on_real_digits(run: Path) -> None:
    images, _ = real_digits()
    masked, slim = (outputs(run / f"{name}.onnx", images) for name in ("masked", "slim"))
    assert np.abs(masked - slim).max() <= 1e-4 * np.abs(masked).max()
    section = report(run)["verify"]
    assert [one["name"] for one in section["outputs"]] == ["output"]
    assert all(one["difference"] <= one["limit"] for one in section["outputs"])
    assert section["cases"] == 9  # four kinds of made input at two batches, and real samples


@pytest.mark.parametrize(("graph", "column"), [("dense", "dense"), ("masked", "dense"), ("slim", "pruned")])
def test_macs_are_those_that_were_promised(run: Path, graph: str, column: str) -> None:
    section = report(run)["prune"]["macs"]
    assert counted_macs(run / f"{graph}.onnx") == section[column]
    assert section["pruned"] <= 0.5 * section["dense"]
    assert report(run)["slim"]["macs"] == {"before": section["dense"], "after": section["pruned"]}
    assert sum(layer["macs_after"] for layer in report(run)["prune"]["layers"]) == section["pruned"]


def test_widths_are_rounded_as_asked(run: Path) -> None:
    for name, array in initializers(run / "slim.onnx").items():
        if array.ndim == 4:
            assert array.shape[0] % 8 == 0, name


def test_the_accuracies_are_those_of_the_graphs(run: Path) -> None:
    accuracy = report(run)["prune"]["accuracy"]
    images, labels = real_digits()
    for graph, stage in (("dense", "dense"), ("masked", "finetuned"), ("slim", "finetuned")):
        top1 = float(np.mean(outputs(run / f"{graph}.onnx", images).argmax(1) == labels))
        assert abs(top1 - accuracy[stage]["top1"]) <= 1.5 / len(labels), graph
        assert accuracy[stage]["images"] == len(labels)
    assert accuracy["pruned"]["top1"] < accuracy["finetuned"]["top1"] < accuracy["dense"]["top1"] == 590 / 597


def test_fine_tuning_is_logged_epoch_by_epoch(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["loss"] < lines[0]["loss"]
    assert report(run)["prune"]["history"] == lines


def test_the_raw_timings_are_those_behind_the_medians(run: Path) -> None:
    samples = json.loads((run / "samples" / "bench.json").read_text())
    section = report(run)["bench"]
    for timing in [*section["timings"], section["control_timing"]]:
        times = [time for times in samples[timing["arm"]] for time in times]
        assert np.median(times) == pytest.approx(timing["median_ms"], rel=1e-3)
        assert len(samples[timing["arm"]]) == 5


def test_masked_channels_are_silent_in_the_weights_and_kept_ones_are_not(run: Path) -> None:
    groups, masks = Groups.load(run / "groups.json"), load_masks(run / "masks.safetensors")
    weights = weights_of(loaded(run))
    assert set(masks) == {group.id for group in groups.groups}
    removed = 0
    for group in groups.groups:
        assert masks[group.id].shape == (group.size,)
        for member in group.of_role(*SILENCED_ROLES):
            array = np.moveaxis(weights[member.parameter], member.axis, 0)
            assert not array[member.indices[~masks[group.id]]].any()
            if member.role == "filter":
                kept = array[member.indices[masks[group.id]]]
                assert kept.reshape(len(kept), -1).any(axis=1).all()
        removed += int((~masks[group.id]).sum())
    assert removed > 0


def loaded(run: Path) -> torch.nn.Module:
    recipe = load_recipe(run / "recipe.toml")
    data = load_data(recipe.data)
    network = load_network(recipe.network, num_classes=data.num_classes, input_shape=data.input_shape)
    load_weights(network.module, run / "weights.safetensors")
    return network.module


@pytest.mark.parametrize("which", ["run", "small"])
def test_the_masked_torch_network_is_the_slim_graph(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    images, _ = real_digits()
    with torch.no_grad():
        expected = loaded(folder)(torch.from_numpy(images)).numpy()
    difference = np.abs(expected - outputs(folder / "slim.onnx", images)).max()
    assert difference <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("which", ["run", "small"])
def test_the_dense_graph_is_the_network_as_it_came(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    recipe = load_recipe(folder / "recipe.toml")
    network = load_network(recipe.network, num_classes=10, input_shape=(1, 8, 8), seed=recipe.seed)
    if recipe.weights:
        load_weights(network.module, Path(recipe.weights))
    images, _ = real_digits()
    with torch.no_grad():
        expected = network.module(torch.from_numpy(images)).numpy()
    difference = np.abs(expected - outputs(folder / "dense.onnx", images)).max()
    assert difference <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("which", ["run", "small"])
def test_slim_json_refits_masked_to_slim(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    document = json.loads((folder / "slim.json").read_text())
    masked, slim = initializers(folder / "masked.onnx"), initializers(folder / "slim.onnx")
    assert document["schema_version"] == 1
    assert set(slim) <= set(masked)
    changed = set()
    for name, array in slim.items():
        refitted = masked[name]
        for axis, indices in document["initializers"].get(name, {}).items():
            assert indices == sorted(set(indices))
            refitted = refitted.take(indices, axis=int(axis))
            changed.add(name)
        if np.array_equal(refitted, array):
            continue
        assert refitted.shape == array.shape
        assert array.ndim == 1, f"{name} differs although nothing is folded into weights"  # constants go to biases
    assert changed == set(document["initializers"])
    if which == "run":  # behind a ReLU every silenced channel is 0, so nothing was folded at all
        for name, axes in document["initializers"].items():
            refitted = masked[name]
            for axis, indices in axes.items():
                refitted = refitted.take(indices, axis=int(axis))
            np.testing.assert_array_equal(refitted, slim[name])


def test_slim_json_names_the_values_as_they_are_in_the_slim_graph(run: Path) -> None:
    inferred = onnx.shape_inference.infer_shapes(onnx.load(run / "slim.onnx")).graph.value_info
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inferred}
    values = json.loads((run / "slim.json").read_text())["values"]
    assert values
    for name, axes in values.items():
        for axis, indices in axes.items():
            assert shapes[name][int(axis)] == len(indices), name


def test_no_channel_is_kept_in_the_slim_graph_without_a_reason(run: Path, small: Path) -> None:
    assert report(run)["slim"]["idle_classes"] == 0
    assert report(small)["slim"]["idle_classes"] == 0


# --- again, and on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [pytest.param("run", marks=pytest.mark.slow), "small"])
def test_the_runs_recipe_repeats_it_byte_by_byte(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    done("run", folder / "recipe.toml", "-o", tmp_path / "again")
    for name in sorted(REPEATED):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_resume_of_a_finished_run_only_writes_the_page(own: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*") if path.is_file()}
    done("run", own / "recipe.toml", "-o", own, "--resume")
    touched = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert touched <= {"report.html", "lock"}
    assert "report.html" in touched


SLOW_LOSSES = (pytest.param(name, marks=pytest.mark.slow) for name in ("dense.onnx", "masked.onnx", "slim.json"))


@pytest.mark.parametrize("lost", ["slim.onnx", *SLOW_LOSSES])
def test_resume_goes_on_after_the_last_whole_step(own: Path, lost: str) -> None:
    expected = {name: (own / name).read_bytes() for name in REPEATED}
    (own / lost).unlink()
    masks = (own / "masks.safetensors").stat().st_mtime_ns
    done("run", own / "recipe.toml", "-o", own, "--resume")
    assert {name: (own / name).read_bytes() for name in REPEATED} == expected
    assert (own / "masks.safetensors").stat().st_mtime_ns == masks
    assert set(report(own)) >= {"prune", "export", "slim", "verify", "bench"}


def test_resume_refuses_a_run_of_another_recipe(own: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    other = write_small_recipe(tmp_path / "other", 'keep = ["point.*"]')
    refused(p2d("run", other, "-o", own, "--resume"), 2, str(own), "another recipe", "--resume")
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_resume_refuses_a_run_of_files_that_have_changed(tmp_path: Path) -> None:
    network = small_network(tmp_path)
    call = ("prune", network, "-o", tmp_path / "run")
    done(*call)
    assert report(tmp_path / "run")["prune"]["contents"] == {"network": sha256(tmp_path / "net.py")}
    done(*call, "--resume")
    with (tmp_path / "net.py").open("a") as code:
        code.write("# it may compute something else now\n")
    refused(p2d(*call, "--resume"), 2, str(tmp_path / "run"), "files that have changed", "--resume")


def test_resume_with_another_measurement_only_measures_anew(own: Path) -> None:
    before = {name: (own / name).stat().st_mtime_ns for name in ("masks.safetensors", "dense.onnx", "slim.onnx")}
    recipe = own.parent / "other.toml"
    recipe.write_text((own / "recipe.toml").read_text().replace("iterations = 20", "iterations = 22"))
    done("run", recipe, "-o", own, "--resume")
    assert {name: (own / name).stat().st_mtime_ns for name in before} == before
    assert report(own)["bench"]["iterations"] == 22
    assert load_recipe(own / "recipe.toml").bench.iterations == 22


def test_a_folder_of_other_files_is_left_alone(small: Path, tmp_path: Path) -> None:
    for name in ("checkpoints/best.pt", "tensorboard/events", "samples/some.json", "recipe.toml", "log.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    network = load_recipe(small / "recipe.toml").network
    for call in (("prune", network), ("run", small / "recipe.toml"), ("prune", small / "dense.onnx")):
        refused(p2d(*call, "-o", tmp_path), 2, str(tmp_path), "not a run", "other files", "another -o")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_without_its_lock_is_one_all_the_same(own: Path) -> None:
    (own / "lock").unlink()
    done("prune", load_recipe(own / "recipe.toml").network, "--target", "macs=0.8", "-o", own)


def test_what_a_user_keeps_beside_the_narrow_network_stays(own: Path) -> None:
    done("export", own, "--torch")
    (own / "narrow" / "finetuned.pt").write_text("precious")
    (own / "narrow" / "logs").mkdir()
    done("export", own, "--torch")
    assert {path.name for path in (own / "narrow").iterdir()} >= {*NARROW, "finetuned.pt", "logs"} - {"groups.json"}
    done("prune", load_recipe(own / "recipe.toml").network, "-o", own)
    assert {path.name for path in (own / "narrow").iterdir()} == {"finetuned.pt", "logs"}


def test_what_the_narrow_network_is_written_as_is_what_is_removed() -> None:
    assert set(NARROW) == {narrow.MANIFEST, narrow.WEIGHTS, narrow.GROUPS}


def test_pruning_anew_leaves_nothing_of_the_earlier_run(own: Path) -> None:
    done("prune", load_recipe(own / "recipe.toml").network, "--target", "macs=0.8", "-o", own)
    found = {str(path.relative_to(own)) for path in own.rglob("*") if path.is_file()}
    later = {"dense.onnx", "masked.onnx", "slim.onnx", "slim.json", "report.html", "samples/bench.json"}
    assert not found & later
    assert set(report(own)) == {"prune", "environment", "schema_version", "tool"}
    assert load_recipe(own / "recipe.toml").target == "macs=0.8"
    assert "log.jsonl" not in found, "the log of a fine-tuning that this run did not do"


HOLDER = """
import fcntl, sys
stream = open(sys.argv[1], "w")
fcntl.flock(stream, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(own: Path) -> Iterator[Path]:
    """A run that another process works in."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, own / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield own
        holder.communicate()


@pytest.mark.parametrize("arguments", [("export", "RUN"), ("prune", "resnet_digits", "-o", "RUN")])
def test_a_run_that_another_process_works_in_is_left_alone(held: Path, arguments: tuple[str, ...]) -> None:
    before = {path: path.stat().st_mtime_ns for path in held.rglob("*") if path.name != "lock"}
    outcome = p2d(*(held if word == "RUN" else word for word in arguments))
    refused(outcome, 2, str(held), "another p2d")
    assert {path: path.stat().st_mtime_ns for path in held.rglob("*") if path.name != "lock"} == before


def test_the_lock_is_given_back(own: Path) -> None:
    with (own / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- methods, targets and options -------------------------------------------------------------------------------------

WALKS = {
    "bn with mean fold": ("--method", "bn", "--option", "score=std", "--option", "mean_fold=true"),
    "random to parameters, keep": ("--method", "random", "--target", "params=0.5", "--keep", "stem*"),
    "taylor": ("--method", "taylor", "--option", "images=128"),
    "epruner": ("--method", "epruner", "--option", "scope=all"),
    "l1, rounded": ("--round-to", "4", "--recalibrate", "--seed", "3"),
}


@pytest.mark.parametrize("options", WALKS.values(), ids=WALKS)
def test_every_method_walks_the_small_network(options: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("prune", small_network(tmp_path), *options, "-o", run)
    done("export", run)
    document = report(run)
    planned, slim = document["prune"]["macs"], document["slim"]
    assert slim["macs"] == {"before": planned["dense"], "after": planned["pruned"]}
    assert counted_macs(run / "slim.onnx") == planned["pruned"] < planned["dense"]
    assert slim["idle_classes"] == 0
    target = document["prune"]["target"]
    cost = document["prune"]["macs" if target["kind"] == "macs" else "parameters"]
    assert cost["pruned"] <= target["share"] * cost["dense"]
    kept = document["prune"]["kept_groups"]
    assert ("kept by --keep 'stem*'" in kept.values()) == ("--keep" in options)
    if "--keep" in options:
        assert initializers(run / "slim.onnx")["stem.weight"].shape[0] == 8
    if "--round-to" in options:
        found, full = initializers(run / "slim.onnx"), initializers(run / "dense.onnx")
        weights = [name for name, array in found.items() if array.ndim == 4]
        assert all(len(found[name]) % 4 == 0 or len(found[name]) == len(full[name]) for name in weights)


def test_mean_fold_keeps_the_masks_and_changes_what_reads_the_removed_channels(tmp_path: Path) -> None:
    spec = small_network(tmp_path)
    for name, option in (("plain", "mean_fold=false"), ("folded", "mean_fold=true")):
        done("prune", spec, "--method", "bn", "--option", option, "-o", tmp_path / name)
    plain, folded = tmp_path / "plain", tmp_path / "folded"
    assert (plain / "masks.safetensors").read_bytes() == (folded / "masks.safetensors").read_bytes()
    assert (plain / "analysis.onnx").read_bytes() == (folded / "analysis.onnx").read_bytes()
    assert (plain / "weights.safetensors").read_bytes() != (folded / "weights.safetensors").read_bytes()


def test_the_flattened_map_is_pruned_with_its_channels(small: Path) -> None:
    head = initializers(small / "slim.onnx")["head.weight"]
    kept = json.loads((small / "slim.json").read_text())["initializers"]["head.weight"]["1"]
    assert head.shape == (10, len(kept))
    assert len(kept) < 12 * 16
    assert len(kept) % 16 == 0, "a channel of the flattened map is 16 columns of the classifier"


# --- every network ----------------------------------------------------------------------------------------------------

QUICK = ("resnet8",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_every_builtin_network_slims_to_exactly_what_was_promised(name: str) -> None:
    info = NETWORKS[name]
    channels, height, width = info.input_shape
    shape = (channels, min(height, 64), min(width, 64))  # widths, not sizes of images, are what is tested
    network = load_network(name, num_classes=info.num_classes, input_shape=shape)
    groups = find_groups(export_network(network.module, network.example_inputs, fuse=False).model)
    masks = load_method("random").plan(weights_of(network.module), groups, Budget(Target("macs", 0.5))).keep
    apply_masks(network.module, groups, masks)
    masked = normal_form(export_network(network.module, network.example_inputs, fuse=True).model)
    slimmed = remove_dead_channels(masked)
    verify(masked.SerializeToString(), slimmed.model.SerializeToString())
    found = slimmed.report()
    full, kept = groups.full_widths(), widths(masks)
    assert found["macs"] == {"before": groups.cost.of("macs", full), "after": groups.cost.of("macs", kept)}
    assert 0.49 < groups.cost.of("macs", kept) / groups.cost.of("macs", full) <= 0.5
    assert found["idle_classes"] == 0
    assert found["opaque"] == {}
    assert remove_dead_channels(slimmed.model).removed_channels == 0


@pytest.fixture(scope="session")
def cifar_recipe(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cifar") / "recipe.toml"
    path.write_text(
        f'network = "resnet20"\ndata = "cifar10:{data_dir / "cifar10"}"\n'
        f'weights = "{data_dir / "checkpoints" / "cifar10_resnet20.safetensors"}"\n'
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_trained_resnet20_on_cifar10_walks_to_exactly_what_was_promised(
    cifar_recipe: Path, round_to: int, tmp_path: Path
) -> None:
    recipe = load_recipe(cifar_recipe).model_copy(update={"round_to": round_to})
    prune(recipe, tmp_path / "run")
    done("export", tmp_path / "run")
    document = report(tmp_path / "run")
    planned = document["prune"]["macs"]
    assert planned["dense"] == 40_551_040  # of the zero-padded ResNet-20 (He et al., 2016: 0.04 G)
    assert counted_macs(tmp_path / "run" / "slim.onnx") == planned["pruned"] <= 0.5 * planned["dense"]
    assert document["slim"]["idle_classes"] == 0
    assert all(one["difference"] <= one["limit"] for one in document["verify"]["outputs"])
    assert document["prune"]["accuracy"]["dense"]["top1"] > 0.9
    widest = [one.shape[0] for one in initializers(tmp_path / "run" / "slim.onnx").values() if one.ndim == 4]
    assert all(width % round_to == 0 for width in widest)
