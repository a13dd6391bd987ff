"""Sensitivity: what is measured is what pruning one group does, it survives a kill, and its floors reach pruning."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from command_line import DIGITS, done, p2d, refused

from prune2deploy import figures, pipeline, sensitivity
from prune2deploy.data import Data, load_data
from prune2deploy.errors import InputError
from prune2deploy.exporter import export_network
from prune2deploy.masks import load_masks, widths
from prune2deploy.networks import load_network, load_weights
from prune2deploy.recipe import Recipe, load_recipe
from prune2deploy.sensitivity import NAME, Survey, load_floors, measure_sensitivity
from prune2deploy.sensitivity_page import write_sensitivity

WEIGHTS = DIGITS / "weights.safetensors"
RECIPE = Recipe(network="resnet_digits", weights=str(WEIGHTS))
CALL = ("sensitivity", "resnet_digits", "--weights", WEIGHTS)
QUICK = ("--shares", "0.25,0.75", "--images", "60")
SURVEY = Survey(shares=(0.25, 0.75), images=60)
SIZES = {"conv1": 16, "layer1.0.conv1": 16, "layer1.1.conv1": 16, "layer2.0.conv1": 32, "layer2.0.conv2": 32} | {
    "layer2.1.conv1": 32,
    "layer3.0.conv1": 64,
    "layer3.0.conv2": 64,
    "layer3.1.conv1": 64,
}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Measure norms on few images, and export the one network of these tests once."""
    exported: list[Any] = []

    def export_once(*arguments: Any, **options: Any) -> Any:
        if not exported:
            exported.append(export_network(*arguments, **options))
        return exported[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "RECALIBRATION", 128)
        patch.setattr("prune2deploy.exporter.export_network", export_once)
        yield


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished survey of the digits network, made by the command; no test may change it."""
    folder = tmp_path_factory.mktemp("survey")
    printed = json.loads(done(*CALL, *QUICK, "-o", folder, "--json"))
    assert printed["schema_version"] == 1
    assert printed["sensitivity"] == json.loads((folder / NAME).read_text())
    return folder


@pytest.fixture(scope="module")
def found(survey: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((survey / NAME).read_text())
    return document


# --- what is measured -------------------------------------------------------------------------------------------------


def test_every_group_is_measured_at_every_share(found: dict[str, Any]) -> None:
    assert {one["id"]: one["size"] for one in found["groups"]} == SIZES
    assert found["kept_groups"] == {}
    for one in found["groups"]:
        assert [point["share"] for point in one["points"]] == [0.25, 0.75]
        assert [point["width"] for point in one["points"]] == [one["size"] * 3 // 4, one["size"] // 4]
        assert all(point["images"] == 60 for point in one["points"])
    assert found["dense"]["top1"] > 0.95
    assert found["complete"]
    assert (found["network"], found["data"], found["method"]) == ("resnet_digits", "digits", "l1")


def test_removing_more_of_a_narrow_trunk_costs_more(found: dict[str, Any]) -> None:
    trunk = next(one for one in found["groups"] if one["id"] == "conv1")
    assert trunk["points"][1]["top1"] < trunk["points"][0]["top1"] - 0.2
    losses = {one["id"]: one["points"][1]["loss"] for one in found["groups"]}
    assert losses["conv1"] > 3 * losses["layer3.1.conv1"]


def test_the_accuracy_is_that_of_the_network_with_the_weakest_filters_zeroed_by_hand(tmp_path: Path) -> None:
    survey = Survey(shares=(0.75,), images=60, recalibrate=False)
    recipe = RECIPE.model_copy(update={"keep": ("bn1.*", "layer1.0.*", "layer[23]*")})
    (one,) = measure_sensitivity(recipe, survey, tmp_path)["groups"]
    assert one["id"] == "layer1.1.conv1"
    data, module = load_data("digits", seed=0), load_network("resnet_digits").module
    load_weights(module, WEIGHTS)
    block = module.layer1[1]
    weakest = block.conv1.weight.detach().abs().sum((1, 2, 3)).argsort()[:12]
    with torch.no_grad():
        for tensor in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
            tensor[weakest] = 0
        chosen = torch.arange(60) * len(data.holdout) // 60
        pixels = data.holdout.images(chosen).float() / 255
        shaped = [torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std)]
        right = module.eval()((pixels - shaped[0]) / shaped[1]).argmax(1) == data.holdout.labels[chosen]
    assert one["points"][0]["top1"] == pytest.approx(right.float().mean().item(), abs=1e-6)


def test_norms_are_measured_on_images_that_are_moved_as_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr("prune2deploy.train.recalibrate", lambda *_, **options: given.append(options))
    recipe = RECIPE.model_copy(update={"keep": ("bn1.*", "layer1.0.*", "layer[23]*")})
    measure_sensitivity(recipe, Survey(shares=(0.5,), images=40), tmp_path)
    data = load_data("digits")
    assert [(one["flip"], one["pad"]) for one in given] == [(data.flip, data.pad)] * 2
    assert data.pad > 0


class Forbidden:
    """A split that must not be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test split was asked for '{name}'")

    def __len__(self) -> int:
        raise AssertionError("the test split was counted")


