"""The table of backends; each is imported only when it is loaded."""

import importlib
from dataclasses import dataclass
from typing import Any

from prune2deploy.backends.base import AbstractBackend
from prune2deploy.errors import DeviceError, InputError, one_line


@dataclass(frozen=True)
class BackendInfo:
    """A row of the table: ``target`` is ``module:Class``, ``extra`` is what pip installs for it."""

    name: str
    target: str
    description: str
    extra: str
    benches: bool
    builds: bool

    def status(self) -> str | None:
        """Return None when the backend can be used here, else in one line what is missing and how to get it."""
        missing: str | None = self.load().missing()
        return None if missing is None else one_line(missing)

    def load(self) -> Any:
        """Return the backend's class."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


BACKENDS: dict[str, BackendInfo] = {
    info.name: info
    for info in (
        BackendInfo(
            name="ort-cpu",
            target="prune2deploy.backends.onnxruntime:OnnxRuntimeCpu",
            description="ONNX Runtime on this machine's CPU",
            extra="cpu",
            benches=True,
            builds=False,
        ),
        BackendInfo(
            name="ort-cuda",
            target="prune2deploy.backends.onnxruntime:OnnxRuntimeCuda",
            description="ONNX Runtime on an NVIDIA GPU, by its CUDA provider",
            extra="gpu",
            benches=True,
            builds=False,
        ),
        BackendInfo(
            name="tensorrt",
            target="prune2deploy.backends.tensorrt:TensorRT",
            description="TensorRT engines for NVIDIA GPUs",
            extra="tensorrt",
            benches=False,
            builds=True,
        ),
    )
}


def load_backend(name: str) -> AbstractBackend:
    """Return a backend that measures, after it has shown that it works here.

    Raises:
        InputError: if there is no such backend, or it measures nothing.
        DeviceError: if its package or its device is not there.
    """
    able = ", ".join(known for known, info in BACKENDS.items() if info.benches)
    if name not in BACKENDS:
        raise InputError(f"there is no backend '{name}'; those that measure are {able}")
    info = BACKENDS[name]
    if not info.benches:
        raise InputError(f"backend '{name}' builds engines but measures nothing yet; those that measure are {able}")
    missing = info.status()
    if missing is not None:
        raise DeviceError(missing if name in missing else f"backend '{name}': {missing}")
    backend: AbstractBackend = info.load()()
    return backend
