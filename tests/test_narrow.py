"""The narrow PyTorch network: the factory's own modules, equal to the slim graph, and ready to be trained on."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from command_line import done, p2d, refused, small_network
from torch import Tensor, nn

from prune2deploy import load_narrow
from prune2deploy.apply import MergeKeeper, apply_masks
from prune2deploy.errors import InputError, VerifyError
from prune2deploy.export_narrow import NarrowNetwork, export_narrow, named, warnings_of
from prune2deploy.exporter import Exported, export_network
from prune2deploy.graph.groups import find_groups
from prune2deploy.graph.layers import totals
from prune2deploy.graph.model import copy_of
from prune2deploy.graph.rewrite import Slimmed, remove_dead_channels
from prune2deploy.narrow import sampled
from prune2deploy.networks import load_network
from prune2deploy.networks.cifar_resnet import ZeroPad
from prune2deploy.train.boosting import Boosted

RTOL = 1e-5
"""Of the largest output: two orders of adding up the same numbers."""

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, eq=False)
class Case:
    """A masked network, its slim graph, and its narrow network as loaded from the folder."""

    masked: nn.Module
    slim: Slimmed
    written: NarrowNetwork
    narrow: nn.Module
    folder: Path


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a network whose norms are none of those that a fresh one has."""
    torch.manual_seed(seed)
    module = build().eval()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((part.weight, 0.5, 1.5), (part.bias, -1, 1), (part.running_var, 0.5, 2)):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
            assert part.running_mean is not None
            part.running_mean.normal_()
    return module


def pruned(module: nn.Module, images: Tensor, *, seed: int = 0, share: float = 0.6) -> nn.Module:
    """Silence random channels of every prunable group, in place."""
    groups = find_groups(export_network(module, (images,), fuse=False).model)
    rng = np.random.default_rng(seed)
    masks = {}
    for group in groups.groups:
        mask = rng.random(groups.full_widths()[group.id]) < share if group.prunable else None
        masks[group.id] = np.ones(groups.full_widths()[group.id], dtype=bool) if mask is None else mask
        masks[group.id][0] = True
    apply_masks(module, groups, masks)
    return module


def case(masked: nn.Module, build: Callable[[], nn.Module], images: Tensor, folder: Path) -> Case:
    """Write and load the narrow network, and make the slim graph of the same export (exporting takes the time here)."""
    exported = export_network(masked, (images,), fuse=False)
    first = [exported]

    def once(module: nn.Module, inputs: tuple[Tensor, ...], *, fuse: bool) -> Exported:
        return first.pop() if first else export_network(module, inputs, fuse=fuse)

    with patch("prune2deploy.export_narrow.export_network", once):
        written = export_narrow(masked, (images,), build, folder)
    assert not first
    return Case(masked, remove_dead_channels(copy_of(exported.model)), written, load_narrow(build, folder), folder)


