"""Training, evaluation and recalibration, on the digits and on networks whose numbers can be worked out by hand."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from prune2deploy.data import Data, Subset, TensorSplit, load_data
from prune2deploy.errors import InputError
from prune2deploy.networks import load_network
from prune2deploy.train import EpochResult, Progress, evaluate, finetune, recalibrate


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="module")
def few(digits: Data) -> Data:
    """The first 128 digits to train on, the first 60 held out."""
    return replace(
        digits, train=Subset(digits.train, torch.arange(128)), holdout=Subset(digits.holdout, torch.arange(60))
    )


def tiny(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(512, 10),
        ).eval()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


def train(module: nn.Module, data: Data, **options: object) -> list[EpochResult]:
    defaults = {"epochs": 1, "batch_size": 32, "precision": "fp32"}
    return finetune(module, data, **(defaults | options))  # type: ignore[arg-type]


class Always(nn.Module):
    """Gives every image the same logits; the parameter makes it trainable."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def grey(*labels: int) -> TensorSplit:
    return TensorSplit(torch.full((len(labels), 1, 2, 2), 128, dtype=torch.uint8), torch.tensor(labels))


def test_accuracy_and_loss_are_means_over_the_images() -> None:
    split = grey(0, 0, 0, 1, 1)
    accuracy = evaluate(Always(math.log(3), 0.0), split, (0.0,), (1.0,), batch_size=2)
    assert accuracy.images == 5
    assert accuracy.top1 == pytest.approx(3 / 5)
    assert accuracy.loss == pytest.approx(-(3 * math.log(0.75) + 2 * math.log(0.25)) / 5)


def test_a_limit_takes_images_evenly_from_the_whole_split() -> None:
    split = grey(*[0] * 50, *[1] * 50)
    accuracy = evaluate(Always(1.0, 0.0), split, (0.0,), (1.0,), limit=10)
    assert (accuracy.images, accuracy.top1) == (10, 0.5)
    assert evaluate(Always(1.0, 0.0), split, (0.0,), (1.0,), limit=1000).images == 100


def test_evaluation_is_in_eval_mode_and_gives_every_part_its_mode_back(digits: Data) -> None:
    module = tiny(dropout=0.5)
    expected = evaluate(module, digits.test, digits.mean, digits.std)
    module.train()
    module[1].eval()
    before = state(module)
    assert evaluate(module, digits.test, digits.mean, digits.std, batch_size=597) == replace(
        expected, loss=pytest.approx(expected.loss)
    )
    assert [part.training for part in module] == [True, False, True, True, True, True]
    assert same(before, state(module))


def test_what_is_no_classifier_of_the_data_is_refused() -> None:
    with pytest.raises(InputError, match="has 2 classes, but the data has 3"):
        evaluate(Always(1.0, 0.0), grey(0, 2), (0.0,), (1.0,))
    with pytest.raises(InputError, match=r"returns \[2, 1, 2, 2\]"):
        evaluate(nn.Identity(), grey(0, 1), (0.0,), (1.0,))
    with pytest.raises(InputError, match="no images"):
        evaluate(Always(1.0), grey(), (0.0,), (1.0,))
    with pytest.raises(InputError, match="limit is 0"):
        evaluate(Always(1.0), grey(0), (0.0,), (1.0,), limit=0)
    with pytest.raises(InputError, match="batch size is 0"):
        evaluate(Always(1.0), grey(0), (0.0,), (1.0,), batch_size=0)


def test_the_digits_network_learns_the_digits_in_a_few_seconds(digits: Data) -> None:
    network = load_network("resnet_digits")
    results = finetune(network.module, digits, epochs=6, lr=0.1, batch_size=64, precision="fp32")
    assert [result.epoch for result in results] == [1, 2, 3, 4, 5, 6]
    assert results[-1].loss < 0.2 < results[0].loss
    assert results[-1].holdout.top1 > 0.95
    assert evaluate(network.module, digits.test, digits.mean, digits.std).top1 > 0.95
    assert not network.module.training
    assert all(tensor.is_contiguous() for tensor in network.module.state_dict().values())


