"""FBS: channels that are weighed and suppressed anew for each image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

import numpy as np

from prune2deploy.budget import Budget
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.methods.base import (
    NO_CONTEXT,
    Context,
    Method,
    Needs,
    PruneResult,
    Range,
    Weights,
    plan_report,
)
from prune2deploy.methods.fbs_cost import ROUNDING, Wiring, find_places
from prune2deploy.methods.fbs_report import (
    holdout_top1,
    mean_cost,
    mean_scores,
    observed,
    static_report,
    used_channels,
    warnings,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune2deploy.train import Task
    from prune2deploy.train.boosting import Boosted, Place, Usage

_TRUNCATED = 0.05
"""The deviation from which the authors' code draws Phi, cut off at twice as much."""


@final
@dataclass(frozen=True)
class FBS(Method):
    """Weigh a layer's channels for each image, and skip all but the k best (Gao et al., ICLR 2019, arXiv 1810.05331).

    Dynamic Channel Pruning: Feature Boosting and Suppression, by Xitong Gao, Yiren Zhao, Lukasz Dudziak, Robert
    Mullins and Cheng-Zhong Xu; after the authors' code and two re-implementations (of the paper the abstract was read).
    Of the mean s of abs(x) over a convolution's input map a small matrix makes saliencies, g = relu(s Phi + rho); of
    each image's g the k largest are kept, and the layer gives ``relu((m g) norm(conv(x)) + m beta)``. The loss gets
    ``strength`` times the mean sum of g. Training starts with all channels, and density falls by ``step`` every
    ``epochs`` epochs until k channels of every layer meet the target.

    The network keeps its gates, and all of its weights: nothing is removed. What is met is the mean number of MACs of
    an image, predictors included, for a runtime that skips what is suppressed; ONNX Runtime and TensorRT skip nothing.
    In a sum every addend drops channels of its own, so what reads the sum reads all of it.

    Ours: rho starts as the norm's scale and beta as its shift, so that with Phi = 0 the network is what it was; k from
    the target; a depthwise convolution has the mask of the layer before it; the epochs and the optimizer. The code's
    training of predictors alone, before the rest, is left out. Channels that tie at the limit are all suppressed, as in
    the code, so saliencies of 0 never count among the k.

    Attributes:
        predictor: how Phi starts: ``normal`` (truncated, deviation 0.05: the authors' code), ``kaiming`` (the
            re-implementations; so large that the maps of a deep residual network can grow without bound) or ``zero``,
            which easily stays one mask for all images.
        rho: how rho starts: the norm's ``scale``, or ``one`` as in the code, whose norms have no scale.
        shift: ``masked``: m beta (the code's default), or ``boosted``: m g (norm + beta), as re-implemented.
        strength: of the penalty on saliencies.
        step: by how much density falls at a time.
        epochs: at each density.
        last_epochs: at the last one, where it stays.
        learning_rate: highest one.
        images: how many at most the mean cost is measured on.
        static: fold the gates to their averages when they are trained, and remove the channels that none of those
            images uses. That is another method, not FBS; its cost is not held to the target, and is reported.
        seed: of Phi.
    """

    needs: ClassVar[Needs] = Needs(data=True, labels=True, pretrained=True, trains_weights=True, norms=True)
    adds_modules: ClassVar[bool] = True

    predictor: Literal["normal", "kaiming", "zero"] = "normal"
    rho: Literal["scale", "one"] = "scale"
    shift: Literal["masked", "boosted"] = "masked"
    strength: Annotated[float, Range(low=0)] = 1e-8
    step: Annotated[float, Range(low=0.01, high=1)] = 0.1
    epochs: Annotated[int, Range(low=1)] = 4
    last_epochs: Annotated[int, Range(low=1)] = 16
    learning_rate: Annotated[float, Range(low=1e-8)] = 0.02
    images: Annotated[int, Range(low=1)] = 2048
    static: bool = False
    seed: Annotated[int, Range(low=0)] = 0

    def rebuild(self, module: "nn.Module", groups: Groups) -> None:
        """Add the gates in place, all channels active: the network computes the same. Under ``static`` do nothing.

        Raises:
            InputError: if no convolution can be gated.
        """
        from prune2deploy.train.boosting import boost

        if not self.static:
            boost(module, find_places(module, groups)[0], boosts_bias=self.shift == "boosted")

    def prepare(self, module: "nn.Module", groups: Groups, budget: Budget) -> "State":
        """Add the gates in place, with Phi and rho as they start, all channels active.

        Raises:
            InputError: if the budget is not one that densities can meet, or no convolution can be gated.
        """
        from prune2deploy.train.boosting import boost, boosted_layers

        _require_budget(budget)
        if self.predictor == "zero" and self.rho == "one":
            raise InputError("method 'fbs': with predictor=zero and rho=one all saliencies are equal; give rho=scale")
        places, wiring = find_places(module, groups)
        final = _counts(wiring, budget)
        boost(module, places, boosts_bias=self.shift == "boosted")
        gates = boosted_layers(module)
        self._start(gates)
        lowest = min(count / wiring.gates[path].channels for path, count in final.items())
        return State(wiring, gates, final, _densities(lowest, self.step), places)

    def _start(self, gates: "Mapping[str, Boosted]") -> None:
        """Draw Phi, and set rho."""
        import torch
        from torch.nn import init

        generator = torch.Generator().manual_seed(self.seed)
        for gate in gates.values():
            phi = torch.zeros(gate.predictor.weight.shape)
            if self.predictor == "normal":
                init.trunc_normal_(phi, std=_TRUNCATED, a=-2 * _TRUNCATED, b=2 * _TRUNCATED, generator=generator)
            elif self.predictor == "kaiming":
                init.kaiming_normal_(phi, generator=generator)
            with torch.no_grad():
                gate.predictor.weight.copy_(phi)
                if self.rho == "one":
                    gate.predictor.bias.fill_(1.0)

    def penalty(self, state: "State") -> "Tensor | float":
        """Return ``strength`` times the sum over layers of the mean over images of the sum of saliencies."""
        sums = [
            gate.choice.saliencies.float().sum(1).mean()
            for gate in state.gates.values()
            if gate.choice.saliencies is not None
        ]
        total: Tensor | float = self.strength * sum(sums[1:], sums[0]) if sums else 0.0
        return total

    def epoch_end(self, state: "State", epoch: int) -> None:
        """Lower the density of every gate that is not at its last one."""
        reached = state.densities[min((epoch + 1) // self.epochs, len(state.densities) - 1)]
        for path, gate in state.gates.items():
            gate.activate(max(state.final[path], _ceil(reached * state.wiring.gates[path].channels)))

    def training(self, state: "State") -> dict[str, Any]:
        """Return the epochs over all densities, and the learning rate."""
        epochs = self.epochs * (len(state.densities) - 1) + self.last_epochs
        return {"epochs": epochs, "lr": self.learning_rate}

    def fit(self, module: "nn.Module", groups: Groups, budget: Budget, task: "Task") -> "State":
        """Train the gated network in place; under ``static`` fold its gates then. Errors are those of `prepare`."""
        from prune2deploy.train.boosting import fold

        state: State = super().fit(module, groups, budget, task)
        if self.static:
            state.usage, _ = observed(module, state.wiring, task.images(self.images), self.images)
            fold(module, state.places, state.usage)
        return state

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> mean of m g over the images, float64 [channels]; of several layers each by its average.

        Groups without gates are left out. Nothing is chosen by these scores.

        Raises:
            InputError: if there are no images, or the gates were not trained.
        """
        state = _state(context)
        usage = state.usage
        if usage is None:
            module, images = context.network("fbs")
            usage, _ = observed(module, state.wiring, images, self.images)
        return mean_scores(state.wiring, usage)

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return masks that keep everything, and what the gates cost and do; under ``static`` masks of used channels.

        Raises:
            InputError: if there are no images, or the gates were not trained down to the budget.
        """
        state = _state(context)
        if self.static:
            if state.usage is None:
                raise InputError(
                    "method 'fbs' folds gates (static=true) that it trained itself: use 'p2d prune' or fit()"
                )
            keep = used_channels(state.wiring, state.usage, budget)
            report = plan_report(groups, budget, keep)
            return PruneResult(keep, report=report | static_report(state.usage, report["share"]["macs"], budget))
        module, images = context.network("fbs")
        active = {path: gate.active for path, gate in state.gates.items()}
        if any(active[path] > count for path, count in state.final.items()):
            raise InputError(f"method 'fbs' is not at its density yet; train {self.training(state)['epochs']} epochs")
        usage, dense = observed(module, state.wiring, images, self.images)
        keep = {group.id: np.ones(group.size, dtype=np.bool_) for group in groups.groups}
        cost = mean_cost(state.wiring, usage, dense)
        accuracy = holdout_top1(module, usage, context)
        report = plan_report(groups, budget, keep) | {
            "mean_macs": cost,
            "active": active,
            "densities": state.densities,
            "distinct_masks": {path: found.distinct for path, found in usage.items()},
            "holdout_top1": accuracy,
            "added_macs": state.wiring.predictor_macs,
            "warnings": warnings(cost, usage, accuracy, budget),
        }
        return PruneResult(keep, report=report)


@dataclass(eq=False)
class State:
    """What training changes.

    Attributes:
        wiring: what is gated, and what it costs.
        gates: the boosted layers by path.
        final: path -> how many channels are active in the end.
        densities: from 1 down, one for every stage.
        places: where the gates are.
        usage: what the gates chose before they were folded; None unless they are.
    """

    wiring: Wiring
    gates: "Mapping[str, Boosted]"
    final: Mapping[str, int]
    densities: list[float]
    places: "list[Place]"
    usage: "Mapping[str, Usage] | None" = field(default=None)


def _state(context: Context) -> State:
    if not isinstance(context.state, State):
        raise InputError("method 'fbs' needs gates that were trained; give --data, so that they are")
    return context.state


def _require_budget(budget: Budget) -> None:
    if budget.target is not None and budget.target.kind == "params":
        raise InputError(
            f"method 'fbs' keeps all parameters, so target {budget.target} cannot be met; give macs=SHARE: the mean "
            "over images"
        )
    if budget.round_to > 1:
        raise InputError("method 'fbs' removes no channel, so there are no widths to round; leave --round-to out")
    if budget.ranking == "global":
        raise InputError("method 'fbs' has one density for all layers; leave ranking = \"global\" out")


def _ceil(value: float) -> int:
    return max(1, math.ceil(value - ROUNDING))


def _densities(lowest: float, step: float) -> list[float]:
    """Return 1, 1 - step, ... and the lowest."""
    count = _ceil((1 - lowest) / step) if lowest < 1 else 0
    return [1 - step * index for index in range(count)] + [lowest]


def _counts(wiring: Wiring, budget: Budget) -> dict[str, int]:
    """Return how many channels of every gate are active: of the given widths, or of the largest common density.

    Raises:
        InputError: if the smallest density is too much.
    """
    lowest = _lowest(wiring, budget)
    if budget.target is None:
        return lowest
    sizes = {path: gate.channels for path, gate in wiring.gates.items()}

    def at(density: float) -> dict[str, int]:
        return {path: max(lowest[path], _ceil(density * size)) for path, size in sizes.items()}

    # the cost changes only where a layer gains a channel
    steps = sorted({count / size for size in sizes.values() for count in range(1, size + 1)})
    low, high = -1, len(steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wiring.share(at(steps[middle])) <= budget.target.share else (low, middle)
    if low < 0:
        least = math.ceil(wiring.share(at(0.0)) * 1e4) / 1e4
        raise InputError(
            f"target {budget.target} cannot be met by method 'fbs'; the smallest reachable is macs={least:g}, "
            "predictors included: raise the target, or drop a --keep"
        )
    return at(steps[low])


def _lowest(wiring: Wiring, budget: Budget) -> dict[str, int]:
    """Return how many channels of every gate are active at least; given widths say exactly how many."""
    groups = wiring.groups
    if budget.widths is not None:
        widths = groups.full_widths() | budget.exact_widths(groups)
    else:
        widths = {
            group.id: min(group.size, max(budget.min_keep, budget.floors.get(group.id, 1))) for group in groups.groups
        }
    known = groups.layer_by_name
    return {path: int(known[gate.layer].out_width.at(widths)) for path, gate in wiring.gates.items()}
