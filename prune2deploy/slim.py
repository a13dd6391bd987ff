"""One ONNX file, slimmed: read, silence what is asked for, remove, prove, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy.errors import InputError
from prune2deploy.files import read_json, sha256, write_json
from prune2deploy.report import update_section

if TYPE_CHECKING:
    import onnx

    from prune2deploy.graph.rewrite import Slimmed
    from prune2deploy.graph.verify import Verification

Note = Callable[[str], None]
"""Told in a few words what happens now; for a progress line."""
Shapes = Mapping[str, tuple[int, ...]]
Samples = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Options:
    """How a file is slimmed.

    Attributes:
        round_to: dead channels stay so that widths are multiples of it.
        rtol: the difference allowed, relative to each output channel's scale.
        drops: a file of channels to silence first; this changes the function.
        tolerance: weights below so many times their layer's largest count as zero; this changes the function.
        input_range: what the inputs hold, for the bound on what ``tolerance`` changes.
    """

    round_to: int = 1
    rtol: float = 1e-4
    drops: Path | None = None
    tolerance: float | None = None
    input_range: tuple[float, float] = (-3.0, 3.0)


def slim_file(
    source: Path,
    target: Path,
    options: Options | None = None,
    *,
    samples: Samples | None = None,
    shapes: Shapes | None = None,
    run: Path | None = None,
    note: Note = lambda text: None,
) -> Slimmed:
    """Remove the dead channels of an ONNX file; ``target`` appears only after it was verified against ``source``.

    Beside it ``slim.json`` (``NAME.json``) holds the kept old indices. With ``run`` the report's sections are written.
    Where the options ask for a change of the function first, that change is measured and reported, and the result is
    verified against the changed graph.

    Raises:
        InputError: if the source cannot be read, or the options do not fit it.
        VerifyError: if the result differs from the source; then nothing is written.
    """
    from prune2deploy.graph.drops import load_drops
    from prune2deploy.graph.model import load_model, save_model
    from prune2deploy.graph.rewrite import remove_dead_channels, stamp
    from prune2deploy.graph.verify import verify

    options = options or Options()
    require_free(target, source)
    wanted = None if options.drops is None else load_drops(options.drops)
    note(f"removing dead channels from {source.name}")
    start = time.perf_counter()
    model = load_model(source)
    seconds = {"read": time.perf_counter() - start}
    digest = sha256(source)
    candidate = target.with_name(f".{target.name}.unverified.onnx")
    with _temporary(candidate), _temporary(target.with_name(f".{target.name}.silenced.onnx")) as silenced:
        changes = _Changes(source, silenced, samples, shapes, note)
        if wanted is not None:
            model = changes.drop(model, wanted)
        if options.tolerance is not None:
            model = changes.zero(model, options.tolerance, options.input_range)
        slimmed = remove_dead_channels(model, round_to=options.round_to)
        stamp(slimmed.model, "prune2deploy.source_sha256", digest)
        note(f"proving that {target.name} computes the same")
        save_model(slimmed.model, candidate)
        found = verify(changes.reference, candidate, rtol=options.rtol, samples=samples, shapes=shapes)
        slimmed = replace(slimmed, drops=changes.drops, tolerance=changes.tolerance, proof=found.to_json())
        start = time.perf_counter()
        save_model(slimmed.model, target)
        slimmed.seconds.update(seconds, write=time.perf_counter() - start)
    write_json(target.with_suffix(".json"), {"schema_version": 1, "source_sha256": digest, **slimmed.kept})
    if run is not None:
        update_section(run, "slim", slim_section(source, target, slimmed))
        update_section(run, "verify", found.to_json())
    return slimmed


class _Changes:
    """Changes of the function that were asked for, each measured against the graph before it."""

    def __init__(
        self, source: Path, silenced: Path, samples: Samples | None, shapes: Shapes | None, note: Note
    ) -> None:
        self.reference = source
        self.drops: dict[str, object] | None = None
        self.tolerance: dict[str, object] | None = None
        self._silenced, self._samples, self._shapes, self._note = silenced, samples, shapes, note

    def drop(self, model: onnx.ModelProto, wanted: Any) -> onnx.ModelProto:
        """Return the model with the wanted channels silenced."""
        from prune2deploy.graph.drops import apply_drops
        from prune2deploy.graph.model import save_model
        from prune2deploy.graph.verify import differences

        dropped = apply_drops(model, wanted)
        save_model(dropped.model, self._silenced)
        self._note("measuring what the drops change")
        changed = differences(self.reference, self._silenced, samples=self._samples, shapes=self._shapes, far=False)
        self.reference, self.drops = self._silenced, _drops_section(dropped.channels, changed)
        return dropped.model

    def zero(self, model: onnx.ModelProto, eps: float, input_range: tuple[float, float]) -> onnx.ModelProto:
        """Return the model with near-dead weights zeroed."""
        from prune2deploy.graph.bound import output_bound, real_inputs
        from prune2deploy.graph.change import measured_change
        from prune2deploy.graph.model import save_model
        from prune2deploy.graph.tolerance import zero_near_dead

        zeroed = zero_near_dead(model, eps)
        self._note("bounding what the near-dead weights change")
        ranges = dict.fromkeys(real_inputs(model), input_range)
        bounds = output_bound(model, zeroed.model, ranges)
        measured = measured_change(model, zeroed.model, ranges, shapes=self._shapes)
        outputs = [{"name": name, "bound": one.to_json(), **measured[name].to_json()} for name, one in bounds.items()]
        self.tolerance = {
            "eps": eps,
            "range": {name: list(ends) for name, ends in ranges.items()},
            **zeroed.to_json(),
            "outputs": outputs,
        }
        save_model(zeroed.model, self._silenced)
        self.reference = self._silenced
        return zeroed.model


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Remove a temporary ONNX file, and its weights beside it, when the block ends."""
    try:
        yield path
    finally:
        for one in (path, path.with_name(path.name + ".data")):
            with suppress(OSError):  # what could not be made cannot be removed
                one.unlink(missing_ok=True)


