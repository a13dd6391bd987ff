"""BN: what a channel's norm says of its activations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
from scipy.special import erf, log1p, ndtr

from prune2deploy.errors import InputError
from prune2deploy.groups import IDENTITY, OF, Group, Groups, ungated
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, Weights, of_channels
from prune2deploy.methods.filters import is_depthwise

_Moments = tuple[np.ndarray, np.ndarray]

_POINT_MASS = 1e-12
"""Below this scale a channel is taken as constant."""

_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(96)
_NODE_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()


@final
@dataclass(frozen=True)
class BN(Method):
    """Score a channel by the moments of its activation, read off its norm (Oh et al., WACV 2022, arXiv 2112.01155).

    After its norm a channel is taken as normal with mean beta (shift) and deviation abs(gamma) (scale); its activation
    then has moments in closed form, or by Gauss-Hermite quadrature. Reconstructed: the abstract says that the norm's
    parameters estimate the activation's distribution; which moment is the score could not be read.

    Norms whose outputs are added (a residual stage) are taken as independent: beta and gamma^2 add. Behind a depthwise
    convolution only its own norm counts. Norms that read a sum or a concatenation (pre-activation networks) are scored
    one by one, and the channel gets their mean.

    The activation is what lies between the norm and the readers (`groups.Group.read_as`): a norm behind its activation
    is taken as it is. Behind a sum it is the activation of the sum; without one, those of the addends are taken as if
    they followed the sum. If readers differ in it the last one counts. What a gate multiplies (squeeze-and-excitation)
    is scored by the activation before the gate, whose values no norm tells; and what a max-pooling takes by the one
    before it, whose mean is lower.

    Attributes:
        score: ``mean`` E[a] (its magnitude), ``rms`` sqrt(E[a^2]), ``std`` what a constant cannot replace; ``_x_next``
            multiplies by the Frobenius norm of the weights that read the channel (this is ours, not the paper's).
        mean_fold: give the readers of a removed channel its mean activation in its place (ours as well), for groups
            with one norm, directly behind the filter, which all readers read behind one activation at most and no gate.
            Other groups' means are not folded. Norm statistics that are re-estimated afterwards undo it.
    """

    needs: ClassVar[Needs] = Needs(norms=True)

    score: Literal["mean", "rms", "std", "rms_x_next", "std_x_next"] = "mean"
    mean_fold: bool = False

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> float64 [channels] for the groups that have norms; a function of the weights alone.

        Raises:
            InputError: if no prunable group has a norm, or one has an activation of unknown moments.
        """
        scored = {}
        for group in groups.prunable:
            views = _views(weights, groups, group)
            if views:
                moments = [activation_moments(view.beta, view.gamma, _activation(group)) for view in views]
                score = np.mean([_SCORES[self.score.removesuffix("_x_next")](m1, m2) for m1, m2 in moments], axis=0)
                scored[group.id] = score * _next(weights, group) if self.score.endswith("_x_next") else score
        if groups.prunable and not scored:
            raise InputError(
                "method 'bn' needs norms, but no prunable group of this network has one (they may be folded into the "
                "convolutions); use 'l1' or 'random', or a network that still has its norms"
            )
        return scored

    def offsets(self, weights: Weights, groups: Groups, keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return E[a] - f(0) for the removed channels of the groups where it is known, under ``mean_fold``."""
        if not self.mean_fold:
            return {}
        found = {}
        for group in groups.prunable:
            removed = ~keep[group.id]
            view = _single_view(weights, groups, group)
            if removed.any() and view is not None:
                mean, _ = activation_moments(view.beta, view.gamma, _activation(group))
                silent, _ = activation_moments(np.zeros(1), np.zeros(1), _activation(group))
                found[group.id] = np.where(removed, mean[:, 0] - silent, 0.0)
        return found


def _magnitude(m1: np.ndarray, m2: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(m1).sum(axis=1))


def _root_mean_square(m1: np.ndarray, m2: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(m2.sum(axis=1)))


def _deviation(m1: np.ndarray, m2: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.maximum(m2 - m1**2, 0.0).sum(axis=1)))


_SCORES: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": _magnitude,
    "rms": _root_mean_square,
    "std": _deviation,
}
"""From the moments, each [channels, k], to a score [channels]."""


class _View(NamedTuple):
    """The normal distribution of a group's channels before the activation, each [channels, k]."""

    beta: np.ndarray
    gamma: np.ndarray


class _Norm(NamedTuple):
    layer: str
    view: _View


def _norms(weights: Weights, group: Group) -> list[_Norm]:
    shifts = {member.layer: member for member in group.of_role("shift")}
    found = []
    for scale in group.of_role("scale"):
        gamma = of_channels(weights, scale)
        shift = shifts.get(scale.layer)
        beta = np.zeros_like(gamma)
        if shift is not None:
            beta = of_channels(weights, shift)
        found.append(_Norm(scale.layer, _View(beta, np.abs(gamma))))
    return found


def _views(weights: Weights, groups: Groups, group: Group) -> list[_View]:
    """Return the distributions that the group's readers see: one, or one for each norm that reads a sum."""
    norms = _norms(weights, group)
    producers = {layer.norm: layer for layer in groups.layers if layer.norm is not None}
    of_a_sum = [norm.view for norm in norms if norm.layer not in producers]
    if of_a_sum:
        return of_a_sum
    depthwise = [i for i, norm in enumerate(norms) if is_depthwise(weights, producers[norm.layer])]
    added = [norm.view for norm in (norms[depthwise[-1] :] if depthwise else norms)]
    return [_sum(added)] if added else []


def _single_view(weights: Weights, groups: Groups, group: Group) -> _View | None:
    """Return the one distribution that all readers of the group see, or None where that is not certain."""
    norms = [norm.layer for norm in _norms(weights, group)]
    layers = [groups.layer_by_name[member.layer] for member in group.of_role("filter")]
    views = _views(weights, groups, group)
    if not _is_one_function(group) or len(views) != 1 or views[0].beta.shape[1] != 1:
        return None
    if not any(is_depthwise(weights, layer) for layer in layers):
        # The norm must belong to the one producer: then nothing reads the channel but through it.
        return views[0] if norms == [layer.norm for layer in layers] and len(norms) == 1 else None
    # Before the depthwise convolution the channel is another: a second reader might read it there.
    return views[0] if norms[-1] == layers[-1].norm and len(group.of_role("reader")) == 1 else None


def _sum(views: list[_View]) -> _View:
    """Return the distribution of a sum of independent normals."""
    shape = (len(views[0].beta), max(view.beta.shape[1] for view in views))
    beta, variance = np.zeros(shape), np.zeros(shape)
    for view in views:
        beta[:, : view.beta.shape[1]] += view.beta
        variance[:, : view.beta.shape[1]] += view.gamma**2
    return _View(beta, np.sqrt(variance))


def _next(weights: Weights, group: Group) -> np.ndarray:
    """Return the Frobenius norm of the weights that read each channel, over all readers; [channels]."""
    squares = [(of_channels(weights, member) ** 2).sum(axis=1) for member in group.of_role("reader")]
    return np.sqrt(np.sum(squares, axis=0)) if squares else np.ones(group.size)


def _activation(group: Group) -> str:
    last = (group.read_as or group.activations or (IDENTITY,))[-1]
    return ungated(last)


def _is_one_function(group: Group) -> bool:
    """Whether all readers read the channels as one function of their norm."""
    if group.read_as is None:
        return len(group.activations) <= 1
    return len(group.read_as) == 1 and ungated(group.read_as[0]) == group.read_as[0]


def activation_moments(beta: np.ndarray, gamma: np.ndarray, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """Return E[f(x)] and E[f(x)^2] for x normal with mean ``beta`` and deviation ``gamma``, in float64.

    Args:
        beta: means.
        gamma: deviations, not negative, of the same shape.
        activation: f as `groups.Group.read_as` writes it, such as ``Relu``, ``Clip(0,6)``, ``Sigmoid of Relu``.

    Raises:
        InputError: if the activation is not known.
    """
    steps = [_step(one, activation) for one in activation.split(OF)[::-1]]  # the innermost first
    while len(steps) > 1 and steps[0][0] == "Affine":
        (slope, shift), steps = steps[0][1], steps[1:]
        beta, gamma = slope * beta + shift, abs(slope) * gamma
    name, numbers = steps[0]
    if len(steps) == 1 and name in _CLOSED:
        return _CLOSED[name](beta, gamma, *numbers)
    values = beta[..., None] + np.where(gamma < _POINT_MASS, 0.0, gamma)[..., None] * _NODES
    for name, numbers in steps:
        values = _FUNCTIONS[name](values, *numbers)
    return values @ _NODE_WEIGHTS, values**2 @ _NODE_WEIGHTS


def _step(function: str, activation: str) -> tuple[str, list[float]]:
    name, numbers = _parse(function)
    if name not in _FUNCTIONS or len(numbers) not in _NUMBERS.get(name, (0,)):
        known = ", ".join(["Clip(low,high)", *sorted(_FUNCTIONS.keys() - {"Clip"})])
        raise InputError(
            f"method 'bn' does not know the activation '{activation}'; it knows {known}; "
            "use method 'l1', or keep those layers with --keep"
        )
    return name, numbers


def _affine(beta: np.ndarray, gamma: np.ndarray, slope: float = 1.0, shift: float = 0.0) -> _Moments:
    beta, gamma = slope * beta + shift, abs(slope) * gamma
    return beta, beta**2 + gamma**2


def _clipped(beta: np.ndarray, gamma: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the moments of a normal clipped to [low, high], where each bound may be infinite."""
    g = np.maximum(gamma, _POINT_MASS)
    below, above = ndtr((low - beta) / g), ndtr((beta - high) / g)
    inside = ndtr((high - beta) / g) - below
    m1 = beta * inside + g * (_density((low - beta) / g) - _density((high - beta) / g))
    m2 = (beta**2 + g**2) * inside
    for bound, mass, sign in ((low, below, 1.0), (high, above, -1.0)):
        if np.isfinite(bound):
            m1 = m1 + bound * mass
            m2 = m2 + bound**2 * mass + sign * g * (beta + bound) * _density((bound - beta) / g)
    # Far in a tail the terms cancel to rounding errors, which must not leave what moments can be.
    m1 = np.clip(m1, low, high)
    m2 = np.maximum(m2, m1**2)
    point = np.clip(beta, low, high)
    constant = gamma < _POINT_MASS
    return np.where(constant, point, m1), np.where(constant, point**2, m2)


def _leaky(beta: np.ndarray, gamma: np.ndarray, slope: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Return the moments of relu(x) - slope * relu(-x); one of the two is always 0."""
    (up1, up2), (down1, down2) = _clipped(beta, gamma, 0.0, np.inf), _clipped(-beta, gamma, 0.0, np.inf)
    return up1 - slope * down1, up2 + slope**2 * down2


def _density(z: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi))


def _parse(activation: str) -> tuple[str, list[float]]:
    name, _, inside = activation.partition("(")
    try:
        return name, [float(number) for number in inside.rstrip(")").split(",") if number.strip()]
    except ValueError:
        return activation, []


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(x, 0.0) + log1p(np.exp(-np.abs(x))))


def _hard_sigmoid(x: np.ndarray, slope: float = 0.2, shift: float = 0.5) -> np.ndarray:
    return np.clip(slope * x + shift, 0.0, 1.0)


def _elu(x: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def _selu(
    x: np.ndarray, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> np.ndarray:
    return gamma * _elu(x, alpha)


def _celu(x: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    return np.asarray(np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0) / alpha)))


def _gelu_by_tanh(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))))


