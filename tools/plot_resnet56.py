#!/usr/bin/env python
"""Draw models/resnet56_cifar10/results.json as the README's picture: MACs left against time left, by --round-to."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).resolve().parents[1] / "models" / "resnet56_cifar10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER / "results.json")
    parser.add_argument("--out", type=Path, default=FOLDER / "latency.png")
    options = parser.parse_args()
    document = json.loads(options.results.read_text())
    bench = document["bench"]
    ratios = {entry["arm"]: entry for entry in bench["ratios"]}
    control = bench["control"]

    labels, macs, times, errors, notes = ["dense"], [1.0], [1.0], [(0.0, 0.0)], []
    notes.append(f"{100 * document['rows'][0]['accuracy']['dense']:.2f} %")
    for row in document["rows"]:
        ratio = ratios[f"round-to-{row['round_to']}"]
        labels.append(f"--round-to {row['round_to']}")
        macs.append(row["macs"]["slim_graph"] / row["macs"]["dense"])
        times.append(ratio["ratio"])
        errors.append((ratio["ratio"] - ratio["low"], ratio["high"] - ratio["ratio"]))
        notes.append(f"{100 * row['accuracy']['finetuned']:.2f} %")

    figure, axes = plt.subplots(figsize=(8.4, 3.6), dpi=160)
    places = range(len(labels))
    axes.bar([p - 0.2 for p in places], macs, 0.38, color="#c3cadb", label="MACs left")
    axes.bar([p + 0.2 for p in places], times, 0.38, color="#2463eb", label="time left (median of paired runs, 95 %)")
    bars = list(zip(*errors, strict=True))
    axes.errorbar([p + 0.2 for p in places], times, yerr=bars, fmt="none", ecolor="#111", capsize=3, lw=1)
    axes.axhspan(control["low"], control["high"], color="#e0a800", alpha=0.35, label="A/A control", zorder=0)
    for place, note, height in zip(places, notes, map(max, macs, times), strict=True):
        axes.annotate(note, (place, height + 0.04), ha="center", fontsize=8, color="#333")
    axes.set_xticks(list(places), labels)
    axes.set_ylim(0, max([*macs, *times]) * 1.3)
    axes.set_ylabel("share of the dense network")
    epochs = document["rows"][0]["finetune_epochs"]
    title = "ResNet-56, CIFAR-10, half of the MACs: the time depends on the widths"
    axes.set_title(f"{title}\n(top-1 above the bars; {epochs} epoch of fine-tuning)", fontsize=10)
    axes.legend(fontsize=8, ncols=3, loc="upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.out, metadata={"Software": None})
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
