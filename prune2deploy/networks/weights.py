"""Weights on disk: safetensors, and other people's ``.pt`` files as far as they hold nothing but tensors."""

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import require_file, write_bytes

if TYPE_CHECKING:
    import torch

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the state dict."""

_COUNTER = "num_batches_tracked"
"""A norm's batch counter: eval mode never reads it, so a file may leave it out."""

Metadata = Mapping[str, str]


def load_weights(module: "torch.nn.Module", path: Path | str) -> dict[str, str]:
    """Fill a module's parameters and buffers from a file; return the file's safetensors metadata ({} for ``.pt``).

    The file is ``.safetensors``, or ``.pt``, ``.pth``, ``.tar`` as ``torch.save`` wrote it; the wrappers
    ``{"state_dict": ...}`` and the like, and the prefix ``module.`` of ``DataParallel`` are taken off.
    On an error the module is as it was.

    Raises:
        InputError: if the file is missing, damaged, needs code to load, or does not fit the module.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file() and reader is None:
        raise InputError(f"'{path}' is not a weights file that can be read; its name must end in {', '.join(_READERS)}")
    require_file(path, "a weights file")
    assert reader is not None
    tensors, metadata = reader(path)
    tensors = _without_prefix(tensors)
    _require_fit(module, tensors, path)
    module.load_state_dict(tensors, strict=False)
    return metadata


def save_weights(state: "Mapping[str, torch.Tensor]", path: Path | str, metadata: Metadata | None = None) -> None:
    """Write a state dict as safetensors; the same weights and metadata are the same bytes.

    Raises:
        InputError: if the file cannot be written, or parameters share memory and so cannot be told apart.
    """
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    try:
        data = save(tensors, metadata=dict(metadata) if metadata else None)
    except RuntimeError as error:
        raise InputError(f"cannot write '{path}': {one_line(error, 200)}; untie the parameters first") from error
    write_bytes(Path(path), _canonical(data))


def normalisation(metadata: Metadata) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation per channel, of pixels in [0, 1], that a checkpoint was trained with.

    They are the metadata's ``mean`` and ``std``, JSON lists of numbers; None if it has neither.

    Raises:
        InputError: if one is missing, or they are not lists of finite numbers of equal length with ``std`` above 0.
    """
    if "mean" not in metadata and "std" not in metadata:
        return None
    text = f"mean '{metadata.get('mean')}' and std '{metadata.get('std')}' of the weights file"
    remedy = "two JSON lists of numbers, one per channel, are wanted; give --mean and --std"
    try:
        mean, std = (tuple(float(each) for each in json.loads(metadata[key])) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the {text} cannot be used: {remedy}") from error
    finite = all(abs(each) < float("inf") for each in (*mean, *std))
    if not mean or len(mean) != len(std) or not finite or min(std) <= 0:
        raise InputError(f"the {text} cannot be used: {remedy}")
    return mean, std


def read_safetensors(path: Path) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        InputError: if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}, dict(stream.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"'{path}' is not a whole safetensors file ({one_line(error, 120)}); fetch it again"
        ) from error


def _read_torch(path: Path) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    import torch

    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _names_code(error, path):
            raise InputError(
                f"'{path}' is damaged or no torch file ({one_line(error, 120)}); fetch it again"
            ) from error
        raise InputError(
            f"'{path}' holds Python objects, and loading them would run code ({_culprit(error)}); "
            f"load it where it was made and save its state_dict() as safetensors"
        ) from error
    except Exception as error:
        raise InputError(f"'{path}' is damaged or no torch file ({one_line(error, 120)}); fetch it again") from error
    return _unwrap(document, path), {}


_READERS: "dict[str, Callable[[Path], tuple[dict[str, torch.Tensor], dict[str, str]]]]" = {
    ".safetensors": read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".tar": _read_torch,
}


def _names_code(error: Exception, path: Path) -> bool:
    """Return whether torch refused what a pickle names, and not bytes that are no pickle."""
    with path.open("rb") as stream:
        is_pickle = stream.read(1) == pickle.PROTO
    return is_pickle or "Unsupported operand" not in str(error)


def _culprit(error: Exception) -> str:
    """Return the line of torch's long message that names the forbidden object."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return one_line(lines[0] if lines else error, 120)


def _unwrap(document: Any, path: Path) -> "dict[str, torch.Tensor]":
    import torch

    for _ in range(2):  # a wrapper in a wrapper is met, deeper ones are not
        inner = next((document[key] for key in _WRAPPERS if isinstance(document, dict) and key in document), None)
        if not isinstance(inner, dict):
            break
        document = inner
    if isinstance(document, dict) and document and all(isinstance(value, torch.Tensor) for value in document.values()):
        return {str(key): value for key, value in document.items()}
    keys = f" with keys {', '.join(map(str, list(document)[:5]))}" if isinstance(document, dict) else ""
    raise InputError(
        f"'{path}' holds a {type(document).__name__}{keys}, not a state dict; "
        f"save module.state_dict(), alone or under one of the keys {', '.join(_WRAPPERS)}"
    )


def _without_prefix(tensors: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    prefix = "module."
    if not all(key.startswith(prefix) for key in tensors):
        return tensors
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def _require_fit(module: "torch.nn.Module", tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    own = module.state_dict()
    filled = {own[key].data_ptr() for key in tensors if key in own}  # tied parameters are stored once
    differences = [
        f"'{key}' is missing"
        for key, value in own.items()
        if key not in tensors and not key.endswith(_COUNTER) and value.data_ptr() not in filled
    ]
    differences += [f"'{key}' is unexpected" for key in tensors if key not in own]
    differences += [
        f"'{key}' is {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in tensors.items()
        if key in own and own[key].shape != value.shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise InputError(
            f"'{path}' does not fit the network: {'; '.join(differences[:3])}{more}; "
            f"check the network's name and its number of classes"
        )
    broken = next((key for key, value in tensors.items() if not bool(value.isfinite().all())), None)
    if broken is not None:
        raise InputError(
            f"'{path}' holds a weight that is infinite or not a number, in '{broken}'; use another checkpoint"
        )


def _canonical(data: bytes) -> bytes:
    """Return a safetensors file with its header's keys sorted: the library writes metadata in random order."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
