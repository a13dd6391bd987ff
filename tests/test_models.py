"""The recipes in models/: each is one, names a method with these options, and its target can be met on its network."""

from pathlib import Path

import pytest
from command_line import ROOT

from prune2deploy.compare import load_compare_recipe, plan
from prune2deploy.exporter import export_network
from prune2deploy.graph.groups import find_groups
from prune2deploy.groups import Groups
from prune2deploy.methods import load_method
from prune2deploy.networks import load_network
from prune2deploy.pipeline import budget_of
from prune2deploy.recipe import load_recipe

RECIPES = sorted((ROOT / "models").glob("*/*.toml"))
COMPARISONS = [path for path in RECIPES if path.name.startswith("compare")]


def groups_of(name: str) -> Groups:
    network = load_network(name, num_classes=10, in_channels=3, input_shape=(3, 32, 32))
    return find_groups(export_network(network.module, network.example_inputs, fuse=False).model)


@pytest.fixture(scope="module")
def resnet56() -> Groups:
    return groups_of("resnet56")


@pytest.mark.parametrize("path", [one for one in RECIPES if one not in COMPARISONS], ids=lambda one: one.stem)
def test_a_recipe_is_one_and_its_method_takes_its_options(path: Path) -> None:
    recipe = load_recipe(path)
    load_method(recipe.method, **recipe.method_options)


SHARES = {"csgd": 0.3915, "epruner": 0.3867, "paam": 0.477, "sp": 0.489}
"""What the papers' networks keep: of the MACs, and of PAAM's of the parameters."""


@pytest.mark.parametrize("method", SHARES)
def test_the_budget_of_a_papers_row_is_met_on_its_network(method: str, resnet56: Groups) -> None:
    recipe = load_recipe(ROOT / "models" / "papers" / f"{method}_resnet56.toml")
    budget = budget_of(recipe, resnet56)
    assert budget.target is not None
    assert budget.target.share == pytest.approx(SHARES[method], abs=1e-3)
    widths, full = budget.common_widths(resnet56), resnet56.full_widths()
    cost = resnet56.cost.of(budget.target.kind, widths) / resnet56.cost.of(budget.target.kind, full)
    assert budget.target.share - 0.01 < cost <= budget.target.share


def test_csgd_at_the_papers_share_keeps_five_eighths_of_every_width(resnet56: Groups) -> None:
    recipe = load_recipe(ROOT / "models" / "papers" / "csgd_resnet56.toml")
    widths = budget_of(recipe, resnet56).common_widths(resnet56)
    assert all(8 * widths[group.id] == 5 * group.size for group in resnet56.prunable)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda one: one.parent.name)
def test_a_comparison_is_one(path: Path) -> None:
    recipe = load_compare_recipe(path)
    assert len(plan(recipe, {})) == len(recipe.methods) * len(recipe.targets) * len(recipe.seeds)
