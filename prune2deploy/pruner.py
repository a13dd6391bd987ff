"""Pruning inside somebody's own training loop: one object, four calls a step, and the graph at the end."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prune2deploy.apply import MaskKeeper, MergeKeeper, apply_masks, fold_offsets, set_weights, weights_of
from prune2deploy.budget import Budget, Target, protect, resolve_floors
from prune2deploy.errors import InputError, one_line
from prune2deploy.groups import Groups
from prune2deploy.methods import load_method
from prune2deploy.methods.base import Context, Method, PruneResult
from prune2deploy.rounding import RoundTo, multiple_of
from prune2deploy.slim import slim_file

if TYPE_CHECKING:
    from torch import Tensor, nn

CALIBRATION_IMAGES = 1024
"""How many images of a calibration loader are kept for a method that chooses by data."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """What `Pruner.finish` did.

    Attributes:
        result: masks, merges and new weights, by group and parameter.
        groups: the network's groups, which the masks are of.
        warnings: what could not be done as the method wanted.
    """

    result: PruneResult
    groups: Groups
    warnings: tuple[str, ...]

    @property
    def masks(self) -> Mapping[str, np.ndarray]:
        """Group id -> bool [channels]; True keeps."""
        return self.result.keep

    @property
    def report(self) -> Mapping[str, Any]:
        """What the method says of its choice, as JSON values."""
        return self.result.report


class Pruner:
    """A method at work in a training loop.

    In every step add ``penalty()`` to the loss, call ``after_backward()`` between the gradients and the optimizer's
    step, and ``after_step()`` behind it; a method that needs none of this makes them do nothing. After ``finish`` the
    same calls keep what was pruned silent, so that the loop can go on as fine-tuning.

    Make it before the optimizer: some methods add modules to the network.

    Args:
        model: the network; it is changed in place.
        example_inputs: a tensor, or the inputs of ``forward``, on any device; the first axis is the batch.
        method: such as ``prune2deploy.methods.CSGD(strength=3e-3)``; a name stands for the method as it is by default.
        target: such as ``prune2deploy.Target(macs=0.5)`` or ``"macs=0.5"``.
        round_to: every tensor's width becomes a multiple of this, or of what a precision such as ``fp16`` wants, or
            stays full.
        keep: fnmatch patterns of parameters whose layers stay whole.
        floors: group ids, or patterns of these or of parameters, to their smallest width: a number, or a share.

    Raises:
        InputError: if the network cannot be analysed, the target cannot be met, or the method trains in phases.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Tensor],
        *,
        method: Method | str,
        target: Target | str,
        round_to: RoundTo = 1,
        keep: Sequence[str] = (),
        floors: Mapping[str, float] | None = None,
    ) -> None:
        method = load_method(method) if isinstance(method, str) else method
        target = Target.parse(target) if isinstance(target, str) else target
        if not isinstance(method, Method) or not isinstance(target, Target):
            raise InputError(
                f"a Pruner takes a method such as methods.L1() or 'l1' and a target such as Target(macs=0.5) or "
                f"'macs=0.5', not {one_line(repr(method), 60)} and {one_line(repr(target), 60)}"
            )
        name = type(method).__name__.lower()
        if method.phases:
            raise InputError(
                f"method '{name}' trains in phases of its own, so it cannot be part of a training loop; "
                f"use 'p2d prune ... --method {name}', or call its fit()"
            )
        self.model, self.method, self.name = model, method, name
        self.groups = protect(groups_of(model, example_inputs), keep)
        self.budget = Budget(target, multiple_of(round_to), resolve_floors(self.groups, floors or {}))
        self._state = method.prepare(model, self.groups, self.budget)
        self._epoch = 0
        self._masking: MaskKeeper | None = None
        self._merging: MergeKeeper | None = None

    def penalty(self) -> Tensor | float:
        """Return what is to be added to the loss of this step: a scalar."""
        return 0.0 if self._masking else self.method.penalty(self._state)

    def after_backward(self) -> None:
        """Edit the gradients, before the optimizer's step."""
        if self._merging is None:
            self.method.after_backward(self._state)
        else:
            self._merging.after_backward()

    def after_step(self) -> None:
        """Edit the weights, after the optimizer's step."""
        if self._masking is None or self._merging is None:
            self.method.after_step(self._state)
        else:
            self._masking()
            self._merging.after_step()

    def epoch_end(self) -> None:
        """Say that an epoch is over, for methods that change as they train."""
        if self._masking is None:
            self.method.epoch_end(self._state, self._epoch)
        self._epoch += 1

    def finish(
        self,
        calibration: Iterable[Any] | None = None,
        *,
        holdout: Iterable[Any] | None = None,
        images: int = CALIBRATION_IMAGES,
    ) -> Pruned:
        """Choose the channels, and silence or merge them in the model, in place.

        Args:
            calibration: batches of (images, labels) as the model takes them, or of images alone, for methods that
                choose by data; the first ``images`` of them are kept in memory.
            holdout: batches of others, which no training has seen, for methods that try choices against each other.
            images: how many of each.

        Raises:
            InputError: if the method needs data or labels that are not there, is not ready (C-SGD before it converged),
                or the target cannot be met; then the model is as it was.
        """
        if self._masking is not None:
            raise InputError("this model is pruned already; make another Pruner to prune it further")
        seen, unseen = (None if one is None else self._kept(one, images) for one in (calibration, holdout))
        was_training = self.model.training
        context = Context(self.model.eval(), seen, unseen, self._state)
        try:
            result = self.method.plan(weights_of(self.model), self.groups, self.budget, context)
        finally:
            self.model.train(was_training)
        set_weights(self.model, result.weights)
        silent = result.silent
        skipped = fold_offsets(self.model, self.groups, silent, result.offsets) if result.offsets else []
        apply_masks(self.model, self.groups, silent)
        self._masking = MaskKeeper(self.model, self.groups, silent)
        self._merging = MergeKeeper(self.model, self.groups, result.merges)
        self._merging.after_step()
        return Pruned(result, self.groups, (*skipped, *result.report.get("warnings", ())))

    def _kept(self, calibration: Iterable[Any], images: int) -> list[tuple[Tensor, Tensor | None]]:
        place = next(self.model.parameters()).device
        kept: list[tuple[Tensor, Tensor | None]] = []
        seen = 0
        for batch in calibration:
            parts = batch if isinstance(batch, tuple | list) else (batch,)
            labels = parts[1].to(place) if len(parts) > 1 else None
            if labels is None and self.method.needs.labels:
                raise InputError(f"method '{self.name}' needs labels; give batches of (images, labels)")
            kept.append((parts[0].to(place), labels))
            seen += len(parts[0])
            if seen >= images:
                break
        if not kept:
            raise InputError("the calibration data is empty; give batches of images")
        return kept


