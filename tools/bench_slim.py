"""Measure how long removal takes and how much memory it needs, on one core, and write models/bench/slim.json.

Usage: python tools/bench_slim.py [--quick] [-o FILE]

Cases: ResNet-56 and ResNet-50 as exported, with half the channels of every group silenced; a plain residual net of
100, 1,000, 3,334 (10,000 nodes) and 5,000 convolutions; and a plain net of wide convolutions with 100 million and with
1 billion parameters (a file of 4 GB), with half of the channels zero. Each case is slimmed in a fresh process that is
bound to one core: three times for the seconds (the median counts; the wide nets once) and once, first, for the peak of
resident memory. What the process needs before it has read the model (Python and its packages) is told apart. Goals:
ResNet-50 in 1 s of the processor, and a peak below 4 times the model's size plus 300 MB. With --quick only the
small cases run, once; nothing is written unless -o says so. --case NAME runs single cases.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

CHAINS = (100, 1000, 3334, 5000)
WIDE = (100, 1000)
"""Millions of parameters of the wide nets."""
GOALS_SECONDS = {"resnet56": 0.4, "resnet50": 1.0}
"""Of the processor, for normalising, analysing and rewriting together."""
MEMORY_FACTOR, MEMORY_OFFSET_MB = 4.0, 300.0
LINEAR = 1.5
"""Growth is linear while the time per node at the largest size is at most this many times that at the middle one."""


def residual_net(convolutions: int, channels: int = 16) -> onnx.ModelProto:
    """Return a stem, residual convolutions and a head; about half of the channels are zero in every layer."""
    random = np.random.default_rng(0)
    dead = random.random(channels) < 0.5
    nodes, constants, x = [], [], "input"
    for i in range(convolutions):
        weight = random.standard_normal((channels, 3 if i == 0 else channels, 3, 3)) * 0.05
        bias = random.standard_normal(channels) * 0.05
        weight[dead], bias[dead] = 0, 0
        for name, array in ((f"w{i}", weight), (f"b{i}", bias)):
            constants.append(numpy_helper.from_array(array.astype(np.float32), name))
        nodes.append(helper.make_node("Conv", [x, f"w{i}", f"b{i}"], [f"a{i}"], name=f"conv{i}", pads=[1] * 4))
        if i:
            nodes.append(helper.make_node("Add", [f"a{i}", x], [f"s{i}"], name=f"add{i}"))
        nodes.append(helper.make_node("Relu", [f"s{i}" if i else f"a{i}"], [f"r{i}"], name=f"relu{i}"))
        x = f"r{i}"
    return with_head(nodes, constants, x, random.standard_normal((10, channels, 1, 1)))


def save_wide_net(millions: int, path: Path, channels: int = 3072) -> None:
    """Write a plain net of 3x3 convolutions, half of whose channels are zero; its weights lie beside it."""
    random = np.random.default_rng(0)
    dead = random.random(channels) < 0.5
    nodes, constants, x = [], [], "input"
    count = 1 + round(millions * 1e6 / (9 * channels**2))  # the first one reads three channels
    data = path.with_suffix(".data")
    with data.open("wb") as file:
        for i in range(count):
            weight = random.standard_normal((channels, 3 if i == 0 else channels, 3, 3), dtype=np.float32)
            weight[dead] = 0
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=weight.shape, raw_data=b"")
            onnx.external_data_helper.set_external_data(tensor, data.name, file.tell(), weight.nbytes)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
            file.write(weight.data)
            constants.append(tensor)
            nodes.append(helper.make_node("Conv", [x, f"w{i}"], [f"a{i}"], name=f"conv{i}", pads=[1] * 4))
            nodes.append(helper.make_node("Relu", [f"a{i}"], [f"r{i}"], name=f"relu{i}"))
            x = f"r{i}"
    model = with_head(nodes, constants, x, random.standard_normal((10, channels, 1, 1)))
    path.write_bytes(model.SerializeToString())


def with_head(
    nodes: list[onnx.NodeProto], constants: list[TensorProto], last: str, head: np.ndarray
) -> onnx.ModelProto:
    """Return these nodes, a convolution of the last value behind them, as a model of images of 8x8."""
    constants = [*constants, numpy_helper.from_array(head.astype(np.float32), "head")]
    nodes = [*nodes, helper.make_node("Conv", [last, "head"], ["output"], name="head")]
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size, 8, 8])
        for name, size in (("input", 3), ("output", len(head)))
    ]
    graph = helper.make_graph(nodes, "net", infos[:1], infos[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def network(name: str) -> onnx.ModelProto:
    """Return a built-in network as exported, with half of the channels of every prunable group silenced."""
    import torch
    from planting import plant_groups

    from prune2deploy.exporter import export_network
    from prune2deploy.graph.groups import find_groups
    from prune2deploy.graph.model import copy_of
    from prune2deploy.networks import load_network

    torch.manual_seed(0)
    torch.set_num_threads(1)
    loaded = load_network(name)
    example = torch.randn(2, *loaded.example_inputs[0].shape[1:])
    model = export_network(loaded.module, (example,), fuse=False).model
    plant_groups(model, find_groups(copy_of(model)))
    return model


def peak_mb() -> float:
    """Return the peak of resident memory of this process.

    Where Linux tells it, from the process's own address space: what getrusage says there is at least the peak of the
    process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure_here(path: Path, repeats: int) -> dict[str, Any]:
    """Slim one file in this process; the first time tells the peak of memory, all of them the seconds."""
    from prune2deploy.graph.model import load_model, save_model
    from prune2deploy.graph.rewrite import remove_dead_channels

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    bare = peak_mb()
    seconds: dict[str, list[float]] = {}
    peak = removed = nodes = 0.0
    for repeat in range(repeats):
        marks = [time.perf_counter()]
        model = load_model(path)
        marks.append(time.perf_counter())
        worked = time.process_time()
        slimmed = remove_dead_channels(model)
        worked = time.process_time() - worked  # on a busy machine the clock also counts the others' turns
        marks.append(time.perf_counter())
        save_model(slimmed.model, path.with_suffix(".slim.onnx"))
        marks.append(time.perf_counter())
        parts = dict(zip(("read", "remove", "write"), np.diff(marks).tolist(), strict=True)) | slimmed.seconds
        parts["remove_processor"] = worked
        for name, value in parts.items():
            seconds.setdefault(name, []).append(value)
        if repeat == 0:
            peak, removed, nodes = peak_mb(), slimmed.removed_channels, len(model.graph.node)
        del model, slimmed
    return {
        "nodes": int(nodes),
        "removed_channels": int(removed),
        "model_mb": sum(file.stat().st_size for file in (path, path.with_suffix(".data")) if file.is_file()) / 2**20,
        "bare_process_mb": bare,
        "peak_mb": peak,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "remove_seconds_each": seconds["remove"],
    }


