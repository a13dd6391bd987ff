"""Two processes train as one does: the same losses, the same masks, and the same weights in both."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from prune2deploy.data import augment, draw_moves, moved
from prune2deploy.errors import InputError
from prune2deploy.train import Processes

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True)
class Trained:
    """What one process wrote."""

    tensors: dict[str, Tensor]
    curves: dict[str, list[list[float]]]
    agreed: str


def read(path: Path) -> Trained:
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return Trained(tensors, json.loads(metadata["curves"]), metadata["agreed"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one process and two have trained into."""
    found = tmp_path_factory.mktemp("several")
    for words, name in (((sys.executable,), "one"), (TORCHRUN, "two")):
        done = subprocess.run(
            [*words, HERE / "several.py", found, name], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> Trained:
    return read(folder / "one-0.safetensors")


@pytest.fixture(scope="module")
def two(folder: Path) -> tuple[Trained, Trained]:
    return read(folder / "two-0.safetensors"), read(folder / "two-1.safetensors")


def test_without_batch_norm_two_processes_have_the_losses_of_one(one: Trained, two: tuple[Trained, Trained]) -> None:
    for alone, together in zip(one.curves["plain"], two[0].curves["plain"], strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    assert len(one.curves["plain"][0]) == 9  # batches of 33 images, which two processes cannot share evenly
    for name, tensor in one.tensors.items():
        if name.startswith("plain."):
            assert torch.allclose(tensor, two[0].tensors[name], atol=1e-6), name


def test_two_processes_choose_the_masks_that_one_chooses(one: Trained, two: tuple[Trained, Trained]) -> None:
    masks = {name: each for name, each in one.tensors.items() if name.startswith("mask.")}
    assert any(not bool(each.all()) for each in masks.values())
    for name, mask in masks.items():
        assert torch.equal(mask, two[0].tensors[name]), name


def test_with_batch_norm_the_curves_are_near(one: Trained, two: tuple[Trained, Trained]) -> None:
    for what in ("sparse", "finetuned"):
        assert np.allclose(one.curves[what][1], two[0].curves[what][1], rtol=0.15), what


def test_both_processes_end_with_the_same_bits(two: tuple[Trained, Trained]) -> None:
    first, second = two
    assert first.curves == second.curves
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def test_the_first_process_alone_decides_and_writes(folder: Path, two: tuple[Trained, Trained]) -> None:
    assert {each.agreed for each in two} == {"said by 0 of 2"}
    assert [path.name for path in (folder / "two-checkpoint").iterdir()] == ["training.safetensors"]


def test_one_process_is_alone_with_its_batch() -> None:
    processes = Processes("cpu")
    assert (processes.rank, processes.count, processes.is_first) == (0, 1, True)
    assert processes.part(torch.arange(7)) == slice(0, 7)
    assert processes.total([1.5, 2.0]) == [1.5, 2.0]
    assert processes.agreed(lambda: 5) == 5
    with pytest.raises(InputError, match="so it is"):
        processes.agreed(lambda: (_ for _ in ()).throw(InputError("so it is")))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [8, 9, 31])
def test_parts_of_a_batch_are_the_batch(count: int, images: int) -> None:
    processes, parts = Processes("cpu"), []
    processes.count = count
    for rank in range(count):
        processes.rank = rank
        parts.append(torch.arange(images)[processes.part(torch.arange(images))])
    assert torch.cat(parts).tolist() == list(range(images))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_of_a_batch_is_moved_as_the_whole_is() -> None:
    images = torch.rand(9, 2, 6, 5)
    whole = augment(images, torch.Generator().manual_seed(3), flip=True, pad=2)
    rows, columns = draw_moves(9, 6, 5, torch.Generator().manual_seed(3), flip=True, pad=2)
    for part in (slice(0, 4), slice(4, 9)):
        assert torch.equal(moved(images[part], rows[part], columns[part], pad=2), whole[part])
