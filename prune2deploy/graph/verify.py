"""Verify: that two graphs compute the same, by running both. It knows no rules, so it cannot repeat their mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from prune2deploy.errors import DeviceError, InputError, VerifyError, one_line
from prune2deploy.graph.cases import FAR, Case, Feeds, made_cases
from prune2deploy.graph.float32 import has_other_floats, in_float32, read_bare

RTOL = 1e-4
NOISE_FACTOR = 8.0
"""How many times the reference's own rounding (optimisations on against off) is allowed, by channel."""
SHAKEN = 4
"""How many times the weights are moved by a last place, where graphs differ by more than the noise."""
MOST_NOISE = 0.01
"""Of its channel's scale: on usual inputs a difference beyond this is never put down to rounding."""
SHAKEN_FACTOR = 32.0
"""As `NOISE_FACTOR`, of what moving the weights was seen to move: a few draws show only part of it."""
STEP_FACTOR = 2.0
"""As `NOISE_FACTOR`, where rounding makes whole steps of integers."""
HOPELESS = 0.001
"""Of its channel's scale: where rounding alone moves more than this on inputs beyond the usual, they prove nothing."""
FAINT = 1e-4
"""Of the largest input (or 1): an output channel that is smaller everywhere may be nothing but rounding."""
LAST_PLACES = 4.0
"""Units in the last place of the largest output (in half precision, of the channel's) that are always allowed."""
HUGE = 1e308
Contract = tuple[str, tuple[Any, ...] | None]
"""The type of an input or output, and its shape where one is given."""


@dataclass
class OutputResult:
    """The worst agreement of one output channel by channel: its difference, and what was allowed there.

    ``largest`` is the output's largest magnitude over all inputs, ``relative`` the difference as a share of the limit.
    """

    name: str
    largest: float
    difference: float = 0.0
    limit: float = 0.0
    relative: float = 0.0
    where: str = ""


@dataclass
class Verification:
    """What was compared and how well it agreed."""

    outputs: list[OutputResult]
    cases: int
    rtol: float
    computed_in: str | None
    """Set where ONNX Runtime has no kernels for the graph's own type: both graphs were then run in this one."""
    not_numbers: list[str]
    """Outputs of the reference that were not a number on any input, of which nothing is proved."""
    ill_conditioned: list[str]
    """Inputs on which the graphs agree no better than the reference agrees with itself after its weights were moved by
    a unit in the last place, or quantised graphs with themselves, optimised; of those beyond the usual, some prove
    nothing therefore."""

    @property
    def agrees(self) -> bool:
        """Whether no output differs by more than its limit."""
        return all(output.relative <= 1 for output in self.outputs)

    def to_json(self) -> dict[str, object]:
        """Return the section ``verify`` of a report."""
        return {
            "outputs": [vars(output) for output in self.outputs],
            "cases": self.cases,
            "rtol": self.rtol,
            "computed_in": self.computed_in,
            "not_numbers": self.not_numbers,
            "ill_conditioned": self.ill_conditioned,
        }


