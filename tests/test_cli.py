"""The command line: help, JSON, what goes to which stream, exit codes, and results that are said loudly."""

import json
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import DIGITS, ENVIRONMENT, ROOT, command, done, p2d, p2d_process, quick_bench, refused, small_network
from safetensors.torch import load_file

from prune2deploy import __version__, cli
from prune2deploy.backends import BACKENDS
from prune2deploy.graph.rules import RULES
from prune2deploy.masks import load_masks
from prune2deploy.methods import METHODS
from prune2deploy.networks import NETWORKS
from prune2deploy.recipe import load_recipe

GROUP = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = GROUP.commands  # type: ignore[attr-defined]
WITHOUT_JSON = {"report"}


def document(outcome: str) -> dict[str, Any]:
    """Return the one JSON document that a command printed."""
    found: dict[str, Any] = json.loads(outcome)
    assert found["schema_version"] == 1
    return found


def against(run: Path, folder: Path, ratio: float) -> Path:
    """Write a report that measured the slim graph at this ratio, within 1 %."""
    report = json.loads((run / "report.json").read_text())
    report["bench"]["ratios"][0] |= {"arm": "slim", "ratio": ratio, "low": 0.99 * ratio, "high": 1.01 * ratio}
    (folder / "report.json").write_text(json.dumps(report))
    return folder / "report.json"


# --- help -------------------------------------------------------------------------------------------------------------


def test_the_commands_are_those_of_the_contract() -> None:
    assert set(COMMANDS) == {
        *("prune", "export", "slim", "verify", "bench", "inspect", "report", "run"),
        *("compare", "sensitivity"),
        *("methods", "networks", "ops", "backends", "doctor"),
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_documents_every_option(name: str) -> None:
    text = done(name, "--help")
    assert f" {name} " in text.splitlines()[0]
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"'{name} {parameter.name}' has no help"
        words = " ".join(text.split())
        assert " ".join(parameter.help.split()) in words, parameter.name
        for option in parameter.opts if parameter.param_type_name == "option" else []:
            assert option in text


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_offers_what_the_others_spell_otherwise(name: str) -> None:
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("-")}
    assert all(re.fullmatch(r"-[a-z]|--[a-z]+(-[a-z]+)*", option) for option in options)
    assert ("--json" in options) == (name not in WITHOUT_JSON)
    if name in ("slim", "prune", "run", "report"):
        assert "-o" in options


