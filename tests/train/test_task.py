"""What a method that trains is given."""

from typing import Any

import pytest
from small_training import few_digits, small

from prune2deploy.train import EpochResult, Task


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
