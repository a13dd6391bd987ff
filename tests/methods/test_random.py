"""The random control."""

import numpy as np
from toy_groups import residual_groups

from prune2deploy.groups import Groups
from prune2deploy.methods.random import Random


def test_random_scores_depend_on_seed_and_group_only() -> None:
    groups = residual_groups()
    scores = Random().scores({}, groups)
    fewer = Groups(groups.groups[1:2], groups.layers, groups.cost)
    assert np.array_equal(Random().scores({}, fewer)["conv1"], scores["conv1"])
    assert not np.array_equal(Random(seed=1).scores({}, groups)["conv1"], scores["conv1"])
    assert not np.array_equal(scores["conv1"][:6], scores["stem"])
    # Kept across versions: a control that changes is no control.
    np.testing.assert_allclose(
        scores["stem"][:3], [0.1748436274723103, 0.4373598855310715, 0.22194506969470695], rtol=1e-12
    )
