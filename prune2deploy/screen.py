"""What a person sees in the terminal: tables of results, and progress. Builds renderables; only `cli` prints them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from prune2deploy.findings import Findings, caveats


class _Warnings(logging.Handler):
    """Prints warnings, a line each."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(Text(f"warning: {record.getMessage()}", style="yellow"), soft_wrap=True)


class Live:
    """Progress on stderr: one line that says what happens now; silent where stderr is no terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, detail="")
        self._counts = False

    @contextmanager
    def shown(self) -> Iterator["Live"]:
        """Show the line while the block runs, and above it, terminal or not, the warnings of what runs."""
        said = _Warnings(self._progress.console)
        logger = logging.getLogger("prune2deploy")
        logger.addHandler(said)
        try:
            with self._progress:
                yield self
        finally:
            logger.removeHandler(said)

    def note(self, text: str) -> None:
        """Say what happens now; a count of trials or groups, of which it is a part, stays."""
        if self._counts:
            self._progress.update(self._task, description=text)
            return
        self._progress.remove_task(self._task)  # to reset it would leave the total of what is over
        self._task = self._progress.add_task(text, total=None, detail="")

    def training(self, at: Any) -> None:
        """Show a training step (`train.Progress`)."""
        total, done = at.epochs * at.steps, (at.epoch - 1) * at.steps + at.step
        detail = f"epoch {at.epoch}/{at.epochs}  loss {at.loss:.3f}"
        if at.top1 is not None:
            detail += f"  held-out accuracy {100 * at.top1:.2f} %"
        self._progress.update(self._task, total=total, completed=done, detail=detail)

    def trials(self, done: int, total: int) -> None:
        """Show how many trials of a comparison are done, of those known so far."""
        self._counts = True
        self._progress.update(self._task, total=total, completed=done, detail=f"trial {done}/{total}")

    def groups(self, done: int, total: int) -> None:
        """Show how many groups were pruned alone."""
        self._counts = True
        self._progress.update(self._task, total=total, completed=done, detail=f"{done}/{total} groups done")

    def rounds(self, done: int, total: int) -> None:
        """Show how many rounds of sessions were timed."""
        self._progress.update(self._task, total=total, completed=done, detail=f"round {done}/{total}")


def run_summary(run: Path) -> RenderableType:
    """Return what a run reached: sizes, accuracy, proof and latency, and loudly what is no success."""
    found = Findings(run)
    parts: list[RenderableType] = [_sizes(found)]
    if found.section("verify"):
        parts.append(proof_lines(found.section("verify"), "masked and slim"))
    verdict = found.verdict
    if verdict:
        parts.append(Text(f"latency: {verdict['explanation']}"))
    parts += [warning(text) for text in loud(found)]
    parts += [Text(f"note: {text}", style="yellow") for text in _warnings(found)]
    return Group(*parts)


def proof_lines(verify: Mapping[str, Any], graphs: str) -> RenderableType:
    """Return how well two graphs agree (of the section ``verify``), and what that does not prove."""
    worst = max(verify["outputs"], key=lambda one: one["relative"], default=None)
    text = f"proof: {graphs} agree on {verify['cases']} kinds of input"
    if worst is not None:
        allowed = f"{worst['limit']:.1e} allowed ({verify['rtol']:.0e} of the channel's scale)"
        text += f"; largest difference {worst['difference']:.1e}, {allowed}"
    return Group(Text(text), *(Text(f"note: {caveat}", style="yellow") for caveat in caveats(verify)))


def loud(found: Findings) -> list[str]:
    """Return what must not pass for a success."""
    texts = []
    if found.nothing_removed:
        texts.append(
            "NOTHING WAS REMOVED: the slim graph is as large as the dense one. That is a result, not a success."
        )
    verdict = found.verdict
    if verdict and verdict["word"] != "faster":
        texts.append(f"NOT FASTER: {verdict['explanation']}. That is a result, not a success.")
    return texts


def warning(text: str) -> Panel:
    """Return a loud box."""
    return Panel(Text(text, style="bold"), border_style="red", expand=False)


def _warnings(found: Findings) -> list[str]:
    return [text for name in ("prune", "slim", "bench") for text in found.section(name).get("warnings", [])]


def _sizes(found: Findings) -> Table:
    table = Table("", "dense", "slim", "left", title=found.name, title_justify="left")
    for name, label in (("macs", "MACs"), ("parameters", "parameters")):
        before, after = found.change(name)
        if before is not None and after is not None:
            table.add_row(label, f"{before:,}", f"{after:,}", f"{100 * after / before:.1f} %" if before else "")
    accuracy = found.section("prune").get("accuracy") or {}
    for name, label in (("pruned", "accuracy as masked"), ("finetuned", "accuracy fine-tuned")):
        if accuracy.get(name) and accuracy.get("dense"):
            table.add_row(label, _percent(accuracy["dense"]), _percent(accuracy[name]), "")
    timings = {one["arm"]: one["median_ms"] for one in found.section("bench").get("timings", [])}
    ratio = found.ratio
    if ratio is not None and ratio["arm"] in timings:
        base = found.section("bench")["baseline"]
        interval = f"{ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        table.add_row("latency, median", f"{timings[base]:.3f} ms", f"{timings[ratio['arm']]:.3f} ms", interval)
    return table


def _percent(accuracy: Mapping[str, Any]) -> str:
    return f"{100 * accuracy['top1']:.2f} %"


def layer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the layers with their widths, MACs, parameters and bytes before and after."""
    table = Table("layer", "operator", "width", "MACs", "parameters", "bytes")
    for row in rows:
        table.add_row(
            Text(row["name"]),
            row["op_type"],
            _arrow(row["before"], row["after"]),
            _arrow(row["macs_before"], row["macs_after"]) if row["kind"] == "linear" else "",
            _arrow(row["parameters_before"], row["parameters_after"]),
            _arrow(row["bytes_before"], row["bytes_after"]),
        )
    return table


