"""Training by SGD, with the hooks that pruning methods need."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.data import Data, augment, normalise
from prune2deploy.errors import InputError
from prune2deploy.train.accuracy import BATCH_NORMS, Accuracy, cudnn_flags, evaluate, logits_of, require

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From normalised images [B, C, H, W], logits [B, classes] in float32, and labels int64 [B], to a scalar."""


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step; epochs and steps count from 1, ``loss`` is the step's."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float


@dataclass(frozen=True)
class EpochResult:
    """One epoch: mean training loss per step, accuracy on the held-out split after it, last learning rate, seconds."""

    epoch: int
    loss: float
    holdout: Accuracy
    lr: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The numbers of a training run."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    seed: int
    device: torch.device
    bf16: bool
    no_decay: frozenset[str]
    frozen_norms: bool
    classes: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class _Hooks:
    """What a pruning method does during training."""

    loss: Loss
    penalty: Callable[[], Tensor] | None
    after_backward: Callable[[], None] | None
    after_step: Callable[[], None] | None
    on_progress: Callable[[Progress], None] | None


def finetune(
    module: nn.Module,
    data: Data,
    *,
    epochs: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "auto",
    no_decay: Collection[str] = (),
    frozen_norms: bool = False,
    loss: Loss | None = None,
    penalty: Callable[[], Tensor] | None = None,
    after_backward: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    after_epoch: Callable[[EpochResult], None] | None = None,
) -> list[EpochResult]:
    """Train a network in place, by SGD with Nesterov momentum, and return what each epoch gave.

    The learning rate warms up linearly and falls to 0 along a cosine over all steps (SGDR without restarts, Loshchilov,
    Hutter, ICLR 2017). It starts as high as in training, since pruned networks recover better so (Renda et al., ICLR
    2020; Le, Hua, ICLR 2021). Norms and biases are not decayed. The module is left in eval mode, on ``device``. The
    same seed gives the same weights on the same machine with the same number of threads.

    Args:
        module: trained in place; parameters that need no gradient stay as they are.
        data: training images, and held-out ones that each epoch is measured on.
        epochs: passes over the training images; 0 does nothing.
        mean: per channel, of pixels in [0, 1]; by default the data's.
        std: per channel, of pixels in [0, 1]; by default the data's.
        lr: highest learning rate.
        momentum: of SGD; Nesterov's where above 0.
        weight_decay: of convolutions and linear layers.
        batch_size: images a step; the last, smaller batch of an epoch is left out.
        seed: of the order of images, augmentation and dropout.
        device: where to train.
        precision: ``fp32``; ``bf16`` (autocast; weights stay float32); ``auto``: bf16 where it pays.
        no_decay: names of further parameters that are not decayed.
        frozen_norms: whether batch norms use their running statistics, and keep them, as in eval mode.
        loss: of normalised images, logits and labels; by default cross-entropy. For distillation, say.
        penalty: a scalar added to the loss, taken in float32.
        after_backward: called between the gradients and the step.
        after_step: called after the step.
        on_progress: called after each step.
        after_epoch: called after each epoch.

    Raises:
        InputError: if an option is out of range, or the loss stops being a number.
    """
    place = torch.device(device)
    _require_plan(epochs=epochs, lr=lr, momentum=momentum, weight_decay=weight_decay, batch_size=batch_size)
    plan = _Plan(
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=min(batch_size, len(data.train)),
        seed=seed,
        device=place,
        bf16=_use_bf16(precision, place),
        no_decay=frozenset(no_decay),
        frozen_norms=frozen_norms,
        classes=data.num_classes,
        mean=data.mean if mean is None else mean,
        std=data.std if std is None else std,
    )
    hooks = _Hooks(
        loss=loss or _cross_entropy,
        penalty=penalty,
        after_backward=after_backward,
        after_step=after_step,
        on_progress=on_progress,
    )
    results = []
    for result in _epochs(module, data, plan, hooks):
        results.append(result)
        log.info("epoch %d: loss %.4f, held-out top-1 %.4f", result.epoch, result.loss, result.holdout.top1)
        if after_epoch is not None:
            after_epoch(result)
    return results


def _epochs(module: nn.Module, data: Data, plan: _Plan, hooks: _Hooks) -> Iterator[EpochResult]:
    """Train, and yield after each epoch."""
    if plan.epochs == 0:
        return
    module.to(plan.device)
    _lay_out(module, torch.channels_last)
    optimizer = torch.optim.SGD(
        _parameter_groups(module, plan), lr=plan.lr, momentum=plan.momentum, nesterov=plan.momentum > 0
    )
    steps = len(data.train) // plan.batch_size
    generator = torch.Generator().manual_seed(plan.seed)
    devices = [plan.device] if plan.device.type == "cuda" else []
    try:
        for epoch in range(1, plan.epochs + 1):
            started = time.perf_counter()
            # dropout draws from the global state, which is given back unchanged
            with (
                torch.random.fork_rng(devices=devices),
                cudnn_flags(tf32=plan.bf16),
            ):
                torch.manual_seed(plan.seed * 1_000_003 + epoch)
                loss = _epoch(module, data, plan, hooks, optimizer, generator, epoch, steps)
            holdout = evaluate(module, data.holdout, plan.mean, plan.std, device=plan.device)
            _require_finite(holdout.loss, f"the held-out loss is {holdout.loss} after epoch {epoch}", plan)
            seconds = time.perf_counter() - started
            yield EpochResult(epoch, loss, holdout, optimizer.param_groups[0]["lr"], seconds)
    finally:
        _lay_out(module, torch.contiguous_format)
        module.eval()


