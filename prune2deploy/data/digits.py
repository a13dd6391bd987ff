"""The 8x8 handwritten digits that come with scikit-learn (Alpaydin, Kaynak, UCI 1998): no download."""

import numpy as np
import torch

from prune2deploy.data.base import Data, TensorSplit, split_off
from prune2deploy.errors import InputError

_TRAIN = 1200
"""Images to train and hold out; the other 597 of the 1,797 test."""


def load(name: str, *, seed: int, holdout: float) -> Data:
    """Return the digits, split into 1,200 and 597 once and for all; pixels 0..16 become 0..255.

    Raises:
        InputError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn, which is not installed: pip install 'prune2deploy[torch]'"
        ) from error
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))  # RandomState: its stream is frozen
    pixels = torch.from_numpy(np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    known = pixels[:_TRAIN].double() / 255
    train, held_out = split_off(TensorSplit(pixels[:_TRAIN], labels[:_TRAIN]), holdout, seed)
    return Data(
        name=name,
        train=train,
        holdout=held_out,
        test=TensorSplit(pixels[_TRAIN:], labels[_TRAIN:]),
        num_classes=10,
        class_names=tuple(str(digit) for digit in digits.target_names),
        mean=(round(known.mean().item(), 4),),
        std=(round(known.std().item(), 4),),
        in_channels=1,
        image_size=8,
        flip=False,
        pad=1,
    )
