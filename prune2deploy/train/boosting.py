"""Layers of feature boosting and suppression: a convolution that weighs its channels for each image, and drops most.

They stay in a network. The saliencies of an image's channels come from its input map, k of them stay, and the others'
maps are zero; so whoever runs the network can leave their filters out, and the channels that they would read.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.errors import InputError
from prune2deploy.train.accuracy import cudnn_flags, eval_mode

_NO_SCALE = 1e-12
"""A norm's scale below this is taken for zero: nothing can be divided by it."""


class Choice:
    """What a `Boosted` layer chose in its last pass, for those that follow it; a copy of it is empty.

    Attributes:
        saliencies: [B, channels], with their gradients; None before the first pass.
        mask: [B, channels], 1 for channels that are active.
    """

    def __init__(self) -> None:
        self.saliencies: Tensor | None = None
        self.mask: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Choice":
        return Choice()


class Boosted(nn.Module):
    """A convolution with its norm, whose channels are weighed and suppressed for each image.

    ``relu`` (or what the network has) stands behind it. With s the mean of abs(x) over the map, [B, inputs]::

        g = relu(s Phi + rho);  m = 1 where g is above the (active + 1)-th largest of its image, else 0
        y = (m g) norm(conv(x)) + m bias          or, where the bias is boosted as well, (m g) (norm(conv(x)) + bias)

    ``norm`` has no scale and shift of its own. No gradient goes through m. Channels that tie at that limit are all
    suppressed, so at most ``active`` are active; saliencies of 0 never are. So nothing depends on how a runtime orders
    equal numbers. With all channels active there is no limit, and m is 1.

    Made from a convolution and its norm it computes what they did: Phi is 0, rho is the norm's scale (of a filter whose
    scale is negative the sign is turned first), ``bias`` its shift (divided by the scale, where it is boosted).

    Args:
        conv: becomes part of this layer, and may have a bias.
        norm: with running statistics, which are taken over.
        boosts_bias: whether the bias is boosted.

    Attributes:
        predictor: Phi, transposed, is its weight, and rho its bias.
        active: how many channels stay, k; a plain number, since exporters write it into the graph. It travels in the
            state dict.
        fixed: bool [channels], the mask of all images in place of their own; None outside measurements.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, boosts_bias: bool) -> None:
        super().__init__()
        weight, channels = conv.weight, conv.out_channels
        place: Any = {"device": weight.device, "dtype": weight.dtype}
        self.conv = conv
        self.norm = nn.BatchNorm2d(channels, norm.eps, norm.momentum, affine=False, **place)
        self.predictor = nn.Linear(conv.in_channels, channels, **place)
        self.bias = nn.Parameter(torch.zeros(channels, **place))
        self.boosts_bias = boosts_bias
        self.active = channels
        self.fixed: Tensor | None = None
        self.choice = Choice()
        with torch.no_grad():
            self._take_over(norm)
        self.train(norm.training)

    def _take_over(self, norm: nn.BatchNorm2d) -> None:
        assert self.norm.running_mean is not None, "this norm has statistics"
        own = {name: value for name, value in norm.state_dict().items() if name.startswith("running")}
        self.norm.load_state_dict(own, strict=False)
        scale: Tensor = torch.ones_like(self.bias) if norm.weight is None else norm.weight
        shift: Tensor = torch.zeros_like(self.bias) if norm.bias is None else norm.bias
        sign = torch.where(scale < 0, -1.0, 1.0).to(scale)
        rho = scale.abs()
        if self.boosts_bias:
            # what has no scale is a constant: a filter of zeros, not weighed
            sign = torch.where(rho < _NO_SCALE, 0.0, sign)
            rho = torch.where(rho < _NO_SCALE, 1.0, rho)
            shift = shift / rho
        self.conv.weight.mul_(sign.view(-1, 1, 1, 1))
        if self.conv.bias is not None:
            self.conv.bias.mul_(sign)
        self.norm.running_mean.mul_(sign)
        self.predictor.weight.zero_()
        self.predictor.bias.copy_(rho)
        self.bias.copy_(shift)

    def activate(self, count: int) -> None:
        """Let so many channels be active.

        Raises:
            InputError: if there are not so many, or it is none.
        """
        if not 1 <= count <= self.conv.out_channels:
            raise InputError(
                f"{count} of {self.conv.out_channels} channels cannot be active; use this network's weights"
            )
        self.active = count

    def get_extra_state(self) -> Tensor:
        """Return ``active`` as state dicts hold it."""
        return torch.tensor(self.active)

    def set_extra_state(self, state: Any) -> None:
        """Take ``active`` from a state dict."""
        self.activate(int(state))

    def saliencies(self, x: Tensor) -> Tensor:
        """Return g of every image's channels, [B, channels], in the type of the weights: low precision makes ties."""
        weight = self.predictor.weight
        with _full_precision(x):
            saliencies: Tensor = F.relu(self.predictor(x.to(weight.dtype).abs().mean((2, 3))))
        return saliencies

    def mask(self, saliencies: Tensor) -> Tensor:
        """Return m, [B, channels], of the saliencies' type."""
        if self.fixed is not None:
            return self.fixed.to(saliencies).expand_as(saliencies)
        if self.active == saliencies.shape[1]:
            return torch.ones_like(saliencies)
        limit = saliencies.detach().topk(self.active + 1, dim=1).values[:, self.active :]
        return (saliencies > limit).to(saliencies)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, channels, H', W']."""
        saliencies = self.saliencies(x)
        mask = self.mask(saliencies)
        self.choice.saliencies, self.choice.mask = saliencies, mask
        boost, mask = _on_maps(saliencies * mask), _on_maps(mask)
        normed, bias = self.norm(self.conv(x)), self.bias.view(1, -1, 1, 1)
        y: Tensor = boost * (normed + bias) if self.boosts_bias else boost * normed + mask * bias
        return y


class Suppressed(nn.Module):
    """The norm of a depthwise convolution; the channels that the layer before suppressed stay zero behind it."""

    def __init__(self, norm: nn.BatchNorm2d, choice: Choice) -> None:
        super().__init__()
        self.norm = norm
        self.choice = choice
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        assert self.choice.mask is not None, "the layer that is followed runs first"
        masked: Tensor = self.norm(x) * _on_maps(self.choice.mask)
        return masked


def _on_maps(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast, which exporters would write down where it is not needed."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@dataclass(frozen=True)
class Place:
    """Where a convolution and its norm are in a network, by the paths of the modules.

    Attributes:
        conv: of the convolution.
        norm: of the norm.
        follows: for a depthwise convolution, the path of the convolution whose mask it has; else None.
    """

    conv: str
    norm: str
    follows: str | None = None


def can_be_boosted(module: nn.Module, place: Place) -> bool:
    """Whether a plain convolution and a plain norm, each used under one name, are at this place."""
    found = dict(module.named_modules(remove_duplicate=False))
    conv, norm = found.get(place.conv), found.get(place.norm)
    if not isinstance(conv, nn.Conv2d) or type(norm) is not nn.BatchNorm2d or not norm.track_running_stats:
        return False
    return all(sum(other is part for other in found.values()) == 1 for part in (conv, norm))


def boost(module: nn.Module, places: Iterable[Place], *, boosts_bias: bool) -> None:
    """Make convolutions and their norms `Boosted` and `Suppressed` layers, in place; the network computes the same.

    A boosted layer has the path of its convolution, and nothing is left at the path of its norm.
    """
    choices: dict[str, Choice] = {}
    for place in places:
        norm: Any = module.get_submodule(place.norm)
        if place.follows is None:
            conv: Any = module.get_submodule(place.conv)
            layer = Boosted(conv, norm, boosts_bias=boosts_bias)
            choices[place.conv] = layer.choice
            module.set_submodule(place.conv, layer)
            module.set_submodule(place.norm, nn.Identity())
        else:
            module.set_submodule(place.norm, Suppressed(norm, choices[place.follows]))


def boosted_layers(module: nn.Module) -> dict[str, Boosted]:
    """Return the boosted layers of a network by their paths."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Boosted)}


