"""Prune a torch network: groups from its export, training and choice by the method, masks, fine-tuning, and the run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2deploy import ranks
from prune2deploy.budget import Budget, protect, share
from prune2deploy.environment import environment
from prune2deploy.errors import InputError
from prune2deploy.files import write_bytes, write_json
from prune2deploy.groups import Groups
from prune2deploy.identity import fingerprint
from prune2deploy.masks import save_masks, save_merges, widths
from prune2deploy.pipeline import (
    Loaded,
    budget_of,
    forget_later_steps,
    load_task,
    locked,
    method_of,
    prune_section,
    silent,
    timed,
)
from prune2deploy.recipe import Recipe, save_recipe
from prune2deploy.report import update_section
from prune2deploy.slim import Note
from prune2deploy.unfinished import (
    EVENTS,
    FINETUNING,
    FOLDER,
    LOG,
    METHOD,
    Pruned,
    TrainingLog,
    Unfinished,
    entry,
    read_log,
    write_log,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune2deploy.methods.base import Method, PruneResult
    from prune2deploy.train import EpochResult, Processes, Task


TRAINED = "trained.safetensors"
"""The weights that a method trained and then refused to choose by, in the run."""


def prune_network(
    recipe: Recipe,
    run: Path,
    *,
    resume: bool = False,
    note: Note = silent,
    on_progress: Callable[[Any], None] | None = None,
) -> None:
    """Choose masks, apply them, fine-tune, and write masks, weights, groups and the report's section ``prune``.

    Until fine-tuning is over, all of it lies in ``RUN/checkpoints``; with ``resume`` an interrupted fine-tuning goes on
    from there. Under ``torchrun`` all processes train, and the first one writes.

    Raises:
        InputError: if the recipe cannot be carried out, or ``checkpoints`` is another recipe's; then nothing of an
            earlier run is changed.
    """
    from prune2deploy.train import Processes, keep_freed_memory

    if recipe.samples is not None:
        raise InputError(f"--samples is for ONNX files; give the images of '{recipe.network}' with --data")
    method = method_of(recipe)
    if recipe.from_scratch and method.adds_modules:
        raise InputError(f"from_scratch needs a network that masks make smaller, and '{recipe.method}' has none")
    budget_of(recipe)  # what is wrong with it is wrong before the network is loaded
    note("loading the network and the data")
    loaded = load_task(recipe.model_copy(update={"device": ranks.own_device(recipe.device)}))
    processes = Processes(loaded.recipe.device)
    if processes.device.type == "cpu":
        keep_freed_memory()
    with _held(run, processes):
        unfinished = Unfinished(run / FOLDER, fingerprint(recipe))
        pruned = processes.agreed(unfinished.load) if resume else None
        if processes.is_first and not (resume and unfinished.has_begun()):
            unfinished.begin()
        processes.wait()
        with _log(recipe, unfinished, pruned, processes) as log:
            task = _training_task(loaded, note, on_progress, log, unfinished)
            teacher = copy.deepcopy(loaded.network.module) if recipe.finetune.distill else None
            if pruned is None:
                pruned = _prune(method, loaded, task, processes, run)
                if recipe.finetune.epochs and processes.is_first:
                    unfinished.save(pruned)
            else:
                method.rebuild(loaded.network.module, pruned.groups)
                loaded.network.module.load_state_dict(pruned.weights)
            if log is not None:
                log.what = FINETUNING
            results = _finetune(loaded, pruned, task, teacher, unfinished, processes)
        if recipe.finetune.idle:
            names = ", ".join(recipe.finetune.idle)
            pruned.warnings.append(f"{names} of fine-tuning changed nothing: there are no --finetune-epochs")
        if recipe.from_scratch and not recipe.finetune.epochs:
            pruned.warnings.append("from scratch, but without --finetune-epochs: the network was never trained")
        if method.needs_finetuning and not recipe.finetune.epochs:
            why = method.needs_finetuning
            pruned.warnings.append(f"'{recipe.method}' {why}: of no use before --finetune-epochs")
        if processes.is_first:
            _publish(recipe, run, loaded, pruned, results)
            unfinished.remove()
        processes.wait()


@contextmanager
def _held(run: Path, processes: Processes) -> Iterator[None]:
    """Hold the run's lock in the first process, for all of them."""
    with ExitStack() as stack:
        processes.agreed(lambda: stack.enter_context(locked(run)))
        processes.wait()  # whoever looked what the run has finished has seen it before anything is written
        yield


@contextmanager
def _log(
    recipe: Recipe, unfinished: Unfinished, pruned: Pruned | None, processes: Processes
) -> Iterator[TrainingLog | None]:
    """Write the log of the run's trainings while the block runs; the other processes have none."""
    if not processes.is_first:
        yield None
        return
    known = [one for one in read_log(unfinished.folder / LOG) if "epoch" in one]
    if pruned is not None:
        known = pruned.history + [one for one in known if one.get("what") == FINETUNING]
    log = TrainingLog(unfinished.folder, tensorboard=recipe.finetune.tensorboard, entries=known)
    try:
        yield log
    finally:
        log.close()


