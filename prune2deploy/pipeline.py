"""The walk, top to bottom: prune, export, slim, verify, build, bench, report. Only this module joins the columns."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy import ranks
from prune2deploy.budget import Budget, Target, resolve_floors
from prune2deploy.environment import environment
from prune2deploy.errors import DeviceError, InputError, StrictError, one_line
from prune2deploy.files import read_json, require_file, sha256, write_json
from prune2deploy.groups import Groups
from prune2deploy.identity import contents, fingerprint, pruning
from prune2deploy.masks import Masks, load_masks, widths
from prune2deploy.recipe import Recipe, load_recipe, save_recipe
from prune2deploy.report import read_report, update_section, write_samples
from prune2deploy.rounding import multiple_of
from prune2deploy.slim import Note, slim_file
from prune2deploy.unfinished import EVENTS, FOLDER, Unfinished

if TYPE_CHECKING:
    import onnx

    from prune2deploy.backends.tensorrt import BuildReport
    from prune2deploy.data import Data
    from prune2deploy.graph.rewrite import Slimmed
    from prune2deploy.latency import Comparison
    from prune2deploy.methods.base import Method
    from prune2deploy.networks import Network

VERIFY_SAMPLES = 8
LOCK = "lock"
RUN_FILES = ("recipe.toml", "masks.safetensors")
"""What every run has that was pruned; one that has just begun has its lock."""


def silent(_: str) -> None:
    """Note nothing."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A recipe with its network, weights and data loaded."""

    recipe: Recipe
    network: Network
    data: Data
    mean: tuple[float, ...]
    std: tuple[float, ...]


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run's lock, so that two commands do not write into one folder.

    Raises:
        InputError: if another process holds it, or the folder cannot be made.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"'{run}' is a file, but a run is a folder; choose another -o")
    try:
        run.mkdir(parents=True, exist_ok=True)
        stream = (run / LOCK).open("w")
    except OSError as error:
        raise InputError(f"cannot write to '{run}': {error.strerror}; choose another -o") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another p2d is working in '{run}'; wait for it, or choose another -o") from error
        yield


def load_task(recipe: Recipe, weights: Path | None = None) -> Loaded:
    """Return the recipe's network and data, with the recipe's weights or those in ``weights``.

    Raises:
        InputError: if any of them cannot be loaded, or they do not fit each other.
    """
    from prune2deploy.data import load_data
    from prune2deploy.networks import load_network, load_weights, normalisation

    _use_threads(recipe)
    _require_device(recipe.device)
    size = recipe.input_shape[-1] if recipe.input_shape else None
    data = load_data(recipe.data, seed=recipe.seed, holdout=recipe.holdout, image_size=size)
    network = load_network(
        recipe.network,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        input_shape=recipe.input_shape or data.input_shape,
        seed=recipe.seed,
    )
    path = weights or (Path(recipe.weights) if recipe.weights else None)
    metadata = load_weights(network.module, path) if path is not None else {}
    own = normalisation(metadata) or (data.mean, data.std)
    mean, std = recipe.mean or own[0], recipe.std or own[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != data.in_channels:
            raise InputError(f"--{name} has {len(values)} values, but the images have {data.in_channels} channels")
    return Loaded(recipe, network, data, tuple(mean), tuple(std))


def _use_threads(recipe: Recipe) -> None:
    import torch

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)


