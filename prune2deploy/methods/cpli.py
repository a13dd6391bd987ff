"""CPLI: a LASSO on what channels contribute where the loss depends on it, then least squares."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, final

import numpy as np

from prune2deploy.budget import Budget
from prune2deploy.groups import Group, Groups
from prune2deploy.masks import widths as widths_of
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, PruneResult, Range, Weights, plan_report
from prune2deploy.methods.filters import producers
from prune2deploy.methods.readers import (
    Batch,
    Pruned,
    Reader,
    Watch,
    first_batches,
    is_watched,
    positioned,
    take,
    windows,
)
from prune2deploy.methods.reconstruction import lasso, lasso_keeping, weighted_least_squares, weighted_mean
from prune2deploy.methods.shortcuts import Shortcut, find_shortcuts
from prune2deploy.silence import FoldPlace

if TYPE_CHECKING:
    from torch import Tensor, nn

_PATH = 1e-4 ** np.linspace(0.0, 1.0, 65)[1:]
"""Penalties at which scores are taken, as shares of the smallest one that removes everything."""

_MOST_PRODUCTS = 2**37
"""Samples are left out of a LASSO's moments beyond so many products of numbers; least squares use all."""

_LEAST_SCALE = 1e-3
"""Outputs whose norm multiplies them by less (of the largest) are not asked to make up for a shortcut."""

_CHUNK = 2**24
"""Contributions that are held at a time."""


