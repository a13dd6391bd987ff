"""Networks from their specs: a built-in name, ``torchvision:NAME``, ``timm:NAME``, ``path/to/file.py:function``."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2deploy.errors import InputError, one_line
from prune2deploy.networks.factory import call_factory, is_factory
from prune2deploy.networks.table import NETWORKS

if TYPE_CHECKING:
    import torch

EXAMPLE_BATCH = 2
"""A batch of 1 would be taken for a constant in the exported graph; a batch of 2 leaves the axis dynamic."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network that can be run.

    Attributes:
        name: the spec it was loaded from.
        module: in eval mode, float32, on the CPU.
        example_inputs: what ``module`` takes; batch 2 where the network allows it.
        source: the Python file of a user's network, else None.
    """

    name: str
    module: "torch.nn.Module"
    example_inputs: "tuple[torch.Tensor, ...]"
    source: Path | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample of the first input, without the batch axis."""
        return tuple(self.example_inputs[0].shape[1:])


@dataclass(frozen=True)
class _Wish:
    """What the caller asks of a network; None where it leaves the choice."""

    num_classes: int | None
    in_channels: int | None
    input_shape: tuple[int, ...] | None


def load_network(
    spec: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Network:
    """Build a network, with weights drawn from ``seed``; torch's global random state stays as it was.

    Args:
        spec: ``resnet56``, ``torchvision:resnet18``, ``timm:resnet18``, or ``path/to/file.py:function`` whose function
            returns a module or ``(module, example_inputs)``; the function is given ``num_classes`` and ``in_channels``
            if its signature has them.
        num_classes: width of the classifier; by default the network's own.
        in_channels: channels of the images; by default those of ``input_shape``, else the network's own.
        input_shape: one sample, [C, H, W]; by default the network's own. A function's own example inputs win over it.
        seed: of the random weights and of the example inputs.

    Raises:
        InputError: if the network is unknown, cannot be built, or does not accept its input.
    """
    import torch

    wish = _Wish(num_classes, _channels(in_channels, input_shape), input_shape)
    _require_positive(wish)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, examples, source = _build(spec, wish)
        module = module.to(device="cpu", dtype=torch.float32).eval()
        network = Network(spec, module, _prepare(module, examples), source)
        _try_out(network)
    return network


def _channels(in_channels: int | None, input_shape: tuple[int, ...] | None) -> int | None:
    if input_shape is None:
        return in_channels
    if in_channels is not None and input_shape and input_shape[0] != in_channels:
        raise InputError(
            f"the input shape {list(input_shape)} has {input_shape[0]} channels, but the images have {in_channels}"
        )
    return input_shape[0] if len(input_shape) == 3 else in_channels


def _require_positive(wish: _Wish) -> None:
    numbers = {"number of classes": wish.num_classes, "number of channels": wish.in_channels}
    for what, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"the {what} is {number}, but must be 1 or more")
    if wish.input_shape is not None and (not wish.input_shape or min(wish.input_shape) < 1):
        raise InputError(f"the input shape {list(wish.input_shape)} must name sizes of 1 or more, such as [3, 32, 32]")


_Built = tuple["torch.nn.Module", "tuple[torch.Tensor, ...]", Path | None]


def _build(spec: str, wish: _Wish) -> _Built:
    if is_factory(spec):
        return _from_file(spec, wish)
    zoo, colon, name = spec.partition(":")
    if colon and zoo in _ZOOS:
        return _ZOOS[zoo](name, wish)
    if spec in NETWORKS:
        return _built_in(spec, wish)
    close = get_close_matches(spec.lower(), NETWORKS, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "write one of them,"
    raise InputError(
        f"unknown network '{spec}'; {hint} built in are {', '.join(NETWORKS)}; "
        f"others are torchvision:NAME, timm:NAME and path/to/file.py:function"
    )


def _built_in(name: str, wish: _Wish) -> _Built:
    info = NETWORKS[name]
    module_name, _, function = info.build.partition(":")
    builder: Callable[..., torch.nn.Module] = getattr(importlib.import_module(module_name), function)
    channels, *size = info.input_shape
    in_channels = wish.in_channels or channels
    module = builder(num_classes=wish.num_classes or info.num_classes, in_channels=in_channels)
    return module, (_example(wish.input_shape or (in_channels, *size)),), None


def _from_file(spec: str, wish: _Wish) -> _Built:
    import torch

    wanted = "an nn.Module or (module, example_inputs)"
    options = {"num_classes": wish.num_classes, "in_channels": wish.in_channels}
    result, path = call_factory(spec, wanted=wanted, options=options)
    module, examples = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"'{spec}' returned {_type_name(result)}, but {wanted} is wanted")
    if isinstance(examples, torch.Tensor):
        examples = (examples,)
    if examples is None:
        if wish.input_shape is None:
            raise InputError(
                f"'{spec}' returned a module without example inputs; "
                f"return (module, example_inputs) or give --input NAME:SHAPE"
            )
        examples = (_example(wish.input_shape),)
    if not isinstance(examples, tuple | list) or not all(isinstance(each, torch.Tensor) for each in examples):
        raise InputError(
            f"'{spec}' returned example inputs that are not tensors; return a tensor or a tuple of tensors"
        )
    if not examples:
        raise InputError(f"'{spec}' returned no example input; return a tensor or a tuple of tensors")
    return module, tuple(examples), path


