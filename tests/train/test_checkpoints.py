"""Checkpoints: a training that was killed ends with the bits of one that was not, and no other's is gone on with."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import few_digits, same, small, state, train

import prune2deploy.train.checkpoints
from prune2deploy.data import Data
from prune2deploy.errors import InputError
from prune2deploy.train import EpochResult
from prune2deploy.train.checkpoints import FILE

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def few() -> Data:
    return few_digits()


class StopError(Exception):
    """Ends a training from outside."""


def stop_in(epoch: int) -> Any:
    def after_epoch(result: EpochResult) -> None:
        if result.epoch == epoch:
            raise StopError

    return after_epoch


def process(folder: Path, weights: Path, kill_in_epoch: int, *options: str) -> int:
    words = [sys.executable, HERE / "interrupted.py", folder, weights, str(kill_in_epoch), *options]
    return subprocess.run(words, env=ENVIRONMENT, timeout=200, check=False).returncode


def test_a_training_killed_after_its_first_epoch_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = ('optimizer="sgd"', "ema=0.9", "label_smoothing=0.1")
    assert process(tmp_path / "whole", tmp_path / "whole.safetensors", 0, *options) == 0
    assert process(tmp_path / "cut", tmp_path / "cut.safetensors", 2, *options) == -signal.SIGKILL
    assert not (tmp_path / "cut.safetensors").exists()
    assert (tmp_path / "cut" / FILE).exists()
    assert process(tmp_path / "cut", tmp_path / "cut.safetensors", 1, *options) == 0, "it began anew"
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


SETTINGS = {
    "sgd": {},
    "without momentum": {"momentum": 0.0},
    "adamw": {"optimizer": "adamw", "lr": 0.01},
    "average": {"ema": 0.9, "gradient_clipping": 1.0},
    "bf16": {"precision": "bf16"},
    "some parameters": {"parameters": ["0.weight", "5.weight"], "optimizer": "adamw"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("epoch", [2, 4])
def test_a_training_that_is_cut_off_goes_on_as_if_it_had_not_been(
    epoch: int, settings: dict[str, Any], few: Data, tmp_path: Path
) -> None:
    whole = small(dropout=0.3)
    expected = train(whole, few, epochs=4, **settings)
    with pytest.raises(StopError):
        train(small(dropout=0.3), few, epochs=4, checkpoint=tmp_path, after_epoch=stop_in(epoch), seed=0, **settings)
    torch.manual_seed(99)
    module, seen = small(dropout=0.3, seed=5), []
    found = train(module, few, epochs=4, checkpoint=tmp_path, after_epoch=seen.append, **settings)
    assert same(state(module), state(whole))
    assert [(each.epoch, each.loss, each.holdout, each.lr) for each in found] == [
        (each.epoch, each.loss, each.holdout, each.lr) for each in expected
    ]
    assert [each.epoch for each in seen] == list(range(epoch, 5)), "whole epochs were trained again"


def test_a_training_that_is_finished_is_not_done_again(few: Data, tmp_path: Path) -> None:
    module = small()
    expected = train(module, few, epochs=2, ema=0.5, checkpoint=tmp_path)
    again = small(seed=3)
    assert (
        train(again, few, epochs=2, ema=0.5, checkpoint=tmp_path, after_step=lambda: pytest.fail("a step")) == expected
    )
    assert same(state(module), state(again))


def test_warnings_are_given_once_over_an_interruption(few: Data, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 6, "lr": 2.0, "weight_decay": 0.0}
    expected = [each.warnings for each in train(small(norm=False), few, **settings)]
    first = next(number for number, each in enumerate(expected, 1) if each)
    with pytest.raises(StopError):
        train(small(norm=False), few, checkpoint=tmp_path, after_epoch=stop_in(first + 1), **settings)
    found = train(small(norm=False), few, checkpoint=tmp_path, **settings)
    assert [each.warnings for each in found] == expected


# --- what is no checkpoint of this training ---------------------------------------------------------------------------


@pytest.fixture
def made(few: Data, tmp_path: Path) -> Path:
    """A folder with the checkpoint of a training by method l1."""
    with pytest.raises(StopError):
        train(small(), few, epochs=3, checkpoint=tmp_path, fingerprint={"method": "l1"}, after_epoch=stop_in(2))
    return tmp_path


OTHERS = {
    "method": ({"fingerprint": {"method": "csgd"}}, "its method is 'l1' where this one has 'csgd'"),
    "no fingerprint": ({"fingerprint": {}}, "its method is 'l1' where this one has None"),
    "rate": ({"lr": 0.2}, "its lr is 0.05 where this one has 0.2"),
    "epochs": ({"epochs": 4}, "its epochs is 3 where this one has 4"),
    "average": ({"ema": 0.5}, "its ema is 0.0 where this one has 0.5"),
}


@pytest.mark.parametrize(("options", "says"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_training_is_refused_on_one_line(
    options: dict[str, Any], says: str, made: Path, few: Data
) -> None:
    before, module = (made / FILE).read_bytes(), small(seed=4)
    untouched = state(module)
    with pytest.raises(InputError) as caught:
        train(module, few, **({"epochs": 3, "checkpoint": made, "fingerprint": {"method": "l1"}} | options))
    message = str(caught.value)
    assert says in message
    assert str(made) in message
    assert "remove it to train anew" in message
    assert "\n" not in message
    assert (made / FILE).read_bytes() == before
    assert same(untouched, state(module))


def test_a_checkpoint_of_another_version_is_refused(made: Path, few: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune2deploy.train.checkpoints, "__version__", "99.0.0")
    with pytest.raises(InputError, match=r"its version is '[0-9.]+' where this one has '99\.0\.0'"):
        train(small(), few, epochs=3, checkpoint=made, fingerprint={"method": "l1"})


def test_a_checkpoint_of_another_network_is_refused(made: Path, few: Data) -> None:
    with pytest.raises(InputError, match="checkpoint of another network; remove it"):
        train(small(norm=False), few, epochs=3, checkpoint=made, fingerprint={"method": "l1"})


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def no_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def no_json(path: Path) -> None:
    save_file(load_file(path), path, metadata={"training": "{"})


def other_json(path: Path) -> None:
    save_file(load_file(path), path, metadata={"training": json.dumps([1])})


@pytest.mark.parametrize("damage", [shorter, no_metadata, no_json, other_json])
def test_a_damaged_checkpoint_is_refused_and_named(damage: Any, made: Path, few: Data) -> None:
    damage(made / FILE)
    with pytest.raises(InputError, match=r"is not a whole checkpoint .*; remove it to train anew") as caught:
        train(small(), few, epochs=3, checkpoint=made, fingerprint={"method": "l1"})
    assert str(made / FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_holds_no_pickle(made: Path) -> None:
    data = (made / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"]["training"])["fingerprint"]["method"] == "l1"
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {"F32", "I64", "U8"}


# --- the disk ---------------------------------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let every write beyond this size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_leaves_the_last_checkpoint_and_the_training_goes_on_later(
    few: Data, tmp_path: Path
) -> None:
    whole = small()
    train(whole, few, epochs=3)
    with pytest.raises(StopError):
        train(small(), few, epochs=3, checkpoint=tmp_path, after_epoch=stop_in(2))
    before = (tmp_path / FILE).read_bytes()
    with files_no_larger_than(4096), pytest.raises(InputError, match=r"cannot write .*; free some space"):
        train(small(), few, epochs=3, checkpoint=tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    module = small()
    train(module, few, epochs=3, checkpoint=tmp_path)
    assert same(state(module), state(whole))


def test_what_a_kill_left_of_a_write_is_removed(made: Path, few: Data) -> None:
    (made / f".{FILE}.x1y2.part").write_bytes(b"half")
    (made / ".other.safetensors.x1y2.part").write_bytes(b"somebody else's")
    train(small(), few, epochs=3, checkpoint=made, fingerprint={"method": "l1"})
    assert {path.name for path in made.iterdir()} == {FILE, ".other.safetensors.x1y2.part"}