def _require_device(device: str) -> None:
    """Refuse a device that torch does not know, or that is not there."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        known = ("cpu", "cuda", "mps", "xpu")
        if device.partition(":")[0] not in known:
            raise InputError(
                f"--device '{device}' is not a device; give one of {', '.join(known)}, or cuda:1"
            ) from error
        raise DeviceError(f"the device '{device}' is not there ({one_line(error, 120)}); use --device cpu") from error


# --- prune ------------------------------------------------------------------------------------------------------------


def prune(
    recipe: Recipe,
    run: Path,
    *,
    resume: bool = False,
    note: Note = silent,
    on_progress: Callable[[Any], None] | None = None,
) -> None:
    """Choose masks, apply them, fine-tune, and write masks, weights, groups and the report's section ``prune``.

    With ``resume`` a training that was interrupted goes on, and nothing is done where none is left. Of several
    processes, as ``torchrun`` starts them, an ONNX file needs one only.

    Raises:
        InputError: if the recipe cannot be carried out, or the folder holds files and is no run; then nothing in it is
            changed. If ``resume`` meets a run of another recipe.
    """
    _require_run_or_nothing(run)
    if resume and "prune" in _agreed_steps(run, recipe):
        return
    if recipe.is_onnx:
        from prune2deploy.prune_onnx import prune_onnx

        if ranks.is_first():
            prune_onnx(recipe, run, note=note)
    else:
        from prune2deploy.prune_network import prune_network

        prune_network(recipe, run, resume=resume, note=note, on_progress=on_progress)


def _require_run_or_nothing(run: Path) -> None:
    """Refuse a folder of other files: pruning replaces and removes files by their names."""
    if not run.is_dir() or (run / LOCK).exists() or all((run / name).exists() for name in RUN_FILES):
        return
    if (other := next(run.iterdir(), None)) is not None:
        raise InputError(f"'{run}' is not a run, and holds other files, such as '{other.name}'; choose another -o")


def method_of(recipe: Recipe) -> Method:
    """Return the recipe's method, with the recipe's seed where its options give none of its own.

    Raises:
        InputError: if there is no such method, or an option does not fit.
    """
    from prune2deploy.methods import describe_options, load_method, method_class

    has_seed = "seed" in describe_options(method_class(recipe.method))
    return load_method(recipe.method, **({"seed": recipe.seed} if has_seed else {}) | recipe.method_options)


def budget_of(recipe: Recipe, groups: Groups | None = None) -> Budget:
    """Return the recipe's budget: the widths that it gives, or its target.

    The recipe's floors are of patterns, so they are left out where there are no ``groups`` yet.

    Raises:
        InputError: if the target cannot be read, or a floor fits no group.
    """
    if recipe.widths is not None:
        return Budget(None, widths=recipe.widths)
    floors = {} if groups is None else resolve_floors(groups, recipe.floors)
    return Budget(Target.parse(recipe.target), multiple_of(recipe.round_to), floors, ranking=recipe.ranking)


def widths_of_run(run: Path, network: str) -> dict[str, int]:
    """Return how many channels each group of another run keeps.

    Args:
        run: the run's folder.
        network: the network that is to get these widths, as recipes spell it.

    Raises:
        InputError: if it is no run that was pruned, or one of another network.
    """
    other = load_run(run)
    if other.network != network:
        raise InputError(
            f"--widths-of '{run}' is a run of '{other.network}', whose groups are not those of '{network}'; name a run "
            "of the same network"
        )
    return widths(load_masks(run / "masks.safetensors"))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)


NARROW = ("narrow.json", "weights.safetensors", "groups.json")
"""What ``narrow/`` holds (`narrow.MANIFEST` and others); whoever trains on keeps files of their own there."""

LATER = ("log.jsonl", "dense.onnx", "masked.onnx", "slim.onnx", "slim.json", "report.html", "report.json")


def forget_later_steps(run: Path) -> None:
    """Remove what an earlier run's later commands wrote: it would describe another network."""
    for name in LATER:
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / EVENTS, ignore_errors=True)
    for path in [*(run / "samples").glob("*.json"), *(run / "engines").glob("*")]:
        path.unlink()
    forget_narrow(run / "narrow")


def forget_narrow(folder: Path) -> None:
    """Remove the narrow PyTorch network of an earlier run."""
    for name in NARROW:
        (folder / name).unlink(missing_ok=True)


