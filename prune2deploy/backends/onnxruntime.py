"""ONNX Runtime on the CPU and on a CUDA GPU, never silently on another device than the one that was asked for."""

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prune2deploy.backends.base import AbstractBackend, AbstractSession, Feeds, InputInfo
from prune2deploy.environment import cpu_model, gpus
from prune2deploy.errors import DeviceError, InputError, one_line
from prune2deploy.files import require_file

_log = logging.getLogger(__name__)

_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bool)": np.bool_,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
}


class _Session(AbstractSession):
    """A session of ONNX Runtime; ``device_copies`` says that inputs are copied to a device, which is then timed too."""

    def __init__(self, session: Any, options: dict[str, Any], *, device_copies: bool) -> None:
        self._session = session
        self._options = options
        self._device_copies = device_copies
        self._inputs = tuple(_input_info(argument) for argument in session.get_inputs())
        self._outputs = [argument.name for argument in session.get_outputs()]
        self._feeds: dict[str, np.ndarray] | None = None
        self._binding: Any = None

    @property
    def inputs(self) -> tuple[InputInfo, ...]:
        """The model's inputs, in the model's order."""
        return self._inputs

    def bind(self, feeds: Feeds) -> None:
        """Check the feeds by running them once, and keep them for ``run_once``."""
        self.infer(feeds)
        self._feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        if not self._device_copies:
            self._binding = self._bound_to_host(self._feeds)

    def run_once(self) -> float:
        """Return the milliseconds of one run.

        On the CPU the inputs are bound beforehand. On a GPU they are handed over in every run, because ONNX Runtime
        copies a bound input to the device when it is bound, and latency = H2D + compute + D2H.
        """
        if self._feeds is None:
            raise RuntimeError("bind the inputs before the first run")
        if self._binding is not None:
            start = time.perf_counter_ns()
            self._session.run_with_iobinding(self._binding)
            return (time.perf_counter_ns() - start) / 1e6
        start = time.perf_counter_ns()
        self._session.run(self._outputs, self._feeds)
        return (time.perf_counter_ns() - start) / 1e6

    def infer(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise InputError(
                f"ONNX Runtime cannot run the model: {one_line(error)}; check the inputs and their shapes"
            ) from error
        return dict(zip(self._outputs, values, strict=True))

    def describe(self) -> dict[str, Any]:
        """Return the session's options, its providers, and how many nodes each provider got where it tells."""
        return {
            **self._options,
            "providers": list(self._session.get_providers()),
            "provider_options": self._session.get_provider_options(),
            "nodes": _nodes_per_provider(self._session),
            "transfers": "timed" if self._device_copies else "none",
        }

    def close(self) -> None:
        """Let go of the session, which frees it."""
        self._session = self._binding = self._feeds = None

    def _bound_to_host(self, feeds: dict[str, np.ndarray]) -> Any:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name)
        return binding


class _OnnxRuntime(AbstractBackend):
    """What the CPU and the CUDA backend share."""

    provider: ClassVar[str]
    get_it: ClassVar[str]

    def open(self, model: bytes | Path, *, threads: int = 1) -> AbstractSession:
        """Load a model with every graph optimization, sequentially on ``threads`` threads.

        Raises:
            InputError: if the model cannot be loaded.
            DeviceError: if ONNX Runtime falls back to another provider.
        """
        import onnxruntime

        options = _settings(threads)
        source = str(require_file(model, "an ONNX model")) if isinstance(model, Path) else model
        if self.provider not in onnxruntime.get_available_providers():
            raise DeviceError(f"backend '{self.name}': this ONNX Runtime has no {self.provider}; {self.get_it}")
        try:
            session = onnxruntime.InferenceSession(
                source, _session_options(options), providers=[self.provider], enable_fallback=0
            )
        except Exception as error:  # as above
            name = f"'{model}'" if isinstance(model, Path) else "the model"
            raise InputError(
                f"ONNX Runtime cannot load {name}: {one_line(error)}; check it with onnx.checker"
            ) from error
        session.disable_fallback()
        first = session.get_providers()[0]
        if first != self.provider:
            raise DeviceError(
                f"backend '{self.name}': ONNX Runtime fell back from {self.provider} to {first}; {self.get_it}"
            )
        return _Session(session, options, device_copies=self.provider != "CPUExecutionProvider")

    @classmethod
    def missing(cls) -> str | None:
        """Return what is missing, found out by opening a one-node model."""
        try:
            import onnxruntime  # noqa: F401  the import is the test
        except ImportError as error:
            return f"onnxruntime cannot be imported ({one_line(error, 120)}); {cls.get_it}"
        try:
            cls().open(_one_node_model()).close()
        except (DeviceError, InputError) as error:
            return str(error)
        return None


