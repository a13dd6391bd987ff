"""Masks: for every group, which channels stay. True keeps."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import require_file, write_bytes

Masks = Mapping[str, np.ndarray]
"""Group id -> bool [channels of the group]; True keeps."""


def save_masks(masks: Masks, path: Path) -> None:
    """Write masks as safetensors."""
    write_bytes(path, save({name: np.ascontiguousarray(mask, dtype=np.bool_) for name, mask in masks.items()}))


def load_masks(path: Path) -> dict[str, np.ndarray]:
    """Return the masks in a safetensors file.

    Raises:
        InputError: if the file is missing, is not safetensors, or holds something else than vectors of bool.
    """
    try:
        masks = load_file(require_file(path, "a masks.safetensors file"))
    except SafetensorError as error:
        raise InputError(
            f"'{path}' is not a safetensors file ({one_line(error, 120)}); run 'p2d prune' again"
        ) from error
    wrong = [name for name, mask in masks.items() if mask.dtype != np.bool_ or mask.ndim != 1]
    if wrong:
        raise InputError(f"'{path}' holds '{wrong[0]}', which is not a vector of bool; run 'p2d prune' again")
    return masks


def save_merges(merges: Mapping[str, np.ndarray], path: Path) -> None:
    """Write which kept channel each channel of a merged group copies, as safetensors; none leaves no file."""
    if merges:
        write_bytes(path, save({name: np.ascontiguousarray(of, dtype=np.int64) for name, of in merges.items()}))
    else:
        path.unlink(missing_ok=True)


def load_merges(path: Path) -> dict[str, np.ndarray]:
    """Return what `save_merges` wrote; nothing where there is no file.

    Raises:
        InputError: if the file is not safetensors.
    """
    try:
        return dict(load_file(path)) if path.exists() else {}
    except SafetensorError as error:
        raise InputError(
            f"'{path}' is not a safetensors file ({one_line(error, 120)}); run 'p2d prune' again"
        ) from error


def widths(masks: Masks) -> dict[str, int]:
    """Return how many channels each group keeps."""
    return {name: int(mask.sum()) for name, mask in masks.items()}