def verify(
    reference: Path | bytes,
    candidate: Path | bytes,
    *,
    rtol: float = RTOL,
    samples: Mapping[str, np.ndarray] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> Verification:
    """Return how well two graphs agree on seeded random, border-heavy, constant and (if given) real inputs.

    Both graphs are checked by onnx, their shapes inferred, and run in ONNX Runtime with graph optimisations off and on.
    Each output channel is compared against its own scale: the largest magnitude of the reference in it over all inputs,
    times ``rtol``, plus what rounding alone moves (the reference with optimisations on against off). Where that does
    not cover a difference, the reference is also run with its weights moved by a unit in the last place, at random:
    what that moves is rounding too, on usual inputs up to a hundredth of the scale; on large ones, so are a few last
    places of the largest. Such inputs are listed.

    Args:
        reference: the graph that is right.
        candidate: the graph that must agree.
        rtol: the difference allowed, relative to each channel's scale.
        samples: real inputs by name, used besides the made ones.
        shapes: whole shapes of inputs whose dynamic axes cannot be 32 and 64.
        seed: of the random inputs.

    Raises:
        VerifyError: if they differ anywhere by more than allowed, or their inputs or outputs do.
        InputError: if the reference cannot be run, or ``rtol`` does not lie between 0 and 1.
        DeviceError: if onnxruntime is not installed.
    """
    if not 0 <= rtol <= 1:
        raise InputError(f"--rtol is a share of each output channel's scale, between 0 and 1, not {rtol:g}; try 1e-4")
    found = differences(reference, candidate, rtol=rtol, samples=samples, shapes=shapes, seed=seed)
    _raise_if_different(found.outputs, rtol)
    return found


def why_it_does_not_run(graph: bytes) -> str | None:
    """Return why ONNX Runtime cannot run a graph on made inputs, or None where it can (or is not installed)."""
    try:
        _expected(_reference(graph), None, {}, seed=0)
    except (InputError, VerifyError) as error:
        return one_line(error, 200)
    except MemoryError:
        return "it wants more memory than there is"
    except (_NoKernelError, DeviceError):
        return None
    return None


def differences(
    reference: Path | bytes,
    candidate: Path | bytes,
    *,
    rtol: float = 1.0,
    samples: Mapping[str, np.ndarray] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    far: bool = True,
) -> Verification:
    """Return how far two graphs are apart, however far that is; with ``rtol`` 1 a limit is its channel's scale.

    Arguments and errors are those of `verify`, but a difference of values raises nothing. Without ``far`` no inputs
    beyond the usual are tried.
    """
    try:
        sides, computed_in = [_reference(reference), _Side(candidate, "the candidate")], None
    except _NoKernelError:
        twins = [in_float32(graph) for graph in (reference, candidate)]
        sides, computed_in = [_reference(twins[0]), _Side(twins[1], "the candidate")], "float32"
    _same_contract(*sides)
    cases, expected = _expected(sides[0], samples, shapes or {}, seed, far=far)
    usual = _Scales(run for case, runs in zip(cases, expected, strict=True) if case.label not in FAR for run in runs)
    results = {name: OutputResult(name, min(usual.largest[name], HUGE)) for name in sides[0].outputs}
    shaken = _Shaken(sides[0])
    ill: dict[str, None] = {}
    for case, runs in zip(cases, expected, strict=True):
        scales = _Scales(runs) if case.label in FAR else usual
        gots = [sides[1].run(case.feeds, optimised=optimised) for optimised in (False, True)]
        for optimised, want, got in zip((False, True), runs, gots, strict=True):
            for name, result in results.items():
                steps = sides[0].quantised and not optimised
                scale = scales.of(name, want[name])
                allowed = rtol * scale + _last_places(want[name], scale, scales.largest[name])
                allowed = allowed + _rounding(case, _moved(name, want, runs, steps=steps), scale, steps=steps)
                difference = _difference(name, want[name], got[name], case.title, overflows=case.label in FAR)
                if (difference > allowed).any():
                    ill[case.title] = None
                    moved = _moved(name, want, shaken.runs(case), steps=sides[0].quantised)
                    allowed = allowed + _rounding(case, moved, scale, steps=False, shaken=True)
                    if sides[0].quantised and optimised:  # the runtime drops roundings that follow one another
                        allowed = allowed + _moved(name, want, runs, steps=True) + _moved(name, got, gots, steps=True)
                _note(result, difference, allowed, case.title)
    silent = [name for name in results if usual.nowhere_finite(name)]
    return Verification(list(results.values()), len(cases), rtol, computed_in, silent, list(ill))


class _NoKernelError(Exception):
    """ONNX Runtime has no kernel for an operator in the graph's own type (double and bfloat16 convolutions)."""


def open_session(graph: Path | bytes, *, optimised: bool, cannot: str, threads: int = 1) -> Any:
    """Return an ONNX Runtime session on the CPU; ``cannot`` says what is impossible without the runtime.

    Raises:
        DeviceError: if onnxruntime is not installed.
        Exception: of ONNX Runtime's own, where it refuses the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        message = f"onnxruntime is not installed, so {cannot}; pip install 'prune2deploy[cpu]'"
        raise DeviceError(message) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it logs as an error it also raises
    options.intra_op_num_threads = threads
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    source = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class _Side:
    """One graph with its two ONNX Runtime sessions."""

    def __init__(self, graph: Path | bytes, title: str) -> None:
        self.graph = graph
        self.title = f"'{graph}'" if isinstance(graph, Path) else title
        self._check(graph)
        self._sessions = {optimised: self._open(graph, optimised) for optimised in (False, True)}
        session, model = self._sessions[True], read_bare(graph)
        self.quantised = any("Quantize" in node.op_type or "QLinear" in node.op_type for node in model.graph.node)
        """Whether it rounds floats to integers (optimised, that is done by integer kernels, which do not waver)."""
        try:
            self.inputs: dict[str, tuple[str, tuple[Any, ...]]] = {
                item.name: (item.type, tuple(item.shape)) for item in session.get_inputs()
            }
            self.outputs: dict[str, Contract] = {
                item.name: (item.type, _declared(value))
                for item, value in zip(session.get_outputs(), model.graph.output, strict=True)
            }
        except UnicodeDecodeError as error:
            raise VerifyError(f"a name in {self.title} is no text") from error

    def _check(self, graph: Path | bytes) -> None:
        try:
            if isinstance(graph, Path):
                onnx.checker.check_model(str(graph))
            else:
                onnx.checker.check_model(graph)
        except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
            raise VerifyError(f"{self.title} is not a valid ONNX graph: {one_line(error, 200)}") from error

    def _open(self, graph: Path | bytes, optimised: bool) -> Any:
        try:
            return open_session(graph, optimised=optimised, cannot="nothing can be verified")
        except DeviceError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            if "NOT_IMPLEMENTED" in str(error) and has_other_floats(graph):
                raise _NoKernelError from error
            raise VerifyError(f"ONNX Runtime refuses {self.title}: {one_line(error, 200)}") from error

    def run(self, feeds: Feeds, *, optimised: bool) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        try:
            values = self._sessions[optimised].run(None, feeds)
        except Exception as error:  # as above
            raise VerifyError(f"ONNX Runtime cannot run {self.title}: {one_line(error, 200)}") from error
        return dict(zip(self.outputs, values, strict=True))


def _declared(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """Return an output's shape as the file gives it (ONNX Runtime puts what it infers in the place of names)."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)


def _reference(graph: Path | bytes) -> _Side:
    try:
        return _Side(graph, "the reference")
    except VerifyError as error:
        raise InputError(f"{error}; it cannot be compared with: export it again") from error


def _reference_run(side: _Side, feeds: Feeds, optimised: bool) -> dict[str, np.ndarray]:
    try:
        return side.run(feeds, optimised=optimised)
    except VerifyError as error:
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        raise InputError(
            f"{error}; it was given {shapes}: give the shape that it takes with --input NAME:SHAPE"
        ) from error


def _same_contract(reference: _Side, candidate: _Side) -> None:
    for kind in ("inputs", "outputs"):
        want, got = getattr(reference, kind), getattr(candidate, kind)
        if list(want) != list(got) or not all(_agree(want[name], got[name]) for name in want):
            raise VerifyError(f"the {kind} differ: {want} in {reference.title}, {got} in {candidate.title}")


def _agree(want: Contract, got: Contract) -> bool:
    """Whether two declared types are the same; a size of which nothing is said may be known in the other graph."""
    if want[0] != got[0] or want[1] is None or got[1] is None:
        return want[0] == got[0]
    return len(want[1]) == len(got[1]) and all(
        a == b or a is None or b is None for a, b in zip(want[1], got[1], strict=True)
    )


def _expected(
    side: _Side,
    samples: Mapping[str, np.ndarray] | None,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    *,
    far: bool = True,
) -> tuple[list[Case], list[list[dict[str, np.ndarray]]]]:
    """Return the cases with the reference's runs, not optimised and optimised.

    Dynamic axes of other names get other sizes, so that none is mistaken for another; where the graph does not run on
    those (it wants squares, say), they are all equal.
    """
    try:
        cases = list(made_cases(side.inputs, samples, shapes, seed, apart=True, far=far))
        runs = [[_reference_run(side, case.feeds, optimised) for optimised in (False, True)] for case in cases]
    except InputError:
        cases = list(made_cases(side.inputs, samples, shapes, seed, apart=False, far=far))
        runs = [[_reference_run(side, case.feeds, optimised) for optimised in (False, True)] for case in cases]
    return cases, runs


def _magnitudes(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.nan_to_num(np.abs(values.astype(np.float64)), posinf=0.0))


def _channel_axes(rank: int) -> tuple[int, ...]:
    """Return the axes that tell channels apart: 1, and the last one too where boxes may lie along axis 1."""
    return () if rank < 2 else (1, rank - 1) if rank > 2 else (1,)


def _over_others(values: np.ndarray, axis: int) -> np.ndarray:
    others = tuple(other for other in range(values.ndim) if other != axis)
    return np.asarray(values.max(axis=others, keepdims=True, initial=0.0))


class _Scales:
    """The largest magnitude of every output, and of every channel of it, over all runs of the reference."""

    def __init__(self, runs: Iterable[dict[str, np.ndarray]]) -> None:
        self.largest: dict[str, float] = {}
        self._channels: dict[tuple[str, int, int], np.ndarray] = {}
        self._elements: set[str] = set()
        self._finite: dict[str, int] = {}
        for run in runs:
            for name, values in run.items():
                if values.size and np.issubdtype(values.dtype, np.floating):
                    self._elements.add(name)
                    self._finite[name] = self._finite.get(name, 0) + int(np.isfinite(values).sum())
                magnitudes = _magnitudes(values)
                self.largest[name] = max(self.largest.get(name, 0.0), float(magnitudes.max(initial=0.0)))
                for axis in _channel_axes(values.ndim):
                    key = (name, axis, values.shape[axis])
                    found = _over_others(magnitudes, axis)
                    self._channels[key] = np.maximum(self._channels.get(key, 0.0), found)

    def nowhere_finite(self, name: str) -> bool:
        """Return whether not one element of an output was a finite number in any run."""
        return name in self._elements and not self._finite.get(name, 0)

    def of(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return each element's scale: its channel's; the smaller one where two axes may tell channels apart."""
        scale = np.full(values.shape, self.largest[name])
        for axis in _channel_axes(values.ndim):
            scale = np.minimum(scale, self._channels[name, axis, values.shape[axis]])
        return scale


def _last_places(values: np.ndarray, scale: np.ndarray, largest: float) -> np.ndarray:
    """Return a few units in the last place of the largest output, or of the channel's."""
    if not np.issubdtype(values.dtype, np.floating):
        return np.zeros(())
    # In half precision the last places of a box of 900 would hide a whole score beside it.
    return np.asarray(
        LAST_PLACES * float(np.finfo(values.dtype).eps) * (scale if values.dtype.itemsize < 4 else largest)
    )


def _moved(name: str, want: dict[str, np.ndarray], runs: Iterable[dict[str, np.ndarray]], *, steps: bool) -> np.ndarray:
    """Return how far other runs of a graph are from one of an output, by channel; those of another shape do not count.

    ``steps``: floats are rounded to integers on the way, where a last bit may become a whole step anywhere.
    """
    values = want[name].astype(np.float64)
    axes = () if steps else _channel_axes(values.ndim)
    noise = np.zeros((1,) * values.ndim)
    for run in runs:
        if run[name].shape != values.shape:
            continue
        with np.errstate(invalid="ignore"):
            moved = _magnitudes(values - run[name].astype(np.float64))
        noise = np.maximum(noise, 0.0 if axes else moved.max(initial=0.0))
        for axis in axes:
            noise = np.maximum(noise, _over_others(moved, axis))
    return noise


def _rounding(case: Case, moved: np.ndarray, scale: np.ndarray, *, steps: bool, shaken: bool = False) -> np.ndarray:
    """Return which differences may be put down to rounding, given what it was seen to move.

    ``shaken``: by moving the weights; inputs beyond the usual that amplify rounding so prove nothing. On usual inputs
    there is a limit, but where outputs are as faint as rounding itself. Whole ``steps`` have none.
    """
    if steps:
        return STEP_FACTOR * moved
    noise = (SHAKEN_FACTOR if shaken else NOISE_FACTOR) * moved
    largest = max([1.0, *(float(_magnitudes(feed).max(initial=0.0)) for feed in case.feeds.values())])
    last_places = LAST_PLACES * float(np.finfo(np.float32).eps) * largest
    if shaken:  # what is no larger than a few last places of the inputs is what is left of a difference of equals
        noise = np.where(scale <= last_places, scale + noise, noise)
    if case.label in FAR:
        # A constant is rounded alike beside inputs, however weights are moved.
        noise = noise + shaken * np.minimum(last_places, MOST_NOISE * scale)
        return np.where(shaken & (NOISE_FACTOR * moved > HOPELESS * scale), np.inf, noise)
    return np.where(scale < FAINT * largest, noise, np.minimum(noise, MOST_NOISE * scale))


_SHAKEABLE = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})


