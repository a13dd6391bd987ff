"""Prune a torch network: groups from its export, training and choice by the method, masks, fine-tuning, and the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2deploy.budget import Budget, protect
from prune2deploy.environment import environment
from prune2deploy.errors import InputError
from prune2deploy.files import write_bytes, write_json
from prune2deploy.groups import Groups
from prune2deploy.masks import save_masks, save_merges
from prune2deploy.pipeline import (
    Loaded,
    budget_of,
    forget_later_steps,
    load_task,
    locked,
    prune_section,
    silent,
    timed,
)
from prune2deploy.recipe import Recipe, save_recipe
from prune2deploy.report import update_section
from prune2deploy.slim import Note

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune2deploy.methods.base import Method, PruneResult
    from prune2deploy.train import Task


def prune_network(
    recipe: Recipe, run: Path, *, note: Note = silent, on_progress: Callable[[Any], None] | None = None
) -> None:
    """Choose masks, apply them, fine-tune, and write masks, weights, groups and the report's section ``prune``.

    Raises:
        InputError: if the recipe cannot be carried out; then nothing of an earlier run is changed.
    """
    from prune2deploy.exporter import export_network
    from prune2deploy.graph.groups import find_groups
    from prune2deploy.methods import load_method

    if recipe.samples is not None:
        raise InputError(f"--samples is for ONNX files; give the images of '{recipe.network}' with --data")
    method = load_method(recipe.method, **recipe.method_options)
    if recipe.from_scratch and method.adds_modules:
        raise InputError(f"from_scratch needs a network that masks make smaller, and '{recipe.method}' has none")
    budget_of(recipe)  # what is wrong with it is wrong before the network is loaded
    note("loading the network and the data")
    loaded = load_task(recipe)
    module = loaded.network.module
    with locked(run):
        seconds: dict[str, float] = {}
        with timed(seconds, "export"):
            note("finding the groups in the exported graph")
            analysis = export_network(module, loaded.network.example_inputs, fuse=False)
            serialized = analysis.model.SerializeToString(deterministic=True)
            groups = protect(find_groups(analysis.model), recipe.keep)
        budget = budget_of(recipe, groups)
        dense = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        accuracy: dict[str, Any] = {"dense": _accuracy(loaded, "dense", note, seconds), "finetuned": None}
        task = _training_task(loaded, note, on_progress)
        result = _chosen(method, loaded, groups, budget, task, seconds)
        outcome = _train(loaded, groups, result, task, accuracy, seconds)
        outcome["warnings"].extend(result.report.get("warnings", []))
        if method.needs_finetuning and not recipe.finetune.epochs:
            why = method.needs_finetuning
            outcome["warnings"].append(f"'{recipe.method}' {why}: of no use before --finetune-epochs")
        forget_later_steps(run)
        write_bytes(run / "analysis.onnx", serialized)
        write_json(run / "source_map.json", analysis.source_map)
        groups.save(run / "groups.json")
        save_masks(result.keep, run / "masks.safetensors")
        save_merges(result.merges, run / "merges.safetensors")
        if outcome["history"]:
            lines = "".join(json.dumps(entry) + "\n" for entry in outcome["history"])
            write_bytes(run / "log.jsonl", lines.encode())
        _save_weights(loaded, module.state_dict(), run / "weights.safetensors")
        _save_weights(loaded, dense, run / "dense.safetensors")
        save_recipe(recipe, run / "recipe.toml")
        section = prune_section(recipe, groups, result.keep, budget) | outcome
        section["method_report"] = result.report
        update_section(run, "prune", section)
        update_section(run, "environment", environment())


def _training_task(loaded: Loaded, note: Note, on_progress: Callable[[Any], None] | None) -> Task:
    from prune2deploy.train import Task

    recipe = loaded.recipe
    return Task(
        loaded.data,
        loaded.mean,
        loaded.std,
        seed=recipe.seed,
        device=recipe.device,
        settings={"precision": recipe.finetune.precision},
        on_progress=on_progress,
        note=note,
    )


def _chosen(
    method: Method, loaded: Loaded, groups: Groups, budget: Budget, task: Task, seconds: dict[str, float]
) -> PruneResult:
    """Train the network in place where the method does, and return what it chooses then."""
    from prune2deploy.apply import weights_of
    from prune2deploy.methods.base import Context

    recipe = loaded.recipe
    module = loaded.network.module.to(recipe.device)
    state = None
    if method.needs.trains_weights or method.phases:
        task.note(f"training as {recipe.method} does")
        with timed(seconds, "training"):
            state = method.fit(module, groups, budget, task)
    with timed(seconds, "selection"):
        task.note(f"choosing channels by {recipe.method}")
        context = Context(module, task.images(), task.holdout(), state)
        return method.plan(weights_of(module), groups, budget, context)


def _train(
    loaded: Loaded,
    groups: Groups,
    planned: PruneResult,
    task: Task,
    accuracy: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Mask the network in place and fine-tune it; return accuracies, history, times and warnings."""
    from prune2deploy.apply import MaskKeeper, MergeKeeper, apply_masks, fold_offsets, set_weights

    recipe, module, masks = loaded.recipe, loaded.network.module.to(loaded.recipe.device), planned.silent
    if recipe.from_scratch:
        _start_anew(loaded, module)
    else:
        set_weights(module, planned.weights)
    offsets = {} if recipe.from_scratch else planned.offsets
    skipped = fold_offsets(module, groups, masks, offsets) if offsets else []
    apply_masks(module, groups, masks)
    merging = MergeKeeper(module, groups, planned.merges)
    merging.after_step()
    if recipe.recalibrate:
        task.note("measuring the norms' statistics anew")
        task.recalibrate(module)
        merging.after_step()
    accuracy["pruned"] = _accuracy(loaded, "pruned", task.note, seconds)
    before = len(task.history)
    if recipe.finetune.epochs:
        masking = MaskKeeper(module, groups, masks)

        def keep_pruned() -> None:
            masking()
            merging.after_step()

        task.note("fine-tuning")
        with timed(seconds, "finetune"):
            task.train(
                module,
                epochs=recipe.finetune.epochs,
                lr=recipe.finetune.learning_rate,
                weight_decay=recipe.finetune.weight_decay,
                batch_size=recipe.finetune.batch_size,
                after_backward=merging.after_backward,
                after_step=keep_pruned,
            )
        accuracy["finetuned"] = _accuracy(loaded, "finetuned", task.note, seconds)
    module.to("cpu")
    warnings = list(skipped)
    if recipe.weights is None and ".py:" not in recipe.network:
        warnings.append(f"no --weights: '{recipe.network}' is untrained, so its accuracy says nothing")
    return {
        "accuracy": accuracy,
        "history": _history(task.history[before:]),
        "method_history": _history(task.history[:before]),
        "seconds": seconds,
        "warnings": warnings,
    }


