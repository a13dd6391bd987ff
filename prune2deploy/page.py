"""One self-contained HTML page from the reports of runs: verdict first, then figures, numbers, and how to repeat it."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from prune2deploy import figures
from prune2deploy.figures import Figure
from prune2deploy.files import write_bytes
from prune2deploy.findings import Findings, caveats, wilson_interval, within_limit
from prune2deploy.markup import (
    Html,
    banner,
    bytes_text,
    card,
    count_text,
    figure_place,
    ms_text,
    percent_text,
    share_text,
    table,
    tag,
    tile,
)

_RESULT = "This is a result, not a success."
_WANTED = {
    "prune": "no pruning is recorded (p2d prune)",
    "slim": "no graph was slimmed (p2d slim)",
    "verify": "outputs before and after were not compared (p2d verify)",
    "environment": "the machine is not recorded",
}
_VERDICTS = {
    "faster": ("good", "Faster."),
    "slower": ("bad", f"Slower. {_RESULT}"),
    "not shown to be faster": ("warn", f"Not shown to be faster. {_RESULT}"),
}
_YES_NO = {True: "yes", False: "NO"}
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_WATCH = """
function note(text) { var d = document.documentElement.dataset; d.errors = (d.errors || "") + text + "\\n"; }
window.addEventListener("error", function (event) { note(event.message); });
window.addEventListener("unhandledrejection", function (event) { note(String(event.reason)); });
document.addEventListener("securitypolicyviolation", function (event) { note("refused " + event.violatedDirective); });
"""
_DRAW = """
var figures = JSON.parse(document.getElementById("figures").textContent);
var settings = {responsive: true, displaylogo: false, displayModeBar: false};
Promise.all(Object.keys(figures).map(function (id) {
  return Plotly.newPlot(id, figures[id].data, figures[id].layout, settings);
})).then(function (drawn) { document.documentElement.dataset.drawn = drawn.length; });
"""


class _Part:
    """A run's part of the page: its findings, and the figures to draw."""

    def __init__(self, folder: Path, place: int, drawn: dict[str, Figure]) -> None:
        self.anchor = f"run-{place}"
        self.found = Findings(folder)
        self._drawn = drawn

    def figure(self, name: str, figure: Figure) -> Html:
        """Return the place where a figure will be drawn."""
        identifier = f"{self.anchor}-{name}"
        self._drawn[identifier] = figure
        return figure_place(identifier, figure["layout"]["height"])


def write_page(runs: Sequence[Path], out: Path) -> None:
    """Write one HTML file that shows the runs and needs no network.

    Raises:
        InputError: if a run has no report, or the file cannot be written.
    """
    drawn: dict[str, Figure] = {}
    loaded = [_Part(folder, place, drawn) for place, folder in enumerate(runs, start=1)]
    body = [
        tag(
            "header",
            tag("h1", "prune2deploy report"),
            tag("p", "What was removed, whether it is faster, and how that is known.", class_="soft"),
        ),
        tag("main", *([_summary(loaded)] if len(loaded) > 1 else []), *(_run_part(part) for part in loaded)),
        tag("footer", tag("p", _footer(loaded), class_="soft small")),
    ]
    write_bytes(out, document(body, drawn).encode())


def document(body: Sequence[Html], drawn: Mapping[str, Figure]) -> str:
    """Return a whole page that needs no network: its body, and the figures by the ids of the elements they go to."""
    from plotly.offline import get_plotlyjs

    style = files("prune2deploy").joinpath("page.css").read_text(encoding="utf-8")
    data = json.dumps(drawn, sort_keys=True, allow_nan=False).replace("<", "\\u003c")
    trouble = "A figure could not be drawn in this browser; every number is in the tables too."
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", "prune2deploy report"),
        tag("style", Html(style)),
        tag("script", Html(_WATCH)),
    )
    scripts = [
        tag("script", Html(data), id="figures", type="application/json"),
        tag("script", Html(get_plotlyjs().replace("</script", "<\\/script"))),
        tag("script", Html(_DRAW)),
    ]
    warning = tag("p", trouble, id="trouble", class_="banner warn")
    return (
        "<!doctype html>\n"
        + tag(
            "html",
            head,
            tag("body", warning, tag("noscript", "The figures need JavaScript."), *body, *scripts),
            lang="en",
        )
        + "\n"
    )


