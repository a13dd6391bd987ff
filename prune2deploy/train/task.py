"""What a method that trains is given: the data and the shared trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from prune2deploy.data import Batches, Data, Split
from prune2deploy.train.accuracy import Accuracy, evaluate, recalibrate
from prune2deploy.train.loop import finetune
from prune2deploy.train.settings import EpochResult, Progress

BATCH = 64
"""Images at a time where nothing is trained."""


@dataclass(frozen=True, eq=False)
class Task:
    """Data and settings, and what methods do with them; the same for all methods.

    Attributes:
        data: images in three splits; the test split is not for methods.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        seed: of everything random.
        device: where the network is and trains.
        settings: arguments of `train.finetune` that hold where a method gives none, such as ``precision``.
        history: what every epoch of every training gave; grows.
        on_progress: called after each step.
        on_epoch: called after each epoch of every training, after what a method does then.
        note: told what happens now.
        checkpoint: a folder that keeps where trainings stand that can go on (those with ``on_resume``).
        fingerprint: what they are beside their settings.
    """

    data: Data
    mean: Sequence[float]
    std: Sequence[float]
    seed: int = 0
    device: str = "cpu"
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[EpochResult] = field(default_factory=list)
    on_progress: Callable[[Progress], None] | None = None
    on_epoch: Callable[[EpochResult], None] | None = None
    note: Callable[[str], None] = lambda _: None
    checkpoint: Path | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def train(self, module: nn.Module, **how: Any) -> list[EpochResult]:
        """Train a network in place; ``how`` are arguments of `train.finetune`.

        Raises:
            InputError: if one is out of range, or the loss stops being a number.
        """
        common: dict[str, Any] = {"mean": self.mean, "std": self.std, "seed": self.seed, "device": self.device}
        given = common | {"on_progress": self.on_progress} | self.settings | how
        after_epoch = given.pop("after_epoch", None)
        if self.checkpoint is not None and "on_resume" in how:
            given = {"checkpoint": self.checkpoint, "fingerprint": self.fingerprint} | given

        def note_epoch(result: EpochResult) -> None:
            if after_epoch is not None:
                after_epoch(result)
            if self.on_epoch is not None:
                self.on_epoch(result)

        found = finetune(module, self.data, after_epoch=note_epoch, **given)
        self.history.extend(found)
        return found

    def images(self, count: int | None = None, *, batch_size: int = BATCH) -> Batches:
        """Return training images with labels, neither shifted nor mirrored; all of them unless told."""
        return self._batches(self.data.train, count, batch_size, rest=False)

    def moved_images(self, count: int | None = None, *, batch_size: int = BATCH) -> Batches:
        """Return the images of `images`, moved as in training."""
        return replace(self.images(count, batch_size=batch_size), flip=self.data.flip, pad=self.data.pad)

    def holdout(self, count: int | None = None, *, batch_size: int = BATCH) -> Batches:
        """Return held-out images with labels; all of them unless told."""
        return self._batches(self.data.holdout, count, batch_size, rest=True)

    def recalibrate(self, module: nn.Module, *, images: int = 2048) -> int:
        """Measure every BatchNorm's statistics anew, in place, on images that are moved as in training."""
        return recalibrate(
            module,
            self.data.train,
            self.mean,
            self.std,
            images=images,
            seed=self.seed,
            device=self.device,
            flip=self.data.flip,
            pad=self.data.pad,
        )

    def accuracy(self, module: nn.Module) -> Accuracy:
        """Return the accuracy on the held-out split."""
        return evaluate(module, self.data.holdout, self.mean, self.std, device=self.device)

    def _batches(self, split: Split, count: int | None, batch_size: int, *, rest: bool) -> Batches:
        return Batches(
            split,
            self.mean,
            self.std,
            batch_size=batch_size,
            images=count,
            seed=self.seed,
            device=self.device,
            rest=rest,
        )
