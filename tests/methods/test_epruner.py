"""EPruner: exemplars by affinity propagation, the search for a budget, and norms that start anew."""

import sys

import numpy as np
import pytest
from toy_groups import Mobile, Residual, mobile_groups, randomise, residual_groups

from prune2deploy.apply import weights_of
from prune2deploy.budget import Budget, Target, share
from prune2deploy.errors import DeviceError
from prune2deploy.masks import widths
from prune2deploy.methods import epruner
from prune2deploy.methods.epruner import Clusters, EPruner, exemplars_of
from prune2deploy.methods.filters import squared_distances


def exemplars(filters: np.ndarray, preference: float) -> Clusters:
    return exemplars_of(squared_distances(filters), preference)


def planted(clusters: int = 12, members: int = 5, spread: float = 0.05, seed: int = 0) -> np.ndarray:
    """Return filters in well separated clusters, one after the other."""
    random = np.random.default_rng(seed)
    centres = 3 * random.standard_normal((clusters, 27))
    return np.repeat(centres, members, axis=0) + spread * random.standard_normal((clusters * members, 27))


def messages(filters: np.ndarray, preference: float, iterations: int = 400, damping: float = 0.5) -> list[int]:
    """Return the exemplars by the message equations, element by element (Frey, Dueck, Science 315, 2007, eq. 1 to 3).

    ``s(k, k) = b * median_i s(i, k)``, the median with the 0 of a filter's similarity to itself, as EPruner's code has.
    """
    count = len(filters)
    s = -((filters[:, None] - filters[None]) ** 2).sum(axis=2)
    s[np.arange(count), np.arange(count)] = preference * np.median(s, axis=0)
    r, a = np.zeros((count, count)), np.zeros((count, count))
    for _ in range(iterations):
        new = np.empty_like(r)
        for k in range(count):
            others = np.delete(a + s, k, axis=1)
            new[:, k] = s[:, k] - others.max(axis=1)
        r = damping * r + (1 - damping) * new
        positive = np.maximum(r, 0)
        new = np.empty_like(a)
        for k in range(count):
            column = positive[:, k].copy()
            column[k] = 0
            for i in range(count):
                new[i, k] = column.sum() if i == k else min(0.0, r[k, k] + column.sum() - column[i])
        a = damping * a + (1 - damping) * new
    return np.flatnonzero(np.diag(r) + np.diag(a) > 0).tolist()


@pytest.mark.parametrize("preference", [0.3, 0.5, 0.73, 1.0, 1.5])
def test_planted_clusters_have_one_exemplar_each(preference: float) -> None:
    found = exemplars(planted(), preference)
    assert found.converged
    assert sorted(exemplar // 5 for exemplar in found.exemplars.tolist()) == list(range(12))
    assert (found.of // 5 == np.arange(60) // 5).all()


@pytest.mark.parametrize("preference", [0.6, 0.76, 1.1])
def test_exemplars_are_those_of_the_message_equations(preference: float) -> None:
    random = np.random.default_rng(4)
    filters = random.standard_normal((24, 9)) * random.uniform(0.1, 2, (24, 1))
    assert exemplars(filters, preference).exemplars.tolist() == messages(filters, preference)


def test_exemplars_do_not_depend_on_scale_or_a_common_shift_and_move_with_their_filters() -> None:
    random = np.random.default_rng(8)
    filters = random.standard_normal((30, 18)) * random.uniform(0.1, 2, (30, 1))
    found = exemplars(filters, 0.76).exemplars.tolist()
    assert 1 < len(found) < 30
    assert exemplars(1000 * filters, 0.76).exemplars.tolist() == found
    assert exemplars(filters + random.standard_normal(18), 0.76).exemplars.tolist() == found
    order = random.permutation(30)
    assert sorted(order[exemplars(filters[order], 0.76).exemplars].tolist()) == found


def test_more_preference_gives_fewer_exemplars() -> None:
    random = np.random.default_rng(2)
    filters = random.standard_normal((40, 9)) * random.uniform(0.1, 2, (40, 1))
    counts = [len(exemplars(filters, preference).exemplars) for preference in (0.0, 0.5, 1.0, 4.0)]
    assert counts[0] == 40
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[1]


@pytest.mark.parametrize("filters", [np.ones((1, 9)), np.ones((6, 9)), np.zeros((3, 4))])
def test_filters_that_are_alike_or_alone_are_no_obstacle(filters: np.ndarray) -> None:
    found = exemplars(filters, 0.76)
    assert len(found.exemplars) >= 1
    assert np.isin(found.of, found.exemplars).all()


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.85, 0.6])
def test_all_exemplars_of_the_preference_found_are_kept_and_the_rest_fills_the_budget(target: float) -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    result = EPruner(scope="all").plan(weights, groups, Budget(Target("macs", target)))
    method = EPruner(scope="all")
    found = method._clusters(method._distances(weights, groups), result.report["preference"])
    for group, clusters in found.items():
        assert result.keep[group][clusters.exemplars].all()
        assert result.report["exemplars"][group] == len(clusters.exemplars)
    kept = widths(result.keep)
    assert share(groups, "macs", kept) <= target
    wider = [kept | {group: kept[group] + 1} for group in found if kept[group] < groups[group].size]
    assert all(share(groups, "macs", one) > target for one in wider)
    assert result.report["not_converged"] == []


