"""Networks from their specs, and what a user is told when that does not work."""

from pathlib import Path

import pytest
import torch
from torch import nn

from prune2deploy.errors import InputError
from prune2deploy.networks import load_network

FACTORY = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, classes=3, channels=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

def plain(): return Small().double().train()
def with_example(): return Small(), torch.randn(2, 1, 6, 6)
def batch_of_one(): return Small(), (torch.randn(1, 1, 6, 6, dtype=torch.float64),)
def takes_both(num_classes, in_channels): return Small(num_classes, in_channels)
def takes_one(num_classes=5): return Small(num_classes), torch.randn(2, 1, 6, 6)
def raises(): raise ValueError("first line\\nsecond line")
def quits(): raise SystemExit(3)
def returns_text(): return "a network"
def returns_nothing(): pass
def bad_example(): return Small(), [1, 2]
def no_example(): return Small(), ()
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_net.py"
    path.write_text(FACTORY)
    return path


def refused(spec: str, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_network(spec, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def logits(spec: str, **options: object) -> torch.Tensor:
    network = load_network(spec, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        return network.module(*network.example_inputs)


def test_classes_channels_and_shape_are_passed_on() -> None:
    network = load_network("resnet20", num_classes=100, in_channels=1)
    assert network.example_inputs[0].shape == (2, 1, 32, 32)
    assert logits("resnet20", num_classes=100, in_channels=1).shape == (2, 100)
    assert load_network("resnet20", input_shape=(4, 16, 24)).example_inputs[0].shape == (2, 4, 16, 24)


def test_the_same_seed_gives_the_same_network_and_the_global_random_state_is_kept() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (load_network("resnet8", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.module.stem.weight, second.module.stem.weight)
    assert torch.equal(first.example_inputs[0], second.example_inputs[0])
    assert not torch.equal(first.module.stem.weight, other.module.stem.weight)


def test_an_unknown_network_is_refused_with_what_there_is() -> None:
    message = refused("resnet65")
    assert "did you mean resnet56" in message
    assert "vgg16_bn" in message
    assert "torchvision:NAME" in message
    assert "resnet20" in refused("")
    assert "unknown network" in refused("hub:resnet20")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 0}, "number of classes is 0"),
        ({"in_channels": -1}, "number of channels is -1"),
        ({"input_shape": ()}, "input shape"),
        ({"input_shape": (3, 0, 32)}, "input shape"),
        ({"input_shape": (3, 32, 32), "in_channels": 1}, "has 3 channels, but the images have 1"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, object], said: str) -> None:
    assert said in refused("resnet20", **options)


def test_an_input_that_the_network_does_not_accept_is_refused() -> None:
    assert "does not accept an input of shape [2, 3, 8, 8]" in refused("vgg16_bn", input_shape=(3, 8, 8))


def test_a_users_function_gives_a_module_in_eval_mode_and_float32(file: Path) -> None:
    network = load_network(f"{file}:plain", input_shape=(1, 5, 7))
    assert network.source == file
    assert not network.module.training
    assert network.module.conv.weight.dtype == torch.float32
    assert network.example_inputs[0].shape == (2, 1, 5, 7)


def test_a_users_example_wins_and_a_batch_of_one_becomes_two(file: Path) -> None:
    assert load_network(f"{file}:with_example", input_shape=(1, 9, 9)).example_inputs[0].shape == (2, 1, 6, 6)
    (example,) = load_network(f"{file}:batch_of_one").example_inputs
    assert example.shape == (2, 1, 6, 6)
    assert example.dtype == torch.float32


def test_a_network_for_a_batch_of_one_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "import torch\n"
        "class One(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.reshape(1, 12)\n"
        "def one(): return One(), torch.randn(1, 3, 2, 2)\n"
    )
    assert load_network(f"{tmp_path / 'one.py'}:one").example_inputs[0].shape == (1, 3, 2, 2)


