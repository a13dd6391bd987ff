"""Random inputs."""

import numpy as np
import pytest

from prune2deploy.backends.base import InputInfo
from prune2deploy.backends.feeds import random_feeds


def feed(dtype: type, shape: tuple[int | str, ...] = (1000,), seed: int = 0) -> np.ndarray:
    info = InputInfo("x", shape, np.dtype(dtype))
    return random_feeds([info], batch=None, shapes={}, rng=np.random.default_rng(seed))["x"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_real_inputs_are_standard_normal_in_their_type(dtype: type) -> None:
    values = feed(dtype)
    assert values.dtype == dtype
    assert abs(values.astype(float).mean()) < 0.15
    assert 0.9 < values.astype(float).std() < 1.1


@pytest.mark.parametrize(("dtype", "low", "high"), [(np.uint8, 0, 255), (np.int8, -128, 127), (np.int64, 0, 1)])
def test_bytes_fill_their_range_and_indices_stay_small(dtype: type, low: int, high: int) -> None:
    values = feed(dtype, (20_000,))
    assert (values.dtype, values.min(), values.max()) == (dtype, low, high)


def test_booleans_take_both_values() -> None:
    assert set(feed(np.bool_).tolist()) == {False, True}


def test_the_seed_alone_decides() -> None:
    assert np.array_equal(feed(np.float32), feed(np.float32))
    assert not np.array_equal(feed(np.float32), feed(np.float32, seed=1))


def test_a_scalar_input_has_no_batch() -> None:
    assert feed(np.float32, ()).shape == ()