def difference(one: Case, images: Tensor) -> float:
    """Return how far narrow network and slim graph are apart, of the largest output."""
    session = onnxruntime.InferenceSession(one.slim.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        found = one.narrow(images).numpy()
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def require_equal(one: Case, images: Tensor, *, as_narrow: bool = True) -> None:
    """Require the slim graph's outputs on other images, and its size."""
    other = torch.randn(3, *images.shape[1:], generator=torch.Generator().manual_seed(1))
    assert difference(one, other) <= RTOL
    after = totals(one.slim.layers, "after")
    if as_narrow:
        assert one.written.macs == after.macs
        assert one.written.whole == []
        dense = totals(one.slim.layers, "before")
        assert after.macs < dense.macs


def parameters(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet20", (3, 16, 16)),
        *(
            pytest.param(name, shape, marks=pytest.mark.slow)
            for name, shape in (
                ("resnet_digits", (1, 8, 8)),
                ("resnet8", (3, 16, 16)),
                ("resnet56", (3, 16, 16)),
                ("mobilenetv2_cifar", (3, 32, 32)),
                ("vgg16_bn", (3, 32, 32)),
                ("resnet18", (3, 64, 64)),
                ("resnet50", (3, 64, 64)),
            )
        ),
    ],
)
def test_a_built_in_network_becomes_as_narrow_as_its_slim_graph(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return load_network(name, input_shape=shape, num_classes=10, seed=3).module

    images = torch.randn(2, *shape)
    one = case(pruned(seeded(build), images), build, images, tmp_path)
    require_equal(one, images)
    assert parameters(one.narrow) < parameters(one.masked)
    assert one.narrow.state_dict().keys() == one.masked.state_dict().keys()
    assert not one.narrow.training


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18", "timm:mobilenetv3_small_100"])
def test_a_network_of_a_zoo_becomes_as_narrow_as_its_slim_graph(spec: str, tmp_path: Path) -> None:
    pytest.importorskip(spec.partition(":")[0], exc_type=Exception)

    def build() -> nn.Module:
        return load_network(spec, input_shape=(3, 64, 64), num_classes=10).module

    images = torch.randn(2, 3, 64, 64)
    require_equal(case(pruned(seeded(build), images), build, images, tmp_path), images)


def test_the_small_network_of_the_command_line_is_loaded_by_its_spec_and_trains_on(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small, run)
    said = done("export", run, "--torch")
    assert f"load_narrow(FACTORY, '{run / 'narrow'}')" in said
    section = json.loads((run / "report.json").read_text())
    assert section["export"]["narrow"]["macs"] == section["slim"]["macs"]["after"]
    assert section["export"]["narrow"]["slim_difference"] < RTOL
    module = load_narrow(small_network(tmp_path / "again"), run / "narrow")
    slim = onnxruntime.InferenceSession(str(run / "slim.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        found = module(images).numpy()
    (wanted,) = slim.run(None, {"input": images.numpy()})
    assert np.abs(found - wanted).max() <= RTOL * np.abs(wanted).max()
    state = module.state_dict()
    assert 0 < len(state["gain"]) == len(state["norm.weight"]) < 8
    assert state["head.weight"].shape[1] == 16 * (len(state["left.bias"]) + len(state["right.bias"]))


def test_training_goes_on_in_every_parameter_and_in_the_norms(tmp_path: Path) -> None:
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    masked = seeded(Plain)
    silence(masked, "first", "norm", [0, 4, 9])
    silence(masked, "second", "second_norm", [1, 2])
    export_narrow(masked, (images,), Plain, tmp_path)
    module = load_narrow(Plain, tmp_path).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.slow
def test_what_a_method_leaves_in_the_network_is_built_again(tmp_path: Path) -> None:
    options = ("--option", "epochs=1", "--target", "macs=0.6")
    done("prune", "resnet_digits", "--method", "fbs", *options, "-o", tmp_path / "run")
    done("export", tmp_path / "run", "--torch")
    module = load_narrow("resnet_digits", tmp_path / "run" / "narrow")
    boosted = [part for part in module.modules() if isinstance(part, Boosted)]
    assert boosted
    assert all(part.active < part.conv.out_channels for part in boosted)
    slim = onnxruntime.InferenceSession(str(tmp_path / "run/slim.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        found = module(images).numpy()
    (wanted,) = slim.run(None, {"input": images.numpy()})
    assert np.abs(found - wanted).max() <= RTOL * np.abs(wanted).max()


@pytest.mark.slow
def test_a_narrow_network_can_be_exported_and_has_nothing_left_to_remove(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return load_network("resnet20", num_classes=10, seed=3).module

    images = torch.randn(2, 3, 16, 16)
    export_narrow(pruned(seeded(build), images), (images,), build, tmp_path)
    again = export_network(load_narrow(build, tmp_path), (images,), fuse=True)
    assert remove_dead_channels(again.model).removed_channels == 0


# --- what a graph does and code does not ------------------------------------------------------------------------------


class Plain(nn.Module):
    """Two convolutions around something, and a classifier: 16 channels in the middle."""

    def __init__(self, *, groups: int = 1, size: int = 3, out: int = 16) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, out, size, groups=groups, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.head = nn.Linear(out, 5)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.norm(self.first(x)))
        return self.head(F.relu(self.second_norm(self.second(x))).mean((2, 3)))


def silence(module: nn.Module, layer: str, norm: str, channels: list[int]) -> None:
    parts = dict(module.named_modules())
    with torch.no_grad():
        for tensor in (parts[layer].weight, parts[norm].weight, parts[norm].bias):
            tensor[channels] = 0


def test_a_constant_behind_a_sigmoid_becomes_the_bias_of_a_layer_that_had_none(tmp_path: Path) -> None:
    class Bent(Plain):
        def middle(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x)

    masked = seeded(Bent)
    silence(masked, "first", "norm", [0, 3, 4, 9])
    one = case(masked, Bent, IMAGES, tmp_path)
    require_equal(one, IMAGES)
    layer = one.narrow.get_submodule("second")
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    assert (layer.in_channels, layer.out_channels) == (12, 16)
    one.narrow(IMAGES).sum().backward()
    assert layer.bias.grad is not None


def test_exact_copies_are_merged_and_their_columns_added_up(tmp_path: Path) -> None:
    masked = seeded(Plain)
    with torch.no_grad():
        for part in (masked.get_submodule("first"), masked.get_submodule("norm")):
            for tensor in part.state_dict().values():
                if tensor.ndim:
                    tensor[[5, 6, 11]] = tensor[2].clone()
    one = case(masked, Plain, IMAGES, tmp_path)
    require_equal(one, IMAGES)
    first, second = one.narrow.get_submodule("first"), one.narrow.get_submodule("second")
    assert len(first.weight) == 13
    summed = masked.get_submodule("second").weight[:, [2, 5, 6, 11]].sum(1)
    assert torch.allclose(second.weight[:, 2], summed, atol=1e-6)


@pytest.mark.slow
def test_merged_channels_of_residual_stages_are_merged_as_in_the_slim_graph(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return load_network("resnet20", num_classes=10, seed=3).module

    images, masked = torch.randn(2, 3, 16, 16), seeded(build)
    groups = find_groups(export_network(masked, (images,), fuse=False).model)
    widths = groups.full_widths()
    merges = {}
    for group in groups.groups:
        if group.prunable:
            own = np.arange(widths[group.id])
            merges[group.id] = np.where(own % 3 == 1, own - 1, own)
    MergeKeeper(masked, groups, merges).after_step()
    one = case(masked, build, images, tmp_path)
    require_equal(one, images)
    assert len(one.narrow.get_parameter("conv1.weight")) == 11


def test_groups_that_keep_different_numbers_stay_one_layer(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Plain(groups=4)

    masked = seeded(build)
    silence(masked, "first", "norm", [0, 1, 2, 4, 8, 12])
    silence(masked, "second", "second_norm", [0, 1, 2, 4, 8, 12])
    one = case(masked, build, IMAGES, tmp_path)
    require_equal(one, IMAGES, as_narrow=False)
    layer = one.narrow.get_submodule("second")
    assert isinstance(layer, nn.Conv2d)
    assert layer.groups == 4
    assert (layer.in_channels, layer.out_channels) == (12, 12)


def test_whole_groups_and_depthwise_channels_go(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Plain(groups=16)

    masked = seeded(build)
    silence(masked, "first", "norm", [0, 1, 7])
    silence(masked, "second", "second_norm", [0, 1, 7])
    one = case(masked, build, IMAGES, tmp_path)
    require_equal(one, IMAGES)
    layer = one.narrow.get_submodule("second")
    assert isinstance(layer, nn.Conv2d)
    assert layer.groups == layer.in_channels == layer.out_channels == 13


def test_a_branch_that_became_constant_stays_one_channel_wide_inside(tmp_path: Path) -> None:
    class Residual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.inner_norm = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
            self.outer, self.outer_norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)

        def middle(self, x: Tensor) -> Tensor:
            branch = self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x)))))
            return F.relu(x + branch)

    masked = seeded(Residual)
    silence(masked, "outer", "outer_norm", list(range(16)))
    one = case(masked, Residual, IMAGES, tmp_path)
    require_equal(one, IMAGES, as_narrow=False)
    assert one.slim.removed_layers
    assert one.narrow.get_parameter("inner.weight").shape == (1, 16, 1, 1)
    assert one.narrow.get_parameter("outer.weight").shape == (16, 1, 1, 1)


def test_chunks_stay_equal_and_shuffles_rectangles(tmp_path: Path) -> None:
    class Shuffled(Plain):
        def middle(self, x: Tensor) -> Tensor:
            left, right = F.relu(x).chunk(2, 1)
            x = torch.cat([left, torch.tanh(right)], 1)
            batch, channels, height, width = x.shape
            return x.view(batch, 4, channels // 4, height, width).transpose(1, 2).reshape(x.shape)

    masked = seeded(Shuffled)
    silence(masked, "first", "norm", [0, 4, 5, 8, 9, 12])
    one = case(masked, Shuffled, IMAGES, tmp_path)
    require_equal(one, IMAGES, as_narrow=False)
    assert len(one.narrow.get_parameter("first.weight")) == 12
    assert one.written.whole == []


def test_parts_of_a_size_that_the_code_names_stay_whole(tmp_path: Path) -> None:
    class Parted(Plain):
        def middle(self, x: Tensor) -> Tensor:
            left, right = F.relu(x).split(8, 1)
            return torch.cat([left, torch.tanh(right)], 1)

    masked = seeded(Parted)
    silence(masked, "first", "norm", [0, 4, 5, 8])
    silence(masked, "second", "second_norm", [0])
    one = case(masked, Parted, IMAGES, tmp_path)
    require_equal(one, IMAGES, as_narrow=False)
    assert len(one.narrow.get_parameter("first.weight")) == 16
    assert len(one.narrow.get_parameter("second.weight")) == 15
    (entry,) = one.written.whole
    assert entry["why"] == "it names channels or widths of its own"
    assert re.fullmatch(r"the network itself \(.*test_narrow.py:\d+ in forward\)", named(entry))
    (text,) = warnings_of(one.written, one.written.macs - 5)
    assert text.startswith(
        "the narrow PyTorch network has 5 MACs more than the slim graph (kept whole, since they name"
    )
    assert not warnings_of(one.written, one.written.macs)


def test_widths_that_slices_and_means_name_stay_whole_and_are_named(tmp_path: Path) -> None:
    class Sliced(Plain):
        def middle(self, x: Tensor) -> Tensor:
            x = F.relu(x)
            return torch.cat([x[:, :6], x[:, 6:]], 1) * x.mean(1, keepdim=True)

    def build() -> nn.Module:
        return Sliced(out=12)

    masked = seeded(build)
    silence(masked, "first", "norm", [0, 4, 9])
    silence(masked, "second", "second_norm", [1, 2])
    one = case(masked, build, IMAGES, tmp_path)
    require_equal(one, IMAGES, as_narrow=False)
    assert one.narrow.get_parameter("first.weight").shape[0] == 16
    assert one.narrow.get_parameter("second.weight").shape[0] == 10
    assert all("test_narrow.py" in entry["source"] for entry in one.written.whole)
    assert one.written.whole == json.loads((one.folder / "narrow.json").read_text())["whole"]


@pytest.mark.slow
def test_a_layer_that_is_applied_twice_keeps_the_same_channels_both_times(tmp_path: Path) -> None:
    class Twice(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Conv2d(16, 16, 3, padding=1)

        def middle(self, x: Tensor) -> Tensor:
            return F.relu(self.both(F.relu(self.both(F.relu(x)))))

    masked = seeded(Twice)
    silence(masked, "first", "norm", [2, 3])
    with torch.no_grad():
        masked.get_parameter("both.weight")[[2, 3, 6]] = 0
        masked.get_parameter("both.bias")[[2, 3, 6]] = 0
    require_equal(case(masked, Twice, IMAGES, tmp_path), IMAGES, as_narrow=False)


@pytest.mark.slow
def test_other_norms_and_activations_are_told_their_widths(tmp_path: Path) -> None:
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.groups, self.slope = nn.GroupNorm(4, 16), nn.PReLU(16)
            self.up = nn.ConvTranspose2d(16, 16, 2, groups=2)
            self.last = nn.LayerNorm(5)

        def middle(self, x: Tensor) -> Tensor:
            return F.relu(self.groups(self.slope(self.up(F.relu(x)))))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x))

    masked = seeded(Normed)
    silence(masked, "first", "norm", [0, 1, 8, 9])
    silence(masked, "second", "second_norm", [0, 1])
    one = case(masked, Normed, IMAGES, tmp_path)
    require_equal(one, IMAGES)
    up = one.narrow.get_submodule("up")
    assert isinstance(up, nn.ConvTranspose2d)
    assert (up.in_channels, up.out_channels, up.groups) == (12, 16, 2)


# --- code that hard-codes a width -------------------------------------------------------------------------------------


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).view(-1, 16)


class Hard(Plain):
    """Its middle flattens to a width that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = Flat()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(F.relu(self.second_norm(self.second(F.relu(self.norm(self.first(x))))))))


def test_a_module_that_hard_codes_a_width_is_named(tmp_path: Path) -> None:
    masked = seeded(Hard)
    silence(masked, "second", "second_norm", [0, 1, 2])
    with pytest.raises(InputError, match=r"module 'flat' \(.*test_narrow.py:\d+ in forward\) hard-codes a width"):
        export_narrow(masked, (IMAGES,), Hard, tmp_path)
    assert not list(tmp_path.iterdir())


def test_code_that_computes_with_its_width_is_named(tmp_path: Path) -> None:
    class Scaled(Plain):
        def middle(self, x: Tensor) -> Tensor:
            return F.relu(x) / x.shape[1]

    masked = seeded(Scaled)
    silence(masked, "first", "norm", [0, 1, 2])
    with pytest.raises(InputError, match=r"the network itself \(.*test_narrow.py:\d+ in forward\) .* width"):
        export_narrow(masked, (IMAGES,), Scaled, tmp_path)
    assert not list(tmp_path.iterdir())


class Swap(nn.Module):
    """Swaps its halves: 8 and 8 channels, whichever are left of them."""

    def __init__(self) -> None:
        super().__init__()
        self.order = [*range(8, 16), *range(8)]

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, torch.tensor(self.order))


class Adaptable(Swap):
    def narrow_channels(self, kept_in: list[int], kept_out: list[int]) -> None:
        self.order = [kept_in.index(self.order[old]) for old in kept_out]


@pytest.mark.parametrize(("kind", "width"), [(Swap, 16), (Adaptable, 12)])
def test_a_module_may_say_how_it_works_on_fewer_channels(kind: type[Swap], width: int, tmp_path: Path) -> None:
    class Swapped(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.swap = kind()

        def middle(self, x: Tensor) -> Tensor:
            return self.swap(F.relu(x))

    masked = seeded(Swapped)
    silence(masked, "first", "norm", [0, 4, 9, 15])
    one = case(masked, Swapped, IMAGES, tmp_path)
    require_equal(one, IMAGES, as_narrow=width < 16)
    assert len(one.narrow.get_parameter("first.weight")) == width
    assert [entry["module"] for entry in one.written.whole] == (["swap"] if width == 16 else [])


def test_a_zero_padded_shortcut_takes_what_is_left_of_its_input() -> None:
    shortcut, x = ZeroPad(4, 2), torch.randn(2, 8, 6, 6)
    dense = shortcut(x)
    kept_in, kept_out = [0, 2, 3, 7], [1, 4, 7, 13, 15]
    narrow = copy.deepcopy(shortcut)
    narrow.narrow_channels(kept_in, kept_out)
    assert torch.equal(narrow(x[:, kept_in]), dense[:, kept_out])
    assert not narrow.state_dict()
    whole = copy.deepcopy(shortcut)
    whole.narrow_channels(range(8), range(16))
    assert torch.equal(whole(x), dense)
    assert whole.taken is None


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("narrow")
    masked = seeded(Plain)
    silence(masked, "first", "norm", [0, 1])
    export_narrow(masked, (IMAGES,), Plain, path, about={"network": "plain"})
    return path


def changed(folder: Path, tmp_path: Path, name: str, content: bytes) -> Path:
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / name).write_bytes(content)
    return tmp_path / "other"


def test_the_loaded_network_leaves_torchs_random_state_and_the_given_module_alone(folder: Path) -> None:
    state, module = torch.get_rng_state(), Plain()
    state = torch.get_rng_state()
    narrow = load_narrow(module, folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(module.first.weight) == 16
    assert len(narrow.get_parameter("first.weight")) == 14
    assert isinstance(load_narrow(lambda: (Plain(), (IMAGES,)), folder), Plain)


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        (lambda: Plain(out=12), r"'second.weight' is \[12, 16, 3, 3\] instead of \[16, 16, 3, 3\].* plain"),
        (lambda: nn.Linear(2, 2), "is missing"),
        (lambda: "no module", "returns str, but an nn.Module is wanted"),
        (lambda width: Plain(), "cannot be called without arguments"),
        (3, "the factory is int"),
        ("resnet20", "is not the one that"),
        ("no_such_network", "unknown network 'no_such_network'"),
    ],
)
def test_another_factory_is_refused_in_one_line(factory: object, says: str, folder: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load_narrow(factory, folder)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_mistake_inside_the_factory_is_not_taken_for_a_wrong_call(folder: Path) -> None:
    def broken() -> nn.Module:
        return nn.Conv2d("three", 4, 1)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="str"):
        load_narrow(broken, folder)


def test_the_same_names_and_shapes_with_another_forward_are_noticed(folder: Path) -> None:
    class Other(Plain):
        def middle(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    with pytest.raises(InputError, match="gives other outputs than were noted"):
        load_narrow(Other, folder)


def test_a_folder_that_holds_no_narrow_network_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        load_narrow(Plain, tmp_path / "none")
    with pytest.raises(InputError, match=r"it has no narrow\.json"):
        load_narrow(Plain, tmp_path)
    shutil.copy(folder / "narrow.json", tmp_path)
    with pytest.raises(InputError, match=r"it has no weights\.safetensors"):
        load_narrow(Plain, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("narrow.json", b"{", "is not a JSON file"),
        ("narrow.json", b"[1]", "is not of a narrow network"),
        ("narrow.json", b'{"schema_version": 9}', "has the schema version 9, and this p2d reads 1"),
        ("narrow.json", b'{"schema_version": 1, "parameters": {}}', "is damaged: it has no 'modules'"),
        ("weights.safetensors", b"no weights", "is not a whole safetensors file"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    name: str, content: bytes, says: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load_narrow(Plain, changed(folder, tmp_path, name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_weights_of_another_run_are_noticed(folder: Path, tmp_path: Path) -> None:
    masked = seeded(Plain, seed=1)
    silence(masked, "first", "norm", [3])
    export_narrow(masked, (IMAGES,), Plain, tmp_path / "second")
    mixed = changed(folder, tmp_path, "weights.safetensors", (tmp_path / "second/weights.safetensors").read_bytes())
    with pytest.raises(InputError, match="does not hold the parameters"):
        load_narrow(Plain, mixed)


def test_a_module_that_the_masked_network_adapted_must_be_adaptable_in_the_factory_too(tmp_path: Path) -> None:
    class Swapped(Plain):
        kind: type[Swap] = Adaptable

        def __init__(self) -> None:
            super().__init__()
            self.swap = self.kind()

        def middle(self, x: Tensor) -> Tensor:
            return self.swap(F.relu(x))

    class Fixed(Swapped):
        kind = Swap

    export_narrow(seeded(Swapped), (IMAGES,), Swapped, tmp_path)
    with pytest.raises(InputError, match=r"module 'swap' .* narrow_channels\(kept_in, kept_out\)"):
        load_narrow(Fixed, tmp_path)


def test_a_narrow_network_that_computes_something_else_is_never_written(tmp_path: Path) -> None:
    class Other(Plain):
        def middle(self, x: Tensor) -> Tensor:
            return F.relu(x) * 1.01

    with pytest.raises((InputError, VerifyError)):
        export_narrow(seeded(Plain), (IMAGES,), Other, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_a_further_proof_fails(tmp_path: Path) -> None:
    def refuse(module: nn.Module) -> None:
        assert isinstance(module, Plain)
        raise VerifyError("not as the slim graph")

    with pytest.raises(VerifyError, match="not as the slim graph"):
        export_narrow(seeded(Plain), (IMAGES,), Plain, tmp_path, prove=refuse)
    assert not list(tmp_path.iterdir())


def test_the_run_of_an_onnx_file_has_no_torch_network(small: Path, tmp_path: Path) -> None:
    done("prune", small / "dense.onnx", "-o", tmp_path / "run", "--target", "macs=0.8")
    refused(p2d("export", tmp_path / "run", "--torch"), 2, "which has no PyTorch network")


def test_modules_that_only_training_runs_stay_as_they_were_and_are_named(tmp_path: Path) -> None:
    class Aided(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.aid = nn.Sequential(nn.Conv2d(16, 4, 1), nn.Linear(4, 5))

        def middle(self, x: Tensor) -> Tensor:
            return F.relu(x) + (self.aid(x).sum() if self.training else 0)

    masked = seeded(Aided)
    silence(masked, "first", "norm", [0, 1])
    one = case(masked, Aided, IMAGES, tmp_path)
    require_equal(one, IMAGES)
    assert one.written.idle == json.loads((tmp_path / "narrow.json").read_text())["idle"] == ["aid"]
    assert one.narrow.get_parameter("aid.0.weight").shape == (4, 16, 1, 1)


def test_samples_of_an_output_are_spread_over_it() -> None:
    found = sampled(torch.arange(1000.0))
    assert found.scale == 999
    assert len(found.values) == 64
    assert (found.values[0], found.values[-1]) == (0, 999)
    assert sampled(torch.zeros(0)).values == []