def _summary(parts: Sequence[_Part]) -> Html:
    rows = []
    for part in parts:
        found, ratio, verdict = part.found, part.found.ratio, part.found.verdict
        unjudged = "timed alone" if found.section("bench") else "not measured"
        rows.append(
            [
                tag("a", found.name, href=f"#{part.anchor}"),
                found.section("prune").get("network"),
                found.section("prune").get("method"),
                share_text(found.share("macs")),
                _top1_change(found),
                "–" if ratio is None else f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
                unjudged if verdict is None else verdict["word"],
            ]
        )
    head = ["run", "network", "method", "MACs left", "top-1", "time ratio (95 % interval)", "verdict"]
    return tag("div", tag("h3", f"{len(parts)} runs"), table(head, rows), class_="card")


def _run_part(part: _Part) -> Html:
    found = part.found
    prune = found.section("prune")
    target = prune.get("target") or {}
    facts = [
        ("network", prune.get("network")),
        ("method", prune.get("method")),
        ("target", f"{target['kind']} = {target['share']}" if {"kind", "share"} <= set(target) else None),
        ("data", prune.get("data")),
    ]
    line = " · ".join(f"{name} {value}" for name, value in facts if value)
    parts = [
        tag("h2", found.name),
        tag("p", line, class_="soft") if line else None,
        *_banners(found),
        _tiles(found),
        _latency(part),
        _widths(part),
        _accuracy(part),
        _proof(found),
        _warnings(found),
        _environment(found),
        _repeat(found),
    ]
    return tag("section", *(part for part in parts if part is not None), id=part.anchor)


def _banners(found: Findings) -> Iterable[Html]:
    """Yield what must not be overlooked, in words."""
    if found.nothing_removed:
        yield banner("warn", f"Nothing was removed. {_RESULT}", "The graph is as large as the dense one.")
    verdict = found.verdict
    if verdict is not None:
        kind, title = _VERDICTS[verdict["word"]]
        yield banner(kind, title, f"{_capital(verdict['explanation'])}.")
    elif not found.section("bench"):
        yield banner("none", "Latency was not measured.", "Nothing is claimed about speed; run p2d bench.")
    else:
        yield banner("none", "One model was timed alone.", "Nothing is compared; give p2d bench a second model.")
    if found.disagreeing():
        names = ", ".join(str(one.get("name")) for one in found.disagreeing())
        yield banner("bad", "The outputs differ.", f"Beyond their limit: {names}. The graph must not be used.")
    missing = [text for name, text in _WANTED.items() if not found.section(name)]
    if missing:
        yield banner("none", "Not in this report:", f"{_capital('; '.join(missing))}.")


def _tiles(found: Findings) -> Html | None:
    tiles = []
    if found.ratio is not None:
        sides = f"{found.ratio['arm']} against {found.section('bench')['baseline']}"
        tiles.append(tile("Time", f"{found.ratio['ratio']:.3f}×", sides))
    for label, key in (("MACs", "macs"), ("Parameters", "parameters")):
        before, after = found.change(key)
        if before and after is not None:
            tiles.append(tile(label, share_text(after / before), f"{count_text(before)} → {count_text(after)}"))
    sizes = found.section("slim").get("bytes")
    if sizes:
        change = f"{bytes_text(sizes['before'])} → {bytes_text(sizes['after'])}"
        tiles.append(tile("ONNX file", share_text(sizes["after"] / sizes["before"]), change))
    dense, last = found.top1("dense"), found.top1("last")
    if dense is not None and last is not None:
        tiles.append(tile("Top-1", f"{100 * (last - dense):+.2f} pts", _top1_change(found)))
    return tag("div", *tiles, class_="tiles") if tiles else None


