#!/usr/bin/env python
"""Draw a comparison (compare.json) as the README's picture: every method after fine-tuning, beside its controls.

python tools/plot_compare.py models/resnet20_cifar10/compare/compare.json -o models/resnet20_cifar10/compare.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONTROLS = {
    "random_control": ("x", "random masks"),
    "l1_control": ("s", "L1"),
    "scratch_control": ("^", "from scratch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    document = json.loads(options.results.read_text())
    rows = sorted((row for row in document["rows"] if row["finetuned"] is not None), key=lambda row: row["finetuned"])

    figure, axes = plt.subplots(figsize=(8.4, 1.4 + 0.3 * len(rows)), dpi=160)
    for place, row in enumerate(rows):
        spread = 100 * (row["spread"] or 0)
        axes.errorbar(100 * row["finetuned"], place, xerr=spread or None, fmt="o", color="#2463eb", capsize=3, ms=7)
        for key, (marker, _) in CONTROLS.items():
            if row[key] is not None:
                axes.plot(100 * row[key], place, marker, color="#5b6577", mfc="none", ms=6)
    axes.axvline(100 * rows[0]["dense"], color="#111", lw=1, ls=":")
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_xlabel("top-1 on the test images, % (dotted: the dense network)")
    handles = [plt.Line2D([], [], marker="o", ls="", color="#2463eb", label="the method")]
    handles += [
        plt.Line2D([], [], marker=marker, ls="", color="#5b6577", mfc="none", label=f"{name}, same widths")
        for marker, name in CONTROLS.values()
    ]
    axes.legend(handles=handles, fontsize=8, loc="upper left", frameon=False)
    epochs = document["finetune"]["epochs"]
    seeds = max(len(row["seeds"]) for row in rows)
    axes.set_title(
        f"{document['network']}, {rows[0]['target']}, {epochs} epochs of fine-tuning, {seeds} seed{'s' * (seeds > 1)}",
        fontsize=10,
    )
    axes.grid(axis="x", color="#e7eaef")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.out, metadata={"Software": None})
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
