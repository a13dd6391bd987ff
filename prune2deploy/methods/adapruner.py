"""AdaPruner: widths from the scales of the norms, and the criterion that loses least at these widths."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, final

import numpy as np

from prune2deploy.budget import Budget
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
from prune2deploy.masks import Masks, widths
from prune2deploy.methods.base import (
    NO_CONTEXT,
    Context,
    Method,
    Needs,
    PruneResult,
    Range,
    Weights,
    of_channels,
    plan_report,
)
from prune2deploy.methods.bn import BN
from prune2deploy.methods.filters import in_scope
from prune2deploy.methods.fpgm import FPGM
from prune2deploy.methods.l1 import L1
from prune2deploy.methods.l2 import L2
from prune2deploy.methods.line import Line, bisected
from prune2deploy.methods.norms import masked_and_measured, statistics_of
from prune2deploy.methods.random import Random

if TYPE_CHECKING:
    from torch import Tensor, nn

_NOTHING_TRAINED = (
    "nothing was trained with the penalty, so the widths follow the scales of the network as it was given; "
    "their sizes mean little in themselves"
)
_NO_HOLDOUT = "there are no held-out images, so the criteria were compared on training images"

Scores = Mapping[str, np.ndarray]


@final
@dataclass(frozen=True)
class AdaPruner(Method):
    """Find widths by the norms' scales, and choose the criterion by trial (Liu, Cao, Yao, Sun, Zhang, 2021).

    AdaPruner: Adaptive Channel Pruning and Effective Weights Inheritance, arXiv 2109.06397. Read: the abstract, by
    which a block's importance is the mean of its norms' scales, bisection brings the widths to the budget, and an
    adaptive criterion chooses the filters. Reconstructed, since the paper's text could not be read:

    - the network is trained with ``strength * sum |scale|`` added to the loss;
    - a group of importance I keeps the share ``clip(t * I / largest I, least, 1)`` of its channels, with the largest t
      that meets the target; what one more step leaves is filled in the order in which t would grow;
    - the criteria are L1, L2, the scales, FPGM's distances, the expected activation (`methods.bn`), and random choice.
      Each makes a network of these widths, whose norms are measured anew, and the one that classifies held-out images
      best wins (of equals the one of less loss). That network is the result, with the norms that it was judged with.

    Scales can be compared between groups only behind that training: with a positively homogeneous activation, scale and
    shift can be multiplied, and the readers divided, by any number, and only the importance changes.

    Attributes:
        epochs: of training with the penalty; 0 takes the scales as they are.
        learning_rate: highest learning rate of that training.
        strength: of the penalty on each scale.
        least: the share that every group keeps.
        scope: ``inner``, as the paper's blocks: groups that one layer makes, so that a stage's output stays whole; or
            ``all``.
        batches: of training images that norms are measured on, before a criterion is judged.
        seed: of the random criterion.
    """

    needs: ClassVar[Needs] = Needs(data=True, labels=True, trains_weights=True, norms=True)

    epochs: Annotated[int, Range(low=0)] = 20
    learning_rate: Annotated[float, Range(low=0)] = 0.05
    strength: Annotated[float, Range(low=0)] = 1e-4
    least: Annotated[float, Range(low=0, high=1)] = 0.1
    scope: Literal["inner", "all"] = "inner"
    batches: Annotated[int, Range(low=1)] = 30
    seed: Annotated[int, Range(low=0)] = 0

    def prepare(self, module: "nn.Module", groups: Groups, budget: Budget) -> "SparseTraining":
        """Return the scales that the penalty holds small: those of the groups that may be narrowed.

        Raises:
            InputError: if none of these groups has a norm.
        """
        import torch

        from prune2deploy.apply import weights_of

        weights, tensors = weights_of(module), module.state_dict(keep_vars=True)
        places: dict[str, list[np.ndarray]] = {}
        for group in self._groups(weights, groups):
            for member in group.of_role("scale"):
                places.setdefault(member.parameter, []).append(member.indices.ravel())
        found = []
        for name, parts in places.items():
            scale = tensors[name]
            found.append((scale, torch.from_numpy(np.unique(np.concatenate(parts))).to(scale.device)))
        return SparseTraining(found)

    def penalty(self, state: "SparseTraining") -> "Tensor | float":
        """Return ``strength * sum |scale|``."""
        sums = [scale.index_select(0, places.to(scale.device)).abs().sum() for scale, places in state.scales]
        return self.strength * sum(sums[1:], sums[0]) if sums else 0.0

    def after_step(self, state: "SparseTraining") -> None:
        """Count the step."""
        state.steps += 1

    def resume(self, state: "SparseTraining", epochs: int, steps: int) -> None:
        """Count the steps before an interruption, too."""
        state.steps = steps

    def training(self, state: "SparseTraining") -> dict[str, Any]:
        """Return how long, and at which learning rate."""
        return {"epochs": self.epochs, "lr": self.learning_rate}

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> size of each channel's scale, mean over its norms, float64 [channels], for the scope.

        Its mean over a group is the group's importance.

        Raises:
            InputError: if no group of the scope has a norm.
        """
        return {group.id: _scales(weights, group) for group in self._groups(weights, groups)}

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return the masks of the criterion that won at the widths that the scales give, with the norms of its trial.

        So what the report says of held-out images is what the masked network does. Where nothing is removed, the norms
        stay as they are.

        Raises:
            InputError: if there are no images, no group has a norm, or the target cannot be reached.
        """
        module, images = context.network("adapruner")
        importance = {group: float(scale.mean()) for group, scale in self.scores(weights, groups, context).items()}
        structure = self._structure(importance, groups, budget)
        held_out = context.holdout if context.holdout is not None else images
        candidates, unusable = self._candidates(weights, groups, structure.widths)
        trials = {
            name: _trial(module, groups, masks, islice(context.norm_images, self.batches), held_out)
            for name, masks in candidates.items()
        }
        winner = max(trials, key=lambda name: (trials[name].top1, -trials[name].loss))
        trained = context.state is not None and context.state.steps > 0
        warnings = [] if trained else [_NOTHING_TRAINED]
        report = plan_report(groups, budget, candidates[winner]) | {
            "ranking": budget.ranking or "importance",
            "not_scored": [group.id for group in groups.prunable if group.id not in importance],
            "importance": importance,
            "t": structure.t,
            "criterion": winner,
            "holdout_top1": {name: trial.top1 for name, trial in trials.items()},
            "holdout_loss": {name: trial.loss for name, trial in trials.items()},
            "unusable": unusable,
            "warnings": warnings if context.holdout is not None else [*warnings, _NO_HOLDOUT],
        }
        whole = all(mask.all() for mask in candidates[winner].values())
        return PruneResult(candidates[winner], weights={} if whole else trials[winner].statistics, report=report)

    def _groups(self, weights: Weights, groups: Groups) -> list[Group]:
        """Return the groups of the scope that have a norm."""
        found = [
            group
            for group in groups.prunable
            if group.of_role("scale") and in_scope(weights, groups, group, self.scope)
        ]
        if groups.prunable and not found:
            raise InputError(
                "method 'adapruner' needs norms, but no group that it may narrow has one (they may be folded into the "
                "convolutions); use 'l1', or a network that has its norms, or --option scope=all"
            )
        return found

    def _structure(self, importance: Mapping[str, float], groups: Groups, budget: Budget) -> "Structure":
        """Return the widths, and the t that they come from where the budget is a target that it may meet its own way.

        A threshold on ``-(t that a channel needs)`` is t growing, so the budget's own search bisects and fills.
        """
        if budget.target is None:
            return Structure(budget.common_widths(groups), None)
        line = Line.of(importance, groups, budget, self.least)
        held = {group: width for group, width in line.lowest.items() if width > max(1, budget.min_keep)}
        floors = {**budget.floors, **held}
        with self._advice():
            masks = replace(budget, floors=floors).masks(line.scores(), groups, "global")
        t = None if budget.ranking else bisected(line, groups, budget)
        return Structure(widths(masks), t)

    @contextmanager
    def _advice(self) -> Iterator[None]:
        """Add to the refusal of a target what the method's own options have to do with it."""
        hints = [f"lower --option least={self.least:g}"] if self.least else []
        hints += ["give --option scope=all"] if self.scope == "inner" else []
        try:
            yield
        except InputError as error:
            raise InputError("; or ".join([str(error), *hints])) from error

    def _candidates(
        self, weights: Weights, groups: Groups, wanted: Mapping[str, int]
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
        """Return the masks of every criterion that scores all the groups that are narrowed, and why others do not."""
        exactly = Budget(None, widths={group.id: wanted[group.id] for group in groups.prunable})
        narrow = [group.id for group in groups.prunable if wanted[group.id] < group.size]
        found: dict[str, dict[str, np.ndarray]] = {}
        unusable = {}
        for name, criterion in CRITERIA.items():
            try:
                scores = criterion(weights, groups, self.seed)
                missing = [group for group in narrow if group not in scores]
                if missing:
                    unusable[name] = f"it does not score '{missing[0]}'"
                else:
                    found[name] = exactly.masks(scores, groups)
            except InputError as error:
                unusable[name] = str(error)
        return found, unusable


@dataclass(eq=False)
class SparseTraining:
    """What is penalised: norms' scales, each with the places in it; and how many steps were taken with it."""

    scales: "list[tuple[Tensor, Tensor]]" = field(default_factory=list)
    steps: int = 0


class Structure(NamedTuple):
    """Widths of all groups, and the t that they come from; None where they were given, or ranked as the user said."""

    widths: Mapping[str, int]
    t: float | None


def _scales(weights: Weights, group: Group) -> np.ndarray:
    """Return the size of each channel's scale, mean over the norms that carry it; float64 [channels]."""
    found = [np.abs(of_channels(weights, member)).mean(axis=1) for member in group.of_role("scale")]
    return np.asarray(np.mean(found, axis=0))


def _all_scales(weights: Weights, groups: Groups, seed: int) -> Scores:
    return {group.id: _scales(weights, group) for group in groups.prunable if group.of_role("scale")}


CRITERIA: Mapping[str, Callable[[Weights, Groups, int], Scores]] = {
    "l1": lambda weights, groups, _: L1().scores(weights, groups),
    "l2": lambda weights, groups, _: L2().scores(weights, groups),
    "scale": _all_scales,
    "fpgm": lambda weights, groups, _: FPGM().scores(weights, groups),
    "bn": lambda weights, groups, _: BN().scores(weights, groups),
    "random": lambda weights, groups, seed: Random(seed=seed).scores(weights, groups),
}
"""From weights, groups and a seed to scores; `AdaPruner` tries them all."""


class _Trial(NamedTuple):
    top1: float
    loss: float
    statistics: dict[str, np.ndarray]


def _trial(
    module: "nn.Module", groups: Groups, masks: Masks, calibration: Iterable[Any], held_out: Iterable[Any]
) -> _Trial:
    """Return how well the masked network classifies when its norms were measured anew, and what was measured."""
    from prune2deploy.train import measure

    masked = masked_and_measured(module, groups, masks, calibration)
    found = measure(masked, held_out)
    return _Trial(found.top1, found.loss, statistics_of(masked))
