"""CPLI: the guided LASSO and the least squares behind it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import linear_model
from torch import Tensor, nn
from toy_groups import TOYS, Mobile, Residual, mobile_groups, randomise, residual_groups

from prune2deploy.apply import apply_masks, set_weights, weights_of
from prune2deploy.budget import Budget, Target
from prune2deploy.errors import InputError
from prune2deploy.groups import Groups
from prune2deploy.masks import widths
from prune2deploy.methods.base import Context, PruneResult
from prune2deploy.methods.cpli import CPLI, lasso_moments
from prune2deploy.methods.lessons import Lesson, Sight
from prune2deploy.methods.readers import Pruned
from prune2deploy.methods.reconstruction import Lasso

Batch = tuple[Tensor, Tensor]
RNG = np.random.default_rng(5)


def batches(shape: tuple[int, ...], classes: int, count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(shape, generator=generator).double(), torch.randint(classes, (shape[0],), generator=generator))
        for _ in range(count)
    ]


def looked_at(
    method: CPLI, net: nn.Module, groups: Groups, group: str, data: list[Batch]
) -> tuple[Pruned, dict[str, Lesson], dict[str, Sight]]:
    """Return the copy, what the dense network says of the readers of a group, and what they see; nothing is pruned."""
    copy = Pruned(net, groups, data)
    teacher = method._teacher(copy, [groups[group]])
    return copy, teacher, method._student(copy, groups[group], teacher)


# --- the LASSO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_moments_are_those_of_every_contribution_written_out(blocks: int, centred: bool) -> None:
    """z_noc = sum over taps W_oc x_nc; H = mean_n sum_o w z z^T, q = mean_n sum_o w y z, also by blocks."""
    samples, inputs, outputs, taps = 30, 6, 4, 3
    seen = RNG.normal(size=(samples, inputs * blocks, taps)) + 1
    wanted, w = RNG.normal(size=(samples, outputs)), RNG.random((samples, outputs))
    weight = RNG.normal(size=(inputs, outputs, taps))
    channels = np.array([[4, 1], [0, 5]])  # two channels of two places, and two inputs of others
    z, y = np.zeros((samples, outputs, 2)), np.zeros((samples, outputs))
    for n in range(samples):
        for o in range(outputs):
            first = inputs * (o * blocks // outputs)
            each = [float(seen[n, first + i] @ weight[i, o]) for i in range(inputs)]
            z[n, o] = each[4] + each[1], each[0] + each[5]
            y[n, o] = wanted[n, o] - each[2] - each[3]
    if centred:
        z -= (w[..., None] * z).sum(axis=0) / w.sum(axis=0)[:, None]
        y -= (w * y).sum(axis=0) / w.sum(axis=0)
    h, q, unit = lasso_moments(seen, wanted, w, weight, channels, blocks=blocks, centred=centred)
    np.testing.assert_allclose(h, np.einsum("no,noc,nod->cd", w, z, z) / samples)
    np.testing.assert_allclose(q, np.einsum("no,no,noc->c", w, y, z) / samples)
    assert unit == pytest.approx(float((w * y**2).sum() / samples))


@pytest.mark.parametrize(("toy", "group"), [("residual", "stem"), ("residual", "conv1"), ("mobile", "grouped")])
def test_in_the_dense_network_no_penalty_gives_every_channel_exactly_one(toy: str, group: str) -> None:
    """lambda = 0 -> beta = 1, on real readers: several, with several places, with other weights beside them."""
    make, make_groups, shape = TOYS[toy]
    net, groups, method = randomise(make()).double(), make_groups(), CPLI()
    copy, teacher, student = looked_at(method, net, groups, group, batches((16, *shape[1:]), 3))
    gram, products = method._moments(copy, groups[group], teacher, student, {})
    np.testing.assert_allclose(Lasso(gram, products).solve(0.0), 1.0, rtol=1e-7)
    assert not Lasso(gram, products).solve(float(np.abs(products).max())).any()


def test_without_guidance_it_is_the_plain_lasso_on_the_samples() -> None:
    """alpha = 0 and u = 1, against scikit-learn on the contributions, one row for each sample and output."""
    net, groups = randomise(Residual()).double(), residual_groups()
    method = CPLI(alpha=0.0, importance="none", positions=6)
    copy, teacher, student = looked_at(method, net, groups, "conv1", batches((8, 3, 8, 8), 5))
    gram, products = method._moments(copy, groups["conv1"], teacher, student, {})
    seen, wanted = student["conv2.weight"]
    z = np.einsum("nct,oct->noc", seen, net.conv2.weight.detach().flatten(2).numpy())
    z, y = (z - z.mean(axis=0)).reshape(-1, 8), (wanted - wanted.mean(axis=0)).ravel()
    unit = (y**2).sum() / len(seen)
    np.testing.assert_allclose(gram, z.T @ z / len(seen) / unit)
    for share in (0.5, 0.1, 0.01):
        penalty = share * np.abs(products).max()
        own = linear_model.Lasso(
            alpha=penalty * unit * len(seen) / len(z), fit_intercept=False, tol=1e-12, max_iter=100000
        )
        np.testing.assert_allclose(Lasso(gram, products).solve(penalty), own.fit(z, y).coef_, atol=1e-6)


def test_a_channel_that_contributes_nothing_goes_first() -> None:
    """The filters of channel 3 are 0, and so is its shift: what it contributes is 0."""
    net, groups = randomise(Residual()).double(), residual_groups()
    with torch.no_grad():
        net.conv1.weight[3] = 0.0
        net.bn1.running_mean[3] = net.bn1.bias[3] = 0.0
    context = Context(net, batches((8, 3, 8, 8), 5))
    scores = CPLI().scores(weights_of(net), groups, context)["conv1"]
    assert scores[3] == 0
    assert (np.delete(scores, 3) > 0).all()
    result = CPLI().plan(weights_of(net), groups, Budget(None, widths={"conv1": 7}), context)
    assert np.flatnonzero(~result.keep["conv1"]).tolist() == [3]


def test_an_output_without_importance_has_no_say() -> None:
    """u_o = 0: H, q and the solution do not depend on y_o; with importance they do."""
    net, groups = randomise(Residual()).double(), residual_groups()
    method = CPLI()
    copy, teacher, student = looked_at(method, net, groups, "conv1", batches((8, 3, 8, 8), 5))
    lesson = teacher["conv2.weight"]
    seen, wanted = student["conv2.weight"]
    other = wanted.copy()
    other[:, 2] = 7 * RNG.normal(size=len(other))
    for silent in (True, False):
        slopes = lesson.derivatives.copy()
        slopes[:, 2] *= not silent
        told = {"conv2.weight": Lesson(lesson.chosen, lesson.outputs, slopes)}
        found = [
            method._moments(copy, groups["conv1"], told, {"conv2.weight": Sight(seen, y)}, {}) for y in (wanted, other)
        ]
        betas = [Lasso(gram, products).keeping(4)[0] for gram, products in found]
        assert np.array_equal(*betas) == silent


def test_outputs_that_are_going_to_be_removed_have_no_importance() -> None:
    """As many of the smallest u as their group loses, and all that are gone already; the mean of the rest is 1."""
    net, groups = randomise(Residual()).double(), residual_groups()
    copy, teacher, _ = looked_at(CPLI(), net, groups, "conv1", batches((8, 3, 8, 8), 5))
    lesson = teacher["conv2.weight"]
    u = lesson.importance()
    np.testing.assert_allclose(u, np.abs(lesson.derivatives * lesson.outputs).mean(axis=0))
    found = CPLI()._importance(copy, lesson, "conv2.weight", {"stem": 4})
    assert set(np.flatnonzero(found == 0)) == set(np.argsort(u)[:2])
    assert found[found > 0].mean() == pytest.approx(1.0)
    every = CPLI(importance="all")._importance(copy, lesson, "conv2.weight", {"stem": 4})
    np.testing.assert_allclose(every, u / u.mean())
    copy.silence(groups["stem"], np.array([0]))
    assert CPLI(importance="none")._importance(copy, lesson, "conv2.weight", {}).tolist() == [0, 1, 1, 1, 1, 1]


def test_sample_weights_are_the_squared_derivatives_mixed_with_one() -> None:
    """(1 - alpha) + alpha g^2 / mean g^2, whose mean is 1 for every output; where g is 0 throughout it is 1."""
    slopes = RNG.normal(size=(50, 3)) ** 3
    slopes[:, 1] = 0.0
    lesson = Lesson([], np.ones((50, 3)), slopes)
    for alpha in (0.0, 0.5, 1.0):
        weights = lesson.sample_weights(alpha)
        np.testing.assert_allclose(weights.mean(axis=0), 1.0)
        np.testing.assert_allclose(weights[:, 0], 1 - alpha + alpha * slopes[:, 0] ** 2 / (slopes[:, 0] ** 2).mean())
        np.testing.assert_allclose(weights[:, 1], 1.0)


def test_the_teacher_has_the_dense_outputs_and_the_derivatives_of_each_images_loss() -> None:
    """g = dL/dy, against the change of the loss when an output of the layer is moved by a little."""
    net, groups, data = randomise(Residual()).double(), residual_groups(), batches((3, 3, 8, 8), 5, count=1)
    _, teacher, student = looked_at(CPLI(positions=2), net, groups, "conv1", data)
    lesson, (images, labels) = teacher["conv2.weight"], data[0]

    def losses(move: Tensor | None) -> Tensor:
        handle = net.conv2.register_forward_hook(lambda _, __, y: y if move is None else y + move)
        with torch.no_grad():
            found = F.cross_entropy(net(images), labels, reduction="none")
        handle.remove()
        return found

    for image, output in ((0, 1), (2, 4)):
        place = int(lesson.chosen[0][image, 1])
        move = torch.zeros(3, 6, 8, 8).double()
        move[image, output, place // 8, place % 8] = 1e-6
        slope = float((losses(move) - losses(-move))[image]) / 2e-6
        assert lesson.derivatives[2 * image + 1, output] == pytest.approx(slope, rel=1e-4, abs=1e-9)
    seen, wanted = student["conv2.weight"]
    np.testing.assert_allclose(np.einsum("nit,oit->no", seen, net.conv2.weight.detach().flatten(2).numpy()), wanted)
    np.testing.assert_allclose(lesson.outputs, wanted)


# --- end to end -------------------------------------------------------------------------------------------------------


def planned(net: nn.Module, groups: Groups, method: CPLI, kept: dict[str, int], data: list[Batch]) -> PruneResult:
    return method.plan(weights_of(net), groups, Budget(None, widths=kept), Context(net, data))


@torch.no_grad()
def test_a_planted_dependency_is_reconstructed_when_as_many_stay_as_the_rank() -> None:
    """Channels 3 to 7 are multiples of 0 to 2 and are read alike: three say all, and least squares find the weights."""
    net, groups = randomise(Residual()).double(), residual_groups()
    for channel in range(3, 8):
        source, factor = channel % 3, channel / 4
        net.conv1.weight[channel] = net.conv1.weight[source]
        net.conv2.weight[:, channel] = net.conv2.weight[:, source]
        for name, tensor in net.bn1.state_dict().items():
            if tensor.ndim:
                tensor[channel] = (factor if name in ("weight", "bias") else 1) * tensor[source]
    x = torch.randn(3, 3, 8, 8).double()
    dense = net(x)
    result = planned(net, groups, CPLI(ridge=1e-12), {"conv1": 3}, batches((16, 3, 8, 8), 5))
    assert {int(place) % 3 for place in np.flatnonzero(result.keep["conv1"])} == {0, 1, 2}
    assert not result.weights["conv2.weight"][:, ~result.keep["conv1"]].any()
    set_weights(net, result.weights)
    apply_masks(net, groups, result.keep)
    assert (net(x) - dense).abs().max() <= 1e-6 * dense.abs().max()


@torch.no_grad()
def test_a_flattened_map_is_reconstructed_at_every_place() -> None:
    net, groups = randomise(Mobile()).double(), mobile_groups()
    for name in ("grouped.weight", "grouped.bias"):
        net.get_parameter(name)[[1, 3]] = 2 * net.get_parameter(name)[[0, 2]]
    x = torch.randn(3, 1, 6, 6).double()
    dense = net(x)
    result = planned(net, groups, CPLI(ridge=1e-12), {"grouped": 1}, batches((64, 1, 6, 6), 3))
    set_weights(net, result.weights)
    apply_masks(net, groups, result.keep)
    assert (net(x) - dense).abs().max() <= 1e-6 * dense.abs().max()


def test_least_squares_beat_deletion_of_the_same_channels() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    x = torch.randn(64, 3, 8, 8).double()
    with torch.no_grad():
        dense = net(x)
    result = planned(net, groups, CPLI(scope="all"), {"conv1": 4, "stem": 4}, batches((32, 3, 8, 8), 5))
    errors = []
    for weights in (result.weights, {}):
        other = randomise(Residual()).double()
        set_weights(other, weights)
        apply_masks(other, groups, result.keep)
        with torch.no_grad():
            errors.append(float((other(x) - dense).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_what_a_shortcut_has_lost_is_asked_of_the_layer_beside_it() -> None:
    """norm(y + lost) + shortcut now = norm(y) + shortcut in the dense network, at every sample and channel."""
    net, groups = randomise(Residual()).double(), residual_groups()
    data = batches((8, 3, 8, 8), 5)
    method, copy = CPLI(positions=5), Pruned(net, groups, data)
    teacher = method._teacher(copy, [groups["conv1"]])
    lesson = teacher["conv2.weight"]
    assert lesson.shortcut is not None
    np.testing.assert_array_equal(
        method._student(copy, groups["conv1"], teacher)["conv2.weight"].wanted, lesson.outputs
    )
    with torch.no_grad():
        copy.module.get_parameter("bn.bias").add_(torch.linspace(-1, 1, 6).double())
    wanted = method._student(copy, groups["conv1"], teacher)["conv2.weight"].wanted

    def shortcut(module: nn.Module) -> np.ndarray:
        parts = []
        for (images, _), chosen in zip(data, lesson.chosen, strict=True):
            with torch.no_grad():
                every = F.relu(module.bn(module.stem(images))).flatten(2)
            parts += [every[n, :, chosen[n]].T for n in range(len(images))]
        return torch.cat(parts).numpy()

    scale = (net.bn2.weight / (net.bn2.running_var + net.bn2.eps).sqrt()).detach().numpy()
    before, now = shortcut(net), shortcut(copy.module)
    assert np.abs(before - now).max() > 0.1
    np.testing.assert_allclose(wanted * scale + now, lesson.outputs * scale + before, atol=1e-9)
    assert planned(net, groups, method, {"conv1": 4}, data).report["shortcuts"] == ["conv2.weight"]


def test_widths_are_one_common_share_or_those_given() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    context, weights = Context(net, batches((8, 3, 8, 8), 5)), weights_of(net)
    for budget in (
        Budget(Target("macs", 0.6)),
        Budget(Target("macs", 0.6), round_to=2),
        Budget(Target("macs", 0.7), floors={"conv1": 7}),
        Budget(None, widths={"stem": 3, "conv1": 2}),
    ):
        result = CPLI(scope="all").plan(weights, groups, budget, context)
        assert widths(result.keep) == budget.common_widths(groups)
    inner = CPLI().plan(weights, groups, Budget(Target("macs", 0.6)), context)
    assert inner.keep["stem"].all()
    assert inner.report["not_scored"] == ["stem"]
    competing = CPLI(scope="all").plan(weights, groups, Budget(Target("macs", 0.6), ranking="global"), context)
    assert competing.report["share"]["macs"] <= 0.6


def test_grouped_convolutions_choose_but_keep_their_weights() -> None:
    net, groups = randomise(Mobile()).double(), mobile_groups()
    result = planned(net, groups, CPLI(), {"expand": 2, "grouped": 1}, batches((16, 1, 6, 6), 3))
    assert widths(result.keep) == {"expand": 2, "grouped": 1}
    assert result.report["not_fitted"] == ["the weights stay: 'grouped' is a grouped convolution"]
    assert result.weights.keys() == {"fc.weight", "fc.bias"}


def test_layers_that_are_followed_by_operations_in_place_are_recorded_before_them() -> None:
    class InPlace(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(self.stem(x)))
            y = self.conv2(F.relu(self.bn1(self.conv1(x))))
            x = F.relu(self.bn2(F.relu(y, inplace=True)) + x)
            return self.fc(x.mean((2, 3)))

    net = randomise(InPlace()).double()
    _, teacher, student = looked_at(CPLI(), net, residual_groups(), "conv1", batches((4, 3, 8, 8), 5))
    assert (teacher["conv2.weight"].outputs < 0).any()
    blocked = teacher["conv2.weight"].outputs < 0
    assert not teacher["conv2.weight"].derivatives[blocked].any()
    np.testing.assert_allclose(teacher["conv2.weight"].outputs, student["conv2.weight"].wanted)


def test_the_network_is_left_as_it_was_and_no_more_images_are_taken_than_asked_for() -> None:
    net, groups = randomise(Residual()).double().train(), residual_groups()
    before, data = weights_of(net), batches((4, 3, 8, 8), 5)
    some = CPLI(images=8).scores(before, groups, Context(net, data))
    again = CPLI().scores(before, groups, Context(net, data[:2]))
    assert all(np.array_equal(some[name], again[name]) for name in some)
    CPLI().plan(before, groups, Budget(Target("macs", 0.6)), Context(net, data))
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert all(np.array_equal(before[name], values) for name, values in weights_of(net).items())


def test_without_images_or_with_a_loss_that_is_not_a_number_it_says_so() -> None:
    net, groups = randomise(Residual()).double(), residual_groups()
    with pytest.raises(InputError, match=r"'cpli' needs images.*--data"):
        CPLI().scores(weights_of(net), groups)
    with torch.no_grad():
        net.fc.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan; check the weights"):
        CPLI().scores(weights_of(net), groups, Context(net, batches((4, 3, 8, 8), 5)))