def prune_section(recipe: Recipe, groups: Groups, masks: Masks, budget: Budget) -> dict[str, Any]:
    """Return the report's section ``prune``, without what only training can tell."""
    full, kept = groups.full_widths(), widths(masks)
    costs = {
        name: {"dense": int(groups.cost.of(kind, full)), "pruned": int(groups.cost.of(kind, kept))}
        for name, kind in (("macs", "macs"), ("parameters", "params"))
    }
    macs: dict[str, list[tuple[int, int]]] = {}
    for term in groups.cost.macs_terms:  # a layer that is applied twice has a term, and a row, for each
        macs.setdefault(term.layer, []).append((int(term.at(full)), int(term.at(kept))))
    layers = [
        {
            "name": layer.name,
            "op_type": layer.op_type,
            "before": int(layer.out_width.at(full)),
            "after": int(layer.out_width.at(kept)),
            **dict(zip(("macs_before", "macs_after"), macs[layer.name].pop(0), strict=True)),
        }
        for layer in groups.layers
        if macs.get(layer.name)
    ]
    return {
        "network": recipe.network,
        "weights": recipe.weights,
        "weights_sha256": sha256(Path(recipe.weights)) if recipe.weights else None,
        "data": recipe.data,
        "method": recipe.method,
        "method_options": recipe.method_options,
        "target": None if budget.target is None else {"kind": budget.target.kind, "share": budget.target.share},
        "round_to": budget.round_to,
        "floors": dict(budget.floors),
        "seed": recipe.seed,
        "finetune_epochs": recipe.finetune.epochs,
        "contents": contents(recipe),
        "groups": [{"id": group.id, "before": full[group.id], "after": kept[group.id]} for group in groups.groups],
        "kept_groups": {group.id: group.kept_because for group in groups.groups if not group.prunable},
        "layers": layers,
        **costs,
    }


# --- export -----------------------------------------------------------------------------------------------------------


def export(run: Path, *, torch: bool = False, note: Note = silent) -> Slimmed:
    """Write ``dense.onnx``, ``masked.onnx`` and, once it is verified, ``slim.onnx`` of a run.

    With ``torch`` also the narrow PyTorch network, to ``narrow/`` (see `narrow.load_narrow`).

    Raises:
        InputError: if the run is not one, or a file of it is missing or broken.
        VerifyError: if an export differs from its network, or the slim graph from the masked one.
    """
    from prune2deploy.exporter import export_network, require_agreement
    from prune2deploy.graph.model import save_model
    from prune2deploy.networks import load_weights

    recipe = load_run(run)
    if recipe.is_onnx:
        from prune2deploy.prune_onnx import slim_again

        if torch:
            raise InputError(f"'{run}' is the run of an ONNX file, which has no PyTorch network; leave --torch out")
        return slim_again(run, recipe, note=note)
    with locked(run):
        note("loading the run")
        task = load_task(recipe, run / "dense.safetensors")
        module = task.network.module
        agreement: dict[str, float] = {}
        for name in ("dense", "masked"):
            note(f"exporting {name}.onnx")
            if name == "masked":
                method = method_of(recipe)
                method.rebuild(module, Groups.load(run / "groups.json"))
                load_weights(module, run / "weights.safetensors")
            exported = export_network(module, task.network.example_inputs, fuse=True)
            save_model(normal_form(exported.model), run / f"{name}.onnx")
            agreement[name] = require_agreement(module, run / f"{name}.onnx", task.network.example_inputs)
        write_json(run / "source_map.json", read_json(run / "source_map.json") | exported.source_map)
        section = {"opset": exported.model.opset_import[0].version, "torch_difference": agreement}
        if method.adds_modules:  # the masked graph is larger than the network was
            section["dense"] = graph_totals(run / "dense.onnx")
        update_section(run, "export", section)
        slimmed = slim_file(run / "masked.onnx", run / "slim.onnx", samples=real_samples(task), run=run, note=note)
        require_promise(run)
        if torch:
            from prune2deploy.export_narrow import narrow_run

            note("writing the narrow PyTorch network")
            narrow_run(run, task, method)
        return slimmed


def graph_totals(path: Path) -> dict[str, int]:
    """Return the MACs and parameters of an ONNX file, counted as slimming counts them."""
    from prune2deploy.graph.inspect import inspect_model
    from prune2deploy.graph.model import load_model

    found = inspect_model(load_model(path))
    return {name: found[name]["before"] for name in ("macs", "parameters")}


def load_run(run: Path) -> Recipe:
    """Return the recipe of a run that was pruned.

    Raises:
        InputError: if the folder is not a run.
    """
    if not run.is_dir():
        raise InputError(f"'{run}' is not a run: there is no such folder; make one with 'p2d prune ... -o {run}'")
    if not (run / "masks.safetensors").exists():
        raise InputError(f"'{run}' is not a pruned run: it has no masks.safetensors; run 'p2d prune ... -o {run}'")
    load_masks(run / "masks.safetensors")
    if not (run / "report.json").exists() or "prune" not in read_report(run):
        raise InputError(
            f"the pruning of '{run}' was not finished: its report lacks it; run 'p2d prune ... -o {run}' again"
        )
    return load_recipe(run / "recipe.toml")