def _latency(part: _Part) -> Html | None:
    bench = part.found.section("bench")
    timings = [*bench.get("timings", []), *([bench["control_timing"]] if bench.get("control_timing") else [])]
    if not timings:
        return None
    columns = ("median_ms", "p90_ms", "mean_ms", "p99_ms", "min_ms", "iqr_ms")
    rows = [[one["arm"], *(ms_text(one.get(key)) for key in columns), count_text(one.get("runs"))] for one in timings]
    head = ["milliseconds", "median", "p90", "mean", "p99", "min", "IQR", "runs"]
    how = (
        f"{bench.get('sessions')} rounds with fresh sessions, {bench.get('iterations')} interleaved runs of each in a "
        f"round, {bench.get('threads')} thread(s), {bench.get('backend', {}).get('name')}, "
        f"input {', '.join(str(one['shape']) for one in bench.get('inputs', {}).values())}. "
        "p99 is left out below 1,000 runs."
    )
    parts: list[Html] = []
    if bench.get("ratios") or bench.get("control"):
        figure = figures.ratio_intervals(bench["ratios"], bench.get("control"), bench["rule"])
        note = (
            f"Bar: 95 % interval over the rounds (pale dots). The control is '{bench['baseline']}' loaded a second "
            "time. Faster means: wholly left of the band and of the control."
        )
        parts.append(card("Against the baseline", note, part.figure("ratios", figure)))
    parts.append(_distribution(part, [one["arm"] for one in timings]))
    verdicts = tag("ul", *(tag("li", one["explanation"]) for one in bench.get("verdicts", [])))
    several = len(bench.get("verdicts", [])) > 1  # one alone is the headline already
    numbers = card("Latency", how, table(head, rows, numbers=True), verdicts if several else None)
    return Html(tag("div", *parts, class_="pair") + numbers)


def _distribution(part: _Part, arms: Sequence[str]) -> Html:
    bench = part.found.section("bench")
    if not part.found.has_samples_of(arms):
        return card("All runs", "The raw timings of this measurement are not in samples/bench.json: none are drawn.")
    control = (bench.get("control_timing") or {}).get("arm")
    samples = {arm: part.found.samples[arm] for arm in arms}
    figure = figures.latency_shares(samples, bench["baseline"], control)
    note = "How many runs took at most so long; further left is faster. The slowest 2 % are off the picture."
    return card("All runs", note, part.figure("latency", figure))


def _widths(part: _Part) -> Html | None:
    slim, prune = part.found.section("slim"), part.found.section("prune")
    source, label = (slim, "") if slim.get("layers") else (prune, ", as planned by the masks")
    layers = source.get("layers") or []
    if not layers:
        return None
    keys = ("before", "after", "macs_before", "macs_after")
    rows = [[one.get("name"), one.get("op_type"), *(count_text(one.get(key)) for key in keys)] for one in layers]
    head = ["layer", "operator", "channels before", "after", "MACs before", "after"]
    numbers = tag("details", tag("summary", f"All {len(layers)} layers in numbers"), table(head, rows, numbers=True))
    note = "Grey sticks out where something was removed."
    channels = figures.layer_bars(layers, "before", "after", "output channels")
    macs = figures.layer_bars(layers, "macs_before", "macs_after", "MACs of one sample")
    pair = tag(
        "div",
        card(f"Channels per layer{label}", note, part.figure("channels", channels)),
        card(f"MACs per layer{label}", note, part.figure("macs", macs)),
        class_="pair",
    )
    return Html(pair + tag("div", numbers, class_="card"))


