"""Compare methods: trials for methods x targets x seeds and their controls, some at once, resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from prune2deploy import comparison, pipeline
from prune2deploy.backends import load_backend
from prune2deploy.budget import Target
from prune2deploy.comparison import Trial
from prune2deploy.environment import environment
from prune2deploy.errors import InputError, P2DError, one_line
from prune2deploy.files import read_json, require_file, sha256, write_bytes, write_json, write_with
from prune2deploy.identity import contents, fingerprint, portable
from prune2deploy.masks import load_masks, widths
from prune2deploy.methods import load_method
from prune2deploy.recipe import Recipe, Strict, Whole, first_problem, resolved
from prune2deploy.report import read_report
from prune2deploy.slim import Note
from prune2deploy.workers import Cluster, OneByOne, Processes, Workers

SCHEMA_VERSION = 1


class Published(Strict):
    """A result of a paper, to hold ours of that target against; accuracies are shares.

    Attributes:
        method: which of the methods.
        target: which of the targets; the first unless given.
        text: what is shown.
        top1: the pruned network's.
        dense: the dense network's.
        change: from the one to the other, where only that is known.
    """

    method: str
    text: str
    target: str | None = None
    top1: float | None = Field(default=None, gt=0, lt=1)
    dense: float | None = Field(default=None, gt=0, lt=1)
    change: float | None = Field(default=None, gt=-1, lt=1)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.top1 is None and self.change is None:
            raise ValueError("a published result has 'top1' or 'change'")
        return self


def _unlike(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if again := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{again[0]!r} is there twice, which is one trial and not two; leave one out")
    return values


class CompareRecipe(Strict):
    """What is compared; ``recipe`` is what all trials share, of which method, target and seed are replaced."""

    methods: Annotated[tuple[str, ...], AfterValidator(_unlike)] = Field(min_length=1)
    targets: Annotated[tuple[str, ...], AfterValidator(_unlike)] = Field(default=("macs=0.5",), min_length=1)
    seeds: Annotated[tuple[Whole, ...], AfterValidator(_unlike)] = Field(default=(0,), min_length=1)
    controls: Annotated[tuple[comparison.Control, ...], AfterValidator(_unlike)] = comparison.CONTROLS
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    published: tuple[Published, ...] = ()
    recipe: Recipe

    def wants_graph(self, planned: Planned) -> bool:
        """Whether a trial's graphs are exported, verified and timed: those of the first seed of every method."""
        return not planned.control and planned.recipe.seed == self.seeds[0]


