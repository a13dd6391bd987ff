"""How far the outputs of a changed graph were measured to be from those of the reference, beside what is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from prune2deploy.errors import DeviceError, InputError, one_line
from prune2deploy.graph.bound import REAL, InputRanges
from prune2deploy.graph.cases import Feeds, typed
from prune2deploy.graph.float32 import in_float32
from prune2deploy.graph.model import copy_of
from prune2deploy.graph.verify import open_session

DYNAMIC = 2
"""The size that open axes get unless a shape is given."""


@dataclass(frozen=True)
class Measured:
    """How far one output was seen to move.

    Attributes:
        largest: of all elements on all inputs, the rounding of the runtime included; infinite where one graph gives a
            number and the other none, NaN where neither gave one anywhere.
        rounding: what rounding alone moves, roughly: the reference with the runtime's optimisations on against off.
        computed_in: the type that both graphs were run in.
    """

    largest: float
    rounding: float
    computed_in: str

    def to_json(self) -> dict[str, Any]:
        """Return the measurement for a JSON object, with None for what is no finite number."""
        numbers = {"measured": self.largest, "rounding": self.rounding}
        finite = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
        return {**finite, "computed_in": self.computed_in}


def measured_change(
    reference: onnx.ModelProto,
    changed: onnx.ModelProto,
    input_ranges: InputRanges,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> dict[str, Measured]:
    """Return for every output the largest difference on seeded inputs of the box: even, at its corners, and flat.

    The graphs are run in float64 where ONNX Runtime has all kernels (of Conv it has none), else in their own type, or
    in float32 in the place of bfloat16 and double. The bound is of exact arithmetic; a measured difference may exceed
    it by rounding.

    Args:
        reference: the graph as it was.
        changed: the graph to compare.
        input_ranges: the box, as for `output_bound`; inputs that are not in it are made up, the same for both graphs.
        shapes: whole shapes of inputs whose open axes cannot be 2.
        seed: of the inputs.

    Raises:
        InputError: if ONNX Runtime cannot run the graphs on such inputs.
        DeviceError: if onnxruntime is not installed.
    """
    names = [value.name for value in reference.graph.output]
    largest, rounding = dict.fromkeys(names, np.nan), dict.fromkeys(names, np.nan)
    try:
        computed_in, sessions = _sessions(reference, changed)
        for feeds in _inputs(sessions[0].get_inputs(), input_ranges, shapes or {}, np.random.default_rng(seed)):
            runs = [session.run(names, feeds) for session in sessions]
            for name, want, again, got in zip(names, *runs, strict=True):
                largest[name] = float(np.fmax(largest[name], _apart(want, got)))
                rounding[name] = float(np.fmax(rounding[name], _apart(want, again)))
    except (DeviceError, InputError):
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise InputError(
            f"ONNX Runtime cannot measure the change ({one_line(error, 200)}); give shapes that it takes"
        ) from error
    return {name: Measured(largest[name], rounding[name], computed_in) for name in names}


def _apart(before: Any, after: Any) -> float:
    """Return the largest difference; elements that are the same infinity or no number in both are left out."""
    want, got = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if want.shape != got.shape:  # as many rows as the values say
        return float("inf")
    with np.errstate(invalid="ignore"):
        moved = np.nan_to_num(np.abs(got - want), nan=np.inf, posinf=np.inf)
    neither = ~np.isfinite(want) & ((want == got) | (np.isnan(want) & np.isnan(got)))
    return float(np.fmax.reduce(moved[~neither], initial=np.nan))


# --- the sessions -----------------------------------------------------------------------------------------------------


def _sessions(reference: onnx.ModelProto, changed: onnx.ModelProto) -> tuple[str, list[Any]]:
    """Return what is computed in, and sessions of the reference, the same optimised, and the changed graph."""
    try:
        return "float64", _opened(_in_float64(reference), _in_float64(changed))
    except DeviceError:
        raise
    except Exception:  # a kernel is missing, or a type is fixed; ONNX Runtime's exceptions share no public base class
        half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in reference.graph.initializer)
        twins = [in_float32(model.SerializeToString()) for model in (reference, changed)]
        return "float16" if half else "float32", _opened(*twins)


def _opened(reference: bytes, changed: bytes) -> list[Any]:
    return [
        open_session(graph, optimised=optimised, cannot="no change can be measured")
        for graph, optimised in ((reference, False), (reference, True), (changed, False))
    ]


def _in_float64(model: onnx.ModelProto) -> bytes:
    """Return the graph in float64; where another type is left, as in graphs inside it, ONNX Runtime refuses it."""
    copy = copy_of(model)
    graph = copy.graph
    del graph.value_info[:]
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    for tensor in (*graph.initializer, *(attribute.t for attribute in attributes)):
        if tensor.data_type in REAL:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in REAL:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for attribute in attributes:
        if attribute.name in ("to", "dtype") and attribute.i in REAL:
            attribute.i = TensorProto.DOUBLE
    return bytes(copy.SerializeToString())


# --- the inputs -------------------------------------------------------------------------------------------------------


def _inputs(
    inputs: list[Any], ranges: InputRanges, shapes: Mapping[str, tuple[int, ...]], random: np.random.Generator
) -> Iterator[Feeds]:
    made: list[Feeds] = [{} for _ in range(4)]
    for given in inputs:
        shape = shapes.get(given.name) or tuple(n if isinstance(n, int) else DYNAMIC for n in given.shape)
        if given.name in ranges:
            low, high = (_broadcast(np.asarray(end, dtype=np.float64), shape) for end in ranges[given.name])
            share = random.random(shape)
            cases = [low * (1 - share) + high * share, np.where(random.random(shape) < 0.5, low, high), low, high]
        else:
            cases = [random.standard_normal(shape) for _ in made]
        for feeds, case in zip(made, cases, strict=True):
            with np.errstate(over="ignore"):  # the box may reach beyond what the type holds
                feeds[given.name] = typed(case, given.type)
    yield from made


def _broadcast(end: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if end.ndim == 1 and len(shape) > 1:
        end = end.reshape(-1, *(1,) * (len(shape) - 2))
    return np.broadcast_to(end, shape)