def groups_of(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> Groups:
    """Return a network's groups, from its unfused ONNX export; the model is not changed.

    Raises:
        InputError: if it cannot be exported.
    """
    from prune2deploy.exporter import export_network
    from prune2deploy.graph.groups import find_groups

    module, inputs = _on_cpu(model, example_inputs)
    return find_groups(export_network(module, inputs, fuse=False).model)


def export(
    model: nn.Module,
    pruned: Pruned,
    example_inputs: Tensor | Sequence[Tensor],
    path: Path | str,
    *,
    rtol: float = 1e-4,
) -> dict[str, Any]:
    """Write the slim ONNX graph of a pruned model, verified against the masked one.

    Args:
        model: as `Pruner.finish` left it, or trained on since then; it is not changed.
        pruned: what `Pruner.finish` returned.
        example_inputs: as for `Pruner`.
        path: the slim file; it takes its name only after it was verified.
        rtol: difference allowed, relative to each output channel's scale.

    Returns:
        ``macs``, ``parameters`` and ``bytes`` (each with ``before`` and ``after``), ``removed_channels`` and
        ``verify`` as in a run's report, and ``warnings``.

    Raises:
        InputError: if the model cannot be exported, or the file cannot be written.
        VerifyError: if the slim graph computes something else than the masked one.
    """
    from prune2deploy.exporter import export_network, require_agreement
    from prune2deploy.graph.model import save_model
    from prune2deploy.slim import Options, slim_section

    module, inputs = _on_cpu(model, example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        masked = Path(folder) / "masked.onnx"
        save_model(export_network(module, inputs, fuse=True).model, masked)
        require_agreement(module, masked, inputs)
        slimmed = slim_file(masked, Path(path), Options(rtol=rtol))
        section = slim_section(masked, Path(path), slimmed)
    found = {key: section[key] for key in ("macs", "parameters", "bytes", "removed_channels")}
    return found | {"verify": slimmed.proof, "warnings": list(pruned.warnings)}


def _on_cpu(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a copy of the model in eval mode on the CPU, and inputs with a batch of two or more."""
    given = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    inputs = tuple(one.detach().cpu() for one in given)
    doubled = tuple(torch.cat([one, one]) if one.ndim and len(one) == 1 else one for one in inputs)
    return copy.deepcopy(model).cpu().eval(), doubled
