"""A run's report: ``report.json``, where every command has its own section, and the raw timings in ``samples/``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prune2deploy import __version__
from prune2deploy.errors import InputError
from prune2deploy.files import read_json, write_json

SCHEMA_VERSION = 1
SECTIONS = ("prune", "export", "slim", "verify", "bench", "environment")
Samples = Mapping[str, Sequence[Sequence[float]]]
"""Arm -> its raw milliseconds, a list for each round."""


def update_section(run: Path, name: str, content: Mapping[str, Any]) -> None:
    """Replace one section of a run's report and keep the others; numbers that are not finite become null.

    Raises:
        InputError: if the report cannot be read or written, or is of another schema version.
        KeyError: if there is no such section.
    """
    if name not in SECTIONS:
        raise KeyError(name)
    path = run / "report.json"
    document = _read(path) if path.exists() else {}
    document[name] = plain(content)
    document["schema_version"] = SCHEMA_VERSION
    document["tool"] = {"name": "prune2deploy", "version": __version__}
    write_json(path, document)


def read_report(run: Path) -> dict[str, Any]:
    """Return a run's report, with the text of its ``recipe.toml`` under ``recipe`` where there is one.

    Raises:
        InputError: if there is no report, or it is not one.
    """
    document = _read(run / "report.json")
    recipe = run / "recipe.toml"
    if recipe.is_file():
        document["recipe"] = recipe.read_text(encoding="utf-8", errors="replace")
    return document


def write_samples(run: Path, samples: Samples, name: str = "bench") -> None:
    """Write the raw timings behind a section to ``samples/NAME.json`` in the run."""
    write_json(run / "samples" / f"{name}.json", plain(samples))


def read_samples(run: Path, name: str = "bench") -> dict[str, list[list[float]]]:
    """Return the raw timings behind a section; empty where none were kept.

    Raises:
        InputError: if the file holds anything else.
    """
    path = run / "samples" / f"{name}.json"
    if not path.exists():
        return {}
    document: dict[str, list[list[float]]] = read_json(path)
    if not _is_samples(document):
        raise InputError(f"'{path}' does not hold raw timings; remove it, or run 'p2d bench' again")
    return document


def _read(path: Path) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict) or "schema_version" not in document:
        raise InputError(f"'{path}' is not a report of p2d; name a folder that 'p2d' has written a run to")
    if document["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"'{path}' has the schema version {document['schema_version']}, and this p2d reads {SCHEMA_VERSION}; "
            "make the run again, or use the version of p2d that wrote it"
        )
    wrong = [name for name in SECTIONS if not isinstance(document.get(name, {}), dict)]
    if wrong:
        raise InputError(f"section '{wrong[0]}' of '{path}' is not an object; make the run again")
    return document


def _is_samples(document: object) -> bool:
    return isinstance(document, dict) and all(
        isinstance(rounds, list)
        and all(isinstance(times, list) and all(isinstance(time, int | float) for time in times) for times in rounds)
        for rounds in document.values()
    )


def plain(value: Any) -> Any:
    """Return a value as JSON has it: numpy's numbers and arrays as Python's, paths as text, and no NaN or infinity."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
