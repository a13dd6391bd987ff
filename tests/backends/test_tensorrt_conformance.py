"""The TensorRT backend against TensorRT's real Python bindings, with stub libraries in place of TensorRT's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trt_stubs import bindings
from trt_stubs.names import API, VERSIONS, Classes, uses_of

pytestmark = pytest.mark.slow

AVAILABILITY = "from prune2deploy.backends.tensorrt import availability; print(availability())"
LOGGER = """
import tensorrt as trt
from prune2deploy.backends.tensorrt import _BuildLog, _make_logger
log = _BuildLog()
try:
    trt.Runtime(_make_logger(log))
except TypeError as error:
    print(error)
print(log.lines)
print(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED), sorted(trt.BuilderFlag.__members__)[0])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {version: tmp_path_factory.mktemp(f"tensorrt-{version}") for version in VERSIONS}


@pytest.fixture(scope="module")
def described(folders: dict[str, Path]) -> dict[str, Classes | str]:
    """Version -> the classes of its real bindings, or why they cannot be had for this Python."""
    found: dict[str, Classes | str] = {}
    for version, folder in folders.items():
        try:
            said, found[version] = bindings.describe(version, folder)
        except bindings.UnavailableError as error:
            found[version] = str(error)
        else:
            assert said == version
    return found


def classes_of(version: str, described: dict[str, Classes | str]) -> Classes:
    classes = described[version]
    if isinstance(classes, str):
        pytest.skip(classes)
    return classes


@pytest.fixture
def real(version: str, described: dict[str, Classes | str]) -> Classes:
    return classes_of(version, described)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("source", bindings.SOURCES, ids=lambda path: path.stem)
def test_every_name_and_call_that_is_used_is_in_the_bindings(source: Path, real: Classes) -> None:
    assert len(real) > 150
    uses = uses_of(source.read_text(), real)
    assert uses.problems == []
    assert len(uses.names) >= 5


def test_the_description_that_the_double_is_held_to_is_what_the_bindings_share(
    described: dict[str, Classes | str],
) -> None:
    text = bindings.dump(bindings.shared_api([classes_of(version, described) for version in VERSIONS]))
    assert text == API.read_text(), f"run '{sys.executable} {bindings.__file__}' and look at what changed"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.usefixtures("real")
def test_without_a_gpu_the_builder_is_what_fails_and_its_log_says_why(version: str, folders: dict[str, Path]) -> None:
    unpacked, stubs = folders[version] / "bindings", folders[version] / "stubs"
    said = bindings.run_python(["-c", AVAILABILITY], unpacked, stubs)
    assert said == (
        f"TensorRT {version} finds no GPU that it can use ([ERROR] stub: CUDA initialization failure with error: 100); "
        "run this on a machine with an NVIDIA GPU and a driver new enough for it\n"
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.usefixtures("real")
def test_without_the_libraries_the_first_that_is_missing_is_named(version: str, folders: dict[str, Path]) -> None:
    said = bindings.run_python(["-c", AVAILABILITY], folders[version] / "bindings", None)
    assert said.startswith("TensorRT's libraries cannot be loaded (libnv")
    assert f".so.{version.split('.')[0]}: cannot open shared object file" in said
    assert "pip install 'prune2deploy[tensorrt]'" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.usefixtures("real")
def test_the_library_can_call_the_logger_that_the_backend_passes(version: str, folders: dict[str, Path]) -> None:
    said = bindings.run_python(["-c", LOGGER], folders[version] / "bindings", folders[version] / "stubs").splitlines()
    assert said[0] == "pybind11::init(): factory function returned nullptr"
    assert said[1] == "['[ERROR] stub: CUDA initialization failure with error: 100']"
    flag = "2" if version.startswith("10.") else "1"
    assert said[2].split()[0] == flag


def test_a_wheel_that_cannot_be_had_is_a_reason_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2D_TRT_WHEELS", str(tmp_path))
    monkeypatch.setitem(bindings.PACKAGES, "0.0.1", "tensorrt-cu12-bindings")
    with pytest.raises(bindings.UnavailableError, match=r"pip cannot download tensorrt-cu12-bindings 0\.0\.1"):
        bindings.wheel("0.0.1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils, to read the symbols of a library")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.usefixtures("real")
def test_the_stubs_export_all_that_the_bindings_import_from_tensorrt(version: str, folders: dict[str, Path]) -> None:
    library = folders[version] / "bindings" / "tensorrt_bindings" / "tensorrt.so"
    stub = folders[version] / "stubs" / f"libnvinfer.so.{version.split('.')[0]}"
    wanted = {name for name in symbols(library, "--undefined-only") if name.endswith("_INTERNAL")}
    assert len(wanted) == 5
    assert wanted <= symbols(stub, "--defined-only")


def symbols(library: Path, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}
