"""What a backend is: it opens an ONNX model on one device, and its sessions run and time it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

Feeds = Mapping[str, np.ndarray]
"""Input name -> array."""


@dataclass(frozen=True)
class InputInfo:
    """An input of a model; in its shape, a dynamic axis is a name, or ``?`` where it has none."""

    name: str
    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]


class AbstractSession(ABC):
    """One loaded model on one device; a context manager that closes itself."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[InputInfo, ...]:
        """The model's inputs, in the model's order."""

    @abstractmethod
    def bind(self, feeds: Feeds) -> None:
        """Take the inputs of the runs to come, so that handing them over is not timed again and again.

        Raises:
            InputError: if the model cannot take them.
        """

    @abstractmethod
    def run_once(self) -> float:
        """Run the bound inputs once and return the milliseconds from the call until the outputs lie in host memory."""

    @abstractmethod
    def infer(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Return the outputs by name.

        Raises:
            InputError: if the model cannot take these inputs.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the options that this session runs under, ready for JSON."""

    @abstractmethod
    def close(self) -> None:
        """Free the model; the session cannot run any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AbstractBackend(ABC):
    """One way to run ONNX models on one device."""

    name: str

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Return in one line what is missing here and how to get it, or None when the backend can be used."""

    @abstractmethod
    def open(self, model: bytes | Path, *, threads: int = 1) -> AbstractSession:
        """Load a serialized model, or the file that holds one, to run on ``threads`` CPU threads.

        Raises:
            InputError: if the model cannot be loaded.
            DeviceError: if it would run on another device than the backend's.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the backend's name, its library's version and its device, ready for JSON."""
