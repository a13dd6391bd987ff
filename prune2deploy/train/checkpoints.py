"""Where a training stands, on disk: one safetensors file, whole or absent, that any kill leaves readable."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune2deploy import __version__
from prune2deploy.errors import InputError, one_line
from prune2deploy.files import remove_parts, write_bytes

FILE = "training.safetensors"
_KEY = "training"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a training needs to go on as if nothing had happened.

    Attributes:
        tensors: name -> tensor; the network's, the optimizer's, the average's, and the state of the random numbers.
        facts: the rest, as JSON values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The folder of one training's checkpoint.

    Attributes:
        folder: holds the file `FILE`.
        fingerprint: what the training is, as JSON values; one of another fingerprint is not gone on with.
    """

    folder: Path
    fingerprint: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint in place of the earlier one, which stays if anything goes wrong.

        Raises:
            InputError: if the folder cannot be written to or the disk is full.
        """
        from safetensors.torch import save

        document = {"fingerprint": self._own(), "facts": checkpoint.facts}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
        data = save(tensors, metadata={_KEY: json.dumps(document, sort_keys=True)})
        remove_parts(self.path)
        write_bytes(self.path, data)

    def load(self) -> Checkpoint | None:
        """Return the last whole checkpoint; None where there is none yet.

        Raises:
            InputError: if it is damaged, or of another training.
        """
        from safetensors import SafetensorError, safe_open

        if self.folder.is_dir():
            remove_parts(self.path)
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as stream:
                document = json.loads((stream.metadata() or {})[_KEY])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            facts, theirs = document["facts"], document["fingerprint"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"'{self.path}' is not a whole checkpoint ({one_line(error, 120)}); remove it to train anew"
            ) from error
        require_same(theirs, self._own(), self.path)
        return Checkpoint(tensors, facts)

    def _own(self) -> dict[str, Any]:
        own: dict[str, Any] = json.loads(json.dumps({"version": __version__, **self.fingerprint}))
        return own


def require_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    """Require that a checkpoint was made by what wants to go on with it.

    Raises:
        InputError: naming the first thing that differs.
    """
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if theirs.get(name) != ours.get(name):
            raise InputError(
                one_line(
                    f"'{path}' is a checkpoint of another training: its {name} is {theirs.get(name)!r} where this one "
                    f"has {ours.get(name)!r}; remove it to train anew",
                    400,
                )
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors that an optimizer keeps, named by the number of the parameter and what they are."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, entry in state.items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def set_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the tensors that `optimizer_tensors` returned, laid out in memory as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        laid_out = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape and value.ndim else value
        entries.setdefault(int(number), {})[name] = laid_out.detach()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
