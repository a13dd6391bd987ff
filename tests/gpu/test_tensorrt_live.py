"""The TensorRT backend with TensorRT and a GPU; skipped where either is missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune2deploy.backends.tensorrt import TensorRT, availability
from prune2deploy.errors import InputError, VerifyError

if TYPE_CHECKING:
    import tensorrt as trt

pytestmark = pytest.mark.gpu

TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3}


@pytest.fixture(scope="module", autouse=True)
def _tensorrt() -> None:
    missing = availability()
    if missing is not None:
        pytest.skip(missing)


def convolution(path: Path, *, batch: int | str = "N", through: int = TensorProto.FLOAT, op: str = "Relu") -> Path:
    """Write x -> Cast -> Conv 3x3 -> ``op`` -> Cast -> y, with the convolution in the type ``through``."""
    weights = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32) / 5
    stored = weights.astype(helper.tensor_dtype_to_np_dtype(through))
    nodes = [
        helper.make_node("Cast", ["x"], ["xc"], to=through),
        helper.make_node("Conv", ["xc", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node(op, ["c"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 8, 16, 16])],
        [numpy_helper.from_array(stored, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def run_engine(engine: trt.ICudaEngine, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return y of an engine, with torch's memory and stream."""
    torch = pytest.importorskip("torch")
    context = engine.create_execution_context()
    x = torch.from_numpy(images).cuda()
    y = torch.empty((len(images), 8, 16, 16), device="cuda")
    assert context.set_input_shape("x", tuple(x.shape))
    for name, tensor in {"x": x, "y": y}.items():
        assert context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    result: np.ndarray[Any, Any] = y.cpu().numpy()
    return result


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_built_engine_computes_what_onnx_runtime_does(precision: str, tmp_path: Path) -> None:
    import tensorrt as trt

    onnxruntime = pytest.importorskip("onnxruntime")
    model = convolution(tmp_path / "net.onnx")
    report = TensorRT().build_engine(model, tmp_path / f"net-{precision}.engine", precision=precision, batch=(1, 2, 4))
    assert report.strongly_typed
    assert ("TF32" in report.flags) is (precision == "tf32")
    assert set(report.layers.precisions) <= {"fp32", "fp32+tf32", "unknown"}
    runtime = trt.Runtime(trt.Logger())
    engine = runtime.deserialize_cuda_engine(report.engine.read_bytes())
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    for count in (1, 2, 4):
        images = np.random.default_rng(count).standard_normal((count, 3, 16, 16)).astype(np.float32)
        expected = session.run(["y"], {"x": images})[0]
        np.testing.assert_allclose(
            run_engine(engine, images), expected, atol=TOLERANCE[precision] * np.abs(expected).max()
        )


def test_the_inspector_shows_a_convolution_in_fp16_and_the_engine_is_refused(tmp_path: Path) -> None:
    model = convolution(tmp_path / "half.onnx", batch=1, through=TensorProto.FLOAT16)
    with pytest.raises(VerifyError, match="fp16"):
        TensorRT().build_engine(model, tmp_path / "half.engine")
    assert not (tmp_path / "half.engine").exists()


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    model = convolution(tmp_path / "odd.onnx", batch=1, op="NoSuchOperator")
    with pytest.raises(InputError, match="NoSuchOperator"):
        TensorRT().build_engine(model, tmp_path / "odd.engine")


def test_a_second_build_takes_the_timing_cache(tmp_path: Path) -> None:
    model, cache = convolution(tmp_path / "net.onnx", batch=1), tmp_path / "timing.cache"
    first = TensorRT().build_engine(model, tmp_path / "a.engine", timing_cache=cache)
    assert cache.stat().st_size > 0
    second = TensorRT().build_engine(model, tmp_path / "b.engine", timing_cache=cache)
    assert first.layers.kinds == second.layers.kinds
