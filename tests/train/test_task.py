"""What a method that trains is given."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_training import few_digits, small

from prune2deploy.train import EpochResult, Task


def test_moved_images_are_the_same_images_with_their_labels() -> None:
    few = replace(few_digits(), flip=False, pad=1)
    task = Task(few, few.mean, few.std)
    plain, moved = (next(iter(batches)) for batches in (task.images(16), task.moved_images(16)))
    assert torch.equal(plain[1], moved[1])
    shifted = [torch.roll(plain[0], (down, right), (2, 3)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    inner = (..., slice(1, -1), slice(1, -1))
    found = torch.stack([(each[inner] == moved[0][inner]).flatten(1).all(1) for each in shifted])
    assert found.any(0).all()
    assert not found[4].all()
    again = next(iter(task.moved_images(16)))
    assert torch.equal(moved[0], again[0])


def test_every_epoch_of_every_training_is_told_after_what_the_method_does_then() -> None:
    few, said = few_digits(), []

    def tell(who: str) -> Any:
        return lambda result: said.append((who, result.epoch))

    task = Task(few, few.mean, few.std, settings={"precision": "fp32", "lr": 0.2}, on_epoch=tell("log"))
    found: list[EpochResult] = task.train(small(), epochs=2, after_epoch=tell("method"))
    found += task.train(small(), epochs=1, lr=0.1)
    assert said == [("method", 1), ("log", 1), ("method", 2), ("log", 2), ("log", 1)]
    assert task.history == found
    assert [each.lr for each in found] == pytest.approx([0.1, 0.2, 0.05])  # of one step an epoch, the first warms up