def test_the_test_split_is_never_looked_at(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_test(*arguments: Any, **options: Any) -> Data:
        data = load_data(*arguments, **options)
        object.__setattr__(data, "test", Forbidden())
        return data

    monkeypatch.setattr("prune2deploy.data.load_data", without_test)
    again = measure_sensitivity(RECIPE, SURVEY, tmp_path)
    assert accuracies(again) == accuracies(found), "and the same call gives the same numbers"


def accuracies(document: dict[str, Any]) -> list[Any]:
    return [document["dense"], document["reference"], *((one["id"], one["points"]) for one in document["groups"])]


def test_scores_that_need_images_get_them(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(
        update={"method": "taylor", "method_options": {"images": 64}, "keep": ("layer[23]*", "bn1.*")}
    )
    found = measure_sensitivity(recipe, Survey(shares=(0.5,), images=60), tmp_path)
    assert [one["id"] for one in found["groups"]] == ["layer1.0.conv1", "layer1.1.conv1"]
    assert all(one["points"][0]["top1"] > 0.5 for one in found["groups"])
    assert all("--keep" in found["kept_groups"][name] for name in ("conv1", "layer2.0.conv1", "layer3.1.conv1"))


def test_shares_that_give_one_width_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    measured = sensitivity._Trial.accuracy
    monkeypatch.setattr(sensitivity._Trial, "accuracy", lambda *given: calls.append(given[1]) or measured(*given))
    recipe = RECIPE.model_copy(update={"keep": ("bn1.*", "layer1.0.*", "layer[23]*")})
    found = measure_sensitivity(recipe, Survey(shares=(0.9, 0.5, 0.51), images=40), tmp_path)
    assert [point["share"] for point in found["groups"][0]["points"]] == [0.5, 0.51, 0.9]
    assert [point["width"] for point in found["groups"][0]["points"]] == [8, 8, 2]
    assert calls == [{}, {"layer1.1.conv1": 8}, {"layer1.1.conv1": 2}], "the first is the dense network, norms anew"


# --- floors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top1", "floor"),
    [
        ((0.90, 0.90, 0.90), 4),
        ((0.90, 0.88, 0.70), 8),
        ((0.90, 0.87, 0.90), 12),  # what a width costs that a narrower one does not is chance: the wider one holds
        ((0.80, 0.90, 0.90), 16),
    ],
)
def test_a_floor_is_the_narrowest_width_that_all_wider_ones_vouch_for(top1: tuple[float, ...], floor: int) -> None:
    points = [{"width": width, "top1": value} for width, value in zip((12, 8, 4), top1, strict=True)]
    assert sensitivity._suggested({"size": 16, "points": points}, 0.90 - 0.02) == floor


def test_the_floors_are_those_of_the_numbers(found: dict[str, Any], survey: Path) -> None:
    least = found["reference"]["top1"] - 0.02
    for one in found["groups"]:
        floor = found["floors"][one["id"]]
        kept = {point["width"]: point["top1"] for point in one["points"]} | {one["size"]: 1.0}
        assert kept[floor] >= least - 1e-9
        assert all(value < least for width, value in kept.items() if width == floor // 3), "a quarter did not do"
    assert found["floors"]["conv1"] > 4
    assert load_floors(survey / NAME) == load_floors(survey) == found["floors"]


def test_prune_honours_the_floors_that_are_suggested_and_those_that_are_given(survey: Path, tmp_path: Path) -> None:
    floors = load_floors(survey)
    call = ("prune", "resnet_digits", "--weights", WEIGHTS, "--floors", survey / NAME)
    given = (*call, "--floor", "layer3.1.conv1=40", "--floor", "layer2.1.*=0.9", "--target", "macs=0.7")
    done(*given, "-o", tmp_path / "run")
    kept = widths(load_masks(tmp_path / "run" / "masks.safetensors"))
    wanted = floors | {"layer3.1.conv1": 40, "layer2.1.conv1": 29}
    assert all(kept[group] >= floor for group, floor in wanted.items())
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    assert recipe.floors == floors | {"layer3.1.conv1": 40, "layer2.1.*": 0.9}
    section = json.loads((tmp_path / "run" / "report.json").read_text())["prune"]
    assert section["floors"]["layer2.1.conv1"] == 29
    refused(p2d(*call, "--target", "macs=0.02", "-o", tmp_path / "other"), 2, "with these floors", "lower a floor")


def test_a_file_without_finished_floors_is_refused(survey: Path, tmp_path: Path) -> None:
    document = json.loads((survey / NAME).read_text())
    for change, says in (
        ({"complete": False}, "was not finished; run the same 'p2d sensitivity' again"),
        ({"schema_version": 99}, "holds no floors of schema 1"),
        ({"floors": {"conv1": "8"}}, "holds no floors"),
    ):
        (tmp_path / NAME).write_text(json.dumps(document | change))
        with pytest.raises(InputError, match=re.escape(says)):
            load_floors(tmp_path / NAME)
    call = ("prune", "resnet_digits", "--floors", tmp_path / "none.json", "-o", tmp_path / "run")
    refused(p2d(*call), 2, "none.json", "does not exist")
    (tmp_path / NAME).write_text(json.dumps(document | {"floors": {"features.0.0": 3}}))
    call = ("prune", "resnet_digits", "--floors", tmp_path / NAME, "-o", tmp_path / "run")
    refused(p2d(*call), 2, "the floor 'features.0.0' matches no group")
    assert not (tmp_path / "run" / "recipe.toml").exists()


# --- killed, and called again -----------------------------------------------------------------------------------------


def test_a_survey_that_was_killed_goes_on_where_it_stopped(
    found: dict[str, Any], survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(RECIPE, SURVEY, tmp_path, on_group=killed)
    half = json.loads((tmp_path / NAME).read_text())
    assert not half["complete"]
    assert accuracies(half) == accuracies(found)[:5]
    measured: list[str] = []
    of_group = sensitivity._Trial.of_group
    monkeypatch.setattr(
        sensitivity._Trial, "of_group", lambda trial, group: measured.append(group.id) or of_group(trial, group)
    )
    whole = measure_sensitivity(RECIPE, SURVEY, tmp_path)
    assert measured == list(SIZES)[3:]
    assert accuracies(whole) == accuracies(found)
    assert whole["floors"] == found["floors"]

    measured.clear()
    strict = measure_sensitivity(RECIPE, Survey(shares=(0.25, 0.75), images=60, tolerance=0.0), tmp_path)
    assert measured == [], "another tolerance needs no other measurement"
    assert all(strict["floors"][group] >= floor for group, floor in found["floors"].items())

    only = RECIPE.model_copy(update={"keep": ("bn1.*", "layer[23]*")})
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(InputError, match=r"was measured with another keep \(\[\], not .*another -o"):
        measure_sensitivity(only, SURVEY, tmp_path)
    assert (tmp_path / NAME).read_bytes() == before
    fewer = measure_sensitivity(only, SURVEY, tmp_path / "other")
    assert measured == ["layer1.0.conv1", "layer1.1.conv1"], "other settings are another survey"
    assert set(fewer["floors"]) == set(measured)


def test_two_surveys_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with pipeline.locked(tmp_path), pytest.raises(InputError, match="another p2d is working in"):
        measure_sensitivity(RECIPE, SURVEY, tmp_path)


# --- what the user can get wrong --------------------------------------------------------------------------------------

MISTAKES = {
    "a method that trains": (("--method", "csgd"), ("'csgd' trains the network", "use one that only looks: l1")),
    "a method that is not there": (("--method", "l7"), ("there is no method 'l7'",)),
    "shares out of range": (("--shares", "0.5,1.5"), ("--shares 0.5,1.5", "write 0.25,0.5,0.75")),
    "shares that are no numbers": (("--shares", "half"), ("--shares 'half'",)),
    "a tolerance below 0": (("--tolerance", "-0.1"), ("--tolerance -0.1",)),
    "a tolerance in percent": (("--tolerance", "2"), ("--tolerance 2", "like 0.02")),
    "everything kept": (("--keep", "*"), ("no group of 'resnet_digits' can be pruned",)),
    "weights that are missing": (("--weights", "none.safetensors"), ("none.safetensors", "does not exist")),
}


@pytest.mark.parametrize(("arguments", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_leaves_no_file(
    arguments: tuple[str, ...], says: tuple[str, ...], tmp_path: Path
) -> None:
    refused(p2d("sensitivity", "resnet_digits", *arguments, "-o", tmp_path / "out"), 2, *says)
    assert not (tmp_path / "out" / NAME).exists()


def test_an_onnx_file_is_refused(tmp_path: Path) -> None:
    refused(p2d("sensitivity", tmp_path / "net.onnx", "-o", tmp_path / "out"), 2, "net.onnx", "is an ONNX file")


# --- table and page ---------------------------------------------------------------------------------------------------


def test_the_table_shows_what_the_file_holds(found: dict[str, Any], survey: Path) -> None:
    text = done(*CALL, *QUICK, "-o", survey)  # all of it is there, so nothing is measured
    for one in found["groups"]:
        line = next(line for line in text.splitlines() if f" {one['id']} " in line)
        cells = [cell.strip() for cell in re.split("[│|]", line) if cell.strip()]
        shown = [f"{100 * point['top1']:.2f} %" for point in one["points"]]
        assert cells == [one["id"], str(one["size"]), *shown, str(one["floor"])]
    assert f"--floors {survey / NAME}" in text


def test_the_page_shows_curves_a_map_and_the_numbers(found: dict[str, Any], survey: Path, tmp_path: Path) -> None:
    text = (survey / "sensitivity.html").read_text()
    assert "Sensitivity of resnet_digits" in text
    for one in found["groups"]:
        assert text.count(f">{one['id']}<") >= 1
    drawn = json.loads(text.split('id="figures" type="application/json">')[1].split("</script>")[0])
    assert set(drawn) == {"curves", "map"}
    for figure in drawn.values():
        go.Figure(figure)
    assert [trace["y"][1:] for trace in drawn["curves"]["data"]] == [
        [100 * point["top1"] for point in one["points"]] for one in found["groups"]
    ]
    assert np.array(drawn["map"]["data"][0]["z"]).shape == (len(SIZES), 2)
    write_sensitivity(found, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_names_of_groups_cannot_become_markup(found: dict[str, Any], tmp_path: Path) -> None:
    hostile = "<script>document.title=1</script>"
    groups = [one | {"id": hostile} for one in found["groups"]]
    write_sensitivity(found | {"groups": groups, "network": hostile}, tmp_path / "page.html")
    assert hostile not in (tmp_path / "page.html").read_text()


def test_the_worst_groups_are_named_in_the_picture(found: dict[str, Any]) -> None:
    figure = figures.sensitivity_curves(found["groups"], found["reference"]["top1"], 0.98)
    named = [one["text"] for one in figure["layout"]["annotations"]]
    worst = min(found["groups"], key=lambda one: one["points"][-1]["top1"])
    assert worst["id"] in named
    assert len(named) <= 3