def _publish(recipe: Recipe, run: Path, loaded: Loaded, pruned: Pruned, results: list[EpochResult]) -> None:
    """Write the files of a run that is pruned and fine-tuned, in place of an earlier run's."""
    history = [entry(FINETUNING, result) for result in results]
    module = loaded.network.module
    forget_later_steps(run)
    write_bytes(run / "analysis.onnx", pruned.analysis)
    write_json(run / "source_map.json", pruned.source_map)
    pruned.groups.save(run / "groups.json")
    save_masks(pruned.keep, run / "masks.safetensors")
    save_merges(pruned.merges, run / "merges.safetensors")
    if pruned.history or history:
        write_log(run / "log.jsonl", pruned.history + history)
    if recipe.finetune.tensorboard and (run / FOLDER / EVENTS).is_dir():
        (run / FOLDER / EVENTS).rename(run / EVENTS)
    _save_weights(loaded, module.state_dict(), run / "weights.safetensors")
    _save_weights(loaded, pruned.dense, run / "dense.safetensors")
    save_recipe(recipe, run / "recipe.toml")
    section = prune_section(recipe, pruned.groups, pruned.keep, budget_of(recipe, pruned.groups))
    section |= {
        "accuracy": pruned.accuracy,
        "history": history,
        "method_history": pruned.history,
        "seconds": pruned.seconds,
        "warnings": pruned.warnings + [f"fine-tuning: {text}" for result in results for text in result.warnings],
        "method_report": pruned.report,
    }
    update_section(run, "prune", section)
    update_section(run, "environment", environment())


def _prune(method: Method, loaded: Loaded, task: Task, processes: Processes, run: Path) -> Pruned:
    """Choose what to remove and mask the network in place; return it as it is before fine-tuning."""
    from prune2deploy.exporter import export_network
    from prune2deploy.graph.groups import find_groups

    recipe, module = loaded.recipe, loaded.network.module
    seconds: dict[str, float] = {}
    with timed(seconds, "export"):
        task.note("finding the groups in the exported graph")
        analysis = export_network(module, loaded.network.example_inputs, fuse=False)
        serialized = analysis.model.SerializeToString(deterministic=True)
        groups = protect(find_groups(analysis.model), recipe.keep)
    budget = budget_of(recipe, groups)
    dense = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    accuracy: dict[str, Any] = {"dense": _accuracy(loaded, "dense", task, processes, seconds), "finetuned": None}
    try:
        result = _chosen(method, loaded, groups, budget, task, seconds)
    except InputError as error:
        if not task.history or method.adds_modules:  # whose weights fit no network that others load
            raise
        kept = run / TRAINED
        if processes.is_first:
            _save_weights(loaded, module.state_dict(), kept)
        raise InputError(f"{error} (what was trained is kept: --weights {kept} goes on from it)") from error
    result = processes.agreed(lambda: result)
    warnings = [f"{recipe.method}: {text}" for each in task.history for text in each.warnings]
    history = [entry("method", each) for each in task.history]
    warnings += _mask(loaded, groups, result, task)
    accuracy["pruned"] = _accuracy(loaded, "pruned", task, processes, seconds)
    if recipe.weights is None and ".py:" not in recipe.network:
        warnings.append(f"no --weights: '{recipe.network}' is untrained, so its accuracy says nothing")
    return Pruned(
        analysis=serialized,
        source_map=analysis.source_map,
        groups=groups,
        keep=result.keep,
        merges=result.merges,
        dense=dense,
        weights={name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()},
        accuracy=accuracy,
        history=history,
        seconds=seconds,
        warnings=warnings + list(result.report.get("warnings", [])),
        report=result.report,
    )


def _training_task(
    loaded: Loaded,
    note: Note,
    on_progress: Callable[[Any], None] | None,
    log: TrainingLog | None,
    unfinished: Unfinished,
) -> Task:
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
        on_epoch=None if log is None else log.note,
        note=note,
        checkpoint=unfinished.folder / METHOD,
        fingerprint=unfinished.fingerprint,
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
        _count_all(seconds, "training", task.history)
    with timed(seconds, "selection"):
        task.note(f"choosing channels by {recipe.method}")
        context = Context(module, task.images(), task.holdout(), state, task.moved_images())
        return method.plan(weights_of(module), groups, budget, context)