def _drops_section(channels: Mapping[str, int], changed: Verification) -> dict[str, object]:
    """Return what the report says of drops: how many channels by name, and the largest change of every output.

    ``scale`` is the largest magnitude of the output's channel that changed most, before.
    """
    outputs = [{"name": one.name, "change": one.difference, "scale": one.limit} for one in changed.outputs]
    return {"channels": dict(channels), "cases": changed.cases, "outputs": outputs}


def require_free(target: Path, source: Path) -> None:
    """Refuse a target that is no ONNX file's name, or where something else than an earlier result would be lost."""
    if target.is_dir():
        raise InputError(f"'{target}' is a folder, but the slim file's name is wanted; add one, such as slim.onnx")
    if target.suffix != ".onnx":
        raise InputError(f"'{target}' does not end in .onnx; name the slim file like slim.onnx")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"'{target}' would overwrite its own source; choose another -o")
    beside = target.with_suffix(".json")
    if beside.exists() and not _is_kept_indices(beside):
        raise InputError(f"'{beside}' would be overwritten by the kept indices of '{target}'; choose another -o")


def _is_kept_indices(path: Path) -> bool:
    found = read_json(path)
    return isinstance(found, dict) and "source_sha256" in found


def slim_section(source: Path, target: Path, slimmed: Slimmed) -> dict[str, Any]:
    """Return the report's section ``slim``."""
    section = slimmed.report()
    section |= {"source": source.name, "bytes": {"before": source.stat().st_size, "after": target.stat().st_size}}
    section["warnings"] = [] if slimmed.removed_channels else ["nothing was removed: no channel of the graph is dead"]
    return section


def reasons(source: Path, slimmed: Slimmed) -> list[dict[str, Any]]:
    """Return why channels of a slimmed file went and what keeps dead ones, layer by layer.

    Where ``source_map.json`` lies beside the file, as in a run, nodes are named by module and source line too.
    """
    from prune2deploy.graph.explain import explain

    beside = source.with_name("source_map.json")
    sources = read_json(beside) if beside.is_file() else {}
    found = [one.to_json() for one in explain(slimmed.analysis, sources if isinstance(sources, dict) else {})]
    zeroed: Any = (slimmed.tolerance or {}).get("layers", [])
    near_dead = {layer["name"]: layer["filters"] for layer in zeroed}
    return [layer | {"near_dead": near_dead.get(layer["layer"], 0)} for layer in found]
