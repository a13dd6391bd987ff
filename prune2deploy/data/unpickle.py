"""Pickled data of others, read without running the code that a pickle may name."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from prune2deploy.errors import InputError, one_line


def read_pickled_dict(path: Path) -> dict[Any, Any]:
    """Return the dict in a pickle of arrays, numbers, strings and lists; string keys become bytes, as Python 2 wrote.

    Raises:
        InputError: if the file is damaged, holds something else, or names code.
    """
    try:
        with path.open("rb") as stream:
            batch = _DataUnpickler(stream, encoding="bytes").load()
    except _ForbiddenError as error:
        raise InputError(f"'{path}' asks for '{error}', which is not data but code; do not trust the file") from error
    except Exception as error:
        raise InputError(f"'{path}' is not a whole pickle ({one_line(error, 120)}); fetch it again") from error
    if not isinstance(batch, dict):
        raise InputError(f"'{path}' holds a {type(batch).__name__}, not a dict; fetch it again")
    return {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}


class _ForbiddenError(Exception):
    """A pickle names something else than an array."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise _ForbiddenError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


_FROM_BUFFER = np.zeros(1, np.uint8).__reduce_ex__(5)[0]
_RECONSTRUCT = np.zeros(1, np.uint8).__reduce__()[0]
_PICKLE_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("_codecs", "encode"): _encode,  # how protocol 2 writes bytes
}
"""All that a batch may name: what numpy and bytes need. A pickle can call any name that it is given."""


class _DataUnpickler(pickle.Unpickler):
    """Reads arrays, bytes, strings, numbers, lists and dicts, and nothing that runs code."""

    def __init__(self, stream: io.BufferedReader, *, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few names that data needs."""
        try:
            return _PICKLE_NAMES[module, name]
        except KeyError:
            raise _ForbiddenError(f"{module}.{name}") from None
