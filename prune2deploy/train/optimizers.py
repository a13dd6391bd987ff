"""Learning rates, and the optimizers with what each of them decays."""

import math
from collections.abc import Collection

import torch
from torch import nn

from prune2deploy.train.accuracy import require
from prune2deploy.train.settings import Plan

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def warm_up_steps(plan: Plan, steps: int) -> int:
    """Return over how many steps the rate rises; ``steps`` are those of an epoch.

    Unless the plan says it, they are 5 % of all steps, one epoch at most.
    """
    if plan.warmup_epochs is not None:
        return round(plan.warmup_epochs * steps)
    return min(steps, math.ceil(0.05 * plan.epochs * steps))


def learning_rate(step: int, steps: int, warm_up: int, peak: float) -> float:
    """Return the rate of a step, counted from 0: linear over ``warm_up`` steps, then a cosine to 0 over the others."""
    if step < warm_up:
        return peak * (step + 1) / (warm_up + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_optimizer(module: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """Return the plan's optimizer of the module's trainable parameters.

    AdamW (Loshchilov, Hutter, ICLR 2019) takes the plan's momentum as its first decay rate; the second is 0.999.

    Raises:
        InputError: if a name is no parameter, or nothing can be trained.
    """
    groups = _parameter_groups(module, plan)
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=plan.lr, betas=(plan.momentum, 0.999))
    return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum, nesterov=plan.momentum > 0)


def frozen_by(module: nn.Module, parameters: Collection[str] | None) -> list[nn.Parameter]:
    """Return the parameters that would be trained but are not among those named; none if none are named.

    Raises:
        InputError: if a name is no parameter.
    """
    if parameters is None:
        return []
    known = dict(module.named_parameters())
    _require_known(parameters, known, "train")
    kept = {id(known[name]) for name in parameters}
    return [parameter for parameter in known.values() if parameter.requires_grad and id(parameter) not in kept]


def _parameter_groups(module: nn.Module, plan: Plan) -> list[dict[str, object]]:
    """Return the parameters that are decayed and those that are not: norms, biases, and those that were named."""
    known = dict(module.named_parameters())
    _require_known(plan.no_decay, known, "spare from weight decay")
    plain = {id(known[name]) for name in plan.no_decay} | {
        id(parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(part, _NORMS) or name == "bias"
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    require(bool(trained), "the network has no parameter that can be trained")
    groups: list[dict[str, object]] = [
        {
            "params": [parameter for parameter in trained if id(parameter) not in plain],
            "weight_decay": plan.weight_decay,
        },
        {"params": [parameter for parameter in trained if id(parameter) in plain], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _require_known(wanted: Collection[str], known: Collection[str], purpose: str) -> None:
    strange = sorted(set(wanted) - set(known))
    require(not strange, f"the network has no parameter '{strange[0] if strange else ''}' to {purpose}")
