"""How well a network classifies, and BatchNorm statistics measured anew."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.data import Batches, Split, normalise
from prune2deploy.errors import InputError
from prune2deploy.train.processes import Processes

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Accuracy:
    """How well a network classifies.

    Attributes:
        top1: share of the images whose class has the largest logit, in [0, 1].
        loss: mean cross-entropy, in nats.
        images: how many images it was measured on.
    """

    top1: float
    loss: float
    images: int


def evaluate(
    module: nn.Module,
    split: Split,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    processes: Processes | None = None,
) -> Accuracy:
    """Return the accuracy on a split, in eval mode and float32; the module is moved to ``device`` and keeps its modes.

    Args:
        module: maps images [B, C, H, W] to logits [B, classes].
        split: the images.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        batch_size: images at a time.
        device: where to run.
        limit: measure on this many images only, evenly spread over the split.
        processes: share the images between them; all must call it. By default each measures on all of them.

    Raises:
        InputError: if there are no images, or the module does not give logits for the split's classes.
    """
    require(batch_size >= 1, f"the batch size is {batch_size}, but must be 1 or more")
    require(limit is None or limit >= 1, f"the limit is {limit} images, but must be 1 or more")
    chosen = _spread(len(split), limit)
    place = torch.device(device)
    module.to(place)
    classes = int(split.labels[chosen].max()) + 1
    own = chosen if processes is None else chosen[processes.part(chosen)]
    labels = split.labels[own]
    correct, loss = 0.0, 0.0
    with eval_mode(module), torch.no_grad(), cudnn_flags(tf32=False):
        for indices, wanted in zip(torch.split(own, batch_size), torch.split(labels, batch_size), strict=True):
            if len(indices):  # more processes than images leave some without any
                images = normalise(split.images(indices).to(place), mean, std)
                logits = logits_of(module, images, classes)
                correct += float((logits.argmax(1).cpu() == wanted).sum())
                loss += float(F.cross_entropy(logits, wanted.to(place), reduction="sum"))
    if processes is not None:
        correct, loss = processes.total([correct, loss])
    return Accuracy(top1=correct / len(chosen), loss=loss / len(chosen), images=len(chosen))


def recalibrate(
    module: nn.Module,
    split: Split,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    images: int = 2048,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
    flip: bool = False,
    pad: int = 0,
) -> int:
    """Measure every BatchNorm's running mean and variance anew, and return how many norms there were.

    The statistics are plain averages over the batches, all of one size; everything else stays in eval mode (dropout
    off), and no weight changes. The accuracy of a freshly pruned network says little before it (Li et al., EagleEye,
    ECCV 2020).

    The images should be moved as those that the network was trained on: the black borders that shifts bring in are
    part of what its norms saw. (A ResNet-20 of CIFAR-10 that was trained with shifts of 4 pixels fell from 91.1 % to
    88.1 % of 2,000 test images when its norms were measured on images that are not moved, and kept 91.3 % on moved
    ones.)

    Args:
        module: its norms are changed in place; it is moved to ``device`` and keeps its modes.
        split: images to measure on, best the training images.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        images: how many to use, at random.
        batch_size: images at a time.
        seed: chooses the images, and how they are moved.
        device: where to run.
        flip: whether images are mirrored at random.
        pad: by how many pixels images are shifted at random.

    Raises:
        InputError: if there are fewer than two images.
    """
    size = min(batch_size, images, len(split))
    require(size >= 2, f"recalibration needs batches of 2 images or more, not {size}; give more images")
    module.to(device)
    return measure_norms(module, Batches(split, mean, std, size, images, seed, device, flip, pad))


def measure_norms(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Measure every BatchNorm's running statistics anew on batches of one size; return how many norms there were.

    As `recalibrate`, of whose batches the labels are not looked at either.
    """
    norms = [part for part in module.modules() if isinstance(part, BATCH_NORMS) and part.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with eval_mode(module), torch.no_grad(), cudnn_flags(tf32=False):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for taken, _ in batches if norms else ():
            module(taken)
    for norm, before in zip(norms, momenta, strict=True):
        norm.momentum = before
    return len(norms)


def measure(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Return the accuracy on batches of normalised images [B, C, H, W] and labels [B], in eval mode and float32.

    Raises:
        InputError: if there are no batches, or the module does not give logits for their classes.
    """
    correct, loss, seen = 0, 0.0, 0
    with eval_mode(module), torch.no_grad(), cudnn_flags(tf32=False):
        for images, labels in batches:
            logits = logits_of(module, images, int(labels.max()) + 1)
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            seen += len(labels)
    require(seen > 0, "there are no images to measure the accuracy on")
    return Accuracy(top1=correct / seen, loss=loss / seen, images=seen)


def logits_of(module: nn.Module, images: Tensor, classes: int) -> Tensor:
    """Return the logits of a batch in float32, [B, classes or more].

    Raises:
        InputError: if the module returns something else, or logits of fewer classes.
    """
    logits = module(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the network returns {shape}, but logits [batch, classes] are wanted; wrap it in a function")
    require(
        logits.shape[1] >= classes,
        f"the network has {logits.shape[1]} classes, but the data has {classes}; build it with as many",
    )
    return logits.float()


def require(holds: bool, message: str) -> None:
    """Refuse the user's input with ``message`` where a condition does not hold."""
    if not holds:
        raise InputError(message)


def _spread(count: int, limit: int | None) -> Tensor:
    """Return ``limit`` of ``count`` indices, evenly spread: splits may be sorted by class."""
    require(count > 0, "the split has no images")
    chosen = count if limit is None else min(limit, count)
    return torch.arange(chosen) * count // chosen


def cudnn_flags(*, tf32: bool) -> AbstractContextManager[None]:
    """Return a context in which cuDNN gives the same result every time, and rounds to TF32 only if asked to."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and every part back in its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        module.eval()
        for part in training:
            part.training = True