def test_a_network_trains_on_a_folder_of_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(8):
                Image.new("RGB", (12, 10), (40 + 160 * label + index,) * 3).save(
                    tmp_path / part / name / f"{index}.png"
                )
    data = load_data(f"imagefolder:{tmp_path}", image_size=8, holdout=0.25)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    results = train(module, data, epochs=10, batch_size=6)
    assert len(results) == 10
    assert evaluate(module, data.test, data.mean, data.std).top1 == 1.0


def test_a_network_can_learn_a_few_images_by_heart(few: Data) -> None:
    module = tiny()
    train(module, replace(few, pad=0), epochs=20, lr=0.1)
    assert evaluate(module, few.train, few.mean, few.std).top1 == 1.0


def test_the_same_seed_gives_the_same_weights_whatever_the_global_random_state(few: Data) -> None:
    weights = []
    for global_seed, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(global_seed)
        module = tiny(dropout=0.3)
        expected = torch.get_rng_state()
        train(module, few, epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), expected)
        weights.append(state(module))
    assert same(weights[0], weights[1])
    assert not same(weights[1], weights[2])


def test_no_epochs_change_nothing(few: Data) -> None:
    module = tiny()
    before = state(module)
    assert train(module, few, epochs=0) == []
    assert same(before, state(module))


def test_bfloat16_trains_float32_weights(few: Data) -> None:
    module = tiny()
    results = train(module, few, epochs=3, precision="bf16", lr=0.1)
    assert results[-1].loss < results[0].loss
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_loss_that_is_no_number_is_refused_before_it_reaches_the_weights(few: Data) -> None:
    module = tiny()
    before = state(module)
    with pytest.raises(InputError, match=r"training diverged: the loss became nan in epoch 1, step 1; use a lower"):
        train(module, few, penalty=lambda: torch.tensor(float("nan")))
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    assert not module.training


def test_a_learning_rate_that_is_far_too_high_is_refused(few: Data) -> None:
    with pytest.raises(InputError, match="lower learning rate than 1e"):
        train(tiny(), few, epochs=5, lr=1e30)


def test_weights_that_break_in_the_last_step_are_refused(few: Data) -> None:
    module = tiny()
    with pytest.raises(InputError, match="the held-out loss is nan after epoch 1"):
        train(module, few, after_step=lambda: module[5].bias.data.fill_(float("nan")), batch_size=128)


def test_hooks_are_called_in_the_order_of_a_step(few: Data) -> None:
    module = tiny()
    calls: list[str] = []
    weight = module[0].weight

    def penalty() -> Tensor:
        assert weight.grad is None
        calls.append("penalty")
        return weight.square().sum()

    def after_backward() -> None:
        assert weight.grad is not None
        calls.append("after_backward")
        weight.grad.zero_()

    def after_step() -> None:
        calls.append("after_step")

    before = weight.detach().clone()
    results = []
    train(
        module,
        few,
        weight_decay=0.0,
        penalty=penalty,
        after_backward=after_backward,
        after_step=after_step,
        after_epoch=results.append,
    )
    assert calls == ["penalty", "after_backward", "after_step"] * 4
    assert torch.equal(weight, before)  # its gradient was zeroed after every backward
    assert [result.epoch for result in results] == [1]


def test_a_penalty_is_trained_away(few: Data) -> None:
    module, plain = tiny(), tiny()
    train(module, few, epochs=4, penalty=lambda: 10 * module[0].weight.abs().sum())
    train(plain, few, epochs=4)
    assert module[0].weight.abs().sum() < 0.3 * plain[0].weight.abs().sum()


def test_a_loss_of_the_callers_own_takes_the_place_of_cross_entropy(few: Data) -> None:
    module = tiny()
    seen = []

    def towards_zero(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((tuple(images.shape), tuple(logits.shape), labels.dtype))
        return logits.square().mean()

    results = train(module, few, epochs=10, loss=towards_zero)
    assert seen[0] == ((32, 1, 8, 8), (32, 10), torch.int64)
    assert results[-1].loss < 0.2 * results[0].loss


def test_the_rate_warms_up_and_falls_along_a_cosine(few: Data) -> None:
    seen: list[Progress] = []
    train(tiny(), few, epochs=20, lr=0.1, on_progress=seen.append)
    rates = [each.lr for each in seen]
    assert len(rates) == 80
    assert (seen[-1].epoch, seen[-1].epochs, seen[-1].step, seen[-1].steps) == (20, 20, 4, 4)
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[42] == pytest.approx(0.05)
    assert 0 < rates[-1] < 0.0001


def test_norms_biases_and_named_parameters_are_not_decayed(few: Data) -> None:
    module = tiny()
    before = state(module)

    def no_gradient() -> None:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)

    train(module, few, weight_decay=0.5, after_backward=no_gradient, no_decay=["5.weight"])
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"0.weight"}
    assert module[0].weight.norm() < before["0.weight"].norm()
    with pytest.raises(InputError, match=r"no parameter '7\.weight'"):
        train(module, few, no_decay=["7.weight"])


