"""The training loop, with the hooks that pruning methods need; on one processor, one GPU, or several processes."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune2deploy.data import Data, draw_moves, moved, normalise
from prune2deploy.errors import InputError
from prune2deploy.train.accuracy import BATCH_NORMS, Accuracy, cudnn_flags, evaluate, logits_of, require
from prune2deploy.train.average import Average
from prune2deploy.train.checkpoints import Checkpoint, Checkpoints, optimizer_tensors, set_optimizer
from prune2deploy.train.divergence import Watch
from prune2deploy.train.losses import cross_entropy
from prune2deploy.train.optimizers import frozen_by, learning_rate, make_optimizer, warm_up_steps
from prune2deploy.train.processes import Processes
from prune2deploy.train.settings import EpochResult, Hooks, Loss, Plan, Progress, names, uses_bf16

log = logging.getLogger(__name__)


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
    optimizer: str = "sgd",
    warmup_epochs: float | None = None,
    label_smoothing: float = 0.0,
    ema: float = 0.0,
    gradient_clipping: float = 0.0,
    parameters: Collection[str] | None = None,
    no_decay: Collection[str] = (),
    frozen_norms: bool = False,
    loss: Loss | None = None,
    penalty: Callable[[], Tensor] | None = None,
    after_backward: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    after_epoch: Callable[[EpochResult], None] | None = None,
    checkpoint: Path | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    on_resume: Callable[[int, int], None] | None = None,
) -> list[EpochResult]:
    """Train a network in place and return what each epoch gave.

    The learning rate warms up linearly and falls to 0 along a cosine over all steps (SGDR without restarts, Loshchilov,
    Hutter, ICLR 2017). It starts as high as in training, since pruned networks recover better so (Renda et al., ICLR
    2020; Le, Hua, ICLR 2021). Norms and biases are not decayed. The module is left in eval mode, on ``device``. The
    same seed gives the same weights on the same machine with the same number of threads and processes.

    Under ``torchrun`` every process must call it alike. Each takes its part of every batch; the order of the images,
    their augmentation, and random numbers that hooks draw are the same in all of them, gradients are averaged before
    ``after_backward``, and running statistics of norms in every step, so hooks do the same everywhere. A batch norm
    normalises by its own part of the batch alone.

    Args:
        module: trained in place; parameters that need no gradient stay as they are.
        data: training images, and held-out ones that each epoch is measured on.
        epochs: passes over the training images; 0 does nothing.
        mean: per channel, of pixels in [0, 1]; by default the data's.
        std: per channel, of pixels in [0, 1]; by default the data's.
        lr: highest learning rate.
        momentum: of SGD, Nesterov's where above 0; of AdamW its first decay rate.
        weight_decay: of convolutions and linear layers.
        batch_size: images a step, of all processes together; the last, smaller batch of an epoch is left out.
        seed: of the order of images, augmentation and dropout.
        device: where to train.
        precision: ``fp32``; ``bf16`` (autocast; weights stay float32); ``auto``: bf16 where it pays.
        optimizer: ``sgd`` or ``adamw``.
        warmup_epochs: over which the rate rises; by default 5 % of all steps, one epoch at most.
        label_smoothing: share of the target that is spread over all classes; of the default loss only.
        ema: decay of an exponential moving average of the weights, which is what is measured after each epoch and left
            at the end; 0 is none.
        gradient_clipping: largest norm of all gradients together, after ``after_backward``; 0 is none.
        parameters: names of those that are trained; by default all.
        no_decay: names of further parameters that are not decayed.
        frozen_norms: whether batch norms use their running statistics, and keep them, as in eval mode.
        loss: of normalised images, logits and labels, a mean over them; by default cross-entropy. For distillation,
            `train.distill_loss`.
        penalty: a scalar added to the loss, taken in float32.
        after_backward: called between the gradients and the step.
        after_step: called after the step.
        on_progress: called after each step.
        after_epoch: called after each epoch, before its checkpoint is written.
        checkpoint: a folder that keeps where the training stands after each epoch. If it holds a checkpoint of this
            training, it goes on from there and ends with the same bits as one that was not interrupted.
        fingerprint: what the training is beside these settings, as JSON values; a checkpoint of another is refused.
        on_resume: called with how many epochs and steps are over where it goes on from a checkpoint: hooks with a state
            of their own, which is not part of it, come to stand there too.

    Raises:
        InputError: if an option is out of range, the loss stops being a number, or the checkpoint is not this
            training's.
    """
    plan = Plan(
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=batch_size,
        seed=seed,
        bf16=uses_bf16(precision, torch.device(device)),
        no_decay=frozenset(no_decay),
        frozen_norms=frozen_norms,
        optimizer=optimizer,
        label_smoothing=label_smoothing,
        ema=ema,
        warmup_epochs=warmup_epochs,
        gradient_clipping=gradient_clipping,
        parameters=names(parameters),
        mean=tuple(data.mean if mean is None else mean),
        std=tuple(data.std if std is None else std),
    )
    require(
        loss is None or not label_smoothing, "label smoothing is of the default loss; a loss of one's own has its own"
    )
    hooks = Hooks(
        loss=loss,
        penalty=penalty,
        after_backward=after_backward,
        after_step=after_step,
        on_progress=on_progress,
        after_epoch=after_epoch,
        on_resume=on_resume,
    )
    if epochs == 0:
        return []
    processes = Processes(device, bf16=plan.bf16)
    folder = None if checkpoint is None else Checkpoints(checkpoint, {**(fingerprint or {}), **plan.fingerprint()})
    with _set_up(module, plan, processes.device):
        return _Training(module, data, plan, hooks, processes).run(folder)


@contextmanager
def _set_up(module: nn.Module, plan: Plan, device: torch.device) -> Iterator[None]:
    """Bring the network where and how it trains, and leave it in eval mode, laid out as usual."""
    frozen = frozen_by(module, plan.parameters)
    module.to(device)
    _lay_out(module, torch.channels_last)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        _lay_out(module, torch.contiguous_format)
        module.eval()


class _Training:
    """One training and where it stands."""

    def __init__(self, module: nn.Module, data: Data, plan: Plan, hooks: Hooks, processes: Processes) -> None:
        self.module, self.data, self.plan, self.hooks, self.processes = module, data, plan, hooks, processes
        self.loss = hooks.loss or cross_entropy(plan.label_smoothing)
        self.batch_size = min(plan.batch_size, len(data.train))
        require(
            self.batch_size // processes.count >= min(2, self.batch_size),
            f"a batch size of {self.batch_size} for {processes.count} processes leaves one of them fewer than 2 images",
        )
        self.steps = len(data.train) // self.batch_size
        self.warm_up = warm_up_steps(plan, self.steps)
        self.optimizer = make_optimizer(module, plan)
        self.average = Average(module, plan.ema) if plan.ema else None
        self.watch = Watch(
            data.num_classes,
            is_cross_entropy=hooks.loss is None,
            warm_up=max(1, math.ceil(self.warm_up / self.steps)),
        )
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.results: list[EpochResult] = []
        self.losses: list[float] = []

    def run(self, checkpoints: Checkpoints | None) -> list[EpochResult]:
        """Train to the end, from the checkpoint if there is one."""
        found = None if checkpoints is None else self.processes.agreed(checkpoints.load)
        if checkpoints is not None and found is not None:
            self._go_on(found, checkpoints.path)
            if self.hooks.on_resume is not None:
                self.hooks.on_resume(len(self.results), len(self.results) * self.steps)
        for epoch in range(len(self.results) + 1, self.plan.epochs + 1):
            result = self._epoch(epoch)
            self.results.append(result)
            log.info("epoch %d: loss %.4f, held-out top-1 %.4f", epoch, result.loss, result.holdout.top1)
            for text in result.warnings if self.processes.is_first else ():
                log.warning("%s", text)
            if self.hooks.after_epoch is not None:
                self.hooks.after_epoch(result)
            if checkpoints is not None and self.processes.is_first:
                checkpoints.save(self._checkpoint())
        if self.average is not None:
            self.average.apply()
        return self.results

    def _epoch(self, epoch: int) -> EpochResult:
        started = time.perf_counter()
        devices = [self.processes.device] if self.processes.device.type == "cuda" else []
        # dropout and hooks draw from the global state, which is given back unchanged
        with torch.random.fork_rng(devices=devices), cudnn_flags(tf32=self.plan.bf16):
            torch.manual_seed(self.plan.seed * 1_000_003 + epoch)
            loss, without_penalty = self._steps(epoch)
        with self.average.applied() if self.average is not None else nullcontext():
            holdout = evaluate(
                self.module,
                self.data.holdout,
                self.plan.mean,
                self.plan.std,
                device=self.processes.device,
                processes=self.processes,
            )
        self._require_finite(holdout.loss, f"the held-out loss is {holdout.loss} after epoch {epoch}")
        self.losses.append(without_penalty)
        warnings = self.watch.look(epoch, without_penalty)
        lr = self.optimizer.param_groups[0]["lr"]
        return EpochResult(epoch, loss, holdout, lr, time.perf_counter() - started, warnings)

    def _steps(self, epoch: int) -> tuple[float, float]:
        """Train for one epoch; return its mean loss, and that without penalties."""
        _to_training(self.module, frozen_norms=self.plan.frozen_norms)
        order = torch.randperm(len(self.data.train), generator=self.generator)[: self.steps * self.batch_size]
        totals = [0.0, 0.0]
        for step, indices in enumerate(torch.split(order, self.batch_size), 1):
            number = (epoch - 1) * self.steps + step - 1
            lr = learning_rate(number, self.plan.epochs * self.steps, self.warm_up, self.plan.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            losses = self._step(*self._batch(indices), f"in epoch {epoch}, step {step}")
            totals = [total + loss for total, loss in zip(totals, losses, strict=True)]
            if self.hooks.on_progress is not None:
                top1 = self.results[-1].holdout.top1 if self.results else None
                self.hooks.on_progress(Progress(epoch, self.plan.epochs, step, self.steps, losses[0], lr, top1))
        return totals[0] / self.steps, totals[1] / self.steps

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return this process's part of a batch; it is moved as it would be in one process alone."""
        data, device = self.data, self.processes.device
        moves = draw_moves(len(indices), data.image_size, data.image_size, self.generator, flip=data.flip, pad=data.pad)
        part = self.processes.part(indices)
        images = data.train.images(indices[part]).to(device).float() / 255
        images = moved(images, moves[0][part], moves[1][part], pad=data.pad)
        images = normalise(images, self.plan.mean, self.plan.std).contiguous(memory_format=torch.channels_last)
        return images, data.train.labels[indices[part]].to(device)

    def _step(self, images: Tensor, labels: Tensor, where: str) -> tuple[float, float]:
        """Do one step; return the loss before it, and that without the penalty.

        Raises:
            InputError: if the loss is not finite; then no weight has changed.
        """
        processes, hooks = self.processes, self.hooks
        self.optimizer.zero_grad(set_to_none=True)
        with processes.autocast():
            logits = logits_of(self.module, images, self.data.num_classes)
        loss = without_penalty = self.loss(images, logits, labels)
        if processes.count > 1:  # the mean over processes is that over the batch, whose parts differ by an image
            loss = without_penalty = loss * (len(labels) * processes.count / self.batch_size)
        if hooks.penalty is not None:
            loss = loss + hooks.penalty()
        values = [float(each.detach()) for each in (loss, without_penalty)]
        value, plain = processes.total([each / processes.count for each in values])
        self._require_finite(value, f"the loss became {value} {where}")
        processes.backward(loss)
        processes.average(self._shared())
        if hooks.after_backward is not None:
            hooks.after_backward()
        if self.plan.gradient_clipping:
            processes.clip(
                [each for each in self.module.parameters() if each.requires_grad], self.plan.gradient_clipping
            )
        self.optimizer.step()
        if hooks.after_step is not None:
            hooks.after_step()
        if self.average is not None:
            self.average.update()
        return value, plain

    def _shared(self) -> list[Tensor]:
        """Return what processes have found each for its own images: gradients, and the running statistics of norms."""
        if self.processes.count == 1:
            return []
        norms = [part for part in self.module.modules() if isinstance(part, BATCH_NORMS) and part.training]
        statistics = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]
        return [each.grad for each in self.module.parameters() if each.grad is not None] + statistics

    def _require_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"training diverged: {what}; use a lower learning rate than {self.plan.lr:g}, "
                f"or check the weights and the normalisation"
            )

    def _checkpoint(self) -> Checkpoint:
        average = self.average.state() if self.average is not None else {}
        tensors = {
            **{f"module.{name}": tensor for name, tensor in self.module.state_dict().items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()},
            **{f"average.{name}": tensor for name, tensor in average.items()},
            "generator": self.generator.get_state(),
        }
        facts = {
            "results": [asdict(result) for result in self.results],
            "losses": self.losses,
            "average_steps": self.average.steps if self.average is not None else 0,
        }
        return Checkpoint(tensors, facts)

    def _go_on(self, found: Checkpoint, path: Path) -> None:
        """Stand where a checkpoint was made."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): each for name, each in found.tensors.items() if name.startswith(prefix)}

        own, state = self.module.state_dict(keep_vars=True), part("module.")
        require(
            {name: each.shape for name, each in own.items()} == {name: each.shape for name, each in state.items()},
            f"'{path}' is a checkpoint of another network; remove it to train anew",
        )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        set_optimizer(self.optimizer, part("optimizer."))
        if self.average is not None:
            self.average.load(part("average."), found.facts["average_steps"])
        self.generator.set_state(found.tensors["generator"])
        for entry in found.facts["results"]:
            holdout, warnings = Accuracy(**entry["holdout"]), tuple(entry["warnings"])
            self.results.append(EpochResult(**entry | {"holdout": holdout, "warnings": warnings}))
        self.losses = list(found.facts["losses"])
        for epoch, loss in enumerate(self.losses, 1):
            self.watch.look(epoch, loss)


def _to_training(module: nn.Module, *, frozen_norms: bool) -> None:
    """Put a module into training mode, batch norms that are frozen left out."""
    module.train()
    for part in module.modules() if frozen_norms else ():
        if isinstance(part, BATCH_NORMS):
            part.eval()


def _lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the weights of convolutions out anew; channels last takes a fifth off a step on the CPU."""
    module.to(memory_format=memory_format)  # type: ignore[call-overload]
