"""Verify: that two graphs compute the same, by running both. It knows no rules, so it cannot repeat their mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from prune2deploy.errors import DeviceError, InputError, VerifyError, one_line
from prune2deploy.graph.float32 import has_other_floats, in_float32, read_bare

RTOL = 1e-4
NOISE_FACTOR = 8.0
"""How many times the reference's own rounding (optimisations on against off) is allowed, by channel."""
LAST_PLACES = 4.0
"""Units in the last place of the largest output (in half precision, of the channel's) that are always allowed."""
HUGE = 1e308
DYNAMIC_SIZES = ((1, 32), (3, 64))
"""What dynamic axes are set to: the first axis, and the others."""
MOST_ELEMENTS = 2**30
"""Of an input that is made up; larger ones are taken for a mistake."""
STEP = 32
"""By how much the sizes of dynamic axes differ: a multiple that most strides divide."""
Feeds = dict[str, np.ndarray]
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

    def to_json(self) -> dict[str, object]:
        """Return the section ``verify`` of a report."""
        return {
            "outputs": [vars(output) for output in self.outputs],
            "cases": self.cases,
            "rtol": self.rtol,
            "computed_in": self.computed_in,
            "not_numbers": self.not_numbers,
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
    times ``rtol``, plus what rounding alone moves (the reference with optimisations on against off).

    Args:
        reference: the graph that is right.
        candidate: the graph that must agree.
        rtol: the difference allowed, relative to each channel's scale.
        samples: real inputs by name, used besides the made ones.
        shapes: whole shapes of inputs whose dynamic axes cannot be 32 and 64.
        seed: of the random inputs.

    Raises:
        VerifyError: if they differ anywhere by more than allowed, or their inputs or outputs do.
        InputError: if the reference cannot be run.
        DeviceError: if onnxruntime is not installed.
    """
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
    usual = _Scales(run for case, runs in zip(cases, expected, strict=True) if case.label not in _FAR for run in runs)
    results = {name: OutputResult(name, min(usual.largest[name], HUGE)) for name in sides[0].outputs}
    for case, runs in zip(cases, expected, strict=True):
        scales = _Scales(runs) if case.label in _FAR else usual
        label = case.title
        for optimised, want in zip((False, True), runs, strict=True):
            got = sides[1].run(case.feeds, optimised=optimised)
            for name, result in results.items():
                flips = sides[0].quantised and not optimised
                scale = scales.of(name, want[name])
                allowed = rtol * scale + _rounding(runs, name, scale, scales.largest[name], flips=flips)
                _compare(result, want[name], got[name], allowed, label, overflows=case.label in _FAR)
    silent = [name for name in results if usual.nowhere_finite(name)]
    return Verification(list(results.values()), len(cases), rtol, computed_in, silent)


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


@dataclass(frozen=True, eq=False)
class _Case:
    """Inputs to run both graphs on: how they were made, and what they are called in messages."""

    label: str
    title: str
    feeds: Feeds


def _expected(
    side: _Side,
    samples: Mapping[str, np.ndarray] | None,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    *,
    far: bool = True,
) -> tuple[list[_Case], list[list[dict[str, np.ndarray]]]]:
    """Return the cases with the reference's runs, not optimised and optimised.

    Dynamic axes of other names get other sizes, so that none is mistaken for another; where the graph does not run on
    those (it wants squares, say), they are all equal.
    """
    try:
        cases = list(_cases(side, samples, shapes, seed, apart=True, far=far))
        runs = [[_reference_run(side, case.feeds, optimised) for optimised in (False, True)] for case in cases]
    except InputError:
        cases = list(_cases(side, samples, shapes, seed, apart=False, far=far))
        runs = [[_reference_run(side, case.feeds, optimised) for optimised in (False, True)] for case in cases]
    return cases, runs


def _cases(
    side: _Side,
    samples: Mapping[str, np.ndarray] | None,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    *,
    apart: bool,
    far: bool,
) -> Iterator[_Case]:
    random = np.random.default_rng(seed)
    dynamic = any(not isinstance(size, int) for _, shape in side.inputs.values() for size in shape)
    unknown = [name for name in shapes if name not in side.inputs]
    if unknown:
        raise InputError(f"there is no input '{unknown[0]}'; the inputs are {', '.join(side.inputs)}")
    for batch, size in DYNAMIC_SIZES if dynamic else ((1, 1),):
        sizes = _Sizes(batch, size, apart=apart)
        concrete = {name: shapes.get(name) or sizes.of(shape) for name, (_, shape) in side.inputs.items()}
        too_large = [name for name, shape in concrete.items() if math.prod(shape) > MOST_ELEMENTS]
        if too_large:
            raise InputError(
                f"input '{too_large[0]}' of shape {list(concrete[too_large[0]])} is too large to be made up"
            )
        for label, make in _MAKERS.items():
            if label in _FAR and not far:
                continue
            feeds = {name: _typed(make(random, concrete[name]), kind) for name, (kind, _) in side.inputs.items()}
            yield _Case(label, f"{label}, batch {batch}", feeds)
    if samples is not None:
        missing = [name for name in side.inputs if name not in samples]
        if missing:
            raise InputError(f"the real samples lack the input '{missing[0]}'; give one array per input")
        feeds = {name: np.ascontiguousarray(samples[name]) for name in side.inputs}
        yield _Case("real samples", "real samples", feeds)


class _Sizes:
    """What dynamic axes are set to: the first axis to the batch; of the others, equal names to equal sizes."""

    def __init__(self, batch: int, size: int, *, apart: bool) -> None:
        self._batch, self._size, self._step = batch, size, STEP if apart else 0
        self._named: dict[str, int] = {}
        self._count = 0

    def of(self, shape: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the sizes of an input."""
        return tuple(self._of(axis, have) for axis, have in enumerate(shape))

    def _of(self, axis: int, have: Any) -> int:
        if isinstance(have, int):
            return have
        if have in self._named:
            return self._named[have]
        size = self._batch
        if axis:
            size, self._count = self._size + self._step * self._count, self._count + 1
        if isinstance(have, str) and have:
            self._named[have] = size
        return size


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.standard_normal(shape)


def _bordered(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return values that are large on the border of the last two axes and small inside."""
    values = random.standard_normal(shape) * 0.1
    for axis in (-1, -2):
        if len(shape) >= 3 and shape[axis] > 2:
            index: list[Any] = [slice(None)] * len(shape)
            for edge in (0, -1):
                index[axis] = edge
                values[tuple(index)] += 3 * random.standard_normal(values[tuple(index)].shape)
    return values


def _flat(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, random.uniform(0.5, 1.5))


def _large(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 100 * random.standard_normal(shape)


_MAKERS = {"random": _normal, "border-heavy": _bordered, "constant": _flat, "large": _large}
_FAR = frozenset({"large"})
"""Inputs beyond the usual, such as pixels up to 255: each such case is held against its own scale."""

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


_INTEGERS: dict[type, tuple[int, int]] = {np.int8: (-128, 127), np.uint8: (0, 255)}


def _typed(values: np.ndarray, kind: str) -> np.ndarray:
    dtype = _TYPES.get(kind)
    if dtype is None:
        raise InputError(f"inputs of type {kind} cannot be made up; give real samples")
    if np.issubdtype(dtype, np.integer):
        low, high = _INTEGERS.get(dtype, (0, 100))  # the wider ones are mostly indices
        values = np.clip(values * 50 if low < 0 else np.abs(values) * 50, low, high)
    return np.asarray((values > 0) if dtype is np.bool_ else values.astype(dtype))


def _magnitudes(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.nan_to_num(np.abs(values.astype(np.float64)), posinf=0.0))


def _channel_axes(rank: int) -> tuple[int, ...]:
    """Return the axes that tell channels apart: 1, and the last one too where boxes may lie along axis 1."""
    return () if rank < 2 else (1, rank - 1) if rank in (3, 5) else (1,)


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


def _rounding(
    runs: list[dict[str, np.ndarray]], name: str, scale: np.ndarray, largest: float, *, flips: bool
) -> np.ndarray:
    """Return what rounding alone may move, by channel: the reference's two runs tell, and a few last places.

    ``flips``: floats are rounded to integers on the way, where a last bit may become a whole step anywhere.
    """
    a, b = (run[name] for run in runs)
    with np.errstate(invalid="ignore"):
        moved = _magnitudes(a.astype(np.float64) - b.astype(np.float64))
    epsilon = float(np.finfo(a.dtype).eps) if np.issubdtype(a.dtype, np.floating) else 0.0
    axes = () if flips else _channel_axes(a.ndim)
    noise = np.full((1,) * a.ndim, 0.0 if axes else moved.max(initial=0.0))
    for axis in axes:
        noise = np.maximum(noise, _over_others(moved, axis))
    # In half precision the last places of a box of 900 would hide a whole score beside it.
    return np.asarray(NOISE_FACTOR * noise + LAST_PLACES * epsilon * (scale if a.dtype.itemsize < 4 else largest))


def _compare(
    result: OutputResult, want: np.ndarray, got: np.ndarray, allowed: np.ndarray, label: str, *, overflows: bool
) -> None:
    """Hold one output against the reference's; with ``overflows`` what is no number there may be anything."""
    if want.shape != got.shape or want.dtype != got.dtype:
        raise VerifyError(
            f"output '{result.name}' is {got.dtype}{list(got.shape)} in place of {want.dtype}{list(want.shape)} "
            f"on {label} inputs"
        )
    if not want.size:
        return
    a, b = want.astype(np.float64), got.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (overflows & ~np.isfinite(a))
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(np.where(same, 0.0, np.abs(a - b)), nan=np.inf, posinf=np.inf)
    ratio = difference / np.maximum(allowed, np.finfo(np.float64).tiny)
    worst = int(ratio.argmax())
    relative = float(ratio.flat[worst])
    if relative > result.relative or not result.where:
        result.difference = min(float(difference.flat[worst]), HUGE)
        result.limit = float(np.broadcast_to(allowed, a.shape).flat[worst])
        result.relative, result.where = min(relative, HUGE), label


def _raise_if_different(results: list[OutputResult], rtol: float) -> None:
    bad = [result for result in results if result.relative > 1]
    if bad:
        worst = max(bad, key=lambda result: result.relative)
        raise VerifyError(
            f"output '{worst.name}' differs by {worst.difference:.2e} (limit {worst.limit:.1e}, rtol {rtol:.0e}) on "
            f"{worst.where} inputs"
        )
