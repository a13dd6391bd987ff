"""The pruning methods: one table, usable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from prune2deploy.errors import InputError
from prune2deploy.methods.base import Method, Needs, describe_options
from prune2deploy.plugins import METHODS_GROUP, plugins

__all__ = ["METHODS", "MethodInfo", "all_methods", "describe_options", "load_method", "method_class"]

Status = Literal["published", "reconstructed", "control", "plugin", "broken"]
"""``reconstructed``: the paper's formula could not be read; ``control``: what a method must beat; ``plugin``: another
package's; ``broken``: another package's that cannot be loaded."""


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
    "cap": MethodInfo(
        "prune2deploy.methods.cap:CaP",
        "what the other inputs of its readers make up for (Xie et al., Pruning with Compensation, 2021)",
        Needs(data=True, pretrained=True),
        "reconstructed",
        "read: the abstract; reconstructed: loss, compensation, search; ours: a group's loss, a regression per reader",
        "masks, new weights of readers",
    ),
    "cpli": MethodInfo(
        "prune2deploy.methods.cpli:CPLI",
        "a LASSO on contributions, guided by the loss, then least squares (Guo et al., AAAI 2020)",
        Needs(data=True, labels=True, pretrained=True),
        "reconstructed",
        "read: the abstract and a summary; reconstructed: the weights of samples and outputs; ours: groups, constants",
        "masks, new weights of readers",
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
    "adapruner": MethodInfo(
        "prune2deploy.methods.adapruner:AdaPruner",
        "widths by the norms' trained scales, the criterion by trial at these widths (Liu et al., 2021)",
        Needs(data=True, labels=True, trains_weights=True, norms=True),
        "reconstructed",
        "read: the abstract; reconstructed: the penalty, the width formula, the criteria; ours: filling to the target",
    ),
    "sp": MethodInfo(
        "prune2deploy.methods.sp:SP",
        "widths searched stage by stage in a trained super-network (Zhang, Ou, 2020)",
        Needs(data=True, labels=True, trains_weights=True),
        "reconstructed",
        "read: the abstracts; reconstructed: the losses; ours: stages, sorted channels, search by programming, filling",
    ),
    "fbs": MethodInfo(
        "prune2deploy.methods.fbs:FBS",
        "gates that weigh channels for each image and suppress most (Gao et al., ICLR 2019)",
        Needs(data=True, labels=True, pretrained=True, trains_weights=True, norms=True),
        "published",
        "read: the authors' code, two re-implementations, the abstract; ours: the start from norms, density by target",
        "gates that stay; the network keeps all channels",
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
        "read: the abstract and a part; reconstructed: attention, loss, turns; ours: scores of groups, start",
    ),
    "random": MethodInfo(
        "prune2deploy.methods.random:Random", "seeded random scores", Needs(), "control", "nothing to read"
    ),
}


def all_methods() -> Mapping[str, MethodInfo]:
    """Return the table with the methods of other packages behind our own, which none can replace."""
    return {**METHODS, **{name: _plugin_info(name) for name in plugins(METHODS_GROUP) if name not in METHODS}}


def _plugin_info(name: str) -> MethodInfo:
    plugin = plugins(METHODS_GROUP)[name]
    try:
        found = method_class(name)
    except InputError as error:
        return MethodInfo(plugin.entry.value, str(error), Needs(), "broken", f"the package {plugin.package}")
    summary = (found.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return MethodInfo(plugin.entry.value, summary, found.needs, "plugin", f"the package {plugin.package}")


def method_class(name: str) -> type[Method]:
    """Return the class of a method of `METHODS`, or of another package's.

    Raises:
        InputError: if there is no such method, or the other package's cannot be loaded.
    """
    if name not in METHODS and name in plugins(METHODS_GROUP):
        loaded: type[Method] = plugins(METHODS_GROUP)[name].load(type, "a class")
        if not issubclass(loaded, Method):
            raise InputError(
                f"'{name}' of '{plugins(METHODS_GROUP)[name].package}' is not a prune2deploy.methods.base.Method"
            )
        return loaded
    if name not in METHODS:
        listed = ", ".join(sorted({*METHODS, *plugins(METHODS_GROUP)}))
        raise InputError(f"there is no method '{name}'; the methods are {listed}")
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
