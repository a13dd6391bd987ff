"""Comparing methods: which trials there are, that they share their controls, resume and run beside each other."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import done, p2d, refused, small_network

from prune2deploy import compare as comparing
from prune2deploy import comparison, pipeline, workers
from prune2deploy.compare import CompareRecipe, Planned, compare, load_compare_recipe, plan
from prune2deploy.errors import DeviceError
from prune2deploy.identity import portable
from prune2deploy.methods.l1 import L1
from prune2deploy.methods.random import Random
from prune2deploy.pipeline import method_of
from prune2deploy.recipe import Recipe
from prune2deploy.train.loop import _Training


def write_recipe(folder: Path, methods: str = '["l1", "bn", "taylor"]', *lines: str) -> Path:
    small_network(folder)
    head = f'methods = {methods}\nseeds = [0, 1]\ntargets = ["macs=0.6"]\n' + "".join(f"{line}\n" for line in lines)
    shared = '[recipe]\nnetwork = "net.py:small"\nthreads = 1\n[recipe.finetune]\nepochs = 1\nlearning_rate = 0.3\n'
    (folder / "compare.toml").write_text(head + shared + "[recipe.bench]\niterations = 20\n")
    return folder / "compare.toml"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of three methods and two seeds on the digits; no test may change it."""
    recipe = write_recipe(tmp_path_factory.mktemp("compare"))
    done("compare", recipe, "-o", recipe.parent / "out")
    return recipe.parent / "out"


def documents(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "trials").glob("*.json")}


def finished(name: str, planned: Planned, key: str, **changes: Any) -> dict[str, Any]:
    recipe = planned.recipe
    return {
        "name": name,
        "recipe": portable(recipe),
        "method": recipe.method,
        "options": {},
        "target": planned.target,
        "seed": recipe.seed,
        "control": planned.control,
        "controls": True,
        "from_scratch": recipe.from_scratch,
        "widths": {"g": 4},
        "widths_key": key,
        "graph": key,
        "training_epochs": 0,
        "finetune_epochs": recipe.finetune.epochs,
        "accuracy": {"dense": 0.9, "pruned": 0.5, "finetuned": 0.8},
    } | changes


def test_trials_are_all_methods_targets_and_seeds_and_a_seed_reaches_methods_that_have_one() -> None:
    recipe = CompareRecipe(methods=("l1", "random"), targets=("macs=0.5", "params=0.5"), seeds=(0, 7), recipe=SHARED)
    known = plan(recipe, {})
    assert len(known) == 8
    assert {one.name for one in known} >= {"l1-macs=0.5-s0", "random-params=0.5-s7"}
    assert not any(one.control for one in known)
    by_name = {one.name: one.recipe for one in known}
    assert method_of(by_name["random-macs=0.5-s7"]) == Random(seed=7)
    assert method_of(by_name["l1-macs=0.5-s7"]) == L1()
    assert by_name["l1-macs=0.5-s7"].seed == 7


SHARED = Recipe(network="resnet20", finetune={"epochs": 2})


def test_trials_of_equal_widths_share_their_controls_and_a_uniform_l1_is_its_own() -> None:
    recipe = CompareRecipe(methods=("l1", "bn", "epruner"), seeds=(0,), recipe=SHARED)
    mains = {one.name: one for one in plan(recipe, {})}
    keys = {"l1-macs=0.5-s0": "same", "bn-macs=0.5-s0": "same", "epruner-macs=0.5-s0": "other"}
    done_so_far = {name: finished(name, mains[name], key) for name, key in keys.items()}
    controls = {one.name: one for one in plan(recipe, done_so_far) if one.control}
    assert controls.keys() == {
        *("random-at-same-s0", "scratch-at-same-e2-s0"),
        *("random-at-other-s0", "l1-at-other-s0", "scratch-at-other-e2-s0"),
    }
    assert all(one.recipe.widths == {"g": 4} for one in controls.values())
    assert controls["scratch-at-other-e2-s0"].recipe.from_scratch
    assert not controls["l1-at-other-s0"].recipe.from_scratch


