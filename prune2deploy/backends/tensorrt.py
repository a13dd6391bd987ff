"""TensorRT: build an engine from an ONNX graph, and say from the engine itself in which precision it computes.

Works with TensorRT 10.3 (JetPack 6) to 11.4. Only names that all of these bindings have are used;
``tests/backends/test_tensorrt_conformance.py`` holds this file against the real bindings.

NO ENGINE HAS BEEN BUILT ON A GPU WITH THIS CODE YET. It was checked against the real Python bindings of 10.3.0,
10.16.1.11 and 11.4.0.106 with empty libraries behind them, and its control flow against a double of these bindings.

The network is strongly typed: the precision of a layer is the type of its tensors in the ONNX graph, never a builder
flag (TensorRT 11 has no such flags; asking for one there builds FP32 and says nothing).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prune2deploy.backends.engine_layers import EngineLayers, read_layer
from prune2deploy.backends.engine_shapes import Batch, Shape, ShapeRange, shape_ranges
from prune2deploy.errors import DeviceError, InputError, VerifyError, one_line
from prune2deploy.files import require_file, sha256, write_bytes

if TYPE_CHECKING:
    import tensorrt as trt

_logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "tf32")
"""What can be asked for: both take an FP32 graph; ``tf32`` lets TensorRT round the inputs of products to 10 bits."""

OLDEST = (10, 3)
_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.INFO}
_ERRORS = ("[INTERNAL_ERROR]", "[ERROR]")
_INSTALL = (
    "run \"pip install 'prune2deploy[tensorrt]'\", or on a Jetson make the virtual environment with "
    "--system-site-packages to get JetPack's"
)


@dataclass(frozen=True)
class BuildReport:
    """What was built, from what, and how; ``layers`` is the inspector's account, not what was asked for."""

    engine: Path
    log: Path
    size_bytes: int
    sha256: str
    onnx_sha256: str
    tensorrt: str
    precision: str
    strongly_typed: bool
    flags: tuple[str, ...]
    optimisation_level: int
    workspace_bytes: int
    profile: Mapping[str, ShapeRange]
    layers: EngineLayers
    warnings: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class _Request:
    precision: str
    workspace_bytes: int
    timing_cache: Path | None
    optimisation_level: int
    batch: Batch
    shapes: Mapping[str, ShapeRange]

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(
                f"engines are built in {' or '.join(PRECISIONS)}, not '{self.precision}': TensorRT takes other "
                "precisions from the types in the ONNX graph, not from the build, and this version converts no graphs"
            )
        if not 0 <= self.optimisation_level <= 5:
            raise InputError(f"the optimisation level {self.optimisation_level} is not 0 to 5; TensorRT's default is 3")
        if self.workspace_bytes <= 0:
            raise InputError(f"a workspace of {self.workspace_bytes} bytes is none; give some, for example {1 << 30}")


@dataclass
class _BuildLog:
    """TensorRT's messages of one build, without the verbose ones."""

    lines: list[str] = field(default_factory=list)

    def last(self, prefixes: tuple[str, ...], count: int = 3) -> str:
        found = [line for line in self.lines if line.startswith(prefixes)] or self.lines
        return one_line("; ".join(found[-count:]), 600) if found else "it logged nothing"


