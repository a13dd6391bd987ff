"""The command line as the tests run it, in this process or in one of its own, and runs that several tests look at."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

from prune2deploy import cli
from prune2deploy.latency import compare

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "models" / "digits"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

SMALL_NETWORK = '''
"""A small network: a gain, a depthwise convolution, a concatenation, a sigmoid and a flattened map of 4x4 pixels."""

import torch
import torch.nn.functional as F
from torch import nn


class Small(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depth_norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 12, 1, bias=False)
        self.point_norm = nn.BatchNorm2d(12)
        self.left = nn.Conv2d(12, 6, 3, padding=1)
        self.right = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(12 * 16, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(image))) * self.gain.view(1, -1, 1, 1)
        x = F.relu6(self.depth_norm(self.depth(x)))
        x = F.relu(self.point_norm(self.point(x)))
        x = torch.cat([F.relu(self.left(x)), torch.sigmoid(self.right(x))], 1)
        return self.head(torch.flatten(F.max_pool2d(x, 2), 1))


def small(num_classes: int) -> nn.Module:
    return Small(num_classes)
'''


@dataclass(frozen=True)
class Outcome:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


def p2d(*arguments: object) -> Outcome:
    """Run a command in this process, with a short warm-up where it measures; a bug of the command is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["p2d", *map(str, arguments)]),
        patch("prune2deploy.latency.compare", partial(compare, warm_up=0.01)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> str:
    """Run a command in this process that must succeed; return its stdout."""
    outcome = p2d(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "prune2deploy", *map(str, arguments)]


def p2d_process(*arguments: object, cwd: Path | None = None, prefix: tuple[str, ...] = ()) -> Outcome:
    """Run a command in a process of its own, optionally behind a prefix such as ``prlimit``."""
    found = subprocess.run(
        [*prefix, *command(*arguments)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    return Outcome(found.returncode, found.stdout, found.stderr)


def refused(outcome: Outcome, code: int, *says: str) -> None:
    """Require an exit code and one line on stderr that names what the user needs; no traceback."""
    assert outcome.code == code, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("p2d: ")
    for text in says:
        assert text in lines[0], lines[0]


def write_recipe(folder: Path) -> Path:
    """Write the digits recipe with a short training and a short measurement."""
    text = (DIGITS / "recipe.toml").read_text()
    for old, new in (
        ('"weights.safetensors"', f'"{DIGITS / "weights.safetensors"}"'),
        ("epochs = 20", "epochs = 2"),
        ("seconds = 2.0", "seconds = 0.1"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def write_small_recipe(folder: Path, *lines: str) -> Path:
    """Write the small network and a recipe for it, with one epoch of training; ``lines`` are added at its top."""
    head = "".join(f"{line}\n" for line in lines)
    rest = "[finetune]\nepochs = 1\nlearning_rate = 0.3\n\n[bench]\niterations = 20\n"
    small_network(folder)
    (folder / "recipe.toml").write_text(f'{head}network = "net.py:small"\n{rest}')
    return folder / "recipe.toml"


def walked(recipe: Path) -> Path:
    """Walk the whole way by a recipe; return the run, which lies beside it."""
    done("run", recipe, "-o", recipe.parent / "run")
    return recipe.parent / "run"


def quick_bench(recipe: Path) -> Path:
    """Let a run's recipe time its networks with few iterations; return it."""
    recipe.write_text(recipe.read_text().replace("[bench]\n", "[bench]\niterations = 20\n"))
    return recipe


def small_network(folder: Path) -> str:
    """Write the small network into a folder; return its spec."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(SMALL_NETWORK)
    return f"{folder / 'net.py'}:small"
