"""Weights on disk: which files are read, and how others are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from prune2deploy.errors import InputError
from prune2deploy.networks import load_weights, normalisation, save_weights


def small(width: int = 4) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return module


def blank(width: int = 4) -> nn.Module:
    module = small(width)
    for tensor in module.state_dict().values():
        tensor.zero_()
    return module


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def refused(path: Path, module: nn.Module | None = None) -> str:
    module = blank() if module is None else module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(module, path)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_saved_weights_come_back_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(small().to(memory_format=torch.channels_last).state_dict(), path, {"mean": "[0.5]", "std": "[0.25]"})
    module = blank()
    metadata = load_weights(module, path)
    assert equal(module, small())
    assert metadata == {"mean": "[0.5]", "std": "[0.25]"}
    assert normalisation(metadata) == ((0.5,), (0.25,))


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    metadata = {name: name for name in "abcdefgh"}
    for index in range(4):
        save_weights(small().state_dict(), tmp_path / f"{index}.safetensors", metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_parameters_that_share_memory_are_not_written(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="untie"):
        save_weights(tied.state_dict(), tmp_path / "w.safetensors")


def test_a_tied_parameter_may_be_stored_once(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    torch.save({key: value for key, value in tied.state_dict().items() if key != "1.weight"}, tmp_path / "w.pt")
    load_weights(tied, tmp_path / "w.pt")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"net": {f"module.{key}": value for key, value in state.items()}, "acc": 91.0},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {key: value for key, value in state.items() if "num_batches_tracked" not in key},
        lambda state: {key: value.double() for key, value in state.items()},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".tar"])
def test_state_dicts_are_found_in_their_usual_wrappers(
    wrap: Callable[[dict[str, torch.Tensor]], object], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(wrap(small().state_dict()), path)
    module = blank()
    assert load_weights(module, path) == {}
    assert equal(module, small())


def test_a_pickle_that_needs_code_is_refused_and_does_not_run_it(tmp_path: Path) -> None:
    path, trace = tmp_path / "w.pt", tmp_path / "trace"
    torch.save(small(), path)
    message = refused(path)
    assert "would run code" in message
    assert "safetensors" in message

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (trace,))

    torch.save({"state_dict": Evil()}, path)
    assert "would run code" in refused(path)
    assert not trace.exists()


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(small(8).state_dict(), path)
    message = refused(path)
    assert "'0.weight' is [8, 1, 3, 3] instead of [4, 1, 3, 3]" in message
    assert "and 4 more" in message
    state = small().state_dict()
    torch.save({"strange": torch.zeros(1), **{key: state[key] for key in list(state)[1:]}}, tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "'0.weight' is missing; 'strange' is unexpected" in message


@pytest.mark.parametrize("document", [[1, 2], {"epoch": 3}, {}, torch.zeros(3), {"state_dict": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(document: object, tmp_path: Path) -> None:
    torch.save(document, tmp_path / "w.pth")
    assert "not a state dict" in refused(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 3, 100, -50])
def test_a_truncated_file_is_refused(suffix: str, keep: int, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    save_weights(small().state_dict(), path) if suffix == ".safetensors" else torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(path)
    assert "fetch it again" in message


def test_text_in_a_weights_file_is_refused(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.pt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert "fetch it again" in refused(tmp_path / name)


def test_missing_files_folders_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "w.safetensors")
    (tmp_path / "folder.pt").mkdir()
    assert "is a folder" in refused(tmp_path / "folder.pt")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "w.h5").write_bytes(b"x")
    assert "must end in .safetensors, .pt, .pth, .tar" in refused(tmp_path / "w.h5")
    assert "does not exist" in refused(tmp_path / "w.h6")


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    module = small()
    module[0].weight.data[1, 0, 2, 2] = float("nan")
    save_weights(module.state_dict(), tmp_path / "w.safetensors")
    assert "'0.weight'" in refused(tmp_path / "w.safetensors")


def test_normalisation_is_none_where_the_metadata_has_none() -> None:
    assert normalisation({}) is None
    assert normalisation({"arch": "resnet20"}) is None


@pytest.mark.parametrize(
    "metadata",
    [
        {"mean": "[0.5]"},
        {"mean": "[0.5]", "std": "[0.5, 0.5]"},
        {"mean": "half", "std": "[0.5]"},
        {"mean": "0.5", "std": "0.5"},
        {"mean": "[]", "std": "[]"},
        {"mean": "[0.5]", "std": "[0]"},
        {"mean": "[NaN]", "std": "[1]"},
        {"mean": '["a"]', "std": "[1]"},
    ],
)
def test_normalisation_that_makes_no_sense_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(InputError, match="--mean and --std"):
        normalisation(metadata)
