"""Targets are met from below and met well; tensor widths land on multiples; masks keep the best."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_groups import conv_layer, member, of, residual_groups, span

from prune2deploy.budget import (
    Ranking,
    Target,
    choose_masks,
    choose_widths,
    masks_to_budget,
    protect,
    resolve_floors,
    share,
    threshold_to_budget,
)
from prune2deploy.cost import Cost, Term, Width
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
from prune2deploy.masks import widths as widths_of
from prune2deploy.rounding import MULTIPLES, multiple_of


def network(sizes: Mapping[str, int], tensors: list[Width], held: frozenset[str] = frozenset()) -> Groups:
    """Return a chain of layers with these output widths, each reading the one before it."""
    inputs = [Width(3), *tensors]
    terms = tuple(Term(f"layer{i}", 9 + i, (out, inputs[i])) for i, out in enumerate(tensors))
    return Groups(
        groups=tuple(Group(name, size, (), (), "held" if name in held else None) for name, size in sizes.items()),
        layers=tuple(conv_layer(f"layer{i}", out, inputs[i]) for i, out in enumerate(tensors)),
        cost=Cost(terms, tuple(Term(f"layer{i}", 1, (out, inputs[i])) for i, out in enumerate(tensors))),
    )


def chain(**sizes: int) -> Groups:
    return network(sizes, [of(**{name: 1}) for name in sizes])


@st.composite
def networks(draw: st.DrawFn) -> Groups:
    names = [f"g{i}" for i in range(draw(st.integers(1, 5)))]
    sizes = {name: draw(st.integers(1, 40)) for name in names}
    tensors = [of(**{name: draw(st.sampled_from([1, 1, 1, 2, 4]))}) for name in names if draw(st.integers(0, 3))]
    for _ in range(draw(st.integers(0, 3))):
        chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        factors = tuple((name, draw(st.sampled_from([1, 1, 2, 3]))) for name in chosen)
        tensors.append(Width(draw(st.sampled_from([0, 0, 0, 3, 8])), factors))
    held = frozenset(draw(st.lists(st.sampled_from(names), max_size=1)))
    return network(sizes, draw(st.permutations(tensors)), held)


def aligned(groups: Groups, widths: Mapping[str, int], round_to: int) -> bool:
    """Whether every tensor that a prunable group is part of is a multiple, or full."""
    for layer in groups.layers:
        parts = [name for name, _ in layer.out_width.terms if groups[name].prunable]
        full = all(widths[name] == groups[name].size for name in parts)
        if parts and not full and layer.out_width.at(widths) % round_to:
            return False
    return True


def met(groups: Groups, widths: Mapping[str, int], target: Target) -> bool:
    return share(groups, target.kind, widths) <= target.share


def further_steps(groups: Groups, widths: Mapping[str, int], target: Target, round_to: int) -> list[tuple[str, int]]:
    """Return every wider width of one group that fits the rounding and the target."""
    return [
        (group.id, wider)
        for group in groups.prunable
        for wider in range(widths[group.id] + 1, group.size + 1)
        if aligned(groups, raised := {**widths, group.id: wider}, round_to) and met(groups, raised, target)
    ]


@settings(max_examples=400, deadline=None)
@given(
    groups=networks(),
    share_kept=st.floats(0.02, 0.98),
    kind=st.sampled_from(["macs", "params"]),
    round_to=st.sampled_from([1, 1, 2, 4, 8, 12]),
    ranking=st.sampled_from(["uniform", "global"]),
    seed=st.integers(0, 99),
)
def test_a_target_is_met_from_below_on_multiples_and_no_group_can_take_one_more_step(
    groups: Groups, share_kept: float, kind: str, round_to: int, ranking: Ranking, seed: int
) -> None:
    target = Target(kind, share_kept)
    generator = np.random.default_rng(seed)
    scores = {group.id: np.round(generator.random(group.size), 1) for group in groups.groups}
    try:
        masks = masks_to_budget(scores, groups, target, ranking=ranking, round_to=round_to)
    except InputError:  # unreachable; the next test says when that may be
        return
    widths = widths_of(masks)
    assert met(groups, widths, target)
    assert aligned(groups, widths, round_to)
    assert all(1 <= widths[group.id] <= group.size for group in groups.groups)
    assert all(widths[group.id] == group.size for group in groups.groups if not group.prunable)
    assert further_steps(groups, widths, target, round_to) == []


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    share_kept=st.floats(0.02, 0.98),
    round_to=st.sampled_from([1, 3, 8]),
)
def test_a_target_is_refused_only_when_the_narrowest_network_misses_it(
    sizes: list[int], share_kept: float, round_to: int
) -> None:
    groups = chain(**{f"g{i}": size for i, size in enumerate(sizes)})
    narrowest = {group.id: min(group.size, round_to) for group in groups.groups}
    target = Target("macs", share_kept)
    if met(groups, narrowest, target):
        assert met(groups, choose_widths(groups, target, round_to=round_to), target)
    else:
        with pytest.raises(InputError) as error:
            choose_widths(groups, target, round_to=round_to)
        stated = float(str(error.value).partition("macs=")[2].partition("macs=")[2].partition(":")[0])
        assert stated == pytest.approx(math.ceil(share(groups, "macs", narrowest) * 1e4) / 1e4)


def test_uniform_widths_are_one_share_of_every_group() -> None:
    groups = chain(a=100, b=200, c=400)
    widths = choose_widths(groups, Target("params", 0.25))
    shares = [widths[group.id] / group.size for group in groups.groups]
    assert max(shares) - min(shares) <= 0.02
    assert 0.245 < share(groups, "params", widths) <= 0.25


def test_widths_go_to_the_nearest_multiple_not_to_the_one_below() -> None:
    # 70 % of 20 is 14, which is nearer to 16 than to 8.
    groups = chain(a=20, b=100)
    widths = choose_widths(groups, Target("params", 0.55), round_to=8)
    assert widths["a"] == 16
    assert widths["b"] % 8 == 0


def test_a_tensor_narrower_than_a_multiple_stays_full_and_none_falls_below_one_multiple() -> None:
    groups = chain(a=4, b=64, c=64)
    widths = choose_widths(groups, Target("macs", 0.06), round_to=8)
    assert widths["a"] == 4
    assert min(widths["b"], widths["c"]) >= 8


def test_a_tensor_may_stay_at_a_full_width_that_is_no_multiple() -> None:
    groups = chain(a=12, b=256, c=256)
    assert choose_widths(groups, Target("macs", 0.95), round_to=8)["a"] == 12
    narrowest = {"a": 8, "b": 8, "c": 8}
    assert choose_widths(groups, Target("macs", share(groups, "macs", narrowest)), round_to=8) == narrowest


def test_rounding_holds_for_sums_of_groups_as_wholes() -> None:
    # Three residual stages with padded shortcuts: the later tensors hold the channels of the earlier ones too.
    groups = network({"a": 12, "b": 12, "c": 24}, [of(a=1), of(a=1, b=1), of(a=1, b=1, c=1)])
    for share_kept in (0.4, 0.5, 0.7, 0.9):
        widths = choose_widths(groups, Target("macs", share_kept), round_to=8)
        assert aligned(groups, widths, 8)
        assert 0 < share(groups, "macs", widths) <= share_kept


def test_groups_that_are_full_between_multiples_take_their_neighbours_along() -> None:
    # Full a (12) takes a + b off the multiples unless b is full, and full b (12) takes b + c unless c is full.
    groups = network({"a": 12, "b": 12, "c": 20}, [of(a=1), of(a=1, b=1), of(b=1, c=1)])
    nearly = Target("macs", share(groups, "macs", {"a": 12, "b": 12, "c": 16}))
    assert choose_widths(groups, nearly, round_to=8) == {"a": 8, "b": 8, "c": 16}
    assert choose_widths(groups, Target("macs", 0.9999), round_to=8) == {"a": 8, "b": 8, "c": 16}


def test_a_group_that_cannot_be_aligned_is_kept_full() -> None:
    # b + 3 is a multiple of 8 where b is none, so no width of b but the full one does for both tensors.
    groups = network({"a": 64, "b": 32}, [of(a=1), of(b=1), Width(3, (("b", 1),))])
    widths = choose_widths(groups, Target("macs", 0.5), round_to=8)
    assert widths["b"] == 32
    assert widths["a"] % 8 == 0


def test_a_channel_that_spans_several_places_counts_so_often() -> None:
    groups = network({"a": 32, "b": 64}, [of(a=4), of(b=1)])
    widths = choose_widths(groups, Target("macs", 0.3), round_to=8)
    assert widths["a"] % 2 == 0
    assert widths["b"] % 8 == 0


def test_floors_and_min_keep_hold() -> None:
    groups = chain(a=32, b=32, c=32)
    widths = choose_widths(groups, Target("macs", 0.1), floors={"b": 20}, min_keep=3)
    assert widths["b"] >= 20
    assert min(widths.values()) >= 3
    assert further_steps(groups, widths, Target("macs", 0.1), 1) == []


def test_floors_are_counts_or_shares_of_what_a_pattern_matches() -> None:
    groups = residual_groups(trunk=6, inner=8)
    assert resolve_floors(groups, {"conv1": 3}) == {"conv1": 3}
    assert resolve_floors(groups, {"*": 0.5}) == {"stem": 3, "conv1": 4}, "fc cannot be pruned, so it needs no floor"
    assert resolve_floors(groups, {"bn2.*": 0.4}) == {"stem": 3}, "bn2 carries the stem's channels; 2.4 become 3"
    assert resolve_floors(groups, {"conv2.weight": 2}) == {"stem": 2}, "and conv2, that makes them, only reads conv1's"
    assert resolve_floors(groups, {"*": 4, "conv?": 7}) == {"stem": 4, "conv1": 7}, "of several the largest holds"
    assert resolve_floors(groups, {"stem": 1.0}) == {"stem": 6}


def test_an_id_that_is_a_pattern_as_well_is_the_id() -> None:
    groups = chain(a=4, b=8)
    assert resolve_floors(groups, {"a": 3}) == {"a": 3}
    starred = Groups((Group("g*", 8, (), ()), Group("g2", 8, (), ())), (), Cost((), ()))
    assert resolve_floors(starred, {"g*": 5}) == {"g*": 5}


def test_floors_that_fit_nothing_are_named() -> None:
    groups = residual_groups(trunk=6, inner=8)
    with pytest.raises(InputError, match=r"the floor 'conv7' matches no group .* close names are conv1"):
        resolve_floors(groups, {"conv7": 3})
    with pytest.raises(InputError, match=r"the floor '\*' is 7, but group 'stem' has 6 channels"):
        resolve_floors(groups, {"*": 7})
    for floor in (0, -1, 9):
        with pytest.raises(InputError, match=r"give a number from 1 to 8, or a share such as 0\.5"):
            resolve_floors(groups, {"conv1": floor})


def test_floors_that_the_target_cannot_pay_are_said_to_be_the_reason() -> None:
    groups = chain(a=32, b=32, c=32)
    floors = resolve_floors(groups, {"*": 0.75})
    with pytest.raises(InputError, match=r"the smallest reachable with these floors is .*: lower a floor, or raise"):
        choose_widths(groups, Target("macs", 0.3), floors=floors)
    with pytest.raises(
        InputError, match=r"with --round-to 16 and these floors .*: lower --round-to, lower a floor, or"
    ):
        choose_widths(groups, Target("macs", 0.3), floors=floors, round_to=16)
    with pytest.raises(InputError, match=r"smallest reachable is macs=[0-9.]+: drop a --keep, or raise the target"):
        choose_widths(protect(residual_groups(), ["bn.*"]), Target("macs", 0.01))
    with pytest.raises(InputError, match=r"smallest reachable is macs=[0-9.]+: raise the target"):
        choose_widths(chain(a=2, b=2), Target("macs", 0.1))


def test_a_floor_between_two_multiples_is_met_by_the_one_above() -> None:
    groups = chain(a=64, b=64, c=64)
    assert choose_widths(groups, Target("macs", 0.3), round_to=8, floors={"b": 41})["b"] == 48


def test_a_precision_stands_for_its_multiple() -> None:
    assert {name: multiple_of(name) for name in MULTIPLES} == {"fp32": 4, "tf32": 4, "fp16": 8, "bf16": 8, "int8": 16}
    assert multiple_of(24) == 24
    for wrong in (0, -8, "8", "fp8", "", True, 8.0):
        with pytest.raises(InputError, match=r"is neither a whole number from 1 nor a precision; .* fp16 \(8\)"):
            multiple_of(wrong)  # type: ignore[arg-type]


def test_bad_arguments_say_what_is_wrong() -> None:
    groups, target = chain(a=32, b=32), Target("macs", 0.5)
    with pytest.raises(InputError, match="no group 'aa' to set a floor for; groups with close names are a"):
        choose_widths(groups, target, floors={"aa": 3})
    with pytest.raises(InputError, match="floor 33 of group 'a'"):
        choose_widths(groups, target, floors={"a": 33})
    with pytest.raises(InputError, match="--round-to is 0"):
        choose_widths(groups, target, round_to=0)
    with pytest.raises(InputError, match="min_keep is 0"):
        choose_widths(groups, target, min_keep=0)


def test_an_unreachable_target_names_the_smallest_reachable_one() -> None:
    groups = chain(a=32, b=32)
    with pytest.raises(
        InputError, match=r"macs=0\.01 cannot be met; the smallest reachable with --round-to 8 is macs=0\."
    ) as e:
        choose_widths(groups, Target("macs", 0.01), round_to=8)
    reachable = Target.parse(str(e.value).partition("is ")[2].partition(":")[0])
    assert choose_widths(groups, reachable, round_to=8) == {"a": 8, "b": 8}
    kept = Groups((Group("a", 4, (member("x", "filter", span(0, 4)),), ()),), (), Cost((), ()))
    with pytest.raises(InputError, match=r"no group of the network can be pruned \(a: kept by --keep 'x'"):
        choose_widths(protect(kept, ["x"]), Target("macs", 0.5))


@pytest.mark.parametrize(("text", "kind", "value"), [("macs=0.5", "macs", 0.5), (" params = 0.25 ", "params", 0.25)])
def test_targets_are_read(text: str, kind: str, value: float) -> None:
    assert Target.parse(text) == Target(kind, value)
    assert Target.parse(str(Target.parse(text))) == Target.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs", "write it as macs=0.5"),
        ("macs=half", "write it as macs=0.5"),
        ("macs=", "write it as macs=0.5"),
        ("flops=0.5", "target 'flops' is not known; give macs=SHARE or params=SHARE"),
        ("macs=0", "must be above 0 and below 1"),
        ("macs=1", "must be above 0 and below 1"),
        ("macs=-0.5", "must be above 0 and below 1"),
        ("macs=nan", "must be above 0 and below 1"),
        ("params=50", "must be above 0 and below 1"),
        ("latency=3.2ms", "latency targets are not in this version"),
        ("latency=0.5", "latency targets are not in this version"),
    ],
)
def test_bad_targets_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Target.parse(text)


def test_masks_keep_the_best_and_of_equals_the_first() -> None:
    scores = {"a": np.array([1.0, 3.0, 2.0, 3.0]), "b": np.zeros(4)}
    masks = choose_masks(scores, {"a": 2, "b": 3})
    assert masks["a"].tolist() == [False, True, False, True]
    assert masks["b"].tolist() == [True, True, True, False]


def test_scores_that_are_not_numbers_or_of_another_length_are_refused() -> None:
    groups, target = chain(a=4, b=4), Target("macs", 0.5)
    with pytest.raises(InputError, match="group 'a' has scores that are not numbers"):
        masks_to_budget({"a": np.array([1, np.nan, 1, 1]), "b": np.ones(4)}, groups, target)
    with pytest.raises(InputError, match="group 'a' has 4 channels but scores of shape"):
        masks_to_budget({"a": np.ones(3), "b": np.ones(4)}, groups, target, ranking="global")


def test_a_global_ranking_takes_from_the_group_with_the_lower_scores() -> None:
    groups = chain(a=32, b=32, c=32)
    scores = {"a": np.linspace(2, 3, 32), "b": np.linspace(0, 1, 32), "c": np.linspace(2, 3, 32)}
    widths = threshold_to_budget(scores, groups, Target("params", 0.5))
    assert widths["a"] == widths["c"] == 32
    assert widths["b"] < 32
    # Best first: raising a score never narrows its group.
    assert threshold_to_budget({**scores, "b": scores["b"] + 2}, groups, Target("params", 0.5))["b"] >= widths["b"]


def test_groups_without_scores_are_kept_whole_and_the_others_meet_the_target() -> None:
    groups, target = chain(a=16, b=16, c=16), Target("macs", 0.5)
    masks = masks_to_budget({"a": np.arange(16.0), "c": np.arange(16.0)}, groups, target)
    assert masks["b"].all()
    assert met(groups, widths_of(masks), target)


def test_a_pattern_protects_what_its_parameters_make_but_not_what_they_read() -> None:
    groups = protect(residual_groups(), ["bn1.*"])
    assert groups["conv1"].kept_because == "kept by --keep 'bn1.*'"
    assert groups["stem"].prunable
    assert groups["fc"].kept_because == "an output of the network"
    made = protect(residual_groups(), ["conv2.weight"])
    assert [group.id for group in made.prunable] == ["conv1"], "conv2 reads conv1's channels and makes the stem's"
    widths = choose_widths(groups, Target("macs", 0.7))
    assert widths["conv1"] == 8


def test_a_pattern_that_matches_nothing_names_close_parameters() -> None:
    with pytest.raises(InputError, match=r"--keep 'conv1.wieght' matches no parameter; .* conv1.weight"):
        protect(residual_groups(), ["conv1.wieght"])
    with pytest.raises(InputError, match=r"'features\.\*' matches no parameter; parameters with close names are \w+"):
        protect(residual_groups(), ["features.*"])