class OnnxRuntimeCpu(_OnnxRuntime):
    """ONNX Runtime's CPU provider."""

    name = "ort-cpu"
    provider = "CPUExecutionProvider"
    get_it = "install it with: pip install 'prune2deploy[cpu]'"

    def describe(self) -> dict[str, Any]:
        """Return the versions and the CPU's name."""
        import onnxruntime

        return {
            "name": self.name,
            "onnxruntime": onnxruntime.__version__,
            "provider": self.provider,
            "device": cpu_model(),
        }


class OnnxRuntimeCuda(_OnnxRuntime):
    """ONNX Runtime's CUDA provider; timed with the copies of inputs and outputs."""

    name = "ort-cuda"
    provider = "CUDAExecutionProvider"
    get_it = (
        "it needs an NVIDIA GPU, CUDA, cuDNN and the GPU build: "
        "pip uninstall onnxruntime, then pip install 'prune2deploy[gpu]'"
    )

    def describe(self) -> dict[str, Any]:
        """Return the versions and the GPUs that nvidia-smi lists."""
        import onnxruntime

        return {"name": self.name, "onnxruntime": onnxruntime.__version__, "provider": self.provider, "device": gpus()}


def _settings(threads: int) -> dict[str, Any]:
    """Return every option that can move a latency, as it is set and recorded.

    Workers may spin inside a run but are stopped when it ends: other sessions run next, and would share their cores
    with the spinning.
    """
    return {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "execution_mode": "ORT_SEQUENTIAL",
        "graph_optimization_level": "ORT_ENABLE_ALL",
        "config": {
            "session.intra_op.allow_spinning": "1" if threads > 1 else "0",
            "session.force_spinning_stop": "1",
            "session.record_ep_graph_assignment_info": "1",
        },
    }


def _session_options(settings: dict[str, Any]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["intra_op_num_threads"]
    options.inter_op_num_threads = settings["inter_op_num_threads"]
    options.execution_mode = getattr(onnxruntime.ExecutionMode, settings["execution_mode"])
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, settings["graph_optimization_level"])
    options.log_severity_level = 3  # errors: the fallback to another provider is checked, not read from the log
    for key, value in settings["config"].items():
        options.add_session_config_entry(key, value)
    return options


def _input_info(argument: Any) -> InputInfo:
    if argument.type not in _TYPES:
        raise InputError(
            f"input '{argument.name}' has the type {argument.type}, but only {', '.join(_TYPES)} can be fed"
        )
    shape = tuple(size if isinstance(size, int) else (size or "?") for size in argument.shape)
    return InputInfo(argument.name, shape, np.dtype(_TYPES[argument.type]))


def _nodes_per_provider(session: Any) -> dict[str, int] | None:
    if not hasattr(session, "get_provider_graph_assignment_info"):  # ONNX Runtime before 1.24 does not tell
        return None
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(sorted(counts.items()))


def _one_node_model() -> bytes:
    """Return a serialized model y = Relu(x); Relu is a node that every provider takes."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())