@dataclass(frozen=True)
class Planned:
    """A trial that is to be run, or was."""

    name: str
    recipe: Recipe
    target: str
    control: bool

    def run(self) -> str:
        """Return the name of the trial's run: where anything differs it has another, so that an unfinished one goes on.

        Raises:
            InputError: if a file that the recipe names is not there.
        """
        text = json.dumps(fingerprint(self.recipe), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def load_compare_recipe(path: Path) -> CompareRecipe:
    """Return the recipe in a TOML file, with its paths made absolute from the file's folder.

    Raises:
        InputError: if the file is missing, is not TOML, a value does not fit, or a method or target does not exist.
    """
    try:
        values = tomllib.loads(require_file(path, "a recipe of a comparison (TOML)").read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not TOML ({one_line(error, 120)}); mend it there") from error
    try:
        recipe = CompareRecipe(**values)
    except ValidationError as error:
        raise InputError(first_problem(error, f"'{path}'", CompareRecipe)) from error
    for name in (*recipe.methods, *recipe.options):
        load_method(name, **recipe.options.get(name, {}))
    unused = [name for name in recipe.options if name not in recipe.methods]
    if unused:
        raise InputError(f"'{path}' has options of '{unused[0]}', which is not one of its methods; add it to them")
    for target in recipe.targets:
        Target.parse(target)
    if recipe.recipe.is_onnx:
        raise InputError(f"'{path}' compares on an ONNX file, which cannot be fine-tuned; name a network")
    return recipe.model_copy(update={"recipe": resolved(recipe.recipe, path.parent)})


def plan(recipe: CompareRecipe, finished: Mapping[str, Trial], failed: Collection[str] = ()) -> list[Planned]:
    """Return all trials that are known by now: those of the methods, then the controls of those that finished.

    A control has the widths of the trial that it is held against, so that trials of equal widths share theirs (from
    scratch: if they trained equally long), and a trial of the L1 norm at a common share is its own. So a control waits
    for a method of its name to finish or fail.
    """
    trials = [
        Planned(f"{method}-{target}-s{seed}", _trial_recipe(recipe, method, target, seed), target, False)
        for seed in recipe.seeds
        for target in recipe.targets
        for method in recipe.methods
    ]
    done = [finished[one.name] for one in trials if one.name in finished]
    unsettled = {
        (one.recipe.method, one.target, one.recipe.seed)
        for one in trials
        if one.name not in finished and one.name not in failed
    }
    controls: dict[str, Planned] = {}
    for control in recipe.controls:  # all of the first kind before any of the next: so they tell something soon
        for trial in done:
            covered = comparison.control_of(trial) == control
            covered = covered or comparison.control_accuracy(trial, control, done) is not None
            one = _control_recipe(recipe, control, trial)
            length = f"-e{one.finetune.epochs}" if one.from_scratch else ""
            name = f"{control}-at-{trial['widths_key']}{length}-s{trial['seed']}"
            waits = name not in finished and (control, trial["target"], trial["seed"]) in unsettled
            if trial["controls"] and not covered and not waits and name not in controls:
                controls[name] = Planned(name, one, trial["target"], True)
    return trials + list(controls.values())


def _trial_recipe(recipe: CompareRecipe, method: str, target: str, seed: int) -> Recipe:
    options = recipe.options.get(method, {})
    changes = {"method": method, "method_options": options, "target": target, "seed": seed}
    return recipe.recipe.model_copy(update=changes)


def _control_recipe(recipe: CompareRecipe, control: str, trial: Trial) -> Recipe:
    """Return the recipe of a control; the one from scratch trains as long as the trial's method and fine-tuning did.

    Its widths are given, so its target is not looked at, and is the same for trials of all targets.
    """
    scratch = control == "scratch"
    found = _trial_recipe(recipe, "l1" if scratch else control, recipe.recipe.target, trial["seed"])
    epochs = found.finetune.epochs + (trial["training_epochs"] if scratch else 0)
    finetune = found.finetune.model_copy(update={"epochs": epochs})
    return found.model_copy(update={"widths": trial["widths"], "from_scratch": scratch, "finetune": finetune})


def run_trial(planned: Planned, folder: str, *, graph: bool) -> dict[str, Any]:
    """Run one trial and return its result; with ``graph`` its graphs are exported and verified too.

    Raises:
        P2DError: whatever pruning and exporting raise.
    """
    run = Path(folder)
    pipeline.prune(planned.recipe, run, resume=True)
    if graph and "slim" not in pipeline.finished_steps(run, planned.recipe):
        pipeline.export(run)
    return trial_result(planned, run)


def trial_result(planned: Planned, run: Path) -> dict[str, Any]:
    """Return what a comparison keeps of a finished run, as JSON values."""
    recipe, section = planned.recipe, read_report(run)["prune"]
    method = pipeline.method_of(recipe)
    kept = widths(load_masks(run / "masks.safetensors"))
    key = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
    report = section["method_report"]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": planned.name,
        "recipe": portable(recipe),
        "contents": contents(recipe),
        "method": recipe.method,
        "options": recipe.method_options,
        "target": planned.target,
        "seed": recipe.seed,
        "control": planned.control,
        "controls": not method.adds_modules,
        "from_scratch": recipe.from_scratch,
        "widths": kept,
        "widths_key": key,
        "graph": planned.name if method.adds_modules else key,
        "macs": section["macs"],
        "parameters": section["parameters"],
        "dynamic_macs": (report.get("mean_macs") or {}).get("share"),
        "accuracy": {name: found and found["top1"] for name, found in section["accuracy"].items()},
        "seconds": section["seconds"],
        "training_epochs": len(section["method_history"]),
        "finetune_epochs": recipe.finetune.epochs,
        "history": section["history"],
        "warnings": section["warnings"],
        "environment": environment(),
    }


@dataclass(frozen=True)
class _Bug:
    """What a trial raised that nobody foresaw; the other trials go on."""

    traceback: str

    def __str__(self) -> str:
        return self.traceback.rstrip().rpartition("\n")[2]


_Failure = P2DError | _Bug


def _attempt(planned: Planned, folder: str, graph: bool) -> dict[str, Any] | _Failure:
    try:
        return run_trial(planned, folder, graph=graph)
    except P2DError as error:
        return error
    except Exception:  # out of the GPU's memory, a mistake in one method: no reason to lose the others
        return _Bug(traceback.format_exc())


def _workers(recipe: Recipe, jobs: int, ray: str | None) -> Workers:
    if ray:
        return Cluster(ray, cpus=recipe.threads or 1, gpus=1 if recipe.device.startswith("cuda") else 0)
    return OneByOne() if jobs == 1 else Processes(jobs)


def compare(
    recipe: CompareRecipe,
    folder: Path,
    *,
    jobs: int = 1,
    ray: str | None = None,
    bench: bool = True,
    note: Note = lambda _: None,
    on_trial: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run what is not done yet, time the slim graphs, and write the tables and the picture; return their document.

    Args:
        recipe: what to compare.
        folder: gets ``trials/NAME.json`` (each finished trial), ``graphs/``, ``runs/``, ``compare.json``,
            ``compare.md`` and ``compare.html``; it is what a later call goes on from.
        jobs: trials at once, on this machine.
        ray: ``local``, ``auto``, or the address of a ray cluster that runs the trials in place of ``jobs``.
        bench: whether to time the graphs, after all trials: one after the other, since what runs beside spoils it.
        note: told what happens now.
        on_trial: called with how many trials are done and known.

    Raises:
        InputError: if network or data cannot be loaded here, where trials are to run here; then nothing is written. Or
            if trials cannot be carried out; the others were, and the tables are of them.
        DeviceError: if ray or the backend is not there.
        RuntimeError: if a trial met a bug; the others were carried out.
    """
    if bench:
        load_backend(recipe.recipe.bench.backend)  # before the work, not after it
    files = contents(recipe.recipe)
    finished = _finished(folder)
    if not ray and any(one.name not in finished for one in plan(recipe, finished)):
        note("loading the network and the data")
        pipeline.load_task(recipe.recipe)  # what is wrong with them is wrong before anything is written
    workers = _workers(recipe.recipe, jobs, ray)
    with pipeline.locked(folder), workers:
        failed: dict[str, _Failure] = {}
        running: dict[str, Planned] = {}
        finished = _finished(folder)
        while True:
            known = plan(recipe, finished, failed)
            _require_same(folder, known, finished, files)
            for one in known:
                if one.name not in finished and one.name not in failed and one.name not in running:
                    run = str(folder / "runs" / one.run())
                    workers.submit(one.name, partial(_attempt, one, run, recipe.wants_graph(one)))
                    running[one.name] = one
            if not running:
                break
            note(f"{len(running)} trials to run: {', '.join(list(running)[:3])}{' ...' * (len(running) > 3)}")
            name, outcome = workers.next()
            planned = running.pop(name)
            if isinstance(outcome, _Failure):
                failed[name] = outcome
            else:
                _keep(folder, recipe, planned, outcome)
            finished = _finished(folder)
            _write(folder, recipe, finished, failed)
            if on_trial is not None:
                on_trial(sum(one.name in finished for one in known), len(known))
        if bench:
            _time(folder, recipe, {one["graph"] for one in finished.values()}, note)
        document = _write(folder, recipe, finished, failed)
    if failed:
        name, error = max(failed.items(), key=lambda one: isinstance(one[1], _Bug))  # a bug first
        if isinstance(error, _Bug):
            raise RuntimeError(f"{len(failed)} of {len(known)} trials failed, '{name}' by a bug:\n{error.traceback}")
        raise InputError(f"{len(failed)} of {len(known)} trials failed, first '{name}': {one_line(str(error), 300)}")
    return document


def _finished(folder: Path) -> dict[str, Trial]:
    return {path.stem: read_json(path) for path in sorted((folder / "trials").glob("*.json"))}


def _require_same(
    folder: Path, known: Sequence[Planned], finished: Mapping[str, Trial], files: Mapping[str, str]
) -> None:
    """Refuse to mix trials of two recipes, or of two contents of their files, in one table; where they lie may differ.

    Args:
        folder: of the comparison.
        known: the trials of this one.
        finished: those that are there.
        files: `identity.contents` of what they share.
    """
    for one in known:
        if one.name not in finished:
            continue
        theirs = finished[one.name]
        other = "another recipe" if theirs.get("recipe") != portable(one.recipe) else None
        other = other or ("other files" if theirs.get("contents") != files else None)
        if other is not None:
            raise InputError(
                f"trial '{one.name}' in '{folder}' was made from {other}; remove "
                f"'{folder / 'trials' / f'{one.name}.json'}' to run it again, or choose another -o"
            )


def _keep(folder: Path, recipe: CompareRecipe, planned: Planned, result: dict[str, Any]) -> None:
    """Write a finished trial and the graphs to time; one of the same widths is as good as another."""
    graphs = {"dense": "dense", "slim": result["graph"]} if recipe.wants_graph(planned) else {}
    for source, name in graphs.items():
        found = folder / "runs" / planned.run() / f"{source}.onnx"
        write_with(folder / "graphs" / f"{name}.onnx", partial(shutil.copyfile, found))
    write_json(folder / "trials" / f"{planned.name}.json", result)


def _time(folder: Path, recipe: CompareRecipe, graphs: Collection[str], note: Note) -> None:
    """Time those graphs against the dense one, as the recipe's section bench says, that were not so on this machine."""
    known = _latencies(folder)
    settings, here = recipe.recipe.bench.model_dump(), environment()
    for path in (folder / "graphs" / f"{name}.onnx" for name in sorted(graphs)):
        earlier = known.get(path.stem)
        if not path.exists() or (  # those of controls and of other seeds are not there
            earlier
            and earlier["settings"] == settings
            and all(earlier["environment"][name] == here[name] for name in ("machine", "board", "cpu", "gpus"))
        ):
            continue
        note(f"timing {path.stem}")
        found = pipeline.bench([folder / "graphs" / "dense.onnx", path], **settings)
        ratio = found.ratios[0]
        known[path.stem] = {
            "ratio": ratio.ratio,
            "low": ratio.low,
            "high": ratio.high,
            "verdict": found.verdicts[0].word,
            "settings": settings,
            "sha256": _hashes(folder, path.stem),
            "bench": found.to_json(),
            "environment": environment(),
        }
        write_json(folder / "latency.json", known)


def _latencies(folder: Path) -> dict[str, Any]:
    """Return what was timed, by graph, but what was of graphs that have been replaced since."""
    path = folder / "latency.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    return {
        name: one
        for name, one in found.items()
        if all(one["sha256"][graph] == own for graph, own in _hashes(folder, name).items())
    }


def _hashes(folder: Path, name: str) -> dict[str, str]:
    """Return the SHA-256 of a graph and of the dense one, where they are there."""
    paths = {"dense": folder / "graphs" / "dense.onnx", "slim": folder / "graphs" / f"{name}.onnx"}
    return {graph: sha256(path) for graph, path in paths.items() if path.exists()}


def _write(
    folder: Path, recipe: CompareRecipe, finished: Mapping[str, Trial], failed: Mapping[str, _Failure]
) -> dict[str, Any]:
    from prune2deploy.comparison_page import write_comparison

    known = [finished[one.name] for one in plan(recipe, finished) if one.name in finished]
    found = comparison.rows(known, _latencies(folder))
    published = comparison.published_rows(found, [one.model_dump() for one in recipe.published])
    document = {
        "schema_version": SCHEMA_VERSION,
        "network": portable(recipe.recipe)["network"],
        "finetune": recipe.recipe.finetune.model_dump(),
        "rows": found,
        "published": published,
        "trials": [one["name"] for one in known],
        "failed": {name: one_line(str(error), 300) for name, error in failed.items()},
    }
    write_json(folder / "compare.json", document)
    write_bytes(folder / "compare.md", comparison.markdown(found, published, document["finetune"]).encode())
    write_comparison(document, folder / "compare.html")
    return document
