"""CPLI: a LASSO on what channels contribute where the loss depends on it, then least squares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, final

import numpy as np

from prune2deploy.budget import Budget
from prune2deploy.groups import Group, Groups
from prune2deploy.masks import widths as widths_of
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, PruneResult, Range, Weights, plan_report
from prune2deploy.methods.filters import in_scope
from prune2deploy.methods.lessons import Lesson, Sight, study, teach
from prune2deploy.methods.readers import Pruned, first_batches, is_watched
from prune2deploy.methods.reconstruction import Lasso, weighted_least_squares, weighted_mean
from prune2deploy.silence import FoldPlace

_PATH = 1e-4 ** np.linspace(0.0, 1.0, 65)[1:]
"""Penalties at which scores are taken, as shares of the smallest one that removes everything."""

_MOST_PRODUCTS = 2**37
"""Samples are left out of a LASSO's moments beyond so many products of numbers; least squares use all."""

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
            problem, score = Lasso(gram, products), np.zeros(group.size)
            for share in _PATH if problem.top > 0 else ():
                score = np.where((score == 0) & (problem.near(share * problem.top) != 0), share, score)
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
            problem = Lasso(gram, products)
            beta, penalty = problem.keeping(widths[group.id])
            best = np.argsort(-np.abs(beta), kind="stable")
            network.silence(group, np.sort(best[widths[group.id] :]))
            penalties[group.id] = penalty / (problem.top or 1.0)
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
            and in_scope(weights, network.groups, group, self.scope)
        ]

    def _teacher(self, network: Pruned, groups: Sequence[Group]) -> dict[str, Lesson]:
        names = dict.fromkeys(member.parameter for group in groups for member in group.of_role("reader"))
        return teach(network, list(names), self.positions, self.seed)

    def _student(self, network: Pruned, group: Group, teacher: Mapping[str, Lesson]) -> dict[str, Sight]:
        names = dict.fromkeys(member.parameter for member in group.of_role("reader"))
        return study(network, {name: teacher[name] for name in names if name in teacher})

    # --- the two problems ---------------------------------------------------------------------------------------------

    def _moments(
        self,
        network: Pruned,
        group: Group,
        teacher: Mapping[str, Lesson],
        student: Mapping[str, Sight],
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

    def _importance(self, network: Pruned, lesson: Lesson, name: str, widths: Mapping[str, int]) -> np.ndarray:
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

    def _fit(self, network: Pruned, teacher: Mapping[str, Lesson], student: Mapping[str, Sight]) -> None:
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
