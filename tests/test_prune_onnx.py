"""Pruning ONNX files: a whole run without torch, from files of several makers, and what cannot be done is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import ENVIRONMENT, done, p2d, refused, small_network
from onnx import helper, numpy_helper
from onnx.helper import make_node as node

from prune2deploy.exporter import export_network
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.masking import weights_of
from prune2deploy.graph.model import load_model
from prune2deploy.groups import SILENCED_ROLES, Groups
from prune2deploy.masks import load_masks, widths
from prune2deploy.networks import load_network
from prune2deploy.recipe import load_recipe

FILES = {
    *("recipe.toml", "groups.json", "masks.safetensors", "dense.onnx", "masked.onnx", "slim.onnx", "slim.json"),
    *("report.json", "lock"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with norms, exported with them and with them folded, and samples for it."""
    place = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(2)
    network = load_network(small_network(place), num_classes=10, in_channels=1, input_shape=(1, 8, 8), seed=1)
    for name, fuse in (("model", False), ("folded", True)):
        onnx.save(export_network(network.module, network.example_inputs, fuse=fuse).model, place / f"{name}.onnx")
    images = np.random.default_rng(0).standard_normal((40, 1, 8, 8)).astype(np.float32)
    np.savez(place / "samples.npz", input=images)
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A pruned run of the file; no test may change it."""
    done("prune", folder / "model.onnx", "--target", "macs=0.5", "--round-to", 2, "-o", folder / "run")
    return folder / "run"


def report(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "report.json").read_text())
    return document


def outputs(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def vectors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


# --- what a run holds -------------------------------------------------------------------------------------------------


def test_a_run_holds_its_files_and_its_report_invents_nothing(run: Path, folder: Path) -> None:
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} == FILES
    document = report(run)
    assert set(document) == {"prune", "export", "slim", "verify", "environment", "schema_version", "tool"}
    prune = document["prune"]
    assert prune["network"] == str(folder / "model.onnx")
    assert "accuracy" not in prune
    assert prune["data"] is None
    assert prune["weights"] is None
    assert any("nothing was trained" in line for line in prune["warnings"])
    assert document["slim"]["macs"] == {"before": prune["macs"]["dense"], "after": prune["macs"]["pruned"]}
    assert document["slim"]["parameters"]["after"] == prune["parameters"]["pruned"]
    assert prune["macs"]["pruned"] <= 0.5 * prune["macs"]["dense"]


def test_the_masked_file_is_the_dense_one_with_the_masked_channels_zero(run: Path, folder: Path) -> None:
    dense, masked = vectors(run / "dense.onnx"), vectors(run / "masked.onnx")
    groups, masks = Groups.load(run / "groups.json"), load_masks(run / "masks.safetensors")
    assert sum(not mask.all() for mask in masks.values()) >= 3
    expected = {name: array.copy() for name, array in dense.items()}
    for name, mask in masks.items():
        for member in groups[name].of_role(*SILENCED_ROLES):
            np.moveaxis(expected[member.parameter], member.axis, 0)[member.indices[~mask]] = 0
    assert masked.keys() == dense.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(masked[name], array, err_msg=name)
    images = np.load(folder / "samples.npz")["input"]
    np.testing.assert_allclose(outputs(run / "dense.onnx", images), outputs(folder / "model.onnx", images), atol=1e-5)
    kept, slim = outputs(run / "masked.onnx", images), outputs(run / "slim.onnx", images)
    np.testing.assert_allclose(slim, kept, rtol=1e-4, atol=1e-4 * np.abs(kept).max())


def test_the_masks_are_those_of_the_torch_network(run: Path, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = load_network(f"{folder / 'net.py'}:small", num_classes=10, in_channels=1, input_shape=(1, 8, 8), seed=1)
    torch.save(network.module.state_dict(), tmp_path / "weights.pt")
    arguments = ("--weights", tmp_path / "weights.pt", "--target", "macs=0.5", "--round-to", 2)
    done("prune", f"{folder / 'net.py'}:small", *arguments, "-o", tmp_path / "run")
    of_torch, of_onnx = (load_masks(place / "masks.safetensors") for place in (tmp_path / "run", run))
    assert of_torch.keys() == of_onnx.keys()
    for name, mask in of_torch.items():
        np.testing.assert_array_equal(mask, of_onnx[name], err_msg=name)


def test_the_other_commands_work_on_the_run(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "own"))
    shown = done("inspect", own)
    assert f"{report(own)['prune']['macs']['dense']:,}" in shown
    assert f"{report(own)['prune']['macs']['pruned']:,}" in shown
    done("bench", own, "--iterations", 5, "--sessions", 5)
    assert [one["arm"] for one in report(own)["bench"]["timings"]] == ["dense", "slim"]
    before = (own / "slim.onnx").read_bytes()
    (own / "slim.onnx").unlink()
    assert "slim graph" in done("export", own)
    assert (own / "slim.onnx").read_bytes() == before
    assert report(own)["export"] == {"opset": 18}
    page = tmp_path / "page.html"
    done("report", own, "-o", page)
    text = page.read_text()
    assert "It was not measured in this run." in text
    assert "Top-1" not in text


def test_its_recipe_repeats_the_run_byte_by_byte_and_resumes(run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text((run / "recipe.toml").read_text() + "iterations = 5\n")
    again = tmp_path / "again"
    done("run", tmp_path / "recipe.toml", "-o", again)
    for name in FILES - {"recipe.toml", "report.json", "lock"}:
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    assert load_recipe(again / "recipe.toml").network == load_recipe(run / "recipe.toml").network
    written = (again / "masked.onnx").stat().st_mtime_ns
    done("run", tmp_path / "recipe.toml", "-o", again, "--resume")
    assert (again / "masked.onnx").stat().st_mtime_ns == written


def test_a_run_of_a_torch_network_in_the_same_folder_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    done("prune", f"{folder / 'net.py'}:small", "-o", tmp_path / "run")
    assert (tmp_path / "run" / "weights.safetensors").exists()
    done("prune", folder / "model.onnx", "-o", tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_no_torch_takes_part(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom unittest.mock import patch\nfrom prune2deploy import cli\n"
        "def call(*arguments):\n"
        "    with patch.object(sys, 'argv', ['p2d', *arguments]):\n"
        "        cli.main() if arguments[0] != 'slim' else cli.app(standalone_mode=False)\n"
        "try:\n"
        f"    call('prune', {str(folder / 'model.onnx')!r}, '--method', 'bn', '--recalibrate',"
        f" '--samples', {str(folder / 'samples.npz')!r}, '-o', 'run')\n"
        "except SystemExit as ending:\n    assert not ending.code\n"
        "Path('drop.json').write_text('{\"stem.weight\": [0]}')\n"
        f"call('slim', {str(folder / 'model.onnx')!r}, '--drop', 'drop.json', '-o', 'slim.onnx')\n"
        "assert Path('run/slim.onnx').exists() and Path('slim.onnx').exists()\n"
        "heavy = {'torch', 'onnxscript', 'torchvision', 'timm', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


# --- methods, targets, samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "l1"),
        ("--method", "l2"),
        ("--method", "fpgm"),
        ("--method", "epruner", "--option", "norms=keep", "--option", "scope=all"),
        ("--method", "random", "--option", "seed=3"),
        ("--method", "bn", "--option", "score=rms"),
        ("--method", "bn", "--option", "mean_fold=true"),
        ("--target", "params=0.3"),
    ],
)
def test_every_method_prunes_to_its_target(arguments: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    done("prune", folder / "model.onnx", *arguments, "-o", tmp_path / "run")
    prune = report(tmp_path / "run")["prune"]
    kind = "parameters" if "params=0.3" in arguments else "macs"
    assert prune[kind]["pruned"] <= (0.3 if kind == "parameters" else 0.5) * prune[kind]["dense"]
    assert report(tmp_path / "run")["slim"]["macs"]["after"] == prune["macs"]["pruned"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("taylor", ("'taylor' needs the torch network", "model.onnx", "l1, l2, fpgm or bn")),
        ("epruner", ("'epruner' starts norms anew", "model.onnx", "--option norms=keep")),
    ],
)
def test_a_method_that_needs_training_is_refused(
    method: str, said: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    refused(p2d("prune", folder / "model.onnx", "--method", method, "-o", tmp_path / "run"), 2, *said)
    assert not (tmp_path / "run").exists()


def test_the_fold_of_means_moves_the_masked_file_and_the_proof_holds(folder: Path, tmp_path: Path) -> None:
    for name, fold in (("plain", "false"), ("folded", "true")):
        arguments = ("--method", "bn", "--option", f"mean_fold={fold}")
        done("prune", folder / "model.onnx", *arguments, "-o", tmp_path / name)
    plain, folded = (vectors(tmp_path / name / "masked.onnx") for name in ("plain", "folded"))
    moved = {name for name in plain if not np.array_equal(plain[name], folded[name])}
    assert moved
    assert all("mean" in name or "bias" in name for name in moved)


def test_folded_norms_leave_l1_and_refuse_bn(folder: Path, tmp_path: Path) -> None:
    refused(p2d("prune", folder / "folded.onnx", "--method", "bn", "-o", tmp_path / "run"), 2, "'bn' needs norms")
    done("prune", folder / "folded.onnx", "-o", tmp_path / "run")
    samples = ("--recalibrate", "--samples", folder / "samples.npz")
    outcome = p2d("prune", folder / "folded.onnx", *samples, "-o", tmp_path / "run")
    refused(outcome, 2, "no BatchNormalization", "--recalibrate")
    refused(p2d("prune", folder / "folded.onnx", "--recalibrate", "-o", tmp_path / "new"), 2, "no BatchNormalization")
    assert not (tmp_path / "new").exists()


def test_layers_that_match_keep_stay_whole(folder: Path, tmp_path: Path) -> None:
    done("prune", folder / "model.onnx", "--keep", "stem.*", "-o", tmp_path / "run")
    groups, masks = Groups.load(tmp_path / "run" / "groups.json"), load_masks(tmp_path / "run" / "masks.safetensors")
    held = [group.id for group in groups.groups if any(one.parameter == "stem.weight" for one in group.members)]
    assert held
    assert all(masks[name].all() for name in held)
    outcome = p2d("prune", folder / "model.onnx", "--keep", "stme.*", "-o", tmp_path / "run")
    refused(outcome, 2, "'stme.*' matches no parameter", "stem")


def test_norms_are_measured_anew_on_samples_and_on_images(folder: Path, tmp_path: Path) -> None:
    for name, extra in (("none", ()), ("samples", ("--samples", folder / "samples.npz")), ("images", ())):
        recalibrate = ("--recalibrate",) if name != "none" else ()
        done("prune", folder / "model.onnx", *recalibrate, *extra, "-o", tmp_path / name)
    none, samples, images = (vectors(tmp_path / name / "masked.onnx") for name in ("none", "samples", "images"))
    statistics = {name for name in none if "running" in name}
    assert len(statistics) == 6
    for found in (samples, images):
        assert {name for name in none if not np.array_equal(none[name], found[name])} == statistics
    assert report(tmp_path / "images")["prune"]["data"] == "digits"
    assert report(tmp_path / "samples")["prune"]["samples"] == "samples.npz"
    assert report(tmp_path / "samples")["prune"]["recalibrated_norms"] == 3
    assert report(tmp_path / "samples")["verify"]["cases"] == 9  # real samples besides four kinds at two batches


def test_images_give_the_statistics_that_the_torch_run_gets(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = load_network(f"{folder / 'net.py'}:small", num_classes=10, in_channels=1, input_shape=(1, 8, 8), seed=1)
    torch.save(network.module.state_dict(), tmp_path / "weights.pt")
    source = f"{folder / 'net.py'}:small"
    done("prune", source, "--weights", tmp_path / "weights.pt", "--recalibrate", "--seed", 4, "-o", tmp_path / "torch")
    done("prune", folder / "model.onnx", "--recalibrate", "--seed", 4, "-o", tmp_path / "onnx")
    from safetensors.numpy import load_file

    expected = load_file(tmp_path / "torch" / "weights.safetensors")
    found = vectors(tmp_path / "onnx" / "masked.onnx")
    names = [name for name in found if "running" in name]
    assert len(names) == 6
    for name in names:
        assert np.abs(found[name] - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max(), name


# --- files of other makers --------------------------------------------------------------------------------------------


def anonymous(folder: Path, size: Any, *, batch: Any = "batch") -> Path:
    """Write a file as old exporters do: no node names, numbers for names, weights as Constant nodes, shared vectors."""
    random = np.random.default_rng(0)
    arrays = {"3": random.standard_normal((8, 3, 3, 3)), "5": random.standard_normal((8, 8, 3, 3)), "7": np.zeros(8)}
    arrays |= {"11": random.standard_normal((4, 8, 1, 1))}
    tensors = {name: numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()}
    nodes = [
        node("Constant", [], ["3"], value=tensors["3"]),
        node("Conv", ["0", "3", "7"], ["4"], pads=[1, 1, 1, 1]),
        node("Relu", ["4"], ["6"]),
        node("Conv", ["6", "5", "7"], ["8"], pads=[1, 1, 1, 1]),
        node("Relu", ["8"], ["9"]),
        node("Conv", ["9", "11"], ["12"]),
    ]
    made = helper.make_graph(
        nodes,
        "torch-jit-export",
        [helper.make_tensor_value_info("0", onnx.TensorProto.FLOAT, [batch, 3, *size])],
        [helper.make_tensor_value_info("12", onnx.TensorProto.FLOAT, [batch, 4, *size])],
        [tensors[name] for name in ("5", "7", "11")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    onnx.checker.check_model(model, full_check=True)
    path = folder / "anonymous.onnx"
    onnx.save(model, path)
    return path


def test_a_file_without_names_is_pruned_and_its_groups_name_its_initializers(tmp_path: Path) -> None:
    done("prune", anonymous(tmp_path, (6, 6)), "-o", tmp_path / "run")
    groups = Groups.load(tmp_path / "run" / "groups.json")
    names = {member.parameter for group in groups.groups for member in group.members}
    assert names <= vectors(tmp_path / "run" / "dense.onnx").keys()
    assert {"3", "5", "11", "7"} < names  # the vector that both layers had in common is theirs apart
    assert len(groups.prunable) == 2
    assert report(tmp_path / "run")["slim"]["macs"]["after"] == report(tmp_path / "run")["prune"]["macs"]["pruned"]


def test_dynamic_sizes_want_a_shape_for_macs_and_none_for_parameters(tmp_path: Path) -> None:
    source = anonymous(tmp_path, ("height", "width"))
    refused(p2d("prune", source, "-o", tmp_path / "run"), 2, "MACs", "--input", "--target params")
    done("prune", source, "--target", "params=0.5", "-o", tmp_path / "params")
    done("prune", source, "--input", "0:3,10,12", "-o", tmp_path / "macs")
    assert report(tmp_path / "macs")["prune"]["macs"]["dense"] == 10 * 12 * (8 * 27 + 8 * 72 + 4 * 8)
    dims = onnx.load(tmp_path / "macs" / "slim.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in dims][2:] == ["height", "width"]
    refused(p2d("prune", source, "--input", "0:4,10,12", "-o", tmp_path / "run"), 2, "4x10x12", "3x?x?")


def test_a_fixed_batch_is_pruned_and_verified_on_whole_batches_of_samples(tmp_path: Path) -> None:
    source = anonymous(tmp_path, (6, 6), batch=4)
    images = np.random.default_rng(0).standard_normal((6, 3, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", **{"0": images})
    done("prune", source, "--samples", tmp_path / "samples.npz", "-o", tmp_path / "run")
    assert report(tmp_path / "run")["verify"]["cases"] == 5
    np.savez(tmp_path / "few.npz", **{"0": images[:3]})
    refused(p2d("prune", source, "--samples", tmp_path / "few.npz", "-o", tmp_path / "r"), 2, "4 samples", "3 were")


@pytest.mark.parametrize("name", ["nanodet_m_320", "ultraface_rfb_320"])
def test_a_trained_detector_is_pruned_with_proof(name: str, data_dir: Path, tmp_path: Path) -> None:
    done("prune", data_dir / "onnx" / f"{name}.onnx", "--target", "macs=0.7", "--round-to", 4, "-o", tmp_path / "run")
    document = report(tmp_path / "run")
    assert document["slim"]["macs"]["after"] <= 0.7 * document["slim"]["macs"]["before"]
    assert all(one["difference"] <= one["limit"] for one in document["verify"]["outputs"])
    groups = find_groups(load_model(tmp_path / "run" / "dense.onnx"))
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    assert document["prune"]["macs"]["pruned"] == groups.cost.macs(groups.full_widths() | widths(masks))
    assert weights_of(load_model(tmp_path / "run" / "masked.onnx")).keys() >= {
        member.parameter for group in groups.groups for member in group.members
    }


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_needs_the_torch_network_is_refused(folder: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "run")
    model = folder / "model.onnx"
    refused(p2d("prune", model, "--weights", "w.safetensors", *out), 2, "--weights", "its own weights")
    refused(p2d("prune", model, "--finetune-epochs", 2, *out), 2, "cannot be fine-tuned")
    refused(p2d("prune", folder / "none.onnx", *out), 2, "none.onnx", "does not exist")
    refused(p2d("prune", model, "--target", "macs=0.0001", *out), 2, "smallest reachable")
    source = f"{folder / 'net.py'}:small"
    refused(p2d("prune", source, "--samples", folder / "samples.npz", *out), 2, "--samples is for ONNX files")
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_run_never_overwrites_its_own_source(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "own"))
    before = (own / "dense.onnx").read_bytes()
    refused(p2d("prune", own / "dense.onnx", "-o", own), 2, "would be overwritten", "-o")
    assert (own / "dense.onnx").read_bytes() == before


def test_samples_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    good = np.zeros((4, 1, 8, 8), np.float32)
    cases: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...]]] = {
        "name": ({"image": good}, ("no array 'input'", "image")),
        "shape": ({"input": good[:, :, :7]}, ("[4, 1, 7, 8]", "1x8x8")),
        "rank": ({"input": good[0]}, ("[1, 8, 8]", "1x8x8")),
        "pixels": ({"input": good.astype(np.uint8)}, ("uint8", "prepare them")),
        "one": ({"input": good[:1]}, ("2 samples or more",)),
        "pickle": ({"input": np.array([{}], dtype=object)}, ("not a .npz file of arrays",)),
    }
    for name, (arrays, says) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        outcome = p2d("prune", folder / "model.onnx", "--samples", tmp_path / f"{name}.npz", "-o", tmp_path / "run")
        refused(outcome, 2, *says)
    (tmp_path / "text.npz").write_text("no archive")
    for path, says in ((tmp_path / "text.npz", "not a .npz"), (tmp_path / "none.npz", "does not exist")):
        refused(p2d("prune", folder / "model.onnx", "--samples", path, "-o", tmp_path / "run"), 2, says)
    np.save(tmp_path / "array.npy", good)
    outcome = p2d("prune", folder / "model.onnx", "--samples", tmp_path / "array.npy", "-o", tmp_path / "run")
    refused(outcome, 2, "does not end in .npz")


def test_images_of_other_channels_are_refused(tmp_path: Path) -> None:
    source = anonymous(tmp_path, (8, 8))
    outcome = p2d("prune", source, "--recalibrate", "-o", tmp_path / "run")
    refused(outcome, 2, "'digits' have 1 channels", "3x8x8", "--samples")
