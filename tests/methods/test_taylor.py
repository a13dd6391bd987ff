"""Taylor: the derivative of the loss by a gate on each channel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_groups import TOYS, Mobile, Residual, masks_of, mobile_groups, randomise, residual_groups

from prune2deploy.apply import apply_masks, weights_of
from prune2deploy.errors import InputError
from prune2deploy.methods.base import Context
from prune2deploy.methods.taylor import Taylor

Batch = tuple[Tensor, Tensor]


def batches(shape: tuple[int, ...], classes: int, count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    size = (4, *shape[1:])
    return [
        (torch.randn(size, generator=generator).double(), torch.randint(classes, (4,), generator=generator))
        for _ in range(count)
    ]


def gated_loss(net: nn.Module, readers: dict[str, Tensor], batch: Batch) -> Tensor:
    """Return the loss with the inputs of some layers multiplied by gates [channels of the layer's input]."""
    handles = []
    for name, gate in readers.items():

        def multiply(_: nn.Module, inputs: tuple[Tensor], gate: Tensor = gate) -> tuple[Tensor]:
            return (inputs[0] * (gate[:, None, None] if inputs[0].ndim == 4 else gate),)

        handles.append(net.get_submodule(name).register_forward_pre_hook(multiply))
    loss = F.cross_entropy(net(batch[0]), batch[1])
    for handle in handles:
        handle.remove()
    return loss


def test_scores_are_the_mean_square_derivatives_by_a_gate_that_all_readers_share() -> None:
    """``(sum of gradient * weight)^2`` over what reads a channel, against autograd on the gates themselves."""
    net, data = randomise(Residual()).double(), batches((4, 3, 8, 8), 5)
    expected = {"stem": np.zeros(6), "conv1": np.zeros(8)}
    for batch in data:
        trunk, inner = (torch.ones(size, dtype=torch.float64, requires_grad=True) for size in (6, 8))
        loss = gated_loss(net, {"conv1": trunk, "fc": trunk, "conv2": inner}, batch)
        for name, gradient in zip(expected, torch.autograd.grad(loss, (trunk, inner)), strict=True):
            expected[name] += gradient.numpy() ** 2 / len(data)
    found = Taylor().scores({}, residual_groups(), Context(net, data))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_a_channel_with_several_places_has_one_gate() -> None:
    """Behind a depthwise convolution, in every block of a grouped one, and flattened."""
    net, data = randomise(Mobile()).double(), batches((4, 1, 6, 6), 3)
    expected = {"expand": np.zeros(4), "grouped": np.zeros(2)}
    for batch in data:
        places, twins = (torch.ones(size, dtype=torch.float64, requires_grad=True) for size in (4, 2))
        loss = gated_loss(net, {"grouped": places.repeat(2), "fc": twins.repeat(2).repeat_interleave(16)}, batch)
        for name, gradient in zip(expected, torch.autograd.grad(loss, (places, twins)), strict=True):
            expected[name] += gradient.numpy() ** 2 / len(data)
    found = Taylor().scores({}, mobile_groups(), Context(net, data))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_to_first_order_it_is_what_the_loss_loses_without_the_channel() -> None:
    """With readers a thousandth as strong the loss is as good as linear in each channel."""
    net, groups = randomise(Residual()).double(), residual_groups()
    with torch.no_grad():
        net.get_parameter("conv2.weight").mul_(1e-3)
    batch = batches((4, 3, 8, 8), 5, count=1)
    found = np.sqrt(Taylor().scores({}, groups, Context(net, batch))["conv1"])
    with torch.no_grad():
        before = float(F.cross_entropy(net(batch[0][0]), batch[0][1]))
        dense = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for channel in range(8):
            apply_masks(net, groups, masks_of(groups, {"conv1": [channel]}))
            change = abs(float(F.cross_entropy(net(batch[0][0]), batch[0][1])) - before)
            net.load_state_dict(dense)
            assert change == pytest.approx(found[channel], rel=0.02, abs=1e-9)


@pytest.mark.parametrize("toy", TOYS)
def test_the_network_is_left_as_it_was(toy: str) -> None:
    make, make_groups, shape = TOYS[toy]
    net = randomise(make()).double().train()
    frozen = next(net.parameters()).requires_grad_(False)
    before = weights_of(net)
    Taylor().scores({}, make_groups(), Context(net, batches(shape, 3)))
    assert all(np.array_equal(before[name], values) for name, values in weights_of(net).items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training
    assert not frozen.requires_grad
    assert sum(parameter.requires_grad for parameter in net.parameters()) == len(list(net.parameters())) - 1


def test_no_more_images_are_taken_than_asked_for() -> None:
    net, groups, data = randomise(Residual()).double(), residual_groups(), batches((4, 3, 8, 8), 5)
    some = Taylor(images=8).scores({}, groups, Context(net, data))
    again = Taylor().scores({}, groups, Context(net, data[:2]))
    assert all(np.array_equal(some[name], again[name]) for name in some)


@pytest.mark.parametrize("data", [None, []])
def test_without_images_it_says_what_it_needs(data: list[Batch] | None) -> None:
    with pytest.raises(InputError, match=r"'taylor' needs images"):
        Taylor().scores({}, residual_groups(), Context(randomise(Residual()), data))
    with pytest.raises(InputError, match=r"'taylor' needs images.*--data"):
        Taylor().scores({}, residual_groups())


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    net = randomise(Residual()).double()
    with torch.no_grad():
        net.get_parameter("fc.bias").fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan; check the weights"):
        Taylor().scores({}, residual_groups(), Context(net, batches((4, 3, 8, 8), 5)))


def test_groups_of_another_network_are_refused() -> None:
    with pytest.raises(InputError, match=r"no weight 'conv1.weight'"):
        Taylor().scores({}, residual_groups(), Context(randomise(Mobile()), batches((4, 1, 6, 6), 3)))
