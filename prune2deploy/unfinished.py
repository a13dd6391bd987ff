"""What a run keeps in its folder ``checkpoints`` until its fine-tuning is over, so that it can go on after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import read_json, require_file, write_bytes, write_json
from prune2deploy.groups import Groups
from prune2deploy.masks import load_masks, load_merges, save_masks, save_merges
from prune2deploy.report import plain

if TYPE_CHECKING:
    from torch import Tensor

    from prune2deploy.train import EpochResult

FOLDER = "checkpoints"
BEGUN = "begun.json"
"""Whose folder it is; written first."""
FILE = "pruned.json"
"""Written last, so where it is, the others are whole."""


@dataclass(eq=False)
class Pruned:
    """A network that is masked and not yet fine-tuned, and what its run will say of it.

    Attributes:
        analysis: the ONNX file that the groups were read from.
        source_map: its nodes' places in the source.
        groups: the groups.
        keep: `methods.base.PruneResult.keep`.
        merges: `methods.base.PruneResult.merges`.
        dense: the weights as they came.
        weights: the weights after masking.
        accuracy: on the test split, by stage.
        history: the epochs of the method's own training.
        seconds: how long each step took.
        warnings: what the user should know.
        report: the method's report.
    """

    analysis: bytes
    source_map: dict[str, Any]
    groups: Groups
    keep: dict[str, np.ndarray]
    merges: dict[str, np.ndarray]
    dense: dict[str, Tensor]
    weights: dict[str, Tensor]
    accuracy: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def silent(self) -> dict[str, np.ndarray]:
        """The masks that silence: see `methods.base.PruneResult.silent`."""
        from prune2deploy.methods.base import PruneResult

        return PruneResult(self.keep, self.merges).silent


NOTES = ("source_map", "accuracy", "history", "seconds", "warnings", "report")
"""The parts of `Pruned` that are JSON values."""


@dataclass(frozen=True)
class Unfinished:
    """The folder of a run that is being pruned.

    Attributes:
        folder: ``RUN/checkpoints``.
        fingerprint: of the recipe that it belongs to.
    """

    folder: Path
    fingerprint: Mapping[str, Any]

    def begin(self) -> None:
        """Empty the folder and write whose it is: what lies in it from now on is this recipe's."""
        self.remove()
        write_json(self.folder / BEGUN, plain({"fingerprint": self.fingerprint}))

    def save(self, pruned: Pruned) -> None:
        """Write a masked network."""
        from prune2deploy.networks import save_weights

        write_bytes(self.folder / "analysis.onnx", pruned.analysis)
        pruned.groups.save(self.folder / "groups.json")
        save_masks(pruned.keep, self.folder / "masks.safetensors")
        save_merges(pruned.merges, self.folder / "merges.safetensors")
        save_weights(pruned.dense, self.folder / "dense.safetensors")
        save_weights(pruned.weights, self.folder / "weights.safetensors")
        document = {name: getattr(pruned, name) for name in NOTES}
        write_bytes(self.folder / FILE, json.dumps(plain(document), sort_keys=True).encode())

    def load(self) -> Pruned | None:
        """Return the masked network; None if there is none yet.

        Raises:
            InputError: if it is damaged, or the folder is of another recipe or version.
        """
        from prune2deploy.networks.weights import read_safetensors
        from prune2deploy.train.checkpoints import require_same

        if not self.has_begun():
            return None
        require_same(self._part(BEGUN, "fingerprint")["fingerprint"], plain(self.fingerprint), self.folder / BEGUN)
        if not (self.folder / FILE).exists():
            return None
        notes = self._part(FILE, *NOTES)
        return Pruned(
            analysis=require_file(self.folder / "analysis.onnx", "the analysis of a run").read_bytes(),
            groups=Groups.load(self.folder / "groups.json"),
            keep=load_masks(self.folder / "masks.safetensors"),
            merges=load_merges(self.folder / "merges.safetensors"),
            dense=read_safetensors(self.folder / "dense.safetensors")[0],
            weights=read_safetensors(self.folder / "weights.safetensors")[0],
            **notes,
        )

    def has_begun(self) -> bool:
        """Return whether the folder is that of a run which is being pruned."""
        return (self.folder / BEGUN).exists()

    def is_of_this_recipe(self) -> bool:
        """Return whether a run of this recipe is being pruned."""
        theirs = read_json(self.folder / BEGUN) if self.has_begun() else None
        return isinstance(theirs, dict) and theirs.get("fingerprint") == plain(self.fingerprint)

    def _part(self, file: str, *keys: str) -> dict[str, Any]:
        """Return these entries of a JSON file in the folder."""
        document = read_json(self.folder / file)
        try:
            return {key: document[key] for key in keys}
        except (KeyError, TypeError) as error:
            raise InputError(
                f"'{self.folder / file}' does not say what was pruned ({one_line(error, 80)}); remove '{self.folder}'"
            ) from error

    def remove(self) -> None:
        """Remove the folder: its training is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


METHOD = "method"
"""The folder of the method's own training, which may go on before anything is chosen."""

LOG = "log.jsonl"
EVENTS = "tensorboard"
FINETUNING = "finetune"


class TrainingLog:
    """What every epoch of every training of a run gave, written as they come.

    Args:
        folder: gets ``log.jsonl``, a line an epoch, whole after every one; and with TensorBoard its events.
        tensorboard: whether to write those.
        entries: what is known already, of a run that goes on.

    Attributes:
        what: what trains now, ``method`` or ``finetune``.

    Raises:
        InputError: if TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, entries: list[dict[str, Any]]) -> None:
        self.what = "method"
        self.entries = list(entries)
        self._goes_on = False
        self._folder = folder
        self._open = _event_writer() if tensorboard else None
        self._writer: Any = None
        if not entries:
            shutil.rmtree(folder / EVENTS, ignore_errors=True)

    def note(self, result: EpochResult) -> None:
        """Write down an epoch."""
        new = entry(self.what, result)
        if not self._goes_on:  # what is known of this epoch and later ones is done again after a kill
            self._goes_on = True
            self.entries = [one for one in self.entries if one["what"] != self.what or one["epoch"] < result.epoch]
        self.entries.append(new)
        write_log(self._folder / LOG, self.entries)
        if self._open is not None:
            self._writer = self._writer or self._open(str(self._folder / EVENTS))
            for name in ("loss", "holdout_top1", "holdout_loss", "lr"):
                step = sum(one["what"] == self.what for one in self.entries)
                self._writer.add_scalar(f"{self.what}/{name}", new[name], step)
            self._writer.flush()

    def close(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            self._writer.close()


def entry(what: str, result: EpochResult) -> dict[str, Any]:
    """Return an epoch as the log and the report have it."""
    return {
        "what": what,
        "epoch": result.epoch,
        "loss": result.loss,
        "holdout_top1": result.holdout.top1,
        "holdout_loss": result.holdout.loss,
        "lr": result.lr,
        "seconds": round(result.seconds, 3),
    }


def write_log(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write epochs as JSON, one a line."""
    write_bytes(path, "".join(json.dumps(plain(one)) + "\n" for one in entries).encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the epochs in a log; none if there is no log."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _event_writer() -> Any:
    """Return what makes a writer of TensorBoard's events into a folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "tensorboard is not installed; pip install 'prune2deploy[tensorboard]', or leave it out of the recipe"
        ) from error
    return SummaryWriter
