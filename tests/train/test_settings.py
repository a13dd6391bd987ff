"""What the trainer can be told: optimizers, rates, smoothing, averages, clipping, which parameters."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import few_digits, same, small, state, train
from torch import Tensor, nn

from prune2deploy.apply import MaskKeeper, MergeKeeper, apply_masks
from prune2deploy.data import Data, normalise
from prune2deploy.errors import InputError
from prune2deploy.exporter import export_network
from prune2deploy.graph.groups import find_groups
from prune2deploy.train import Progress, distill_loss, evaluate
from prune2deploy.train.losses import cross_entropy


@pytest.fixture(scope="module")
def few() -> Data:
    return few_digits()


def rates(few: Data, **options: object) -> list[float]:
    seen: list[Progress] = []
    train(small(), few, on_progress=seen.append, **options)
    return [each.lr for each in seen]


def test_a_step_of_adamw_is_the_sign_of_the_gradient_behind_the_decay(few: Data) -> None:
    module = small()
    before = state(module)

    def plain_gradient() -> None:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, -0.25)

    train(
        module,
        few,
        optimizer="adamw",
        lr=0.01,
        weight_decay=0.5,
        batch_size=128,
        warmup_epochs=0,
        after_backward=plain_gradient,
    )
    for name, parameter in module.named_parameters():
        decay = 1 - 0.01 * 0.5 if name in ("0.weight", "5.weight") else 1.0
        assert torch.allclose(parameter, before[name] * decay + 0.01, atol=1e-6), name


def test_adamw_learns_the_digits(few: Data) -> None:
    results = train(small(), few, epochs=12, optimizer="adamw", lr=0.01)
    assert results[-1].loss < 0.5 * results[0].loss
    assert results[-1].holdout.top1 > 0.7 > results[0].holdout.top1


def test_the_warm_up_is_as_long_as_it_is_said_to_be(few: Data) -> None:
    assert rates(few, epochs=4, lr=0.1, warmup_epochs=0)[0] == pytest.approx(0.1)
    found = rates(few, epochs=4, lr=0.1, warmup_epochs=1.5)  # 6 of 16 steps
    assert found[:7] == pytest.approx([0.1 * each / 7 for each in range(1, 8)])
    assert found[6] > found[7] > found[-1] > 0


def test_label_smoothing_spreads_a_share_of_the_target_over_all_classes() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.1, 0.3]])
    labels = torch.tensor([0, 2])
    found = cross_entropy(0.3)(torch.zeros(2, 1, 1, 1), logits, labels)
    logs = torch.log_softmax(logits, 1)
    expected = -(0.7 * logs[torch.arange(2), labels] + 0.3 * logs.mean(1)).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_the_trainer_smooths_labels_as_it_is_told(few: Data) -> None:
    plain, smooth = (train(small(norm=False), few, label_smoothing=each, batch_size=128)[0] for each in (0.0, 0.5))
    assert plain.loss != smooth.loss
    sure = small(norm=False)
    train(sure, few, epochs=30, lr=0.1)
    unsure = small(norm=False)
    train(unsure, few, epochs=30, lr=0.1, label_smoothing=0.5)
    images = normalise(few.train.images(torch.arange(128)), few.mean, few.std)
    with torch.no_grad():
        tops = [float(torch.softmax(module(images), 1).amax(1).mean()) for module in (sure, unsure)]
    assert tops[1] < 0.7 < tops[0]
    with pytest.raises(InputError, match="label smoothing is of the default loss"):
        train(small(), few, label_smoothing=0.1, loss=lambda images, logits, labels: logits.sum())


def test_the_average_is_what_its_recursion_says_and_what_is_measured_and_left(few: Data) -> None:
    module, seen = small(), []
    start = module[0].weight.detach().clone()
    results = train(
        module, few, epochs=3, ema=0.8, after_step=lambda: seen.append(module[0].weight.detach().clone()), lr=0.1
    )
    expected = start.double()
    for step, weight in enumerate(seen, 1):
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.double()
    assert torch.allclose(module[0].weight.double(), expected, atol=1e-6)
    assert not torch.allclose(module[0].weight, seen[-1], atol=1e-4)
    found = evaluate(module, few.holdout, few.mean, few.std)
    assert results[-1].holdout == found
    assert module[1].num_batches_tracked == 12


def test_an_average_does_not_disturb_the_training(few: Data) -> None:
    losses = [[each.loss for each in train(small(), few, epochs=3, ema=decay)] for decay in (0.0, 0.9)]
    assert losses[0] == losses[1]


def test_masks_and_merges_hold_in_the_average_bit_by_bit(few: Data) -> None:
    module = small()
    groups = find_groups(export_network(module, (torch.zeros(2, 1, 8, 8),), fuse=False).model)
    [group] = groups.prunable
    mask = np.array([True, False, True, True, True, True, True, True])
    merge = np.array([0, 1, 2, 3, 4, 4, 6, 7])
    apply_masks(module, groups, {group.id: mask})
    merging = MergeKeeper(module, groups, {group.id: merge})
    merging.after_step()
    masking = MaskKeeper(module, groups, {group.id: mask})

    def keep_pruned() -> None:
        masking()
        merging.after_step()

    train(module, few, epochs=2, ema=0.9, lr=0.1, after_backward=merging.after_backward, after_step=keep_pruned)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        tensor = module.state_dict()[name]
        assert torch.equal(tensor[5], tensor[4]), name
        assert not torch.equal(tensor[6], tensor[4]), name
        if not name.startswith("1.running"):
            assert not tensor[1].any(), name


def test_gradients_are_clipped_to_a_common_norm(few: Data) -> None:
    module = small(norm=False)
    before = state(module)
    train(module, few, momentum=0.0, weight_decay=0.0, lr=0.5, warmup_epochs=0, batch_size=128, gradient_clipping=0.1)
    steps = [(each.detach() - before[name]).flatten() for name, each in module.named_parameters()]
    assert float(torch.cat(steps).norm()) == pytest.approx(0.5 * 0.1, rel=1e-4)


def test_only_the_parameters_that_are_named_are_trained(few: Data) -> None:
    module = small()
    before = state(module)
    train(module, few, parameters=["5.weight", "5.bias"])
    changed = {name for name, each in module.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {"5.weight", "5.bias"}
    assert all(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(InputError, match=r"no parameter '6\.weight' to train"):
        train(module, few, parameters=["6.weight"])


def test_a_parameter_that_was_frozen_before_is_not_trained_because_it_is_named(few: Data) -> None:
    module = small()
    module[0].weight.requires_grad_(False)
    before = module[0].weight.clone()
    train(module, few, parameters=["0.weight", "5.weight"])
    assert torch.equal(module[0].weight, before)
    assert not module[0].weight.requires_grad


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; there are sgd, adamw"),
        ({"label_smoothing": 1.0}, "label smoothing is 1"),
        ({"ema": 1.0}, "ema is 1"),
        ({"ema": float("nan")}, "ema is nan"),
        ({"warmup_epochs": 2}, "warmup epochs are 2"),
        ({"warmup_epochs": -1}, "warmup epochs are -1"),
        ({"gradient_clipping": -1.0}, "gradient clipping is -1"),
    ],
)
def test_settings_out_of_range_are_refused_and_named(options: dict[str, object], says: str, few: Data) -> None:
    with pytest.raises(InputError, match=says):
        train(small(), few, **options)


def test_precisions_can_change_from_training_to_training(few: Data) -> None:
    states = []
    for precision in ("fp32", "bf16", "fp32", "bf16"):
        module = small()
        train(module, few, precision=precision)
        states.append(state(module))
    assert same(states[0], states[2])
    assert same(states[1], states[3])
    assert not same(states[0], states[1])


def test_progress_says_how_accurate_the_network_was_after_the_last_epoch(few: Data) -> None:
    seen: list[Progress] = []
    results = train(small(), few, epochs=2, on_progress=seen.append)
    assert [each.top1 for each in seen] == [None] * 4 + [results[0].holdout.top1] * 4


# --- distillation -----------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Gives the same logits whatever it sees, and can say whether it was in training mode."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.logits.expand(len(x), -1)


def test_distillation_is_the_softened_divergence_and_the_labels_share() -> None:
    taught, own = torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([[0.5, 0.2, 0.9]], requires_grad=True)
    labels, images = torch.tensor([1]), torch.zeros(1, 1, 2, 2)
    teacher = Fixed(taught[0].clone()).train()
    found = distill_loss(teacher, alpha=0.3, temperature=2.0, precision="fp32")(images, own, labels)
    p, q = (torch.softmax(each / 2, 1) for each in (taught, own))
    divergence = (p * (p.log() - q.log())).sum()
    expected = 0.7 * F.cross_entropy(own, labels) + 0.3 * 4 * divergence
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert teacher.logits.grad is None
    assert teacher.modes == [False]
    gradient = 0.7 * (torch.softmax(own, 1) - F.one_hot(labels, 3)) + 0.3 * 2 * (q - p)
    assert own.grad is not None
    assert torch.allclose(own.grad, gradient.detach(), atol=1e-6)


def test_no_share_of_the_teacher_is_the_plain_loss_and_a_like_teacher_costs_nothing() -> None:
    logits, labels, images = torch.tensor([[1.0, -1.0]]), torch.tensor([0]), torch.zeros(1, 1, 2, 2)
    none = distill_loss(Fixed(torch.tensor([9.0, 9.0])), alpha=0.0)(images, logits, labels)
    assert float(none) == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert float(distill_loss(Fixed(logits[0].clone()), alpha=1.0)(images, logits, labels)) == pytest.approx(
        0, abs=1e-6
    )


def test_a_network_learns_its_teachers_answers_without_labels(few: Data) -> None:
    teacher = small(seed=1)
    train(teacher, few, epochs=10, lr=0.1)
    images = normalise(few.train.images(torch.arange(128)), few.mean, few.std)
    before = state(teacher)

    def distance(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(images).softmax(1) - teacher(images).softmax(1)).abs().mean())

    pupil, start = small(), distance(small())
    train(pupil, few, epochs=10, lr=0.1, loss=distill_loss(teacher, alpha=1.0))
    assert distance(pupil) < 0.3 * start
    assert same(before, state(teacher))


@pytest.mark.parametrize("numbers", [{"alpha": -0.1}, {"alpha": 1.5}, {"temperature": 0.0}, {"temperature": math.inf}])
def test_distillation_out_of_range_is_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be"):
        distill_loss(small(), **numbers)
