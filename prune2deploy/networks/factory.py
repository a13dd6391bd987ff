"""The user's own Python: ``path/to/file.py:function``, imported and called."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import require_file


def is_factory(spec: str) -> bool:
    """Return whether a spec names Python code: ``file.py:function`` (or ``file.py`` with its function forgotten)."""
    return ".py:" in spec or spec.endswith(".py")


def call_factory(spec: str, *, wanted: str, options: Mapping[str, object]) -> tuple[object, Path]:
    """Call ``path/to/file.py:function`` and return its result and the file's path.

    While the file runs, its own folder can be imported from, as when it is run as a script.

    Args:
        spec: the file and the function.
        wanted: what the function should return, for the messages.
        options: keyword arguments; only those that the function's signature has are passed, and None never is.

    Raises:
        InputError: if the file is missing, has no such function, or one of them raises.
    """
    name, colon, function_name = spec.rpartition(".py:")
    if not colon or not function_name:
        raise InputError(f"'{spec}' names no function; write path/to/file.py:function, which returns {wanted}")
    path = require_file(Path(f"{name}.py"), "a Python file")
    with _importable(path.parent):
        module = _guarded(lambda: _import_file(path), path, f"importing '{path}'")
        function = getattr(module, function_name, None)
        if not callable(function):
            raise InputError(f"'{path}' has no function '{function_name}'; it has {_functions_of(module)}")
        known = inspect.signature(function).parameters
        passed = {key: value for key, value in options.items() if key in known and value is not None}
        return _guarded(lambda: function(**passed), path, f"calling '{spec}'"), path


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _import_file(path: Path) -> ModuleType:
    name = f"p2d_factory_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"'{path}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


def _guarded(run: Callable[[], Any], path: Path, doing: str) -> Any:
    try:
        return run()
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        line = f", line {frames[-1].lineno}" if frames else ""
        text = one_line(f"{type(error).__name__}: {error}", 200)
        raise InputError(f"{doing} raised {text} ('{path}'{line}); mend the file") from error


def _functions_of(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(names) if names else "no functions"