def test_a_control_waits_for_the_method_of_its_name_which_may_be_it() -> None:
    recipe = CompareRecipe(methods=("bn", "l1"), seeds=(0,), recipe=SHARED)
    bn = next(one for one in plan(recipe, {}) if one.recipe.method == "bn")
    trials = {bn.name: finished(bn.name, bn, "same")}
    others = ["random-at-same-s0", "scratch-at-same-e2-s0"]
    assert [one.name for one in plan(recipe, trials) if one.control] == others
    failed = [one.name for one in plan(recipe, trials, ["l1-macs=0.5-s0"]) if one.control]
    assert failed == ["random-at-same-s0", "l1-at-same-s0", "scratch-at-same-e2-s0"]
    control = next(one for one in plan(recipe, trials, ["l1-macs=0.5-s0"]) if one.name == "l1-at-same-s0")
    ended = trials | {control.name: finished(control.name, control, "same")}
    assert control.name in {one.name for one in plan(recipe, ended)}, "one that has finished stays in the table"


def test_the_network_from_scratch_trains_as_long_as_method_and_fine_tuning_together() -> None:
    recipe = CompareRecipe(methods=("csgd", "bn"), recipe=SHARED)
    csgd, bn = plan(recipe, {})
    trained = {csgd.name: finished(csgd.name, csgd, "k", training_epochs=5), bn.name: finished(bn.name, bn, "k")}
    controls = {one.name: one for one in plan(recipe, trained) if one.control}
    epochs = {name: one.recipe.finetune.epochs for name, one in controls.items()}
    shared = {"random-at-k-s0": 2, "l1-at-k-s0": 2}
    assert epochs == {**shared, "scratch-at-k-e7-s0": 7, "scratch-at-k-e2-s0": 2}, "equal widths, unequal training"
    for name, one in controls.items():
        trained[name] = finished(name, one, "k", accuracy={"dense": 0.9, "finetuned": epochs[name] / 10})
    found = {name: comparison.control_accuracy(trained[name], "scratch", trained.values()) for name in trained}
    assert (found[csgd.name], found[bn.name]) == (0.7, 0.2)
    assert comparison.control_accuracy(trained[csgd.name], "random", trained.values()) == 0.2


def test_trials_of_two_targets_that_come_to_equal_widths_share_their_controls_too() -> None:
    recipe = CompareRecipe(methods=("bn",), targets=("macs=0.5", "params=0.4"), recipe=SHARED)
    known = plan(recipe, {})
    trained = {one.name: finished(one.name, one, "k") for one in known}
    for order in (known, known[::-1]):
        first = {order[0].name: trained[order[0].name]}
        early, late = ([one for one in plan(recipe, some) if one.control] for some in (first, trained))
        assert [(one.name, one.recipe) for one in early] == [(one.name, one.recipe) for one in late]


def test_a_dynamic_network_has_no_controls_of_its_widths() -> None:
    recipe = CompareRecipe(methods=("bn",), recipe=SHARED)
    (main,) = plan(recipe, {})
    assert len(plan(recipe, {main.name: finished(main.name, main, "k", controls=False)})) == 1


def test_a_time_that_is_no_success_says_so() -> None:
    recipe = CompareRecipe(methods=("bn",), recipe=SHARED)
    (main,) = plan(recipe, {})
    trial = finished(main.name, main, "k", dynamic_macs=None, seconds={}, macs={"dense": 2, "pruned": 1})
    trial |= {"parameters": trial["macs"]}
    measured = {"ratio": 1.2, "low": 1.1, "high": 1.3}
    for verdict, shown in (("slower", "1.200 [1.100, 1.300] (slower)"), ("faster", "1.200 [1.100, 1.300]")):
        (row,) = comparison.rows([trial], {"k": measured | {"verdict": verdict}})
        assert comparison.cells(row)[-1] == shown
        assert comparison.cells(row)[1] == "50.0 %"
    (dynamic,) = comparison.rows([trial | {"dynamic_macs": 0.485}], {})
    assert comparison.cells(dynamic)[1] == "⌀ 48.5 %"
    assert "⌀ is a mean over images" in comparison.markdown([dynamic], [], {"epochs": 2, "learning_rate": 0.05})


