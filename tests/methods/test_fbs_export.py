"""FBS as ONNX and on the command line: standard operators, torch's numbers, and reports that call nothing smaller."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from command_line import done, p2d, refused, small_network
from torch import Tensor, nn
from toy_groups import TOYS, randomise

from methods.chains import SMALL, Chain, chain_groups, gated
from prune2deploy.budget import Target
from prune2deploy.errors import InputError
from prune2deploy.exporter import export_network, require_agreement
from prune2deploy.findings import Findings
from prune2deploy.graph.model import save_model
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.verify import verify
from prune2deploy.groups import Groups
from prune2deploy.methods.fbs import FBS
from prune2deploy.pipeline import normal_form, prune
from prune2deploy.pruner import Pruner, export
from prune2deploy.recipe import make_recipe
from prune2deploy.screen import loud
from prune2deploy.train.boosting import boosted_layers

QUICK = ("--option", "epochs=1", "--option", "last_epochs=1", "--target", "macs=0.6")


def networks(name: str) -> tuple[nn.Module, Groups, tuple[int, ...]]:
    if name == "chain":
        return randomise(Chain(SMALL, 3)), chain_groups(SMALL, 3), (2, 3, 8, 8)
    make, make_groups, shape = TOYS[name]
    return randomise(make()), make_groups(), shape


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("name", "shift"), [("chain", "boosted"), ("residual", "masked"), ("mobile", "masked")])
def test_the_exported_graph_has_standard_operators_a_dynamic_batch_and_torchs_numbers(
    name: str, shift: Any, tmp_path: Path
) -> None:
    net, groups, shape = networks(name)
    gated(net, groups, FBS(shift=shift, predictor="kaiming"))
    model = export_network(net, (torch.randn(shape),), fuse=True).model
    assert {(node.domain, node.op_type) for node in model.graph.node if node.domain} == set()
    assert "TopK" in {node.op_type for node in model.graph.node}
    save_model(model, tmp_path / "gated.onnx")
    for batch in (1, 2, 5):
        x = torch.randn((batch, *shape[1:]), generator=torch.Generator().manual_seed(batch))
        assert require_agreement(net, tmp_path / "gated.onnx", (x,)) < 1e-5
    assert require_agreement(net, tmp_path / "gated.onnx", (torch.zeros(shape),)) < 1e-5, "all saliencies are relu(rho)"


def test_onnx_runtime_and_torch_agree_where_saliencies_tie(tmp_path: Path) -> None:
    """At the limit and at 0, with Phi = 0 so that ties are exact: both suppress all that tie."""
    net, groups, shape = networks("chain")
    gated(net, groups, FBS(predictor="zero"))
    gate = boosted_layers(net)["convs.0"]
    gate.activate(4)
    with torch.no_grad():
        gate.predictor.bias.copy_(torch.tensor([3.0, 2, 1, 1, 1, 0.5, 0, 0, -1, -1, 0, 0]))
        boosted_layers(net)["convs.1"].predictor.bias.fill_(-1.0)  # all of them 0
    save_model(export_network(net, (torch.randn(shape),), fuse=True).model, tmp_path / "gated.onnx")
    x = torch.randn((3, *shape[1:]))
    assert require_agreement(net, tmp_path / "gated.onnx", (x,)) < 1e-6
    seen: list[Tensor] = []
    net.get_submodule("convs.1").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(x)
    active = (seen[0].flatten(2).abs().amax(2) > 0).nonzero()[:, 1].unique().tolist()
    assert set(active) <= {0, 1}, "three tie for the third and fourth place"
    outputs = session(tmp_path / "gated.onnx").run(None, {"input": x.numpy()})[0]
    assert np.abs(outputs - outputs[0]).max() <= 1e-6, "the second layer lets nothing through"


def test_slimming_a_gated_graph_removes_nothing_and_proves_it(tmp_path: Path) -> None:
    net, groups, shape = networks("mobile")
    gated(net, groups)
    save_model(normal_form(export_network(net, (torch.randn(shape),), fuse=True).model), tmp_path / "masked.onnx")
    slimmed = remove_dead_channels(onnx.load(tmp_path / "masked.onnx"))
    assert slimmed.removed_channels == 0
    assert slimmed.opaque == {}
    save_model(slimmed.model, tmp_path / "slim.onnx")
    assert verify(tmp_path / "masked.onnx", tmp_path / "slim.onnx").cases > 3


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A small network pruned by FBS and exported, and what the two commands said."""
    folder = tmp_path_factory.mktemp("fbs")
    run = folder / "run"
    pruned = done("prune", small_network(folder), "--method", "fbs", *QUICK, "-o", run)
    return run, pruned, done("export", run)


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def test_the_walk_says_loudly_that_nothing_was_removed_and_shows_the_mean_apart(walked: tuple[Path, str, str]) -> None:
    run, *outputs = walked
    mean = report(run)["prune"]["method_report"]["mean_macs"]
    for said in outputs:
        assert "NOTHING WAS REMOVED" in said
        plain = " ".join(said.split())
        assert "keeps gates in the network and removes nothing: every graph does all MACs" in plain
        assert f"{mean['mean']:,.0f} MACs an image, {mean['share']:.1%} of the dense network's (mean of" in plain
    assert 0 < mean["share"] <= 0.6
    assert len(loud(Findings(run))) == 1, "which --strict takes for a failure"


