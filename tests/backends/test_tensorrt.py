"""The TensorRT backend's control flow, against a double that has only what all supported bindings have."""

import dataclasses
import hashlib
import json
import logging
import sys
from pathlib import Path

import pytest
from trt_stubs.bindings import SOURCES
from trt_stubs.double import Scenario, make_module
from trt_stubs.names import load_api, uses_of

import prune2deploy.backends.tensorrt as backend
from prune2deploy.errors import DeviceError, InputError, VerifyError

CONVOLUTION_10 = json.dumps(
    {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major linear FP32"}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 8, 8, 8], "Format/Datatype": "Row major linear FP32"}],
        "Weights": {"Type": "Float", "Count": 216},
        "TacticName": "sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc_tilesize64x32x8",
    }
)
CONVOLUTION_11 = json.dumps(
    {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format": "Row major linear FP32 format (kLINEAR)", "Datatype": "Float"}],
        "Outputs": [{"Name": "y", "Format": "kLINEAR", "DataType": "Float"}],
    }
)
INDEX = json.dumps({"Name": "shape", "LayerType": "Constant", "Outputs": [{"Name": "s", "Format/Datatype": "Int64"}]})


def layer(name: str, datatype: str, tactic: str = "") -> str:
    tensor = {"Name": "t", "Format/Datatype": datatype}
    return json.dumps(
        {"Name": name, "LayerType": "Convolution", "Inputs": [tensor], "Outputs": [tensor], "TacticName": tactic}
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "slim.onnx"
    path.write_bytes(b"an ONNX graph")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "engines" / "slim-fp32.engine"


def install(monkeypatch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(scenario))
    return scenario


def test_the_backend_and_its_live_tests_use_only_what_all_supported_bindings_have() -> None:
    uses, live = [uses_of(source.read_text(), load_api()) for source in SOURCES]
    assert uses.problems == live.problems == []
    assert {("IExecutionContext", "execute_async_v3"), ("IExecutionContext", "set_tensor_address")} <= live.names
    expected = {("ParserError", "desc"), ("ITensor", "is_shape_tensor"), ("ICudaEngine", "num_layers")}
    assert expected | {("ILogger.Severity", "name"), ("IBuilderConfig", "set_timing_cache")} <= uses.names


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("builder.platform_has_fast_fp16", "Builder has no 'platform_has_fast_fp16'"),
        ("trt.BuilderFlag.FP16", "BuilderFlag has no 'FP16'"),
        ("trt.IInt8Calibrator", "tensorrt has no 'IInt8Calibrator'"),
        ("builder.create_builder_config().int8_calibrator", "IBuilderConfig has no 'int8_calibrator'"),
        ("builder.create_network(1, 2)", "Builder.create_network takes [['flags']] in all versions"),
        ("builder.create_network(mode=1)", "Builder.create_network takes [['flags']] in all versions"),
        ("[builder.create_network().get_input(i).dynamic_range for i in range(2)]", "ITensor has no 'dynamic_range'"),
        ("trt.Runtime()", "Runtime takes [['logger']] in all versions"),
    ],
)
def test_a_name_or_call_that_some_bindings_lack_is_found(line: str, problem: str) -> None:
    source = f"def use(builder: trt.Builder) -> None:\n    {line}\n"
    assert uses_of(source, load_api()).problems == [f"line 2: {problem}"]


def test_setting_what_cannot_be_set_is_found() -> None:
    source = "def use(engine: trt.ICudaEngine) -> None:\n    engine.num_layers = 3\n"
    assert uses_of(source, load_api()).problems == ["line 2: ICudaEngine.num_layers cannot be set"]


