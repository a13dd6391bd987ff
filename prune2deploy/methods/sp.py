"""SP: stage-wise pruning, by a super-network whose stages are judged one by one."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import numpy as np

from prune2deploy.budget import Budget, Target
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, PruneResult, Range, Weights, plan_report
from prune2deploy.methods.l1 import L1
from prune2deploy.methods.norms import masked_and_measured, statistics_of
from prune2deploy.methods.stages import Stage, best_widths, find_stages, width_choices
from prune2deploy.methods.supernet import SuperNet, measured_losses

if TYPE_CHECKING:
    from torch import nn

    from prune2deploy.train import Task


@final
@dataclass(frozen=True)
class SP(Method):
    """Train a network and its narrower ones with the same weights, and search widths stage by stage (Zhang, Ou, 2020).

    Stage-wise Channel Pruning for Model Compression, arXiv 2011.04908 (Mingyang Zhang, Linlin Ou; later with Xinyi Yu
    and Jingtao Rong). Read: the abstracts: the network is split into stages, the full network supervises training and
    search of the narrower ones, whose quality under shared weights is the proxy; every step trains the full, the tiny
    and a random network. Reconstructed, since the paper's text could not be read: all the losses.

    - Narrower networks keep the first channels of each group, ``1/steps, 2/steps ... 1`` of them.
    - The loss is the full network's cross-entropy, and for the tiny and a random network and each stage
      ``|F_sub - F_full|^2 / |F_full|^2``, where F is what the stage gives; for the last stage KL(full || sub) of the
      logits. F_full takes no gradient. Every stage is fed what the full network's stage before it gives.
    - A stage's proxy is that loss on held-out images, its norms measured anew; the proxies are added.

    Ours: a stage is what lies between two tensors that stay whole because several layers add to them (one residual
    block); a row of layers without such tensors is cut after every ``longest`` groups. F is what the layers that read
    the stage give, behind their norms; there the full network's features are put in place, so that additions and
    shortcuts behind it are the full network's. Dynamic programming searches in place of evolution. Channels are sorted
    first, by the L1 norm of their filters as given, so that the first ones are the largest: without that, and without
    training, "first" means nothing. What the choices leave of the budget is filled, channel by channel. Only groups
    that one layer makes are narrowed. The result has its norms measured anew, as the proxies do: those of the full
    network do not fit a narrower one.

    How well the proxy ranks was measured by ``tools/rank_sp.py``: over 20 slices of half the MACs of one super-network
    on the digits, each trained for 3 epochs, its Spearman correlation is 0.74 with the loss on test images and -0.73
    with top-1 (``models/bench/rank_sp.json``).

    Attributes:
        epochs: of training the super-network, from the weights that it has; 0 judges the network as it is.
        learning_rate: highest learning rate of that training.
        steps: how many widths each group may have.
        longest: groups in a row that make one stage at most; a stage has up to ``steps ** longest`` candidates.
        batches: of images on which norms are measured, and of held-out images that a proxy is taken on.
        seed: draws the random networks.
    """

    needs: ClassVar[Needs] = Needs(data=True, labels=True, trains_weights=True)
    phases: ClassVar[bool] = True

    epochs: Annotated[int, Range(low=0)] = 20
    learning_rate: Annotated[float, Range(low=0)] = 0.05
    steps: Annotated[int, Range(low=2, high=8)] = 4
    longest: Annotated[int, Range(low=1, high=3)] = 2
    batches: Annotated[int, Range(low=1)] = 30
    seed: Annotated[int, Range(low=0)] = 0

    def prepare(self, module: "nn.Module", groups: Groups, budget: Budget) -> "Trained":
        """Return the order of every group's channels; the network stays as it is."""
        from prune2deploy.apply import weights_of

        return Trained(channel_order(weights_of(module), groups))

    def training(self, state: "Trained") -> dict[str, Any]:
        """Return how long, and at which learning rate."""
        return {"epochs": self.epochs, "lr": self.learning_rate}

    def fit(self, module: "nn.Module", groups: Groups, budget: Budget, task: "Task") -> "Trained":
        """Train the network in place as a super-network, and return the order of its channels.

        Raises:
            InputError: if no group can be narrowed, the network's layers cannot be watched, or training diverges.
        """
        from prune2deploy.apply import weights_of

        state = self.prepare(module, groups, budget)
        if self.epochs:
            stages = self._stages(weights_of(module), groups)
            choices = width_choices(groups, _free(stages), self.steps, budget)
            with SuperNet(module, groups, stages, choices, state.order, self.seed) as supernet:
                task.train(module, loss=supernet.loss, **self.training(state))
            state.epochs = self.epochs
        return state

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]: 1 for the first channel of the order, falling evenly to 0."""
        order = context.state.order if context.state is not None else channel_order(weights, groups)
        return {group: _places(channels) for group, channels in order.items()}

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return the masks that keep the first channels, of the widths whose stages lose least together.

        Where the budget gives widths, or says how groups compete, nothing is searched. With them go the statistics that
        the norms of the masked network have on training images, where there are some and anything is removed.

        Raises:
            InputError: if there are no images, no group can be narrowed, or the target cannot be reached.
        """
        if budget.target is None or budget.ranking is not None:
            found = super().plan(weights, groups, budget, context)
        else:
            found = self._searched(weights, groups, budget, budget.target, context)
        if context.module is None or context.images is None or all(mask.all() for mask in found.keep.values()):
            return found
        images = _first(context.norm_images, self.batches)
        return replace(found, weights=statistics_of(masked_and_measured(context.module, groups, found.keep, images)))

    def _searched(
        self, weights: Weights, groups: Groups, budget: Budget, target: Target, context: Context
    ) -> PruneResult:
        module, images = context.network("sp")
        stages = self._stages(weights, groups)
        choices = width_choices(groups, _free(stages), self.steps, budget)
        state = context.state or Trained(channel_order(weights, groups))
        held_out = context.holdout if context.holdout is not None else images
        losses = measured_losses(
            module,
            groups,
            stages,
            choices,
            state.order,
            lambda: _first(context.norm_images, self.batches),
            lambda: _first(held_out, self.batches),
        )
        found = best_widths(stages, losses, groups, target)
        scores = {group: _places(state.order[group]) for group in found.widths}
        keep = replace(budget, floors=dict(budget.floors) | found.widths).masks(scores, groups)
        report = plan_report(groups, budget, keep) | {
            "ranking": "stages",
            "whole": [group.id for group in groups.prunable if group.id not in scores],
            "stages": [
                {
                    "groups": list(stage.groups),
                    "cuts": [cut.module for cut in stage.cuts],
                    "losses": [{"widths": list(widths), "loss": loss} for widths, loss in table.items()],
                }
                for stage, table in zip(stages, losses, strict=True)
            ],
            "searched": found.widths,
            "proxy": found.loss,
            "exact": found.exact,
            "warnings": _warnings(state, context),
        }
        return PruneResult(keep, report=report)

    def _stages(self, weights: Weights, groups: Groups) -> list[Stage]:
        stages = find_stages(weights, groups, self.longest)
        if not stages:
            raise InputError(
                "method 'sp' narrows groups that one layer makes, and this network has none that can be pruned; "
                "use 'l1' or another method that narrows all groups, or drop a --keep"
            )
        return stages


@dataclass(eq=False)
class Trained:
    """The order of each group's channels, first to last, int64 [channels]; and how long the super-network trained."""

    order: dict[str, np.ndarray]
    epochs: int = 0


def channel_order(weights: Weights, groups: Groups) -> dict[str, np.ndarray]:
    """Return group id -> its channels by the L1 norm of their filters, largest first, int64 [channels]."""
    return {group: np.argsort(-scores, kind="stable") for group, scores in L1().scores(weights, groups).items()}


def _places(order: np.ndarray) -> np.ndarray:
    """Return each channel's place as a score in [0, 1], the first channel's 1."""
    scores = np.empty(len(order))
    scores[order] = np.linspace(1.0, 0.0, len(order))
    return scores


def _free(stages: Iterable[Stage]) -> list[str]:
    return [group for stage in stages for group in stage.groups]


def _first(batches: Iterable[Any], count: int) -> Iterable[Any]:
    return islice(batches, count)


def _warnings(state: Trained, context: Context) -> list[str]:
    found = []
    if not state.epochs:
        found.append("the super-network was not trained: narrower networks are slices of one made for full width")
    if context.holdout is None:
        found.append("there are no held-out images, so the proxies were taken on training images")
    return found