def test_what_the_report_calls_pruned_is_static_and_the_slim_graph_is_what_was_promised(
    walked: tuple[Path, str, str],
) -> None:
    run = walked[0]
    found = report(run)
    prune, slim = found["prune"], found["slim"]
    assert prune["macs"]["pruned"] == prune["macs"]["dense"]
    assert all(group["before"] == group["after"] for group in prune["groups"])
    assert slim["macs"]["before"] == slim["macs"]["after"]
    assert slim["macs"]["after"] == prune["macs"]["dense"] + prune["method_report"]["added_macs"]
    assert slim["warnings"] == ["nothing was removed: no channel of the graph is dead"]
    assert slim["removed_channels"] == 0
    assert Findings(run).change("macs") == (prune["macs"]["dense"], slim["macs"]["after"])
    before, after = Findings(run).change("parameters")
    assert before is not None
    assert after is not None
    assert after > before, "the gates' parameters come on top"


def test_dense_and_masked_graphs_are_exported_and_agree_with_torch(walked: tuple[Path, str, str]) -> None:
    run = walked[0]
    found = report(run)
    assert set(found["export"]["torch_difference"]) == {"dense", "masked"}
    assert max(found["export"]["torch_difference"].values()) < 1e-5
    assert all(one["difference"] <= one["limit"] for one in found["verify"]["outputs"])
    kinds = {
        name: [node.op_type for node in onnx.load(run / f"{name}.onnx").graph.node] for name in ("dense", "masked")
    }
    assert "TopK" not in kinds["dense"]
    assert kinds["masked"].count("TopK") == len(found["prune"]["method_report"]["active"])


def test_the_page_has_the_mean_among_its_warnings(walked: tuple[Path, str, str], tmp_path: Path) -> None:
    done("report", walked[0], "-o", tmp_path / "page.html")
    assert "runtime that skips suppressed channels would do" in (tmp_path / "page.html").read_text()


def test_inspecting_the_run_counts_the_predictors_and_promises_no_removal(walked: tuple[Path, str, str]) -> None:
    found = json.loads(done("inspect", walked[0], "--json"))
    assert found["macs"]["before"] == found["macs"]["after"] == report(walked[0])["slim"]["macs"]["after"]
    assert sum(row["name"].endswith(".predictor") for row in found["layers"]) == 2


@pytest.mark.slow
def test_static_walks_to_a_smaller_plain_network_that_says_it_is_not_fbs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    spec = small_network(tmp_path)
    said = done("prune", spec, "--method", "fbs", *QUICK, "--option", "static=true", "-o", run) + done("export", run)
    assert " ".join(said.split()).count("static=true is another method (static), not FBS") == 2
    found = report(run)
    assert found["slim"]["macs"]["after"] == found["prune"]["macs"]["pruned"] < found["prune"]["macs"]["dense"]
    assert found["slim"]["removed_channels"] > 0
    assert "mean_macs" not in found["prune"]["method_report"]
    kinds = {node.op_type for node in onnx.load(run / "slim.onnx").graph.node}
    assert "TopK" not in kinds


def test_what_fbs_cannot_do_is_refused_in_one_line_and_leaves_no_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = p2d("prune", small_network(tmp_path), "--method", "fbs", "--target", "params=0.5", "-o", run)
    refused(outcome, 2, "'fbs' keeps all parameters")
    assert not (run / "report.json").exists()


def test_a_control_from_scratch_is_refused_because_no_masks_make_the_network_smaller(tmp_path: Path) -> None:
    recipe = make_recipe({"network": small_network(tmp_path), "method": "fbs", "from_scratch": True})
    with pytest.raises(InputError, match="from_scratch needs a network that masks make smaller, and 'fbs' has none"):
        prune(recipe, tmp_path / "run")


def test_in_somebodys_own_loop_the_gates_are_trained_lowered_and_exported(tmp_path: Path) -> None:
    net, _, shape = networks("residual")
    x = torch.randn((8, *shape[1:]))
    pruner = Pruner(net, x[:2], method=FBS(epochs=1, last_epochs=1, strength=0.01), target=Target(macs=0.6))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(6):
        net.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), torch.arange(8) % 5)
        penalty = pruner.penalty()
        assert isinstance(penalty, Tensor)
        assert penalty.requires_grad
        (loss + penalty).backward()
        pruner.after_backward()
        optimizer.step()
        pruner.after_step()
        pruner.epoch_end()
    pruned = pruner.finish([(x, torch.arange(8) % 5)])
    assert pruned.report["mean_macs"]["share"] <= 0.6
    found = export(net, pruned, x[:2], tmp_path / "gated.onnx")
    assert found["removed_channels"] == 0
    assert require_agreement(net.eval(), tmp_path / "gated.onnx", (x,)) < 1e-5
