"""Slim random graphs for as long as you like, and print any that comes out wrong.

Usage: python tools/fuzz.py --examples 50000 --seed 1 [--no-sharing] [--shrink]

Each graph is slimmed, verified, and slimmed again. Counts go to stdout at the end. A graph that fails is printed as
text, with what became of it; with --shrink it is made as small as hypothesis can first. A second run that removes more
is only counted, unless --twice makes it a failure.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import onnx  # noqa: E402
from graph.random_graphs import models  # noqa: E402
from hypothesis import HealthCheck, Phase, given, note, seed, settings  # noqa: E402

from prune2deploy.graph.rewrite import remove_dead_channels  # noqa: E402
from prune2deploy.graph.verify import verify  # noqa: E402


def check(model: onnx.ModelProto, counts: Counter[str], *, twice: bool) -> None:
    """Slim one graph, and count what happened; raise if anything is wrong with it."""
    data = model.SerializeToString()
    slimmed = remove_dead_channels(onnx.load_from_string(data))
    slim = slimmed.model.SerializeToString()
    note("the slim graph:\n" + onnx.printer.to_text(slimmed.model))
    verify(data, slim)
    again = remove_dead_channels(onnx.load_from_string(slim))
    counts["graphs"] += 1
    counts["nodes"] += len(model.graph.node)
    counts["with channels removed"] += slimmed.removed_channels > 0
    counts["with a branch cut"] += bool(slimmed.analysis.cuts())
    counts["with a Gather inserted"] += any(node.op_type == "Gather" for node in slimmed.model.graph.node)
    counts["with an opaque node"] += bool(slimmed.opaque)
    counts["channels removed"] += slimmed.removed_channels
    counts["where a second run removed more"] += again.removed_channels > 0
    if twice and again.removed_channels:
        raise AssertionError(f"a second run removed {again.removed_channels} more channels")


def main() -> int:
    parser = argparse.ArgumentParser(description="Slim random graphs and print any that comes out wrong.")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-sharing", action="store_true", help="give every node weights of its own")
    parser.add_argument(
        "--shrink", action="store_true", help="make a failing graph as small as possible; takes minutes"
    )
    parser.add_argument("--twice", action="store_true", help="fail where a second run removes more")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    phases = [Phase.generate, Phase.shrink] if arguments.shrink else [Phase.generate]

    @seed(arguments.seed)
    @settings(
        max_examples=arguments.examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(models(sharing=not arguments.no_sharing))
    def fuzz(model: onnx.ModelProto) -> None:
        note("the graph:\n" + onnx.printer.to_text(model))
        check(model, counts, twice=arguments.twice)

    start = time.perf_counter()
    failure: BaseException | None = None
    try:
        fuzz()
    except Exception as error:
        failure = error
    for name, value in counts.items():
        print(f"{value:8d}  {name}")
    print(f"{time.perf_counter() - start:8.1f}  seconds (seed {arguments.seed})")
    if failure is not None:
        print("\n".join([f"\nFAILED: {type(failure).__name__}: {failure}", *getattr(failure, "__notes__", [])]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
