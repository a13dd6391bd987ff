"""The real Python bindings of TensorRT, without TensorRT: wheels from the package index over stub libraries.

Run as a script it writes ``api.json`` anew.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trt_stubs.names import API, VERSIONS, Classes, common, uses_of

ROOT = Path(__file__).parents[3]
SOURCES = (ROOT / "prune2deploy" / "backends" / "tensorrt.py", ROOT / "tests" / "gpu" / "test_tensorrt_live.py")
"""What uses TensorRT: the backend, and the tests that run only where there is a GPU."""

PACKAGES = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
LOG_SLOTS = {"10": 0, "11": 4}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


class UnavailableError(Exception):
    """The wheels or a C compiler cannot be had here; the message says which."""


def cache_folder() -> Path:
    return Path(os.environ.get("P2D_TRT_WHEELS") or ROOT / ".cache" / "trt-wheels")


def wheel(version: str) -> Path:
    """Return the bindings' wheel for this Python, from the cache or through pip."""
    pattern = f"tensorrt_cu1?_bindings-{version}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"
    cache = cache_folder()
    found = sorted(cache.glob(pattern))
    if found:
        return found[0]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, f"{PACKAGES[version]}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        fetched = sorted(Path(folder).glob(pattern))
        if not fetched:
            last = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise UnavailableError(f"pip cannot download {PACKAGES[version]} {version} for this Python: {last}")
        target = cache / fetched[0].name
        fetched[0].replace(target)
    return target


def unpack(version: str, folder: Path) -> Path:
    """Unpack the wheel into ``folder``, and put a module ``tensorrt`` before it, as the metapackage does."""
    with zipfile.ZipFile(wheel(version)) as archive:
        archive.extractall(folder)
    alias = "import sys\nimport tensorrt_bindings\nsys.modules[__name__] = tensorrt_bindings\n"
    (folder / "tensorrt.py").write_text(alias)
    return folder


def build_stubs(version: str, folder: Path) -> Path:
    """Compile the stub libraries for a version into ``folder``."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UnavailableError("there is no C compiler (cc or gcc) to build the stub libraries with")
    major = version.split(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-DLOG_SLOT={LOG_SLOTS[major]}"]
        source = str(Path(__file__).with_name("stubs.c"))
        command = [compiler, *flags, f"-Wl,-soname,{name}", "-o", str(folder / name), source]
        subprocess.run(command, check=True)
    return folder


def run_python(arguments: list[str], bindings: Path, stubs: Path | None) -> str:
    """Return what a Python prints that finds these bindings, and behind them the stubs or nothing."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(bindings), str(ROOT)]),
        "LD_LIBRARY_PATH": str(stubs) if stubs is not None else "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"python {arguments[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def describe(version: str, folder: Path) -> tuple[str, Classes]:
    """Return the version and the classes that the real bindings of ``version`` have."""
    bindings, stubs = unpack(version, folder / "bindings"), build_stubs(version, folder / "stubs")
    said = json.loads(run_python([str(Path(__file__).with_name("describe.py"))], bindings, stubs))
    return said["version"], said["classes"]


def shared_api(descriptions: list[Classes]) -> Classes:
    """Return what ``api.json`` has to say, given the classes of `VERSIONS`."""
    uses = [uses_of(source.read_text(), descriptions[0]) for source in SOURCES]
    return common(descriptions, {name for use in uses for name in use.classes | {owner for owner, _ in use.names}})


def dump(classes: Classes) -> str:
    """Return the text of ``api.json``, a line for each member."""
    blocks = []
    for name, members in classes.items():
        lines = ",\n".join(f"  {json.dumps(member)}: {json.dumps(what)}" for member, what in members.items())
        blocks.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    body = ",\n".join(blocks)
    return f'{{"versions": {json.dumps(VERSIONS)}, "classes": {{\n{body}\n}}}}\n'


def main() -> None:
    """Write ``api.json``."""
    with tempfile.TemporaryDirectory() as folder:
        classes = [describe(version, Path(folder) / version)[1] for version in VERSIONS]
    API.write_text(dump(shared_api(classes)))


if __name__ == "__main__":
    main()