def test_a_users_function_is_given_only_what_its_signature_has(file: Path) -> None:
    options = {"num_classes": 6, "in_channels": 2, "input_shape": (2, 6, 6)}
    assert logits(f"{file}:takes_both", **options).shape == (2, 6)
    assert logits(f"{file}:takes_one", num_classes=6, in_channels=1).shape == (2, 6)
    assert logits(f"{file}:takes_one").shape == (2, 5)


def test_a_users_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_net.py").write_text("from torch import nn\nclass Net(nn.Flatten): pass\n")
    (tmp_path / "net.py").write_text("from neighbour_of_net import Net\ndef make():\n    return Net()\n")
    assert isinstance(load_network(f"{tmp_path / 'net.py'}:make", input_shape=(3, 2, 2)).module, nn.Flatten)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("missing", "has no function 'missing'; it has Small, plain"),
        ("number", "has no function 'number'"),
        ("raises", "raised ValueError: first line second line"),
        ("quits", "raised SystemExit: 3"),
        ("returns_text", "returned a str"),
        ("returns_nothing", "returned nothing"),
        ("bad_example", "example inputs that are not tensors"),
        ("no_example", "returned no example input"),
        ("plain", "without example inputs"),
        ("takes_both", "raised TypeError"),
    ],
)
def test_a_users_function_that_cannot_be_used_is_refused(function: str, said: str, file: Path) -> None:
    assert said in refused(f"{file}:{function}")


def test_a_users_mistake_is_named_with_its_line(file: Path) -> None:
    line = next(number for number, text in enumerate(FACTORY.splitlines(), 1) if "raise ValueError" in text)
    assert f"line {line}" in refused(f"{file}:raises")


def test_a_file_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_there\n")
    assert "raised SyntaxError" in refused(f"{tmp_path / 'broken.py'}:make")
    assert "raised ModuleNotFoundError" in refused(f"{tmp_path / 'needy.py'}:make")
    assert "does not exist" in refused(f"{tmp_path / 'missing.py'}:make")
    assert "names no function" in refused(f"{tmp_path / 'needy.py'}")
    (tmp_path / "folder.py").mkdir()
    assert "is a folder" in refused(f"{tmp_path / 'folder.py'}:make")


@pytest.mark.parametrize("zoo", ["torchvision", "timm"])
def test_a_zoo_that_is_not_installed_is_named_with_the_extra_that_brings_it(
    zoo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, zoo, None)  # what an import of a missing package meets
    message = refused(f"{zoo}:resnet18")
    assert f"{zoo} cannot be imported" in message
    assert "pip install 'prune2deploy[zoo]'" in message


@pytest.mark.parametrize("zoo", ["torchvision", "timm"])
def test_networks_of_the_zoos_are_built(zoo: str) -> None:
    pytest.importorskip(zoo, exc_type=Exception)
    network = load_network(f"{zoo}:resnet18", num_classes=7)
    assert network.example_inputs[0].shape == (2, 3, 224, 224)
    assert logits(f"{zoo}:resnet18", num_classes=7).shape == (2, 7)
    assert "did you mean resnet18" in refused(f"{zoo}:resnet19")


def test_torchvision_networks_are_not_built_for_one_channel() -> None:
    pytest.importorskip("torchvision", exc_type=Exception)
    assert "images of 3 channels, not 1" in refused("torchvision:resnet18", in_channels=1)


def test_timm_networks_are_built_for_one_channel() -> None:
    pytest.importorskip("timm", exc_type=Exception)
    assert load_network("timm:resnet18", in_channels=1).example_inputs[0].shape == (2, 1, 224, 224)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("resnet18", "resnet18"), ("resnet34", "resnet34"), ("resnet50", "resnet50"), ("mobilenetv2", "mobilenet_v2")],
)
def test_torchvision_weights_give_the_same_logits_here(mine: str, theirs: str) -> None:
    pytest.importorskip("torchvision", exc_type=Exception)
    network, other = load_network(mine), load_network(f"torchvision:{theirs}")
    network.module.load_state_dict(other.module.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.module(x), other.module(x))