def _arrow(before: int | None, after: int | None) -> str:
    if before is None:
        return "dynamic"
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def slim_summary(section: Mapping[str, Any], target: Path) -> RenderableType:
    """Return what slimming one file reached."""
    table = Table("", "before", "after", title=str(target), title_justify="left")
    for name in ("macs", "parameters", "bytes"):
        before, after = section[name]["before"], section[name]["after"]
        table.add_row(name if name != "macs" else "MACs", f"{before:,}", f"{after:,}")
    seconds = section["seconds"]
    lines: list[RenderableType] = [
        table,
        Text(
            f"{section['removed_channels']:,} channels removed; "
            + ", ".join(
                f"{name} {seconds[name]:.2f} s" for name in ("read", "normalise", "analysis", "rewrite", "write")
            )
        ),
    ]
    if section["opaque"]:
        listed = ", ".join(f"{name} ({count})" for name, count in section["opaque"].items())
        lines.append(Text(f"operators without a rule, around which everything stays: {listed}"))
    if section["unread_inputs"]:
        names = ", ".join(f"'{name}'" for name in section["unread_inputs"])
        lines.append(warning(f"NO OUTPUT DEPENDS ON {names} ANY MORE: what reads it was constant."))
    if section.get("drops"):
        lines.append(Text(_drops(section["drops"]), style="yellow"))
    if section.get("tolerance"):
        lines.append(Text(_zeroed(section["tolerance"]), style="yellow"))
    if not section["removed_channels"]:
        lines.append(warning("NOTHING WAS REMOVED: no channel of this graph is dead."))
    return Group(*lines)


def _zeroed(tolerance: Mapping[str, Any]) -> str:
    """Return which near-dead weights were zeroed, what that can change at most, and what it was seen to change."""
    ranges = "; ".join(f"'{name}' in [{low:g}, {high:g}]" for name, (low, high) in tolerance["range"].items())
    lines = [
        f"note: the function changed, as --tolerance asked: {tolerance['weights']:,} weights below "
        f"{tolerance['eps']:g} of their layer's largest are zero now, {tolerance['filters']:,} whole filters among "
        f"them. For {ranges or 'any input'}:"
    ]
    for one in tolerance["outputs"]:
        largest, culprit = one["bound"]["largest"], one["bound"]["unbounded_by"]
        if largest is None:
            limit = ": no bound on how far it moves is known" + (f" (because of {culprit})" if culprit else "")
        else:
            limit = f" moves by at most {largest:.2e} in exact arithmetic"
        seen = "no finite number" if one["measured"] is None else f"{one['measured']:.2e}, rounding included"
        seen += f" ({one['computed_in']}" + (f": about {one['rounding']:.0e})" if one["rounding"] else ")")
        lines.append(f"  '{one['name']}'{limit}; measured {seen}")
    return "\n".join(lines)


