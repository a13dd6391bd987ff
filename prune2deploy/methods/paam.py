"""PAAM: scores that attention among filters makes of the weights, trained in turn with the network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

import numpy as np

from prune2deploy.budget import Budget, Ranking, Target, TargetKind
from prune2deploy.errors import InputError
from prune2deploy.groups import Group, Groups
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, PruneResult, Range, Weights
from prune2deploy.methods.gates import (
    Gated,
    Gates,
    Silence,
    Trained,
    aim,
    as_arrays,
    filters_of,
    main_directions,
    scaled_together,
    soft_share,
    train_gates,
    trained,
    warn_if_fallen,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from prune2deploy.train import EpochResult, Task

_SLOPE = 0.01
"""Of the leaky exponential above 0."""


@final
@dataclass(frozen=True)
class PAAM(Method):
    """Prune while training, by scores that an attention network makes of the filters.

    Babaiee, Liebenwein, Hasani, Rus, Grosu: Pruning by Active Attention Manipulation, 2022, arXiv 2210.11114. Of the
    paper the abstract and a part of the method's section were read: attention makes the scores of the weights, for all
    layers together; a score multiplies its channel while the attention network is trained, and starts at 1; its
    activation is a leaky exponential; a global budget chooses the channels with which the network is trained.
    Reconstructed are the expressions. For the filters F of a group, in units of their mean length ::

        z_i = mean over j of v . tanh(F_i Q + a + F_j K) + b,  score_i = exp(z_i) below z = 0, else 1 + 0.01 z_i
        cross-entropy + strength * relu(F(scores) / F(dense) - share)

    where F is the cost (MACs or parameters, as the target says) at the widths that the scores, each 1 at most, add up
    to. In every epoch of the annealing the attention network is trained (Adam; the network is frozen, in eval mode),
    then channels are chosen anew, then the network is trained with the others silent (SGD, one cosine over all epochs).
    The share falls from 1 to the target on a line. A removed channel keeps its weights as they were and may come back;
    after the annealing the choice is final. (Trained together with the network, all scores of a layer would shrink at
    no cost, as the norms behind it make up for the scale.)

    Ours: the layers that make a group's channels are put side by side, depthwise ones among them, and share its scores;
    Q and K start along the filters' main directions, so that the order of channels does not matter; where widths are
    given, the scores are driven to the MACs of these; the paper's choice by the cumulative distribution of the scores
    is left out, as its expression could not be read: the scores of all groups compete.

    Attributes:
        start: ``pretrained``: from the weights that the network has, and channels go from the first epoch on; or
            ``scratch``, as the paper: all layers are drawn anew, and are trained whole for a while before. The first is
            the default since whoever prunes has mostly trained the network, which need not be done again.
        epochs: of the training of the network; 1 or more.
        warm_up: share of the epochs before the first channels go, from scratch; 0 to 0.9.
        anneal: share of the epochs in which the share falls; at least one epoch.
        strength: of the pull to the budget; 0 or more.
        hidden: width of the attention; 1 or more.
        gate_learning_rate: learning rate of Adam for the attention network; above 0. At 0.05 one of five trainings on
            the digits closed a layer and lost 17 points; at 0.01 none did.
        learning_rate: highest learning rate of SGD for the network; above 0.
        weight_decay: of the network's convolutions and linear layers; 0 or more.
        batch_size: images a step, of both; 2 or more.
    """

    needs: ClassVar[Needs] = Needs(data=True, labels=True, trains_weights=True)
    ranking: ClassVar[Ranking] = "global"
    phases: ClassVar[bool] = True

    start: Literal["pretrained", "scratch"] = "pretrained"
    epochs: Annotated[int, Range(low=1)] = 24
    warm_up: Annotated[float, Range(low=0, high=0.9)] = 0.25
    anneal: Annotated[float, Range(low=0, high=1)] = 0.4
    strength: Annotated[float, Range(low=0, high=1000)] = 5.0
    hidden: Annotated[int, Range(low=1)] = 32
    gate_learning_rate: Annotated[float, Range(low=1e-6, high=1)] = 0.01
    learning_rate: Annotated[float, Range(low=1e-6, high=10)] = 0.1
    weight_decay: Annotated[float, Range(low=0, high=1)] = 5e-4
    batch_size: Annotated[int, Range(low=2)] = 64

    def training(self, state: Any) -> dict[str, Any]:
        """Return how the network is trained between the choices."""
        return {
            "epochs": self.epochs,
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
        }

    def fit(self, module: "nn.Module", groups: Groups, budget: Budget, task: "Task") -> Trained:
        """Train the network in place, and leave it masked by the last choice.

        Raises:
            InputError: if the budget cannot be met, a loss stops being a number, or the network cannot start anew.
        """
        aim(groups, budget)
        if self.start == "scratch":
            start_anew(module, task.seed)
        module.to(task.device)
        run = _Run(self, module, groups, budget, task)
        run.before(0)

        def after_epoch(result: "EpochResult") -> None:
            if result.epoch < self.epochs:
                run.before(result.epoch)

        task.train(module, after_step=run.after_step, after_epoch=after_epoch, **self.training(None))
        run.after_step()  # what is left may be a mean of weights that were silent at other times
        return run.outcome()

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return the scores of the last attention phase, group id -> float64 [channels]; they are positive.

        Raises:
            InputError: if `fit` was not called.
        """
        return dict(trained(context, "paam").gates)

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return the masks of the best scores: for the budget of `fit`, those that the network was trained with.

        Raises:
            InputError: if `fit` was not called, or the budget cannot be met.
        """
        result = super().plan(weights, groups, budget, context)
        return replace(result, report=result.report | trained(context, "paam").report)

    def schedule(self) -> tuple[int, int]:
        """Return the epoch, from 0, before which the first choice is made, and in how many epochs choices are made."""
        share = self.warm_up if self.start == "scratch" else 0.0
        first = min(round(share * self.epochs), self.epochs - 1)
        return first, min(max(1, round(self.anneal * self.epochs)), self.epochs - first)


@dataclass(eq=False)
class _Run:
    """The training while it goes on.

    Several processes train an attention network each, on the same images; the first one's scores choose for all, since
    a difference in the last bit could give each its own channels.

    Attributes:
        method: its hyper-parameters.
        module: the network.
        groups: its groups.
        budget: the last choice's.
        task: images, the shared trainer and whom to tell.
        choices: what every attention phase gave, for the report.
    """

    method: PAAM
    module: "nn.Module"
    groups: Groups
    budget: Budget
    task: "Task"
    choices: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        from prune2deploy.train import Processes

        method, task = self.method, self.task
        self.processes = Processes(task.device)
        dtype = next(self.module.parameters()).dtype
        self.attention = Attention(
            self._rows(), self.groups, hidden=method.hidden, seed=task.seed, dtype=dtype, device=task.device
        )
        self.optimizer: Optimizer = torch.optim.Adam(self.attention.parameters, lr=method.gate_learning_rate)
        self.silence: Silence | None = None
        self.scores: Mapping[str, np.ndarray] = {}

    def before(self, epoch: int) -> None:
        """Train the attention network and choose the channels, if this epoch (from 0) begins with that."""
        first, count = self.method.schedule()
        if not first <= epoch < first + count:
            return
        if self.silence is not None:
            self.silence.lift()
        progress = (epoch - first + 1) / count
        kind, target = aim(self.groups, self.budget)
        wanted = 1 - (1 - target) * progress
        loss = self._train_attention(epoch, kind, wanted)
        made = self.attention.scores()
        self.scores = self.processes.agreed(lambda: as_arrays(made))
        masks = relaxed(self.budget, self.groups, progress).masks(self.scores, self.groups, self.method.ranking)
        self.silence = Silence(self.module, self.groups, masks)
        kinds: tuple[TargetKind, ...] = ("macs", "params")
        soft = {each: float(soft_share(self.groups, each, made).detach()) for each in kinds}
        if progress == 1:
            warn_if_fallen("paam", soft[kind], wanted)
        self.choices.append({"epoch": epoch + 1, "share": wanted, "loss": loss, "soft_share": soft})

    def after_step(self) -> None:
        """Keep the removed channels silent."""
        if self.silence is not None:
            self.silence()

    def outcome(self) -> Trained:
        """Return the scores of the last choice, and what led to it."""
        report = {"start": self.method.start, "soft_share": self.choices[-1]["soft_share"], "choices": self.choices}
        return Trained(dict(self.scores), report)

    def _train_attention(self, epoch: int, kind: TargetKind, wanted: float) -> float:
        self.task.note(f"training the attention network, epoch {epoch + 1} of {self.method.epochs}")
        self.attention.look_at(self._rows())

        def penalty(scores: Gates) -> "Tensor":
            return self.method.strength * (soft_share(self.groups, kind, scores) - wanted).relu()

        return train_gates(
            Gated(self.module, self.groups),
            self.task,
            self.optimizer,
            self.attention.scores,
            penalty,
            batch_size=self.method.batch_size,
            epoch=epoch + 1,
            epochs=self.method.epochs,
        )

    def _rows(self) -> dict[str, np.ndarray]:
        from prune2deploy.apply import weights_of

        weights = weights_of(self.module)
        return {group.id: rows_of(weights, group) for group in self.groups.prunable}


def relaxed(budget: Budget, groups: Groups, progress: float) -> Budget:
    """Return the budget on a line from the dense network's (progress 0, not included) to the one given (1)."""
    if progress >= 1:
        return budget
    if budget.target is None:
        widths = {
            group: groups[group].size - math.floor((groups[group].size - width) * progress)
            for group, width in budget.exact_widths(groups).items()
        }
        return replace(budget, widths=widths)
    return replace(budget, target=Target(budget.target.kind, 1 - (1 - budget.target.share) * progress))