def _from_torchvision(name: str, wish: _Wish) -> _Built:
    torchvision = _import_zoo("torchvision")
    if name not in torchvision.models.list_models():
        raise _unknown_in_zoo("torchvision", name, torchvision.models.list_models())
    if wish.in_channels not in (None, 3):
        raise InputError(
            f"torchvision networks take images of 3 channels, not {wish.in_channels}; "
            f"use timm:NAME or path/to/file.py:function"
        )
    options = {} if wish.num_classes is None else {"num_classes": wish.num_classes}
    module = _guard_zoo(lambda: torchvision.models.get_model(name, weights=None, **options), f"torchvision:{name}")
    return module, (_example(wish.input_shape or (3, 224, 224)),), None


def _from_timm(name: str, wish: _Wish) -> _Built:
    timm = _import_zoo("timm")
    if not timm.is_model(name):
        raise _unknown_in_zoo("timm", name, timm.list_models())
    options = {"num_classes": wish.num_classes, "in_chans": wish.in_channels}
    given = {key: value for key, value in options.items() if value is not None}
    module = _guard_zoo(lambda: timm.create_model(name, pretrained=False, **given), f"timm:{name}")
    channels, *size = module.pretrained_cfg.get("input_size", (3, 224, 224))
    return module, (_example(wish.input_shape or (wish.in_channels or channels, *size)),), None


_ZOOS: dict[str, Callable[[str, _Wish], _Built]] = {"torchvision": _from_torchvision, "timm": _from_timm}


def _import_zoo(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except Exception as error:
        raise InputError(
            f"{package} cannot be imported ({one_line(error, 120)}); install a version that fits your torch: "
            f"pip install 'prune2deploy[zoo]'"
        ) from error


def _guard_zoo(build: Callable[[], Any], spec: str) -> Any:
    try:
        return build()
    except Exception as error:
        raise InputError(
            f"'{spec}' cannot be built ({one_line(error, 160)}); wrap it in path/to/file.py:function"
        ) from error


def _unknown_in_zoo(zoo: str, name: str, names: list[str]) -> InputError:
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"see {zoo}.list_models()"
    return InputError(f"{zoo} has no network '{name}'; {hint}")


def _example(shape: tuple[int, ...]) -> "torch.Tensor":
    import torch

    return torch.randn(EXAMPLE_BATCH, *shape)


def _prepare(module: "torch.nn.Module", examples: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
    """Return the examples on the CPU, float32 where they are real, and a batch of 1 repeated if the module takes it."""
    import torch

    ready = tuple(
        (each.detach().float() if each.is_floating_point() else each.detach()).cpu().contiguous() for each in examples
    )
    if any(each.ndim == 0 or each.shape[0] != 1 for each in ready):
        return ready
    repeated = tuple(each.repeat(EXAMPLE_BATCH, *[1] * (each.ndim - 1)) for each in ready)
    try:
        with torch.no_grad():
            module(*repeated)
    except Exception:  # a network made for a batch of 1 stays so
        return ready
    return repeated


def _try_out(network: Network) -> None:
    import torch

    try:
        with torch.no_grad():
            network.module(*network.example_inputs)
    except Exception as error:
        shapes = ", ".join(str(list(each.shape)) for each in network.example_inputs)
        raise InputError(
            f"network '{network.name}' does not accept an input of shape {shapes} ({one_line(error, 160)}); "
            f"give another --input"
        ) from error


def _type_name(value: object) -> str:
    return f"a {type(value).__name__}" if value is not None else "nothing"
