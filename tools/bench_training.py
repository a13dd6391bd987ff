"""Measure a training step of ResNet-20 and ResNet-56 on CIFAR's shapes, and write models/bench/training.json.

Usage: python tools/bench_training.py [--quick] [--device cpu] [--threads 1] [-o FILE]

Arms, each with the same images, augmentation and SGD: `plain` is the loop that everybody writes, float32 in PyTorch's
usual layout; `plain, channels last` and `plain, bf16` change one thing about it, `plain, both` both; `trainer` is
`train.finetune` as `p2d prune` runs it here (channels last; bfloat16 where it pays; on a CPU, freed memory is kept) and
`trainer, bf16` is told to use bfloat16. Each arm has a process of its own, and one works at a time. Rounds go through
all arms, in an order that rotates; a round is a few steps, of which the first is not counted. What counts is the
median step, in seconds of the clock and of the processor (on a machine that does other work the latter is the fairer).
Goal: the trainer takes a plain step's time divided by 1.3, or less. With --quick there is one short round, and nothing
is written unless -o says so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from prune2deploy.data import Data, TensorSplit, augment, normalise  # noqa: E402
from prune2deploy.environment import environment  # noqa: E402
from prune2deploy.networks import load_network  # noqa: E402
from prune2deploy.train import finetune, keep_freed_memory  # noqa: E402

NETWORKS = ("resnet20", "resnet56")
BATCH = 128
GOAL = 1.3


@dataclass
class Steps:
    """The times of an arm's steps."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    _last: tuple[float, float] | None = None

    def tick(self, device: torch.device) -> None:
        """Note the end of a step; the first of a round only starts the clock."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        if self._last is not None:
            self.clock.append(now[0] - self._last[0])
            self.processor.append(now[1] - self._last[1])
        self._last = now


def made_up(steps: int) -> Data:
    """Return as many random images of CIFAR's shape as so many steps need."""
    draw = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorSplit:
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8)
        return TensorSplit(pixels, torch.randint(0, 10, (count,), generator=draw))

    names = tuple(map(str, range(10)))
    return Data("random", split(steps * BATCH), split(2), split(2), 10, names, (0.5,) * 3, (0.25,) * 3, 3, 32)


def plain_steps(module: nn.Module, data: Data, device: torch.device, *, last: bool, bf16: bool) -> Iterator[None]:
    """Train as everybody does, and yield after every step."""
    layout = torch.channels_last if last else torch.contiguous_format
    module.to(device, memory_format=layout).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    draw = torch.Generator().manual_seed(0)
    for indices in torch.split(torch.randperm(len(data.train), generator=draw), BATCH):
        images = augment(data.train.images(indices).to(device).float() / 255, draw, flip=True, pad=4)
        images = normalise(images, data.mean, data.std).contiguous(memory_format=layout)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
            logits = module(images)
        F.cross_entropy(logits.float(), data.train.labels[indices].to(device)).backward()
        optimizer.step()
        yield


def run_plain(last: bool, bf16: bool) -> Callable[[nn.Module, Data, torch.device, Steps], None]:
    def run(module: nn.Module, data: Data, device: torch.device, steps: Steps) -> None:
        for _ in plain_steps(module, data, device, last=last, bf16=bf16):
            steps.tick(device)

    return run


def run_trainer(precision: str) -> Callable[[nn.Module, Data, torch.device, Steps], None]:
    def run(module: nn.Module, data: Data, device: torch.device, steps: Steps) -> None:
        finetune(
            module,
            data,
            epochs=1,
            lr=0.01,
            batch_size=BATCH,
            device=device,
            precision=precision,
            on_progress=lambda _: steps.tick(device),
        )

    return run


ARMS = {
    "plain": run_plain(last=False, bf16=False),
    "plain, channels last": run_plain(last=True, bf16=False),
    "plain, bf16": run_plain(last=False, bf16=True),
    "plain, both": run_plain(last=True, bf16=True),
    "trainer": run_trainer("auto"),
    "trainer, bf16": run_trainer("bf16"),
}


class Worker:
    """An arm in a process of its own, which trains when it is told to."""

    def __init__(self, arm: str, device: str, threads: int) -> None:
        words = [sys.executable, __file__, "--arm", arm, "--device", device, "--threads", str(threads)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, network: str, count: int) -> dict[str, list[float]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(network, count, file=self._process.stdin, flush=True)
        found: dict[str, list[float]] = json.loads(self._process.stdout.readline())
        return found

    def end(self) -> None:
        self._process.communicate()


def work(arm: str, device: torch.device) -> None:
    """Do a round for every line on stdin, and print its times."""
    if arm.startswith("trainer") and device.type == "cpu":
        keep_freed_memory()
    for line in sys.stdin:
        network, count = line.split()
        steps = Steps()
        ARMS[arm](load_network(network).module, made_up(int(count)), device, steps)
        print(json.dumps({"clock": steps.clock, "processor": steps.processor}), flush=True)


def measure(workers: dict[str, Worker], network: str, rounds: int, count: int) -> dict[str, Any]:
    """Return the median steps of all arms, and how many times as fast as the plain one they are."""
    names = list(workers)
    times: dict[str, dict[str, list[float]]] = {name: {"clock": [], "processor": []} for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for kind, values in workers[name].round(network, count).items():
                times[name][kind] += values
    found = {}
    for name, own in times.items():
        entry: dict[str, Any] = {"steps": len(own["clock"])}
        for kind, values in own.items():
            entry[f"{kind}_ms"] = round(1e3 * statistics.median(values), 2)
            ratio = statistics.median(times["plain"][kind]) / statistics.median(values)
            entry[f"{kind}_times_faster"] = round(ratio, 3)
        found[name] = entry
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.arm is not None:
        work(options.arm, device)
        return 0
    rounds, count = (1, 3) if options.quick else (options.rounds, 5)
    where = environment()
    print(
        f"{where['cpu']}, {', '.join(where['cpu_vector_units'])}; torch {torch.__version__}; {options.threads} threads"
    )
    kind = "processor" if device.type == "cpu" and options.threads == 1 else "clock"
    workers = {arm: Worker(arm, options.device, options.threads) for arm in ARMS}
    networks: dict[str, Any] = {}
    for network in NETWORKS:
        networks[network] = measure(workers, network, rounds, count)
        for name, entry in networks[network].items():
            times = f"{entry['clock_ms']:9.1f} ms by the clock, {entry['processor_ms']:9.1f} ms of the processor"
            print(f"{network:9} {name:22} {times}, {entry[f'{kind}_times_faster']:.2f} times as fast as plain")
    for worker in workers.values():
        worker.end()
    best = {name: arms["trainer"][f"{kind}_times_faster"] for name, arms in networks.items()}
    met = all(ratio >= GOAL for ratio in best.values())
    print(f"goal of {GOAL}: {'met' if met else 'NOT met'} ({best})")
    document = {
        "batch": BATCH,
        "counted": kind,
        "device": options.device,
        "environment": where,
        "goal": {"times_faster": GOAL, "met": met, "reached": best},
        "networks": networks,
        "rounds": rounds,
        "threads": options.threads,
    }
    out = options.out or (None if options.quick else ROOT / "models" / "bench" / "training.json")
    if out is not None:
        out.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