@pytest.mark.parametrize("field", ["methods", "targets", "seeds", "controls"])
def test_what_is_there_twice_is_refused_since_it_would_count_as_two(field: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    value = {"methods": '["l1", "l1"]', "targets": '["macs=0.6", "macs=0.6"]', "seeds": "[0, 0]"}
    line = f"{field} = " + value.get(field, '["random", "random"]')
    kept = [one for one in path.read_text().splitlines() if not one.startswith(field)]
    path.write_text("\n".join([line, *kept]))
    refused(p2d("compare", path, "-o", tmp_path / "out"), 2, str(path), field, "is there twice")


def test_the_front_holds_what_none_beats_in_cost_and_accuracy() -> None:
    points = [(1.0, 0.92), (0.5, 0.90), (0.6, 0.89), (0.5, 0.88), (0.4, 0.80), (0.7, 0.90)]
    assert comparison.pareto(points) == [4, 1, 0]
    assert comparison.pareto([]) == []


def test_a_row_has_means_and_deviation_over_seeds_and_says_whether_random_is_beaten() -> None:
    recipe = CompareRecipe(methods=("bn",), seeds=(0, 1), recipe=SHARED)
    trials = []
    for one, own, control in zip(plan(recipe, {}), (0.82, 0.86), (0.85, 0.85), strict=True):
        common = {"macs": {"dense": 10, "pruned": 5}, "parameters": {"dense": 10, "pruned": 4}, "dynamic_macs": None}
        common |= {"seconds": {"selection": 2.0}, "finetune_epochs": 2}
        trials.append(finished(one.name, one, "k", accuracy={"dense": 0.9, "pruned": 0.5, "finetuned": own}) | common)
        other = {"method": "random", "control": True, "accuracy": {"finetuned": control}}
        trials.append(finished("r", one, "k") | common | other)
    (row,) = comparison.rows(trials, {})
    assert row["finetuned"] == pytest.approx(0.84)
    assert row["spread"] == pytest.approx(0.04 / math.sqrt(2))
    assert row["random_control"] == pytest.approx(0.85)
    assert row["beats_random"] is False
    assert row["scratch_control"] is None
    assert comparison.cells(row)[5] == "85.00 % (not beaten)"
    (few,) = comparison.rows([one for one in trials if not (one["control"] and one["seed"] == 1)], {})
    assert comparison.cells(few)[5] == "85.00 % (1 of 2 seeds) (not beaten)", "the seed that beats it has no control"
    (itself,) = comparison.rows([{**one, "method": "random"} for one in trials if not one["control"]], {})
    assert itself["beats_random"] is None
    text = comparison.markdown([row], [], {"epochs": 2, "learning_rate": 0.05})
    assert "after 2 epochs of fine-tuning (learning rate 0.05)" in text
    assert "84.00 % ± 2.83 | 85.00 % (not beaten)" in text


def test_a_published_result_stands_beside_ours_with_the_gap_between_the_changes() -> None:
    row = {"method": "bn", "target": "macs=0.5", "finetuned": 0.91, "dense": 0.92}
    paper = {"method": "bn", "text": "Oh et al.", "top1": 0.935, "dense": 0.93}
    (found,) = comparison.published_rows([row], [paper])
    assert found["change"] == pytest.approx(0.005)
    assert found["gap"] == pytest.approx(-0.015)
    (only_change,) = comparison.published_rows([row], [{"method": "bn", "text": "PAAM", "change": 0.0102}])
    assert only_change["gap"] == pytest.approx(-0.0202)
    (elsewhere,) = comparison.published_rows([row], [paper | {"target": "macs=0.4"}])
    assert elsewhere["ours"] is None
    (missing,) = comparison.published_rows([], [paper])
    assert missing["ours"] is None
    assert "+0.50" in comparison.published_cells(found)


# --- on real networks -------------------------------------------------------------------------------------------------


def test_every_trial_and_control_was_run_and_stands_in_the_table(compared: Path) -> None:
    found = documents(compared)
    mains = {f"{method}-macs=0.6-s{seed}" for method in ("l1", "bn", "taylor") for seed in (0, 1)}
    assert mains <= found.keys()
    table = json.loads((compared / "compare.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["l1", "bn", "taylor"]
    assert table["failed"] == {}
    for row in table["rows"]:
        assert row["seeds"] == [0, 1]
        assert row["macs"] <= 0.6
        controls = [row[f"{control}_control"] for control in comparison.CONTROLS]
        assert all(0 <= accuracy <= 1 for accuracy in controls)
        assert row["latency"]["low"] <= row["latency"]["ratio"] <= row["latency"]["high"]
    l1 = table["rows"][0]
    assert l1["l1_control"] == l1["finetuned"]


def test_controls_have_exactly_the_widths_of_what_they_are_held_against(compared: Path) -> None:
    found = documents(compared)
    for control in (one for one in found.values() if one["control"]):
        held = [one for one in found.values() if not one["control"] and one["widths_key"] == control["widths_key"]]
        assert held
        assert control["widths"] == held[0]["widths"]
        assert control["macs"] == held[0]["macs"]


def test_results_name_no_place_of_this_machine(compared: Path) -> None:
    for path in (*(compared / "trials").glob("*.json"), *compared.glob("compare.*"), compared / "latency.json"):
        assert str(compared.parent) not in path.read_text(), path.name


def test_the_page_has_the_picture_and_the_table(compared: Path) -> None:
    page = (compared / "compare.html").read_text()
    assert 'id="front"' in page
    assert "taylor, macs=0.6" in page
    assert "Random, L1 and from scratch are the controls" in page
    assert "| taylor, macs=0.6 |" in (compared / "compare.md").read_text()


def test_a_second_call_runs_nothing_and_an_interrupted_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_compare_recipe(write_recipe(tmp_path, '["l1", "l2"]', 'controls = ["random"]'))
    ran: list[str] = []
    run_trial = comparing.run_trial

    def counted(planned: Planned, folder: str, *, graph: bool) -> dict[str, Any]:
        ran.append(planned.name)
        return run_trial(planned, folder, graph=graph)

    monkeypatch.setattr(comparing, "run_trial", counted)

    def kill(finished: int, _: int) -> None:
        if finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(recipe, tmp_path / "out", bench=False, on_trial=kill)
    assert len(ran) == 2
    compare(recipe, tmp_path / "out", bench=False)
    assert len(ran) == len(set(ran)) == 4 + 2
    compare(recipe, tmp_path / "out", bench=False)
    assert len(ran) == 6


def test_trials_of_other_files_are_not_mixed_with_these(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, '["l1"]', "controls = []")
    done("compare", path, "--no-bench", "-o", tmp_path / "out")
    before = documents(tmp_path / "out")
    with (tmp_path / "net.py").open("a") as network:
        network.write("\n# it may compute something else now\n")
    says = (str(tmp_path / "out"), "was made from other files", "remove", "another -o")
    refused(p2d("compare", path, "--no-bench", "-o", tmp_path / "out"), 2, *says)
    assert documents(tmp_path / "out") == before


def test_how_time_is_measured_may_change_and_only_that_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, '["l1"]', "controls = []")
    path.write_text(path.read_text().replace("[0, 1]", "[0]"))
    wrong = path.read_text().replace("[recipe.bench]", '[recipe.bench]\nbackend = "nonsense"')
    (tmp_path / "wrong.toml").write_text(wrong)
    refused(p2d("compare", tmp_path / "wrong.toml", "-o", tmp_path / "out"), 2, "nonsense")
    assert not (tmp_path / "out").exists(), "said before the work, not after it"
    done("compare", path, "-o", tmp_path / "out")
    first = json.loads((tmp_path / "out" / "latency.json").read_text())
    shutil.copy(tmp_path / "out" / "graphs" / "dense.onnx", tmp_path / "out" / "graphs" / "of-no-trial.onnx")
    monkeypatch.setattr(comparing, "run_trial", lambda *_, **__: pytest.fail("a trial was run again"))
    monkeypatch.setattr(pipeline, "bench", lambda *_, **__: pytest.fail("a graph was timed again"))
    done("compare", path, "-o", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(comparing, "run_trial", lambda *_, **__: pytest.fail("a trial was run again"))
    path.write_text(path.read_text().replace("iterations = 20", "iterations = 21"))
    done("compare", path, "-o", tmp_path / "out")
    again = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert again.keys() == first.keys()
    assert len(first) == 1
    assert {one["settings"]["iterations"] for one in again.values()} == {21}
    graph = tmp_path / "out" / "graphs" / f"{next(iter(first))}.onnx"
    graph.write_bytes((tmp_path / "out" / "graphs" / "dense.onnx").read_bytes())
    done("compare", path, "--no-bench", "-o", tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert row["latency"] is None, "the time is that of a graph that has been replaced"


def test_a_mistake_in_one_trial_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_compare_recipe(write_recipe(tmp_path, '["l1", "bn"]', "controls = []"))
    run_trial = comparing.run_trial

    def broken(planned: Planned, folder: str, *, graph: bool) -> dict[str, Any]:
        if planned.name == "l1-macs=0.6-s0":
            raise ZeroDivisionError("nobody foresaw this")
        return run_trial(planned, folder, graph=graph)

    monkeypatch.setattr(comparing, "run_trial", broken)
    with pytest.raises(RuntimeError, match=r"(?s)1 of 4 trials failed.*by a bug.*ZeroDivisionError: nobody foresaw"):
        compare(recipe, tmp_path / "out", bench=False)
    assert documents(tmp_path / "out").keys() == {"l1-macs=0.6-s1", "bn-macs=0.6-s0", "bn-macs=0.6-s1"}
    table = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert table["failed"] == {"l1-macs=0.6-s0": "ZeroDivisionError: nobody foresaw this"}


def test_a_trial_that_was_interrupted_goes_on_after_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, '["l1"]', "controls = []")
    path.write_text(path.read_text().replace("[0, 1]", "[0]").replace("epochs = 1", "epochs = 2"))
    recipe = load_compare_recipe(path)
    began: list[int] = []
    epoch = _Training._epoch

    def stopped_in_the_second(self: _Training, number: int) -> Any:
        began.append(number)
        if began == [1, 2]:
            raise KeyboardInterrupt
        return epoch(self, number)

    monkeypatch.setattr(_Training, "_epoch", stopped_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, tmp_path / "out", bench=False)
    compare(recipe, tmp_path / "out", bench=False)
    assert began == [1, 2, 2]
    compare(recipe, tmp_path / "whole", bench=False)
    went_on, whole = (documents(tmp_path / name)["l1-macs=0.6-s0"] for name in ("out", "whole"))
    assert went_on["accuracy"] == whole["accuracy"]
    assert len(went_on["history"]) == 2


@pytest.mark.slow
def test_a_run_of_another_recipe_that_was_left_unfinished_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, '["l1"]', "controls = []")
    recipe = load_compare_recipe(path)
    epoch = _Training._epoch
    monkeypatch.setattr(_Training, "_epoch", lambda self, number: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, tmp_path / "out", bench=False)
    monkeypatch.setattr(_Training, "_epoch", epoch)
    path.write_text(path.read_text().replace("learning_rate = 0.3", "learning_rate = 0.1"))
    done("compare", path, "--no-bench", "-o", tmp_path / "out")
    assert {trial["recipe"]["finetune"]["learning_rate"] for trial in documents(tmp_path / "out").values()} == {0.1}


@pytest.mark.slow
def test_trials_beside_each_other_give_the_same_results(compared: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["bn"]', 'controls = ["random"]')
    done("compare", recipe, "--jobs", 2, "--no-bench", "-o", tmp_path / "out")
    alone, beside = documents(compared), documents(tmp_path / "out")
    for name in beside:
        assert beside[name]["accuracy"] == alone[name]["accuracy"], name
        assert beside[name]["widths"] == alone[name]["widths"]


@pytest.mark.slow
def test_trials_on_a_ray_cluster_give_the_same_results(compared: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    recipe = write_recipe(tmp_path, '["bn"]', "controls = []")
    done("compare", recipe, "--ray", "local", "--no-bench", "-o", tmp_path / "out")
    alone, beside = documents(compared), documents(tmp_path / "out")
    assert beside.keys() == {"bn-macs=0.6-s0", "bn-macs=0.6-s1"}
    for name in beside:
        assert beside[name]["accuracy"] == alone[name]["accuracy"], name


def test_without_ray_its_option_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeviceError, match=r"ray is not installed.*prune2deploy\[sweep\]"):
        workers.require_ray()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("methods = []\n[recipe]\nnetwork = 'resnet20'\n", ("methods",)),
        ("methods = ['l7']\n[recipe]\nnetwork = 'resnet20'\n", ("no method 'l7'", "l1")),
        ("methods = ['l1']\nwidth = 3\n[recipe]\nnetwork = 'resnet20'\n", ("unknown key 'width'", "controls")),
        ("methods = ['l1']\n", ("recipe",)),
        ("methods = ['l1']\ntargets = ['macs=2']\n[recipe]\nnetwork = 'resnet20'\n", ("macs=2", "out of range")),
        ("methods = ['l1']\n[options.bn]\nscore = 'std'\n[recipe]\nnetwork = 'resnet20'\n", ("options of 'bn'",)),
        ("methods = ['bn']\n[options.bn]\nscore = 'x'\n[recipe]\nnetwork = 'resnet20'\n", ("'score' cannot be 'x'",)),
        ("methods = ['l1']\n[recipe]\nnetwork = 'm.onnx'\n", ("ONNX file", "cannot be fine-tuned")),
        ("methods = [", ("is not TOML",)),
        (
            "methods = ['l1']\n[[published]]\nmethod='l1'\ntext='x'\n[recipe]\nnetwork='r'\n",
            ("'top1' or 'change'",),
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_written(
    text: str, says: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "compare.toml").write_text(text)
    refused(p2d("compare", tmp_path / "compare.toml", "-o", tmp_path / "out"), 2, *says)
    assert not (tmp_path / "out").exists()


def test_trials_of_another_recipe_are_not_mixed_into_the_table(compared: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["l1"]', "controls = []")
    done("compare", recipe, "--no-bench", "-o", tmp_path / "out")
    recipe.write_text(recipe.read_text().replace("learning_rate = 0.3", "learning_rate = 0.1"))
    refused(p2d("compare", recipe, "--no-bench", "-o", tmp_path / "out"), 2, "l1-macs=0.6-s0", "another recipe")


def test_data_that_are_not_there_are_said_before_anything_is_written(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["l1"]')
    recipe.write_text(recipe.read_text().replace("[recipe]\n", '[recipe]\ndata = "cifar10:nowhere"\n'))
    outcome = p2d("compare", recipe, "-o", tmp_path / "out")
    refused(outcome, 2, "nowhere", "is not a folder")
    assert "trials failed" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_trial_that_fails_is_named_and_the_others_are_finished(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["l1"]', "controls = []")
    recipe.write_text(recipe.read_text().replace('["macs=0.6"]', '["macs=0.0001", "macs=0.6"]'))
    refused(p2d("compare", recipe, "--no-bench", "-o", tmp_path / "out"), 2, "2 of 4 trials failed", "cannot be met")
    assert documents(tmp_path / "out").keys() == {"l1-macs=0.6-s0", "l1-macs=0.6-s1"}
    assert "cannot be met" in (tmp_path / "out" / "compare.html").read_text()
