"""Dead channels planted in a network, as masks leave them."""

import numpy as np
import onnx

from prune2deploy.graph.masking import apply_masks
from prune2deploy.groups import SILENCED_ROLES, Groups


def plant_groups(model: onnx.ModelProto, groups: Groups, seed: int = 0) -> dict[str, int]:
    """Silence half of the channels of every prunable group, in place; return the widths that remain.

    A group with a parameter that is no initializer of the graph (the analysis folded it) stays whole.
    """
    random = np.random.default_rng(seed)
    names = {tensor.name for tensor in model.graph.initializer}
    masks, widths = {}, groups.full_widths()
    for group in groups.prunable:
        masks[group.id] = np.ones(group.size, dtype=bool)
        if group.size > 1 and all(member.parameter in names for member in group.of_role(*SILENCED_ROLES)):
            masks[group.id][random.permutation(group.size)[: group.size // 2]] = False
        widths[group.id] = int(masks[group.id].sum())
    apply_masks(model, groups, masks)
    return widths
