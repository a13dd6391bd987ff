"""Prune an ONNX file without torch: groups, scores and masks on its initializers, then the same proof and the same run.

Nothing is trained here: the masked graph is the file with channels silenced, and its accuracy is not measured.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy import pipeline
from prune2deploy.budget import Budget, protect
from prune2deploy.environment import environment
from prune2deploy.errors import InputError, one_line
from prune2deploy.files import require_file, sha256
from prune2deploy.groups import Groups
from prune2deploy.masks import save_masks
from prune2deploy.methods import METHODS, load_method
from prune2deploy.methods.base import Method
from prune2deploy.pipeline import silent
from prune2deploy.recipe import Recipe, save_recipe
from prune2deploy.report import update_section
from prune2deploy.slim import Note, slim_file

if TYPE_CHECKING:
    import onnx

    from prune2deploy.graph.rewrite import Slimmed

IMAGES, BATCH = 2048, 256
"""How many samples the norms are measured on at most, and how many at a time; as in `train.recalibrate`."""

OF_TORCH = ("weights.safetensors", "dense.safetensors", "analysis.onnx", "source_map.json")
"""Files of a run that only a torch network has."""

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Samples:
    """Real inputs.

    Attributes:
        count: how many.
        take: from a slice of them to arrays by input name.
        batches: gives all of them to measure norms on, batches of one size, so that each counts alike.
    """

    count: int
    take: Callable[[slice], Feeds]
    batches: Callable[[], Iterable[Feeds]]


def prune_onnx(recipe: Recipe, run: Path, *, note: Note = silent) -> None:
    """Choose masks for an ONNX file, apply them, slim the result with proof, and write the whole run.

    Raises:
        InputError: if the recipe cannot be carried out; then nothing of an earlier run is changed.
        VerifyError: if the slim graph differs from the masked one.
    """
    from prune2deploy.graph import masking
    from prune2deploy.graph.model import copy_of, load_model, save_model
    from prune2deploy.graph.recalibrate import norms_of

    source = Path(recipe.network)
    method = pipeline.method_of(recipe)
    pipeline.budget_of(recipe)  # what is wrong with it is wrong before the file is read
    _require_possible(recipe, method, run)
    note("reading the file")
    dense = pipeline.normal_form(load_model(source))
    masking.separate_layers(dense)
    inputs = _inputs(dense)
    samples = _samples(recipe, inputs, note)
    if recipe.recalibrate:
        norms_of(dense)
    with pipeline.locked(run):
        seconds: dict[str, float] = {}
        with pipeline.timed(seconds, "groups"):
            note("finding the groups")
            groups = _groups(dense, recipe, inputs)
            budget = pipeline.budget_of(recipe, groups)
        _require_costs(groups, budget, source)
        with pipeline.timed(seconds, "selection"):
            note(f"choosing channels by {recipe.method}")
            result = method.plan(masking.weights_of(dense), groups, budget)
        masked = copy_of(dense)
        masking.set_weights(masked, result.weights)
        warnings = masking.fold_offsets(masked, groups, result.keep, result.offsets) if result.offsets else []
        masking.apply_masks(masked, groups, result.keep)
        section = pipeline.prune_section(recipe, groups, result.keep, budget) | _circumstances(recipe, source)
        if recipe.recalibrate:
            with pipeline.timed(seconds, "recalibration"):
                section["recalibrated_norms"] = _recalibrate(masked, samples, note)
        section |= {"seconds": seconds, "method_report": result.report, "warnings": [*warnings, UNTRAINED]}
        _forget(run)
        groups.save(run / "groups.json")
        save_masks(result.keep, run / "masks.safetensors")
        save_model(dense, run / "dense.onnx")
        save_model(masked, run / "masked.onnx")
        save_recipe(recipe, run / "recipe.toml")
        update_section(run, "prune", section)
        update_section(run, "environment", environment())
        _slim(run, recipe, inputs, samples, note)


UNTRAINED = "nothing was trained: the accuracy of the pruned file is not known here, and is most likely lower"


def slim_again(run: Path, recipe: Recipe, *, note: Note = silent) -> Slimmed:
    """Write ``slim.onnx`` of a run that pruned an ONNX file anew, from its ``masked.onnx``.

    Raises:
        InputError: if a file of the run is missing or broken.
        VerifyError: if the slim graph differs from the masked one.
    """
    from prune2deploy.graph.model import load_model

    with pipeline.locked(run):
        inputs = _inputs(load_model(require_file(run / "masked.onnx", "the masked graph of a pruned run")))
        return _slim(run, recipe, inputs, _samples(recipe, inputs, note), note)


def _require_possible(recipe: Recipe, method: Method, run: Path) -> None:
    """Refuse what needs the torch network, and a source that the run would overwrite."""
    source = Path(recipe.network)
    if recipe.weights is not None:
        raise InputError(f"--weights is for torch networks; '{source}' has its own weights")
    if recipe.finetune.epochs:
        raise InputError(f"'{source}' is an ONNX file, which cannot be fine-tuned; leave --finetune-epochs out")
    needs = method.needs
    if needs.data or needs.labels or needs.trains_weights or method.phases:
        others = [
            name for name, info in METHODS.items() if info.weights_alone and not load_method(name).needs_finetuning
        ]
        raise InputError(
            f"method '{recipe.method}' needs the torch network, but '{source}' is an ONNX file; "
            f"use {', '.join(others[:-1])} or {others[-1]}"
        )
    if recipe.from_scratch:
        raise InputError(f"'{source}' is an ONNX file, which cannot be trained from scratch; leave --from-scratch out")
    if method.needs_finetuning:
        raise InputError(
            f"method '{recipe.method}' {method.needs_finetuning}, which only training mends, but '{source}' is an "
            "ONNX file"
        )
    if recipe.samples is not None and not recipe.samples.endswith(".npz"):
        raise InputError(f"--samples '{recipe.samples}' does not end in .npz; write it with numpy.savez(FILE, ...)")
    if source.resolve().parent == run.resolve() and source.name in (*pipeline.LATER, *OF_TORCH):
        raise InputError(f"'{source}' would be overwritten by the run; choose another -o")


def _groups(dense: onnx.ModelProto, recipe: Recipe, inputs: Mapping[str, Input]) -> Groups:
    """Return the groups; the recipe's shape of a sample stands for what is dynamic, so that MACs can be counted."""
    from prune2deploy.graph.groups import find_groups
    from prune2deploy.graph.model import copy_of

    sized = copy_of(dense)
    if recipe.input_shape is not None:
        only = _only_input(inputs, "--input")
        _set_sizes(next(value for value in sized.graph.input if value.name == only), recipe.input_shape)
        _infer_outputs(sized)
    return protect(find_groups(sized), recipe.keep)