class _Shaken:
    """A graph whose weights are moved by a unit in the last place, up or down at random; made when it is asked for."""

    def __init__(self, side: _Side) -> None:
        self._side = side
        self._last: tuple[Case, list[dict[str, np.ndarray]]] | None = None

    def runs(self, case: Case) -> list[dict[str, np.ndarray]]:
        """Return the outputs on one case's inputs; graphs that cannot run on them any more are left out."""
        if self._last is None or self._last[0] is not case:
            found = []
            for session in self._sessions:
                with suppress(Exception):  # ONNX Runtime's exceptions share no public base class
                    found.append(dict(zip(self._side.outputs, session.run(None, case.feeds), strict=True)))
            self._last = case, found
        return self._last[1]

    @cached_property
    def _sessions(self) -> list[Any]:
        graph = self._side.graph
        model = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(str(graph))
        factors = {name for node in model.graph.node if node.op_type in ("Resize", "Upsample") for name in node.input}
        weights = [
            tensor
            for tensor in model.graph.initializer
            if math.prod(tensor.dims) > 1 and tensor.data_type in _SHAKEABLE and tensor.name not in factors
        ]
        arrays = [numpy_helper.to_array(tensor) for tensor in weights]
        random, sessions = np.random.default_rng(0), []
        for _ in range(SHAKEN if model.ByteSize() < 2**31 else 0):
            for tensor, array in zip(weights, arrays, strict=True):
                ends = np.where(random.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype)
                moved = np.where(array == 0, array, np.nextafter(array, ends))
                tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
            sessions.append(open_session(model.SerializeToString(), optimised=False, cannot="nothing can be verified"))
        return sessions


