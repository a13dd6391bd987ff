"""The narrow PyTorch network: the modules of any factory, sliced to the channels that pruning left.

`load_narrow` needs no graph and no pickle: ``narrow.json`` says what is kept of which parameter, and
``weights.safetensors`` holds what is left. Both are written by ``p2d export RUN --torch``.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import read_json
from prune2deploy.networks import load_network
from prune2deploy.networks.weights import read_safetensors

SCHEMA_VERSION = 1
WEIGHTS, MANIFEST, GROUPS = "weights.safetensors", "narrow.json", "groups.json"
LOAD_RTOL = 1e-3
"""How far the outputs of the example may lie from those noted, of the largest: another machine may run it."""

Factory = Callable[[], Any] | nn.Module | str


@runtime_checkable
class Narrowable(Protocol):
    """A module whose code depends on its channels, and that can be told which are left."""

    def narrow_channels(self, kept_in: Sequence[int], kept_out: Sequence[int]) -> None:
        """Work on the channels that are left: the kept old indices of the input's and of the output's, in order."""


def load_narrow(factory: Factory, folder: Path | str) -> nn.Module:
    """Return a factory's network on the channels that were kept, with their weights, in eval mode.

    It is a plain network of the factory's own modules: it can be trained on, saved, exported and pruned again.

    Args:
        factory: what built the dense network: a function without arguments that returns an ``nn.Module`` or
            ``(module, example_inputs)``, such a module (it is copied), or a spec as ``p2d prune`` takes it.
        folder: what ``p2d export RUN --torch`` wrote: ``RUN/narrow``.

    Raises:
        InputError: if the folder is not one, the factory's network is another one, or a module's code hard-codes a
            width, which is named.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    tensors, _ = read_safetensors(_file(folder, WEIGHTS))
    module = dense_network(factory, manifest, folder)
    _require_same(module, manifest, tensors, folder)
    narrow_in_place(module, manifest, tensors)
    _require_outputs(run_named(module, example_inputs(manifest["inputs"])), manifest, folder)
    return module


# --- files ------------------------------------------------------------------------------------------------------------


def _file(folder: Path, name: str) -> Path:
    if not folder.is_dir() or not (folder / name).is_file():
        where = "it has no " + name if folder.is_dir() else "there is no such folder"
        raise InputError(f"'{folder}' holds no narrow network: {where}; name RUN/narrow of 'p2d export RUN --torch'")
    return folder / name


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = _file(folder, MANIFEST)
    document = read_json(path)
    parts = {"parameters": dict, "modules": dict, "groups": dict, "biases": list, "inputs": list, "outputs": list}
    if not isinstance(document, dict) or "schema_version" not in document:
        raise InputError(f"'{path}' is not of a narrow network; run 'p2d export RUN --torch' again")
    if document["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"'{path}' has the schema version {document['schema_version']}, and this p2d reads {SCHEMA_VERSION}; "
            "run 'p2d export RUN --torch' again"
        )
    wrong = next((name for name, kind in parts.items() if not isinstance(document.get(name), kind)), None)
    if wrong is not None:
        raise InputError(f"'{path}' is damaged: it has no '{wrong}'; run 'p2d export RUN --torch' again")
    return document


# --- the dense network ------------------------------------------------------------------------------------------------


def dense_network(factory: Factory, manifest: Mapping[str, Any], folder: Path) -> nn.Module:
    """Return the factory's network on the CPU in eval mode; torch's random state stays as it was.

    Raises:
        InputError: if the factory does not make one.
    """
    with torch.random.fork_rng(devices=[]):
        if isinstance(factory, str):
            made: Any = load_network(factory, **_options(manifest)).module
        else:
            made = copy.deepcopy(factory) if isinstance(factory, nn.Module) else _called(factory)
    made = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(made, nn.Module):
        raise InputError(f"the factory returns {type(made).__name__}, but an nn.Module is wanted; return the network")
    module = made.to("cpu").eval()
    _rebuild(module, manifest, folder)
    return module


def _options(manifest: Mapping[str, Any]) -> dict[str, Any]:
    shape = manifest.get("input_shape")
    return {
        "num_classes": manifest.get("num_classes"),
        "in_channels": manifest.get("in_channels"),
        "input_shape": None if shape is None else tuple(shape),
    }