def _mask(loaded: Loaded, groups: Groups, planned: PruneResult, task: Task) -> list[str]:
    """Mask the network in place, as it is before fine-tuning; return what of the plan could not be done."""
    from prune2deploy.apply import MergeKeeper, apply_masks, fold_offsets, set_weights

    recipe, module, masks = loaded.recipe, loaded.network.module.to(loaded.recipe.device), planned.silent
    warnings = []
    if recipe.from_scratch:
        warnings += _start_anew(loaded, module)
    else:
        set_weights(module, planned.weights)
        warnings += fold_offsets(module, groups, masks, planned.offsets) if planned.offsets else []
    apply_masks(module, groups, masks)
    merging = MergeKeeper(module, groups, planned.merges)
    merging.after_step()
    if recipe.recalibrate:
        task.note("measuring the norms' statistics anew")
        task.recalibrate(module)
        merging.after_step()
    return warnings


def _finetune(
    loaded: Loaded, pruned: Pruned, task: Task, teacher: nn.Module | None, unfinished: Unfinished, processes: Processes
) -> list[EpochResult]:
    """Fine-tune the masked network in place, from the last checkpoint on, and measure it; leave it on the CPU."""
    from prune2deploy.apply import MaskKeeper, MergeKeeper

    recipe, module = loaded.recipe, loaded.network.module.to(loaded.recipe.device)
    results: list[EpochResult] = []
    if recipe.finetune.epochs:
        masking = MaskKeeper(module, pruned.groups, pruned.silent)
        merging = MergeKeeper(module, pruned.groups, pruned.merges)

        def keep_pruned() -> None:
            masking()
            merging.after_step()

        left = share(pruned.groups, "macs", widths(pruned.keep))
        task.note(f"fine-tuning with {100 * left:.1f} % of the MACs")
        with timed(pruned.seconds, "finetune"):
            results = task.train(
                module,
                **_settings(recipe, teacher),
                after_backward=merging.after_backward,
                after_step=keep_pruned,
                checkpoint=unfinished.folder,
                fingerprint=unfinished.fingerprint,
            )
        _count_all(pruned.seconds, "finetune", results)
        pruned.accuracy["finetuned"] = _accuracy(loaded, "finetuned", task, processes, pruned.seconds)
    module.to("cpu")
    return results


def _count_all(seconds: dict[str, float], name: str, epochs: list[EpochResult]) -> None:
    """Count in what a training that goes on took before it was killed."""
    seconds[name] = max(seconds[name], round(sum(result.seconds for result in epochs), 3))


def _settings(recipe: Recipe, teacher: nn.Module | None) -> dict[str, Any]:
    """Return the recipe's settings of fine-tuning as `train.finetune` takes them."""
    from prune2deploy.train import distill_loss

    how = recipe.finetune
    settings: dict[str, Any] = {
        "epochs": how.epochs,
        "optimizer": how.optimizer,
        "lr": how.learning_rate,
        "momentum": how.momentum,
        "weight_decay": how.weight_decay,
        "batch_size": how.batch_size,
        "warmup_epochs": how.warmup_epochs,
        "ema": how.ema,
        "gradient_clipping": how.gradient_clipping,
    }
    if teacher is None:
        return settings | {"label_smoothing": how.label_smoothing}
    smoothing, precision = how.label_smoothing, how.precision
    loss = distill_loss(teacher, how.distill_share, how.temperature, label_smoothing=smoothing, precision=precision)
    return settings | {"loss": loss}


def _start_anew(loaded: Loaded, module: nn.Module) -> list[str]:
    """Give the network the weights of one that was never trained: the control that pruning must beat.

    A user's factory may load trained weights: those that two seeds give alike. Their layers are reset.

    Returns:
        A warning, where parameters keep what the factory gave them.
    """
    import torch

    from prune2deploy.networks import load_network

    recipe = loaded.recipe

    def built(seed: int) -> nn.Module:
        return load_network(
            recipe.network,
            num_classes=loaded.data.num_classes,
            in_channels=loaded.data.in_channels,
            input_shape=recipe.input_shape or loaded.data.input_shape,
            seed=seed,
        ).module

    fresh, other = built(recipe.seed), dict(built(recipe.seed + 1).named_parameters())
    own = dict(fresh.named_parameters())
    trained = [name for name, each in own.items() if each.equal(other[name]) and (each != each.ravel()[:1]).any()]
    owners = {name: fresh.get_submodule(name.rpartition(".")[0]) for name in trained}
    resets = {name: getattr(owner, "reset_parameters", None) for name, owner in owners.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for reset in filter(callable, resets.values()):
            reset()
    kept = [name for name, reset in resets.items() if not callable(reset)]
    module.load_state_dict(fresh.state_dict())
    return [f"from scratch, but {', '.join(kept)} keep what the factory gave them: nothing resets them"] if kept else []


def _accuracy(loaded: Loaded, name: str, task: Task, processes: Processes, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the test accuracy: final figures only; choices use the held-out split."""
    from prune2deploy.train import evaluate

    task.note(f"measuring the accuracy ({name})")
    with timed(seconds, f"accuracy_{name}"):
        found = evaluate(
            loaded.network.module,
            loaded.data.test,
            loaded.mean,
            loaded.std,
            device=loaded.recipe.device,
            processes=processes,
        )
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