def _swish(x: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    return np.asarray(x * _sigmoid(alpha * x))


_FUNCTIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "Affine": lambda x, slope, shift: slope * x + shift,
    "Celu": _celu,
    "Clip": np.clip,
    "Elu": _elu,
    "Gelu": lambda x: 0.5 * x * (1.0 + erf(x / np.sqrt(2.0))),
    "Gelu(tanh)": _gelu_by_tanh,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda x: x * _hard_sigmoid(x, 1.0 / 6.0),
    "Identity": lambda x: x,
    "LeakyRelu": lambda x, slope=0.01: np.where(x > 0, x, slope * x),
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "Relu": lambda x: np.maximum(x, 0.0),
    "Selu": _selu,
    "Sigmoid": _sigmoid,
    "Silu": _swish,
    "Softplus": _softplus,
    "Swish": _swish,
    "Tanh": np.tanh,
}
"""Activations by their ONNX names and defaults, for quadrature."""

_NUMBERS: Mapping[str, tuple[int, ...]] = {
    "Affine": (2,),
    "Celu": (0, 1),
    "Clip": (2,),
    "Elu": (0, 1),
    "HardSigmoid": (0, 1, 2),
    "LeakyRelu": (0, 1),
    "Selu": (0, 1, 2),
    "Swish": (0, 1),
}
"""How many numbers an activation may have, where it may have any."""

_CLOSED: Mapping[str, Callable[..., _Moments]] = {
    "Affine": _affine,
    "Clip": _clipped,
    "Identity": _affine,
    "LeakyRelu": _leaky,
    "Relu": lambda beta, gamma: _clipped(beta, gamma, 0.0, np.inf),
}
"""Activations whose moments have a closed form."""
