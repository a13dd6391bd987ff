#!/usr/bin/env python
"""Measure how long methods that do not train take to choose channels, and what accuracy that leaves; kept as JSON.

    python tools/bench_selection.py --weights cifar10_resnet56.safetensors --data cifar10:DIR

On one thread. Timed is the choice alone, from weights in memory to masks and new weights, images included; loading,
export and the channel analysis are not. The accuracy is that of the masked network with its norms measured anew,
without fine-tuning, beside L1 at the same widths and the dense network.
"""

import argparse
import copy
import time
from pathlib import Path

from torch import nn

from prune2deploy.apply import apply_masks, set_weights, weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.environment import environment
from prune2deploy.files import write_json
from prune2deploy.groups import Groups
from prune2deploy.masks import widths
from prune2deploy.methods import METHODS, load_method, method_class
from prune2deploy.methods.base import Context, PruneResult
from prune2deploy.pipeline import load_task
from prune2deploy.pruner import groups_of
from prune2deploy.recipe import make_recipe
from prune2deploy.train import Task, evaluate

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"bn": 1.0, "l1": 1.0, "epruner": 30.0, "cap": 180.0, "cpli": 180.0}
"""Seconds of one CPU core on ResNet-56, with 512 images."""


def accuracy(module: nn.Module, groups: Groups, planned: PruneResult, task: Task, images: int) -> float:
    pruned = copy.deepcopy(module)
    set_weights(pruned, planned.weights)
    apply_masks(pruned, groups, planned.silent)
    task.recalibrate(pruned)
    return evaluate(pruned, task.data.test, task.mean, task.std, limit=images).top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--target", type=float, default=0.5, help="share of the MACs that remains")
    still = [name for name, info in METHODS.items() if not (info.needs.trains_weights or method_class(name).phases)]
    parser.add_argument("--methods", nargs="+", default=still)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "models" / "bench" / "selection.json")
    options = parser.parse_args()

    loaded = load_task(
        make_recipe({"network": options.network, "weights": str(options.weights), "data": options.data, "threads": 1})
    )
    module, task = loaded.network.module, Task(loaded.data, loaded.mean, loaded.std)
    groups = groups_of(module, loaded.network.example_inputs)
    context = Context(module, task.images(), task.holdout(), moved=task.moved_images())
    weights = weights_of(module)

    rows = {}
    for name in options.methods:
        clock, processor = time.perf_counter(), time.process_time()
        planned = load_method(name).plan(weights, groups, Budget(Target("macs", options.target)), context)
        seconds = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}
        equal = load_method("l1").plan(weights, groups, Budget(None, widths=widths(planned.keep)), context)
        rows[name] = {
            "seconds": {key: round(value, 3) for key, value in seconds.items()},
            "goal": GOALS.get(name) if options.network == "resnet56" else None,
            "top1": accuracy(module, groups, planned, task, options.test_images),
            "top1_l1_same_widths": accuracy(module, groups, equal, task, options.test_images),
        }
        print(f"{name:<10} {rows[name]}", flush=True)
    document = {
        "network": options.network,
        "target": options.target,
        "dense_top1": evaluate(module, task.data.test, task.mean, task.std, limit=options.test_images).top1,
        "test_images": options.test_images,
        "threads": 1,
        "environment": environment(),
        "methods": rows,
    }
    write_json(options.out, document)
    print(f"results: {options.out}")


if __name__ == "__main__":
    main()
