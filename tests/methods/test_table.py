"""What every method of the table must do."""

import copy
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toy_groups import TOYS, narrowed, permuted, randomise, residual_groups, with_merged_readers

import prune2deploy.methods
from prune2deploy.apply import apply_masks, fold_offsets, set_weights, weights_of
from prune2deploy.budget import Budget, Target, share
from prune2deploy.data import Data, TensorSplit
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.masks import widths
from prune2deploy.methods import METHODS, describe_options, load_method, method_class
from prune2deploy.methods.base import Context, Method
from prune2deploy.train import Task

BLIND_TO_WEIGHTS = {"random"}
OPTIONS: dict[str, dict[str, Any]] = {
    "adapruner": {"scope": "all", "epochs": 0, "seed": 1},
    "cpli": {"scope": "all"},
    "sp": {"epochs": 0},
    "csgd": {
        "strength": 3.0,
        "vector_strength": 1.0,
        "learning_rate": 0.1,
        "momentum": 0.5,
        "epochs": 90,
        "batch_size": 8,
    },
    "epruner": {"scope": "all", "preference": 1.5},
    "dagger": {"epochs": 3, "gate_learning_rate": 0.05, "batch_size": 8},
    "fbs": {"predictor": "zero", "epochs": 1, "last_epochs": 1},
    "paam": {"epochs": 3, "anneal": 0.7, "gate_learning_rate": 0.05, "learning_rate": 0.01, "batch_size": 8},
}
"""Options of methods that by their paper leave some groups whole, take untrained filters for alike, or train long.

With this seed, chance is not the criterion that AdaPruner finds best.
"""

CHOOSES_BY_IMAGE = {
    "fbs": "its gates stay in the network: masks keep everything, and the mean over images is in budget"
}
"""Methods whose masks cannot meet a target, with what holds in its place."""


BUDGET = Budget(Target("macs", 0.6))


def toy_task(shape: tuple[int, ...], classes: int) -> Task:
    """Return a task of labelled noise for a toy network: 24 images to train on, 8 held out, 8 to test on."""
    generator = torch.Generator().manual_seed(1)

    def split(count: int) -> TensorSplit:
        pixels = torch.randint(256, (count, *shape[1:]), generator=generator, dtype=torch.uint8)
        return TensorSplit(pixels, torch.randint(classes, (count,), generator=generator))

    channels = shape[1]
    data = Data(
        "noise",
        *(split(24), split(8), split(8)),
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        mean=(0.5,) * channels,
        std=(0.3,) * channels,
        in_channels=channels,
        image_size=shape[2],
        flip=False,
        pad=0,
    )
    return Task(data, data.mean, data.std, settings={"precision": "fp32", "batch_size": 8})