class TensorRT:
    """Builds engines with the TensorRT of this machine, for the GPU of this machine."""

    def build_engine(
        self,
        onnx: Path,
        out: Path,
        *,
        precision: str = "fp32",
        workspace_bytes: int = 1 << 30,
        timing_cache: Path | None = None,
        optimisation_level: int = 3,
        batch: Batch = (1, 1, 1),
        shapes: Mapping[str, ShapeRange] | None = None,
    ) -> BuildReport:
        """Build the engine ``out`` and return what it says of itself; TensorRT's log goes beside it, as ``.log``.

        Args:
            onnx: an FP32 graph; weights in files beside it are found.
            out: the engine's path, by convention ``RUN/engines/NAME-PRECISION.engine``.
            precision: one of `PRECISIONS`.
            workspace_bytes: most scratch memory a layer may use; on a Jetson it is the memory of the whole board.
            timing_cache: read if it is there, and written back; shared by two builds, equal layers get equal kernels.
            optimisation_level: 0 to 5, TensorRT's ``builder_optimization_level``.
            batch: smallest, tuned-for and largest batch, for inputs whose only dynamic axis is the first.
            shapes: input name -> (smallest, tuned-for, largest) shape, for inputs with other dynamic axes.

        Raises:
            InputError: if an argument is wrong or TensorRT cannot parse the graph.
            DeviceError: if TensorRT or a GPU is missing, or the build fails.
            VerifyError: if the engine computes in another precision than asked for; it is not kept.
        """
        request = _Request(precision, workspace_bytes, timing_cache, optimisation_level, batch, shapes or {})
        require_file(onnx, "an ONNX file")
        log = _BuildLog()
        log_path = out.with_suffix(".log")
        started = time.perf_counter()
        try:
            builder = _make_builder(log)
            plan, facts = _build(builder, onnx, request, log)
            layers = _inspect(plan, log)
            _require_precision(layers, request.precision, onnx, log_path)
        finally:
            if log.lines:
                write_bytes(log_path, ("\n".join(log.lines) + "\n").encode())
        write_bytes(out, plan)
        return BuildReport(
            engine=out,
            log=log_path,
            size_bytes=len(plan),
            sha256=sha256(out),
            onnx_sha256=sha256(onnx),
            tensorrt=facts.tensorrt,
            precision=precision,
            strongly_typed=facts.strongly_typed,
            flags=facts.flags,
            optimisation_level=optimisation_level,
            workspace_bytes=workspace_bytes,
            profile=facts.profile,
            layers=layers,
            warnings=tuple(line for line in log.lines if line.startswith("[WARNING]")),
            seconds=time.perf_counter() - started,
        )

    @classmethod
    def missing(cls) -> str | None:
        """Return in one line what is missing here and how to get it, or None when engines can be built."""
        return availability()


def availability() -> str | None:
    """Return in one line what keeps TensorRT from being used here, or None if a builder can be made."""
    try:
        _make_builder(_BuildLog())
    except DeviceError as error:
        return str(error)
    return None


def _version() -> str:
    """Return the version of the TensorRT that is installed.

    Raises:
        DeviceError: if it is not there, its libraries do not load, or it is older than `OLDEST`.
    """
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        raise DeviceError(f"TensorRT is not installed (no Python module '{error.name}'); {_INSTALL}") from error
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"TensorRT's libraries cannot be loaded ({one_line(error, 160)}); {_INSTALL}, or put their folder into "
            "LD_LIBRARY_PATH"
        ) from error
    version: str = trt.__version__
    if _numbers(version) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise DeviceError(f"TensorRT {version} is too old: {wanted} is the oldest that can be used; {_INSTALL}")
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _make_builder(log: _BuildLog) -> trt.Builder:
    """Return a builder; it is the first thing that fails where TensorRT loads but there is no GPU."""
    version = _version()
    import tensorrt as trt

    try:
        return trt.Builder(_make_logger(log))
    except TypeError as error:  # pybind11's words for the null pointer that the library returned
        raise DeviceError(
            f"TensorRT {version} finds no GPU that it can use ({log.last(_ERRORS, 1)}); run this on a machine with an "
            "NVIDIA GPU and a driver new enough for it"
        ) from error


def _make_logger(log: _BuildLog) -> trt.ILogger:
    import tensorrt as trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 asks for its own constructor by name

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            level = _LEVELS.get(severity.name)
            if level is not None:
                log.lines.append(f"[{severity.name}] {one_line(msg, 2000)}")
                _logger.log(level, "TensorRT: %s", msg)

    return Logger()


@dataclass(frozen=True)
class _BuildFacts:
    tensorrt: str
    strongly_typed: bool
    flags: tuple[str, ...]
    profile: Mapping[str, ShapeRange]


