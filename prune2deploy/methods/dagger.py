"""Dagger: gates that a small module makes of the weights, trained against the cost."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

import numpy as np

from prune2deploy.budget import Budget, Ranking
from prune2deploy.groups import Group, Groups
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, PruneResult, Range, Weights
from prune2deploy.methods.gates import (
    Gated,
    Gates,
    Trained,
    aim,
    as_arrays,
    filters_of,
    folded,
    holdout_accuracy,
    main_directions,
    scaled_together,
    soft_share,
    train_gates,
    trained,
    warn_if_fallen,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune2deploy.train import Task

_OPEN = 3.0
"""The last bias at the start, which makes every gate sigmoid(3) = 0.953."""


@final
@dataclass(frozen=True)
class Dagger(Method):
    """Train a small module that makes gates of the weights, and keep the channels of the largest gates.

    Su, You, Huang, Wang, Qian, Zhang, Xu: Data Agnostic Filter Gating for Efficient Deep Networks, ICASSP 2022, arXiv
    2010.15041. Of the paper the abstract was read: the module takes pretrained weights and not feature maps, so that
    gates do not vary with the images, and a regulariser that knows the cost pulls towards the target. Reconstructed is
    all else: a filter's features are the means over its taps, standardised within its layer, and one hidden layer with
    ReLU and a sigmoid make them a gate. The network is frozen, in eval mode, and the module is trained by Adam on ::

        cross-entropy + strength * relu(F(gates) / F(dense) - target) / (1 - target)

    where F is the cost (MACs or parameters, as the target says) at the widths that the gates add up to. Then all gates
    compete, and the largest that the target allows stay.

    Ours: the layers that make a group's channels are put side by side, depthwise ones among them, and share its gates;
    the module's first weights start along its filters' main directions, so that the order of channels does not matter;
    where widths are given, the gates are driven to the MACs of these. Filters with equal features get equal gates, and
    the first stay. Trained are the gates alone: gates and weights together would let a whole layer's gates fall at no
    cost, as the norms behind it make up for the scale.

    What the gates say and what is left when they become masks are two things: fine-tune. The report has both, as costs
    and as accuracies on held-out images.

    Attributes:
        epochs: of the training of the gates; 1 or more.
        strength: of the pull to the target; 1 to 4 suit, at 16 all gates of the digits' network fell together.
        hidden: width of the hidden layer; 1 or more.
        gate_learning_rate: learning rate of Adam; above 0. Masks at 0.05 were less steady than at 0.01.
        batch_size: images a step; 1 or more.
        fold: multiply the gates of the kept channels into the weights that read them, so that the network starts
            fine-tuning as it was gated; else the gates only choose.
    """

    needs: ClassVar[Needs] = Needs(data=True, labels=True, pretrained=True)
    ranking: ClassVar[Ranking] = "global"
    phases: ClassVar[bool] = True

    epochs: Annotated[int, Range(low=1)] = 12
    strength: Annotated[float, Range(low=0, high=100)] = 2.0
    hidden: Annotated[int, Range(low=1)] = 32
    gate_learning_rate: Annotated[float, Range(low=1e-6, high=1)] = 0.01
    batch_size: Annotated[int, Range(low=1)] = 64
    fold: bool = True

    def fit(self, module: "nn.Module", groups: Groups, budget: Budget, task: "Task") -> Trained:
        """Train the gates for this budget; no weight and no statistic of the network changes.

        Raises:
            InputError: if the budget cannot be met, or the loss stops being a number.
        """
        import torch

        from prune2deploy.apply import weights_of

        kind, target = aim(groups, budget)
        module.to(task.device)
        weights = weights_of(module)
        dtype = next(module.parameters()).dtype
        gate_module = GateModule(weights, groups, hidden=self.hidden, seed=task.seed, dtype=dtype, device=task.device)
        optimizer = torch.optim.Adam(gate_module.parameters, lr=self.gate_learning_rate)
        gated = Gated(module, groups)

        def penalty(gates: Gates) -> "Tensor":
            return self.strength * (soft_share(groups, kind, gates) - target).relu() / ((1 - target) or 1.0)

        losses = []
        for epoch in range(1, self.epochs + 1):
            task.note(f"training the gates, epoch {epoch} of {self.epochs}")
            how = {"batch_size": self.batch_size, "epoch": epoch, "epochs": self.epochs}
            losses.append(train_gates(gated, task, optimizer, gate_module.gates, penalty, **how))
        gates = gate_module.gates()
        arrays = as_arrays(gates)
        task.note("measuring the accuracy of the gated network")
        report: dict[str, Any] = {
            "soft_share": {each: float(soft_share(groups, each, gates).detach()) for each in ("macs", "params")},
            "dense_top1": task.accuracy(module).top1,
            "soft_top1": holdout_accuracy(module, task, groups, folded(weights, groups, arrays)),
            "losses": losses,
        }
        warn_if_fallen("dagger", report["soft_share"][kind], target)
        return Trained(arrays, report)

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return the gates that `fit` trained, group id -> float64 [channels], between 0 and 1.

        Raises:
            InputError: if `fit` was not called.
        """
        return dict(trained(context, "dagger").gates)

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return the masks of the largest gates, and the weights with the gates in them where ``fold`` says so.

        The report's ``hard_top1`` is the accuracy of the masked network on held-out images, where there are some.

        Raises:
            InputError: if `fit` was not called, or the budget cannot be met.
        """
        result = super().plan(weights, groups, budget, context)
        state = trained(context, "dagger")
        removes = any(not mask.all() for mask in result.keep.values())  # else the network stays as it is, bit for bit
        new = folded(weights, groups, state.gates) if self.fold and removes else {}
        report = result.report | state.report | {"fold": self.fold}
        report["hard_top1"] = _masked_top1(context, groups, replace(result, weights=new))
        return replace(result, weights=new, report=report)


def _masked_top1(context: Context, groups: Groups, result: PruneResult) -> float | None:
    if context.module is None or context.holdout is None:
        return None
    from prune2deploy.apply import apply_masks, set_weights
    from prune2deploy.train import measure

    copy = deepcopy(context.module)
    set_weights(copy, result.weights)
    apply_masks(copy, groups, result.keep)
    return float(measure(copy, context.holdout).top1)


class GateModule:
    """What makes gates of weights: for every prunable group a hidden layer and one output, over its filters' features.

    Args:
        weights: the network's.
        groups: its groups.
        hidden: width of the hidden layers.
        seed: of the first weights.
        dtype: of the parameters and gates.
        device: where they are.
    """

    def __init__(
        self, weights: Weights, groups: Groups, *, hidden: int, seed: int, dtype: Any = None, device: Any = None
    ) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)

        def tensor(values: np.ndarray) -> "Tensor":
            return torch.from_numpy(values).to(device=device, dtype=dtype)

        self._features: dict[str, Tensor] = {}
        self._layers: dict[str, tuple[Tensor, ...]] = {}
        for group in groups.prunable:
            features, directions = features_of(weights, group)
            drawn = torch.randn((directions.shape[1], hidden), generator=generator, dtype=torch.float64).numpy()
            self._features[group.id] = tensor(features)
            start = (
                directions @ drawn / max(1, features.shape[1]) ** 0.5,
                *(np.zeros(hidden), np.zeros((hidden, 1)), np.full(1, _OPEN)),
            )
            self._layers[group.id] = tuple(tensor(values).requires_grad_(True) for values in start)

    @property
    def parameters(self) -> "list[Tensor]":
        """All that is trained."""
        return [parameter for layer in self._layers.values() for parameter in layer]

    def gates(self) -> "dict[str, Tensor]":
        """Return group id -> sigmoid(relu(f U1 + u1) U2 + u2), [channels]."""
        return {
            group: ((self._features[group] @ into + shift).relu() @ out + last).sigmoid()[:, 0]
            for group, (into, shift, out, last) in self._layers.items()
        }


def features_of(weights: Weights, group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of a group's filters, [channels, features], and their `main_directions`.

    Means over the taps, layer by layer in units of the deviation of all of a layer's, less their mean over the filters.
    The directions are those before the mean is taken away: with two filters nothing else would tell them apart.
    """
    parts = filters_of(weights, group, taps=False)
    together = scaled_together(parts, [float((part - part.mean(axis=0)).std()) for part in parts])
    return together - together.mean(axis=0), main_directions(together)