class Attention:
    """The attention network: for every prunable group its own, over its filters.

    Args:
        rows: group id -> `rows_of` it, where the training starts.
        groups: the network's groups.
        hidden: width of queries and keys.
        seed: of the first weights.
        dtype: of the parameters and scores.
        device: where they are.
    """

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        groups: Groups,
        *,
        hidden: int,
        seed: int,
        dtype: Any = None,
        device: Any = None,
    ) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        self._place = {"dtype": dtype, "device": device}
        self._layers: dict[str, tuple[Tensor, ...]] = {}
        for group in groups.prunable:
            directions = main_directions(rows[group.id])
            drawn = torch.randn((2, directions.shape[1], hidden), generator=generator, dtype=torch.float64).numpy()
            start = (directions @ drawn[0], np.zeros(hidden), directions @ drawn[1], np.zeros(hidden), np.zeros(()))
            self._layers[group.id] = tuple(
                torch.from_numpy(values).to(**self._place).requires_grad_(True) for values in start
            )
        self.look_at(rows)

    @property
    def parameters(self) -> "list[Tensor]":
        """All that is trained."""
        return [parameter for layer in self._layers.values() for parameter in layer]

    def look_at(self, rows: Mapping[str, np.ndarray]) -> None:
        """Take the filters, group id -> `rows_of` it, as they are now."""
        import torch

        self._rows = {group: torch.from_numpy(values).to(**self._place) for group, values in rows.items()}

    def scores(self) -> "dict[str, Tensor]":
        """Return group id -> scores [channels]; memory grows with channels squared times ``hidden``."""
        found = {}
        for group, (query, shift, key, voice, last) in self._layers.items():
            queries, keys = self._rows[group] @ query + shift, self._rows[group] @ key
            pairs = (queries[:, None] + keys).tanh() @ voice  # [channels, channels]
            found[group] = leaky_exponential(pairs.mean(dim=1) + last)
        return found


def leaky_exponential(z: "Tensor") -> "Tensor":
    """Return exp(z) below 0, and 1 + 0.01 z from there on: never flat, and 1 at 0."""
    import torch

    return torch.where(z < 0, z.clamp(max=0).exp(), 1 + _SLOPE * z)


def rows_of(weights: Weights, group: Group) -> np.ndarray:
    """Return the filters of a group's channels, float64 [channels, weights], 1 long on average.

    Those of several layers are put side by side, each in units of its layer's mean length.
    """
    parts = filters_of(weights, group, taps=True)
    together = scaled_together(parts, [float(np.linalg.norm(part, axis=1).mean()) for part in parts])
    return together / (np.linalg.norm(together, axis=1).mean() or 1.0)


def start_anew(module: "nn.Module", seed: int) -> None:
    """Draw all parameters of a network anew, in place, as their layers do it.

    Raises:
        InputError: if a layer has parameters, but no ``reset_parameters``.
    """
    import torch

    module.to("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in module.named_modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
            elif next(part.parameters(recurse=False), None) is not None:
                raise InputError(
                    f"method 'paam' cannot draw '{name}' ({type(part).__name__}) anew, which has no reset_parameters; "
                    "start with start=pretrained, from weights that are not trained"
                )
