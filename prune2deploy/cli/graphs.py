"""Commands that take any ONNX file: slim, verify, inspect, bench."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from prune2deploy.cli.options import Json, Model, Shapes, Strict, parse_numbers, parse_round_to, parse_shapes
from prune2deploy.cli.output import emit, progress
from prune2deploy.errors import InputError, StrictError


def slim(
    model: Model,
    target: Annotated[Path, typer.Option("-o", "--out", metavar="SLIM.onnx", help="The slim file.")],
    round_to: Annotated[
        str, typer.Option(metavar="N|PRECISION", help="Keep dead channels so that widths are multiples.")
    ] = "1",
    rtol: Annotated[float, typer.Option(help="Difference allowed, relative to each output channel's scale.")] = 1e-4,
    drop: Annotated[
        Path | None,
        typer.Option(metavar="DROP.json", help="Channels to silence first, by name; this changes the function."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="EPS", help="Zero weights below EPS times their layer's largest; changes the function."),
    ] = None,
    range_: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="LOW,HIGH",
            help="What the inputs hold, such as 0,255, for the bound of --tolerance; -3,3 unless given.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say why each channel went, and what keeps each dead one that stayed.")
    ] = False,
    input_: Shapes = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 5 if nothing was removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove the dead channels of any ONNX file; the result is written only after it was verified.

    A drop file holds {"conv1.weight": [0, 3]} by the names of weights or values, a pruning_history() of Torch-Pruning
    as JSON, or the masks.safetensors of a run.
    """
    from rich.console import Group

    from prune2deploy.rounding import multiple_of
    from prune2deploy.screen import proof_lines, reasons_tree, slim_summary
    from prune2deploy.slim import Options, reasons, slim_file, slim_section

    ends = parse_numbers("--range", range_) or (-3.0, 3.0)
    if len(ends) != 2 or not ends[0] <= ends[1]:
        raise InputError(f"--range '{range_}' is not LOW,HIGH; write it like 0,255")
    if range_ is not None and tolerance is None:
        raise InputError("--range is for the bound of --tolerance, which is not given; leave it out")
    options = Options(multiple_of(parse_round_to(round_to)), rtol, drop, tolerance, (ends[0], ends[1]))
    with progress() as live:
        slimmed = slim_file(model, target, options, shapes=parse_shapes(input_), note=live.note)
    section = slim_section(model, target, slimmed)
    document: dict[str, Any] = {"slim": section | {"verify": slimmed.proof}}
    parts = [slim_summary(section, target), proof_lines(document["slim"]["verify"], "before and after")]
    if explain:
        document["explain"] = reasons(model, slimmed)
        parts.append(reasons_tree(document["explain"]))
    emit(document, Group(*parts), as_json=as_json)
    if strict and not slimmed.removed_channels:
        raise StrictError(f"no channel of '{model}' is dead")


def verify(
    reference: Annotated[Path, typer.Argument(metavar="A.onnx", help="The graph that is right.")],
    candidate: Annotated[Path, typer.Argument(metavar="B.onnx", help="The graph that must agree.")],
    rtol: Annotated[float, typer.Option(help="Difference allowed, relative to each output channel's scale.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    input_: Shapes = None,
    as_json: Json = False,
) -> None:
    """Check that two ONNX files compute the same; exit with 3 if they do not."""
    from rich.console import Group

    from prune2deploy.graph.model import load_model
    from prune2deploy.graph.verify import verify as compare
    from prune2deploy.screen import plain_table, proof_lines

    for path in (reference, candidate):
        load_model(path)
    with progress() as live:
        live.note("running both")
        found = compare(reference, candidate, rtol=rtol, seed=seed, shapes=parse_shapes(input_))
    rows = [(one.name, f"{one.difference:.2e}", f"{one.limit:.2e}", one.where) for one in found.outputs]
    shown = plain_table(("output", "difference", "limit", "worst on"), rows)
    emit({"verify": found.to_json()}, Group(shown, proof_lines(found.to_json(), "the two")), as_json=as_json)


def inspect(
    target: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx|RUN", help="An ONNX file, or a run (its masked graph).")
    ],
    values: Annotated[bool, typer.Option("--values", help="Also what is known of every value's channels.")] = False,
    as_json: Json = False,
) -> None:
    """Show layers, widths, MACs and parameters, and what slimming would leave of them."""
    from rich.console import Group

    from prune2deploy.graph.inspect import inspect_model
    from prune2deploy.graph.model import load_model
    from prune2deploy.screen import layer_table, plain_table, value_table

    path = target / "masked.onnx" if target.is_dir() else target
    if target.is_dir() and not path.exists():
        raise InputError(f"'{target}' is a folder without masked.onnx, so no exported run; name a run or an ONNX file")
    found = inspect_model(load_model(path))
    named = (("MACs", "macs"), ("parameters", "parameters"), ("bytes", "bytes"))
    totals = [(name, f"{found[key]['before']:,}", f"{found[key]['after']:,}") for name, key in named]
    parts: list[RenderableType] = [layer_table(found["layers"]), plain_table(("total", "now", "slim"), totals)]
    if values:
        parts.append(value_table(found["values"]))
    if found["opaque"]:
        parts.append(plain_table(("operator without a rule", "nodes"), list(found["opaque"].items())))
    emit(found, Group(*parts), as_json=as_json)


def bench(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help="ONNX files, the first is the baseline; or one RUN.")
    ],
    backend: Annotated[str | None, typer.Option(help="A name of 'p2d backends'.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Size of a dynamic first axis.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads, pinned.")] = None,
    sessions: Annotated[int | None, typer.Option(min=5, help="Rounds with fresh sessions.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.01, help="Time for each model in each round.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Runs in each round, in place of --seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs and the order of runs.")] = 0,
    input_: Shapes = None,
    against: Annotated[
        Path | None, typer.Option(metavar="REPORT.json", help="Exit with 5 if slower than this report says.")
    ] = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Time models against the first one: interleaved, in fresh sessions, with intervals and an A/A control."""
    from prune2deploy import pipeline
    from prune2deploy.screen import bench_summary

    earlier = None if against is None else pipeline.earlier_ratio(against, models)
    options: dict[str, Any] = {
        "batch": batch,
        "threads": threads,
        "sessions": sessions,
        "seconds": seconds,
        "iterations": iterations,
        "backend": backend,
    }
    given = {key: value for key, value in options.items() if value is not None} | {"shapes": parse_shapes(input_)}
    with progress() as live:
        if len(models) == 1 and models[0].is_dir():
            recipe = pipeline.load_run(models[0])
            found = pipeline.bench_run(models[0], recipe, note=live.note, on_progress=live.rounds, seed=seed, **given)
        else:
            found = pipeline.bench(models, note=live.note, on_progress=live.rounds, seed=seed, **given)
    section = found.to_json()
    emit({"bench": section}, bench_summary(section), as_json=as_json)
    if earlier is not None and against is not None:
        pipeline.require_no_slower(found, earlier, against)
    if strict:
        slow = next((one for one in found.verdicts if one.word != "faster"), None)
        if slow is not None:
            raise StrictError(slow.explanation)
