"""What a result depends on: one is gone on with, or stands beside others, only where nothing of that has changed."""

from pathlib import Path
from typing import Any

from prune2deploy import __version__
from prune2deploy.files import require_file, sha256
from prune2deploy.recipe import PATH_FIELDS, SPEC_FIELDS, Recipe

_MEASURING = {"bench"}
"""The parts of a recipe that only say how a result is measured."""


def contents(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of every file that a recipe names, by the field that names it.

    Raises:
        InputError: if one is not there.
    """
    named = {name: getattr(recipe, name) for name in PATH_FIELDS}
    for name in SPEC_FIELDS:
        file = getattr(recipe, name).partition(":")[0]
        named[name] = file if file.endswith((".onnx", ".py")) else None
    return {name: sha256(require_file(Path(path), f"a file of '{name}'")) for name, path in named.items() if path}


def pruning(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe that the pruned network depends on, as JSON values."""
    return recipe.model_dump(mode="json", exclude=_MEASURING)


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Return what must be the same for a training to be gone on with, by the name that a message gives it.

    Raises:
        InputError: if a file that the recipe names is not there.
    """
    values = pruning(recipe)
    finetune = {f"finetune.{name}": value for name, value in values.pop("finetune").items()}
    first = {name: values.pop(name) for name in ("method", "method_options", "network", "target")}
    files = {f"the content of its {name}": value for name, value in contents(recipe).items()}
    return {**first, "version": __version__, **values, **finetune, **files}


def portable(recipe: Recipe) -> dict[str, Any]:
    """Return `pruning` without where files lie, so that it can be held against that of another machine.

    A folder of images keeps its own name; the data sets that are the same everywhere are told by theirs.
    """
    found = pruning(recipe)
    for name in PATH_FIELDS:
        found[name] = found[name] and Path(found[name]).name
    for name in SPEC_FIELDS:
        first, colon, rest = found[name].partition(":")
        if first.endswith((".py", ".onnx")):
            found[name] = f"{Path(first).name}{colon}{rest}"
        elif colon and name == "data":
            found[name] = f"{first}:{Path(rest).name}" if first == "imagefolder" else first
    return found
