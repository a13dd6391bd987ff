"""C-SGD from its training to the slim graph: on the command line, and in a user's own loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from command_line import DIGITS, done, p2d, refused, small_network
from onnx import numpy_helper
from torch import Tensor
from toy_groups import Residual

import prune2deploy
from prune2deploy.data import Split, load_data, normalise
from prune2deploy.errors import InputError
from prune2deploy.groups import COPIED_ROLES, Groups
from prune2deploy.masks import load_masks, widths

SHORT = ("strength=0.3", "vector_strength=1.0", "learning_rate=0.1", "epochs=20")
"""Options with which a small network converges on the digits in seconds."""


def options(*values: str) -> list[str]:
    return [word for value in values for word in ("--option", value)]


def report(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "report.json").read_text())
    return document


def accuracy(model: Path, split: Split) -> float:
    data = load_data("digits")
    rows = torch.arange(len(split))
    images = normalise(split.images(rows), data.mean, data.std).numpy()
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": images})
    return float(np.mean(logits.argmax(1) == split.labels.numpy()))


def require_merged(run: Path) -> None:
    """Require exact copies in the weights and in the masked graph, and the promised widths and MACs in the slim one."""
    from safetensors.numpy import load_file

    groups, masks = Groups.load(run / "groups.json"), load_masks(run / "masks.safetensors")
    merges, weights = load_file(run / "merges.safetensors"), load_file(run / "weights.safetensors")
    assert merges
    for group, kept in merges.items():
        assert np.array_equal(masks[group], kept == np.arange(len(kept)))
        assert not masks[group].all()
        for part in groups[group].of_role(*COPIED_ROLES):
            values = np.moveaxis(weights[part.parameter], part.axis, 0)[part.indices]
            assert values.tobytes() == values[kept].tobytes(), part.parameter
    arrays = {
        name: {one.name: numpy_helper.to_array(one) for one in onnx.load(run / f"{name}.onnx").graph.initializer}
        for name in ("masked", "slim")
    }
    kept = widths(masks)
    for layer in groups.layers:
        if layer.op_type == "Conv":
            assert len(arrays["slim"][layer.weight]) == layer.out_width.at(kept), layer.name
            filters = arrays["masked"][layer.weight]  # its norm is folded in
            assert len(np.unique(filters.reshape(len(filters), -1), axis=0)) == layer.out_width.at(kept), layer.name
    document = report(run)
    planned, slim = document["prune"]["macs"], document["slim"]
    assert slim["macs"] == {"before": planned["dense"], "after": planned["pruned"]}
    assert planned["pruned"] <= 0.5 * planned["dense"]
    assert slim["idle_classes"] == 0
    assert slim["warnings"] == []
    assert all(one["difference"] <= one["limit"] for one in document["verify"]["outputs"])
    assert document["prune"]["method_report"]["deviation"] < 1e-5


def test_a_merge_loses_nothing_and_needs_no_fine_tuning(tmp_path: Path) -> None:
    """Depthwise convolution, concatenation, flattened map; a gain that cannot be trained keeps its group whole."""
    run = tmp_path / "run"
    done("prune", small_network(tmp_path), "--method", "csgd", *options(*SHORT), "--target", "macs=0.5", "-o", run)
    done("export", run)
    require_merged(run)
    section = report(run)["prune"]
    assert section["method_report"]["merged"]["left"] > 0
    assert "stem" not in section["method_report"]["merged"]
    data = load_data("digits")
    before = section["method_history"][-1]["holdout_top1"]
    assert before > 0.85
    assert accuracy(run / "slim.onnx", data.holdout) == before
    assert accuracy(run / "slim.onnx", data.test) == section["accuracy"]["pruned"]["top1"]


@pytest.mark.slow
def test_copies_stay_exact_through_fine_tuning_and_are_merged_all_the_same(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--finetune-epochs", "1", "--target", "macs=0.5", "-o", run)
    done("prune", small_network(tmp_path), "--method", "csgd", *options(*SHORT), *words)
    done("export", run)
    require_merged(run)
    accuracies = report(run)["prune"]["accuracy"]
    assert accuracies["finetuned"] != accuracies["pruned"]
    assert accuracy(run / "slim.onnx", load_data("digits").test) == accuracies["finetuned"]["top1"]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
def test_the_trained_resnet_loses_half_of_its_channels_and_no_accuracy(epochs: int, tmp_path: Path) -> None:
    """Half the width of every group, which is a quarter of the MACs; without fine-tuning and with it."""
    run = tmp_path / "run"
    weights = ("--weights", DIGITS / "weights.safetensors", "--finetune-epochs", epochs)
    chosen = options("strength=0.1", "vector_strength=1.0", "learning_rate=0.1", "epochs=30")
    done("prune", "resnet_digits", *weights, "--method", "csgd", *chosen, "--target", "macs=0.25052", "-o", run)
    done("export", run)
    require_merged(run)
    section, data = report(run)["prune"], load_data("digits")
    assert {one["after"] / one["before"] for one in section["groups"] if one["id"] != "fc"} == {0.5}
    if not epochs:
        assert accuracy(run / "slim.onnx", data.holdout) == section["method_history"][-1]["holdout_top1"]
    stage = "finetuned" if epochs else "pruned"
    assert accuracy(run / "slim.onnx", data.test) == section["accuracy"][stage]["top1"]
    assert section["accuracy"][stage]["top1"] > section["accuracy"]["dense"]["top1"] - 0.01


def test_a_training_that_cannot_converge_is_refused_before_it_starts(tmp_path: Path) -> None:
    arguments = ("prune", small_network(tmp_path), "--method", "csgd", "-o", tmp_path / "run")
    refused(p2d(*arguments, *options("epochs=2")), 2, "would not converge", "--option epochs=")
    assert not (tmp_path / "run" / "masks.safetensors").exists()


def test_in_a_users_own_loop_it_converges_and_the_slim_graph_is_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Residual()
    x = torch.randn(32, 3, 8, 8)
    labels = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    method = prune2deploy.methods.CSGD(strength=1.0, vector_strength=1.0, learning_rate=0.05, momentum=0.9)
    pruner = prune2deploy.Pruner(net, x[:2], method=method, target=prune2deploy.Target(macs=0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    def step() -> Tensor:
        net.train()
        loss = F.cross_entropy(net(x), labels) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        pruner.after_backward()
        optimizer.step()
        pruner.after_step()
        return loss.detach()

    first = step()
    with pytest.raises(InputError, match="has not converged"):
        pruner.finish()
    for _ in range(260):
        last = step()
    assert last < 0.8 * first
    before = net.eval()(x)
    pruned = pruner.finish()
    assert (net.eval()(x) - before).abs().max() <= 1e-4 * before.abs().max()
    section = prune2deploy.export(net, pruned, x[:2], tmp_path / "slim.onnx")
    dense = pruned.groups.cost.macs(pruned.groups.full_widths())
    planned = pruned.groups.cost.macs(widths(pruned.masks))
    assert section["macs"] == {"before": dense, "after": planned}
    assert planned <= 0.5 * dense
    for _ in range(3):
        step()  # fine-tuning: the copies stay exact
    assert prune2deploy.export(net.eval(), pruned, x[:2], tmp_path / "slim.onnx")["macs"]["after"] == planned
