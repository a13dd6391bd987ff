"""Small torch networks with their groups written out by hand, and a second, simpler way to narrow them."""

import copy
from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune2deploy.cost import Cost, Term, Width
from prune2deploy.groups import Group, Groups, Layer, Member


def span(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop)[:, None]


def member(parameter: str, role: str, indices: np.ndarray, axis: int = 0) -> Member:
    return Member(parameter, axis, role, indices, parameter.rpartition(".")[0])


def filters(layer: str, indices: np.ndarray, bias: bool = False) -> list[Member]:
    found = [member(f"{layer}.weight", "filter", indices)]
    return [*found, member(f"{layer}.bias", "bias", indices)] if bias else found


def norm_members(layer: str, indices: np.ndarray) -> list[Member]:
    names = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "var"}
    return [member(f"{layer}.{name}", role, indices) for name, role in names.items()]


def reader(layer: str, indices: np.ndarray) -> Member:
    return member(f"{layer}.weight", "reader", indices, axis=1)


def conv_layer(
    name: str, out: Width, into: Width, *, norm: str | None = None, bias: bool = False, op_type: str = "Conv"
) -> Layer:
    return Layer(
        name,
        op_type,
        weight=f"{name}.weight",
        bias=f"{name}.bias" if bias else None,
        norm=norm,
        out_width=out,
        in_width=into,
    )


def norm_layer(name: str, width: Width) -> Layer:
    return Layer(
        name,
        "BatchNormalization",
        weight=f"{name}.weight",
        bias=f"{name}.bias",
        mean=f"{name}.running_mean",
        var=f"{name}.running_var",
        epsilon=1e-5,
        out_width=width,
        in_width=width,
    )


def of(**factors: int) -> Width:
    return Width(0, tuple((name.replace("__", "."), factor) for name, factor in factors.items()))


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight, scale, shift and statistic a random value, so that nothing is right by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return net.eval()


