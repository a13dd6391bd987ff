"""How far the outputs of a changed graph were measured to be from those of the reference, beside what is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from prune2deploy.errors import DeviceError, InputError, one_line
from prune2deploy.graph.bound import InputRanges
from prune2deploy.graph.verify import open_session

DYNAMIC = 2
"""The size that open axes get unless a shape is given."""


def measured_change(
    reference: onnx.ModelProto,
    changed: onnx.ModelProto,
    input_ranges: InputRanges,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return for every output the largest difference on seeded inputs of the box: even, at its corners, and flat.

    The difference includes the rounding of the runtime, which the bound does not.

    Args:
        reference: the graph as it was.
        changed: the graph to compare.
        input_ranges: the box, as for `output_bound`.
        shapes: whole shapes of inputs whose open axes cannot be 2.
        seed: of the inputs.

    Raises:
        InputError: if ONNX Runtime cannot run the graphs on such inputs.
        DeviceError: if onnxruntime is not installed.
    """
    largest = {value.name: 0.0 for value in reference.graph.output}
    try:
        sessions = [
            open_session(model.SerializeToString(), optimised=False, cannot="no change can be measured")
            for model in (reference, changed)
        ]
        for feeds in _inputs(sessions[0].get_inputs(), input_ranges, shapes or {}, np.random.default_rng(seed)):
            runs = [session.run(list(largest), feeds) for session in sessions]
            for name, want, got in zip(largest, *runs, strict=True):
                moved = np.abs(np.asarray(got, dtype=np.float64) - np.asarray(want, dtype=np.float64))
                largest[name] = max(largest[name], float(moved.max(initial=0.0)))
    except (DeviceError, InputError):
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise InputError(
            f"ONNX Runtime cannot measure the change ({one_line(error, 200)}); give shapes that it takes"
        ) from error
    return largest


_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


def _inputs(
    inputs: list[object], ranges: InputRanges, shapes: Mapping[str, tuple[int, ...]], random: np.random.Generator
) -> Iterator[dict[str, np.ndarray]]:
    made: list[dict[str, np.ndarray]] = [{} for _ in range(4)]
    for given in inputs:
        name, kind = str(getattr(given, "name", "")), _TYPES.get(str(getattr(given, "type", "")))
        if kind is None or name not in ranges:
            raise InputError(f"input '{name}' is no floating-point number, so it has no range to draw from")
        shape = shapes.get(name) or tuple(n if isinstance(n, int) else DYNAMIC for n in getattr(given, "shape", ()))
        low, high = (_broadcast(np.asarray(end, dtype=np.float64), shape) for end in ranges[name])
        cases = (random.uniform(low, high), np.where(random.random(shape) < 0.5, low, high), low, high)
        for feeds, case in zip(made, cases, strict=True):
            feeds[name] = np.asarray(case, dtype=kind)
    yield from made


def _broadcast(end: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if end.ndim == 1 and len(shape) > 1:
        end = end.reshape(-1, *(1,) * (len(shape) - 2))
    return np.broadcast_to(end, shape)
