"""Train in as many processes as torchrun started, and write what each of them got.

Usage: several.py FOLDER NAME; writes FOLDER/NAME-RANK.safetensors, whose metadata hold the losses and the accuracies.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_training import few_digits, small, train
from torch import nn

from prune2deploy.apply import MaskKeeper, apply_masks, weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.exporter import export_network
from prune2deploy.graph.groups import find_groups
from prune2deploy.methods import load_method
from prune2deploy.train import EpochResult, Processes, Progress


def trained(module: nn.Module, **options: object) -> tuple[list[float], list[float], list[float]]:
    """Train; return the losses of steps and of epochs, and the accuracies."""
    steps: list[Progress] = []
    results: list[EpochResult] = train(module, few_digits(), on_progress=steps.append, **options)
    return [each.loss for each in steps], [each.loss for each in results], [each.holdout.top1 for each in results]


def main() -> None:
    torch.set_num_threads(1)
    folder, name = Path(sys.argv[1]), sys.argv[2]
    processes = Processes("cpu")

    plain = small(norm=False)
    curves = {"plain": trained(plain, epochs=3, batch_size=33, penalty=lambda: 1e-3 * plain[0].weight.abs().sum())}

    normed = small(dropout=0.2)
    groups = find_groups(export_network(normed, (torch.zeros(2, 1, 8, 8),), fuse=False).model)
    curves["sparse"] = trained(normed, epochs=2, penalty=lambda: 1e-2 * normed[1].weight.abs().sum(), ema=0.9)
    masks = load_method("l1").plan(weights_of(normed), groups, Budget(Target("macs", 0.5))).keep
    apply_masks(normed, groups, masks)
    folded = folder / f"{name}-checkpoint"
    keeper = MaskKeeper(normed, groups, masks)
    curves["finetuned"] = trained(normed, epochs=2, optimizer="adamw", after_step=keeper, checkpoint=folded)

    agreed = processes.agreed(lambda: f"said by {processes.rank} of {processes.count}")
    tensors = {f"plain.{key}": each.contiguous() for key, each in plain.state_dict().items()}
    tensors |= {f"normed.{key}": each.contiguous() for key, each in normed.state_dict().items()}
    tensors |= {f"mask.{group}": torch.from_numpy(mask) for group, mask in masks.items()}
    metadata = {"curves": json.dumps(curves), "agreed": agreed}
    save_file(tensors, folder / f"{name}-{processes.rank}.safetensors", metadata=metadata)
    processes.wait()


if __name__ == "__main__":
    main()
