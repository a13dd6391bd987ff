"""The pruning methods: one table, usable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from prune2deploy.errors import InputError
from prune2deploy.methods.base import Method, Needs, describe_options

__all__ = ["METHODS", "MethodInfo", "describe_options", "load_method", "method_class"]

Status = Literal["published", "reconstructed", "control"]
"""``reconstructed``: the paper's formula could not be read; ``control``: what a method must beat."""


@dataclass(frozen=True)
class MethodInfo:
    """One line of the table: where a method is, and what a user chooses by."""

    target: str
    summary: str
    needs: Needs
    status: Status


METHODS: Mapping[str, MethodInfo] = {
    "l1": MethodInfo(
        "prune2deploy.methods.l1:L1", "sum of a filter's absolute weights (Li et al., ICLR 2017)", Needs(), "published"
    ),
    "l2": MethodInfo(
        "prune2deploy.methods.l2:L2", "Euclidean norm of a filter (He et al., IJCAI 2018)", Needs(), "published"
    ),
    "fpgm": MethodInfo(
        "prune2deploy.methods.fpgm:FPGM",
        "sum of a filter's distances to its layer's others (He et al., CVPR 2019)",
        Needs(),
        "published",
    ),
    "bn": MethodInfo(
        "prune2deploy.methods.bn:BN",
        "expected activation by the norms' scale and shift (Oh et al., WACV 2022)",
        Needs(norms=True),
        "reconstructed",
    ),
    "epruner": MethodInfo(
        "prune2deploy.methods.epruner:EPruner",
        "exemplars that affinity propagation finds among filters (Lin et al., TNNLS 2022)",
        Needs(pretrained=True),
        "published",
    ),
    "taylor": MethodInfo(
        "prune2deploy.methods.taylor:Taylor",
        "squared derivative of the loss by a gate on the channel (Molchanov et al., CVPR 2019)",
        Needs(data=True, labels=True, pretrained=True),
        "published",
    ),
    "random": MethodInfo("prune2deploy.methods.random:Random", "seeded random scores", Needs(), "control"),
}


def method_class(name: str) -> type[Method]:
    """Return the class of a method of `METHODS`.

    Raises:
        InputError: if there is no such method.
    """
    if name not in METHODS:
        raise InputError(f"there is no method '{name}'; the methods are {', '.join(sorted(METHODS))}")
    module, _, attribute = METHODS[name].target.partition(":")
    found: type[Method] = getattr(import_module(module), attribute)
    return found


def load_method(name: str, **options: Any) -> Method:
    """Return a method with its hyper-parameters.

    Raises:
        InputError: if there is no such method, or an option is unknown, of the wrong type or out of range.
    """
    found = method_class(name)
    known = describe_options(found)
    for option in options:
        if option not in known:
            listed = ", ".join(f"{key} ({allowed})" for key, allowed in known.items()) or "none"
            raise InputError(f"method '{name}' has no option '{option}'; its options are {listed}")
    return found(**options)
