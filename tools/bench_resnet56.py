#!/usr/bin/env python
"""Walk ResNet-56 on CIFAR-10 from a checkpoint to measured latency, for several --round-to; results are kept as JSON.

    python tools/bench_resnet56.py --weights cifar10_resnet56.safetensors --data cifar10:DIR --work runs/resnet56

Every step is a command of p2d, so the results are what a user gets. `--steps bench` repeats the timing alone: run it on
a quiet machine.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from prune2deploy.environment import environment
from prune2deploy.files import write_json
from prune2deploy.report import read_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "models" / "resnet56_cifar10" / "results.json"


def p2d(*words: object) -> str:
    """Run a command of p2d and return what it printed; its progress and errors pass through."""
    command = [sys.executable, "-m", "prune2deploy", *map(str, words)]
    print("$ p2d", *words, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def prune(options: argparse.Namespace, run: Path, round_to: int) -> None:
    p2d(
        *("prune", "resnet56", "--weights", options.weights, "--data", options.data),
        *("--method", "l1", "--target", "macs=0.5", "--round-to", round_to),
        *("--finetune-epochs", options.epochs, "--learning-rate", 0.02, "--threads", options.threads, "-o", run),
    )


def row(run: Path) -> dict[str, object]:
    """Return what one run reached."""
    report = read_report(run)
    pruned, slim = report["prune"], report["slim"]
    output = report["verify"]["outputs"][0]
    return {
        "round_to": pruned["round_to"],
        "method": pruned["method"],
        "finetune_epochs": pruned["finetune_epochs"],
        "macs": {**pruned["macs"], "slim_graph": slim["macs"]["after"]},
        "parameters": pruned["parameters"],
        "accuracy": {name: found["top1"] if found else None for name, found in pruned["accuracy"].items()},
        "groups": {group["id"]: [group["before"], group["after"]] for group in pruned["groups"]},
        "idle_classes": slim["idle_classes"],
        "bytes": slim["bytes"],
        "difference_of_largest_output": output["difference"] / output["largest"],
        "seconds": {"slim": slim["seconds"], "prune": pruned["seconds"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "resnet56")
    parser.add_argument("--round-to", type=int, nargs="+", default=[8, 4, 1])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--steps", nargs="+", choices=("prune", "export", "bench"), default=["prune", "export", "bench"]
    )
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    runs = {round_to: options.work / f"round-to-{round_to}" for round_to in options.round_to}
    for round_to, run in runs.items():
        if "prune" in options.steps:
            prune(options, run, round_to)
        if "export" in options.steps:
            p2d("export", run)
    document = {"rows": [row(run) for run in runs.values()], "environment": environment()}
    if "bench" in options.steps:
        arms = options.work / "arms"
        arms.mkdir(exist_ok=True)
        first = next(iter(runs.values()))
        names = {"dense": first / "dense.onnx"} | {f"round-to-{n}": run / "slim.onnx" for n, run in runs.items()}
        for name, path in names.items():
            (arms / f"{name}.onnx").write_bytes(path.read_bytes())
        models = [arms / f"{name}.onnx" for name in names]
        printed = p2d("bench", *models, "--sessions", options.sessions, "--seconds", options.seconds, "--json")
        document["bench"] = json.loads(printed)["bench"]
        for run in runs.values():
            p2d("bench", run, "--sessions", 5, "--seconds", options.seconds, "--json")
            p2d("report", run, "-o", run / "report.html")
    write_json(options.results, document)
    for entry in document["rows"]:
        print(json.dumps({key: entry[key] for key in ("round_to", "macs", "accuracy")}))
    for ratio in document.get("bench", {}).get("ratios", []):
        print(f"{ratio['arm']}: {ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] of dense")
    print(f"results: {options.results}")


if __name__ == "__main__":
    main()
