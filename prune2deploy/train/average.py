"""An exponential moving average of a network's weights, which often classifies better than the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of parameters and floating-point buffers over the steps of a training.

    After step t the average moves by ``1 - min(decay, (1 + t) / (10 + t))`` of the way to the weights, so that the
    first weights are soon forgotten. It is linear in the weights, element by element: what is zero or a copy of another
    channel in all of them is so in the average, bit for bit, so masks and merges hold without a further step.

    Args:
        module: whose state is averaged; it must already be where it trains.
        decay: in [0, 1); 0 is no average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._live = {name: each for name, each in module.state_dict().items() if each.is_floating_point()}
        self._mean = {name: each.detach().clone() for name, each in self._live.items()}
        self._decay = decay
        self.steps = 0

    def update(self) -> None:
        """Take the weights after a step in."""
        self.steps += 1
        weight = 1 - min(self._decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self._mean.values()), [each.detach() for each in self._live.values()], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the network while the block runs, then the weights back as they were."""
        kept = {name: each.detach().clone() for name, each in self._live.items()}
        self.apply()
        try:
            yield
        finally:
            _copy(self._live, kept)

    def apply(self) -> None:
        """Put the average into the network."""
        _copy(self._live, self._mean)

    def state(self) -> dict[str, Tensor]:
        """Return the average by name of parameter or buffer."""
        return self._mean

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Go on from an earlier average."""
        _copy(self._mean, state)
        self.steps = steps


def _copy(to: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in to.items():
            tensor.copy_(source[name])
