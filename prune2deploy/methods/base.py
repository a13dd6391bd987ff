"""What a pruning method is: its hyper-parameters, what it needs, its hooks, its scores, and a plan."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from prune2deploy.budget import Budget, Ranking, share
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups, Member
from prune2deploy.masks import widths

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prune2deploy.train import Task

T = TypeVar("T")
Weights = Mapping[str, np.ndarray]
"""Parameter or initializer name -> array; a torch network's (`apply.weights_of`) or an ONNX file's."""


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without; ``norms``: BatchNorm layers that are not folded into convolutions."""

    data: bool = False
    labels: bool = False
    pretrained: bool = False
    trains_weights: bool = False
    norms: bool = False


@dataclass(frozen=True, eq=False)
class PruneResult:
    """What a method decided.

    Attributes:
        keep: for every group, bool [channels]; True keeps.
        merges: group id -> int64 [channels]: the kept channel that each is a copy of (`keep` is where it is itself).
            The channels of these groups are not silenced: ``weights`` holds exact copies, which slimming finds.
        offsets: group id -> float64 [channels]: how much more than the masked network a removed channel's readers
            should see, on average; absent is nothing. (Masked, they see f(0) of the activations on the way.)
        weights: parameter or buffer name -> the array that replaces the whole of it, before anything is masked.
        report: what happened, as JSON values.
    """

    keep: dict[str, np.ndarray]
    merges: dict[str, np.ndarray] = field(default_factory=dict)
    offsets: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def silent(self) -> dict[str, np.ndarray]:
        """The masks that silence: ``keep``, but for merged groups, whose channels all stay in the masked network."""
        return {group: mask | (group in self.merges) for group, mask in self.keep.items()}


@dataclass(frozen=True, eq=False)
class Context:
    """What a method may look at beside weights and groups, each of it only where there is some.

    Attributes:
        module: the network that has the weights, on the device of the images. It is not to be changed: copy it.
        images: batches of normalised training images [B, C, H, W] with labels int64 [B]; can be gone through again and
            again, and gives the same every time.
        holdout: batches of held-out images, for choices that must not be made on what was trained on.
        state: what `Method.prepare` or `Method.fit` returned.
        moved: ``images``, shifted and mirrored as in training.
    """

    module: "nn.Module | None" = None
    images: Iterable[Any] | None = None
    holdout: Iterable[Any] | None = None
    state: Any = None
    moved: Iterable[Any] | None = None

    @property
    def norm_images(self) -> Iterable[Any]:
        """What norms are measured on: moved images where there are some (`train.recalibrate` says why)."""
        return self.moved if self.moved is not None else self.images or ()

    def network(self, method: str) -> "tuple[nn.Module, Iterable[Any]]":
        """Return the network and its images.

        Raises:
            InputError: if there is none of either, in the name of the method that needs them.
        """
        if self.module is None or self.images is None:
            raise InputError(
                f"method '{method}' needs images, and a network that runs on them; give --data (Python: calibration=)"
            )
        return self.module, self.images


NO_CONTEXT = Context()


