"""The HTML page: what it says, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from prune2deploy import figures
from prune2deploy.errors import InputError
from prune2deploy.findings import Findings, wilson_interval
from prune2deploy.markup import Html, bytes_text, count_text, ms_text, table, tag
from prune2deploy.page import write_page
from prune2deploy.report import update_section, write_samples

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
HOSTILE = '<img src=x onerror="document.title=1">&</script><script>document.title=2</script>'


def layers(count: int, after: int = 8) -> list[dict[str, Any]]:
    keys = ("name", "op_type", "before", "after", "macs_before", "macs_after")
    return [
        dict(zip(keys, (f"stage.{i}.conv.weight", "Conv", 16, after, 1600, 100 * after), strict=True))
        for i in range(count)
    ]


def bench(word: str, ratio: float, *, arm: str = "slim") -> tuple[dict[str, Any], dict[str, list[list[float]]]]:
    """Return a section `bench` as latency.py writes it, and the samples behind it."""
    rng = np.random.default_rng(0)
    names = {"dense": 2.0, arm: 2.0 * ratio, "dense (control)": 2.0}
    samples = {name: (middle * rng.lognormal(0, 0.05, (5, 40))).tolist() for name, middle in names.items()}
    keys = ("mean_ms", "p90_ms", "min_ms", "iqr_ms")
    timings = [
        {"arm": name, "median_ms": float(np.median(times)), "p99_ms": None, "runs": 200} | dict.fromkeys(keys, 2.5)
        for name, times in samples.items()
    ]

    def interval(name: str, middle: float) -> dict[str, Any]:
        rounds = [middle * factor for factor in (0.99, 1.0, 1.01, 1.0, 1.0)]
        return {"arm": name, "ratio": middle, "low": middle * 0.99, "high": middle * 1.01, "session_ratios": rounds}

    section = {
        "baseline": "dense",
        "backend": {"name": "ort-cpu"},
        "inputs": {"x": {"shape": [1, 3, 8, 8], "type": "float32"}},
        "sessions": 5,
        "iterations": 40,
        "threads": 1,
        "rule": {"faster_below": 0.98, "slower_above": 1.02, "confidence": 0.95},
        "timings": timings[:2],
        "control_timing": timings[2],
        "ratios": [interval(arm, ratio)],
        "control": interval("dense (control)", 1.0),
        "verdicts": [{"arm": arm, "word": word, "explanation": f"'{arm}' takes {ratio:.3f} of the time of 'dense'"}],
        "warnings": [],
    }
    return section, samples


def make_run(
    folder: Path, *, word: str = "faster", ratio: float = 0.5, removed: int = 160, count: int = 20, arm: str = "slim"
) -> Path:
    """Write a whole run's report into a folder."""
    section, samples = bench(word, ratio, arm=arm)
    found = layers(count)
    update_section(
        folder,
        "prune",
        {
            "network": "resnet20",
            "method": "fpgm",
            "target": {"kind": "macs", "share": 0.5},
            "finetune_epochs": 2,
            "accuracy": {
                "dense": {"top1": 0.9, "images": 1000},
                "pruned": None,
                "finetuned": {"top1": 0.89, "images": 1000},
            },
            "history": [
                {"epoch": 1, "loss": 1.0, "holdout_top1": 0.8},
                {"epoch": 2, "loss": None, "holdout_top1": 0.9},
            ],
            "warnings": ["the hold-out is small"],
        },
    )
    update_section(
        folder,
        "slim",
        {
            "layers": found,
            "macs": {"before": 32_000, "after": 16_000},
            "parameters": {"before": 270_000, "after": 135_000},
            "bytes": {"before": 2_000_000, "after": 1_000_000},
            "opaque": {"Softmax": 1},
            "removed_channels": removed,
        },
    )
    outputs = [{"name": "logits", "difference": 2e-6, "limit": 1e-4}]
    update_section(folder, "verify", {"outputs": outputs, "cases": 12, "rtol": 1e-4})
    update_section(folder, "bench", section)
    update_section(folder, "environment", {"cpu": "A CPU", "packages": {"numpy": "2.0"}, "gpus": []})
    write_samples(folder, samples)
    (folder / "recipe.toml").write_text('network = "resnet20"\n')
    return folder