def test_a_preference_that_is_given_is_the_one_that_is_used() -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    result = EPruner(scope="all", preference=1.5).plan(weights, groups, Budget(Target("macs", 0.6)))
    assert result.report["preference"] == 1.5
    assert share(groups, "macs", widths(result.keep)) <= 0.6


def test_what_fills_a_budget_is_what_its_exemplar_represents_worst() -> None:
    filters = planted(clusters=3, members=3, spread=0.01)
    filters[4] += 0.5
    found = exemplars(filters, 1.0)
    score = epruner._score(found)
    assert len(found.exemplars) == 3
    assert (score[found.exemplars] > 1).all()
    rest = np.setdiff1d(np.arange(9), found.exemplars)
    assert score[rest].max() < 1
    assert 4 not in found.exemplars
    assert rest[score[rest].argmax()] == 4


def test_the_output_of_a_stage_stays_whole_in_the_papers_scope() -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    result = EPruner().plan(weights, groups, Budget(Target("macs", 0.6)))
    assert result.keep["stem"].all()
    assert not result.keep["conv1"].all()
    assert result.report["not_scored"] == ["stem"]
    assert not EPruner(scope="all").plan(weights, groups, Budget(Target("macs", 0.4))).keep["stem"].all()


def test_a_depthwise_convolution_does_not_make_a_group_an_outer_one() -> None:
    weights = weights_of(randomise(Mobile()))
    assert EPruner().scores(weights, mobile_groups()).keys() == {"expand", "grouped"}


def test_norms_behind_pruned_layers_start_anew_and_no_others() -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    result = EPruner().plan(weights, groups, Budget(Target("macs", 0.6)))
    assert result.weights.keys() == {f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        assert result.weights[f"bn1.{name}"].tolist() == [value] * 8
        assert not (weights[f"bn1.{name}"] == value).any()
    assert EPruner().needs_finetuning
    kept = EPruner(norms="keep")
    assert kept.plan(weights, groups, Budget(Target("macs", 0.6))).weights == {}
    assert not kept.needs_finetuning


def test_filters_whose_messages_do_not_settle_all_stay_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, groups = weights_of(randomise(Residual())), residual_groups()
    monkeypatch.setattr(epruner, "_ATTEMPTS", ((2, 50), (3, 50)))
    assert not exemplars(planted(), 1.0).converged
    assert exemplars(planted(), 1.0).exemplars.tolist() == list(range(60))
    result = EPruner().plan(weights, groups, Budget(Target("macs", 0.6)))
    assert result.report["not_converged"] == ["conv1"]
    assert share(groups, "macs", widths(result.keep)) <= 0.6


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(DeviceError, match=r"scikit-learn is not installed.*prune2deploy\[torch\]"):
        exemplars(planted(), 1.0)
