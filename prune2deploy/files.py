"""Files that are whole or absent: written beside their name, synced, then renamed."""

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prune2deploy.errors import InputError, one_line


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    A full disk, an error or a kill at any moment leaves ``path`` as it was.

    Raises:
        InputError: if the folder cannot be written to or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror}; choose a folder that can be written to") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        publish(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write '{path}': {one_line(error)}; free some space or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its final name, on disk and with the permissions of a new file."""
    _sync(temporary)
    temporary.chmod(0o666 & ~_umask())
    temporary.replace(path)


def remove_parts(path: Path) -> None:
    """Remove what a kill left of earlier writes of ``path``; nobody else may be writing it."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    write_with(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, document: object) -> None:
    """Write a JSON document with sorted keys, so that equal documents are equal files."""
    write_bytes(path, (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the JSON document in ``path``.

    Raises:
        InputError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(require_file(path, "a JSON file").read_text())
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"'{path}' is not a JSON file ({one_line(error, 120)}); write it again") from error


def require_file(path: Path, kind: str) -> Path:
    """Return ``path`` if it is a file that can be read; ``kind`` says what was wanted, for the message.

    Raises:
        InputError: if it is missing, a folder, or not readable.
    """
    if path.is_dir():
        raise InputError(f"'{path}' is a folder, but {kind} is wanted; name the file inside it")
    if not path.exists():
        raise InputError(f"'{path}' does not exist, but {kind} is wanted; check the path")
    if not os.access(path, os.R_OK):
        raise InputError(f"'{path}' cannot be read; check its permissions")
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
