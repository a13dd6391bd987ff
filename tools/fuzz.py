"""Slim random graphs for as long as you like, and print those that come out wrong.

Usage: python tools/fuzz.py --examples 50000 --seed 1 [--steps 16] [--no-sharing] [--keep FOLDER] [--shrink] [-o FILE]

Each graph is slimmed, verified, and slimmed again; a second run should remove nothing. What goes wrong is printed when
it is met, once for each kind of mistake, with the graph as text; ``--keep`` also writes each such graph to a file.
Counts of graphs, operator families and mistakes go to stdout at the end, and every thousand graphs; ``-o`` keeps those
of each seed as JSON. With ``--shrink`` the first graph that fails is made as small as hypothesis can, and the run ends.

A graph that ONNX Runtime itself refuses proves nothing and is counted apart, as is one where a second run removes more:
its result is right, but not all that could be had.
"""

import argparse
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from code_version import package_hash  # noqa: E402
from graph.random_graphs import families_of, models  # noqa: E402
from hypothesis import HealthCheck, Phase, given, note, seed, settings  # noqa: E402

from prune2deploy.errors import InputError  # noqa: E402
from prune2deploy.files import read_json, write_json  # noqa: E402
from prune2deploy.graph.rewrite import remove_dead_channels  # noqa: E402
from prune2deploy.graph.verify import verify  # noqa: E402

SHOWN_EVERY = 1000


def check(model: onnx.ModelProto, counts: Counter[str]) -> None:
    """Slim one graph, and count what happened; raise if anything is wrong with it."""
    data = model.SerializeToString()
    slimmed = remove_dead_channels(onnx.load_from_string(data))
    slim = slimmed.model.SerializeToString()
    note("the slim graph:\n" + onnx.printer.to_text(slimmed.model))
    try:
        verify(data, slim)
    except InputError as error:
        if "ONNX Runtime refuses the reference" not in str(error):
            raise
        counts["that ONNX Runtime refuses"] += 1
        return
    again = remove_dead_channels(onnx.load_from_string(slim))
    counts["nodes"] += len(model.graph.node)
    counts["with channels removed"] += slimmed.removed_channels > 0
    counts["with a branch cut"] += bool(slimmed.analysis.cuts())
    counts["with a Gather inserted"] += any(node.op_type == "Gather" for node in slimmed.model.graph.node)
    counts["with an opaque node"] += bool(slimmed.opaque)
    counts["channels removed"] += slimmed.removed_channels
    counts["where a second run removed more"] += bool(again.removed_channels or again.removed_layers)
    if again.removed_channels or again.removed_layers:
        raise LeftBehindError(f"a second run removed {again.removed_channels} more channels, {again.removed_layers}")


class LeftBehindError(Exception):
    """The result is right, but a second run removes more."""


class Mistakes:
    """What went wrong, by kind: the first graph of each is printed."""

    def __init__(self, folder: Path | None, started_with: int) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong = 0
        self._folder = folder
        self._seed = started_with

    def add(self, model: onnx.ModelProto, error: Exception) -> None:
        """Count a mistake, print it if it is the first of its kind, and write its graph to a file."""
        self.wrong += not isinstance(error, LeftBehindError)
        kind = f"{type(error).__name__}: {re.sub(r'v?[0-9][0-9.e+-]*', '#', str(error))[:120]}"
        if not self.counts[kind]:
            print(f"\nFAILED: {type(error).__name__}: {error}\n{onnx.printer.to_text(model)}", flush=True)
        self.counts[kind] += 1
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            onnx.save(model, self._folder / f"{self._seed}-{self.counts.total()}.onnx")


def show(counts: Counter[str], mistakes: Mistakes, start: float) -> None:
    """Print all counts."""
    print(f"\n{time.perf_counter() - start:8.1f}  seconds")
    for table in (counts, mistakes.counts):
        for name, value in sorted(table.items()):
            print(f"{value:8d}  {name}")
    print(f"{mistakes.wrong:8d}  mistakes", flush=True)


def keep_results(path: Path, arguments: argparse.Namespace, counts: Counter[str], mistakes: Mistakes) -> None:
    """Write the counts of this seed among those of others."""
    row = {
        "steps": arguments.steps,
        "package": package_hash(),
        "onnxruntime": onnxruntime.__version__,
        "mistakes": mistakes.wrong,
        "kinds": dict(sorted(mistakes.counts.items())),
        "counts": {name: count for name, count in sorted(counts.items()) if "family" not in name},
    }
    rows = read_json(path)["rows"] if path.exists() else {}
    write_json(path, {"schema_version": 1, "rows": rows | {f"seed {arguments.seed}": row}})


def main() -> int:
    parser = argparse.ArgumentParser(description="Slim random graphs and print those that come out wrong.")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12, help="at most so many families in a row")
    parser.add_argument("--no-sharing", action="store_true", help="give every node weights of its own")
    parser.add_argument("--keep", type=Path, help="a folder for the graphs that fail")
    parser.add_argument("-o", "--output", type=Path, help="a JSON file to which the counts of this seed are added")
    parser.add_argument("--shrink", action="store_true", help="make the first graph that fails small; takes minutes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    mistakes = Mistakes(arguments.keep, arguments.seed)
    start = time.perf_counter()

    @seed(arguments.seed)
    @settings(
        max_examples=arguments.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if arguments.shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(models(arguments.steps, sharing=not arguments.no_sharing))
    def fuzz(model: onnx.ModelProto) -> None:
        note("the graph:\n" + onnx.printer.to_text(model))
        counts["graphs"] += 1
        counts.update(f"graphs with family {name}" for name in families_of(model))
        try:
            check(model, counts)
        except Exception as error:
            if arguments.shrink:
                raise
            mistakes.add(model, error)
        if counts["graphs"] % SHOWN_EVERY == 0:
            show(counts, mistakes, start)

    try:
        fuzz()
    except Exception as error:  # with --shrink: the smallest graph that fails
        print("\n".join([f"\nFAILED: {type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
        return 1
    show(counts, mistakes, start)
    if arguments.output is not None:
        keep_results(arguments.output, arguments, counts, mistakes)
    return 1 if mistakes.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