class Residual(nn.Module):
    """stem - norm - relu, then a residual block, pooling and a linear layer, on images [B, 3, 8, 8]."""

    def __init__(self, trunk: int = 6, inner: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, trunk, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(trunk)
        self.conv1 = nn.Conv2d(trunk, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, trunk, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(trunk)
        self.fc = nn.Linear(trunk, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        return self.fc(x.mean((2, 3)))


def residual_groups(trunk: int = 6, inner: int = 8) -> Groups:
    t, i = span(0, trunk), span(0, inner)
    stem, conv1 = of(stem=1), of(conv1=1)
    three, five = Width(3), Width(5)
    return Groups(
        groups=(
            Group(
                "stem",
                trunk,
                (
                    *filters("stem", t),
                    *norm_members("bn", t),
                    reader("conv1", t),
                    *filters("conv2", t),
                    *norm_members("bn2", t),
                    reader("fc", t),
                ),
                ("Relu",),
            ),
            Group(
                "conv1",
                inner,
                (*filters("conv1", i), *norm_members("bn1", i), reader("conv2", i)),
                ("Relu",),
            ),
            Group(
                "fc",
                5,
                (member("fc.weight", "filter", span(0, 5)), member("fc.bias", "bias", span(0, 5))),
                (),
                kept_because="an output of the network",
            ),
        ),
        layers=(
            conv_layer("stem", stem, three, norm="bn"),
            norm_layer("bn", stem),
            conv_layer("conv1", conv1, stem, norm="bn1"),
            norm_layer("bn1", conv1),
            conv_layer("conv2", stem, conv1, norm="bn2"),
            norm_layer("bn2", stem),
            conv_layer("fc", of(fc=1), stem, bias=True, op_type="Gemm"),
        ),
        cost=Cost(
            macs_terms=(
                Term("stem", 9 * 64, (stem, three)),
                Term("conv1", 9 * 64, (conv1, stem)),
                Term("conv2", 9 * 64, (stem, conv1)),
                Term("fc", 1, (five, stem)),
            ),
            parameter_terms=(
                Term("stem", 9, (stem, three)),
                Term("bn", 2, (stem,)),
                Term("conv1", 9, (conv1, stem)),
                Term("bn1", 2, (conv1,)),
                Term("conv2", 9, (stem, conv1)),
                Term("bn2", 2, (stem,)),
                Term("fc", 1, (five, stem)),
                Term("fc", 1, (five,)),
            ),
        ),
    )


class Mobile(nn.Module):
    """conv - norm - relu6 - depthwise - norm - relu6 - grouped conv - relu - flatten - linear, on [B, 1, 6, 6]."""

    def __init__(self, wide: int = 8, narrow: int = 4) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, wide, 3, bias=False)
        self.bn = nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn_depthwise = nn.BatchNorm2d(wide)
        self.grouped = nn.Conv2d(wide, narrow, 1, groups=2)
        self.fc = nn.Linear(narrow * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.expand(x)))
        x = F.relu6(self.bn_depthwise(self.depthwise(x)))
        return self.fc(F.relu(self.grouped(x)).flatten(1))


def mobile_groups(wide: int = 8, narrow: int = 4) -> Groups:
    # The grouped convolution has two blocks: a channel of a group is one place in each block.
    pairs = np.stack([np.arange(wide // 2), np.arange(wide // 2) + wide // 2], axis=1)
    twins = np.stack([np.arange(narrow // 2), np.arange(narrow // 2) + narrow // 2], axis=1)
    flat = (twins[:, :, None] * 16 + np.arange(16)).reshape(len(twins), -1)
    expand, grouped, one, three = of(expand=2), of(grouped=2), Width(1), Width(3)
    return Groups(
        groups=(
            Group(
                "expand",
                wide // 2,
                (
                    *filters("expand", pairs),
                    *norm_members("bn", pairs),
                    *filters("depthwise", pairs),
                    *norm_members("bn_depthwise", pairs),
                    reader("grouped", span(0, wide // 2)),
                ),
                ("Clip(0,6)",),
            ),
            Group("grouped", narrow // 2, (*filters("grouped", twins, bias=True), reader("fc", flat)), ("Relu",)),
        ),
        layers=(
            conv_layer("expand", expand, one, norm="bn"),
            norm_layer("bn", expand),
            conv_layer("depthwise", expand, expand, norm="bn_depthwise"),
            norm_layer("bn_depthwise", expand),
            conv_layer("grouped", grouped, expand, bias=True),
            conv_layer("fc", three, of(grouped=32), bias=True, op_type="Gemm"),
        ),
        cost=Cost(
            macs_terms=(
                Term("expand", 9 * 16, (expand, one)),
                Term("depthwise", 9 * 16, (expand,)),
                Term("grouped", 16, (grouped, expand), divisor=2),
                Term("fc", 1, (three, of(grouped=32))),
            ),
            parameter_terms=(
                Term("expand", 9, (expand, one)),
                Term("bn", 2, (expand,)),
                Term("depthwise", 9, (expand,)),
                Term("bn_depthwise", 2, (expand,)),
                Term("grouped", 1, (grouped, expand), divisor=2),
                Term("grouped", 1, (grouped,)),
                Term("fc", 1, (three, of(grouped=32))),
                Term("fc", 1, (three,)),
            ),
        ),
    )


def select(state: Mapping[str, Tensor], groups: Groups, masks: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the state with the removed channels cut from every member: removal as a person would do it."""
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for group_id, mask in masks.items():
        for part in groups[group_id].members:
            gone.setdefault((part.parameter, part.axis), []).append(part.indices[~mask].ravel())
    narrow = dict(state)
    for (name, axis), parts in gone.items():
        # Indices along the input axis of a grouped convolution are within the group.
        stay = np.setdiff1d(np.arange(narrow[name].shape[axis]), np.concatenate(parts))
        narrow[name] = narrow[name].index_select(axis, torch.from_numpy(stay))
    return narrow


def with_merged_readers(net: nn.Module, groups: Groups, merges: Mapping[str, np.ndarray]) -> nn.Module:
    """Return a copy whose readers of merged channels add up the columns on the channel that stays."""
    merged = copy.deepcopy(net)
    with torch.no_grad():
        for group_id, kept in merges.items():
            for part in groups[group_id].of_role("reader"):
                columns = merged.get_parameter(part.parameter).movedim(part.axis, 0)
                for channel in np.flatnonzero(kept != np.arange(len(kept))):
                    columns[part.indices[kept[channel]]] += columns[part.indices[channel]]
    return merged


def narrowed(net: nn.Module, groups: Groups, masks: Mapping[str, np.ndarray]) -> nn.Module:
    """Return a new, smaller network of the same class without the removed channels."""
    if isinstance(net, Residual):
        small: nn.Module = Residual(int(masks["stem"].sum()), int(masks["conv1"].sum()))
    else:
        small = Mobile(2 * int(masks["expand"].sum()), 2 * int(masks["grouped"].sum()))
    small = small.to(next(net.parameters()).dtype)
    small.load_state_dict(select(net.state_dict(), groups, masks))
    return small.eval()


def permuted(weights: Mapping[str, np.ndarray], group: Group, order: np.ndarray) -> dict[str, np.ndarray]:
    """Return the weights with a group's channels in another order: the same function of the input."""
    result = {name: values.copy() for name, values in weights.items()}
    for part in group.members:
        moved = np.moveaxis(result[part.parameter], part.axis, 0)
        moved[part.indices] = moved[part.indices[order]]
    return result


def counted_macs(net: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of convolutions and linear layers for one sample, counted by hooks."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        per_output = module.weight[0].numel()
        total += per_output * output[0].numel()

    handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net(example)
    for handle in handles:
        handle.remove()
    return total


TOYS = {
    "residual": (Residual, residual_groups, (2, 3, 8, 8)),
    "mobile": (Mobile, mobile_groups, (2, 1, 6, 6)),
}


def random_masks(groups: Groups, seed: int) -> dict[str, np.ndarray]:
    """Return masks that keep at least one channel of every group, and all of those that cannot be pruned."""
    generator = np.random.default_rng(seed)
    masks = {}
    for group in groups.groups:
        mask = np.ones(group.size, dtype=np.bool_)
        if group.prunable:
            mask = generator.random(group.size) < 0.6
            mask[generator.integers(group.size)] = True
        masks[group.id] = mask
    return masks


def masks_of(groups: Groups, removed: Mapping[str, Iterable[int]]) -> dict[str, np.ndarray]:
    """Return masks that keep all but the named channels."""
    masks = {group.id: np.ones(group.size, dtype=np.bool_) for group in groups.groups}
    for group, channels in removed.items():
        masks[group][list(channels)] = False
    return masks
