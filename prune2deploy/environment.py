"""Where a result was made: the machine, its CPU and GPUs, and the versions of the packages that take part."""

import csv
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "prune2deploy",
    "numpy",
    "scipy",
    "onnx",
    "onnx-graphsurgeon",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "tensorrt",
    "torch",
    "accelerate",
    "torchvision",
    "timm",
    "scikit-learn",
    "safetensors",
)

_VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "asimddp", "i8mm", "sve", "sve2")

_GPU_FIELDS = ("name", "driver_version", "compute_cap", "memory.total")


def environment() -> dict[str, Any]:
    """Return the circumstances of a result, ready for JSON; says nothing of users, host names or paths."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "system": platform.platform(),
        "board": _read("/proc/device-tree/model"),
        "jetpack": _read("/etc/nv_tegra_release"),
        "cpu": cpu_model(),
        "cpu_vector_units": [flag for flag in _VECTOR_FLAGS if flag in _cpu_flags()],
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "memory_gib": _memory_gib(),
        "gpus": gpus(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "packages": installed_packages(),
    }


def installed_packages() -> dict[str, str]:
    """Return the versions of those packages that can change a result and are installed, without importing any."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """Return the CPU's name as the system gives it."""
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in {"model name", "hardware"}:
            return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[dict[str, str]]:
    """Return what ``nvidia-smi`` says of each GPU; empty where it is missing or cannot say."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = csv.reader(answer.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS)]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def _cpu_flags() -> set[str]:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in {"flags", "features"}:
            return set(value.split())
    return set()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