@dataclass(frozen=True, eq=False)
class Usage:
    """What a boosted layer chose, image by image.

    Attributes:
        masks: bool [images, channels].
        boost: mean of m g, float64 [channels].
    """

    masks: Tensor
    boost: Tensor

    @property
    def most_frequent(self) -> Tensor:
        """The mask that most images have, bool [channels]; of equally frequent ones the first in order."""
        found, counts = torch.unique(self.masks, dim=0, return_counts=True)
        most: Tensor = found[counts.argmax()]
        return most

    @property
    def distinct(self) -> int:
        """How many different masks there are."""
        return len(torch.unique(self.masks, dim=0))


def observe(
    module: nn.Module, batches: Iterable[Any], images: int, readers: Mapping[str, int]
) -> tuple[dict[str, Usage], dict[str, Tensor]]:
    """Return what the boosted layers chose for images, and how many channels that are not zero other layers read.

    Args:
        module: with boosted layers; it runs in eval mode and stays as it is.
        batches: of images [B, C, H, W] and labels.
        images: how many at most.
        readers: path of a layer -> how many channels (or features) it reads.

    Returns:
        usage by path, and path -> int64 [images]; a layer that was not seen reading so many channels is left out.

    Raises:
        InputError: if there are no images.
    """
    layers = boosted_layers(module)
    masks: dict[str, list[Tensor]] = {path: [] for path in layers}
    boosts = {path: torch.zeros(layer.conv.out_channels, dtype=torch.float64) for path, layer in layers.items()}
    reads: dict[str, list[Tensor]] = {path: [] for path in readers}
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(_counter(reads[path], size))
        for path, size in readers.items()
    ]
    seen = 0
    try:
        with eval_mode(module), torch.no_grad(), cudnn_flags(tf32=False):
            for taken, _ in batches:
                module(taken[: images - seen])
                for path, layer in layers.items():
                    saliencies, mask = layer.choice.saliencies, layer.choice.mask
                    assert saliencies is not None, "every boosted layer runs"
                    assert mask is not None, "with its saliencies"
                    masks[path].append(mask.bool().cpu())
                    boosts[path] += (saliencies * mask).double().sum(0).cpu()
                seen += len(taken[: images - seen])
                if seen >= images:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise InputError("method 'fbs' needs images to measure its gates on; give a data set that has some")
    usage = {path: Usage(torch.cat(masks[path]), boosts[path] / seen) for path in layers}
    counts = {path: torch.cat(found) for path, found in reads.items() if found}
    return usage, {path: count for path, count in counts.items() if len(count) == seen}


