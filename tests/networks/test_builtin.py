"""The built-in networks: what they are made of, and that published checkpoints give their published accuracy."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prune2deploy.data import load_data
from prune2deploy.networks import NETWORKS, load_network, load_weights, normalisation
from prune2deploy.train import evaluate

PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet20_proj": 272_474,
    "resnet32_proj": 466_906,
    "resnet44_proj": 661_338,
    "resnet56_proj": 855_770,
    "resnet110_proj": 1_730_714,
    "resnet8": 78_186,
    "resnet_digits": 174_970,
    "vgg16_bn": 14_728_266,
    "mobilenetv2_cifar": 2_236_682,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "mobilenetv2": 3_504_872,
}

MACS = {
    "resnet20": 40_551_040,
    "resnet56": 125_485_696,
    "resnet8": 12_501_632,
    "resnet_digits": 4_793_984,
    "vgg16_bn": 313_201_664,
    "resnet18": 1_814_073_344,
    "resnet50": 4_089_184_256,
    "mobilenetv2": 300_774_272,
}

CHECKPOINTS = {
    "resnet8": 8721,
    "resnet20": 9173,
    "resnet20_proj": 9171,
    "resnet32": 9263,
    "resnet44": 9311,
    "resnet56": 9339,
}
"""Correct answers on the 10,000 test images, as published with the files."""


def macs(module: nn.Module, image: torch.Tensor) -> int:
    counts: list[int] = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, _, out: counts.append(out[0].numel() * layer.weight[0].numel()))
    with torch.no_grad():
        module(image)
    return sum(counts)


def test_the_table_and_the_known_counts_name_the_same_networks() -> None:
    assert set(PARAMETERS) == set(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_the_published_parameters_and_runs_in_eval_mode(name: str) -> None:
    info = NETWORKS[name]
    network = load_network(name)
    assert sum(parameter.numel() for parameter in network.module.parameters()) == PARAMETERS[name]
    assert not any(part.training for part in network.module.modules())
    assert {tensor.dtype for tensor in network.module.parameters()} == {torch.float32}
    assert network.source is None
    assert network.input_shape == info.input_shape
    (example,) = network.example_inputs
    assert example.shape == (2, *info.input_shape)
    with torch.no_grad():
        logits = network.module(example)
    assert logits.shape == (2, info.num_classes)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", MACS)
def test_a_network_costs_the_published_macs(name: str) -> None:
    network = load_network(name)
    assert macs(network.module, network.example_inputs[0][:1]) == MACS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_builder_takes_classes_and_channels(name: str) -> None:
    module_name, _, function = NETWORKS[name].build.partition(":")
    module = getattr(importlib.import_module(module_name), function)(num_classes=7, in_channels=2)
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    assert convolutions[0].in_channels == 2
    assert linears[-1].out_features == 7


def test_widths_of_the_digits_network_are_multiples_of_eight() -> None:
    module = load_network("resnet_digits").module
    widths = {part.out_channels for part in module.modules() if isinstance(part, nn.Conv2d)}
    assert widths == {16, 32, 64}


def test_a_zero_padded_shortcut_carries_every_second_pixel_between_zero_channels() -> None:
    block = load_network("resnet20").module.get_submodule("layer2.0")
    x = torch.randn(2, 16, 8, 8)
    y = block.get_submodule("downsample")(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize(
    ("mine", "keys"),
    [
        ("resnet18", {"conv1.weight", "layer2.0.downsample.1.running_var", "layer4.1.bn2.bias", "fc.bias"}),
        ("resnet50", {"layer1.0.downsample.0.weight", "layer3.5.conv3.weight", "fc.weight"}),
        (
            "mobilenetv2",
            {"features.0.0.weight", "features.1.conv.1.weight", "features.18.1.bias", "classifier.1.weight"},
        ),
    ],
)
def test_imagenet_networks_have_torchvisions_parameter_names(mine: str, keys: set[str]) -> None:
    assert keys <= set(load_network(mine).module.state_dict())


def test_listing_the_networks_imports_no_torch() -> None:
    code = "import sys; from prune2deploy.networks import NETWORKS; assert NETWORKS; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_checkpoint_loads_and_states_its_normalisation(name: str, data_dir: Path) -> None:
    network = load_network(name)
    metadata = load_weights(network.module, data_dir / "checkpoints" / f"cifar10_{name}.safetensors")
    assert float(metadata["test_top1"]) * 100 == pytest.approx(CHECKPOINTS[name])
    assert normalisation(metadata) is not None


def test_resnet20_is_as_accurate_as_published_on_a_tenth_of_the_test_images(data_dir: Path) -> None:
    network = load_network("resnet20")
    constants = normalisation(load_weights(network.module, data_dir / "checkpoints" / "cifar10_resnet20.safetensors"))
    assert constants is not None
    data = load_data(f"cifar10:{data_dir / 'cifar10'}")
    accuracy = evaluate(network.module, data.test, *constants, limit=1000)
    assert accuracy.images == 1000
    assert accuracy.top1 == pytest.approx(0.917, abs=0.02)  # one standard error is 0.0087
    wrong_constants = evaluate(network.module, data.test, (0.0,) * 3, (1.0,) * 3, limit=200)
    assert wrong_constants.top1 < accuracy.top1 - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_checkpoint_has_its_published_accuracy(name: str, data_dir: Path) -> None:
    network = load_network(name)
    metadata = load_weights(network.module, data_dir / "checkpoints" / f"cifar10_{name}.safetensors")
    constants = normalisation(metadata)
    assert constants is not None
    data = load_data(f"cifar10:{data_dir / 'cifar10'}")
    accuracy = evaluate(network.module, data.test, *constants, batch_size=500)
    assert accuracy.images == 10_000
    assert round(accuracy.top1 * 10_000) == CHECKPOINTS[name]


def test_the_digits_weights_have_the_accuracy_that_their_card_states() -> None:
    folder = Path(__file__).parents[2] / "models" / "digits"
    network = load_network("resnet_digits")
    metadata = load_weights(network.module, folder / "weights.safetensors")
    data = load_data("digits")
    constants = normalisation(metadata)
    assert constants == (data.mean, data.std)
    accuracy = evaluate(network.module, data.test, *constants)
    assert f"{100 * accuracy.top1:.2f}" == metadata["test_top1"]
    assert f"{metadata['test_top1']} %" in (folder / "README.md").read_text()
    assert (folder / "weights.safetensors").stat().st_size < 1_000_000