def prepared(
    name: str, net: nn.Module, groups: Groups, shape: tuple[int, ...], budget: Budget = BUDGET
) -> tuple[Method, Context]:
    """Return a method and what it may look at; a method that trains has trained the network in place."""
    method = load_method(name, **OPTIONS.get(name, {}))
    task = toy_task(shape, 3 if shape[1] == 1 else 5)
    trains = method.needs.trains_weights or method.phases
    dtype = next(net.parameters()).dtype
    images_are_float32 = net.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    state = method.fit(net, groups, budget, task) if trains else None
    images_are_float32.remove()
    batches = [(x.to(dtype), y) for x, y in task.images(batch_size=8)]
    return method, Context(net, batches, batches, state)


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", METHODS)
def test_masks_fit_the_network_and_the_target(name: str, toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()), make_groups()
    target = Target("macs", 0.6)
    method, context = prepared(name, net, groups, shape)
    result = method.plan(weights_of(net), groups, Budget(target), context)
    assert result.keep.keys() == groups.full_widths().keys()
    for group in groups.groups:
        mask = result.keep[group.id]
        assert mask.dtype == np.bool_
        assert mask.shape == (group.size,)
        assert mask.any()
        assert mask.all() or group.prunable
    if name in CHOOSES_BY_IMAGE:
        assert all(mask.all() for mask in result.keep.values())
        assert result.report["share"] == {"macs": 1.0, "params": 1.0}
        assert 0 < result.report["mean_macs"]["share"] <= 0.6
        return
    assert share(groups, "macs", widths(result.keep)) == result.report["share"]["macs"] <= 0.6
    set_weights(net, result.weights)
    apply_masks(net, groups, result.silent)
    x = torch.randn(shape)
    small = narrowed(with_merged_readers(net, groups, result.merges), groups, result.keep)
    assert (net(x) - small(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_finite_float64_vectors_and_the_same_twice(name: str) -> None:
    groups, net = residual_groups(), randomise(TOYS["residual"][0]())
    untrained = copy.deepcopy(net)
    method, context = prepared(name, net, groups, TOYS["residual"][2])
    scores = method.scores(weights_of(net), groups, context)
    assert list(scores) == [group.id for group in groups.prunable]
    for group_id, score in scores.items():
        assert score.dtype == np.float64
        assert score.shape == (groups[group_id].size,)
        assert np.isfinite(score).all()
        assert len(np.unique(score)) > 1
    method, context = prepared(name, untrained, groups, TOYS["residual"][2])
    again = method.scores(weights_of(untrained), groups, context)
    assert all(np.array_equal(again[group_id], score) for group_id, score in scores.items())


def tied(scores: np.ndarray, keep: np.ndarray) -> bool:
    """Whether a channel that stays and one that goes have scores so near each other that rounding could choose."""
    apart = np.abs(scores[keep][:, None] - scores[~keep])
    return bool((apart <= 1e-7 * np.abs(scores).max()).any())


@pytest.mark.parametrize(("toy", "moved_id"), [(toy, one.id) for toy in TOYS for one in TOYS[toy][1]().prunable])
@pytest.mark.parametrize("name", sorted(METHODS.keys() - BLIND_TO_WEIGHTS))
def test_permuting_filters_permutes_scores_and_masks_and_changes_nothing_else(
    name: str, toy: str, moved_id: str
) -> None:
    make, make_groups, shape = TOYS[toy]
    groups, net = make_groups(), randomise(make()).double()
    x = torch.randn(shape).double()
    dense, weights = net(x), weights_of(net)
    order = np.arange(groups[moved_id].size)[::-1]
    if len(order) > 2:
        order = np.random.default_rng(5).permutation(len(order))
    assert not np.array_equal(order, np.arange(len(order)))
    moved = permuted(weights, groups[moved_id], order)
    other = make().double().eval()  # a new one: some methods change the modules of theirs
    other.load_state_dict({key: torch.from_numpy(value) for key, value in moved.items()})
    torch.testing.assert_close(other(x), dense)
    scores, keep = [], []
    for module in (net, other):
        method, context = prepared(name, module, groups, shape)
        scores.append(method.scores(weights_of(module), groups, context))
        keep.append(method.plan(weights_of(module), groups, BUDGET, context).keep)
    for group_id, score in scores[0].items():
        expected = score[order] if group_id == moved_id else score
        np.testing.assert_allclose(scores[1][group_id], expected, rtol=1e-9)
    for group_id, mask in keep[0].items():
        if group_id not in scores[0] or not tied(scores[0][group_id], mask):
            assert np.array_equal(keep[1][group_id], mask[order] if group_id == moved_id else mask), group_id


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", METHODS)
def test_where_everything_is_kept_the_network_stays_as_it_is_bit_for_bit(name: str, toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()), make_groups()
    whole = Budget(None, widths=groups.full_widths())
    method, context = prepared(name, net, groups, shape, whole)
    before, x = weights_of(net), torch.randn(shape)
    dense = net(x)
    result = method.plan(before, groups, whole, context)
    assert result.keep.keys() == groups.full_widths().keys()
    assert all(mask.all() for mask in result.keep.values())
    assert not result.merges
    set_weights(net, result.weights)
    fold_offsets(net, groups, result.silent, result.offsets)
    apply_masks(net, groups, result.silent)
    assert all(np.array_equal(values, before[key]) for key, values in weights_of(net).items())
    assert torch.equal(net(x), dense)


@pytest.mark.parametrize("name", METHODS)
def test_the_table_says_what_the_class_says(name: str) -> None:
    found = method_class(name)
    assert found.__name__.lower() == name
    assert found.needs == METHODS[name].needs
    assert is_dataclass(found)
    assert found.__dataclass_params__.frozen
    assert getattr(found, "__final__", False)
    assert all(field.default is not None for field in fields(found))
    assert len(METHODS[name].summary) < 100
    assert describe_options(found).keys() == {field.name for field in fields(found)}


@pytest.mark.parametrize("name", METHODS)
def test_hooks_of_methods_that_do_not_train_do_nothing(name: str) -> None:
    if METHODS[name].needs.trains_weights:
        pytest.skip("this method trains")
    net = randomise(TOYS["residual"][0]())
    before = weights_of(net)
    method, groups = load_method(name), residual_groups()
    state = method.prepare(net, groups, Budget(Target("macs", 0.6)))
    assert method.penalty(state) == 0.0
    method.after_backward(state)
    method.after_step(state)
    method.epoch_end(state, 0)
    assert all(np.array_equal(values, before[key]) for key, values in weights_of(net).items())


def test_every_method_module_is_in_the_table() -> None:
    folder = Path(prune2deploy.methods.__file__).parent
    named = {info.target.partition(":")[0].rpartition(".")[2] for info in METHODS.values()}
    with_a_method = {path.stem for path in folder.glob("*.py") if "(Method):" in path.read_text()}
    assert with_a_method == named


def test_the_table_and_scores_that_need_no_data_work_without_torch() -> None:
    script = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'torch': raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "import numpy as np\n"
        "from prune2deploy.methods import METHODS, load_method\n"
        "from prune2deploy.groups import Group, Groups, Member\n"
        "from prune2deploy.cost import Cost\n"
        "i = np.arange(4)[:, None]\n"
        "roles = {'w': 'filter', 's': 'scale', 'b': 'shift'}\n"
        "group = Group('g', 4, tuple(Member(n, 0, r, i, n) for n, r in roles.items()), ('Relu',))\n"
        "weights = {'w': np.ones((4, 3, 1, 1)), 's': np.arange(4.0), 'b': np.arange(4.0)}\n"
        "groups = Groups((group,), (), Cost((), ()))\n"
        "free = [name for name, info in METHODS.items() if not info.needs.data]\n"
        "print(*[len(load_method(name).scores(weights, groups)['g']) for name in free], len(METHODS))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    free = [info for info in METHODS.values() if not info.needs.data]
    assert done.stdout.split() == ["4"] * len(free) + [str(len(METHODS))]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("l7", {}, f"there is no method 'l7'; the methods are {', '.join(sorted(METHODS))}"),
        ("bn", {"scor": "mean"}, r"'bn' has no option 'scor'; its options are score \(one of mean, .*mean_fold"),
        ("l1", {"norm": 2}, "'l1' has no option 'norm'; its options are none"),
        ("bn", {"score": "median"}, "option 'score' cannot be 'median'; it is one of mean, rms, std"),
        ("bn", {"mean_fold": 1}, "option 'mean_fold' cannot be 1; it is true or false"),
        ("random", {"seed": -1}, "option 'seed' cannot be -1; it is a whole number, 0 or more"),
        ("random", {"seed": 1.5}, "option 'seed' cannot be 1.5; it is a whole number"),
        ("random", {"seed": True}, "option 'seed' cannot be True"),
    ],
)
def test_wrong_names_and_options_are_refused_with_those_that_exist(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_method(name, **options)
