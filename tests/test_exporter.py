"""Exports: names, values, the dynamic batch, and that nothing of the maker's machine is in the files."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import ROOT, SMALL_NETWORK
from onnx import numpy_helper
from torch import nn

from prune2deploy.errors import InputError, VerifyError
from prune2deploy.exporter import OPSET, Exported, export_network, require_agreement
from prune2deploy.networks import Network, load_network

INPUTS = (torch.zeros(2, 3, 8, 8),)


@pytest.fixture(scope="module")
def network() -> Network:
    """resnet8 with norms that are not the identity."""
    found = load_network("resnet8", input_shape=(3, 16, 16), seed=1)
    generator = torch.Generator().manual_seed(0)
    for module in found.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.add_(torch.rand(tensor.shape, generator=generator))
    return found


@pytest.fixture(scope="module")
def unfused(network: Network) -> Exported:
    return export_network(network.module, network.example_inputs, fuse=False)


@pytest.fixture(scope="module")
def fused(network: Network) -> Exported:
    return export_network(network.module, network.example_inputs, fuse=True)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("which", ["unfused", "fused"])
def test_the_opset_and_the_names_are_fixed(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which).model
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain == ""] == [("", OPSET)]
    assert OPSET == 18
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["output"]


@pytest.mark.parametrize("which", ["unfused", "fused"])
@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_gives_what_torch_gives(
    which: str, batch: int, network: Network, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which).model
    image = torch.randn(batch, *network.input_shape, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = network.module(image).numpy()
    (got,) = session(model).run(None, {"input": image.numpy()})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_unfused_export_keeps_torchs_names_and_bits(network: Network, unfused: Exported) -> None:
    state = network.module.state_dict()
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in unfused.model.graph.initializer}
    used = {name for name in state if not name.endswith("num_batches_tracked")}
    assert used <= set(found)
    for name in used:
        assert found[name].dtype == state[name].numpy().dtype
        assert found[name].tobytes() == state[name].numpy().tobytes(), name


def test_the_unfused_export_keeps_norms_and_makes_no_biases_up(unfused: Exported, fused: Exported) -> None:
    assert operators(unfused.model).count("BatchNormalization") == 7
    assert "BatchNormalization" not in operators(fused.model)
    biases = {node.input[1]: len(node.input) == 3 for node in unfused.model.graph.node if node.op_type == "Conv"}
    names = {tensor.name for tensor in unfused.model.graph.initializer}
    assert biases == {weight: f"{weight.removesuffix('weight')}bias" in names for weight in biases}


def test_the_network_is_not_changed_and_stays_in_its_mode() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = export_network(module, INPUTS, fuse=True).model
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert "Dropout" not in operators(model), "it was exported in train mode"


@pytest.mark.parametrize("which", ["unfused", "fused"])
def test_the_same_network_gives_the_same_bytes(which: str, network: Network, request: pytest.FixtureRequest) -> None:
    again = export_network(network.module, network.example_inputs, fuse=which == "fused")
    first = request.getfixturevalue(which)
    assert again.model.SerializeToString(deterministic=True) == first.model.SerializeToString(deterministic=True)
    assert again.source_map == first.source_map


@pytest.mark.parametrize("which", ["unfused", "fused"])
def test_nothing_of_the_makers_machine_is_in_the_model(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which).model
    require_anonymous(model.SerializeToString())
    assert not model.doc_string
    assert not model.graph.doc_string
    for item in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        assert not item.doc_string
        assert not item.metadata_props


def require_anonymous(data: bytes) -> None:
    traces = (
        str(ROOT),
        str(Path.home()) + "/",
        str(Path(torch.__file__).parent),
        ".py",
        "Traceback",
        'File "',
        "forward(",
    )
    assert [text for text in traces if text.encode() in data] == []


def test_the_shipped_files_tell_nothing_of_the_machine_either(digits_run: Path, small: Path) -> None:
    for run in (digits_run, small):
        for name in ("dense.onnx", "masked.onnx", "slim.onnx", "analysis.onnx", "masks.safetensors"):
            data = (run / name).read_bytes()
            require_anonymous(data)
            assert str(run.parent).encode() not in data, name
            if name.endswith(".onnx"):
                assert not [entry.key for entry in onnx.load(run / name).metadata_props if "torch" in entry.key]


@pytest.mark.parametrize("which", ["unfused", "fused"])
def test_the_source_map_says_where_every_layer_comes_from(
    which: str, network: Network, request: pytest.FixtureRequest
) -> None:
    exported = request.getfixturevalue(which)
    modules = dict(network.module.named_modules())
    assert set(exported.source_map) <= {node.name for node in exported.model.graph.node}
    for node in exported.model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "BatchNormalization"):
            continue
        entry = exported.source_map[node.name]
        assert entry["module"] in modules, node.name
        file, line = entry["source"].split(" in ")[0].rsplit(":", 1)
        text = Path(file).read_text().splitlines()[int(line) - 1]
        assert "(" in text, "a call stands on that line"
        assert Path(file).is_relative_to(ROOT / "prune2deploy" / "networks")
        if which == "unfused":
            kind = {"Conv": nn.Conv2d, "Gemm": nn.Linear, "BatchNormalization": nn.BatchNorm2d}[node.op_type]
            assert isinstance(modules[entry["module"]], kind)
            assert node.input[1] == f"{entry['module']}.weight"


def test_the_source_map_names_the_users_own_file(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(SMALL_NETWORK)
    network = load_network(f"{tmp_path / 'net.py'}:small", num_classes=10, input_shape=(1, 8, 8))
    exported = export_network(network.module, network.example_inputs, fuse=False)
    sources = {entry.get("module"): entry["source"] for entry in exported.source_map.values() if "source" in entry}
    line = 1 + SMALL_NETWORK.splitlines().index("        x = F.relu6(self.depth_norm(self.depth(x)))")
    assert sources["depth"] == f"{tmp_path / 'net.py'}:{line} in forward"


def test_several_inputs_and_outputs_are_numbered() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": self.conv(a + b), "product": a * b}

    model = export_network(Two(), (*INPUTS, torch.ones(2, 3, 8, 8)), fuse=True).model
    assert [value.name for value in model.graph.input] == ["input_0", "input_1"]
    assert [value.name for value in model.graph.output] == ["output_0", "output_1"]
    a, b = np.random.default_rng(0).random((2, 3, 3, 8, 8), dtype=np.float32)
    total, product = session(model).run(None, {"input_0": a, "input_1": b})
    assert total.shape == (3, 4, 8, 8)
    np.testing.assert_array_equal(product, a * b)


def test_an_export_that_is_not_the_network_is_refused(network: Network, fused: Exported, tmp_path: Path) -> None:
    onnx.save(fused.model, tmp_path / "right.onnx")
    assert require_agreement(network.module, tmp_path / "right.onnx", network.example_inputs) < 1e-5
    wrong = onnx.load(tmp_path / "right.onnx")
    tensor = next(one for one in wrong.graph.initializer if one.name == "fc.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[3] += 1.0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    with pytest.raises(VerifyError, match=r"wrong\.onnx' differs from the torch network"):
        require_agreement(network.module, tmp_path / "wrong.onnx", network.example_inputs)


def test_a_network_that_does_not_run_on_its_inputs_names_the_shape() -> None:
    with pytest.raises(InputError, match=r"\[2, 3, 8, 8\].*--input NAME:SHAPE"):
        export_network(nn.Conv2d(4, 4, 1), INPUTS, fuse=True)


def test_a_failed_export_gives_one_short_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(InputError) as caught:
        export_network(Branching(), INPUTS, fuse=True)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 350
    assert "data-dependent" in str(caught.value)