def real_samples(task: Loaded) -> dict[str, np.ndarray]:
    """Return a few normalised held-out images by input name."""
    import torch

    from prune2deploy.data import normalise

    count = min(VERIFY_SAMPLES, len(task.data.holdout))
    images = normalise(task.data.holdout.images(torch.arange(count)), task.mean, task.std)
    return {"input": images.numpy()}


def require_promise(run: Path) -> None:
    """Note in the report where the slim graph does not cost what the cost model promised."""
    report = read_report(run)
    added = (report["prune"].get("method_report") or {}).get("added_macs", 0)  # what the method leaves in the network
    promised = report["prune"]["macs"]["pruned"] + added
    reached = report["slim"]["macs"]["after"]
    if promised != reached:
        section = report["slim"]
        section["warnings"].append(
            f"the slim graph has {reached:,} MACs where {promised:,} were planned: "
            + ("channels were dead already" if reached < promised else "a constant channel had to stay")
        )
        update_section(run, "slim", section)


# --- slim and verify --------------------------------------------------------------------------------------------------


def normal_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model as all arms are analysed and timed: constants folded, nothing that only passes its input on."""
    from prune2deploy.graph.normal import normalise, to_model

    return to_model(normalise(model), model)


# --- build ------------------------------------------------------------------------------------------------------------


def build_engine(run: Path, precision: str, *, note: Note = silent) -> BuildReport:
    """Build the TensorRT engine of a run's ``slim.onnx`` into ``engines/``.

    Raises:
        DeviceError: if TensorRT or a GPU is missing; ``slim.onnx`` stays in place.
        InputError: for a precision that is not supported.
    """
    from prune2deploy.backends.tensorrt import TensorRT

    slim_file = require_file(run / "slim.onnx", "the slim graph of an exported run")
    note("building the TensorRT engine")
    engines = run / "engines"
    built = TensorRT().build_engine(
        slim_file,
        engines / f"slim-{precision}.engine",
        precision=precision,
        timing_cache=engines / "timing.cache",
    )
    section = read_report(run)["export"]
    section.setdefault("engines", {})[precision] = {
        "engine": built.engine.name,
        "bytes": built.size_bytes,
        "sha256": built.sha256,
        "onnx_sha256": built.onnx_sha256,
        "tensorrt": built.tensorrt,
        "strongly_typed": built.strongly_typed,
        "flags": built.flags,
        "layer_precisions": built.layers.precisions,
        "seconds": built.seconds,
        "warnings": built.warnings,
    }
    update_section(run, "export", section)
    return built


# --- bench ------------------------------------------------------------------------------------------------------------


def bench(
    models: Sequence[Path],
    *,
    backend: str = "ort-cpu",
    run: Path | None = None,
    note: Note = silent,
    **options: Any,
) -> Comparison:
    """Time models against the first one, interleaved, all in the same normal form; ``options`` are `latency.compare`'s.

    With ``run`` the report's section ``bench`` and the raw samples are written.

    Raises:
        InputError: if a model cannot be read or the models' inputs differ.
        DeviceError: if the backend is not there.
    """
    from prune2deploy.backends import load_backend
    from prune2deploy.graph.model import load_model
    from prune2deploy.latency import Arm, compare

    loaded = load_backend(backend)
    note("bringing the graphs to one form")
    names = _arm_names(models)
    arms = [
        Arm(name, normal_form(load_model(path)).SerializeToString(deterministic=True))
        for name, path in zip(names, models, strict=True)
    ]
    note("timing " + " against ".join(names))
    found = compare(arms, backend=loaded, **options)
    if run is not None:
        with locked(run):
            write_samples(run, found.samples())
            update_section(run, "bench", found.to_json())
            update_section(run, "environment", environment())
    return found


def _arm_names(models: Sequence[Path]) -> list[str]:
    names = [path.stem for path in models]
    return names if len(set(names)) == len(names) else [str(path) for path in models]


def bench_run(run: Path, recipe: Recipe, *, note: Note = silent, **options: Any) -> Comparison:
    """Time a run's dense graph against its slim one, as its recipe says."""
    models = [require_file(run / f"{name}.onnx", "a graph of an exported run") for name in ("dense", "slim")]
    own = recipe.bench.model_dump()
    given = {key: value for key, value in options.items() if value is not None}
    return bench(models, run=run, note=note, **(own | given))


