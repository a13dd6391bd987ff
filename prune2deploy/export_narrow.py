"""Write the narrow PyTorch network of a masked one: what its own modules need, found in its exported graph, and proved.

`graph.narrow` says what is kept; here graph and modules meet. The result is built anew from the factory, as a user will
build it, and must compute what the masked network does before its files get their names.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from prune2deploy.errors import InputError, VerifyError
from prune2deploy.exporter import Exported, export_network, require_agreement
from prune2deploy.files import write_json
from prune2deploy.graph.narrow import Code, Narrowed, narrow
from prune2deploy.groups import Groups
from prune2deploy.narrow import (
    GROUPS,
    MANIFEST,
    RESIZE,
    SCHEMA_VERSION,
    WEIGHTS,
    Narrowable,
    example_inputs,
    narrow_in_place,
    run_named,
    sampled,
)
from prune2deploy.networks import load_network, save_weights
from prune2deploy.origins import Origins, find_origins, narrow_tensors, normal_form
from prune2deploy.pipeline import Loaded, forget_narrow, real_samples
from prune2deploy.report import read_report, update_section

if TYPE_CHECKING:
    from prune2deploy.methods.base import Method

RTOL = 1e-4
"""The difference allowed between masked and narrow network, of the largest output: they add up in other orders."""


@dataclass(frozen=True, eq=False)
class NarrowNetwork:
    """A narrow network as it was written.

    Attributes:
        module: rebuilt from the factory, in eval mode.
        macs, parameters: of convolutions and linear layers.
        whole: what could not be narrow: ``node``, its ``module`` and ``source`` where they are known, and ``why``.
        idle: modules with parameters that eval mode does not run, as heads for training alone: they stay as they were.
        difference: the largest difference to the masked network, of its largest output.
    """

    module: nn.Module
    macs: int
    parameters: int
    whole: list[dict[str, str]]
    idle: list[str]
    difference: float

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "macs": self.macs,
            "parameters": self.parameters,
            "whole": self.whole,
            "idle": self.idle,
            "torch_difference": self.difference,
        }


def export_narrow(
    masked: nn.Module,
    inputs: Sequence[Tensor],
    factory: Callable[[], nn.Module],
    folder: Path,
    *,
    about: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    samples: Sequence[Tensor] = (),
    prove: Callable[[nn.Module], object] = lambda _: None,
) -> NarrowNetwork:
    """Write ``weights.safetensors`` and ``narrow.json`` to a folder, once the network that they give is proved.

    Args:
        masked: the network with silent or merged channels, on the CPU; it is not changed.
        inputs: example inputs with a batch of at least 2.
        factory: builds the dense network anew, with the masked one's modules and any weights.
        folder: where the files go.
        about: further entries of ``narrow.json``: the spec of the network and its options.
        metadata: of ``weights.safetensors``.
        samples: further inputs to prove it on, of one input's batch.
        prove: called with the narrow network before anything is written; raises if it is not as it should be.

    Raises:
        InputError: if the network cannot be exported, or its code hard-codes a width; the module is named.
        VerifyError: if the narrow network computes something else.
    """
    masked = copy.deepcopy(masked).eval()
    exported = export_network(masked, inputs, fuse=False)
    origins = find_origins(masked, inputs, exported.model)
    source = _Source(masked, tuple(inputs), exported, origins, tuple(samples))
    code = Code(frozenset(origins.values()), _biased(masked, exported), _nodes_of(source.adaptable(), exported))
    try:
        network, tensors, found = _attempt(source, factory, code)
    except (InputError, VerifyError):
        if all(node.op_type != "Split" for node in exported.model.graph.node):
            raise
        network, tensors, found = _attempt(source, factory, replace(code, chunks=False))  # split by a size, it may be
    prove(network.module)
    save_weights(tensors, folder / WEIGHTS, metadata)
    write_json(folder / MANIFEST, {"schema_version": SCHEMA_VERSION, **(about or {}), **found})
    return network


@dataclass(frozen=True, eq=False)
class _Source:
    """A masked network with its export, and on what a narrow one is proved."""

    masked: nn.Module
    inputs: tuple[Tensor, ...]
    exported: Exported
    origins: Origins
    samples: tuple[Tensor, ...]

    def adaptable(self) -> set[str]:
        """Return the modules that can be told which channels are left."""
        return {name for name, part in self.masked.named_modules() if isinstance(part, Narrowable)}


def _attempt(
    source: _Source, factory: Callable[[], nn.Module], code: Code
) -> tuple[NarrowNetwork, dict[str, Tensor], dict[str, Any]]:
    """Return the narrow network, proved, with its parameters and buffers, and what ``narrow.json`` says."""
    exported = source.exported
    narrowed = narrow(exported.model, code)
    tensors, parameters = narrow_tensors(source.masked, source.origins, narrowed)
    biases = {exported.source_map[node]["module"]: torch.from_numpy(array) for node, array in narrowed.biases.items()}
    shown = [{"shape": list(one.shape), "dtype": str(one.dtype).removeprefix("torch.")} for one in source.inputs]
    found: dict[str, Any] = {
        "parameters": parameters,
        "biases": sorted([name, len(array)] for name, array in biases.items()),
        "groups": {exported.source_map[node].get("module", ""): count for node, count in narrowed.groups.items()},
        "modules": {path: _boundary(path, exported, narrowed) for path in sorted(source.adaptable())},
        "inputs": shown,
    }
    tensors |= {f"{name}.bias": array for name, array in biases.items()}
    module = factory().to("cpu").eval()
    narrow_in_place(module, found, tensors)
    example = example_inputs(shown)
    found["outputs"] = [sampled(one).to_json() for one in run_named(module, example)]
    difference = _difference(source.masked, module, [example, source.inputs, *([one] for one in source.samples)])
    if difference > RTOL:
        raise _differs(difference, module, source.inputs, exported, narrowed)
    whole, idle = _whole(narrowed, exported), _idle(source.masked, source.inputs, source.origins)
    cost = narrowed.after()
    network = NarrowNetwork(module, cost.macs, cost.parameters, whole, idle, difference)
    return network, tensors, {**found, "whole": whole, "idle": idle}


def narrow_run(run: Path, task: Loaded, method: Method) -> None:
    """Write ``narrow/`` of a run whose ``slim.onnx`` is there, and what a report says of it.

    Args:
        run: the folder; its lock is held.
        task: with the masked network.
        method: what pruned it.

    Raises:
        InputError: if the network's code hard-codes a width; the module is named.
        VerifyError: if the narrow network differs from the masked one or from ``slim.onnx``.
    """
    recipe, network, folder = task.recipe, task.network, run / "narrow"
    options: dict[str, Any] = {
        "num_classes": task.data.num_classes,
        "in_channels": task.data.in_channels,
        "input_shape": recipe.input_shape or task.data.input_shape,
    }
    added = {"name": recipe.method, "options": recipe.method_options} if method.adds_modules else None
    groups = Groups.load(run / GROUPS)

    def factory() -> nn.Module:
        module = load_network(recipe.network, **options).module
        method.rebuild(module, groups)
        return module

    forget_narrow(folder)
    about = {"network": recipe.network, **options, "mean": task.mean, "std": task.std, "method": added}
    metadata = {"network": recipe.network, "mean": json.dumps(task.mean), "std": json.dumps(task.std)}
    samples = [torch.from_numpy(array) for array in real_samples(task).values()]
    agreement = 0.0

    def prove(module: nn.Module) -> None:
        nonlocal agreement
        agreement = require_agreement(module, run / "slim.onnx", network.example_inputs)

    written = export_narrow(
        *(network.module, network.example_inputs, factory, folder),
        about=about,
        metadata=metadata,
        samples=samples,
        prove=prove,
    )
    if added is not None:
        groups.save(folder / GROUPS)
    report = read_report(run)
    narrow_section = {**written.to_json(), "slim_difference": agreement}
    update_section(run, "export", {**report["export"], "narrow": narrow_section})
    found = warnings_of(written, report["slim"]["macs"]["after"])
    update_section(run, "slim", {**report["slim"], "warnings": [*report["slim"]["warnings"], *found]})


def warnings_of(written: NarrowNetwork, slim_macs: int) -> list[str]:
    """Return what a user should be told: where it is wider than the slim graph, and what is not narrow at all."""
    found = []
    if written.macs > slim_macs:
        more, places = written.macs - slim_macs, list(dict.fromkeys(named(entry) for entry in written.whole))
        rest = f"; and {len(places) - 3} more" if len(places) > 3 else ""
        shown = f"kept whole, since they name widths: {'; '.join(places[:3])}{rest}"
        why = shown if places else "its groups and chunks stay equal, its branches stay"
        found.append(f"the narrow PyTorch network has {more:,} MACs more than the slim graph ({why})")
    if written.idle:
        names = ", ".join(f"'{name}'" for name in written.idle)
        found.append(f"{names} of the narrow PyTorch network stay as wide as they were: eval mode does not run them")
    return found


# --- modules and nodes ------------------------------------------------------------------------------------------------


def _nodes_of(paths: set[str], exported: Exported) -> set[str]:
    """Return the nodes of some modules and of those inside them."""
    return {
        node
        for node, record in exported.source_map.items()
        if any(f"{record.get('module', '')}.".startswith(f"{path}.") for path in paths)
    }


def _biased(module: nn.Module, exported: Exported) -> set[str]:
    """Return the nodes of layers that can be given a bias: the only node of a module that has none yet."""
    parts = dict(module.named_modules())
    by_module: dict[str, list[str]] = {}
    for node, record in exported.source_map.items():
        by_module.setdefault(record.get("module", ""), []).append(node)
    return {
        nodes[0]
        for path, nodes in by_module.items()
        if len(nodes) == 1 and isinstance(parts.get(path), _LAYERS) and parts[path].bias is None
    }


_LAYERS = tuple(kind for kind in RESIZE if issubclass(kind, nn.Linear | nn.modules.conv._ConvNd))


def _boundary(path: str, exported: Exported, narrowed: Narrowed) -> dict[str, list[int]]:
    """Return the kept channels of what a module reads and of what it gives out."""
    inside = _nodes_of({path}, exported)
    nodes = [node for node in narrowed.before.graph.node if node.name in inside]
    made = {name for node in nodes for name in node.output}
    constants = {tensor.name for tensor in narrowed.before.graph.initializer}
    others = (node for node in narrowed.before.graph.node if node.name not in inside)
    wanted = {name for node in others for name in node.input} | {one.name for one in narrowed.before.graph.output}
    ends = {
        "in": {name for node in nodes for name in node.input if name and name not in made | constants},
        "out": made & wanted,
    }
    found: dict[str, list[int]] = {}
    for end, names in ends.items():
        kept = [narrowed.kept_channels(name) for name in sorted(names)]
        if len(kept) != 1 or kept[0] is None:
            raise InputError(
                f"module '{path}' has narrow_channels(), but not one input and one output with channels on axis 1; "
                "leave that method out, or divide the module"
            )
        found[end] = kept[0]
    return found


def _whole(narrowed: Narrowed, exported: Exported) -> list[dict[str, str]]:
    """Return what could not be narrow, by module and source line."""
    readers: dict[str, list[str]] = {}
    for node in narrowed.before.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    outputs = {node.name: list(node.output) for node in narrowed.before.graph.node}

    def record(node: str) -> dict[str, str]:
        own = exported.source_map.get(node)
        if own:
            return own
        beside = (exported.source_map.get(reader) for name in outputs.get(node, ()) for reader in readers.get(name, ()))
        found = next((one for one in beside if one), {})  # the exporter notes nothing of some nodes, as of Split
        return {"reader" if key == "module" else key: text for key, text in found.items()}

    return [{"node": node, "why": why, **record(node)} for node, why in narrowed.whole.items()]


def _idle(module: nn.Module, inputs: Sequence[Tensor], origins: Mapping[str, str]) -> list[str]:
    """Return the outermost modules with parameters of which a run in eval mode, and the graph, know nothing."""
    run: set[str] = set()
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: run.add(name)) for name, part in module.named_modules()
    ]
    run_named(module, inputs)
    for handle in handles:
        handle.remove()
    used = run | {name.rpartition(".")[0] for name in origins}
    idle: list[str] = []
    for name, part in module.named_modules():
        inner = {f"{name}.{below}" if below else name for below, _ in part.named_modules()}
        if name and next(part.parameters(), None) is not None and not inner & used:
            idle += [] if any(name.startswith(f"{other}.") for other in idle) else [name]
    return idle


def named(entry: Mapping[str, str]) -> str:
    """Return in words which code a node is of."""
    reader = f"what module '{entry['reader']}' reads" if entry.get("reader") else "the network itself"
    place = f"module '{entry['module']}'" if entry.get("module") else reader
    return f"{place} ({entry['source']})" if entry.get("source") else f"{place}, node '{entry.get('node', '')}'"


# --- proof ------------------------------------------------------------------------------------------------------------


def _difference(masked: nn.Module, module: nn.Module, cases: Sequence[Sequence[Tensor]]) -> float:
    """Return the largest difference of two networks, of the largest output; infinite where shapes differ."""
    worst = 0.0
    for inputs in cases:
        wanted, found = run_named(masked, inputs), run_named(module, inputs)
        if [one.shape for one in wanted] != [one.shape for one in found]:
            return float("inf")
        for want, got in zip(wanted, found, strict=True):
            scale = max(float(want.double().abs().max()), 1e-12) if want.numel() else 1.0
            gap = float((want.double() - got.double()).abs().max()) if want.numel() else 0.0
            worst = max(worst, gap / scale if gap == gap else float("inf"))
    return worst


def _differs(
    difference: float, module: nn.Module, inputs: Sequence[Tensor], exported: Exported, narrowed: Narrowed
) -> Exception:
    """Return the error for a narrow network that computes something else, by the first node that its code changed."""
    again = normal_form(export_network(module, inputs, fuse=False).model)
    wanted = {node.name: node for node in narrowed.model.graph.node}
    mine, theirs = _small(again, module), _small(narrowed.model, module)
    for node in again.graph.node:
        other = wanted.get(node.name)
        if other is None:
            continue
        same = node.op_type == other.op_type and sorted(map(str, node.attribute)) == sorted(map(str, other.attribute))
        pairs = zip(node.input, other.input, strict=False)
        if not same or any(mine.get(a, "") != theirs.get(b, "") for a, b in pairs):
            place = named({"node": node.name, **exported.source_map.get(node.name, {})})
            return InputError(
                f"{place} hard-codes a width, so the narrow network computes something else; "
                "let its forward() take the width from the tensor's shape"
            )
    return VerifyError(f"the narrow network differs from the masked one by {difference:.1e} of its largest output")


def _small(model: onnx.ModelProto, module: nn.Module) -> dict[str, str]:
    """Return the graph's constants that are no parameters, as text."""
    own = module.state_dict().keys()
    return {
        tensor.name: str(numpy_helper.to_array(tensor).tolist())
        for tensor in model.graph.initializer
        if tensor.name not in own and int(np.prod(tensor.dims)) <= 64
    }
