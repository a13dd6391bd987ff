#!/usr/bin/env python
"""Prune inside your own training loop: a small CNN on scikit-learn's digits, from scratch to a verified slim graph.

    python examples/own_loop.py --method l1 --epochs 5 -o slim.onnx

Any method without training phases of its own will do; `p2d methods` lists them. C-SGD needs far more epochs.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prune2deploy as p2d
from prune2deploy.methods import load_method


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,200 images [1, 8, 8] to train on and 597 to test on."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    return TensorDataset(images[:1200], labels[:1200]), TensorDataset(images[1200:], labels[1200:])


def network() -> nn.Module:
    """Return a CNN with four convolutions."""
    layers: list[nn.Module] = []
    for width, before in ((16, 1), (16, 16), (32, 16), (32, 32)):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if width != before and before > 1 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of the images that are classified rightly."""
    images, labels = data.tensors
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def train(model: nn.Module, loader: DataLoader, pruner: p2d.Pruner | None, epochs: int, rate: float) -> None:
    """Train by SGD; the pruner adds four calls to a loop that is otherwise like any other."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            if pruner is not None:
                loss = loss + pruner.penalty()
            optimizer.zero_grad()
            loss.backward()
            if pruner is not None:
                pruner.after_backward()
            optimizer.step()
            if pruner is not None:
                pruner.after_step()
        if pruner is not None:
            pruner.epoch_end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="l1", help="a name of 'p2d methods'")
    parser.add_argument("--macs", type=float, default=0.5, help="the share of the MACs that is to remain")
    parser.add_argument("--epochs", type=int, default=5, help="of training, with the method, and of fine-tuning")
    parser.add_argument("-o", "--out", default="slim.onnx")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    train_data, test_data = digits()
    loader = DataLoader(train_data, batch_size=64, shuffle=True, drop_last=True)
    model = network()
    train(model, loader, None, options.epochs, 0.1)
    print(f"dense       {accuracy(model, test_data):.1%}")

    example = train_data.tensors[0][:2]
    method = load_method(options.method)
    pruner = p2d.Pruner(model, example, method=method, target=p2d.Target(macs=options.macs))
    if method.needs.trains_weights:
        train(model, loader, pruner, options.epochs, 0.05)
    pruned = pruner.finish(calibration=loader)
    print(f"pruned      {accuracy(model, test_data):.1%}")

    train(model, loader, pruner, options.epochs, 0.05)  # the same calls keep what was pruned silent
    print(f"fine-tuned  {accuracy(model, test_data):.1%}")

    found = p2d.export(model, pruned, example, options.out)
    macs = found["macs"]
    print(f"{options.out}: {macs['before']:,} MACs -> {macs['after']:,}, verified")


if __name__ == "__main__":
    main()