def _build(builder: trt.Builder, onnx: Path, request: _Request, log: _BuildLog) -> tuple[bytes, _BuildFacts]:
    """Return the serialized engine and how it was asked for."""
    import tensorrt as trt

    typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(typed))
    # The parser owns the weights: it has to live until the engine is built.
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(onnx)):
        problems = [_parser_problem(parser.get_error(index)) for index in range(parser.num_errors)]
        log.lines.extend(f"[ERROR] parser: {problem}" for problem in problems)
        said = "; ".join(problems) or log.last(_ERRORS)
        raise InputError(f"TensorRT {trt.__version__} cannot parse '{onnx}': {said}")
    ranges = shape_ranges(_input_shapes(network, onnx), request.batch, request.shapes, str(onnx))
    config = builder.create_builder_config()
    _configure(config, request)
    _add_profile(builder, config, ranges)
    cache = _attach_timing_cache(config, request.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:  # TensorRT says that it failed only in its log
        raise DeviceError(
            f"TensorRT {trt.__version__} could not build an engine from '{onnx}': {log.last(_ERRORS)}; the whole log "
            "lies where the engine would be, as .log"
        )
    if request.timing_cache is not None:
        write_bytes(request.timing_cache, bytes(cache.serialize()))
    flags = tuple(sorted(name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)))
    # TensorRT 11 knows only strongly typed networks, and ignores the flag.
    strongly_typed = bool(network.get_flag(typed)) or _numbers(trt.__version__)[0] >= 11
    return bytes(plan), _BuildFacts(trt.__version__, strongly_typed, flags, ranges)


def _parser_problem(error: trt.ParserError) -> str:
    place = f"node {error.node()} '{error.node_name()}' ({error.node_operator()})" if error.node() >= 0 else "the model"
    return one_line(f"{place}: {error.desc()}")


def _configure(config: trt.IBuilderConfig, request: _Request) -> None:
    import tensorrt as trt

    change: Callable[[trt.BuilderFlag], None] = config.set_flag if request.precision == "tf32" else config.clear_flag
    change(trt.BuilderFlag.TF32)  # on by default
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    config.builder_optimization_level = request.optimisation_level
    config.avg_timing_iterations = 8  # as trtexec; the API's 1 makes the choice of kernels a matter of noise
    config.max_aux_streams = 0  # one stream: latencies of dense and slim compare
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector knows names only


def _input_shapes(network: trt.INetworkDefinition, onnx: Path) -> dict[str, Shape]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in tensors:
        if tensor.is_shape_tensor:
            raise InputError(
                f"input '{tensor.name}' of '{onnx}' is a shape, not data; make it a constant of the graph first"
            )
    return {tensor.name: tuple(tensor.shape) for tensor in tensors}


def _add_profile(builder: trt.Builder, config: trt.IBuilderConfig, ranges: Mapping[str, ShapeRange]) -> None:
    if not ranges:
        return
    profile = builder.create_optimization_profile()
    for name, (smallest, tuned, largest) in ranges.items():
        profile.set_shape(name, smallest, tuned, largest)
    if config.add_optimization_profile(profile) < 0:
        raise InputError(f"TensorRT does not take the shapes {dict(ranges)}; give a smaller range")


def _attach_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache:
    """Attach the cache in ``path``, or a fresh one where there is none for this device and version."""
    stored = path.read_bytes() if path is not None and path.is_file() else b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):
        _logger.warning("the timing cache '%s' is of another device or TensorRT; starting a fresh one", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _inspect(plan: bytes, log: _BuildLog) -> EngineLayers:
    """Return what the inspector says of each layer of a serialized engine."""
    import tensorrt as trt

    runtime = trt.Runtime(_make_logger(log))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DeviceError(f"TensorRT cannot load the engine that it has just built: {log.last(_ERRORS)}")
    inspector = engine.create_engine_inspector()
    # One layer at a time: one whose JSON is malformed is then counted as unknown and does not hide the others.
    texts = [
        inspector.get_layer_information(index, trt.LayerInformationFormat.JSON) for index in range(engine.num_layers)
    ]
    layers = EngineLayers(tuple(read_layer(text) for text in texts))
    log.lines.extend(f"[LAYER] {layer.kind} {layer.precision} {layer.name}" for layer in layers.layers)
    return layers


def _require_precision(layers: EngineLayers, precision: str, onnx: Path, log_path: Path) -> None:
    count = len(layers.layers)
    if not layers.precisions.keys() - {"unknown"}:
        raise VerifyError(
            f"the inspector gives no types for the {count} layers of the engine of '{onnx}', so its precision is not "
            f"known and it is not kept; see '{log_path}'"
        )
    wrong = layers.outside(precision)
    if wrong:
        named = ", ".join(f"'{layer.name}' {layer.precision}" for layer in wrong[:3])
        raise VerifyError(
            f"{len(wrong)} of the {count} layers of the engine of '{onnx}' do not compute in {precision} ({named}), so "
            f"it is not kept; give a graph whose tensors are FP32, and see '{log_path}'"
        )