class Reader(HTMLParser):
    """Collects a page's text outside of scripts and styles, its elements, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.pieces, self.loads, self.tags = 0, [], [], []  # type: ignore[var-annotated]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.skip += tag in {"script", "style"}
        self.loads += [value for name, value in attrs if name in {"src", "href"} and not (value or "").startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        self.skip -= tag in {"script", "style"}

    def handle_data(self, data: str) -> None:
        if not self.skip:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def read(runs: list[Path], out: Path) -> Reader:
    write_page(runs, out)
    reader = Reader()
    reader.feed(out.read_text())
    return reader


def drawn(out: Path) -> dict[str, Any]:
    """Return the figures that the page draws."""
    found = re.search(r'<script id="figures" type="application/json">(.*?)</script>', out.read_text(), re.DOTALL)
    assert found is not None
    figures_: dict[str, Any] = json.loads(found[1])
    return figures_


# --- what it says


@pytest.mark.parametrize(
    ("word", "ratio", "says"),
    [
        ("faster", 0.5, "Faster. 'slim' takes 0.500 of the time"),
        ("slower", 1.5, "Slower. This is a result, not a success. 'slim' takes 1.500"),
        ("not shown to be faster", 1.0, "Not shown to be faster. This is a result, not a success. 'slim' takes 1.000"),
    ],
)
def test_the_headline_is_the_verdict_in_words(tmp_path: Path, word: str, ratio: float, says: str) -> None:
    text = read([make_run(tmp_path / "run", word=word, ratio=ratio)], tmp_path / "report.html").text
    assert says in text
    assert "Nothing was removed" not in text


def test_a_run_that_removed_nothing_says_so_loudly(tmp_path: Path) -> None:
    text = read([make_run(tmp_path / "run", removed=0)], tmp_path / "report.html").text
    assert "Nothing was removed. This is a result, not a success." in text


def test_outputs_that_differ_are_said_loudly(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    outputs = [{"name": "logits", "difference": 1.0, "limit": 1e-4}, {"name": "boxes", "difference": 0.0, "limit": 1.0}]
    update_section(run, "verify", {"outputs": outputs, "cases": 1, "rtol": 1e-4})
    assert "The outputs differ. Beyond their limit: logits. " in read([run], tmp_path / "report.html").text


def test_numbers_recipe_and_command_are_on_the_page(tmp_path: Path) -> None:
    text = read([make_run(tmp_path / "my run")], tmp_path / "report.html").text
    for piece in (
        "0.500×",
        "32,000 → 16,000",
        "1.91 MiB → 977 KiB",
        "90.00 % → 89.00 %",
        "-1.00 pts",
        "Softmax (1)",
        "the hold-out is small",
        "packages.numpy 2.0",
        'network = "resnet20"',
        "p2d run 'my run/recipe.toml' -o 'my run-again'",
    ):
        assert piece in text, piece


def test_what_is_missing_is_said_and_not_drawn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    update_section(run, "prune", {"network": "n", "macs": {"dense": 10, "pruned": 5}, "layers": []})
    out = tmp_path / "report.html"
    text = read([run], out).text
    assert "Latency was not measured." in text
    assert "No graph was slimmed (p2d slim); outputs before" in text
    assert "There is no recipe.toml" in text
    assert "It was not measured in this run." in text
    assert drawn(out) == {}


def test_the_plan_stands_in_where_no_graph_was_slimmed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    update_section(run, "prune", {"macs": {"dense": 10, "pruned": 5}, "layers": layers(3)})
    text = read([run], tmp_path / "report.html").text
    assert "Channels per layer, as planned by the masks" in text
    assert "50 % 10 → 5" in text


def test_raw_timings_of_another_measurement_are_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    out = tmp_path / "report.html"
    write_page([run], out)
    assert "run-1-latency" in drawn(out)
    write_samples(run, bench("faster", 0.7)[1])
    text = read([run], out).text
    assert "The raw timings of this measurement are not in samples/bench.json" in text
    assert "run-1-latency" not in drawn(out)


def test_several_runs_get_a_table_with_links_to_their_parts(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", word="slower", ratio=1.5)]
    reader = read(runs, tmp_path / "report.html")
    assert "2 runs" in reader.text
    assert "1.500 (1.485 to 1.515) slower" in reader.text
    ids = {attributes["id"] for name, attributes in reader.tags if name == "section"}
    links = {attributes["href"] for name, attributes in reader.tags if name == "a"}
    assert links == {f"#{identifier}" for identifier in ids} == {"#run-1", "#run-2"}


def test_a_folder_without_a_report_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.json' does not exist"):
        write_page([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_page_loads_nothing_and_forbids_it(tmp_path: Path) -> None:
    reader = read([make_run(tmp_path / "run")], tmp_path / "report.html")
    assert reader.loads == []
    (policy,) = [one["content"] for name, one in reader.tags if name == "meta" and "http-equiv" in one]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert (tmp_path / "report.html").stat().st_size < 8_000_000


def test_equal_reports_make_equal_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_page([run], tmp_path / "a.html")
    write_page([run], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def hostile_run(folder: Path) -> Path:
    run = make_run(folder, arm=HOSTILE)
    update_section(run, "prune", {"network": HOSTILE, "method": HOSTILE, "warnings": [HOSTILE]})
    slim = {"layers": [{**layers(1)[0], "name": HOSTILE, "op_type": HOSTILE}], "opaque": {HOSTILE: 1}}
    update_section(run, "slim", slim)
    update_section(run, "environment", {"cpu": HOSTILE, HOSTILE: 1})
    (run / "recipe.toml").write_text(HOSTILE)
    return run


def test_values_cannot_become_markup(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    reader = read([hostile_run(tmp_path / "run<b>")], out)
    assert "img" not in {name for name, _ in reader.tags}
    assert sum(name == "script" for name, _ in reader.tags) == 4
    assert HOSTILE in "".join(reader.pieces)
    assert "<img" not in json.dumps(drawn(out))


# --- the figures


def test_every_figure_is_one_that_plotly_knows(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_page([make_run(tmp_path / "a"), make_run(tmp_path / "b", count=90)], out)
    found = drawn(out)
    names = {"ratios", "latency", "channels", "macs", "training"}
    assert set(found) == {f"run-{place}-{name}" for place in (1, 2) for name in names}
    for figure in found.values():
        go.Figure(figure)  # raises on a property that does not exist


def test_bars_hold_the_widths_before_and_after() -> None:
    before, after = figures.layer_bars(layers(3, after=4), "before", "after", "channels")["data"]
    assert (before["x"], after["x"]) == ([16, 16, 16], [4, 4, 4])
    assert after["y"] == [0, 1, 2]


def test_many_layers_become_columns_of_bounded_height() -> None:
    figure = figures.layer_bars(layers(500), "before", "after", "channels")
    assert figure["layout"]["height"] < 500
    assert figure["data"][0]["orientation"] == "v"


def test_the_interval_drawn_is_the_interval_found() -> None:
    ratio = {"arm": "slim", "ratio": 0.5, "low": 0.4, "high": 0.7, "session_ratios": [0.45, 0.55]}
    figure = figures.ratio_intervals([ratio], None, {"faster_below": 0.98, "slower_above": 1.02})
    rounds, mean = figure["data"]
    assert (rounds["x"], mean["x"]) == ([0.45, 0.55], [0.5])
    assert mean["error_x"]["array"] == pytest.approx([0.2])
    assert mean["error_x"]["arrayminus"] == pytest.approx([0.1])
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < 0.4
    assert high > 1.02


def test_shares_rise_from_the_fastest_run_to_the_slowest() -> None:
    figure = figures.latency_shares({"dense": [[3.0, 1.0], [2.0, 4.0]]}, "dense", None)
    (trace,) = figure["data"]
    assert trace["x"] == [1.0, 2.0, 3.0, 4.0]
    assert trace["y"] == pytest.approx([0, 33.333, 66.667, 100])


# --- words and findings


def test_text_is_escaped_and_html_is_not() -> None:
    assert tag("p", "a < b", tag("b", '"'), title='"x"') == '<p title="&quot;x&quot;">a &lt; b<b>&quot;</b></p>'
    assert "<td>&lt;i&gt;</td>" in table(["h"], [["r", "<i>"]])
    assert "<td><i></td>" in table(["h"], [["r", Html("<i>")]])


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (count_text(None), "–"),
        (count_text(12345), "12,345"),
        (count_text(1_234_567), "1.23 M"),
        (count_text(4_560_000_000), "4.56 G"),
        (bytes_text(950), "950 B"),
        (bytes_text(1_500_000), "1.43 MiB"),
        (ms_text(0.123456), "0.1235"),
        (ms_text(12345.6), "12,346"),
    ],
)
def test_numbers_are_said_shortly(found: str, says: str) -> None:
    assert found == says


def test_the_interval_of_a_share_is_wilson_s() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 gives 0.2553 to 0.3662
    low, high = wilson_interval(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_the_headline_arm_is_slim_else_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", arm="small")
    ratio = Findings(run).ratio
    assert ratio is not None
    assert ratio["arm"] == "small"
    section, _ = bench("faster", 0.5)
    section["ratios"] = [{**section["ratios"][0], "arm": "masked"}, *section["ratios"]]
    update_section(run, "bench", section)
    ratio = Findings(run).ratio
    assert ratio is not None
    assert ratio["arm"] == "slim"


# --- a real browser


@pytest.fixture
def chromium(tmp_path: Path) -> Any:
    """Return a function that opens a page in headless Chromium and returns its DOM and its messages."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")

    def dump(page: Path, *flags: str) -> tuple[str, str]:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", *QUIET, "--disable-sync"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--v=0"]
        command += ["--enable-logging=stderr", *flags, page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, "\n".join(console)

    return dump


def root_of(dom: str) -> str:
    """Return the page's root element's start tag, where the page notes errors and how many figures it drew."""
    return dom[: dom.index(">", dom.index("<html"))]


def test_a_browser_draws_every_figure_without_an_error(tmp_path: Path, chromium: Any) -> None:
    out = tmp_path / "report.html"
    write_page([make_run(tmp_path / "a"), make_run(tmp_path / "b", count=90)], out)
    dom, console = chromium(out)
    root = root_of(dom)
    assert "data-errors" not in root
    assert console == ""
    assert f'data-drawn="{len(drawn(out))}"' in root
    body = dom[dom.index("<body") :]
    for identifier in drawn(out):
        part = body[body.index(f'id="{identifier}"') :]
        assert "main-svg" in part[: part.find("</svg>")], identifier
    assert body.count('class="trace bars"') == 2 * 2 * 2
    assert body.count('class="xerrorbars"') + body.count('class="errorbar"') >= 4


def test_a_browser_runs_no_script_from_a_value(tmp_path: Path, chromium: Any) -> None:
    out = tmp_path / "report.html"
    write_page([hostile_run(tmp_path / "run")], out)
    dom, console = chromium(out)
    assert "<title>prune2deploy report</title>" in dom
    assert "data-errors" not in root_of(dom)
    assert console == ""


def test_a_script_that_fails_is_noticed_and_said(tmp_path: Path, chromium: Any) -> None:
    out = tmp_path / "report.html"
    write_page([make_run(tmp_path / "run")], out)
    out.write_text(out.read_text().replace("</body>", "<script>throw new Error('broken')</script></body>"))
    dom, console = chromium(out)
    assert 'data-errors="Uncaught Error: broken' in root_of(dom)
    assert "broken" in console


def test_a_phone_need_not_scroll_sideways(tmp_path: Path, chromium: Any) -> None:
    out = tmp_path / "report.html"
    write_page([make_run(tmp_path / "a", count=30), make_run(tmp_path / "b", count=90)], out)
    probe = "<script>addEventListener('load', () => setTimeout(() => {document.documentElement.dataset.wide ="
    probe += "[document.documentElement.scrollWidth, innerWidth].join(' ')}, 3000))</script></body>"
    out.write_text(out.read_text().replace("</body>", probe))
    dom, _ = chromium(out, "--window-size=500,900")
    wide = re.search(r'data-wide="(\d+) (\d+)"', dom)
    assert wide is not None
    assert int(wide[1]) <= int(wide[2])


def test_names_of_points_lie_over_no_other_and_one_without_room_is_left_out() -> None:
    points = [("first", 0.5, 0.880), ("second", 0.5, 0.881), ("dense", 1.0, 0.917), ("low", 0.5, 0.83)]
    assert figures.name_places(points) == ["middle right", "top center", "middle right", "middle right"]
    crowd = [(f"method number {place}", 0.5, 0.88 + place * 1e-5) for place in range(9)]
    places = figures.name_places([*crowd, ("dense", 1.0, 0.917), ("low", 0.5, 0.83)])
    assert None in places[:9]
    assert places[-1] is not None
    assert not any(place and "left" in place for place in places[:9]), (
        "a long name does not fit left of the first point"
    )
    shown = figures.pareto_front([*crowd, ("dense", 1.0, 0.917)], [0], "MACs")["data"][1]
    assert len(shown["hovertext"]) == 10
    assert "" in shown["text"]
    assert figures.name_places([]) == []
