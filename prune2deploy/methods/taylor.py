"""Taylor: how much the loss would change to first order if a channel were gone."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, final

import numpy as np

from prune2deploy.budget import Ranking
from prune2deploy.groups import Groups
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, Range, Weights, named, of_channels

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
@dataclass(frozen=True)
class Taylor(Method):
    """Score a channel by the squared derivative of the loss by a gate on it (Molchanov et al., CVPR 2019).

    Importance Estimation for Neural Network Pruning, arXiv 1906.10771: the importance of parameters that go together is
    ``(sum of gradient * weight)^2``, taken batch by batch and averaged. Here the parameters are those that read the
    channel, of all its readers at once: their sum is the loss's derivative by a gate in front of them. Behind a ReLU
    that is the paper's gate behind the norm. (That reading, and the groups, are ours.)

    The loss is the cross-entropy in eval mode. Scores of all groups compete, since all are changes of one loss.

    Attributes:
        images: how many labelled images at most; the gradients of each batch are summed before they are squared.
    """

    needs: ClassVar[Needs] = Needs(data=True, labels=True, pretrained=True)
    ranking: ClassVar[Ranking] = "global"

    images: Annotated[int, Range(low=1)] = 1024

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> mean over the batches of the squared derivatives, float64 [channels].

        Raises:
            InputError: if there are no labelled images, or the loss on them is not finite.
        """
        import torch.nn.functional as F

        from prune2deploy.train.accuracy import cudnn_flags, eval_mode, logits_of, require

        module, images_and_labels = context.network("taylor")
        names = sorted({reader.parameter for group in groups.prunable for reader in group.of_role("reader")})
        sums = {group.id: np.zeros(group.size) for group in groups.prunable}
        seen = batches = 0
        with eval_mode(module), _differentiable(module, names) as tensors, cudnn_flags(tf32=False):
            for images, labels in images_and_labels:
                loss = F.cross_entropy(logits_of(module, images, int(labels.max()) + 1), labels)
                value = float(loss.detach())
                require(math.isfinite(value), f"the loss is {value}; check the weights and the normalisation")
                for group, derivatives in _gate_derivatives(loss, tensors, groups).items():
                    sums[group] += derivatives**2
                seen, batches = seen + len(labels), batches + 1
                if seen >= self.images:
                    break
        require(batches > 0, "method 'taylor' needs images with labels; give a data set that has some")
        return {group: total / batches for group, total in sums.items()}


def _gate_derivatives(loss: "Tensor", tensors: "dict[str, Tensor]", groups: Groups) -> dict[str, np.ndarray]:
    """Return the loss's derivative by a gate on every channel where it is read, float64 [channels] for each group."""
    import torch

    gradients = torch.autograd.grad(loss, list(tensors.values()))
    products = {
        name: (tensor.detach().double() * gradient.double()).cpu().numpy()
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True)
    }
    return {
        group.id: np.sum([of_channels(products, reader).sum(axis=1) for reader in group.of_role("reader")], axis=0)
        for group in groups.prunable
    }


@contextmanager
def _differentiable(module: "nn.Module", names: Iterable[str]) -> "Iterator[dict[str, Tensor]]":
    """Let these parameters take gradients, and those that took none before take none afterwards."""
    own = module.state_dict(keep_vars=True)
    tensors = {name: named(own, name) for name in names}
    frozen = [tensor for tensor in tensors.values() if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield tensors
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
