"""The developer scripts of the analysis run, on small cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_removal_benchmark_measures_and_writes(tmp_path: Path) -> None:
    shown = run_tool("bench_slim.py", "--quick", "-o", str(tmp_path / "slim.json"))
    assert "residual-100" in shown
    document = json.loads((tmp_path / "slim.json").read_text())
    case = document["cases"]["residual-100"]
    assert case["nodes"] == 300
    assert case["removed_channels"] > 0
    assert 0 < case["bare_process_mb"] < case["peak_mb"] < case["goals"]["peak_mb"]
    assert document["environment"]["packages"]["onnx"]


def test_the_fuzzer_counts_what_it_did() -> None:
    shown = run_tool("fuzz.py", "--examples", "15", "--seed", "3")
    assert "15  graphs" in shown
    assert "where a second run removed more" in shown
