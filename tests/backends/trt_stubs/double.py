"""A stand-in for the module ``tensorrt``, for the control flow of a build; it has nothing that the bindings lack.

`make_module` checks each class here against ``api.json``: a member that not all of the bindings have, or one with other
parameters, is an error. A name that the double leaves out is an AttributeError in the code under test.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

from trt_stubs.names import load_api


@dataclass
class Scenario:
    """What TensorRT is to do, and, after a build, what it was told to do."""

    version: str = "10.3.0"
    has_gpu: bool = True
    inputs: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (1, 3, 8, 8)})
    shape_inputs: tuple[str, ...] = ()
    parser_errors: list[dict[str, Any]] = field(default_factory=list)
    plan: bytes | None = b"a plan"
    layers: list[str] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)
    takes_profile: bool = True
    foreign_cache: bytes | None = None
    loads: bool = True

    created_flags: int | None = None
    set_up: dict[str, Any] = field(default_factory=dict)
    flags: set[str] = field(default_factory=lambda: {"TF32"})
    pools: dict[str, int] = field(default_factory=dict)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    cache_seen: list[bytes] = field(default_factory=list)
    parsed: Path | None = None
    parser: weakref.ref[Any] | None = None


def make_module(scenario: Scenario) -> ModuleType:
    """Return a module that behaves as the scenario says."""
    module = ModuleType("tensorrt")
    module.__version__ = scenario.version  # type: ignore[attr-defined]
    for name, members in _API.items():
        if "__members__" in members and "." not in name:
            # the first flag of TensorRT 10, EXPLICIT_BATCH, is gone in 11, so the others' numbers differ
            first = int(name == "NetworkDefinitionCreationFlag" and scenario.version.startswith("10."))
            setattr(module, name, _enum(name, first))
    for kind in (*_KINDS, _builder_class(scenario), _runtime_class(scenario)):
        _require_conformity(kind)
        setattr(module, kind.__name__, kind)
    return module


def _enum(name: str, first: int = 0) -> Any:
    values = [member for member, what in _API[name].items() if what["kind"] == "value" and member != "__members__"]
    return IntEnum(name.rpartition(".")[2], {value: place for place, value in enumerate(values, first)})


def _require_conformity(kind: type) -> None:
    for member, value in vars(kind).items():
        if member.startswith("_") and member != "__init__":
            continue
        what = _API[kind.__name__].get(member)
        assert what is not None, f"the double has {kind.__name__}.{member}, which the bindings do not have"
        takes = [overload["parameters"] for overload in what.get("overloads", [])]
        if takes:  # none: the bindings let nobody construct it
            assert list(inspect.signature(value).parameters)[1:] in takes, f"{kind.__name__}.{member} takes {takes}"


def _setting(name: str) -> property:
    def get(config: IBuilderConfig) -> Any:
        return config._scenario.set_up[name]

    def put(config: IBuilderConfig, value: Any) -> None:
        config._scenario.set_up[name] = value

    return property(get, put)


_API = load_api()
_SEVERITIES = _enum("ILogger.Severity")


class _HostMemory:
    """Bytes, and nothing else of the bindings' IHostMemory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


class ILogger:
    Severity = _SEVERITIES

    def __init__(self) -> None:
        self._ready = True


class ITensor:
    def __init__(self, name: str, shape: tuple[int, ...], is_shape: bool) -> None:
        self._name, self._shape, self._is_shape = name, shape, is_shape

    name = property(lambda self: self._name)
    shape = property(lambda self: self._shape)
    is_shape_tensor = property(lambda self: self._is_shape)


class INetworkDefinition:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario

    num_inputs = property(lambda self: len(self._scenario.inputs))

    def get_input(self, index: int) -> ITensor:
        name = list(self._scenario.inputs)[index]
        return ITensor(name, self._scenario.inputs[name], name in self._scenario.shape_inputs)

    def get_flag(self, flag: int) -> bool:
        return bool((self._scenario.created_flags or 0) >> flag & 1) and self._scenario.version.startswith("10.")


class ParserError:
    def __init__(self, said: dict[str, Any]) -> None:
        self._said = said

    def node(self) -> int:
        return int(self._said.get("node", -1))

    def node_name(self) -> str:
        return str(self._said.get("name", ""))

    def node_operator(self) -> str:
        return str(self._said.get("operator", ""))

    def desc(self) -> str:
        return str(self._said["desc"])


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        self._scenario = network._scenario
        self._scenario.parser = weakref.ref(self)

    num_errors = property(lambda self: len(self._scenario.parser_errors))

    def parse_from_file(self, model: str) -> bool:
        self._scenario.parsed = Path(model)
        assert self._scenario.parsed.is_file()
        return not self._scenario.parser_errors

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._scenario.parser_errors[index])


class IOptimizationProfile:
    def __init__(self) -> None:
        self._ranges: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002, the bindings' names
        self._ranges[input] = (min, opt, max)


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> _HostMemory:
        return _HostMemory(self._data + b"+timings")


class IBuilderConfig:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario

    builder_optimization_level = _setting("builder_optimization_level")
    avg_timing_iterations = _setting("avg_timing_iterations")
    max_aux_streams = _setting("max_aux_streams")
    profiling_verbosity = _setting("profiling_verbosity")

    def set_flag(self, flag: IntEnum) -> None:
        self._scenario.flags.add(flag.name)

    def clear_flag(self, flag: IntEnum) -> None:
        self._scenario.flags.discard(flag.name)

    def get_flag(self, flag: IntEnum) -> bool:
        return flag.name in self._scenario.flags

    def set_memory_pool_limit(self, pool: IntEnum, pool_size: int) -> None:
        self._scenario.pools[pool.name] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._scenario.cache_seen.append(cache._data)
        return ignore_mismatch or cache._data != self._scenario.foreign_cache

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._scenario.profiles.append(profile._ranges)
        return 0 if self._scenario.takes_profile else -1


class EngineInspector:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario

    def get_layer_information(self, layer_index: int, format: IntEnum) -> str:  # noqa: A002, the bindings' name
        assert format.name == "JSON"
        return self._scenario.layers[layer_index]


class ICudaEngine:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario

    num_layers = property(lambda self: len(self._scenario.layers))

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._scenario)


def _builder_class(scenario: Scenario) -> type:
    class Builder:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, ILogger)
            assert getattr(logger, "_ready", False), "pybind11 objects need their own __init__"
            self._logger: Any = logger
            if not scenario.has_gpu:
                self._logger.log(_SEVERITIES["ERROR"], "CUDA initialization failure with error: 100")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        logger = property(lambda self: self._logger)

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            scenario.created_flags = flags
            return INetworkDefinition(scenario)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig(scenario)

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> _HostMemory | None:
            assert scenario.parser is not None
            assert scenario.parser() is not None, "the parser owns the weights and is gone"
            for severity, message in scenario.messages:
                self._logger.log(_SEVERITIES[severity], message)
            return None if scenario.plan is None else _HostMemory(scenario.plan)

    return Builder


def _runtime_class(scenario: Scenario) -> type:
    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, ILogger)

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
            assert serialized_engine == scenario.plan
            return ICudaEngine(scenario) if scenario.loads else None

    return Runtime


_KINDS = (
    ILogger,
    ITensor,
    INetworkDefinition,
    ParserError,
    OnnxParser,
    IOptimizationProfile,
    ITimingCache,
    IBuilderConfig,
    EngineInspector,
    ICudaEngine,
)