def _difference(name: str, want: np.ndarray, got: np.ndarray, label: str, *, overflows: bool) -> np.ndarray:
    """Return how far one output is from the reference's; with ``overflows`` what is no number there may be anything."""
    if want.shape != got.shape or want.dtype != got.dtype:
        raise VerifyError(
            f"output '{name}' is {got.dtype}{list(got.shape)} in place of {want.dtype}{list(want.shape)} "
            f"on {label} inputs"
        )
    a, b = want.astype(np.float64), got.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (overflows & ~np.isfinite(a))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nan_to_num(np.where(same, 0.0, np.abs(a - b)), nan=np.inf, posinf=np.inf))


def _note(result: OutputResult, difference: np.ndarray, allowed: np.ndarray, label: str) -> None:
    """Keep the worst agreement of an output."""
    if not difference.size:
        return
    limits = np.maximum(np.minimum(allowed, HUGE), np.finfo(np.float64).tiny)
    ratio = np.where(np.isinf(difference), np.inf, difference / limits)
    worst = int(ratio.argmax())
    relative = float(ratio.flat[worst])
    if relative > result.relative or not result.where:
        result.difference = min(float(difference.flat[worst]), HUGE)
        result.limit = float(np.broadcast_to(limits, difference.shape).flat[worst])
        result.relative, result.where = min(relative, HUGE), label


def _raise_if_different(results: list[OutputResult], rtol: float) -> None:
    bad = [result for result in results if not result.relative <= 1]
    if bad:
        worst = max(bad, key=lambda result: result.relative)
        raise VerifyError(
            f"output '{worst.name}' differs by {worst.difference:.2e} (limit {worst.limit:.1e}, rtol {rtol:.0e}) on "
            f"{worst.where} inputs"
        )