def _counter(found: list[Tensor], size: int) -> Callable[[nn.Module, Any], None]:
    """Return a hook that notes how many of a layer's input channels are not all zero, if it reads so many."""

    def count(_: nn.Module, inputs: Any) -> None:
        x = inputs[0]
        if x.ndim in (2, 4) and x.shape[1] == size:
            found.append((x != 0).flatten(2).any(2).sum(1).cpu() if x.ndim == 4 else (x != 0).sum(1).cpu())

    return count


def fold(module: nn.Module, places: Iterable[Place], usage: Mapping[str, Usage]) -> None:
    """Make boosted layers plain convolutions and norms again, in place, each channel weighed as it was on average.

    A channel that was never active gets scale and shift 0.
    """
    for place in places:
        if place.follows is not None:
            followed: Any = module.get_submodule(place.norm)
            module.set_submodule(place.norm, followed.norm)
            used = usage[place.follows].masks.any(0)
            with torch.no_grad():
                for values in followed.norm.parameters():
                    values.mul_(used.to(values))
            continue
        layer: Any = module.get_submodule(place.conv)
        found, bias = usage[place.conv], layer.bias.detach()
        boost, share = found.boost.to(bias), found.masks.double().mean(0).to(bias)
        norm = nn.BatchNorm2d(len(bias), layer.norm.eps, layer.norm.momentum, device=bias.device, dtype=bias.dtype)
        norm.load_state_dict(layer.norm.state_dict(), strict=False)
        with torch.no_grad():
            norm.weight.copy_(boost)
            norm.bias.copy_(bias * (boost if layer.boosts_bias else share))
        module.set_submodule(place.conv, layer.conv)
        module.set_submodule(place.norm, norm.train(layer.training))
