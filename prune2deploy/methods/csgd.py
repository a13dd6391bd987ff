"""C-SGD: the channels of a cluster are trained until they are one, and then are merged without loss."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, final

import numpy as np

from prune2deploy.budget import Budget, hold
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
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
from prune2deploy.methods.clusters import Clusters, Deviation, deviations, kmeans, merged, with_largest
from prune2deploy.methods.filters import producers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune2deploy.apply import ChannelMeans
    from prune2deploy.train import Task

_STATISTICS_MOMENTUM = 0.1
"""Of the norms' running statistics, which follow the weights at this rate; torch's default."""

_SCHEDULE = tuple((1 + math.cos(math.pi * (step + 0.5) / 100)) / 2 for step in range(100))
"""The shares of the highest learning rate along a cosine schedule."""

_TINY = 1e-12


@final
@dataclass(frozen=True)
class CSGD(Method):
    """Pull the filters of a cluster together while training, then merge them (Ding et al., C-SGD, CVPR 2019).

    Centripetal SGD for Pruning Very Deep Convolutional Networks, arXiv 1904.03837, after the authors' code (the paper's
    text was not read). Filters are clustered once, by k-means, into as many clusters as a group may keep; then filter
    j of cluster H takes the step of the gradient

        mean over k in H of dL/dW_k  +  weight_decay * W_j  +  strength * (W_j - mean over k in H of W_k)

    and so do biases, and scales and shifts of norms, without decay. What the loss adds is the same for all of H, so
    whatever the data, W_i - W_j shrinks by ``1 - learning_rate * (weight_decay + strength)`` a step (with momentum by
    about ``1 - learning_rate * strength / (1 - momentum)``, by ``sqrt(momentum)`` at best). Once the channels of a
    cluster are equal, removing all but one and adding up the columns that read them changes nothing, so no fine-tuning
    is needed.

    Where several layers make a group (a residual stage), the first is clustered and the others follow; so do norms and
    depthwise convolutions. Ours: the channel that stays is the one of the cluster's largest filter (the code keeps the
    first; they are equal by then), the cosine schedule, and that biases learn at the rate of all else (the code doubles
    theirs). The paper comes to its widths in several rounds: prune with a wider target, then again with
    ``--weights RUN/weights.safetensors``; merged channels stay together.

    In a training loop of your own, give the parameters in ``training(state)["no_decay"]`` no weight decay: it is in the
    gradient already. ``learning_rate`` and ``momentum`` should be those of your optimizer, as the steps that are
    missing are predicted from them.

    Attributes:
        strength: the centripetal strength (the paper's epsilon); 3e-3 is the code's for ResNet-56, 0.05 for ResNet-50.
        vector_strength: of biases, norm scales and shifts, as a factor of ``strength``; a short training wants 1.
        clusters: ``kmeans`` of the flattened filters, or ``even``: neighbours.
        scope: ``all`` groups, or ``inner``: those that one layer makes, as the code does for ResNet-50.
        tolerance: largest deviation at which channels are merged, relative to the cluster (vectors other than running
            variances: to the typical value of their layer, since a shift may be 0).
        merge: ``converged`` refuses to merge before that; ``anyway`` merges the means, which loses accuracy.
        epochs: passes over the training images.
        learning_rate: highest of the cosine schedule.
        batch_size: images a step.
        weight_decay: of filters, also of layers that are not clustered.
        momentum: of SGD; Nesterov's where above 0.
        seed: of k-means.
    """

    needs: ClassVar[Needs] = Needs(data=True, labels=True, pretrained=True, trains_weights=True)

    strength: Annotated[float, Range(low=1e-6)] = 3e-3
    vector_strength: Annotated[float, Range(low=1e-3, high=100)] = 0.1
    clusters: Literal["kmeans", "even"] = "kmeans"
    scope: Literal["all", "inner"] = "all"
    tolerance: Annotated[float, Range(low=1e-12, high=1)] = 1e-5
    merge: Literal["converged", "anyway"] = "converged"
    epochs: Annotated[int, Range(low=0)] = 600
    learning_rate: Annotated[float, Range(low=1e-8)] = 3e-2
    batch_size: Annotated[int, Range(low=2)] = 64
    weight_decay: Annotated[float, Range(low=0)] = 1e-4
    momentum: Annotated[float, Range(low=0, high=0.999)] = 0.9
    seed: Annotated[int, Range(low=0)] = 0

    # --- training -----------------------------------------------------------------------------------------------------

    def prepare(self, module: "nn.Module", groups: Groups, budget: Budget) -> "State":
        """Return clusters for the budget, and what their parameters are to be pulled by; the module is not changed.

        Raises:
            InputError: if the target cannot be reached, groups are to compete, or parameters of a cluster are frozen.
            DeviceError: if scikit-learn is not installed.
        """
        from prune2deploy.apply import copies_of, weights_of

        if budget.ranking == "global":
            raise InputError("method 'csgd' clusters every group by itself; leave ranking = \"global\" out")
        weights = weights_of(module)
        trained = {name for name, tensor in module.named_parameters() if tensor.requires_grad}
        open_groups = self._prunable(weights, groups, trained)
        widths = budget.common_widths(open_groups)
        narrow = [group for group in open_groups.prunable if widths[group.id] < group.size]
        state = State(budget, {group.id: self._clustered(weights, groups, group, widths[group.id]) for group in narrow})
        for copied in copies_of(module, groups, state.merges):
            if copied.role in ("mean", "var"):
                continue
            if copied.name not in trained:
                raise InputError(f"method 'csgd' has to train '{copied.name}', which is frozen; let it take gradients")
            is_filter = copied.role == "filter"
            decay = self.weight_decay if is_filter else 0.0
            pull = self.strength * (1.0 if is_filter else self.vector_strength)
            state.parts.append(_Part(copied.name, copied.tensor, copied.means(), decay, pull))
        return state

    def after_backward(self, state: "State") -> None:
        """Replace the gradients of clustered parameters by the centripetal ones, in place."""
        import torch

        state.steps += 1
        with torch.no_grad():
            for part in state.parts:
                gradient, values = part.tensor.grad, part.tensor
                if gradient is not None:
                    pulled = part.means(gradient)
                    pulled.add_(values - part.means(values), alpha=part.pull).add_(values, alpha=part.decay)
                    gradient.copy_(pulled)

    def epoch_end(self, state: "State", epoch: int) -> None:
        """Count epochs, so that what is missing can be said in epochs."""
        state.epochs = epoch + 1

    def resume(self, state: "State", epochs: int, steps: int) -> None:
        """Count what was done before an interruption, too."""
        state.steps, state.epochs = steps, epochs

    def training(self, state: "State") -> dict[str, Any]:
        """Return the settings, with clustered parameters free of the optimizer's own weight decay."""
        return {
            "epochs": self.epochs,
            "lr": self.learning_rate,
            "batch_size": self.batch_size,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
            "no_decay": tuple(part.name for part in state.parts),
        }

    def fit(self, module: "nn.Module", groups: Groups, budget: Budget, task: "Task") -> "State":
        """Train as `TrainingHooks.fit`, unless the settings are such that it cannot end well.

        Raises:
            InputError: if the channels would be pulled beyond their mean, or there are too few steps for channels that
                differ by as much as they are large.
        """
        if self.learning_rate * max(self.strength + self.weight_decay, self.strength * self.vector_strength) > 1:
            raise InputError(
                f"method 'csgd' would pull channels beyond their mean: learning_rate {self.learning_rate:g} times "
                f"strength {self.strength:g} must be 1 at most, vector_strength included; give less of one"
            )
        images = len(task.data.train)
        per_epoch = images // min(self.batch_size, images)
        wanted = max(self._missing(role, 1.0, scheduled=True) for role in ("filter", "bias"))
        if self.merge == "converged" and self.epochs * per_epoch < wanted:
            raise InputError(
                f"method 'csgd' would not converge: its {self.epochs} epochs are {self.epochs * per_epoch:,} steps, "
                f"but about {wanted:,} are needed; give --option epochs={math.ceil(wanted / per_epoch)}, "
                "or more strength, vector_strength or learning_rate"
            )
        state: State = super().fit(module, groups, budget, task)
        return state

    # --- choosing -----------------------------------------------------------------------------------------------------

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels]: above 1 for the channels that stay, by the size of their clusters.

        The others have how far they were from the one that stays when the clusters were made, between 0 and 1.

        Raises:
            InputError: if there are no clusters, which training makes.
        """
        clusters = _state_of(context).clusters
        return {
            group.id: clusters[group.id].scores if group.id in clusters else np.ones(group.size)
            for group in groups.prunable
        }

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return the merges with the clusters' means, copied bit for bit onto all their channels.

        Raises:
            InputError: if there was no training, it was for another budget, or it has not converged.
        """
        state = _state_of(context)
        if state.budget != budget:
            raise InputError("method 'csgd' was trained for another budget; plan with the one that it was trained for")
        merges = state.merges
        found = sorted(deviations(weights, groups, merges), key=lambda one: -one.value)
        late = [one for one in found if one.value >= self.tolerance]
        if late and self.merge == "converged":
            raise InputError(self._not_converged(late, state))
        keep = {group.id: np.ones(group.size, dtype=np.bool_) for group in groups.groups}
        keep |= {group: kept == np.arange(len(kept)) for group, kept in merges.items()}
        own = {
            "merged": {group: int(len(kept) - keep[group].sum()) for group, kept in merges.items()},
            "deviation": found[0].value if found else 0.0,
            "deviation_of": found[0].parameter if found else None,
            "merged_before_convergence": bool(late),
            "steps": state.steps,
        }
        report = plan_report(groups, budget, keep) | own
        return PruneResult(keep, merges=merges, weights=merged(weights, groups, merges), report=report)

    def _not_converged(self, late: "list[Deviation]", state: "State") -> str:
        worst = late[0]
        steps = max(self._missing(one.role, one.value) for one in late)
        per_epoch = state.steps / state.epochs if state.epochs else 0
        scheduled = max(self._missing(one.role, one.value, scheduled=True) for one in late)
        epochs = f" (epochs={state.epochs + math.ceil(scheduled / per_epoch)})" if per_epoch else ""
        return (
            f"method 'csgd' has not converged: '{worst.parameter}' of group '{worst.group}' deviates by "
            f"{worst.value:.1e} in its clusters, {self.tolerance:g} is allowed; about {steps:,} more steps at learning "
            f"rate {self.learning_rate:g} are missing: train longer{epochs}, give more strength or vector_strength, "
            "or merge=anyway"
        )

    def _missing(self, role: str, deviation: float, *, scheduled: bool = False) -> int:
        """Return how many steps bring a deviation down to the tolerance, at the full rate or along the schedule."""
        rates = [self._rate(role, share) for share in (_SCHEDULE if scheduled else (1.0,))]
        return math.ceil(math.log(deviation / self.tolerance) * len(rates) / sum(rates))

    def _rate(self, role: str, share: float) -> float:
        """Return by how much a step lowers the logarithm of a deviation, at this share of the learning rate.

        With momentum m and x = learning rate * pull the deviation obeys Nesterov's recursion, whose roots are those of
        ``z^2 - (1 + m) (1 - x) z + m (1 - x)``. The larger one is about ``1 - x / (1 - m)`` for small x, and never
        below ``sqrt(m (1 - x))``: beyond that, more strength does not speed it up.
        """
        if role in ("mean", "var"):
            return -math.log1p(-_STATISTICS_MOMENTUM)
        pull = self.strength + self.weight_decay if role == "filter" else self.strength * self.vector_strength
        left = 1 - share * self.learning_rate * pull
        trace, product = (1 + self.momentum) * left, self.momentum * left
        root = (trace + math.sqrt(max(trace**2 - 4 * product, 0.0))) / 2
        return -math.log(max(root, math.sqrt(max(product, 0.0)), _TINY))

    # --- clusters -----------------------------------------------------------------------------------------------------

    def _prunable(self, weights: Weights, groups: Groups, trained: "set[str]") -> Groups:
        """Return the groups with those not prunable whose channels cannot become equal, or that are out of scope."""

        def reason(group: Group) -> str | None:
            makers = producers(weights, groups, group)
            constants = [one.parameter for one in group.of_role("constant") if one.parameter not in trained]
            if constants:
                return f"its channels meet the constant '{constants[0]}', which cannot be trained"
            if not makers or (self.scope == "inner" and len(makers) > 1):
                return f"{len(makers)} layers make it, outside of the scope '{self.scope}'"
            return None

        return hold(groups, {one.id: why for one in groups.groups if (why := reason(one)) is not None})

    def _clustered(self, weights: Weights, groups: Groups, group: Group, count: int) -> "Clusters":
        filters = of_channels(weights, producers(weights, groups, group)[0])
        if self.clusters == "even":
            labels = np.repeat(np.arange(count), [len(part) for part in np.array_split(filters, count)])
        else:
            labels = kmeans(filters, count, seed=self.seed)
        return with_largest(filters, labels)


class _Part(NamedTuple):
    """A parameter with clusters along one axis, and what it is pulled by."""

    name: str
    tensor: "Tensor"
    means: "ChannelMeans"
    decay: float
    pull: float


@dataclass(eq=False)
class State:
    """What training changes, and what it does it with.

    Attributes:
        budget: that the clusters were made for.
        clusters: of the groups that lose channels.
        parts: the parameters that are pulled together.
        steps: how many were done.
        epochs: how many are over.
    """

    budget: Budget
    clusters: dict[str, Clusters]
    parts: list[_Part] = field(default_factory=list)
    steps: int = 0
    epochs: int = 0

    @property
    def merges(self) -> dict[str, np.ndarray]:
        """Group id -> the channel that each channel merges into, int64 [channels]."""
        return {group: found.kept for group, found in self.clusters.items()}


def _state_of(context: Context) -> State:
    if not isinstance(context.state, State):
        raise InputError("method 'csgd' merges what it has trained; train with it first, by its fit() or its hooks")
    return context.state