def _epoch(
    module: nn.Module,
    data: Data,
    plan: _Plan,
    hooks: _Hooks,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    epoch: int,
    steps: int,
) -> float:
    """Train for one epoch and return its mean loss."""
    module.train()
    if plan.frozen_norms:
        for part in module.modules():
            if isinstance(part, BATCH_NORMS):
                part.eval()
    order = torch.randperm(len(data.train), generator=generator)[: steps * plan.batch_size]
    labels = data.train.labels
    total = 0.0
    for step, indices in enumerate(torch.split(order, plan.batch_size), 1):
        lr = _learning_rate((epoch - 1) * steps + step - 1, plan.epochs * steps, steps, plan.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = data.train.images(indices).to(plan.device).float() / 255
        images = augment(images, generator, flip=data.flip, pad=data.pad)
        images = normalise(images, plan.mean, plan.std).contiguous(memory_format=torch.channels_last)
        loss = _step(module, images, labels[indices].to(plan.device), optimizer, plan, hooks)
        _require_finite(loss, f"the loss became {loss} in epoch {epoch}, step {step}", plan)
        total += loss
        if hooks.on_progress is not None:
            hooks.on_progress(Progress(epoch, plan.epochs, step, steps, loss, lr))
    return total / steps


def _step(
    module: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, plan: _Plan, hooks: _Hooks
) -> float:
    """Do one step of SGD and return the loss before it; a loss that is not finite changes no weight."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(plan.device.type, dtype=torch.bfloat16, enabled=plan.bf16):
        logits = logits_of(module, images, plan.classes)
    loss = hooks.loss(images, logits, labels)
    if hooks.penalty is not None:
        loss = loss + hooks.penalty()
    value = float(loss.detach())
    if math.isfinite(value):
        loss.backward()  # type: ignore[no-untyped-call]
        if hooks.after_backward is not None:
            hooks.after_backward()
        optimizer.step()
        if hooks.after_step is not None:
            hooks.after_step()
    return value


def _require_finite(loss: float, what: str, plan: _Plan) -> None:
    if not math.isfinite(loss):
        raise InputError(
            f"training diverged: {what}; use a lower learning rate than {plan.lr:g}, "
            f"or check the weights and the normalisation"
        )


def _cross_entropy(_: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def _learning_rate(step: int, steps: int, steps_per_epoch: int, peak: float) -> float:
    """Return the rate of a step: linear over the first 5 % of the steps, one epoch at most, then a cosine to 0."""
    warm_up = min(steps_per_epoch, math.ceil(0.05 * steps))
    if step < warm_up:
        return peak * (step + 1) / (warm_up + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def _parameter_groups(module: nn.Module, plan: _Plan) -> list[dict[str, object]]:
    """Return the parameters that are decayed and those that are not: norms, biases, and those that were named.

    Raises:
        InputError: if a name is no parameter, or nothing can be trained.
    """
    names = dict(module.named_parameters())
    strange = sorted(plan.no_decay - names.keys())
    require(not strange, f"the network has no parameter '{strange[0] if strange else ''}' to spare from weight decay")
    plain = {id(names[name]) for name in plan.no_decay} | {
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


def _use_bf16(precision: str, device: torch.device) -> bool:
    require(precision in PRECISIONS, f"unknown precision '{precision}'; there are {', '.join(PRECISIONS)}")
    if precision == "auto":
        return _has_fast_bf16(device)
    return precision == "bf16"


def _has_fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 pays: on GPUs that have it and on CPUs with AMX.

    With AVX512-BF16 alone it does not: a step of ResNet-20 took 489 ms against 357 ms in float32 (batch 128, one core).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16", False))


def _lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the weights of convolutions out anew; channels last takes a fifth off a step on the CPU."""
    module.to(memory_format=memory_format)  # type: ignore[call-overload]


def _require_plan(*, epochs: int, lr: float, momentum: float, weight_decay: float, batch_size: int) -> None:
    require(epochs >= 0, f"the number of epochs is {epochs}, but must be 0 or more")
    require(math.isfinite(lr) and lr > 0, f"the learning rate is {lr:g}, but must be above 0")
    require(0 <= momentum < 1, f"the momentum is {momentum:g}, but must be at least 0 and below 1")
    require(math.isfinite(weight_decay) and weight_decay >= 0, f"the weight decay is {weight_decay:g}, below 0")
    require(batch_size >= 2, f"the batch size is {batch_size}, but batch norm needs 2 or more")