def _accuracy(part: _Part) -> Html | None:
    prune = part.found.section("prune")
    accuracy = {key: value for key, value in (prune.get("accuracy") or {}).items() if value}
    if not accuracy:
        return card("Accuracy", "It was not measured in this run.") if prune else None
    rows = []
    for key in ("dense", "pruned", "finetuned"):
        if key in accuracy:
            low, high = wilson_interval(accuracy[key]["top1"], accuracy[key]["images"])
            interval = f"{percent_text(low)} to {percent_text(high)}"
            rows.append([key, percent_text(accuracy[key]["top1"]), interval, count_text(accuracy[key]["images"])])
    epochs = prune.get("finetune_epochs")
    note = f"Fine-tuned for {epochs} epoch(s)." if epochs else "Not fine-tuned."
    head = ["network", "top-1", "95 % interval (Wilson)", "images"]
    parts = [card("Accuracy", note, table(head, rows, numbers=True))]
    if prune.get("history"):
        curve = figures.training_curve(prune["history"])
        parts.append(card("Fine-tuning", "", part.figure("training", curve)))
    return tag("div", *parts, class_="pair")


def _proof(found: Findings) -> Html | None:
    verify, slim = found.section("verify"), found.section("slim")
    if not verify and not slim:
        return None
    parts: list[Html | None] = []
    if verify:
        rows = [
            [one.get("name"), _small(one.get("difference")), _small(one.get("limit")), _YES_NO[within_limit(one)]]
            for one in verify.get("outputs", [])
        ]
        cases = f"Compared on {verify.get('cases')} inputs, relative tolerance {_small(verify.get('rtol'))}."
        parts.append(tag("p", cases, class_="soft small"))
        parts.append(table(["output", "largest difference", "limit", "within"], rows))
        parts += [tag("p", f"Note: {caveat}.", class_="soft small") for caveat in caveats(verify)]
    opaque = ", ".join(f"{name} ({count})" for name, count in sorted((slim.get("opaque") or {}).items()))
    if slim:
        removed = slim.get("removed_channels")
        tail = f"Operators left untouched for want of a rule: {opaque}." if opaque else "Every operator had a rule."
        parts.append(tag("p", f"{count_text(removed)} channels were removed. {tail}"))
    return card("Proof", "", *parts)


def _warnings(found: Findings) -> Html | None:
    texts = [text for name in ("prune", "slim", "bench") for text in found.section(name).get("warnings", [])]
    return card("Warnings", "", tag("ul", *(tag("li", text) for text in texts))) if texts else None


def _environment(found: Findings) -> Html | None:
    shown = ("backend", "session", "models", "affinity", "load_average", "seed", "warm_up_seconds")
    bench = {f"bench {name}": found.section("bench").get(name) for name in shown}
    rows = [(name, tag("code", value)) for name, value in _flat({**found.section("environment"), **bench})]
    if not rows:
        return None
    return card("Environment", "", tag("details", tag("summary", "Machine, versions, settings"), table([], rows)))


def _repeat(found: Findings) -> Html:
    recipe = found.report.get("recipe")
    if recipe is None:
        return card("Repeat it", "There is no recipe.toml in this run's folder, so the command is not known.")
    command = f"p2d run {shlex.quote(f'{found.name}/recipe.toml')} -o {shlex.quote(f'{found.name}-again')}"
    return card("Repeat it", "The recipe holds every setting.", tag("pre", command), tag("pre", recipe))


def _footer(parts: Sequence[_Part]) -> str:
    versions = sorted({str((part.found.report.get("tool") or {}).get("version")) for part in parts})
    return f"Made by prune2deploy {', '.join(versions)}. This file needs no network."


def _top1_change(found: Findings) -> str:
    dense, last = found.top1("dense"), found.top1("last")
    return percent_text(last) if dense is None else f"{percent_text(dense)} → {percent_text(last)}"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield a nested object's leaves with their dotted names; what is not known is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], ""):
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