def _set_sizes(value: onnx.ValueInfoProto, sample: tuple[int, ...]) -> None:
    dims = value.type.tensor_type.shape.dim
    own = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims][1:]
    if len(own) != len(sample) or any(have not in (None, size) for have, size in zip(own, sample, strict=True)):
        wanted = "x".join("?" if have is None else str(have) for have in own)
        raise InputError(f"--input gives samples of {'x'.join(map(str, sample))}, but '{value.name}' takes {wanted}")
    for dim, size in zip(list(dims)[1:], sample, strict=True):
        dim.dim_value = size


def _infer_outputs(model: onnx.ModelProto) -> None:
    """Replace the names of the outputs' dimensions by their sizes; where onnx cannot, they stay names."""
    from onnx.shape_inference import InferenceError, infer_shapes

    with suppress(ValueError, RuntimeError, InferenceError):
        inferred = infer_shapes(model, data_prop=True)
        model.graph.ClearField("output")
        model.graph.output.extend(inferred.graph.output)


def _require_costs(groups: Groups, budget: Budget, source: Path) -> None:
    """Refuse a target in MACs where those of a layer are not known before run time."""
    counted = {term.layer for term in groups.cost.macs_terms}
    unknown = [layer.name for layer in groups.layers if layer.epsilon is None and layer.name not in counted]
    if budget.target is not None and budget.target.kind == "macs" and unknown:
        raise InputError(
            f"the MACs of '{unknown[0]}' in '{source}' are not known: its sizes are dynamic; give the shape of one "
            "sample, as --input input:3,224,224, or --target params=SHARE"
        )