def _history(results: list[Any]) -> list[dict[str, Any]]:
    return [
        {"epoch": one.epoch, "loss": one.loss, "holdout_top1": one.holdout.top1, "seconds": one.seconds}
        for one in results
    ]


def _start_anew(loaded: Loaded, module: nn.Module) -> None:
    """Give the network the weights of one that was never trained: the control that pruning must beat."""
    import torch

    from prune2deploy.networks import load_network

    recipe = loaded.recipe
    fresh = load_network(
        recipe.network,
        num_classes=loaded.data.num_classes,
        in_channels=loaded.data.in_channels,
        input_shape=recipe.input_shape or loaded.data.input_shape,
        seed=recipe.seed,
    ).module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for part in fresh.modules() if ".py:" in recipe.network else ():  # a user's factory may load trained weights
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
    module.load_state_dict(fresh.state_dict())


def _accuracy(loaded: Loaded, name: str, note: Note, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the test accuracy: final figures only; choices use the held-out split."""
    from prune2deploy.train import evaluate

    note(f"measuring the accuracy ({name})")
    with timed(seconds, f"accuracy_{name}"):
        found = evaluate(loaded.network.module, loaded.data.test, loaded.mean, loaded.std, device=loaded.recipe.device)
    return {"top1": found.top1, "images": found.images, "loss": found.loss}


def _save_weights(loaded: Loaded, state: dict[str, Tensor], path: Path) -> None:
    from prune2deploy.networks import save_weights

    metadata = {
        "network": loaded.recipe.network,
        "method": loaded.recipe.method,
        "mean": json.dumps(loaded.mean),
        "std": json.dumps(loaded.std),
    }
    save_weights(state, path, metadata)