@dataclass(frozen=True)
class Range:
    """Bounds of a numeric hyper-parameter, both included; written as ``Annotated[int, Range(low=0)]``."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.low:g} or more" if self.high == math.inf else f"{self.low:g} to {self.high:g}"


class TrainingHooks:
    """The hooks of a training loop. These do nothing; a method that trains has its own in place of those it needs.

    The order in one step: ``penalty`` is added to the loss, backward, ``after_backward``, the optimizer's step,
    ``after_step``. A method is frozen, so what changes while it trains is the ``state`` that ``prepare`` returned.
    """

    def prepare(self, module: "nn.Module", groups: Groups, budget: Budget) -> Any:
        """Return the state that the other hooks and `Context` get; may change the module in place."""
        return None

    def penalty(self, state: Any) -> "Tensor | float":
        """Return what is added to the loss of this step."""
        return 0.0

    def after_backward(self, state: Any) -> None:
        """Edit gradients."""

    def after_step(self, state: Any) -> None:
        """Edit weights."""

    def epoch_end(self, state: Any, epoch: int) -> None:
        """Take note that ``epoch`` (counted from 0) is over."""

    def resume(self, state: Any, epochs: int, steps: int) -> None:
        """Bring the state to where it was after so many epochs and steps; the weights are there already."""
        for epoch in range(epochs):
            self.epoch_end(state, epoch)

    def training(self, state: Any) -> dict[str, Any]:
        """Return how the method trains: arguments of `train.Task.train`, ``epochs`` among them."""
        return {}

    def fit(self, module: "nn.Module", groups: Groups, budget: Budget, task: "Task") -> Any:
        """Train the network in place as the method does, with the shared trainer, and return the state.

        A method with phases of its own has another ``fit``, and says so by ``phases``.

        Raises:
            InputError: if the network or the budget does not suit the method, or training diverges.
        """
        state = self.prepare(module, groups, budget)
        task.train(
            module,
            penalty=lambda: self.penalty(state),
            after_backward=lambda: self.after_backward(state),
            after_step=lambda: self.after_step(state),
            after_epoch=lambda result: self.epoch_end(state, result.epoch - 1),
            on_resume=lambda epochs, steps: self.resume(state, epochs, steps),
            **self.training(state),
        )
        return state


class Method(TrainingHooks, ABC):
    """A pruning method; a subclass is a final frozen dataclass of its own hyper-parameters.

    Hyper-parameters are annotated with ``bool``, ``int``, ``float``, ``str``, ``Literal[...]`` or
    ``Annotated[int, Range(...)]``, and are checked against that when the method is made.
    """

    needs: ClassVar[Needs]
    ranking: ClassVar[Ranking] = "uniform"
    phases: ClassVar[bool] = False
    """Whether its training has phases of its own, so that it cannot be part of somebody's training loop."""
    adds_modules: ClassVar[bool] = False
    """Whether what it adds to the network stays in it; then `rebuild` adds it to a new one."""

    @property
    def needs_finetuning(self) -> str | None:
        """Why the pruned network is of no use before it was trained (what the method does); None if it is."""
        return None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for option in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, option.name)
            if not _fits(value, hints[option.name]):
                name = type(self).__name__.lower()
                allowed = _allowed(hints[option.name])
                raise InputError(f"method '{name}': option '{option.name}' cannot be {value!r}; it is {allowed}")

    def rebuild(self, module: "nn.Module", groups: Groups) -> None:
        """Add to a network, in place, what the method leaves in it, so that trained weights can be loaded."""

    @abstractmethod
    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels], higher keeps, for the prunable groups that it can score.

        A group that is left out is kept whole. Scores that need neither data nor training need no context.

        Raises:
            InputError: if the network is not one that the method can score.
        """

    def offsets(self, weights: Weights, groups: Groups, keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return `PruneResult.offsets` for the removed channels; none by default."""
        return {}

    def new_weights(self, weights: Weights, groups: Groups, keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return `PruneResult.weights` for these masks; none by default."""
        return {}

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return the masks that keep the best channels within the budget, and what goes with them.

        Raises:
            InputError: if the network cannot be scored or the target cannot be reached.
        """
        scores = self.scores(weights, groups, context)
        keep = budget.masks(scores, groups, self.ranking)
        report = plan_report(groups, budget, keep) | {
            "ranking": budget.ranking or self.ranking,
            "not_scored": [group.id for group in groups.prunable if group.id not in scores],
        }
        return PruneResult(
            keep,
            offsets=self.offsets(weights, groups, keep),
            weights=self.new_weights(weights, groups, keep),
            report=report,
        )


def plan_report(groups: Groups, budget: Budget, keep: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what every plan reports: the budget, and the widths and shares that the masks have."""
    kept = widths(keep)
    return {
        "target": str(budget),
        "round_to": budget.round_to,
        "widths": kept,
        "share": {"macs": share(groups, "macs", kept), "params": share(groups, "params", kept)},
    }


def describe_options(method: type[Method]) -> dict[str, str]:
    """Return a method's hyper-parameters, each with what it may be and its default."""
    hints = get_type_hints(method, include_extras=True)
    return {
        option.name: f"{_allowed(hints[option.name])}; default {option.default}"
        for option in fields(method)  # type: ignore[arg-type]  # every subclass is a dataclass
    }


def named(weights: Mapping[str, T], name: str) -> T:
    """Return the weight of that name.

    Raises:
        InputError: if the network has none.
    """
    if name not in weights:
        raise InputError(f"the network has no weight '{name}', which its groups name; analyse this network again")
    return weights[name]


def array(weights: Weights, name: str) -> np.ndarray:
    """Return one weight in float64; errors are those of `named`."""
    return np.asarray(named(weights, name), dtype=np.float64)


def of_channels(weights: Weights, member: Member) -> np.ndarray:
    """Return the part of a weight that belongs to each channel of a group, float64 [channels, everything else].

    Errors are those of `named`.
    """
    return per_channel(array(weights, member.parameter), member.axis, member.indices)


def per_channel(values: np.ndarray, axis: int, indices: np.ndarray) -> np.ndarray:
    """Return the parts of an array that belong to each channel, as [channels, everything else].

    Args:
        values: any array.
        axis: the axis that the channels index.
        indices: int [channels, k], as `groups.Member.indices`.
    """
    taken: np.ndarray = np.moveaxis(values, axis, 0)[indices]
    return taken.reshape(len(indices), -1)


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in get_args(hint))
    if get_origin(hint) is Annotated:
        kind, limits = get_args(hint)
        return _fits(value, kind) and limits.low <= value <= limits.high
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint


def _allowed(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(allowed) for allowed in get_args(hint))
    if get_origin(hint) is Annotated:
        kind, limits = get_args(hint)
        return f"{_allowed(kind)}, {limits}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
