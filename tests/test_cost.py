"""The cost model says what the narrow network costs."""

import pytest
import torch
from toy_groups import TOYS, counted_macs, narrowed, random_masks, randomise

from prune2deploy.cost import Cost, Term, Width
from prune2deploy.masks import widths


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("seed", range(4))
def test_cost_at_kept_widths_is_exactly_what_the_narrow_network_costs(toy: str, seed: int) -> None:
    make, make_groups, shape = TOYS[toy]
    net, groups = randomise(make()), make_groups()
    masks = random_masks(groups, seed)
    small = narrowed(net, groups, masks)
    kept = widths(masks)
    assert groups.cost.macs(kept) == counted_macs(small, torch.zeros(shape))
    assert groups.cost.parameters(kept) == sum(parameter.numel() for parameter in small.parameters())


def test_integer_widths_give_integers_and_torch_widths_can_be_differentiated() -> None:
    width = Width(2, (("a", 1), ("b", 3)))
    cost = Cost((Term("conv", 5, (width, Width(0, (("a", 2),))), divisor=2),), ())
    assert cost.macs({"a": 4, "b": 1}) == 5 * 9 * 8 // 2
    assert isinstance(cost.macs({"a": 4, "b": 1}), int)
    a = torch.tensor(4.0, requires_grad=True)
    cost.macs({"a": a, "b": 1.0}).backward()
    assert a.grad is not None
    assert a.grad.item() == 5 * (8 + 2 * 9) / 2


def test_real_widths_give_the_real_cost_between_the_whole_ones() -> None:
    groups = TOYS["residual"][1]()
    low, middle, high = (groups.cost.macs({"stem": 3, "conv1": n, "fc": 5}) for n in (4, 4.5, 5))
    assert middle == (low + high) / 2
