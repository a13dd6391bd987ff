"""ONNX files in and out, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import publish, require_file, write_with

SINGLE_FILE_BYTES = int(1.5e9)
"""Above this a model keeps its weights in a file beside it; protobuf itself ends at 2 GB."""

MIN_OPSET, MAX_OPSET = 9, 23


def load_model(path: Path) -> onnx.ModelProto:
    """Return the model in an ONNX file, with its external data.

    Raises:
        InputError: if the file is missing, a folder, truncated, not ONNX, of an operator set that is not supported, or
            if its external data is missing or lies outside its folder.
    """
    require_file(path, "an ONNX file")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"'{path}' is not an ONNX file or is truncated ({one_line(error, 120)}); export it again"
        ) from error
    if not model.graph.node and not model.graph.input and not model.graph.output:
        raise InputError(f"'{path}' is not an ONNX file: it holds no graph; export it again")
    names = [value.name for value in model.graph.output]
    if len(set(names)) < len(names):
        raise InputError(f"'{path}' gives out two outputs of one name; export it again")
    _check_opset(model, path)
    _load_external(model, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise InputError(f"'{path}' is not a valid ONNX graph ({one_line(error, 200)}); export it again") from error
    return model


def _check_opset(model: onnx.ModelProto, path: Path) -> None:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise InputError(f"'{path}' names no ONNX operator set; export it again with opset {MIN_OPSET} to {MAX_OPSET}")
    if not MIN_OPSET <= versions[0] <= MAX_OPSET:
        raise InputError(
            f"'{path}' uses operator set {versions[0]}, but {MIN_OPSET} to {MAX_OPSET} are supported; "
            "convert it with onnx.version_converter or export it again"
        )


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in onnx.external_data_helper._get_all_tensors(model):  # the only walk over subgraphs too
        if not uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if not isinstance(location, str):  # protobuf gives bytes where a name is no text
            raise InputError(f"'{path}' wants its weights from a file whose name is no text; export it again")
        try:
            place = (folder / location).resolve()
        except (OSError, ValueError) as error:
            reason = f"'{path}' wants its weights from a file of an impossible name ({one_line(error, 60)})"
            raise InputError(f"{reason}; export it again") from error
        shown = one_line(location, 80)
        if not place.is_relative_to(folder):
            raise InputError(f"'{path}' wants its weights from '{shown}', outside its folder; move them beside it")
        if not os.path.isfile(place):  # (unlike Path.is_file, no name is too long for it)
            raise InputError(
                f"'{path}' wants its weights from '{shown}', which is not beside it; copy that file there too"
            )
    try:
        onnx.load_external_data_for_model(model, str(folder))
    except (OSError, TypeError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise InputError(
            f"the external data of '{path}' cannot be read ({one_line(error, 160)}); export it again"
        ) from error


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a model whole or not at all: one file below 1.5 GB, above it with its weights in ``NAME.data``."""
    if sum(tensor.ByteSize() for tensor in model.graph.initializer) < SINGLE_FILE_BYTES:
        data = model.SerializeToString(deterministic=True)
        write_with(path, lambda temporary: temporary.write_bytes(data))
        return
    model = copy_of(model)  # saving with external data takes the weights out of the model
    weights = path.with_name(path.name + ".data")
    temporary_weights = path.with_name(f".{path.name}.data.part")

    def write(temporary: Path) -> None:
        onnx.save_model(
            model, temporary, save_as_external_data=True, all_tensors_to_one_file=True, location=temporary_weights.name
        )
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = weights.name
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        publish(temporary_weights, weights)

    write_with(path, write)


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model, its weights included."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
