"""The losses of training: cross-entropy with label smoothing, and distillation from another network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.train.accuracy import logits_of, require
from prune2deploy.train.settings import Loss, uses_bf16


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Return the mean cross-entropy; a share of the target may be spread over all classes alike."""

    def loss(_: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return loss


def distill_loss(
    teacher: nn.Module,
    alpha: float = 0.5,
    temperature: float = 4.0,
    *,
    label_smoothing: float = 0.0,
    precision: str = "auto",
) -> Loss:
    """Return ``(1 - alpha) * CE(labels) + alpha * T^2 * KL(teacher / T || network / T)``.

    The logits of both are divided by the temperature T before the softmax; T^2 keeps the gradients' size (Hinton,
    Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531).

    Args:
        teacher: the network to learn from, usually the dense one. It is put into eval mode, and on the device and into
            the layout of the images; no gradient reaches it. It must be a copy: what is trained may not be part of it.
        alpha: the teacher's share, in [0, 1].
        temperature: above 0.
        label_smoothing: of the cross-entropy.
        precision: of the teacher, as `train.finetune`'s.

    Raises:
        InputError: if a number is out of range.
    """
    require(0 <= alpha <= 1, f"the share of the teacher is {alpha:g}, but must be between 0 and 1")
    require(0 < temperature < float("inf"), f"the temperature is {temperature:g}, but must be above 0")
    plain = cross_entropy(label_smoothing)
    teacher.eval()

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        teacher.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        bf16 = uses_bf16(precision, images.device)
        with torch.no_grad(), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            taught = logits_of(teacher, images, logits.shape[1]).detach()  # which views of parameters need
        soft = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.log_softmax(taught / temperature, 1),
            log_target=True,
            reduction="batchmean",
        )
        return (1 - alpha) * plain(images, logits, labels) + alpha * temperature**2 * soft

    return loss
