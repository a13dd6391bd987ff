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
    """One line of the table: where a method is, and what a user chooses by.

    Attributes:
        target: ``module:class``.
        summary: how it chooses, and whose it is.
        needs: what it cannot do without.
        status: see `Status`.
        yields: what comes out beside masks, or instead.
        source: what was read, and what is reconstructed.
    """

    target: str
    summary: str
    needs: Needs
    status: Status
    source: str
    yields: str = "masks"

    @property
    def weights_alone(self) -> bool:
        """Whether it is a function of the weights, which an ONNX file has as well."""
        return not (self.needs.data or self.needs.labels or self.needs.trains_weights) and self.status != "control"


METHODS: Mapping[str, MethodInfo] = {
    "l1": MethodInfo(
        "prune2deploy.methods.l1:L1",
        "sum of a filter's absolute weights (Li et al., ICLR 2017)",
        Needs(),
        "published",
        "the formula is common knowledge; joining the layers of a group is ours",
    ),
    "l2": MethodInfo(
        "prune2deploy.methods.l2:L2",
        "Euclidean norm of a filter (He et al., IJCAI 2018)",
        Needs(),
        "published",
        "the formula is common knowledge; joining the layers of a group is ours",
    ),
    "fpgm": MethodInfo(
        "prune2deploy.methods.fpgm:FPGM",
        "sum of a filter's distances to its layer's others (He et al., CVPR 2019)",
        Needs(),
        "published",
        "the formula is common knowledge; joining the layers of a group is ours",
    ),
    "bn": MethodInfo(
        "prune2deploy.methods.bn:BN",
        "expected activation by the norms' scale and shift (Oh et al., WACV 2022)",
        Needs(norms=True),
        "reconstructed",
        "read: the abstract; reconstructed: which moment is the score; ours: the scores x_next, and the mean fold",
        "masks, means of removed channels",
    ),
    "epruner": MethodInfo(
        "prune2deploy.methods.epruner:EPruner",
        "exemplars that affinity propagation finds among filters (Lin et al., TNNLS 2022)",
        Needs(pretrained=True),
        "published",
        "read: the authors' code; ours: the search of the preference, filling to the target, scope=all",
        "masks, norms that start anew",
    ),
    "taylor": MethodInfo(
        "prune2deploy.methods.taylor:Taylor",
        "squared derivative of the loss by a gate on the channel (Molchanov et al., CVPR 2019)",
        Needs(data=True, labels=True, pretrained=True),
        "published",
        "the formula is common knowledge; putting the gate in front of the readers is ours",
    ),
    "csgd": MethodInfo(
        "prune2deploy.methods.csgd:CSGD",
        "filters of a cluster are trained to be one, then merged without loss (Ding et al., CVPR 2019)",
        Needs(data=True, labels=True, pretrained=True, trains_weights=True),
        "published",
        "read: the authors' code; ours: the cosine schedule, which of a cluster's equal filters stays",
        "merges",
    ),
    "dagger": MethodInfo(
        "prune2deploy.methods.dagger:Dagger",
        "gates that a small module makes of the weights, trained against the cost (Su et al., 2020)",
        Needs(data=True, labels=True, pretrained=True),
        "reconstructed",
        "read: the abstract; reconstructed: features, module, regulariser, choice; ours: gates of groups, fold",
        "masks, gates folded into readers",
    ),
    "paam": MethodInfo(
        "prune2deploy.methods.paam:PAAM",
        "scores by attention among filters, trained in turn with the network (Babaiee et al., 2022)",
        Needs(data=True, labels=True, trains_weights=True),
        "reconstructed",
        "read: the abstract, a part of the method; reconstructed: attention, loss, turns; ours: scores of groups, start",
    ),
    "random": MethodInfo(
        "prune2deploy.methods.random:Random", "seeded random scores", Needs(), "control", "nothing to read"
    ),
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


def __getattr__(name: str) -> Any:
    """Return a method's class by its own name, such as ``CSGD``, and load it only then."""
    for key, info in METHODS.items():
        if info.target.partition(":")[2] == name:
            return method_class(key)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


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
