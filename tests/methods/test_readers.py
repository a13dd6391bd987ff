"""What readers read: windows, positions, shortcuts, and the copy that is pruned step by step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_groups import Mobile, Residual, masks_of, mobile_groups, randomise, residual_groups

from prune2deploy.apply import apply_masks, weights_of
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.methods.readers import Pruned, Watch, find_readers, first_batches
from prune2deploy.methods.samples import columns, positioned, some_positions, take, windows
from prune2deploy.methods.shortcuts import Shortcut, find_shortcuts

LAYERS = [
    (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 7)),
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1)), (2, 3, 7, 6)),
    (nn.Conv2d(3, 4, 3, dilation=2, padding="same"), (2, 3, 6, 5)),
    (nn.Conv2d(3, 4, 4, padding="same"), (2, 3, 6, 5)),
    (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 5)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 4)),
    (nn.Conv2d(3, 4, 1, stride=2), (2, 3, 6, 6)),
    (nn.Conv1d(3, 4, 5, stride=2, padding=2), (2, 3, 9)),
    (nn.Conv3d(3, 4, (2, 3, 1), padding=(1, 0, 2)), (2, 3, 4, 5, 3)),
    (nn.Linear(3, 4), (2, 3)),
    (nn.Linear(3, 4), (2, 5, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
@torch.no_grad()
def test_windows_times_weights_are_the_layers_outputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    outputs = positioned(layer, layer(x))
    chosen = torch.stack([torch.randperm(outputs.shape[1])[:4] for _ in x])
    seen = windows(layer, x, chosen).flatten(0, 1)
    weight = layer.get_parameter("weight").flatten(2) if layer.get_parameter("weight").ndim > 2 else None
    weight = layer.get_parameter("weight")[..., None] if weight is None else weight
    found = torch.einsum("nit,oit->no", seen, weight) + layer.get_parameter("bias")
    torch.testing.assert_close(found, take(outputs, chosen))


def test_a_1x1_convolution_reads_only_where_its_stride_lands() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    torch.testing.assert_close(columns(nn.Conv2d(2, 3, 1, stride=2), x), x[:, :, ::2, ::2].flatten(2))
    torch.testing.assert_close(columns(nn.Conv2d(2, 3, 3, stride=2), x), x.flatten(2))
    torch.testing.assert_close(columns(nn.Linear(4, 3), x[0]), x[0].transpose(1, 2))


def test_positions_are_drawn_for_each_image_and_keep_the_channels_together() -> None:
    x = torch.arange(100.0).view(2, 1, 50) * torch.tensor([1.0, -1.0])[None, :, None]
    drawn = some_positions(x, 10, torch.Generator().manual_seed(0))
    assert drawn.shape == (20, 2)
    torch.testing.assert_close(drawn[:, 0], -drawn[:, 1])
    assert (drawn[:10, 0] < 50).all()
    assert (drawn[10:, 0] >= 50).all()
    assert sorted(drawn[:10, 0].tolist()) != sorted((drawn[10:, 0] - 50).tolist())
    torch.testing.assert_close(some_positions(x, 0, torch.Generator()), x.transpose(1, 2).reshape(-1, 2))


def copy_of(net: nn.Module, groups: Groups, shape: tuple[int, ...], count: int = 2) -> Pruned:
    generator = torch.Generator().manual_seed(4)
    batches = [(torch.randn(shape, generator=generator).double(), torch.zeros(shape[0])) for _ in range(count)]
    return Pruned(net, groups, batches)


def test_a_pass_ends_when_all_readers_were_called_and_counts_layers_that_are_called_twice() -> None:
    net = randomise(Residual()).double()
    twice = nn.Sequential(
        net.get_submodule("conv1"), nn.Conv2d(8, 6, 1).double(), net.get_submodule("conv1"), nn.Tanh()
    )
    ends: list[int] = []
    twice[3].register_forward_hook(lambda *_: ends.append(1))
    readers = find_readers(net, weights_of(net), residual_groups())
    seen: list[tuple[str, int]] = []
    watch = Watch(twice, [readers["conv1.weight"]], lambda name, _, values, call: seen.append((name, call)))
    watch.run([(torch.randn(2, 6, 8, 8).double(), None)] * 3)
    assert seen == [("conv1.weight", 0), ("conv1.weight", 1)] * 3
    assert len(ends) == 1  # the first pass counts, the others end early
    assert not twice[0]._forward_pre_hooks


def test_readers_say_what_cannot_be_fitted_and_where_constants_go() -> None:
    net = randomise(Mobile())
    readers = find_readers(net, weights_of(net), mobile_groups())
    assert readers["grouped.weight"].refused == "'grouped' is a grouped convolution"
    assert readers["grouped.weight"].blocks == 2
    assert readers["fc.weight"].refused is None
    assert readers["fc.weight"].constant.parameter == "fc.bias"
    net = randomise(Residual())
    readers = find_readers(net, weights_of(net), residual_groups())
    assert [(name, reader.constant.parameter) for name, reader in readers.items()] == [
        ("conv1.weight", "bn1.running_mean"),
        ("conv2.weight", "bn2.running_mean"),
        ("fc.weight", "fc.bias"),
    ]


def test_a_layer_of_an_unknown_kind_is_refused() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = Residual()
    net.conv2 = Scaled(8, 6, 3, padding=1, bias=False)
    reader = find_readers(net, weights_of(net), residual_groups())["conv2.weight"]
    assert reader.refused == "'conv2' is not a plain convolution or linear layer"


def test_the_copy_is_the_masked_network_with_the_replaced_weights_and_the_original_is_left_alone() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    before = weights_of(net)
    copy = copy_of(net, groups, (2, 3, 8, 8))
    copy.silence(groups["stem"], np.array([1, 4]))
    copy.silence(groups["conv1"], np.array([0]))
    new = copy.by_input("conv2.weight") + 1.0
    copy.replace_by_input("conv2.weight", new)
    copy.add_constant("fc.weight", np.ones(5))
    assert not copy.module.get_parameter("conv2.weight")[[1, 4]].any()  # a new weight does not wake a masked filter
    assert not copy.weight("conv2.weight")[:, 0].any()
    np.testing.assert_array_equal(copy.live_outputs("conv2.weight"), [True, False, True, True, False, True])
    np.testing.assert_array_equal(copy.alive["conv1.weight"], [True, False, True, True, False, True])
    np.testing.assert_allclose(copy.new_weights()["fc.bias"], before["fc.bias"] + 1)
    assert all(np.array_equal(before[name], values) for name, values in weights_of(net).items())
    expected = Residual().double().eval()
    expected.load_state_dict(net.state_dict())
    with torch.no_grad():
        expected.get_parameter("conv2.weight").copy_(torch.from_numpy(copy.new_weights()["conv2.weight"]))
        expected.get_parameter("fc.bias").add_(1.0)
        apply_masks(expected, groups, masks_of(groups, {"stem": [1, 4], "conv1": [0]}))
        x = torch.randn(2, 3, 8, 8).double()
        torch.testing.assert_close(copy.module(x), expected(x), rtol=0, atol=0)


def test_batches_are_taken_until_there_are_enough_images() -> None:
    data = [(torch.zeros(4, 1), torch.zeros(4))] * 5
    assert len(first_batches(data, 9, "cap")) == 3
    assert len(first_batches(data, 100, "cap")) == 5
    with pytest.raises(InputError, match="method 'cap' needs images"):
        first_batches([], 9, "cap")


# --- shortcuts --------------------------------------------------------------------------------------------------------


def test_the_shortcut_of_a_residual_block_is_found_with_its_scale() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    found = find_shortcuts(copy_of(net, groups, (2, 3, 8, 8)), ["conv1.weight", "conv2.weight"])
    assert list(found) == ["conv2.weight"]
    shortcut = found["conv2.weight"]
    assert (shortcut.source, shortcut.steps, shortcut.sizes) == ("conv1.weight", (1, 1), (8, 8))
    np.testing.assert_array_equal(shortcut.inputs, np.arange(6))
    norm = net.get_submodule("bn2")
    np.testing.assert_allclose(shortcut.scale, (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy())


def test_what_is_not_the_shortcut_is_not_taken_for_one() -> None:
    class Other(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.stem(x))
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))
            return self.fc(F.relu(y + x).mean((2, 3)))  # conv1 reads relu(x), but x is added

    copy = copy_of(randomise(Other()).double(), residual_groups(), (2, 3, 8, 8))
    assert find_shortcuts(copy, ["conv2.weight"]) == {}


@pytest.mark.parametrize("step", [1, 2])
def test_a_shortcut_carries_what_lies_at_the_chosen_positions(step: int) -> None:
    own = Shortcut("a", np.array([2, 0]), np.array([0, 1]), np.ones(2), (4, 3), (step, step))
    values = torch.randn(2, 3, 4 * step, 3 * step)
    chosen = torch.tensor([[0, 5, 11], [7, 1, 3]])
    expected = take(positioned(nn.Conv2d(1, 1, 1), values[:, [2, 0], ::step, ::step]), chosen)
    torch.testing.assert_close(own.at(values, chosen), expected)
