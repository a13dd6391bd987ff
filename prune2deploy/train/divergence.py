"""Early warning: a training that still gives numbers, but goes the wrong way."""

import math

RISE = 2.0
"""A loss that is so many times the best epoch's is a warning ..."""
FLOOR = 0.25
"""... unless it is below this share of what guessing costs: small losses double by chance."""


class Watch:
    """Looks at the epochs of one training; each kind of warning is given once.

    Two rules. *Rising*: an epoch's mean loss is above `RISE` times the best earlier epoch's, and above `FLOOR` times
    log(classes), which is what guessing costs. *Chance*: an epoch that began after the warm-up has a loss of
    log(classes) or more; this one looks at cross-entropy only, since other losses have other levels.

    Args:
        classes: number of classes.
        is_cross_entropy: whether the loss is plain cross-entropy, so that its level has a meaning.
        warm_up: epochs that the second rule leaves out: those in which the rate rises, and the first.
    """

    def __init__(self, classes: int, *, is_cross_entropy: bool, warm_up: int) -> None:
        self._chance = math.log(max(classes, 2))
        self._is_cross_entropy = is_cross_entropy
        self._warm_up = warm_up
        self._best = math.inf
        self._said: set[str] = set()

    def look(self, epoch: int, loss: float) -> tuple[str, ...]:
        """Return what is to be said after an epoch (counted from 1) with this mean loss, penalties left out."""
        found = {}
        if loss > RISE * self._best and loss > FLOOR * self._chance:
            found["rising"] = (
                f"training may be diverging: the loss rose to {loss:.3g} in epoch {epoch}, the best epoch had "
                f"{self._best:.3g}; a lower learning rate may help"
            )
        if self._is_cross_entropy and epoch > self._warm_up and loss >= self._chance:
            found["chance"] = (
                f"training may be diverging: after the warm-up, the loss of epoch {epoch} is {loss:.3g}, no better "
                f"than guessing ({self._chance:.3g}); a lower learning rate may help"
            )
        self._best = min(self._best, loss)
        new = [text for kind, text in found.items() if kind not in self._said]
        self._said |= found.keys()
        return tuple(new)
