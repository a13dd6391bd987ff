"""How much accuracy each group costs: one group pruned at a time, at several shares, measured on held-out images.

Nothing is trained. What is found of one group says how far it can go alone: groups that go together cost more.
Weights that come from elsewhere may have been trained on the images that are held out here: then all accuracies are too
high, and what counts is how they differ.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy import __version__
from prune2deploy.budget import choose_masks, protect
from prune2deploy.errors import InputError, one_line
from prune2deploy.files import read_json, write_json
from prune2deploy.groups import Group, Groups
from prune2deploy.pipeline import Loaded, load_task, locked, method_of, silent
from prune2deploy.recipe import Recipe
from prune2deploy.slim import Note

if TYPE_CHECKING:
    from torch import nn

    from prune2deploy.methods.base import Method

SCHEMA_VERSION = 1
NAME = "sensitivity.json"
SHARES = (0.125, 0.25, 0.5, 0.75)
RECALIBRATION = 1024
"""Training images that norms are measured on."""

Counted = Callable[[int, int], None]
"""Called with how many groups are done, and how many there are."""


@dataclass(frozen=True)
class Survey:
    """What is measured.

    Attributes:
        shares: of a group's channels that are removed, ascending.
        images: held-out images to measure on, evenly spread over the split; None: all.
        recalibrate: whether norms are measured anew each time, as a pruned network's are.
        tolerance: how much top-1 a suggested floor may cost, as a share of all images.
    """

    shares: tuple[float, ...] = SHARES
    images: int | None = 2000
    recalibrate: bool = True
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise InputError(f"--shares {_listed(self.shares)} are not shares between 0 and 1; write 0.25,0.5,0.75")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"--tolerance {self.tolerance:g} is not a share of the images from 0; give one like 0.02")
        object.__setattr__(self, "shares", tuple(sorted(set(self.shares))))


def measure_sensitivity(
    recipe: Recipe,
    survey: Survey,
    folder: Path,
    *,
    note: Note = silent,
    on_group: Counted | None = None,
) -> dict[str, Any]:
    """Prune every group alone, measure the accuracy, and write ``sensitivity.json``; return what is in it.

    The file is written anew, whole, after every group. Groups that it has of the same settings are not measured again.

    Args:
        recipe: the network, its weights and data, the method and what is to be kept; of no other field.
        survey: what is measured.
        folder: where the file goes.
        note: told what happens now.
        on_group: called before every group and after the last.

    Raises:
        InputError: if the recipe cannot be carried out.
    """
    method = method_of(recipe)
    _require_possible(recipe, method)
    note("loading the network and the data")
    loaded = load_task(recipe)
    with locked(folder):
        groups = _groups(loaded, note)
        note(f"scoring channels by {recipe.method}")
        trial = _Trial(loaded, groups, survey, _scores(method, loaded, groups))
        document = _begun(folder / NAME, loaded, survey, trial)
        done = {one["id"]: one for one in document["groups"]}
        scored = [group for group in groups.prunable if group.id in trial.scores]
        if not scored:
            raise InputError(f"method '{recipe.method}' scores no group of '{recipe.network}'; use another method")
        for place, group in enumerate(scored):
            note(f"pruning {group.id} alone")
            if on_group is not None:
                on_group(place, len(scored))
            document["groups"] = [*document["groups"][:place], done.get(group.id) or trial.of_group(group)]
            write_json(folder / NAME, _with_floors(document, survey))
        document["complete"] = True
        write_json(folder / NAME, _with_floors(document, survey))
        if on_group is not None:
            on_group(len(scored), len(scored))
    return document


def load_floors(path: Path) -> dict[str, float]:
    """Return the floors that a finished ``sensitivity.json`` suggests: group id -> smallest width.

    Raises:
        InputError: if it is no such file, or was not finished.
    """
    document = read_json(path / NAME if path.is_dir() else path)
    known = isinstance(document, dict) and document.get("schema_version") == SCHEMA_VERSION
    floors = document.get("floors") if known else None
    if not isinstance(floors, dict) or not all(type(width) is int and width >= 1 for width in floors.values()):
        raise InputError(f"'{path}' holds no floors of schema {SCHEMA_VERSION}; name a file of 'p2d sensitivity'")
    if not document.get("complete"):
        raise InputError(
            f"'{path}' was not finished; run the same 'p2d sensitivity' again, it goes on where it stopped"
        )
    return {str(group): width for group, width in floors.items()}


@dataclass(frozen=True, eq=False)
class _Trial:
    """A network whose groups are pruned one at a time, each on a copy of it."""

    loaded: Loaded
    groups: Groups
    survey: Survey
    scores: Mapping[str, np.ndarray]

    def of_group(self, group: Group) -> dict[str, Any]:
        """Return a group's accuracies, from the widest to the narrowest."""
        start = time.perf_counter()
        points: list[dict[str, Any]] = []
        for share in self.survey.shares:
            width = max(1, round(group.size * (1 - share)))
            known = next((one for one in points if one["width"] == width), None)
            measured = known or {"width": width, **self.accuracy({group.id: width})}
            points.append({**measured, "share": share})
        seconds = round(time.perf_counter() - start, 3)
        return {"id": group.id, "size": group.size, "points": points, "seconds": seconds}

    def accuracy(self, widths: Mapping[str, int]) -> dict[str, Any]:
        """Return the accuracy with the best channels of these groups, and all others."""
        from prune2deploy.apply import apply_masks
        from prune2deploy.train import recalibrate

        keep = {group.id: np.ones(group.size, dtype=np.bool_) for group in self.groups.groups}
        keep |= choose_masks({group: self.scores[group] for group in widths}, widths)
        module = deepcopy(self.loaded.network.module)
        apply_masks(module, self.groups, keep)
        if self.survey.recalibrate:
            data, recipe = self.loaded.data, self.loaded.recipe
            recalibrate(
                module,
                data.train,
                self.loaded.mean,
                self.loaded.std,
                images=RECALIBRATION,
                seed=recipe.seed,
                device=recipe.device,
                flip=data.flip,  # moved as in training: the norms saw the borders that shifts bring in
                pad=data.pad,
            )
        return self.measured(module)

    def measured(self, module: nn.Module) -> dict[str, Any]:
        """Return a network's accuracy on held-out images."""
        from prune2deploy.train import evaluate

        loaded, device = self.loaded, self.loaded.recipe.device
        found = evaluate(module, loaded.data.holdout, loaded.mean, loaded.std, device=device, limit=self.survey.images)
        return {"top1": found.top1, "loss": found.loss, "images": found.images}