def test_frozen_norms_keep_their_statistics(few: Data) -> None:
    module, other = tiny(), tiny()
    before = state(module)
    train(module, few, frozen_norms=True)
    train(other, few)
    assert torch.equal(module[1].running_mean, before["1.running_mean"])
    assert not torch.equal(module[1].weight, before["1.weight"])
    assert not torch.equal(other[1].running_mean, before["1.running_mean"])


def test_parameters_that_need_no_gradient_stay(few: Data) -> None:
    module = tiny()
    module[0].weight.requires_grad_(False)
    before = state(module)
    train(module, few)
    assert torch.equal(module[0].weight, before["0.weight"])
    assert not torch.equal(module[5].weight, before["5.weight"])
    with pytest.raises(InputError, match="no parameter that can be trained"):
        train(tiny().requires_grad_(False), few)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
        {"weight_decay": float("inf")},
        {"batch_size": 1},
        {"precision": "fp8"},
    ],
)
def test_options_out_of_range_are_refused_and_named(options: dict[str, object], few: Data) -> None:
    with pytest.raises(InputError, match=next(iter(options)).replace("_", " ").replace("lr", "learning rate")):
        train(tiny(), few, **options)


def test_recalibration_measures_the_statistics_of_the_images() -> None:
    pixels = torch.randint(0, 256, (64, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = TensorSplit(pixels, torch.zeros(64, dtype=torch.int64))
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9))
    module[0].running_mean.fill_(100.0)
    assert recalibrate(module, split, (0.5,) * 3, (0.5,) * 3, batch_size=64) == 1
    scaled = (pixels.float() / 255 - 0.5) / 0.5
    assert torch.allclose(module[0].running_mean, scaled.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(module[0].running_var, scaled.transpose(0, 1).flatten(1).var(1), atol=1e-6)
    whole = module[0].running_mean.clone()
    recalibrate(module, split, (0.5,) * 3, (0.5,) * 3, batch_size=16)
    assert torch.allclose(module[0].running_mean, whole, atol=1e-6)  # every batch counts alike


def test_recalibration_changes_statistics_only_and_leaves_modes_as_they_were(digits: Data) -> None:
    module = tiny(dropout=0.9)
    module[3].train()
    before = state(module)
    recalibrate(module, digits.train, digits.mean, digits.std, images=200, seed=1)
    after = state(module)
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }
    assert [part.training for part in module] == [False, False, False, True, False, False]
    assert module[1].momentum == 0.1
    again = tiny(dropout=0.9)
    recalibrate(again, digits.train, digits.mean, digits.std, images=200, seed=1)
    assert same(after, state(again))


def test_recalibration_mends_wrong_statistics(digits: Data) -> None:
    network = load_network("resnet_digits")
    finetune(network.module, digits, epochs=4, lr=0.1, batch_size=64, precision="fp32")
    good = evaluate(network.module, digits.holdout, digits.mean, digits.std).top1
    for part in network.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.add_(2.0)
    broken = evaluate(network.module, digits.holdout, digits.mean, digits.std).top1
    recalibrate(network.module, digits.train, digits.mean, digits.std)
    mended = evaluate(network.module, digits.holdout, digits.mean, digits.std).top1
    assert broken < good - 0.3
    assert mended > good - 0.05


def test_recalibration_of_a_network_without_norms_does_nothing(digits: Data) -> None:
    assert recalibrate(Always(1.0), digits.train, digits.mean, digits.std) == 0


def test_recalibration_of_one_image_is_refused(digits: Data) -> None:
    with pytest.raises(InputError, match="2 images or more"):
        recalibrate(tiny(), digits.train, digits.mean, digits.std, images=1)


@pytest.fixture(autouse=True)
def _keep_the_global_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield
