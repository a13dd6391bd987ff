#!/usr/bin/env python
"""Measure what `prune2deploy.Pruner` adds to a training step: idle (a method that does not train), and keeping masks.

    python tools/bench_pruner.py

Steps of the three loops are interleaved in random order, on one thread; the ratio is the median over the rounds of the
times in one round. Results are kept as JSON.
"""

import argparse
import copy
import random
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import prune2deploy as p2d
from prune2deploy.environment import environment
from prune2deploy.files import write_json
from prune2deploy.networks import load_network

ROOT = Path(__file__).resolve().parents[1]


class Loop:
    """One network with its optimizer, and a pruner or none."""

    def __init__(self, network: torch.nn.Module, pruner: p2d.Pruner | None) -> None:
        self.network, self.pruner = network.train(), pruner
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        start = time.perf_counter()
        loss = F.cross_entropy(self.network(images), labels)
        if self.pruner is not None:
            loss = loss + self.pruner.penalty()
        self.optimizer.zero_grad()
        loss.backward()
        if self.pruner is not None:
            self.pruner.after_backward()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.after_step()
        return time.perf_counter() - start


def loops(name: str, images: torch.Tensor) -> dict[str, Loop]:
    network = load_network(name, num_classes=10, in_channels=3, input_shape=(3, 32, 32)).module
    found = {"plain": Loop(copy.deepcopy(network), None)}
    for state in ("idle", "keeping masks"):
        own = copy.deepcopy(network)
        pruner = p2d.Pruner(own, images[:2], method=p2d.methods.L1(), target=p2d.Target(macs=0.5))
        if state != "idle":
            pruner.finish()
        found[state] = Loop(own, pruner)
    return found


def measure(name: str, rounds: int, batch: int) -> dict[str, object]:
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    found = loops(name, images)
    for loop in found.values():
        loop.step(images, labels)
    times: dict[str, list[float]] = {key: [] for key in found}
    order = list(found)
    for _ in range(rounds):
        random.shuffle(order)
        for key in order:
            times[key].append(found[key].step(images, labels))
    ratios = {
        key: sorted(own / plain for own, plain in zip(times[key], times["plain"], strict=True))
        for key in found
        if key != "plain"
    }
    return {
        "network": name,
        "batch": batch,
        "rounds": rounds,
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "ratio": {key: statistics.median(own) for key, own in ratios.items()},
        "quartiles": {key: [own[len(own) // 4], own[3 * len(own) // 4]] for key, own in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "models" / "bench" / "pruner.json")
    options = parser.parse_args()

    random.seed(0)
    torch.set_num_threads(1)
    rows = [measure(name, options.rounds, options.batch) for name in options.networks]
    where = environment()
    print(where["cpu"], where["packages"].get("torch"))
    for row in rows:
        shown = ", ".join(f"{key} {ratio:.3f}" for key, ratio in row["ratio"].items())
        print(f"{row['network']}: {row['plain_ms']:.1f} ms a step of {row['batch']} images; ratio {shown}")
    write_json(options.out, {"rows": rows, "environment": where})


if __name__ == "__main__":
    main()
