"""What all tests share: the folder of real data, one thread, and two sizes of property tests."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch and ONNX Runtime when they are first imported

ROOT = Path(__file__).parents[1]

# Derandomised: a test that passed for one commit passes again for the same commit. A slow test takes the other with
# @settings(settings.get_profile("thorough")).
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=300, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("P2D_HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data and models that is not part of the repository."""
    folder = Path(os.environ.get("P2D_TEST_DATA") or ROOT / ".." / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data at '{folder}'; set P2D_TEST_DATA to the folder that has it")
    return folder


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole walk on the digits, made once per test process; no test may change it."""
    from command_line import walked, write_recipe  # which import torch

    return walked(write_recipe(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole walk with the small network, made once per test process; no test may change it."""
    from command_line import walked, write_small_recipe

    return walked(write_small_recipe(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def run(digits_run: Path) -> Path:
    """The run that tests look at unless their module has another."""
    return digits_run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch = sys.modules.get("torch")  # imported by the test modules that need it; importing it takes seconds
    if torch is not None:
        torch.set_num_threads(1)