def earlier_ratio(against: Path, models: Sequence[Path]) -> dict[str, Any]:
    """Return what an earlier report measured of the last of these models (of a run: its slim graph).

    Raises:
        InputError: if it holds no such measurement.
    """
    arm = "slim" if models[-1].is_dir() else _arm_names(models)[-1]
    earlier = read_json(against)
    section = earlier.get("bench", {}) if isinstance(earlier, dict) else {}
    known = {entry["arm"]: entry for entry in section.get("ratios", [])}
    if arm not in known:
        raise InputError(f"'{against}' holds no measurement of '{arm}'; name the report.json of a benched run")
    found: dict[str, Any] = known[arm]
    return found


def require_no_slower(found: Comparison, earlier: Mapping[str, Any], against: Path) -> None:
    """Hold the last model's ratio against the one that the report ``against`` measured.

    Raises:
        StrictError: if it lies above the earlier one, intervals considered.
    """
    ratio = found.ratios[-1]
    if ratio.low > earlier["high"]:
        raise StrictError(
            f"'{ratio.arm}' takes {ratio.ratio:.3f} of the baseline's time where '{against}' measured "
            f"{earlier['ratio']:.3f} (intervals apart): it became slower"
        )


# --- the whole walk ---------------------------------------------------------------------------------------------------


def walk(
    recipe: Recipe,
    run: Path,
    *,
    resume: bool = False,
    note: Note = silent,
    on_progress: Callable[[Any], None] | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> None:
    """Prune, export, slim, verify, time and report; with ``resume`` go on after the last whole step.

    Raises:
        InputError: among other things where ``resume`` meets a run of another recipe.
    """
    from prune2deploy.backends import load_backend
    from prune2deploy.page import write_page

    load_backend(recipe.bench.backend)  # before the work, not after it
    prune(recipe, run, resume=resume, note=note, on_progress=on_progress)
    if not ranks.is_first():  # the others were there to train
        return
    done = finished_steps(run, recipe)
    if "slim" not in done:
        export(run, note=note)
    if "bench" not in done:
        save_recipe(recipe, run / "recipe.toml")  # of an earlier walk it may have measured otherwise
        bench_run(run, recipe, note=note, on_progress=on_round)
    note("writing report.html")
    write_page([run], run / "report.html")


def _agreed_steps(run: Path, recipe: Recipe) -> set[str]:
    """Return what the run has finished as the first process sees it: the others may be on machines without the run."""
    if ranks.count() == 1 or recipe.is_onnx:
        return finished_steps(run, recipe)
    from prune2deploy.train import Processes

    return Processes(ranks.own_device(recipe.device)).agreed(lambda: finished_steps(run, recipe))


def finished_steps(run: Path, recipe: Recipe) -> set[str]:
    """Return which of ``prune``, ``slim`` and ``bench`` the run has finished.

    Raises:
        InputError: if the run was made by another recipe.
    """
    if not (run / "report.json").exists() or not (run / "recipe.toml").exists():
        return set()
    theirs, report = load_recipe(run / "recipe.toml"), read_report(run)
    files = report.get("prune", {}).get("contents")
    if pruning(theirs) != pruning(recipe) or files != contents(recipe):
        if not recipe.is_onnx and Unfinished(run / FOLDER, fingerprint(recipe)).is_of_this_recipe():
            return set()  # the run is another recipe's, but this one was pruning anew when it was interrupted
        raise InputError(
            f"'{run}' was made by another recipe, or from files that have changed since; leave --resume out to start "
            "anew, or choose another -o"
        )
    weights = ("groups.json",) if recipe.is_onnx else ("weights.safetensors", "dense.safetensors", "analysis.onnx")
    written = {
        "prune": ("masks.safetensors", *weights),
        "slim": ("dense.onnx", "masked.onnx", "slim.onnx", "slim.json"),
    }
    done: set[str] = set()
    for step in ("prune", "slim", "bench"):
        if step not in report or not all((run / name).exists() for name in written.get(step, ())):
            break
        if step == "bench" and theirs.bench != recipe.bench:
            break
        done.add(step)
    return done
