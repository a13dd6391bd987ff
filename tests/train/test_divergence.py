"""The early warning: given when a loss goes the wrong way, and not when it does what losses do."""

import logging
import math

import pytest
from small_training import few_digits, small, train

from prune2deploy.train.divergence import Watch


def warnings(losses: list[float], *, classes: int = 10, plain: bool = True, warm_up: int = 1) -> list[int]:
    """Return the epochs with a warning, an epoch once for each."""
    watch = Watch(classes, is_cross_entropy=plain, warm_up=warm_up)
    return [epoch for epoch, loss in enumerate(losses, 1) for _ in watch.look(epoch, loss)]


QUIET = {
    "falls": [2.0, 1.0, 0.5, 0.4],
    "wobbles": [2.0, 1.0, 1.9, 0.9],
    "small losses double by chance": [2.0, 0.5, 0.01, 0.03, 0.5],
    "starts at chance and warms up": [math.log(10), 1.5, 1.0],
    "one epoch": [2.2],
}
LOUD = {
    "rises to more than twice the best": ([1.0, 0.6, 1.25, 1.0], [3]),
    "is said once": ([1.0, 0.6, 1.3, 1.5, 0.5, 1.6], [3]),
    "guesses behind the warm-up": ([2.5, 2.4, 2.35], [2]),
    "rises to chance": ([1.0, 0.5, 2.4], [3, 3]),
}


@pytest.mark.parametrize("losses", QUIET.values(), ids=QUIET)
def test_a_loss_that_does_what_losses_do_is_no_warning(losses: list[float]) -> None:
    assert warnings(losses) == []


@pytest.mark.parametrize(("losses", "expected"), LOUD.values(), ids=LOUD)
def test_a_loss_that_goes_the_wrong_way_is_a_warning(losses: list[float], expected: list[int]) -> None:
    assert warnings(losses) == expected


def test_chance_depends_on_the_classes_and_only_plain_cross_entropy_has_it() -> None:
    assert warnings([4.0, 3.9], classes=100) == []
    assert warnings([4.0, 3.9], classes=10) == [2]
    assert warnings([4.0, 3.9], classes=10, plain=False) == []
    assert warnings([4.0, 3.9, 9.0], classes=10, plain=False) == [3]


def test_a_rate_that_is_too_high_is_warned_of_and_a_fitting_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    few = few_digits()
    with caplog.at_level(logging.WARNING, "prune2deploy"):
        assert not any(each.warnings for each in train(small(), few, epochs=6, lr=0.05))
        assert caplog.messages == []
        results = train(small(norm=False), few, epochs=6, lr=2.0, weight_decay=0.0)
    said = [text for each in results for text in each.warnings]
    assert said
    assert caplog.messages == said
    assert all("may be diverging" in text and "lower learning rate" in text for text in said)


def test_a_penalty_that_grows_is_no_warning() -> None:
    module, step = small(), [0.0]

    def penalty() -> object:
        step[0] += 1.0
        return module[0].weight.sum() * 0 + step[0]

    results = train(module, few_digits(), epochs=4, penalty=penalty)
    assert results[-1].loss > 3 * results[0].loss
    assert not any(each.warnings for each in results)