def _called(factory: Callable[[], Any]) -> Any:
    if not callable(factory):
        raise InputError(f"the factory is {type(factory).__name__}; give a function, a module, or a network's name")
    with suppress(ValueError):  # of a builtin without a signature
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise InputError(
                f"the factory cannot be called without arguments ({one_line(error, 120)}); wrap it in a lambda"
            ) from error
    return factory()


def _rebuild(module: nn.Module, manifest: Mapping[str, Any], folder: Path) -> None:
    """Add what the pruning method left in the network."""
    if manifest.get("method") is None:
        return
    from prune2deploy.groups import Groups
    from prune2deploy.methods import load_method

    method = load_method(manifest["method"]["name"], **manifest["method"]["options"])
    method.rebuild(module, Groups.load(_file(folder, GROUPS)))


def _require_same(module: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Require that the module is the network that was narrowed, at full width."""
    state, wanted = module.state_dict(), manifest["parameters"]
    differences = [f"'{name}' is missing" for name in wanted if name not in state]
    differences += [f"'{name}' is too much" for name in state if name not in wanted]
    differences += [
        f"'{name}' is {list(state[name].shape)} instead of {known['dense']}"
        for name, known in wanted.items()
        if name in state and list(state[name].shape) != known["dense"]
    ]
    if differences:
        more = f" and {len(differences) - 2} more" if len(differences) > 2 else ""
        raise InputError(
            f"the factory's network is not the one that '{folder}' is of: {'; '.join(differences[:2])}{more}; "
            f"give what builds {manifest.get('network', 'it')} at full width"
        )
    expected = {name: known["narrow"] for name, known in wanted.items()}
    expected |= {f"{name}.bias": [entry] for name, entry in manifest["biases"]}
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise InputError(
            f"'{folder / WEIGHTS}' does not hold the parameters that '{folder / MANIFEST}' lists; "
            "run 'p2d export RUN --torch' again"
        )


# --- slicing ----------------------------------------------------------------------------------------------------------


def narrow_in_place(module: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give a dense module the narrow parameters, buffers and attributes that the manifest lists."""
    modules = dict(module.named_modules())
    shared: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        _set(modules[path], own, tensor, shared)
    for path, part in modules.items():
        resize = next((resize for kind, resize in RESIZE.items() if isinstance(part, kind)), None)
        if resize is not None:
            resize(part, manifest["groups"].get(path))
    for path, kept in manifest["modules"].items():
        part = modules.get(path)
        if not isinstance(part, Narrowable):
            raise InputError(
                f"module '{path}' of the factory's network cannot be told which channels are left; "
                "give it the method narrow_channels(kept_in, kept_out)"
            )
        part.narrow_channels(kept["in"], kept["out"])


def _set(owner: nn.Module, name: str, tensor: Tensor, shared: dict[int, tuple[nn.Parameter, Tensor]]) -> None:
    """Replace a parameter or buffer; parameters that were one stay one. A module's extra state is its own matter."""
    if name == _EXTRA_STATE:
        owner.set_extra_state(tensor)
        return
    old = getattr(owner, name, None)
    value = tensor.to(old.dtype) if isinstance(old, Tensor) else tensor
    if name in owner._buffers:
        owner._buffers[name] = value.clone()
        return
    known = shared.get(id(old)) if isinstance(old, nn.Parameter) else None
    if known is None:
        needs = old.requires_grad if isinstance(old, nn.Parameter) else True
        known = (nn.Parameter(value.clone(), requires_grad=needs), value)
        if isinstance(old, nn.Parameter):
            shared[id(old)] = known
    owner.register_parameter(name, known[0])


_EXTRA_STATE = nn.modules.module._EXTRA_STATE_KEY_SUFFIX


def _conv(part: Any, groups: int | None) -> None:
    part.groups = groups or part.groups
    part.out_channels, part.in_channels = part.weight.shape[0], part.weight.shape[1] * part.groups


def _conv_transposed(part: Any, groups: int | None) -> None:
    part.groups = groups or part.groups
    part.in_channels, part.out_channels = part.weight.shape[0], part.weight.shape[1] * part.groups


def _linear(part: Any, groups: int | None) -> None:
    part.out_features, part.in_features = part.weight.shape


def _norm(part: Any, groups: int | None) -> None:
    carrier = part.weight if part.weight is not None else part.running_mean
    if carrier is not None:
        part.num_features = len(carrier)


def _group_norm(part: Any, groups: int | None) -> None:
    if part.weight is not None:
        size = part.num_channels // part.num_groups
        part.num_channels = len(part.weight)
        part.num_groups = max(1, part.num_channels // size)


def _layer_norm(part: Any, groups: int | None) -> None:
    if part.weight is not None:
        part.normalized_shape = tuple(part.weight.shape)


def _prelu(part: Any, groups: int | None) -> None:
    part.num_parameters = len(part.weight)


RESIZE: dict[type[nn.Module], Callable[[Any, int | None], None]] = {
    nn.modules.conv._ConvTransposeNd: _conv_transposed,
    nn.modules.conv._ConvNd: _conv,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.PReLU: _prelu,
}
"""What modules say of their own widths, beside their parameters; a kind stands behind those that it contains."""


# --- running ----------------------------------------------------------------------------------------------------------


def example_inputs(inputs: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """Return the inputs that a manifest lists: waves in [-1, 1] that are the same everywhere, zeros for integers."""
    return tuple(_wave(entry["shape"], getattr(torch, entry["dtype"]), place) for place, entry in enumerate(inputs))


def _wave(shape: Sequence[int], dtype: torch.dtype, place: int) -> Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(list(shape), dtype=dtype)
    count = np.arange(int(np.prod(shape)), dtype=np.float64)
    return torch.from_numpy(np.sin(0.7 * count + 0.3 * np.sqrt(count) + place).reshape(shape)).to(dtype)


def run_named(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of a narrow network; where its code fails on narrow values, the module is named.

    Raises:
        InputError: if it fails.
    """
    running: list[str] = []
    with _following(module, running), torch.no_grad():
        try:
            result = module(*inputs)
        except Exception as error:  # whatever somebody's forward() raises
            name = running[-1] if running else ""
            raise InputError(
                f"{_place(name, error)} hard-codes a width, so the narrow network does not run "
                f"({one_line(error, 120)}); let its forward() take the width from the tensor's shape"
            ) from error
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


@contextmanager
def _following(module: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the names of the modules whose forward() is under way in a list."""
    handles = []

    def done(*_: object) -> None:
        running.pop()

    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(part.register_forward_hook(done))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(name: str, error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{_TORCH}/" not in frame.filename]
    own = [frame for frame in frames if frame.filename != __file__]
    where = f" ({own[-1].filename}:{own[-1].lineno} in {own[-1].name})" if own else ""
    return (f"module '{name}'" if name else "the network itself") + where


_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Sampled:
    """Some values of an output."""

    shape: list[int]
    scale: float
    values: list[float]

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"shape": self.shape, "scale": self.scale, "values": self.values}


def sampled(output: Tensor) -> Sampled:
    """Return up to 64 values of an output, spread over it, and its largest magnitude."""
    flat = output.detach().double().reshape(-1)
    places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), 64)).round().long()
    scale = float(flat.abs().max()) if len(flat) else 0.0
    return Sampled(list(output.shape), scale, flat[places].tolist())


def _require_outputs(outputs: Sequence[Tensor], manifest: Mapping[str, Any], folder: Path) -> None:
    """Require the outputs that were noted when the network was written: names and shapes alone may fit another one."""
    found, wanted = [sampled(output) for output in outputs], manifest["outputs"]
    same = len(found) == len(wanted) and all(
        one.shape == known["shape"]
        and np.allclose(one.values, known["values"], rtol=0, atol=LOAD_RTOL * max(known["scale"], 1e-12))
        for one, known in zip(found, wanted, strict=True)
    )
    if not same:
        raise InputError(
            f"the factory's network with the weights of '{folder}' gives other outputs than were noted there; "
            "its forward() or the weights are not those that were exported"
        )
