"""Train `resnet_digits`, the reference network of a first run, and write models/digits/."""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from prune2deploy.data import load_data
from prune2deploy.files import sha256, write_bytes, write_json
from prune2deploy.networks import load_network, save_weights
from prune2deploy.train import Progress, evaluate, finetune

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "scikit-learn", "safetensors")

CARD = """# resnet_digits on the scikit-learn digits

The reference network of a first run: small enough to train in a minute on one core, large enough that pruning shows.

| | |
| --- | --- |
| architecture | `{name}`: ResNet-14, widths 16-32-64, two blocks a stage, projection shortcuts |
| input | 1x8x8, pixels in [0, 1], mean {mean}, standard deviation {std} |
| parameters, MACs | {parameters:,}; {macs:,} |
| data | `digits`, which come with scikit-learn: {train:,} to train, {holdout:,} held out, {test:,} to test |
| training | SGD, {epochs} epochs, batch {batch}, learning rate {lr}, cosine, shifts of one pixel; seed {seed} |
| test top-1 | {test_top1:.2f} % ({wrong} of {test:,} wrong) |
| held-out top-1 | {holdout_top1:.2f} % |
| time to train | {seconds:.0f} s on {threads} thread of {cpu} |

`train.json` has the numbers with their circumstances, epoch by epoch. Make both again with

```
python tools/train_digits.py
```

The same versions, machine and number of threads give the same weights.

## Data and licence

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998
(https://doi.org/10.24432/C50P49), CC BY 4.0: 8x8 images of grey levels 0 to 16, as scikit-learn bundles them.
The weights are under the licence of this project.

## Limits

One seed. The digits are easy, and the test set is small: one image is {share:.2f} points. Use it to see the tool
work, not to compare pruning methods.
"""


def main() -> None:
    options = _parse()
    torch.set_num_threads(options.threads)
    data = load_data("digits", seed=options.seed)
    network = load_network("resnet_digits", seed=options.seed)
    started = time.perf_counter()
    epochs = finetune(
        network.module,
        data,
        epochs=options.epochs,
        lr=options.lr,
        batch_size=options.batch_size,
        seed=options.seed,
        precision="fp32",
        on_progress=_report,
    )
    seconds = time.perf_counter() - started
    test = evaluate(network.module, data.test, data.mean, data.std)
    parameters = sum(each.numel() for each in network.module.parameters())
    versions = {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}
    weights = options.output / "weights.safetensors"
    save_weights(
        network.module,
        weights,
        {
            "arch": "resnet_digits",
            "data": "scikit-learn digits, 1,200 to train and hold out, 597 to test",
            "licence": "Apache-2.0",
            "mean": json.dumps(list(data.mean)),
            "std": json.dumps(list(data.std)),
            "params": str(parameters),
            "test_top1": f"{100 * test.top1:.2f}",
            "seed": str(options.seed),
            "versions": json.dumps(versions, sort_keys=True),
        },
    )
    results = {
        "schema_version": 1,
        "network": "resnet_digits",
        "parameters": parameters,
        "macs": _macs(network.module, network.example_inputs[0][:1]),
        "data": {
            "name": "digits",
            "train": len(data.train),
            "holdout": len(data.holdout),
            "test": len(data.test),
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "recipe": {key: getattr(options, key) for key in ("epochs", "lr", "batch_size", "seed", "threads")},
        "test": vars(test),
        "epochs": [{**vars(each), "holdout": vars(each.holdout)} for each in epochs],
        "seconds": seconds,
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system(), "machine": platform.machine()},
        "versions": versions,
        "weights_sha256": sha256(weights),
    }
    write_json(options.output / "train.json", results)
    write_bytes(options.output / "README.md", _card(results).encode())
    print(f"\ntest top-1 {100 * test.top1:.2f} % after {seconds:.0f} s; wrote {options.output}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "digits")
    return parser.parse_args()


def _report(progress: Progress) -> None:
    if progress.step == progress.steps:
        print(f"epoch {progress.epoch}/{progress.epochs}: loss {progress.loss:.4f}", flush=True)


def _macs(module: torch.nn.Module, image: torch.Tensor) -> int:
    """Return the multiply-adds of convolutions and linear layers for one image, counted as the layers run."""
    counts = []

    def count(layer: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        counts.append(output[0].numel() * layer.weight[0].numel())

    layers = [each for each in module.modules() if isinstance(each, torch.nn.Conv2d | torch.nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        module(image)
    for handle in handles:
        handle.remove()
    return sum(counts)


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _card(results: dict) -> str:
    data, recipe, test = results["data"], results["recipe"], results["test"]
    return CARD.format(
        name=results["network"],
        mean=data["mean"][0],
        std=data["std"][0],
        parameters=results["parameters"],
        macs=results["macs"],
        train=data["train"],
        holdout=data["holdout"],
        test=data["test"],
        epochs=recipe["epochs"],
        batch=recipe["batch_size"],
        lr=recipe["lr"],
        seed=recipe["seed"],
        test_top1=100 * test["top1"],
        wrong=round(test["images"] * (1 - test["top1"])),
        holdout_top1=100 * results["epochs"][-1]["holdout"]["top1"],
        seconds=results["seconds"],
        threads=recipe["threads"],
        cpu=results["machine"]["cpu"],
        share=100 / test["images"],
    )


if __name__ == "__main__":
    main()