def _circumstances(recipe: Recipe, source: Path) -> dict[str, Any]:
    """Return what the report says of the file and of the samples that took part."""
    measured_on_data = recipe.recalibrate and recipe.samples is None
    return {
        "network_sha256": sha256(source),
        "data": recipe.data if measured_on_data else None,
        "samples": None if recipe.samples is None else Path(recipe.samples).name,
    }


def _recalibrate(masked: onnx.ModelProto, samples: Samples | None, note: Note) -> int:
    from prune2deploy.graph.recalibrate import recalibrate

    assert samples is not None, "_samples() gives some wherever norms are measured"
    note("measuring the norms' statistics anew")
    return recalibrate(masked, samples.batches())


def _forget(run: Path) -> None:
    pipeline.forget_later_steps(run)
    for name in OF_TORCH:
        (run / name).unlink(missing_ok=True)


def _slim(run: Path, recipe: Recipe, inputs: Mapping[str, Input], samples: Samples | None, note: Note) -> Slimmed:
    from prune2deploy.graph.model import load_model

    opset = next(one.version for one in load_model(run / "masked.onnx").opset_import if one.domain in ("", "ai.onnx"))
    update_section(run, "export", {"opset": opset})
    slimmed = slim_file(
        run / "masked.onnx",
        run / "slim.onnx",
        samples=_few(samples, inputs),
        shapes=_shapes(recipe, inputs),
        run=run,
        note=note,
    )
    pipeline.require_promise(run)
    return slimmed


def _shapes(recipe: Recipe, inputs: Mapping[str, Input]) -> dict[str, tuple[int, ...]]:
    """Return the shape to verify on, where the recipe gives that of a sample."""
    if recipe.input_shape is None:
        return {}
    only = _only_input(inputs, "--input")
    return {only: (inputs[only].dims[0] or 2, *recipe.input_shape)}


# --- inputs and samples -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """What a graph's input takes: its type, and its sizes (None: any)."""

    dtype: np.dtype[Any]
    dims: tuple[int | None, ...]


def _inputs(model: onnx.ModelProto) -> dict[str, Input]:
    from onnx import helper

    found = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
        found[value.name] = Input(np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)), dims)
    return found


def _only_input(inputs: Mapping[str, Input], option: str) -> str:
    if len(inputs) != 1:
        raise InputError(f"{option} is for files with one input, but this one has {', '.join(inputs)}; give --samples")
    return next(iter(inputs))


def _samples(recipe: Recipe, inputs: Mapping[str, Input], note: Note) -> Samples | None:
    """Return the samples to measure and verify on, or None where the recipe wants none."""
    if recipe.samples is not None:
        found = load_samples(Path(recipe.samples), inputs)
        count = min(map(len, found.values()))

        def take(rows: slice) -> Feeds:
            return {name: array[rows] for name, array in found.items()}

        size = min(BATCH, count)
        starts = range(0, count - count % size, size)
        return Samples(count, take, lambda: (take(slice(start, start + size)) for start in starts))
    return _images(recipe, inputs, note) if recipe.recalibrate else None


