"""Small networks and few images, which several tests of the trainer share, in this process or in others."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from prune2deploy.data import Data, Subset, load_data
from prune2deploy.train import EpochResult, finetune


def few_digits(count: int = 128) -> Data:
    """Return the digits with the first ``count`` to train on and the first 60 held out."""
    digits = load_data("digits")
    return replace(
        digits, train=Subset(digits.train, torch.arange(count)), holdout=Subset(digits.holdout, torch.arange(60))
    )


def small(*, norm: bool = True, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """Return conv - norm - ReLU - dropout - linear; without its norm, an image's logits depend on it alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(512, 10),
        ).eval()


def train(module: nn.Module, data: Data, **options: object) -> list[EpochResult]:
    defaults = {"epochs": 1, "batch_size": 32, "precision": "fp32"}
    return finetune(module, data, **(defaults | options))  # type: ignore[arg-type]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())