@pytest.mark.parametrize(("version", "text"), [("10.3.0", CONVOLUTION_10), ("11.4.0.106", CONVOLUTION_11)])
def test_an_fp32_graph_is_built_strongly_typed_without_tf32(
    version: str, text: str, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = install(monkeypatch, Scenario(version=version, layers=[text, INDEX]))
    report = backend.TensorRT().build_engine(model, out, workspace_bytes=1 << 20, optimisation_level=5)
    typed = sys.modules["tensorrt"].NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert scenario.created_flags == 1 << int(typed)
    assert scenario.flags == set()
    assert scenario.pools == {"WORKSPACE": 1 << 20}
    assert scenario.parsed == model
    assert scenario.profiles == []
    assert scenario.set_up["builder_optimization_level"] == 5
    assert scenario.set_up["profiling_verbosity"].name == "DETAILED"
    assert out.read_bytes() == scenario.plan
    assert report.tensorrt == version
    assert report.strongly_typed
    assert report.flags == ()
    assert report.size_bytes == len(out.read_bytes())
    assert report.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert report.onnx_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert report.layers.kinds == {"CaskConvolution": 1, "Constant": 1}
    assert report.layers.precisions == {"fp32": 1, "int64": 1}
    assert "[LAYER] CaskConvolution fp32 conv1 + relu1" in report.log.read_text()
    assert report.log == out.with_suffix(".log")
    assert report.seconds > 0
    assert dataclasses.is_dataclass(report)


def test_tf32_is_allowed_only_when_asked_for(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = layer("conv1", "Float", "sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nchw")
    scenario = install(monkeypatch, Scenario(layers=[rounded]))
    report = backend.TensorRT().build_engine(model, out, precision="tf32")
    assert scenario.flags == {"TF32"}
    assert report.flags == ("TF32",)
    assert report.layers.precisions == {"fp32+tf32": 1}
    out.unlink()
    with pytest.raises(VerifyError, match=r"1 of the 1 layers .* do not compute in fp32 \('conv1' fp32\+tf32\)"):
        backend.TensorRT().build_engine(model, out)
    assert not out.exists()


@pytest.mark.parametrize("datatype", ["Half", "Channel major FP16 format where channel % 8 == 0", "Int8", "BFloat16"])
def test_an_engine_in_another_precision_is_refused_and_not_kept(
    datatype: str, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Scenario(layers=[CONVOLUTION_10, layer("conv2", datatype)]))
    with pytest.raises(VerifyError, match=r"1 of the 2 layers .*'conv2' (fp16|int8|bf16)"):
        backend.TensorRT().build_engine(model, out)
    assert not out.exists()
    assert "conv2" in out.with_suffix(".log").read_text()


def test_weights_in_another_precision_are_seen_but_absent_ones_are_not(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = json.loads(CONVOLUTION_10)
    install(monkeypatch, Scenario(layers=[json.dumps({**fields, "Bias": {"Type": "Half", "Count": 0}})]))
    assert backend.TensorRT().build_engine(model, out).layers.precisions == {"fp32": 1}
    install(monkeypatch, Scenario(layers=[json.dumps({**fields, "Weights": {"Type": "Half", "Count": 216}})]))
    with pytest.raises(VerifyError, match=r"fp16\+fp32"):
        backend.TensorRT().build_engine(model, out)


def test_layers_without_types_are_counted_and_an_engine_of_only_such_is_refused(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Scenario(layers=[CONVOLUTION_10, '{"Name": "broken', '"a name"']))
    assert backend.TensorRT().build_engine(model, out).layers.precisions == {"fp32": 1, "unknown": 2}
    install(monkeypatch, Scenario(layers=['"a name"', '"another"']))
    with pytest.raises(VerifyError, match="gives no types for the 2 layers"):
        backend.TensorRT().build_engine(model, out)


def test_every_parser_error_is_told_and_nothing_is_built(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [
        {"node": 7, "name": "resize", "operator": "Resize", "desc": "mode cubic\nis not supported"},
        {"desc": "no outputs"},
    ]
    install(monkeypatch, Scenario(parser_errors=errors))
    with pytest.raises(InputError) as caught:
        backend.TensorRT().build_engine(model, out)
    assert "node 7 'resize' (Resize): mode cubic is not supported; the model: no outputs" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert out.with_suffix(".log").read_text().count("[ERROR] parser") == 2


def test_a_failed_build_gives_the_last_errors_of_the_log(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [("ERROR", "out of memory: 3 GiB wanted"), ("INFO", "bye"), ("VERBOSE", "chatter"), ("WARNING", "hm")]
    install(monkeypatch, Scenario(plan=None, messages=messages))
    with pytest.raises(DeviceError, match=r"could not build an engine .*out of memory: 3 GiB wanted") as caught:
        backend.TensorRT().build_engine(model, out)
    assert "bye" not in str(caught.value)
    assert out.with_suffix(".log").read_text() == "[ERROR] out of memory: 3 GiB wanted\n[INFO] bye\n[WARNING] hm\n"
    assert not out.exists()


def test_an_engine_that_does_not_load_is_not_kept(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Scenario(loads=False, layers=[CONVOLUTION_10]))
    with pytest.raises(DeviceError, match="cannot load the engine that it has just built: it logged nothing"):
        backend.TensorRT().build_engine(model, out)
    assert not out.exists()


def test_warnings_are_reported_and_logged(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, Scenario(layers=[CONVOLUTION_10], messages=[("WARNING", "weights are subnormal")]))
    with caplog.at_level(logging.WARNING):
        report = backend.TensorRT().build_engine(model, out)
    assert report.warnings == ("[WARNING] weights are subnormal",)
    assert "weights are subnormal" in caplog.text


def test_a_dynamic_batch_gets_a_profile(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"x": (-1, 3, 8, 8), "scale": (1,)}
    scenario = install(monkeypatch, Scenario(inputs=inputs, layers=[CONVOLUTION_10]))
    report = backend.TensorRT().build_engine(model, out, batch=(1, 4, 8))
    expected = {"x": ((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))}
    assert scenario.profiles == [expected]
    assert report.profile == expected


def test_other_dynamic_axes_need_and_take_shapes(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = install(monkeypatch, Scenario(inputs={"x": (-1, 3, -1, -1)}, layers=[CONVOLUTION_10]))
    with pytest.raises(InputError, match=r"input 'x' .* is \[-1, 3, -1, -1\], dynamic beyond the batch"):
        backend.TensorRT().build_engine(model, out)
    shapes = ((1, 3, 64, 64), (1, 3, 320, 320), (2, 3, 640, 640))
    backend.TensorRT().build_engine(model, out, shapes={"x": shapes})
    assert scenario.profiles == [{"x": shapes}]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": ((1, 3), (1, 3), (1, 3))}, r"has no input 'y' .* its inputs are \['x'\]"),
        ({"x": ((1, 3), (1, 3), (1, 3))}, "do not fit input 'x'"),
        ({"x": ((1, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8))}, "do not fit input 'x'"),
        ({"x": ((0, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))}, "do not fit input 'x'"),
        ({"x": ((1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 8))}, "do not fit input 'x'"),
    ],
)
def test_shapes_that_do_not_fit_the_graph_are_refused(
    shapes: dict[str, backend.ShapeRange], message: str, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Scenario(inputs={"x": (-1, 3, 8, 8)}, layers=[CONVOLUTION_10]))
    with pytest.raises(InputError, match=message):
        backend.TensorRT().build_engine(model, out, shapes=shapes)


def test_a_profile_that_tensorrt_rejects_is_an_error(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Scenario(inputs={"x": (-1, 3)}, takes_profile=False, layers=[CONVOLUTION_10]))
    with pytest.raises(InputError, match="does not take the shapes"):
        backend.TensorRT().build_engine(model, out)


def test_an_input_that_is_a_shape_is_refused(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Scenario(inputs={"x": (1, 3), "sizes": (4,)}, shape_inputs=("sizes",)))
    with pytest.raises(InputError, match=r"input 'sizes' .* is a shape, not data"):
        backend.TensorRT().build_engine(model, out)


def test_the_timing_cache_is_read_and_written_back(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = install(monkeypatch, Scenario(layers=[CONVOLUTION_10]))
    cache = out.with_name("timing.cache")
    for seen in (b"", b"+timings"):
        backend.TensorRT().build_engine(model, out, timing_cache=cache)
        assert scenario.cache_seen.pop() == seen
    assert cache.read_bytes() == b"+timings+timings"


def test_a_timing_cache_of_another_device_is_replaced(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scenario = install(monkeypatch, Scenario(layers=[CONVOLUTION_10], foreign_cache=b"theirs"))
    cache = out.with_name("timing.cache")
    cache.parent.mkdir()
    cache.write_bytes(b"theirs")
    backend.TensorRT().build_engine(model, out, timing_cache=cache)
    assert scenario.cache_seen == [b"theirs", b""]
    assert cache.read_bytes() == b"+timings"
    assert "of another device or TensorRT" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "engines are built in fp32 or tf32, not 'fp16': .* from the types in the ONNX graph"),
        ({"precision": "int8"}, "not 'int8'"),
        ({"optimisation_level": 6}, "optimisation level 6 is not 0 to 5"),
        ({"workspace_bytes": 0}, "a workspace of 0 bytes"),
    ],
)
def test_wrong_options_are_refused_before_tensorrt_is_needed(
    options: dict[str, object], message: str, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(InputError, match=message):
        backend.TensorRT().build_engine(model, out, **options)  # type: ignore[arg-type]


def test_a_missing_model_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InputError, match=r"'.*gone\.onnx' does not exist"):
        backend.TensorRT().build_engine(tmp_path / "gone.onnx", out)


def test_without_a_gpu_the_reason_is_one_line(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Scenario(has_gpu=False))
    missing = backend.availability()
    assert missing is not None
    assert missing == backend.TensorRT.missing()
    assert missing.startswith("TensorRT 10.3.0 finds no GPU that it can use ([ERROR] CUDA initialization failure")
    assert "\n" not in missing
    with pytest.raises(DeviceError, match="finds no GPU"):
        backend.TensorRT().build_engine(model, out)


def test_where_a_builder_can_be_made_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Scenario())
    assert backend.availability() is None


@pytest.mark.parametrize(
    ("version", "usable"), [("8.6.1", False), ("10.2.0", False), ("10.3.0", True), ("11.0.0", True)]
)
def test_versions_before_10_3_are_too_old(version: str, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Scenario(version=version))
    missing = backend.availability()
    assert (missing is None) is usable
    assert usable or f"TensorRT {version} is too old: 10.3 is the oldest" in str(missing)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import tensorrt_bindings_that_are_not_there", r"not installed \(no Python module 'tensorrt_bindings_that"),
        ("raise ImportError('libnvinfer.so.10: cannot open shared object file')", r"cannot be loaded \(libnvinfer"),
        ("raise OSError('libcudart.so.12: cannot open')", r"cannot be loaded \(libcudart"),
    ],
)
def test_a_package_that_does_not_import_is_named(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(DeviceError, match=message):
        raise DeviceError(backend.availability())
