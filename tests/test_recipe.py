"""Recipes: what is read is what is written, paths are the recipe's own, and mistakes are named."""

from pathlib import Path

import pytest
from command_line import DIGITS
from hypothesis import given
from hypothesis import strategies as st

from prune2deploy.errors import InputError
from prune2deploy.recipe import Bench, FineTuning, Recipe, load_recipe, make_recipe, resolved, save_recipe

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
RECIPES = st.builds(
    Recipe,
    network=TEXTS,
    weights=st.none() | TEXTS,
    data=TEXTS,
    method_options=st.dictionaries(TEXTS, st.booleans() | st.integers(-9, 9) | NUMBERS | TEXTS, max_size=3),
    round_to=st.integers(1, 64) | st.sampled_from(["fp32", "tf32", "fp16", "bf16", "int8"]),
    floors=st.dictionaries(TEXTS, st.integers(1, 99) | st.floats(0.01, 1), max_size=3),
    keep=st.lists(TEXTS, max_size=3).map(tuple),
    recalibrate=st.booleans(),
    input_shape=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 64), st.integers(1, 64)),
    mean=st.none() | st.lists(NUMBERS, min_size=1, max_size=3).map(tuple),
    holdout=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**40),
    threads=st.none() | st.integers(1, 8),
    finetune=st.builds(FineTuning, epochs=st.integers(0, 9), learning_rate=st.floats(1e-6, 1)),
    bench=st.builds(Bench, sessions=st.integers(5, 9), iterations=st.none() | st.integers(1, 99)),
)


@given(recipe=RECIPES)
def test_what_is_written_is_read_again(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    settled = resolved(recipe, path.parent)
    save_recipe(settled, path)
    assert load_recipe(path) == settled
    assert resolved(settled, Path("/elsewhere")) == settled


def test_the_recipe_of_the_digits_is_a_recipe() -> None:
    recipe = load_recipe(DIGITS / "recipe.toml")
    assert recipe.network == "resnet_digits"
    assert recipe.weights == str(DIGITS / "weights.safetensors")
    assert recipe.finetune.epochs == 20


PATHS = {
    'weights = "w.safetensors"': ("weights", "{}/w.safetensors"),
    'weights = "../w.safetensors"': ("weights", "{parent}/w.safetensors"),
    'weights = "/abs/w.safetensors"': ("weights", "/abs/w.safetensors"),
    'data = "cifar10:images"': ("data", "cifar10:{}/images"),
    'data = "imagefolder:/abs"': ("data", "imagefolder:/abs"),
    'data = "digits"': ("data", "digits"),
    'data = "my.py:data"': ("data", "{}/my.py:data"),
}


@pytest.mark.parametrize(("line", "found"), PATHS.items())
def test_paths_are_taken_from_the_recipes_own_folder(
    line: str, found: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "recipe.toml").write_text(f'network = "net.py:small"\n{line}\n')
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    recipe = load_recipe(Path("../recipes/recipe.toml"))
    assert recipe.network == f"{folder}/net.py:small"
    assert getattr(recipe, found[0]) == found[1].format(folder, parent=tmp_path)


@pytest.mark.parametrize("name", ["resnet56", "torchvision:resnet18", "timm:resnet18"])
def test_names_of_networks_are_no_paths(name: str) -> None:
    assert resolved(Recipe(network=name), Path("/elsewhere")).network == name


MISTAKES = {
    "{'network': 'a', 'netwrok': 'b'}": "unknown key 'netwrok'",
    "{'network': 'a', 'finetune': {'lr': 1}}": "unknown key 'finetune.lr'",
    "{'network': 5}": "'network' is 5",
    "{'network': 'a', 'round_to': 0}": "'round_to' is 0",
    "{'network': 'a', 'round_to': 'fp12'}": "'round_to' is 'fp12', which does not fit: --round-to 'fp12' is neither",
    "{'network': 'a', 'floors': {'conv1': 0}}": "'floors.conv1' is 0, which does not fit: a floor is a number",
    "{'network': 'a', 'floors': {'conv1': 1.5}}": "'floors.conv1' is 1.5",
    "{'network': 'a', 'floors': {'conv1': '8'}}": "'floors.conv1' is '8'",
    "{'network': 'a', 'floors': {'conv1': True}}": "'floors.conv1' is True",
    "{'network': 'a', 'holdout': 1.0}": "'holdout' is 1.0",
    "{'network': 'a', 'threads': 0}": "'threads' is 0",
    "{'network': 'a', 'finetune': {'epochs': -1}}": "'finetune.epochs' is -1",
    "{'network': 'a', 'finetune': {'learning_rate': 0}}": "'finetune.learning_rate' is 0",
    "{'network': 'a', 'bench': {'sessions': 4}}": "'bench.sessions' is 4",
    "{'network': 'a', 'finetune': 3}": "'finetune' is 3",
    "{}": "the recipe lacks the key 'network'",
}


@pytest.mark.parametrize(("values", "says"), MISTAKES.items())
def test_a_mistake_is_named_on_one_line(values: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        make_recipe(eval(values))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_is_answered_with_the_keys_there_are() -> None:
    with pytest.raises(InputError) as caught:
        make_recipe({"network": "a", "epochs": 3})
    for key in ("finetune", "round_to", "target"):
        assert key in str(caught.value)


@pytest.mark.parametrize("value", ["true", "'8'", "8.5"])
def test_values_are_not_converted_silently(value: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'network = "resnet8"\nround_to = {value}\n')
    with pytest.raises(InputError, match="round_to"):
        load_recipe(tmp_path / "recipe.toml")


def test_a_recipe_cannot_be_changed_after_it_was_made() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        Recipe(network="a").seed = 5  # type: ignore[misc]
