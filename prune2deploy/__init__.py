"""Prune a CNN's channels, remove them from its ONNX graph with proof, and measure the latency honestly.

>>> import prune2deploy as p2d
>>> pruner = p2d.Pruner(model, example_inputs, method=p2d.methods.L1(), target=p2d.Target(macs=0.5))
>>> pruned = pruner.finish()
>>> p2d.export(model, pruned, example_inputs, "slim.onnx")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune2deploy import methods
    from prune2deploy.budget import Target
    from prune2deploy.narrow import load_narrow
    from prune2deploy.pruner import Pruned, Pruner, export

__version__ = "0.1.0"
__all__ = ["Pruned", "Pruner", "Target", "__version__", "export", "load_narrow", "methods"]

_MODULES = {
    "Pruned": "prune2deploy.pruner",
    "Pruner": "prune2deploy.pruner",
    "Target": "prune2deploy.budget",
    "export": "prune2deploy.pruner",
    "load_narrow": "prune2deploy.narrow",
}
"""Where the public names are; torch is imported only when one of them is asked for."""


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("prune2deploy.methods")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
