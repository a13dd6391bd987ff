"""What a training is told: its numbers, what may be done in each step, and what it tells in return."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune2deploy.train.accuracy import Accuracy, require

PRECISIONS = ("auto", "fp32", "bf16")
OPTIMIZERS = ("sgd", "adamw")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From normalised images [B, C, H, W], logits [B, classes] in float32, and labels int64 [B], to a scalar: a mean."""


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step.

    Attributes:
        epoch: counted from 1.
        epochs: how many there will be.
        step: of the epoch, counted from 1.
        steps: of an epoch.
        loss: of this step.
        lr: of this step.
        top1: accuracy on the held-out split after the last whole epoch; None before.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    top1: float | None = None


@dataclass(frozen=True)
class EpochResult:
    """One epoch.

    Attributes:
        epoch: counted from 1.
        loss: mean training loss of its steps, penalties included.
        holdout: accuracy on the held-out split after it.
        lr: the last learning rate.
        seconds: how long it took, the held-out split included.
        warnings: what looks like a divergence, each said once in a training.
    """

    epoch: int
    loss: float
    holdout: Accuracy
    lr: float
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a training; `train.finetune` says what each is.

    Raises:
        InputError: if one is out of range.
    """

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    seed: int
    bf16: bool
    no_decay: frozenset[str]
    frozen_norms: bool
    optimizer: str
    label_smoothing: float
    ema: float
    warmup_epochs: float | None
    gradient_clipping: float
    parameters: frozenset[str] | None
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"the number of epochs is {self.epochs}, but must be 0 or more")
        require(math.isfinite(self.lr) and self.lr > 0, f"the learning rate is {self.lr:g}, but must be above 0")
        require(0 <= self.momentum < 1, f"the momentum is {self.momentum:g}, but must be at least 0 and below 1")
        require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            f"the weight decay is {self.weight_decay:g}, but must be 0 or more",
        )
        require(self.batch_size >= 2, f"the batch size is {self.batch_size}, but batch norm needs 2 or more")
        require(
            self.optimizer in OPTIMIZERS, f"unknown optimizer '{self.optimizer}'; there are {', '.join(OPTIMIZERS)}"
        )
        require(
            0 <= self.label_smoothing < 1,
            f"the label smoothing is {self.label_smoothing:g}, but must be at least 0 and below 1",
        )
        require(0 <= self.ema < 1, f"the ema is {self.ema:g}, but the decay of an average is at least 0 and below 1")
        warmup = self.warmup_epochs
        require(
            warmup is None or 0 <= warmup <= self.epochs,
            f"the warmup epochs are {warmup}, but must be at least 0 and at most the {self.epochs} epochs there are",
        )
        require(
            math.isfinite(self.gradient_clipping) and self.gradient_clipping >= 0,
            f"the gradient clipping is {self.gradient_clipping:g}, but must be 0 (none) or more",
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return the numbers as JSON values: a checkpoint is of use only to a training that has the same."""
        return {
            name: sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What is done in each step beside training, and who is told."""

    loss: Loss | None = None
    penalty: Callable[[], Tensor] | None = None
    after_backward: Callable[[], None] | None = None
    after_step: Callable[[], None] | None = None
    on_progress: Callable[[Progress], None] | None = None
    after_epoch: Callable[[EpochResult], None] | None = None
    on_resume: Callable[[int, int], None] | None = None


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a training in this precision computes in bfloat16; ``auto`` does where it pays.

    Raises:
        InputError: if there is no such precision.
    """
    require(precision in PRECISIONS, f"unknown precision '{precision}'; there are {', '.join(PRECISIONS)}")
    return _has_fast_bf16(device) if precision == "auto" else precision == "bf16"


def _has_fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 pays: on GPUs that have it and on CPUs with AMX.

    With AVX512-BF16 alone it does not: ``tools/bench_training.py`` measures it.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16", False))


def names(given: Collection[str] | None) -> frozenset[str] | None:
    """Return names as a set; None stays None."""
    return None if given is None else frozenset(given)
