"""Which constant of an exported graph holds which parameter of the network, and what narrow constants make of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from prune2deploy.exporter import export_network
from prune2deploy.graph.model import copy_of
from prune2deploy.graph.narrow import Narrowed
from prune2deploy.graph.normal import normalise, to_model


@dataclass(frozen=True)
class _Turned:
    """A constant that holds a parameter in another form."""

    name: str
    transposed: bool


def find_origins(module: nn.Module, inputs: Sequence[Tensor], model: onnx.ModelProto) -> Origins:
    """Return for every parameter and buffer the constant of the graph that holds it.

    The exporter computes with small constants: a gain's ``view(1, -1, 1, 1)`` is a constant of another name. Those
    are found again by exporting the network once more, with values that occur nowhere else in their place.
    """
    state = module.state_dict()
    there = {tensor.name for tensor in normal_form(model).graph.initializer}
    names = {name: name for name in state if name in there}
    lost = [name for name, tensor in state.items() if name not in there and _traceable(tensor)]
    return Origins(names, {} if not lost else _traced(module, inputs, lost, set(names)))


class Origins(dict[str, str]):
    """Parameter -> constant; ``transposed`` are those that hold the matrix the other way round."""

    def __init__(self, names: Mapping[str, str], turned: Mapping[str, _Turned]) -> None:
        super().__init__({**names, **{name: found.name for name, found in turned.items()}})
        self.transposed = {name for name, found in turned.items() if found.transposed}


def _traceable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 1


def _traced(module: nn.Module, inputs: Sequence[Tensor], lost: Sequence[str], known: set[str]) -> dict[str, _Turned]:
    probe = copy.deepcopy(module)
    state, first = probe.state_dict(), 1
    marks: dict[str, np.ndarray] = {}
    for name in lost:
        count = state[name].numel()
        mark = torch.arange(first, first + count, dtype=torch.float64) / 2.0**12  # exact in float32 up to 16 million
        state[name].copy_(mark.reshape(state[name].shape))
        marks[name] = state[name].double().numpy()
        first += count
    found: dict[str, _Turned] = {}
    for constant in normal_form(export_network(probe, inputs, fuse=False).model).graph.initializer:
        if constant.name in known or int(np.prod(constant.dims)) < 2:
            continue
        array = numpy_helper.to_array(constant)
        for name, own in marks.items():
            if array.size != own.size:
                continue
            if np.array_equal(array.ravel(), own.ravel()):
                found[name] = _Turned(constant.name, transposed=False)
            elif own.ndim == 2 and array.shape == own.shape[::-1] and np.array_equal(array.T, own):
                found[name] = _Turned(constant.name, transposed=True)
    return found


def normal_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model's normal form; the given one is left as it is."""
    return to_model(normalise(copy_of(model)), model)


def narrow_tensors(
    module: nn.Module, origins: Origins, narrowed: Narrowed
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the narrow parameters and buffers, and what ``narrow.json`` says of each."""
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, tensor in module.state_dict().items():
        constant = origins.get(name)
        array = narrowed.arrays.get(constant or "")
        kept: dict[str, Any] = {}
        if array is not None and constant is not None:
            found = {int(axis): indices for axis, indices in narrowed.kept.get(constant, {}).items()}
            array, found = _in_own_form(array, found, tensor, transposed=name in origins.transposed)
            kept = {str(axis): indices for axis, indices in found.items()}
        new = tensor if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(tensor.dtype)
        tensors[name] = new.detach().clone()
        entries[name] = {"dense": list(tensor.shape), "narrow": list(new.shape), "kept": kept}
    return tensors, entries


def _in_own_form(
    array: np.ndarray, kept: dict[int, Any], tensor: Tensor, *, transposed: bool
) -> tuple[np.ndarray, dict[int, Any]]:
    """Return a constant and its kept indices in the form of the parameter that it was made of."""
    if transposed:
        return array.T, {1 - axis: indices for axis, indices in kept.items()}
    if array.ndim == tensor.ndim:
        return array, kept
    shape = list(tensor.shape)
    own: dict[int, Any] = {}
    for axis, indices in kept.items():  # a vector seen as [1, C, 1, 1], say: the only axis of that size
        places = [place for place, size in enumerate(shape) if size > 1 and place not in own]
        place = next((one for one in places if tensor.shape[one] > max(indices, default=0)), places[0])
        own[place], shape[place] = indices, array.shape[axis]
    return array.reshape(shape), own