def measure(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Build a case and measure it in a fresh process."""
    path = folder / f"{name}.onnx"
    _build(name, path)
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(path), "--repeats", str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    limit = MEMORY_FACTOR * result["model_mb"] + MEMORY_OFFSET_MB
    result["goals"] = {"peak_mb": limit, "peak_met": result["peak_mb"] < limit}
    if name in GOALS_SECONDS:
        met = result["seconds"]["remove_processor"] < GOALS_SECONDS[name]
        result["goals"] |= {"seconds": GOALS_SECONDS[name], "seconds_met": met}
    for file in folder.iterdir():
        file.unlink()
    return result


def _build(name: str, path: Path) -> None:
    kind, _, size = name.partition("-")
    if kind == "wide":
        save_wide_net(int(size), path)
    else:
        onnx.save(residual_net(int(size)) if kind == "residual" else network(name), path)


def growth(cases: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return processor time and memory per node of the residual nets, and whether they grow linearly."""
    chains = sorted(
        (case for name, case in cases.items() if name.startswith("residual-")), key=lambda case: case["nodes"]
    )
    if len(chains) < 3:
        return None
    nodes = np.array([case["nodes"] for case in chains])
    seconds = np.array([case["seconds"]["remove_processor"] for case in chains])
    memory = np.array([case["peak_mb"] for case in chains])
    each = seconds / nodes
    slope = np.polyfit(nodes, memory, 1)
    return {
        "exponent": float(np.polyfit(np.log(nodes), np.log(seconds), 1)[0]),
        "milliseconds_per_node": (1e3 * each).tolist(),
        "kilobytes_per_node": float(slope[0] * 1024),
        "linear": bool(each[-1] <= LINEAR * each[-2]),
    }


def show(name: str, case: dict[str, Any]) -> None:
    seconds, goals = case["seconds"], case["goals"]
    steps = ", ".join(f"{step} {seconds[step]:.2f}" for step in ("normalise", "analysis", "rewrite"))
    met = "" if goals["peak_met"] and goals.get("seconds_met", True) else "   GOAL MISSED"
    print(
        f"{name:13s} {case['nodes']:6d} nodes {case['model_mb']:7.1f} MB   read {seconds['read']:.2f} s   "
        f"remove {seconds['remove']:.2f} s ({steps}; processor {seconds['remove_processor']:.2f})   "
        f"write {seconds['write']:.2f} s   peak {case['peak_mb']:.0f} MB "
        f"(bare {case['bare_process_mb']:.0f}, allowed {goals['peak_mb']:.0f}){met}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure removal on one core.")
    parser.add_argument("--quick", action="store_true", help="only two small residual nets, once")
    parser.add_argument("-o", "--output", type=Path, help="where the JSON goes; models/bench/slim.json unless --quick")
    parser.add_argument("--case", action="append", help="a case by name, such as residual-1000 or wide-100")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure_here(arguments.measure, arguments.repeats)))
        return 0
    from prune2deploy.environment import environment
    from prune2deploy.files import write_json

    where = environment()
    print(f"{where['cpu']}, {platform.platform()}, load {where['load_average']}, {where['packages']}")
    names = [*GOALS_SECONDS, *(f"residual-{n}" for n in CHAINS), *(f"wide-{n}" for n in WIDE)]
    if arguments.quick or arguments.case:
        names = arguments.case or ["residual-20", "residual-100"]
    cases: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            once = arguments.quick or name.startswith("wide-")
            cases[name] = measure(name, Path(folder), 1 if once else arguments.repeats)
            show(name, cases[name])
    grown = growth(cases)
    if grown is not None:
        kind = "linear" if grown["linear"] else "more than linear"
        print(
            f"growth: {kind}; seconds ~ nodes^{grown['exponent']:.2f}, "
            f"{', '.join(f'{value:.2f}' for value in grown['milliseconds_per_node'])} ms per node, "
            f"{grown['kilobytes_per_node']:.0f} kB per node"
        )
    output = arguments.output or (
        None if arguments.quick or arguments.case else ROOT / "models" / "bench" / "slim.json"
    )
    if output is not None:
        write_json(output, {"schema_version": 1, "environment": where, "cases": cases, "growth": grown})
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
