"""A network with all its narrower ones inside: their losses, stage by stage, while it trains and afterwards."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prune2deploy.groups import Groups
from prune2deploy.masks import Masks
from prune2deploy.methods.stages import Cut, Losses, Stage, candidates, first_channels
from prune2deploy.methods.watch import Features, Watch, along
from prune2deploy.silence import silenced

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class SuperNet:
    """The losses of a network's sub-networks beside its own, all with the same weights, for one training.

    A sub-network keeps the first channels of each group; it runs with masked copies of the weights, and with norms that
    measure each batch and leave the network's running statistics alone.

    Args:
        module: the network; while this is used as a context its cuts are watched.
        groups: its groups.
        stages: its stages, in graph order.
        choices: group id -> the widths it may have, ascending.
        order: group id -> its channels, first to last, int64 [channels].
        seed: draws the random sub-networks.
    """

    def __init__(
        self,
        module: "nn.Module",
        groups: Groups,
        stages: Sequence[Stage],
        choices: Mapping[str, Sequence[int]],
        order: Mapping[str, np.ndarray],
        seed: int,
    ) -> None:
        self.module, self.groups, self.stages, self.choices, self.order = module, groups, stages, choices, order
        self.watch = Watch(module, all_cuts(stages))
        self._generator = np.random.default_rng(seed)
        self._precision: Any = None

    def __enter__(self) -> "SuperNet":
        self._handle = self.module.register_forward_pre_hook(lambda _, inputs: self._note_precision(inputs[0]))
        self.watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self.watch.__exit__()

    def loss(self, images: "Tensor", logits: "Tensor", labels: "Tensor") -> "Tensor":
        """Return the full network's cross-entropy and the stages' losses of the tiny and of a random sub-network.

        The full network has just run on the images.
        """
        import torch.nn.functional as F

        total = F.cross_entropy(logits, labels)
        full, target = self.watch.features(), logits.detach()
        tiny = {group: widths[0] for group, widths in self.choices.items()}
        drawn = {group: int(self._generator.choice(widths)) for group, widths in self.choices.items()}
        for widths in (tiny, drawn):
            total = total + sum(self.stage_losses(images, widths, full, target))
        return total

    def stage_losses(
        self, images: "Tensor", widths: Mapping[str, int], full: Features, logits: "Tensor"
    ) -> "list[Tensor]":
        """Return each stage's loss in the sub-network of these widths, every stage fed the full network's features.

        Args:
            images: what the full network ran on, [B, C, H, W].
            widths: of the groups of all stages.
            full: what the full network's cuts gave.
            logits: what it gave, [B, classes].
        """
        import torch
        from torch.func import functional_call

        masks = first_channels(self.order, widths)
        hidden = hidden_channels(self.module, self.groups, self.stages, masks)
        self.watch.fed, self.watch.hidden = fed_to(self.stages, full), hidden
        kind, dtype, enabled = self._precision or (images.device.type, torch.bfloat16, False)
        try:
            with torch.autocast(kind, dtype=dtype, enabled=enabled):
                own = functional_call(self.module, _masked(self.module, self.groups, masks), (images,))
        finally:
            self.watch.fed, self.watch.hidden = None, {}
        parts = stage_parts(self.stages, self.module, full, self.watch.found, hidden, logits, own)
        return [above / below.clamp_min(1e-12) for above, below in parts]

    def _note_precision(self, images: "Tensor") -> None:
        """Sub-networks run in the precision that the network ran in, outside whose context the loss is taken."""
        import torch

        if self.watch.fed is None:
            kind = images.device.type
            self._precision = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def _masked(module: "nn.Module", groups: Groups, masks: Masks) -> "dict[str, Tensor]":
    """Return masked copies of the weights that masks touch, through which gradients go, and copies of all buffers."""
    import torch

    own = dict(module.named_parameters())
    tensors: dict[str, Tensor] = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for (name, axis), indices in silenced(groups, masks).items():
        tensor = tensors.get(name, own.get(name))
        assert tensor is not None, f"{name} is neither a parameter nor a buffer"
        factor = torch.ones(tensor.shape[axis], dtype=tensor.dtype, device=tensor.device)
        factor[torch.from_numpy(indices).to(tensor.device)] = 0
        tensors[name] = tensor * factor.view([-1 if place == axis else 1 for place in range(tensor.ndim)])
    return tensors


def all_cuts(stages: Sequence[Stage]) -> list[Cut]:
    """Return the cuts of all stages, each once."""
    return list(dict.fromkeys(cut for stage in stages for cut in stage.cuts))


def fed_to(stages: Sequence[Stage], full: Features) -> Features:
    """Return what is fed: all but the cuts of the last stage, whose effect is to reach the logits."""
    last = {cut.layer for cut in stages[-1].cuts}
    return {layer: calls for layer, calls in full.items() if layer not in last}


def hidden_channels(
    module: "nn.Module", groups: Groups, stages: Sequence[Stage], masks: Masks
) -> "dict[str, torch.Tensor]":
    """Return cut -> which of the channels that it gives are masked there, bool [channels], where some are."""
    import torch

    tensors = module.state_dict(keep_vars=True)
    cuts = {cut.layer for cut in all_cuts(stages)}
    found: dict[str, np.ndarray] = {}
    for group, mask in masks.items():
        for member in groups[group].of_role("filter"):
            if member.layer in cuts and not mask.all():
                size = tensors[member.parameter].shape[member.axis]
                hidden = found.setdefault(member.layer, np.zeros(size, dtype=np.bool_))
                hidden[member.indices[~mask].ravel()] = True
    device = next(iter(tensors.values())).device
    return {layer: torch.from_numpy(hidden).to(device) for layer, hidden in found.items()}


def stage_parts(
    stages: Sequence[Stage],
    module: "nn.Module",
    full: Features,
    sub: Features,
    hidden: Mapping[str, "Tensor"],
    full_logits: "Tensor",
    sub_logits: "Tensor",
) -> "list[tuple[Tensor, Tensor]]":
    """Return each stage's loss on a batch as (above, below) of a fraction, so that batches can be summed.

    ``|F_sub - F_full|^2 / |F_full|^2`` over what the stage's cuts give, all together, without hidden channels; for the
    last stage the divergence of the logits, KL(full || sub), over the number of images.
    """
    import torch
    import torch.nn.functional as F

    found = []
    for stage in stages[:-1]:
        above, below = [], []
        for cut in stage.cuts:
            part = module.get_submodule(cut.module)
            for wanted, own in zip(full[cut.layer], sub[cut.layer], strict=True):
                seen = 1.0 if cut.layer not in hidden else along(~hidden[cut.layer], own, part)
                above.append(((_wide(own) - _wide(wanted)) * seen).square().sum())
                below.append((_wide(wanted) * seen).square().sum())
        found.append((torch.stack(above).sum(), torch.stack(below).sum()))
    own_log, full_log = (F.log_softmax(_wide(logits), dim=1) for logits in (sub_logits, full_logits))
    divergence = F.kl_div(own_log, full_log, log_target=True, reduction="sum")
    return [*found, (divergence, torch.full_like(divergence, len(sub_logits)))]


def _wide(values: "Tensor") -> "Tensor":
    """Return values in float32 at least: sums of squares do not fit half precision."""
    return values if values.dtype.itemsize >= 4 else values.float()


def measured_losses(
    module: "nn.Module",
    groups: Groups,
    stages: Sequence[Stage],
    choices: Mapping[str, Sequence[int]],
    order: Mapping[str, np.ndarray],
    calibration: Callable[[], Iterable[Any]],
    held_out: Callable[[], Iterable[Any]],
) -> Sequence[Losses]:
    """Return the loss of every candidate of every stage, alone in a network that is full otherwise.

    Norms are measured anew for each. Candidates of stages that do not see each other are run together, since a stage is
    fed the full network's features.

    Args:
        module: the trained super-network; it is not changed.
        groups: its groups.
        stages: its stages.
        choices: group id -> widths.
        order: group id -> channels, first to last.
        calibration: gives batches to measure norms on.
        held_out: gives batches to take the losses on.
    """
    found: list[dict[tuple[int, ...], float]] = [{} for _ in stages]
    for together in rounds(stages, choices, groups):
        widths = {
            group: width
            for number, chosen in together.items()
            for group, width in zip(stages[number].groups, chosen, strict=True)
        }
        losses = losses_of(module, groups, stages, first_channels(order, widths), calibration(), held_out())
        for number, chosen in together.items():
            found[number][chosen] = losses[number]
    return found


def rounds(
    stages: Sequence[Stage], choices: Mapping[str, Sequence[int]], groups: Groups
) -> list[dict[int, tuple[int, ...]]]:
    """Return which candidates of which stages are run together: each in the first round where it disturbs no other.

    Two stages disturb each other where one layer reads both, or a layer that reads one makes channels of the other.
    """
    reads = [{cut.layer for cut in stage.cuts} for stage in stages]
    makes = [{member.layer for group in stage.groups for member in groups[group].of_role("filter")} for stage in stages]

    def apart(one: int, other: int) -> bool:
        return one != other and not (
            reads[one] & reads[other] or reads[one] & makes[other] or reads[other] & makes[one]
        )

    found: list[dict[int, tuple[int, ...]]] = []
    for number, stage in enumerate(stages):
        for chosen in candidates(stage, choices):
            place = next((one for one in found if all(apart(number, other) for other in one)), None)
            if place is None:
                found.append(place := {})
            place[number] = chosen
    return found


def losses_of(
    module: "nn.Module",
    groups: Groups,
    stages: Sequence[Stage],
    masks: Masks,
    calibration: Iterable[Any],
    held_out: Iterable[Any],
) -> list[float]:
    """Return each stage's loss in the masked network on held-out batches, all norms measured anew."""
    import torch
    from torch import nn

    from prune2deploy.apply import apply_masks
    from prune2deploy.train import measure_norms

    full, sub = copy.deepcopy(module).eval(), copy.deepcopy(module).eval()
    apply_masks(sub, groups, masks)
    hidden = hidden_channels(module, groups, stages, masks)
    cuts = all_cuts(stages)

    class Fed(nn.Module):
        """Both networks, the masked one fed with what the full one gives."""

        def __init__(self) -> None:
            super().__init__()
            self.full, self.sub = full, sub

        def forward(self, images: "Tensor") -> "list[tuple[Tensor, Tensor]]":
            logits = full(images)
            features = watched_full.features()
            watched_sub.fed, watched_sub.hidden = fed_to(stages, features), hidden
            own = sub(images)
            return stage_parts(stages, sub, features, watched_sub.found, hidden, logits, own)

    sums = np.zeros((len(stages), 2))
    with Watch(full, cuts) as watched_full, Watch(sub, cuts) as watched_sub, torch.no_grad():
        pair = Fed()
        measure_norms(pair, calibration)
        for images, _ in held_out:
            sums += np.array([[float(one) for one in pair_of] for pair_of in pair(images)])
    return [float(value) for value in sums[:, 0] / np.maximum(sums[:, 1], 1e-12)]
