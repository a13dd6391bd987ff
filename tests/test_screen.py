"""What a person sees: every state of a run can be shown, names are shown as they are, failures are loud."""

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from prune2deploy.findings import Findings
from prune2deploy.report import SECTIONS, update_section
from prune2deploy.screen import (
    Live,
    bench_summary,
    layer_table,
    loud,
    plain_table,
    proof_lines,
    reasons_tree,
    run_summary,
    slim_summary,
    value_table,
    warning,
)
from prune2deploy.train import Progress

NAME = "stages[0].conv[bold]x[/bold][/]"


def shown(renderable: RenderableType, width: int = 200) -> str:
    console = Console(width=width, markup=False, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.fixture(scope="session")
def sections(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def test_a_whole_run_shows_sizes_accuracy_proof_and_latency(run: Path, sections: dict[str, Any]) -> None:
    text = shown(run_summary(run))
    for value in (*sections["slim"]["macs"].values(), *sections["slim"]["parameters"].values()):
        assert f"{value:,}" in text
    accuracy = sections["prune"]["accuracy"]
    for stage in ("dense", "pruned", "finetuned"):
        assert f"{100 * accuracy[stage]['top1']:.2f} %" in text
    assert "proof: masked and slim agree on 9 kinds of input" in text
    assert sections["bench"]["verdicts"][0]["explanation"] in text
    assert f"{sections['bench']['timings'][1]['median_ms']:.3f} ms" in text


@pytest.mark.parametrize("missing", SECTIONS)
def test_a_report_without_a_section_can_be_shown(missing: str, sections: dict[str, Any], tmp_path: Path) -> None:
    for name in SECTIONS:
        if name != missing:
            update_section(tmp_path / "r", name, sections[name])
    assert shown(run_summary(tmp_path / "r")).startswith("r ")


@pytest.mark.parametrize("only", SECTIONS)
def test_a_report_with_one_section_can_be_shown(only: str, sections: dict[str, Any], tmp_path: Path) -> None:
    update_section(tmp_path / "r", only, sections[only])
    assert shown(run_summary(tmp_path / "r")).startswith("r ")


def test_brackets_in_names_survive(sections: dict[str, Any], run: Path, tmp_path: Path) -> None:
    assert NAME in shown(plain_table(("a[b]", "n"), [(NAME, 3)]))
    assert "a[b]" in shown(plain_table(("a[b]", "n"), [(NAME, 3)]))
    row = {"name": NAME, "op_type": "Conv", "before": 8, "after": 4, "macs_before": 10, "macs_after": 5}
    sizes = {"parameters_before": 4, "parameters_after": 2, "bytes_before": 16, "bytes_after": 8}
    text = shown(layer_table([row | sizes | {"kind": "linear"}]))
    assert NAME in text
    assert "8 → 4" in text
    value = dict.fromkeys(("channels", "constant", "aliases", "live", "kept"), 1) | {"value": NAME, "reader": NAME}
    assert shown(value_table([value])).count(NAME) == 2
    assert NAME in shown(warning(NAME))
    bench = json.loads(json.dumps(sections["bench"]).replace('"slim"', json.dumps(NAME)))
    assert NAME in shown(bench_summary(bench))
    folder = tmp_path / "run[red]x"
    shutil.copytree(run, folder)
    assert "run[red]x" in shown(run_summary(folder))
    assert "slim[red].onnx" in shown(slim_summary(sections["slim"], Path("slim[red].onnx")))


def test_opaque_operators_are_shown(sections: dict[str, Any]) -> None:
    text = shown(slim_summary(sections["slim"] | {"opaque": {"com.acme::Odd": 2}}, Path("x.onnx")))
    assert "com.acme::Odd (2)" in text


def test_reasons_that_differ_only_in_the_constant_are_one_line() -> None:
    constants = [
        {
            "channels": [k],
            "why": f"constant {value:g}, like the 2 tied to it",
            "kind": "constant",
            "value": value,
            "tied": 2,
        }
        for k, value in ((2, 1e-14), (7, -3e-16), (8, 0.25))
    ]
    layer = {"layer": "conv", "op_type": "Conv", "before": 9, "after": 5, "gone": False, "near_dead": 3, "kept": []}
    text = shown(reasons_tree([layer | {"removed": [*constants, {"channels": [0], "why": "never read"}]}]))
    assert "9 → 5; 3 of its filters were near-dead" in text
    assert "removed: 2, 7-8: constants from -3e-16 to 0.25, like the 2 tied to each" in text
    assert "removed: 0: never read" in text


def test_what_is_not_proved_is_said(sections: dict[str, Any]) -> None:
    plain = shown(proof_lines(sections["verify"], "the two graphs"))
    assert "the two graphs agree on" in plain
    assert "note" not in plain
    doubts = {"not_numbers": ["boxes"], "computed_in": "float32", "ill_conditioned": ["large, batch 3"]}
    text = shown(proof_lines(sections["verify"] | doubts, "the two"), width=300)
    assert all(word in text for word in ("'boxes' is nowhere a number", "run in float32", "on inputs large, batch 3"))


def test_nothing_removed_is_said_loudly(sections: dict[str, Any], tmp_path: Path) -> None:
    update_section(tmp_path, "prune", sections["prune"])
    assert loud(Findings(tmp_path)) == []
    slim = sections["slim"] | {"removed_channels": 0}
    update_section(tmp_path, "slim", slim)
    assert len(loud(Findings(tmp_path))) == 1
    assert "NOTHING WAS REMOVED" in shown(run_summary(tmp_path))
    assert "NOTHING WAS REMOVED" in shown(slim_summary(slim, Path("x.onnx")))
    assert "NOTHING WAS REMOVED" not in shown(slim_summary(sections["slim"], Path("x.onnx")))


@pytest.mark.parametrize("word", ["slower", "not shown to be faster", "faster"])
def test_not_faster_is_said_loudly(word: str, sections: dict[str, Any], tmp_path: Path) -> None:
    bench = sections["bench"] | {"verdicts": [{"arm": "slim", "word": word, "explanation": "so it was measured"}]}
    update_section(tmp_path, "bench", bench)
    assert ("NOT FASTER: so it was measured" in shown(run_summary(tmp_path))) == (word != "faster")
    assert f"{word.upper()}: so it was measured" in shown(bench_summary(bench))


def test_warnings_of_all_sections_are_shown(sections: dict[str, Any], tmp_path: Path) -> None:
    for name in ("prune", "slim", "bench"):
        update_section(tmp_path, name, sections[name] | {"warnings": [f"mind the {name}"]})
    text = shown(run_summary(tmp_path))
    assert all(f"note: mind the {name}" in text for name in ("prune", "slim", "bench"))


def test_a_narrow_screen_cuts_nothing_off_the_totals(run: Path, sections: dict[str, Any]) -> None:
    text = shown(run_summary(run), width=80)
    assert f"{sections['slim']['macs']['after']:,}" in text


def test_progress_is_silent_where_stderr_is_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "err").open("w+") as stream:
        with Live(Console(file=stream)).shown() as live:
            live.note("working")
            live.rounds(1, 5)
        assert stream.tell() == 0


@pytest.mark.parametrize("name", ["m.onnx", "a[b].onnx", "a[/b].onnx", "a[bold]b.onnx"])
def test_progress_shows_what_happens_on_a_terminal(name: str, tmp_path: Path) -> None:
    with (tmp_path / "err").open("w+") as stream:
        with Live(Console(file=stream, force_terminal=True, width=120)).shown() as live:
            live.note(f"reading {name}")
            live.training(Progress(epoch=2, epochs=4, step=5, steps=10, loss=0.25, lr=0.1))
            live._progress.refresh()
            logging.getLogger("prune2deploy.train").warning("it may %s", "[diverge]")
            live.training(Progress(epoch=3, epochs=4, step=5, steps=10, loss=0.25, lr=0.1, top1=0.9731))
            live._progress.refresh()
            live.note("timing")
            live.rounds(3, 5)
            live._progress.refresh()
        stream.seek(0)
        text = stream.read()
    for part in (
        f"reading {name}",
        "epoch 2/4",
        "loss 0.250",
        "accuracy 97.31 %",
        "warning: it may [diverge]",
        "round 3/5",
    ):
        assert part in text


def test_a_count_stays_while_its_parts_are_noted_and_what_is_over_leaves_no_bar(tmp_path: Path) -> None:
    def shown(live: Live) -> tuple[float, float | None, str]:
        (task,) = live._progress.tasks
        return task.completed, task.total, task.description

    with (tmp_path / "screen").open("w") as stream:
        with Live(Console(file=stream, force_terminal=True)).shown() as live:
            live.trials(3, 12)
            live.note("9 trials to run")
            assert shown(live) == (3, 12, "9 trials to run")
        with Live(Console(file=stream, force_terminal=True)).shown() as live:
            live.rounds(2, 5)
            live.note("writing report.html")
            assert shown(live) == (0, None, "writing report.html")
            live.rounds(1, 7)
            assert shown(live)[:2] == (1, 7)


def test_a_plain_table_folds_what_does_not_fit() -> None:
    console = Console(width=30, file=io.StringIO(), record=True)
    console.print(plain_table(["method", "top-1"], [["epruner, macs=0.25", "83.28 % ± 0.25"], ["l1, macs=0.5", "x"]]))
    assert "…" not in (text := console.export_text())
    assert "0.25" in text