def _drops(drops: Mapping[str, Any]) -> str:
    """Return what was silenced first and what that changed; `slim` proves the rest against the silenced graph."""
    listed = ", ".join(f"{name} ({count})" for name, count in drops["channels"].items())
    changes = "; ".join(
        f"'{one['name']}' by up to {one['change']:.2e} in a channel that reaches {one['scale']:.2e}"
        for one in drops["outputs"]
    )
    return f"note: the function changed, as --drop asked: silenced {listed}; that moves {changes}"


def reasons_tree(layers: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return why channels went and what keeps dead ones, layer by layer (of `LayerReasons.to_json`)."""
    if not layers:
        return Text("no layer lost channels or keeps dead ones")
    tree = Tree("why")
    for layer in layers:
        change = "removed whole" if layer["gone"] else f"{layer['before']} → {layer['after']}"
        if layer.get("near_dead"):
            change += f"; {layer['near_dead']} of its filters were near-dead"
        branch = tree.add(Text(f"{layer['layer']} ({layer['op_type']}): {change}", style="bold"))
        for name, title, style in (("removed", "removed", "green"), ("kept", "dead but kept", "yellow")):
            for reason in _summed(layer[name]):
                branch.add(Text(f"{title}: {_ranges(reason['channels'])}: {reason['why']}", style=style))
    return tree


MANY_CONSTANTS = 2
"""So many different constants in one layer are shown as one line."""


def _summed(reasons: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return reasons with those that differ only in the constant as one, where they are many."""
    by_ties: dict[int, list[Mapping[str, Any]]] = {}
    for reason in reasons:
        if reason.get("kind") == "constant":
            by_ties.setdefault(reason.get("tied", 0), []).append(reason)
    many = {ties: found for ties, found in by_ties.items() if len(found) >= MANY_CONSTANTS}
    shown = [one for one in reasons if not (one.get("kind") == "constant" and one.get("tied", 0) in many)]
    for ties, found in many.items():
        values = [one["value"] for one in found]
        why = f"constants from {min(values):g} to {max(values):g}" + (f", like the {ties} tied to each" if ties else "")
        shown.insert(0, {"channels": sorted(k for one in found for k in one["channels"]), "why": why})
    return shown


def _ranges(indices: Sequence[int]) -> str:
    """Return indices in order with runs joined, as 0-3, 7; long lists end in a count."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs[:8]]
    return ", ".join(shown) + (f", … ({len(indices)} in all)" if len(runs) > 8 else "")


def bench_summary(section: Mapping[str, Any]) -> RenderableType:
    """Return the timings, ratios and verdicts of a comparison."""
    table = Table("model", "median", "p90", "p99", "runs", "ratio to the first [95 %]")
    ratios = {one["arm"]: one for one in section["ratios"]}
    control = section["control"]
    timings = list(section["timings"]) + ([section["control_timing"]] if section["control_timing"] else [])
    for one in timings:
        ratio = ratios.get(one["arm"]) or (control if control and control["arm"] == one["arm"] else None)
        table.add_row(
            Text(one["arm"]),
            f"{one['median_ms']:.3f} ms",
            f"{one['p90_ms']:.3f} ms",
            "-" if one["p99_ms"] is None else f"{one['p99_ms']:.3f} ms",
            f"{one['runs']:,}",
            "" if ratio is None else f"{ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        )
    lines: list[RenderableType] = [table]
    for verdict in section["verdicts"]:
        text = f"{verdict['word'].upper()}: {verdict['explanation']}"
        lines.append(Text(text, style="green") if verdict["word"] == "faster" else warning(text))
    lines += [Text(f"note: {text}", style="yellow") for text in section["warnings"]]
    return Group(*lines)


def value_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return what the analysis knows of every value with channels."""
    table = Table("value", "channels", "constant", "aliases", "live", "kept", "needed by")
    for row in rows:
        table.add_row(
            *(Text(str(row[key])) for key in ("value", "channels", "constant", "aliases", "live", "kept", "reader"))
        )
    return table


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Return a plain table; what does not fit is folded, never cut off."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # as Text, so that [brackets] are not taken for styles
    return table
