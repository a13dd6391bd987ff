"""Pruning in a user's own loop: what the object does in every step, what it refuses, and the graph at the end."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from command_line import ENVIRONMENT, ROOT
from torch import Tensor, nn

import prune2deploy as p2d
from prune2deploy.apply import weights_of
from prune2deploy.budget import Budget
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.masks import widths
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, Weights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@final
@dataclass(frozen=True)
class Calls(Method):
    """A method that notes its calls, and pulls every weight towards zero."""

    needs: ClassVar[Needs] = Needs(trains_weights=True)

    def prepare(self, module: nn.Module, groups: Groups, budget: Budget) -> Any:
        return {"calls": [], "module": module}

    def penalty(self, state: Any) -> Tensor:
        state["calls"].append("penalty")
        return sum((p.square().sum() for p in state["module"].parameters()), torch.zeros(()))

    def after_backward(self, state: Any) -> None:
        state["calls"].append("after_backward")

    def after_step(self, state: Any) -> None:
        state["calls"].append("after_step")

    def epoch_end(self, state: Any, epoch: int) -> None:
        state["calls"].append(f"epoch {epoch}")

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        assert context.state["calls"]
        return {group.id: np.arange(group.size, dtype=np.float64) for group in groups.prunable}


def step(model: nn.Module, pruner: p2d.Pruner, optimizer: torch.optim.Optimizer) -> float:
    model.train()
    loss = F.cross_entropy(model(EXAMPLE), torch.tensor([0, 3])) + pruner.penalty()
    optimizer.zero_grad()
    loss.backward()
    pruner.after_backward()
    optimizer.step()
    pruner.after_step()
    return float(loss.detach())


def silent_filters(model: nn.Module) -> list[int]:
    return [int((~layer.weight.flatten(1).any(1)).sum()) for layer in model if isinstance(layer, nn.Conv2d)]


def test_a_loop_calls_the_method_until_it_is_finished_and_then_keeps_the_masks() -> None:
    model = network()
    pruner = p2d.Pruner(model, EXAMPLE, method=Calls(), target=p2d.Target(macs=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = [step(model, pruner, optimizer) for _ in range(3)]
    pruner.epoch_end()
    assert losses[-1] < losses[0]
    calls = pruner._state["calls"]
    assert calls == ["penalty", "after_backward", "after_step"] * 3 + ["epoch 0"]
    pruned = pruner.finish()
    removed = [int((~mask).sum()) for mask in pruned.masks.values() if not mask.all()]
    assert sorted(silent_filters(model)) == sorted(removed)
    assert sum(removed) > 0
    before = weights_of(model)
    for _ in range(2):
        step(model, pruner, optimizer)
    assert calls[-1] == "epoch 0"
    assert sorted(silent_filters(model)) == sorted(removed)
    assert any(not np.array_equal(before[name], values) for name, values in weights_of(model).items())


def test_the_slim_graph_computes_what_the_model_does_and_costs_what_was_promised(tmp_path: Path) -> None:
    model = network()
    pruner = p2d.Pruner(model, EXAMPLE, method=p2d.methods.L1(), target=p2d.Target(macs=0.5))
    pruned = pruner.finish()
    found = p2d.export(model, pruned, EXAMPLE, tmp_path / "slim.onnx")
    full = pruned.groups.full_widths()
    assert found["macs"] == {
        "before": pruned.groups.cost.macs(full),
        "after": pruned.groups.cost.macs(widths(pruned.masks)),
    }
    assert found["macs"]["after"] <= 0.5 * found["macs"]["before"]
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "input"
    got = session.run(None, {"input": EXAMPLE.numpy()})[0]
    model.eval()
    torch.testing.assert_close(torch.from_numpy(got), model(EXAMPLE), rtol=1e-4, atol=1e-5)


def test_methods_that_choose_by_data_take_a_loader_of_any_kind() -> None:
    labelled = [(EXAMPLE, torch.tensor([0, 3]))] * 3
    masks = []
    for _ in range(2):
        model = network()
        pruner = p2d.Pruner(model, EXAMPLE[:1], method=p2d.methods.Taylor(), target=p2d.Target(params=0.6))
        assert model.training
        masks.append(pruner.finish(calibration=iter(labelled)).masks)
        assert model.training
    assert all(np.array_equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "method 'taylor' needs images"),
        ([EXAMPLE], "method 'taylor' needs labels"),
        ([], "the calibration data is empty"),
    ],
)
def test_what_is_missing_is_said_and_the_model_stays_as_it_was(calibration: Any, message: str) -> None:
    model = network()
    before = weights_of(model)
    pruner = p2d.Pruner(model, EXAMPLE, method=p2d.methods.Taylor(), target=p2d.Target(macs=0.5))
    with pytest.raises(InputError, match=message):
        pruner.finish(calibration)
    assert all(np.array_equal(before[name], values) for name, values in weights_of(model).items())


def test_a_method_with_phases_is_refused_with_what_to_do() -> None:
    class Phased(p2d.methods.L1):  # type: ignore[misc]  # final, but a test may
        phases = True

    with pytest.raises(InputError, match=r"'phased' trains in phases.*p2d prune .* --method phased"):
        p2d.Pruner(network(), EXAMPLE, method=Phased(), target=p2d.Target(macs=0.5))


def test_names_stand_for_methods_and_targets_and_anything_else_is_refused_at_once() -> None:
    named, made = (
        p2d.Pruner(network(), EXAMPLE, method=method, target=target).finish().masks
        for method, target in (("fpgm", "macs=0.6"), (p2d.methods.FPGM(), p2d.Target(macs=0.6)))
    )
    assert all(np.array_equal(mask, made[name]) for name, mask in named.items())
    for method, target in ((p2d.methods.L1, "macs=0.5"), ("l1", 0.5)):
        with pytest.raises(InputError, match=r"takes a method such as methods.L1\(\) or 'l1' and a target such as"):
            p2d.Pruner(network(), EXAMPLE, method=method, target=target)
    with pytest.raises(InputError, match="no method 'l3'"):
        p2d.Pruner(network(), EXAMPLE, method="l3", target="macs=0.5")


def test_what_is_not_given_as_held_out_is_not_taken_for_it() -> None:
    images = [(EXAMPLE, torch.tensor([0, 3]))] * 3
    known: list[Any] = []

    class Looks(p2d.methods.L1):  # type: ignore[misc]  # final, but a test may
        def plan(self, weights: Any, groups: Any, budget: Any, context: Any = None) -> Any:
            known.append((context.images, context.holdout))
            return super().plan(weights, groups, budget, context)

    for holdout in (None, images[:1]):
        p2d.Pruner(network(), EXAMPLE, method=Looks(), target="macs=0.5").finish(images, holdout=holdout)
    assert [len(seen) for seen, _ in known] == [3, 3]
    assert known[0][1] is None
    assert len(known[1][1]) == 1


def test_it_prunes_once() -> None:
    model = network()
    pruner = p2d.Pruner(model, EXAMPLE, method=p2d.methods.L1(), target=p2d.Target(macs=0.5))
    pruner.finish()
    with pytest.raises(InputError, match="pruned already"):
        pruner.finish()


def test_kept_layers_floors_and_rounding_hold() -> None:
    options = {"method": p2d.methods.L1(), "target": p2d.Target(macs=0.6)}
    kept = p2d.Pruner(network(), EXAMPLE, keep=["0.*"], **options).finish()
    (first,) = [
        group.id for group in kept.groups.groups if any(one.parameter == "0.weight" for one in group.members[:1])
    ]
    assert kept.masks[first].all()
    floored = p2d.Pruner(network(), EXAMPLE, floors={first: 7}, **options).finish()
    assert int(floored.masks[first].sum()) >= 7
    shares = p2d.Pruner(network(), EXAMPLE, floors={"0.*": 0.75}, **options).finish()
    assert int(shares.masks[first].sum()) >= 6
    for round_to in (4, "tf32"):
        rounded = p2d.Pruner(network(), EXAMPLE, round_to=round_to, **options).finish()
        assert all(int(mask.sum()) % 4 == 0 for mask in rounded.masks.values())


@pytest.mark.parametrize("wrong", [{}, {"macs": 0.5, "params": 0.5}, {"macs": 1.5}])
def test_a_target_is_one_share(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"one share|out of range"):
        p2d.Target(**wrong)


def test_classes_of_methods_are_found_by_name_and_others_are_not() -> None:
    assert p2d.methods.L1.__name__ == "L1"
    with pytest.raises(AttributeError, match="no attribute 'L7'"):
        _ = p2d.methods.L7
    with pytest.raises(AttributeError, match="no attribute 'prunner'"):
        _ = p2d.prunner


@pytest.mark.parametrize("example", ["own_loop", pytest.param("lightning_module", marks=pytest.mark.slow)])
def test_the_examples_end_with_a_verified_graph_and_an_accuracy_far_above_chance(example: str, tmp_path: Path) -> None:
    if example == "lightning_module":
        pytest.importorskip("lightning", reason="lightning is not installed")
    script, out = ROOT / "examples" / f"{example}.py", tmp_path / "slim.onnx"
    command = [sys.executable, "-W", "ignore", str(script), "--epochs", "2", "-o", str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert out.is_file()
    (accuracy,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("fine-tuned")]
    assert float(accuracy.rstrip("%")) > 70
