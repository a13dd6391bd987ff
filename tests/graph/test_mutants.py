"""The patches that break the analysis fit its files, and tests notice a sample of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "mutants.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_mutant_fits_its_file() -> None:
    done = run_tool("--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_tests_notice_a_sample_of_mutants(tmp_path: Path) -> None:
    done = run_tool("--sample", "6", "-o", str(tmp_path / "mutants.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "mutants.json").read_text())
    assert {row["status"] for row in document["mutants"].values()} == {"killed"}
    assert all("::" in row["killed_by"] for row in document["mutants"].values())