def test_help_and_the_version_need_no_heavy_package() -> None:
    outcome = p2d_process("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"p2d {__version__}\n", "")
    text = p2d_process("--help").out
    assert all(name in text for name in COMMANDS)


def test_no_arguments_show_the_help() -> None:
    outcome = p2d_process()
    assert "Usage: " in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [("prunne",), ("slim",), ("slim", "a.onnx", "-o", "b.onnx", "--fast"), ("slim", "a.onnx", "--rtol", "x")],
)
def test_a_wrong_call_exits_with_2_and_says_how_to_get_help(arguments: tuple[str, ...]) -> None:
    outcome = p2d(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "--help" in outcome.err
    assert "Traceback" not in outcome.err


# --- JSON and streams -------------------------------------------------------------------------------------------------

LISTS = {
    "methods": set(METHODS),
    "networks": set(NETWORKS),
    "ops": set(RULES),
    "backends": set(BACKENDS),
}


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_say_the_same_as_tables_and_as_json(name: str) -> None:
    outcome = p2d(name, "--json")
    assert outcome.err == ""
    assert set(document(outcome.out)[name]) == LISTS[name]
    text = done(name)
    assert all(key in text for key in LISTS[name])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_shown_with_its_options(name: str) -> None:
    found = document(done("methods", name, "--json"))
    assert found["method"] == name
    text = done("methods", name)
    for option in found["options"]:
        assert f"--option {option}=" in text
    refused(p2d("methods", "l7"), 2, "l7", *sorted(METHODS))


def test_doctor_says_which_commands_can_run() -> None:
    found = document(done("doctor", "--json"))
    assert found["checks"]["prune, export, run"] == "ready"
    assert found["checks"]["slim, verify, inspect"] == "ready"
    assert found["environment"]["packages"]["torch"] in done("doctor")


def test_inspect_shows_what_slimming_would_leave(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    found = document(done("inspect", run, "--json"))
    assert found["macs"] == report["slim"]["macs"]
    assert found["parameters"] == report["slim"]["parameters"]
    assert found["values"]
    text = done("inspect", run / "dense.onnx")
    assert "16 →" not in text
    assert "needed by" in done("inspect", run / "dense.onnx", "--values")


def test_slim_verify_and_bench_print_one_document_and_nothing_else(run: Path, tmp_path: Path) -> None:
    slim, masked = tmp_path / "slim.onnx", run / "masked.onnx"
    report = json.loads((run / "report.json").read_text())
    for arguments, section in (
        (("slim", masked, "-o", slim), "slim"),
        (("verify", masked, slim), "verify"),
        (("bench", masked, slim, "--iterations", "20", "--against", against(run, tmp_path, ratio=2.0)), "bench"),
    ):
        outcome = p2d(*arguments, "--json")
        assert (outcome.code, outcome.err) == (0, "")
        found = document(outcome.out)
        assert set(found) == {"schema_version", section}
        assert set(found[section]) >= set(report[section]) - {"warnings"}
    assert slim.read_bytes() == (run / "slim.onnx").read_bytes()


def test_prune_export_and_run_print_one_document_and_nothing_else(small: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(small, tmp_path / "own"))
    resume = ("run", own / "recipe.toml", "-o", own, "--resume")
    for arguments, sections in (
        (resume, {"prune", "export", "slim", "verify", "bench", "environment"}),
        (("export", own), {"export", "slim", "verify"}),
        (("prune", small_network(tmp_path), "-o", own), {"prune"}),
    ):
        outcome = p2d(*arguments, "--json")
        assert (outcome.code, outcome.err) == (0, "")
        assert set(document(outcome.out)) - {"tool", "recipe"} == {"schema_version", *sections}


def test_tables_go_to_stdout_and_stderr_stays_empty_in_a_pipe(run: Path, tmp_path: Path) -> None:
    outcome = p2d_process("slim", run / "masked.onnx", "-o", tmp_path / "slim.onnx")
    assert (outcome.code, outcome.err) == (0, "")
    assert "MACs" in outcome.out
    assert "\x1b" not in outcome.out
    outcome = p2d_process("verify", run / "masked.onnx", tmp_path / "slim.onnx", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    document(outcome.out)


@pytest.mark.parametrize("as_json", [False, True])
def test_progress_goes_to_stderr_where_it_is_a_terminal(as_json: bool, run: Path, tmp_path: Path) -> None:
    arguments = ("slim", run / "masked.onnx", "-o", tmp_path / "slim.onnx", *(("--json",) if as_json else ()))
    terminal, end = pty.openpty()
    environment = ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=end) as process:
        os.close(end)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:
                break
            shown += part
            if not part:
                break
        assert process.stdout is not None
        out = process.stdout.read().decode()
        assert process.wait() == 0
    os.close(terminal)
    assert b"removing dead channels from masked.onnx" in shown or b"proving that slim.onnx" in shown
    assert "\x1b" not in out
    if as_json:
        document(out)


@pytest.mark.parametrize("columns", ["20", "300"])
def test_a_table_in_a_pipe_does_not_depend_on_the_terminal(columns: str, run: Path) -> None:
    words, environment = command("inspect", run / "slim.onnx"), ENVIRONMENT | {"COLUMNS": columns}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout == done("inspect", run / "slim.onnx")
    assert "layer1.0.conv1" in found.stdout


# --- what is to remain ------------------------------------------------------------------------------------------------


def pruned_widths(run: Path) -> dict[str, int]:
    return {group: int(mask.sum()) for group, mask in load_masks(run / "masks.safetensors").items()}


def test_prune_rounds_to_the_multiple_of_a_precision(tmp_path: Path) -> None:
    spec = small_network(tmp_path)
    for round_to, folder in (("tf32", "named"), ("4", "counted")):
        done("prune", spec, "--target", "params=0.6", "--round-to", round_to, "-o", tmp_path / folder)
    assert pruned_widths(tmp_path / "named") == pruned_widths(tmp_path / "counted")
    assert all(width % 4 == 0 for group, width in pruned_widths(tmp_path / "named").items() if group != "head")
    assert load_recipe(tmp_path / "named" / "recipe.toml").round_to == "tf32"
    assert load_recipe(tmp_path / "counted" / "recipe.toml").round_to == 4
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("named", "counted")]
    assert [report["prune"]["round_to"] for report in reports] == [4, 4]


def test_slim_rounds_to_the_multiple_of_a_precision(run: Path, tmp_path: Path) -> None:
    for round_to in ("int8", "16"):
        done("slim", run / "masked.onnx", "--round-to", round_to, "-o", tmp_path / f"{round_to}.onnx")
    assert (tmp_path / "int8.onnx").read_bytes() == (tmp_path / "16.onnx").read_bytes()


def test_prune_keeps_floors_by_pattern(tmp_path: Path) -> None:
    spec = small_network(tmp_path)
    call = ("prune", spec, "--target", "macs=0.7")
    done(*call, "-o", tmp_path / "free")
    done(*call, "--floor", "point.weight=11", "--floor", "l*=0.9", "-o", tmp_path / "floors")
    free, held = pruned_widths(tmp_path / "free"), pruned_widths(tmp_path / "floors")
    assert free["point"] < 11
    assert free["left"] < 6
    assert held["point"] >= 11
    assert held["left"] == 6
    assert held["stem"] < free["stem"], "what the floors hold, the others pay"
    assert load_recipe(tmp_path / "floors" / "recipe.toml").floors == {"point.weight": 11, "l*": 0.9}
    again = tmp_path / "again"
    done("run", quick_bench(tmp_path / "floors" / "recipe.toml"), "-o", again)
    assert pruned_widths(again) == held


def test_prune_ranks_as_it_is_told(tmp_path: Path) -> None:
    spec = small_network(tmp_path)
    for ranking in ("uniform", "global"):
        done("prune", spec, "--target", "params=0.5", "--ranking", ranking, "-o", tmp_path / ranking)
    reports = {name: json.loads((tmp_path / name / "report.json").read_text()) for name in ("uniform", "global")}
    assert [report["prune"]["method_report"]["ranking"] for report in reports.values()] == ["uniform", "global"]
    assert pruned_widths(tmp_path / "uniform") != pruned_widths(tmp_path / "global")


def test_prune_takes_the_widths_of_another_run(tmp_path: Path) -> None:
    spec = small_network(tmp_path)
    done("prune", spec, "--target", "macs=0.4", "--ranking", "global", "-o", tmp_path / "first")
    call = ("prune", spec, "--method", "random", "--widths-of", tmp_path / "first")
    done(*call, "-o", tmp_path / "control")
    first, control = (load_masks(tmp_path / name / "masks.safetensors") for name in ("first", "control"))
    assert pruned_widths(tmp_path / "control") == pruned_widths(tmp_path / "first")
    assert any((first[group] != control[group]).any() for group in first), "the same widths, but other channels"
    done("run", quick_bench(tmp_path / "control" / "recipe.toml"), "-o", tmp_path / "again")
    assert pruned_widths(tmp_path / "again") == pruned_widths(tmp_path / "first")


def test_prune_from_scratch_starts_from_new_weights_and_says_when_they_stay_so(tmp_path: Path) -> None:
    call = ("prune", "resnet_digits", "--weights", DIGITS / "weights.safetensors", "--target", "macs=0.5")
    done(*call, "--from-scratch", "-o", tmp_path / "new")
    done(*call, "-o", tmp_path / "kept")
    new, kept = (json.loads((tmp_path / name / "report.json").read_text())["prune"] for name in ("new", "kept"))
    assert pruned_widths(tmp_path / "new") == pruned_widths(tmp_path / "kept")
    assert new["accuracy"]["pruned"]["top1"] < 0.4
    assert any("never trained" in text for text in new["warnings"])
    assert not any("never trained" in text for text in kept["warnings"])


FACTORIES = """
from pathlib import Path
import torch
from torch import nn
from net import Small

class Own(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        nn.init.constant_(self.norm.weight, 0.75)
        nn.init.normal_(self.stem.weight, std=7.0)
        self.zeros = nn.Parameter(torch.zeros(2, 2))
        self.table = nn.Parameter(torch.arange(4.0))

def own(num_classes):
    return Own(num_classes)

def trained(num_classes):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Own(num_classes)
"""


def test_from_scratch_is_what_the_factory_draws_and_trained_weights_are_reset(tmp_path: Path) -> None:
    small_network(tmp_path)
    (tmp_path / "factories.py").write_text(FACTORIES)
    deviations, warnings = {}, {}
    for name in ("own", "trained"):
        spec, run = f"{tmp_path / 'factories.py'}:{name}", tmp_path / name
        done("prune", spec, "--from-scratch", "--keep", "stem*", "--target", "macs=0.8", "-o", run)
        deviations[name] = float(load_file(run / "weights.safetensors")["stem.weight"].std())
        warnings[name] = json.loads((run / "report.json").read_text())["prune"]["warnings"]
    assert deviations["own"] > 5, "the factory's own initialisation"
    assert deviations["trained"] < 1, "the same for every seed, so it was loaded, and is drawn anew"
    for said in warnings.values():
        assert any("gain, table keep what the factory gave" in text for text in said), "nothing resets them"


def test_the_seed_reaches_the_method_unless_its_options_have_one(tmp_path: Path) -> None:
    spec = small_network(tmp_path)
    masks = {}
    for name, words in {"0": (), "1": ("--seed", 1), "own": ("--seed", 1, "--option", "seed=0")}.items():
        done("prune", spec, "--method", "random", *words, "-o", tmp_path / name)
        masks[name] = load_masks(tmp_path / name / "masks.safetensors")
    assert any((masks["0"][group] != masks["1"][group]).any() for group in masks["0"])
    assert all((masks["0"][group] == masks["own"][group]).all() for group in masks["0"])


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_the_module_and_the_command_are_one() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'p2d = "prune2deploy.cli:main"' in text
    assert p2d_process("methods").out == done("methods")


def test_a_bug_keeps_its_traceback_and_exits_with_1(tmp_path: Path) -> None:
    code = (
        "import sys; from prune2deploy import cli, files\n"
        "def broken(*_): raise ZeroDivisionError('a bug')\n"
        "import prune2deploy.graph.model as model; model.load_model = broken\n"
        "sys.argv = ['p2d', 'inspect', 'x.onnx']; cli.main()"
    )
    found = subprocess.run([command()[0], "-c", code], env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1
    assert "Traceback" in found.stderr
    assert "ZeroDivisionError: a bug" in found.stderr


def test_an_interrupt_exits_with_130_and_says_what_is_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prune2deploy.graph.inspect.inspect_model", interrupted)
    refused(p2d("inspect", run), 130, "interrupted", "earlier contents")


def test_slimming_a_slim_graph_removes_nothing_more(run: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    done("slim", run / "masked.onnx", "-o", first)
    assert document(done("slim", first, "-o", second, "--json"))["slim"]["removed_channels"] == 0
    done("verify", run / "masked.onnx", second)


def test_nothing_removed_is_loud_and_under_strict_exits_with_5(run: Path, tmp_path: Path) -> None:
    outcome = p2d("slim", run / "dense.onnx", "-o", tmp_path / "slim.onnx")
    assert outcome.code == 0
    assert "NOTHING WAS REMOVED" in outcome.out
    outcome = p2d("slim", run / "dense.onnx", "-o", tmp_path / "slim.onnx", "--strict")
    refused(outcome, 5, "no channel of", "dense.onnx")
    outcome = p2d("slim", run / "dense.onnx", "-o", tmp_path / "slim.onnx", "--strict", "--json")
    refused(outcome, 5, "no channel")
    assert document(outcome.out)["slim"]["removed_channels"] == 0
    done("slim", run / "masked.onnx", "-o", tmp_path / "slim.onnx", "--strict")


def test_not_faster_is_loud_and_under_strict_exits_with_5(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "dense.onnx", tmp_path / "copy.onnx")
    arguments = ("bench", run / "dense.onnx", tmp_path / "copy.onnx", "--iterations", "50")
    outcome = p2d(*arguments, "--strict")
    refused(outcome, 5, "'copy' takes")
    assert re.search(r"(NOT SHOWN TO BE FASTER|SLOWER): 'copy' takes", outcome.out)


def test_slower_than_an_earlier_report_exits_with_5(run: Path, tmp_path: Path) -> None:
    arguments = ("bench", run / "dense.onnx", run / "slim.onnx", "--iterations", "50")
    outcome = p2d(*arguments, "--against", against(run, tmp_path, ratio=0.01))
    refused(outcome, 5, "'slim' takes", "0.010", "slower", "report.json")


def test_a_run_that_is_not_faster_is_loud_and_under_strict_exits_with_5(small: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(small, tmp_path / "own"))
    report = json.loads((own / "report.json").read_text())
    verdict = {"arm": "slim", "word": "slower", "explanation": "'slim' takes 1.5 of the time of 'dense'"}
    report["bench"]["verdicts"] = [verdict]
    (own / "report.json").write_text(json.dumps(report))
    outcome = p2d("run", own / "recipe.toml", "-o", own, "--resume")
    assert outcome.code == 0
    assert "NOT FASTER: 'slim' takes 1.5" in outcome.out
    refused(p2d("run", own / "recipe.toml", "-o", own, "--resume", "--strict"), 5, "NOT FASTER", "1.5")


def test_bench_of_a_run_replaces_its_section_and_samples(small: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(small, tmp_path / "own"))
    before = json.loads((own / "report.json").read_text())
    found = document(done("bench", own, "--iterations", "7", "--batch", "3", "--json"))["bench"]
    after = json.loads((own / "report.json").read_text())
    assert after["bench"] == found
    assert found["iterations"] == 7
    assert found["inputs"]["input"]["shape"] == [3, 1, 8, 8]
    assert {name: after[name] for name in ("prune", "export", "slim", "verify")} == {
        name: before[name] for name in ("prune", "export", "slim", "verify")
    }
    samples = json.loads((own / "samples" / "bench.json").read_text())
    assert {len(times) for times in samples["slim"]} == {7}


def test_report_writes_one_page_of_several_runs(run: Path, small: Path, tmp_path: Path) -> None:
    out = done("report", run, small, "-o", tmp_path / "page.html")
    assert out == f"page: {tmp_path / 'page.html'}\n"
    assert "resnet_digits" in (tmp_path / "page.html").read_text()


def test_paths_with_spaces_and_brackets_are_paths(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my [runs]"
    folder.mkdir()
    shutil.copy(run / "masked.onnx", folder / "in [1].onnx")
    out = done("slim", folder / "in [1].onnx", "-o", folder / "out [2].onnx")
    assert (folder / "out [2].onnx").read_bytes()
    assert (folder / "out [2].json").exists()
    assert "[2].onnx" in out
    assert "[none].onnx" in p2d("inspect", folder / "[none].onnx").err
