"""The layers: what each module may import, and that the command line starts without the heavy packages.

Three columns (torch, ONNX, device) stand on one base and know nothing of each other; only the pipeline joins them.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "prune2deploy"
STANDARD = sys.stdlib_module_names | {"__future__"}


@dataclass(frozen=True)
class Row:
    """What the modules under a prefix may import; ``lazy`` and ``lazy_internal`` only inside functions."""

    internal: tuple[str, ...] = ()
    packages: frozenset[str] = frozenset()
    lazy: frozenset[str] = frozenset()
    lazy_internal: tuple[str, ...] = ()


def names(text: str = "") -> frozenset[str]:
    return frozenset(text.split())


BASE = (
    *("__init__", "errors", "files", "masks", "cost", "groups", "rounding", "report", "environment", "recipe"),
    *("silence", "plugins", "identity"),
)
PAGE = ("markup", "findings", "figures")
ANY = ("",)
TORCH_LAZY = names("torch torchvision timm safetensors sklearn PIL scipy onnx onnxscript")

TABLE = {
    # the base: numpy and the standard library
    "errors": Row(),
    "files": Row(BASE),
    "cost": Row(BASE, names("numpy")),
    "groups": Row(BASE, names("numpy")),
    "rounding": Row(BASE, names("numpy")),
    "report": Row(BASE, names("numpy")),
    "environment": Row(BASE, names("numpy")),
    "ranks": Row(),
    "masks": Row(BASE, names("numpy safetensors")),
    "silence": Row(BASE, names("numpy")),
    "plugins": Row(BASE),
    "recipe": Row(BASE, names("numpy pydantic tomli_w")),
    "identity": Row(BASE),
    # the torch column
    "networks": Row((*BASE, "networks"), names("numpy torch safetensors"), TORCH_LAZY),
    "data": Row((*BASE, "networks", "data"), names("numpy torch"), TORCH_LAZY),
    "apply": Row((*BASE, "networks"), names("numpy torch"), TORCH_LAZY),
    "train": Row((*BASE, "networks", "data", "apply", "train"), names("numpy torch"), TORCH_LAZY | names("accelerate")),
    "exporter": Row(
        (*BASE, "networks", "apply", "exporter"),
        names("numpy torch onnx onnxscript"),
        TORCH_LAZY | names("onnxruntime"),
    ),
    # scores and budgets are functions of arrays, so the torch column and an ONNX file share them
    "climb": Row(BASE, names("numpy")),
    "budget": Row((*BASE, "climb"), names("numpy scipy")),
    "methods": Row((*BASE, "budget", "methods"), names("numpy scipy"), names("torch sklearn"), ("train", "apply")),
    # the ONNX column
    "graph": Row((*BASE, "graph"), names("numpy scipy onnx onnx_graphsurgeon ml_dtypes google"), names("onnxruntime")),
    # the device column
    "backends": Row((*BASE, "backends"), names("numpy"), names("onnx onnxruntime tensorrt")),
    "latency": Row((*BASE, "backends"), names("numpy"), names("scipy")),
    # the report's page
    "markup": Row(BASE),
    "findings": Row(BASE, names("numpy")),
    "figures": Row((*BASE, *PAGE), names("numpy"), names("plotly")),
    "page": Row((*BASE, *PAGE), names("numpy"), names("plotly")),
    "comparison": Row(BASE, names("numpy")),
    "sensitivity_page": Row((*BASE, *PAGE, "page")),
    "comparison_page": Row((*BASE, *PAGE, "page", "comparison")),
    # what a terminal shows
    "screen": Row((*BASE, *PAGE), names("rich")),
    # one file slimmed, and what joins the columns
    "slim": Row((*BASE, "graph"), names("numpy"), names("onnx"), ("graph",)),
    "pipeline": Row(ANY, names("numpy"), names("numpy scipy torch onnx onnx_graphsurgeon onnxruntime")),
    "narrow": Row((*BASE, "networks", "narrow"), names("numpy torch"), TORCH_LAZY, ("methods",)),
    "export_narrow": Row(ANY, names("numpy torch onnx")),
    "origins": Row(ANY, names("numpy torch onnx")),
    "prune_network": Row(ANY, names("numpy"), names("torch")),
    "unfinished": Row(BASE, names("numpy"), names("torch"), ("train", "networks", "methods")),
    "compare": Row(ANY, names("pydantic")),
    "workers": Row(BASE, lazy=names("ray")),
    "prune_onnx": Row(ANY, names("numpy"), names("torch onnx")),
    "sensitivity": Row(ANY, names("numpy"), names("torch")),
    "pruner": Row(ANY, names("numpy torch")),
    "cli": Row(("__init__", "errors", "ranks", "cli"), names("typer rich"), names("click"), ANY),
    "__main__": Row(("cli",)),
    "__init__": Row(lazy_internal=ANY),
}

APART = {"graph.verify": ("graph.rules", "graph.facts", "graph.liveness", "graph.keep", "graph.rewrite")}
"""Module -> what it must not reach even through others: a proof that uses the rules would confirm their mistakes."""

HEAVY = ("torch", "onnxruntime", "tensorrt", "plotly", "sklearn", "PIL", "timm", "torchvision", "onnxscript")


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    lazy: bool


def modules(package: Path) -> dict[str, Path]:
    """Return the package's modules by name, the package's own left out: ``graph.rules.base``, ``cli``, ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Return what a file imports; of ``from package import module`` the module."""
    yield from _imports(ast.parse(path.read_text()), known, lazy=False)


def _imports(node: ast.AST, known: dict[str, Path], *, lazy: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"a relative import on line {node.lineno}"
        targets = [f"{node.module}.{alias.name}" for alias in node.names]
        named = [target if target.removeprefix(f"{PACKAGE}.") in known else str(node.module) for target in targets]
        yield from (Import(target, node.lineno, lazy) for target in dict.fromkeys(named))
    is_deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, known, lazy=lazy or is_deferred or is_for_types)


def is_under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(prefix in ("", module) or module.startswith(f"{prefix}.") for prefix in prefixes)


def row_of(module: str) -> Row | None:
    under = [prefix for prefix in TABLE if is_under(module, (prefix,))]
    return TABLE[max(under, key=len)] if under else None


def complaints(package: Path) -> list[str]:
    """Return every import that the table does not allow, and every module that it does not name."""
    known = modules(package)
    found = []
    for module, path in known.items():
        row = row_of(module)
        if row is None:
            found.append(f"{module}: no line of the table names it")
            continue
        wrong = [entry for entry in imports(path, known) if not is_allowed(entry, row)]
        found += [f"{module}, line {one.line}: {one.target}{' in a function' if one.lazy else ''}" for one in wrong]
    return found + unproved(known)


def is_allowed(entry: Import, row: Row) -> bool:
    top, _, rest = entry.target.partition(".")
    if top == PACKAGE:
        return is_under(rest or "__init__", row.internal + (row.lazy_internal if entry.lazy else ()))
    return top in STANDARD or top in row.packages or (entry.lazy and top in row.lazy)


def unproved(known: dict[str, Path]) -> list[str]:
    """Return what the modules of `APART` reach, directly or not, of what they must not."""
    found = []
    for start, forbidden in APART.items():
        reached, waiting = set(), [start] if start in known else []
        while waiting:
            module = waiting.pop()
            reached.add(module)
            targets = {entry.target.removeprefix(f"{PACKAGE}.") for entry in imports(known[module], known)}
            waiting.extend(sorted(target for target in targets if target in known and target not in reached))
        found += [f"{start}: reaches {module}" for module in sorted(reached) if is_under(module, forbidden)]
    return found


def test_every_module_imports_only_what_its_layer_allows() -> None:
    found = complaints(ROOT / PACKAGE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("errors", "import numpy", "errors, line 1: numpy"),
        ("masks", "import torch", "masks, line 1: torch"),
        ("masks", "def f():\n import torch", "masks, line 2: torch in a function"),
        ("methods.csgd", "import torch", "methods.csgd, line 1: torch"),
        ("methods.csgd", f"from {PACKAGE}.train import finetune", f"methods.csgd, line 1: {PACKAGE}.train"),
        ("graph.facts", "from onnxruntime import InferenceSession", "graph.facts, line 1: onnxruntime"),
        ("graph.facts", "def f():\n import torch", "graph.facts, line 2: torch in a function"),
        ("graph.facts", f"from {PACKAGE}.networks import load", f"graph.facts, line 1: {PACKAGE}.networks"),
        ("latency", f"import {PACKAGE}.graph.node", f"latency, line 1: {PACKAGE}.graph.node"),
        ("backends.ssh", "try:\n import onnxruntime\nexcept ImportError: pass", "backends.ssh, line 2: onnxruntime"),
        ("page", "import plotly.graph_objects", "page, line 1: plotly.graph_objects"),
        ("cli", f"from {PACKAGE} import pipeline", f"cli, line 1: {PACKAGE}"),
        ("cli", f"from {PACKAGE}.pipeline import run", f"cli, line 1: {PACKAGE}.pipeline"),
        ("train", f"from {PACKAGE}.pipeline import run", f"train, line 1: {PACKAGE}.pipeline"),
        ("helpers", "", "helpers: no line of the table names it"),
        ("graph.verify", f"from {PACKAGE}.graph.rules import RULES", "graph.verify: reaches graph.rules"),
    ],
)
def test_an_import_across_layers_is_found(module: str, source: str, complaint: str, tmp_path: Path) -> None:
    for name, text in {"pipeline": "", "graph.rules": "", module: source}.items():
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    expected = complaint if source != f"from {PACKAGE} import pipeline" else f"{complaint}.pipeline"
    assert complaints(tmp_path) == [expected]


def test_what_is_reached_through_another_module_counts_for_the_proof(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "verify.py").write_text(f"def f():\n    from {PACKAGE}.graph.run import run\n")
    (tmp_path / "graph" / "run.py").write_text(f"from {PACKAGE}.graph import facts\n")
    (tmp_path / "graph" / "facts.py").write_text("import numpy\n")
    assert complaints(tmp_path) == ["graph.verify: reaches graph.facts"]


def test_imports_for_types_and_in_functions_may_be_heavy(tmp_path: Path) -> None:
    (tmp_path / "backends").mkdir()
    text = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tensorrt\ndef f():\n    import onnxruntime\n"
    )
    (tmp_path / "backends" / "ssh.py").write_text(text)
    assert complaints(tmp_path) == []


BLOCK = """
import sys
blocked = set({blocked!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{{name}} is blocked by the test")
sys.meta_path.insert(0, Blocker())
"""


def run_blocked(code: str, blocked: tuple[str, ...] = HEAVY) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that cannot import the ``blocked`` packages."""
    command = [sys.executable, "-W", "error", "-c", BLOCK.format(blocked=sorted(blocked)) + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_help_is_printed_without_the_heavy_packages() -> None:
    code = "import runpy\nsys.argv = ['p2d', '--help']\nrunpy.run_module('prune2deploy', run_name='__main__')\n"
    done = run_blocked(code)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr == ""


def test_the_block_blocks() -> None:
    done = run_blocked("import onnxruntime")
    assert done.returncode == 1
    assert "onnxruntime is blocked by the test" in done.stderr


def test_importing_the_package_needs_nothing_but_the_standard_library() -> None:
    done = run_blocked(
        "import prune2deploy; print(prune2deploy.__version__)", (*HEAVY, "numpy", "onnx", "scipy", "typer")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_all_but_the_torch_column_can_be_imported_without_the_heavy_packages() -> None:
    torch_column = ("networks", "data", "apply", "train", "exporter", "pruner", "narrow", "export_narrow", "origins")
    light = [name for name in modules(ROOT / PACKAGE) if name != "__init__" and not is_under(name, torch_column)]
    assert {"masks", "budget", "cli"} <= set(light)
    code = f"import importlib\nfor name in {light!r}:\n    importlib.import_module('{PACKAGE}.' + name)\n"
    done = run_blocked(code)
    assert done.returncode == 0, done.stderr
