"""ONNX Runtime's backends, with real models."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
from onnx import TensorProto, helper  # noqa: E402

from prune2deploy.backends.onnxruntime import OnnxRuntimeCpu, OnnxRuntimeCuda  # noqa: E402
from prune2deploy.errors import DeviceError, InputError  # noqa: E402


def unary(op: str, shape: list[int | str | None], element_type: int) -> bytes:
    """Return a model of one node y = op(x)."""
    x, y = (helper.make_tensor_value_info(name, element_type, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "net", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_a_session_computes_what_the_model_says() -> None:
    x = np.array([[-1.0, 2.0, -3.0]], dtype=np.float32)
    with OnnxRuntimeCpu().open(unary("Relu", [1, 3], TensorProto.FLOAT)) as session:
        np.testing.assert_array_equal(session.infer({"x": x})["y"], [[0.0, 2.0, 0.0]])


def test_a_session_reads_a_file_as_it_reads_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(unary("Neg", [2], TensorProto.FLOAT))
    with OnnxRuntimeCpu().open(path) as session:
        np.testing.assert_array_equal(session.infer({"x": np.ones(2, np.float32)})["y"], [-1.0, -1.0])


def test_a_timed_run_computes_on_the_bound_inputs() -> None:
    with OnnxRuntimeCpu().open(unary("Relu", ["N", 3], TensorProto.FLOAT)) as session:
        session.bind({"x": np.full((4, 3), 2.0, np.float32)})
        assert session.run_once() > 0
        session.bind({"x": np.full((1, 3), 2.0, np.float32)})
        assert session.run_once() > 0


def test_a_run_without_inputs_is_a_bug_of_the_caller() -> None:
    with (
        OnnxRuntimeCpu().open(unary("Relu", [1], TensorProto.FLOAT)) as session,
        pytest.raises(RuntimeError, match="bind"),
    ):
        session.run_once()


@pytest.mark.parametrize(
    ("element_type", "dtype"),
    [
        (TensorProto.FLOAT, np.float32),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.INT64, np.int64),
        (TensorProto.UINT8, np.uint8),
        (TensorProto.BOOL, np.bool_),
    ],
)
def test_inputs_tell_their_name_type_and_dynamic_axes(element_type: int, dtype: type) -> None:
    with OnnxRuntimeCpu().open(unary("Identity", ["N", 3, None], element_type)) as session:
        (info,) = session.inputs
        assert (info.name, info.shape, info.dtype) == ("x", ("N", 3, "?"), np.dtype(dtype))


def test_an_input_of_strings_is_refused() -> None:
    with pytest.raises(InputError, match=r"input 'x' has the type tensor\(string\)"):
        OnnxRuntimeCpu().open(unary("Identity", [1], TensorProto.STRING))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_recorded_options_are_those_in_force(threads: int) -> None:
    with OnnxRuntimeCpu().open(unary("Relu", [1], TensorProto.FLOAT), threads=threads) as session:
        found = session.describe()
        real = session._session.get_session_options()  # type: ignore[attr-defined]
    assert found["intra_op_num_threads"] == real.intra_op_num_threads == threads
    assert found["inter_op_num_threads"] == real.inter_op_num_threads == 1
    assert found["graph_optimization_level"] == real.graph_optimization_level.name == "ORT_ENABLE_ALL"
    assert found["execution_mode"] == real.execution_mode.name == "ORT_SEQUENTIAL"
    for key, value in found["config"].items():
        assert real.get_session_config_entry(key) == value
    assert found["providers"] == ["CPUExecutionProvider"]
    assert found["nodes"] in ({"CPUExecutionProvider": 1}, None)


def test_wrong_inputs_are_refused_in_one_line() -> None:
    with OnnxRuntimeCpu().open(unary("Relu", [1, 3], TensorProto.FLOAT)) as session:
        with pytest.raises(InputError, match="cannot run the model") as wrong_shape:
            session.bind({"x": np.ones((1, 4), np.float32)})
        with pytest.raises(InputError, match="cannot run the model"):
            session.bind({"z": np.ones((1, 3), np.float32)})
    assert "\n" not in str(wrong_shape.value)


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"cannot load '.*broken\.onnx'"):
        OnnxRuntimeCpu().open(path)
    with pytest.raises(InputError, match="does not exist"):
        OnnxRuntimeCpu().open(tmp_path / "absent.onnx")


@pytest.mark.skipif(OnnxRuntimeCuda.missing() is None, reason="a CUDA device is here")
def test_cuda_that_is_not_there_is_said_and_never_replaced_by_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider.*pip install 'prune2deploy\[gpu\]'"):
        OnnxRuntimeCuda().open(unary("Relu", [1], TensorProto.FLOAT))
    assert capfd.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.skipif(OnnxRuntimeCuda.missing() is not None, reason="no CUDA device for ONNX Runtime")
def test_cuda_computes_what_the_cpu_does() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    model = unary("Sigmoid", [2, 3], TensorProto.FLOAT)
    with OnnxRuntimeCuda().open(model) as gpu, OnnxRuntimeCpu().open(model) as cpu:
        np.testing.assert_allclose(gpu.infer({"x": x})["y"], cpu.infer({"x": x})["y"], rtol=1e-5)
        gpu.bind({"x": x})
        assert gpu.run_once() > 0
        assert gpu.describe()["providers"][0] == "CUDAExecutionProvider"


def test_a_provider_that_falls_back_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU build without a GPU lists CUDA and opens on the CPU; here a CPU build is made to list it."""
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, providers, **kept: real(model, options, providers=["CPUExecutionProvider"], **kept),
    )
    with pytest.raises(DeviceError, match="fell back from CUDAExecutionProvider to CPUExecutionProvider"):
        OnnxRuntimeCuda().open(unary("Relu", [1], TensorProto.FLOAT))
    missing = OnnxRuntimeCuda.missing()
    assert missing is not None
    assert "fell back" in missing


def test_importing_the_table_imports_no_runtime() -> None:
    code = (
        "import sys, prune2deploy.backends, prune2deploy.latency, prune2deploy.report\n"
        "print([m for m in ('onnxruntime', 'torch', 'tensorrt', 'scipy', 'plotly', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