def _require_possible(recipe: Recipe, method: Method) -> None:
    """Refuse what has no torch network, and methods whose scores are those of a network that they trained."""
    from prune2deploy.methods import METHODS

    if recipe.is_onnx:
        raise InputError(f"'{recipe.network}' is an ONNX file, whose accuracy cannot be measured; name a torch network")
    if method.needs.trains_weights or method.phases:
        others = [name for name, info in METHODS.items() if info.weights_alone or name == "taylor"]
        raise InputError(
            f"method '{recipe.method}' trains the network before it scores, so its scores are not this network's; "
            f"use one that only looks: {', '.join(others)}"
        )


def _groups(loaded: Loaded, note: Note) -> Groups:
    from prune2deploy.exporter import export_network
    from prune2deploy.graph.groups import find_groups

    note("finding the groups in the exported graph")
    network = loaded.network
    analysis = export_network(network.module, network.example_inputs, fuse=False)
    groups = protect(find_groups(analysis.model), loaded.recipe.keep)
    if not groups.prunable:
        raise InputError(f"no group of '{loaded.recipe.network}' can be pruned, so there is nothing to measure")
    return groups


def _scores(method: Method, loaded: Loaded, groups: Groups) -> Mapping[str, np.ndarray]:
    from prune2deploy.apply import weights_of
    from prune2deploy.methods.base import Context
    from prune2deploy.train import Task

    recipe = loaded.recipe
    task = Task(loaded.data, loaded.mean, loaded.std, seed=recipe.seed, device=recipe.device)
    module = loaded.network.module.to(recipe.device)
    return method.scores(
        weights_of(module), groups, Context(module, task.images(), task.holdout(), moved=task.moved_images())
    )


def _begun(path: Path, loaded: Loaded, survey: Survey, trial: _Trial) -> dict[str, Any]:
    """Return the document to go on with: what the file holds, or a new one.

    Raises:
        InputError: if the file is of other settings.
    """
    settings = _settings(loaded, survey)
    if path.exists():
        earlier = read_json(path)
        theirs = earlier if isinstance(earlier, dict) else {}
        if other := next((name for name, value in settings.items() if theirs.get(name) != value), None):
            raise InputError(
                f"'{path}' was measured with another {other} ({_short(theirs.get(other))}, not "
                f"{_short(settings[other])}); remove it to measure anew, or choose another -o"
            )
        return theirs
    module = loaded.network.module
    return {
        **settings,
        "tool": {"name": "prune2deploy", "version": __version__},
        "weights": loaded.recipe.weights,
        "dense": trial.measured(module),
        "reference": trial.accuracy({}) if survey.recalibrate else trial.measured(module),
        "groups": [],
        "kept_groups": {group.id: group.kept_because for group in trial.groups.groups if not group.prunable},
        "not_scored": [group.id for group in trial.groups.prunable if group.id not in trial.scores],
    }


def _settings(loaded: Loaded, survey: Survey) -> dict[str, Any]:
    """Return all that the accuracies depend on, as JSON values."""
    from prune2deploy.apply import weights_of

    recipe, sha = loaded.recipe, hashlib.sha256()
    for name, array in sorted(weights_of(loaded.network.module).items()):
        sha.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return {
        "schema_version": SCHEMA_VERSION,
        "network": recipe.network,
        "weights_sha256": sha.hexdigest(),
        "data": recipe.data,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "holdout": recipe.holdout,
        "seed": recipe.seed,
        "method": recipe.method,
        "method_options": recipe.method_options,
        "keep": list(recipe.keep),
        "input_shape": None if recipe.input_shape is None else list(recipe.input_shape),
        "shares": list(survey.shares),
        "images": survey.images,
        "recalibrate": survey.recalibrate,
    }


def _with_floors(document: dict[str, Any], survey: Survey) -> dict[str, Any]:
    """Set the tolerance and the floors that follow from it."""
    document["tolerance"] = survey.tolerance
    document.setdefault("complete", False)
    for one in document["groups"]:
        one["floor"] = _suggested(one, document["reference"]["top1"] - survey.tolerance)
    document["floors"] = {one["id"]: one["floor"] for one in document["groups"]}
    return document


def _suggested(group: Mapping[str, Any], least: float) -> int:
    """Return the smallest width that is as good as ``least``, and all wider ones that were measured as well."""
    floor: int = group["size"]
    for point in sorted(group["points"], key=lambda one: -one["width"]):
        if point["top1"] < least - 1e-9:  # so that 0.90 - 0.02 is not above 0.88
            break
        floor = point["width"]
    return floor


def _short(value: Any) -> str:
    return one_line(str(value), 40)


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