def load_samples(path: Path, inputs: Mapping[str, Input]) -> Feeds:
    """Return the arrays in an ``.npz`` file that a graph's inputs take, [samples, ...] each.

    Raises:
        InputError: if the file is none, or an array is missing or does not fit.
    """
    require_file(path, "a .npz file of samples")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files if name in inputs}
            names = archive.files
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"'{path}' is not a .npz file of arrays ({one_line(error, 120)}); write it again") from error
    for name, wanted in inputs.items():
        if name not in found:
            raise InputError(f"'{path}' has no array '{name}', which the file's input needs; it has {', '.join(names)}")
        array = found[name]
        fits = array.ndim == len(wanted.dims) and all(
            size in (None, have) for size, have in zip(wanted.dims[1:], array.shape[1:], strict=True)
        )
        if not fits or array.dtype.kind != np.dtype(wanted.dtype).kind:
            sizes = "x".join("?" if size is None else str(size) for size in wanted.dims[1:])
            raise InputError(
                f"'{name}' of '{path}' is {array.dtype} {list(array.shape)}, but {wanted.dtype} samples of {sizes} "
                "are wanted; prepare them as for the network itself"
            )
        found[name] = array.astype(wanted.dtype)
    counts = {len(array) for array in found.values()}
    if len(counts) > 1 or min(counts, default=0) < 2:
        raise InputError(f"'{path}' wants 2 samples or more, and as many for each input; it has {sorted(counts)}")
    return found


def _images(recipe: Recipe, inputs: Mapping[str, Input], note: Note) -> Samples:
    """Return normalised training images for the one input, those that `train.recalibrate` would take."""
    try:
        import torch

        from prune2deploy.data import Batches, load_data, normalise
    except ImportError as error:
        raise InputError(
            "--data reads images with torch, which is not installed; give --samples FILE.npz, or "
            "pip install 'prune2deploy[torch]'"
        ) from error
    note("loading the images")
    only = _only_input(inputs, "--data")
    sizes = recipe.input_shape or inputs[only].dims[1:]
    size = sizes[-1] if sizes else None
    try:
        data = load_data(recipe.data, seed=recipe.seed, holdout=recipe.holdout, image_size=size)
    except InputError as error:
        reason = f"--recalibrate measures on --data, which is '{recipe.data}' here"
        raise InputError(f"{reason}: {error}; or give --samples FILE.npz") from error
    mean, std = recipe.mean or data.mean, recipe.std or data.std
    shape = ("?" if size is None else str(size) for size in sizes)
    if len(sizes) != 3 or sizes[0] not in (None, data.in_channels):
        raise InputError(
            f"the images of '{recipe.data}' have {data.in_channels} channels, but '{only}' takes samples of "
            f"{'x'.join(shape)}; give other --data, or --samples FILE.npz"
        )
    if {len(mean), len(std)} != {data.in_channels}:
        raise InputError(f"--mean and --std want one value for each of the {data.in_channels} channels of the images")
    count = min(IMAGES, len(data.train))
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(recipe.seed))[:count]

    def take(rows: slice) -> Feeds:
        images = normalise(data.train.images(chosen[rows]), mean, std).numpy()
        return {only: np.ascontiguousarray(images, dtype=inputs[only].dtype)}

    batches = Batches(data.train, mean, std, min(BATCH, count), count, recipe.seed, "cpu", data.flip, data.pad)
    element = inputs[only].dtype
    return Samples(count, take, lambda: ({only: images.numpy().astype(element)} for images, _ in batches))


def _few(samples: Samples | None, inputs: Mapping[str, Input]) -> Feeds | None:
    """Return a few samples to verify on: as many as the file takes at once."""
    if samples is None:
        return None
    fixed = next((one.dims[0] for one in inputs.values() if one.dims and one.dims[0]), None)
    if fixed is not None and samples.count < fixed:
        raise InputError(f"the file takes {fixed} samples at a time, but {samples.count} were given; give more")
    return samples.take(slice(0, fixed or pipeline.VERIFY_SAMPLES))
