"""BN: the expected activations of exported networks against what their readers read, and what their fold does."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.activated import KNOWN, UNKNOWN, WIDTH, branches, exported_groups, maker, normal_norms, unit
from prune2deploy.apply import apply_masks, fold_offsets, weights_of
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.methods.bn import BN, activation_moments


def observed(net: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer reads of a batch: float64 [channels, places]."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[0].double().transpose(0, 1).flatten(1)


def draws(images: int = 40) -> Tensor:
    return torch.randn((images, 3, 64, 64), generator=torch.Generator().manual_seed(1))


@cache
def expected_means() -> dict[str, np.ndarray]:
    net, groups = branches(False)
    known = replace(groups, groups=tuple(groups[maker(name)] for name in KNOWN))
    removed = {group.id: np.zeros(group.size, dtype=np.bool_) for group in known.groups}
    return BN(mean_fold=True).offsets(weights_of(net), known, removed)


@pytest.mark.parametrize("activation", KNOWN)
def test_the_expected_activation_of_an_exported_network_is_the_mean_of_what_is_read(activation: str) -> None:
    net = branches(False)[0]
    function = net.activations[activation]
    values = observed(function, function, net.makers[activation](draws(10)).detach())
    assert values.shape[0] == WIDTH
    read = function(values).detach()
    silent = float(function(torch.zeros(1)))
    error = 5 * read.std(1) / read.shape[1] ** 0.5 + 5e-4
    assert (np.abs(expected_means()[maker(activation)] + silent - read.mean(1).numpy()) < error.numpy()).all()


@pytest.mark.parametrize("activation", UNKNOWN)
def test_an_exported_activation_of_unknown_moments_is_refused_by_its_name(activation: str) -> None:
    net, groups = branches(False)
    one = replace(groups, groups=(groups[maker(activation)],))
    with pytest.raises(InputError, match=f"method 'bn' does not know the activation '{UNKNOWN[activation][1]}'"):
        BN().scores(weights_of(net), one)


class Squeezed(nn.Module):
    """Convolution, norm, ReLU, squeeze-and-excitation, convolution; and one whose norm is behind its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.reader = unit(3), nn.Conv2d(WIDTH, 4, 1)
        self.squeeze, self.excite = nn.Conv2d(WIDTH, 2, 1), nn.Conv2d(2, WIDTH, 1)
        self.late, self.late_norm = nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH)
        self.late_reader = nn.Conv2d(WIDTH, 4, 1)
        self.attend, self.attended = nn.Conv2d(3, 1, 1), unit(3)
        self.attended_reader = nn.Conv2d(WIDTH, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.maker(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        late = self.late_reader(self.late_norm(F.relu(self.late(x))))
        return (
            self.reader(y * gate)
            + late
            + self.attended_reader(F.relu(self.attended(x)) * torch.sigmoid(self.attend(x)))
        )


@cache
def squeezed() -> tuple[Squeezed, Groups]:
    net = Squeezed()
    normal_norms(net)
    net.late_norm.train()
    net.late_norm.momentum = None
    with torch.no_grad():
        net(draws())
    return net.eval(), exported_groups(net)


def test_what_a_squeeze_and_excitation_multiplies_is_scored_by_its_activation_before_the_gate() -> None:
    net, groups = squeezed()
    scores = BN().scores(weights_of(net), groups)
    read = observed(net, net.squeeze, draws())  # the mean over places is that of all places
    for group in ("maker.0", "attended.0"):
        norm = net.get_submodule(group.replace(".0", ".1"))
        beta, gamma = (values.detach().double().numpy() for values in (norm.bias, norm.weight.abs()))
        m1, _ = activation_moments(beta, gamma, "Relu")
        np.testing.assert_allclose(scores[group], m1, rtol=1e-12)
    np.testing.assert_allclose(scores["maker.0"], read.mean(1).numpy(), atol=0.02)


def test_a_norm_behind_its_activation_is_scored_as_it_is() -> None:
    net, groups = squeezed()
    weights = weights_of(net)
    read = observed(net, net.late_reader, draws())
    expected = {"mean": read.mean(1).abs(), "rms": read.square().mean(1).sqrt(), "std": read.std(1)}
    for score, values in expected.items():
        np.testing.assert_allclose(BN(score=score).scores(weights, groups)["late"], values.numpy(), atol=2e-3)


def test_means_are_not_folded_behind_a_gate_nor_where_the_norm_is_behind_the_activation() -> None:
    net, groups = squeezed()
    removed = {group.id: np.zeros(group.size, dtype=np.bool_) for group in groups.groups}
    assert BN(mean_fold=True).offsets(weights_of(net), groups, removed) == {}
    attended = groups["attended.0"]
    without = replace(groups, groups=(replace(attended, read_as=("Relu",)),))
    assert BN(mean_fold=True).offsets(weights_of(net), without, removed).keys() == {"attended.0"}, "it is the gate"


class Folded(nn.Module):
    """unit - activation - unit - convolution, for each of several activations; all added up."""

    def __init__(self, activations: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(unit(3), activation, unit(WIDTH, 6), nn.Conv2d(6, 2, 1))
                for name, activation in activations.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches.values()]).sum(0)


FOLDED: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "identity": nn.Identity(),
}


@cache
def folded() -> tuple[Folded, Folded, Folded]:
    """Return a network, the same without every second channel, and the same with the means of these folded."""
    net = normal_norms(Folded(FOLDED))
    readers = [branch[2][1] for branch in net.branches.values()]
    for norm in readers:
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        net(draws(8))
    net.eval()
    groups = exported_groups(net)
    keep = {group.id: np.ones(group.size, dtype=np.bool_) for group in groups.groups}
    keep |= {f"branches.{name}.0.0": np.arange(WIDTH) % 2 > 0 for name in FOLDED}
    plain, repaired = copy.deepcopy(net), copy.deepcopy(net)
    fold_offsets(repaired, groups, keep, BN(mean_fold=True).offsets(weights_of(net), groups, keep))
    for pruned in (plain, repaired):
        apply_masks(pruned, groups, keep)
    return net, plain, repaired


@pytest.mark.parametrize("activation", FOLDED)
def test_folded_means_leave_readers_with_no_error_of_the_mean(activation: str) -> None:
    """The mean squared error behind the reader's norm falls by the square of the mean error, which is nearly all."""
    dense, plain, repaired = (observed(net, net.branches[activation][3], draws(8)) for net in folded())
    bias, rest = ((values - dense).mean(1).square().sum() for values in (plain, repaired))
    assert rest < 0.002 * bias
    before, after = ((values - dense).square().mean() for values in (plain, repaired))
    assert before - after > 0.99 * bias / len(dense) > 0.01 * before