@final
@dataclass(frozen=True)
class CPLI(Method):
    """Choose channels by a LASSO that the classification loss guides (Guo, Ouyang, Xu, AAAI 2020, arXiv 2003.06757).

    Channel Pruning Guided by Classification Loss and Feature Importance. Read: the abstract and a summary. Layer by
    layer, front to back, the inputs of a layer are chosen by a LASSO that reconstructs its outputs in the dense
    network, guided by the loss and by how important each output is for what follows; then its weights are fitted anew.
    The base is He, Zhang, Sun (ICCV 2017); how samples and outputs are weighted is a reconstruction:

        z_noc = sum over taps of W_oc x_nc                            what channel c contributes to output o
        w_no  = u_o ((1 - alpha) + alpha g_no^2 / mean_n g_no^2)      g = derivative of the loss by the output y
        u_o   = mean_n |g_no y_no|, in units of its mean over o       0 for outputs that are going to be removed
        beta  = argmin mean_n sum_o w_no (y_no - sum_c beta_c z_noc)^2 / 2 + lambda |beta|_1
        W'    = argmin mean_n w_no (y_no - sum_c W'_oc x_nc)^2 + ridge |W' - W|^2 for every output o

    y and g are the dense network's, x is what is left of it. lambda is bisected until as many channels stay as the
    width says; widths are one common share of every layer, or those of the budget.

    Ours: a free constant in both problems where the layer or the norm behind it has a place for it; the ridge pulls to
    the old weights; outputs are going to be removed when their u is among the smallest, as many as their own group
    loses; several readers of one group have one LASSO, each in units of its own outputs; grouped convolutions take part
    in it, but keep their weights. In a residual block what the shortcut has lost is to be made up for as well (as He et
    al. do), where the shortcut is found: the report names those layers.

    Attributes:
        images: how many labelled images.
        positions: of each map, at random.
        alpha: how much the derivatives decide; above 0.5 a handful of samples decides.
        importance: ``kept`` is u as above, ``all`` without zeros, ``none`` is u = 1.
        ridge: in units of an input's mean square.
        scope: ``inner``, as He et al.: groups that one layer makes, so that a stage's output stays whole; or ``all``.
        seed: chooses the positions.
    """

    needs: ClassVar[Needs] = Needs(data=True, labels=True, pretrained=True)

    images: Annotated[int, Range(low=1)] = 512
    positions: Annotated[int, Range(low=1)] = 10
    alpha: Annotated[float, Range(low=0, high=1)] = 0.5
    importance: Literal["kept", "all", "none"] = "kept"
    ridge: Annotated[float, Range(low=1e-12)] = 1e-4
    scope: Literal["inner", "all"] = "inner"
    seed: Annotated[int, Range(low=0)] = 0

    def scores(self, weights: Weights, groups: Groups, context: Context = NO_CONTEXT) -> dict[str, np.ndarray]:
        """Return group id -> the largest lambda tried that keeps the channel, in the dense network, [channels].

        It is a share of the smallest lambda that removes them all; a channel that none keeps has 0.

        Raises:
            InputError: if there are no labelled images, or the loss on them is not finite.
        """
        network = self._copy(groups, context)
        scored = self._scored(weights, network)
        teacher = self._teacher(network, scored)
        found = {}
        for group in scored:
            gram, products = self._moments(network, group, teacher, self._student(network, group, teacher), {})
            top = float(np.abs(products).max())
            score, start = np.zeros(group.size), np.zeros(group.size)
            for share in _PATH if top > 0 else ():
                start = lasso(gram, products, share * top, start)
                score = np.where((score == 0) & (start != 0), share, score)
            found[group.id] = score
        return found

    def plan(self, weights: Weights, groups: Groups, budget: Budget, context: Context = NO_CONTEXT) -> PruneResult:
        """Return masks within the budget with the weights of what reads the kept channels, as `Method.plan`."""
        network = self._copy(groups, context)
        scored = self._scored(weights, network)
        alike = {group.id: np.zeros(group.size) for group in scored}
        ranking = "uniform" if budget.widths is not None else budget.ranking or self.ranking
        scores = alike if ranking == "uniform" else self.scores(weights, groups, context)
        widths = widths_of(budget.masks(scores, groups, ranking))
        narrow = [group for group in scored if widths[group.id] < group.size]
        teacher = self._teacher(network, narrow)
        penalties = {}
        for group in narrow:
            student = self._student(network, group, teacher)
            gram, products = self._moments(network, group, teacher, student, widths)
            beta, penalty = lasso_keeping(gram, products, widths[group.id])
            best = np.argsort(-np.abs(beta), kind="stable")
            network.silence(group, np.sort(best[widths[group.id] :]))
            penalties[group.id] = penalty / (float(np.abs(products).max()) or 1.0)
            self._fit(network, teacher, student)
        report = plan_report(groups, budget, network.kept) | {
            "ranking": ranking,
            "penalties": penalties,
            "images": sum(len(images) for images, _ in network.batches),
            "scope": self.scope,
            "not_scored": [group.id for group in groups.prunable if group.id not in alike],
            "shortcuts": sorted(name for name, lesson in teacher.items() if lesson.carried),
            "not_fitted": network.not_fitted(),
        }
        return PruneResult(network.kept, weights=network.new_weights(), report=report)

    def _copy(self, groups: Groups, context: Context) -> Pruned:
        module, images = context.network("cpli")
        return Pruned(module, groups, first_batches(images, self.images, "cpli"))

    def _scored(self, weights: Weights, network: Pruned) -> list[Group]:
        return [
            group
            for group in network.groups.prunable
            if any(is_watched(network.readers[member.parameter]) for member in group.of_role("reader"))
            and (self.scope == "all" or len(producers(weights, network.groups, group)) == 1)
        ]

    # --- what is measured ---------------------------------------------------------------------------------------------

    def _teacher(self, network: Pruned, groups: Sequence[Group]) -> dict[str, "Lesson"]:
        """Return what the dense network says of every layer that reads the groups; the copy must still be dense."""
        import torch

        names = dict.fromkeys(member.parameter for group in groups for member in group.of_role("reader"))
        readers = [network.readers[name] for name in names if is_watched(network.readers[name])]
        shortcuts = find_shortcuts(network, [reader.parameter for reader in readers if not reader.refused])
        generator = torch.Generator().manual_seed(self.seed)
        parts: dict[str, list[tuple[Any, Any, Any]]] = {reader.parameter: [] for reader in readers}
        for batch in network.batches if readers else ():
            with _recorded(readers) as calls:
                gradients = _derivatives(network.module, batch, lambda: [call.output for call in calls.values()])
            for (name, call), gradient in zip(calls.items(), gradients, strict=True):
                outputs, slopes = positioned(call.owner, call.output), positioned(call.owner, gradient)
                noise = torch.rand(outputs.shape[:2], generator=generator)
                chosen = noise.topk(min(self.positions, outputs.shape[1]), dim=1).indices.to(outputs.device)
                parts[name].append((chosen, take(outputs, chosen), take(slopes, chosen)))
        lessons = {name: Lesson.of(own, shortcuts.get(name)) for name, own in parts.items() if own}
        _, carried = look(network, lessons, ())
        for name, values in carried.items():
            lessons[name].carried.append(values)
        return lessons

    def _student(self, network: Pruned, group: Group, teacher: Mapping[str, "Lesson"]) -> dict[str, "Sight"]:
        """Return what the readers of a group see now where the teacher looked, and what they should make of it."""
        names = dict.fromkeys(member.parameter for member in group.of_role("reader") if member.parameter in teacher)
        seen, carried = look(network, {name: teacher[name] for name in names}, tuple(names))
        return {
            name: Sight(rows, teacher[name].outputs - network.bias(name) + teacher[name].lost(carried.get(name)))
            for name, rows in seen.items()
        }

    # --- the two problems ---------------------------------------------------------------------------------------------

    def _moments(
        self,
        network: Pruned,
        group: Group,
        teacher: Mapping[str, "Lesson"],
        student: Mapping[str, "Sight"],
        widths: Mapping[str, int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the LASSO's H [channels, channels] and q [channels], added up over the readers."""
        gram, products = np.zeros((group.size, group.size)), np.zeros(group.size)
        for member in group.of_role("reader"):
            if member.parameter not in student:
                continue
            name, lesson, reader = member.parameter, teacher[member.parameter], network.readers[member.parameter]
            weight, (seen, wanted) = network.by_input(name), student[name]
            importance = self._importance(network, lesson, name, widths)
            weights = lesson.sample_weights(self.alpha) * importance
            stride = -(-len(seen) * np.count_nonzero(importance) * group.size**2 // _MOST_PRODUCTS) or 1
            h, q, unit = lasso_moments(
                seen[::stride],
                wanted[::stride],
                weights[::stride],
                weight.reshape(*weight.shape[:2], -1),
                member.indices,
                blocks=reader.blocks,
                centred=isinstance(reader.constant, FoldPlace),
            )
            gram += h / (unit or 1.0)
            products += q / (unit or 1.0)
        return gram, products

    def _importance(self, network: Pruned, lesson: "Lesson", name: str, widths: Mapping[str, int]) -> np.ndarray:
        """Return u, [outputs]; 0 for outputs that are gone, or likely to go."""
        live = network.live_outputs(name)
        found = lesson.importance() if self.importance != "none" else np.ones(len(live))
        axis = 1 - network.readers[name].member.axis
        for group in network.groups.prunable if self.importance == "kept" else ():
            excess = int(network.kept[group.id].sum()) - widths.get(group.id, group.size)
            for member in group.of_role("filter"):
                if member.parameter == name and member.axis == axis and excess > 0:
                    by_channel = found[member.indices].sum(axis=1)
                    live[member.indices[np.argsort(by_channel, kind="stable")[:excess]]] = False
        found = np.where(live, found, 0.0)
        mean = found[live].mean() if live.any() else 0.0
        return np.asarray(found / mean) if mean > 0 else live.astype(np.float64)

    def _fit(self, network: Pruned, teacher: Mapping[str, "Lesson"], student: Mapping[str, "Sight"]) -> None:
        """Fit the weights of readers to the teacher's outputs, with the inputs that are left."""
        for name, (seen, wanted) in student.items():
            reader = network.readers[name]
            if reader.refused:
                continue
            alive, lesson = network.alive[name], teacher[name]
            weight = network.by_input(name).copy()
            inputs, outputs = weight.shape[:2]
            start = np.moveaxis(weight.reshape(inputs, outputs, -1), 1, 2)[alive].reshape(-1, outputs)
            rows = seen[:, alive].reshape(len(seen), -1).astype(np.float64)
            weights = lesson.sample_weights(self.alpha)
            centred = isinstance(reader.constant, FoldPlace)
            found = weighted_least_squares(rows, wanted, weights, start, self.ridge, centred=centred)
            taps = found.reshape(int(alive.sum()), -1, outputs)
            weight[alive] = np.moveaxis(taps, 1, 2).reshape(-1, *weight.shape[1:])
            network.replace_by_input(name, weight)
            if centred:
                network.set_constant(name, weighted_mean(wanted - rows @ found, weights))


# --- the dense network ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the dense network says of one layer.

    Attributes:
        chosen: for every batch, int64 [images, positions]: which outputs were looked at, as flat positions.
        outputs: y, float64 [samples, outputs].
        derivatives: of an image's cross-entropy by y, float64 [samples, outputs].
        shortcut: what is added to the outputs behind the norm, where one was found.
        carried: what the shortcut carries, float64 [samples, channels]; one item, or none.
    """

    chosen: "list[Tensor]"
    outputs: np.ndarray
    derivatives: np.ndarray
    shortcut: Shortcut | None = None
    carried: list[np.ndarray] = field(default_factory=list)

    @staticmethod
    def of(parts: "Sequence[tuple[Tensor, Tensor, Tensor]]", shortcut: Shortcut | None = None) -> "Lesson":
        """Return the lesson of what was chosen and seen, batch by batch."""
        chosen, outputs, slopes = zip(*parts, strict=True)
        y, g = (np.concatenate([part.double().cpu().numpy() for part in own]) for own in (outputs, slopes))
        return Lesson(list(chosen), y, g, shortcut)

    def lost(self, now: np.ndarray | None) -> np.ndarray:
        """Return what the layer should add to its outputs for what its shortcut does not carry any more.

        Args:
            now: what it carries now, [samples, channels].
        """
        found = np.zeros_like(self.outputs)
        if self.shortcut is not None and now is not None and self.carried:
            scale = self.shortcut.scale
            usable = np.abs(scale) > _LEAST_SCALE * np.abs(scale).max(initial=0.0)
            outputs = self.shortcut.outputs[usable]
            found[:, outputs] = (self.carried[0] - now)[:, usable] / scale[usable]
        return found

    def sample_weights(self, alpha: float) -> np.ndarray:
        """Return ``(1 - alpha) + alpha g^2 / mean over the samples of g^2``, [samples, outputs]."""
        squares = self.derivatives**2
        means = squares.mean(axis=0)
        shares = np.divide(squares, means, out=np.ones_like(squares), where=means > 0)
        return np.asarray((1 - alpha) + alpha * shares)

    def importance(self) -> np.ndarray:
        """Return the mean of ``|g y|`` over the samples, [outputs]."""
        return np.asarray(np.abs(self.derivatives * self.outputs).mean(axis=0))


class Sight(NamedTuple):
    """What a layer reads in the pruned network, [samples, inputs, taps], and what it should give, [samples, outputs].

    The dense network's bias is taken off what it should give.
    """

    seen: np.ndarray
    wanted: np.ndarray


def look(
    network: Pruned, lessons: Mapping[str, Lesson], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what readers see now where the teacher looked, and what the shortcuts of all lessons carry there.

    Returns:
        name -> [samples, inputs, taps] for ``names``; name -> float64 [samples, channels] for lessons with a shortcut.
    """
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    shortcuts = {name: lesson.shortcut for name, lesson in lessons.items() if lesson.shortcut is not None}
    carried: dict[str, list[np.ndarray]] = {name: [] for name in shortcuts}

    def visit(name: str, owner: "nn.Module", values: "Tensor", call: int) -> None:
        if call:
            return
        if name in seen:
            chosen = lessons[name].chosen[len(seen[name])]
            seen[name].append(windows(owner, values, chosen).flatten(0, 1).cpu().numpy())
        for target, shortcut in shortcuts.items():
            if shortcut.source == name:
                chosen = lessons[target].chosen[len(carried[target])]
                carried[target].append(shortcut.at(values, chosen).double().cpu().numpy())

    watched = dict.fromkeys([*names, *(shortcut.source for shortcut in shortcuts.values())])
    if watched:
        Watch(network.module, [network.readers[name] for name in watched], visit).run(network.batches)
    return (
        {name: np.concatenate(parts) for name, parts in seen.items()},
        {name: np.concatenate(parts) for name, parts in carried.items()},
    )


class _Call(NamedTuple):
    owner: "nn.Module"
    output: "Tensor"


@contextmanager
def _recorded(readers: Sequence[Reader]) -> Iterator[dict[str, _Call]]:
    """Record the output of every reader's first call."""
    calls: dict[str, _Call] = {}

    def hook(name: str) -> "Callable[[nn.Module, Any, Tensor], Tensor | None]":
        def called(owner: "nn.Module", _: Any, output: "Tensor") -> "Tensor | None":
            if name in calls:
                return None
            calls[name] = _Call(owner, output)
            return output.clone()  # what follows may work in place

        return called

    handles = [owner.register_forward_hook(hook(reader.parameter)) for reader in readers for owner in reader.owners]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _derivatives(module: "nn.Module", batch: Batch, outputs: "Callable[[], Sequence[Tensor]]") -> "Sequence[Tensor]":
    """Return the derivatives of the images' cross-entropies by what was recorded while the network ran."""
    import torch
    import torch.nn.functional as F

    from prune2deploy.train.accuracy import cudnn_flags, logits_of, require

    images, labels = batch
    with torch.enable_grad(), cudnn_flags(tf32=False):
        logits = logits_of(module, images.detach().clone().requires_grad_(True), int(labels.max()) + 1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        value = float(loss.detach())
        require(math.isfinite(value), f"the loss is {value}; check the weights and the normalisation")
        recorded = outputs()
        found = torch.autograd.grad(loss, recorded, allow_unused=True)
    return [torch.zeros_like(one) if slope is None else slope for one, slope in zip(recorded, found, strict=True)]


# --- moments of contributions -----------------------------------------------------------------------------------------


def lasso_moments(
    seen: np.ndarray,
    wanted: np.ndarray,
    weights: np.ndarray,
    weight: np.ndarray,
    channels: np.ndarray,
    *,
    blocks: int = 1,
    centred: bool = False,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return H = mean_n sum_o w z z^T and q = mean_n sum_o w y z of channels' contributions z, and mean_n sum_o w y^2.

    y is what is wanted of the channels: the other inputs' contributions are taken off.

    Args:
        seen: inputs, [samples, inputs, taps].
        wanted: outputs, [samples, outputs].
        weights: w, [samples, outputs].
        weight: [inputs of a block, outputs, taps].
        channels: int [channels, k]: a channel's indices along the first axis of ``weight``.
        blocks: of a grouped convolution.
        centred: take the weighted mean off z and y, output by output: a constant is free.

    Returns:
        [channels, channels], [channels], and a number.
    """
    size, samples = len(channels), len(seen)
    gram, products, unit = np.zeros((size, size)), np.zeros(size), 0.0
    outputs = weight.shape[1]
    by_block = seen.reshape(samples, blocks, -1, seen.shape[2]).astype(np.float64)
    some = max(1, _CHUNK // (size * samples))
    for block in range(blocks):
        own = np.arange(block * outputs // blocks, (block + 1) * outputs // blocks)
        own = own[weights[:, own].any(axis=0)]
        inputs = by_block[:, block]
        of_channels = inputs[:, channels].transpose(1, 0, 2, 3).reshape(size, samples, -1)
        for part in np.split(own, range(some, len(own), some)) if len(own) else ():
            columns = weight[:, part]
            taps = columns[channels].transpose(0, 1, 3, 2).reshape(size, -1, len(part))
            z = of_channels @ taps  # [channels, samples, outputs]
            every = inputs.reshape(samples, -1) @ columns.transpose(0, 2, 1).reshape(-1, len(part))
            y, w = wanted[:, part] - (every - z.sum(axis=0)), weights[:, part]
            if centred:
                y = y - weighted_mean(y, w)
                z -= np.einsum("cno,no->co", z, w / w.sum(axis=0))[:, None]
            z *= np.sqrt(w)
            y = y * np.sqrt(w)
            flat = z.reshape(size, -1)
            gram += flat @ flat.T
            products += flat @ y.ravel()
            unit += float((y**2).sum())
    return gram / samples, products / samples, unit / samples
