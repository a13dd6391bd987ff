"""Random: the control that a method must beat."""

import hashlib
from dataclasses import dataclass
from typing import Annotated, ClassVar, final

import numpy as np

from prune2deploy.groups import Groups
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, Range, Weights


@final
@dataclass(frozen=True)
class Random(Method):
    """Score every channel with a number drawn uniformly from 0 to 1.

    The numbers depend on the seed and the group's id only, so they are the same whatever other groups there are.
    """

    needs: ClassVar[Needs] = Needs()

    seed: Annotated[int, Range(low=0)] = 0

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]."""
        return {group.id: _generator(self.seed, group.id).random(group.size) for group in groups.prunable}


def _generator(seed: int, group_id: str) -> np.random.Generator:
    digest = hashlib.sha256(group_id.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])
