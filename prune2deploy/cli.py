"""The command line: one function per command, and the only place that prints and exits."""

import errno
import inspect as inspect_module
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from prune2deploy import __version__, ranks
from prune2deploy.errors import InputError, P2DError, StrictError, one_line

SCHEMA_VERSION = 1
INTERRUPTED = 130

app = typer.Typer(
    name="p2d",
    help="Prune a CNN, remove the dead channels from its ONNX graph with proof, and measure latency honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120, quiet=not ranks.is_first())
err = Console(stderr=True, highlight=False, quiet=not ranks.is_first())

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document in place of tables.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="RUN", help="Folder of the run.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME:SHAPE", help="Shape of an input with dynamic axes, as input:1,3,224,224."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 5 if nothing was removed or it is not faster.")]


def main() -> None:
    """Run the command line; user errors end in one line on stderr, bugs keep their traceback."""
    try:
        app()
    except P2DError as error:
        _fail(one_line(error, 2000), error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"the disk is full ({error.filename or 'while writing'}); free some space and run it again", 2)
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            _fail("interrupted; files that were being written keep their earlier contents", INTERRUPTED)
        raise


def _fail(message: str, code: int) -> None:
    print(f"p2d: {message}", file=sys.stderr)
    sys.exit(code)


def _emit(document: dict[str, Any], shown: RenderableType, *, as_json: bool) -> None:
    if as_json and ranks.is_first():
        print(json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=1, sort_keys=True))
    elif not as_json:
        out.print(shown)


@contextmanager
def _live() -> Iterator[Any]:
    from prune2deploy.screen import Live

    with Live(err).shown() as live:
        yield live


def _version(value: bool) -> None:
    if value:
        print(f"p2d {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def prune(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK|MODEL.onnx", help="A name of 'p2d networks', FILE.py:FACTORY, or an ONNX file."
        ),
    ],
    run: Out,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint: safetensors, or .pt with tensors only.")] = None,
    data: Annotated[
        str, typer.Option(help="digits, cifar10:DIR, cifar100:DIR, imagefolder:DIR or FILE.py:FACTORY.")
    ] = "digits",
    method: Annotated[str, typer.Option(help="A name of 'p2d methods'.")] = "l1",
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of the method.")] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Of fbs: fold its gates and remove what images never use (another method).")
    ] = False,
    target: Annotated[
        str | None, typer.Option(help="What is to remain: macs=SHARE or params=SHARE; macs=0.5 unless given.")
    ] = None,
    round_to: Annotated[
        str,
        typer.Option(metavar="N|PRECISION", help="Round tensor widths to the nearest multiples that keep the target."),
    ] = "1",
    ranking: Annotated[
        str | None,
        typer.Option(help="uniform: all groups keep one share; global: channels compete. Else as the method does."),
    ] = None,
    widths_of: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Keep as many channels as this run does, in place of a target.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave layers whose parameters match whole.")
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=WIDTH", help="Keep that many channels of matching groups, or that share (0.5)."),
    ] = None,
    floors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The floors that 'p2d sensitivity' suggests: its JSON file.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the pruned widths from new weights: a control.")
    ] = False,
    finetune_epochs: Annotated[int, typer.Option(min=0, help="Train the masked network on for so many epochs.")] = 0,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest of fine-tuning; 0.05 unless given, 0.001 with adamw.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a training step.")] = 128,
    optimizer: Annotated[str, typer.Option(help="Of fine-tuning: sgd or adamw.")] = "sgd",
    weight_decay: Annotated[float, typer.Option(help="Of convolutions and linear layers.")] = 5e-4,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target that all classes get.")] = 0.0,
    ema: Annotated[float, typer.Option(help="Decay of a moving average of the weights, as 0.999; 0: none.")] = 0.0,
    distill: Annotated[bool, typer.Option("--distill", help="Fine-tune towards the dense network's answers.")] = False,
    precision: Annotated[str, typer.Option(help="Of fine-tuning: fp32, bf16, or auto: bf16 where it pays.")] = "auto",
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write the epochs as TensorBoard's events.")
    ] = False,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure BatchNorm statistics anew after masking.")
    ] = False,
    samples: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Real inputs of an ONNX file by name, as it takes them.")
    ] = None,
    input_: Annotated[
        str | None, typer.Option("--input", metavar="NAME:SHAPE", help="Shape of one sample, as input:3,32,32.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Normalisation by channel, as 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Normalisation by channel, as 0.2,0.2,0.2.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    as_json: Json = False,
) -> None:
    """Choose the channels to remove, mask them, fine-tune, and write masks and weights to RUN.

    An ONNX file is pruned without PyTorch and slimmed at once; it is not fine-tuned.
    """
    from prune2deploy import pipeline
    from prune2deploy.recipe import make_recipe, resolved
    from prune2deploy.report import read_report
    from prune2deploy.screen import run_summary
    from prune2deploy.sensitivity import load_floors

    if widths_of is not None:
        _require_alone(
            "--widths-of takes another run's widths as they are",
            {"--target": target, "--ranking": ranking, "--floor": floor, "--floors": floors}
            | ({} if round_to == "1" else {"--round-to": round_to}),
        )
    recipe = make_recipe(
        {
            "network": network,
            "weights": None if weights is None else str(weights),
            "data": data,
            "samples": None if samples is None else str(samples),
            "method": method,
            "method_options": dict(_key_value(text) for text in option or []) | ({"static": True} if static else {}),
            "target": "macs=0.5" if target is None else target,
            "round_to": _round_to(round_to),
            "ranking": ranking,
            "floors": (load_floors(floors) if floors else {}) | dict(_floor(text) for text in floor or []),
            "from_scratch": from_scratch,
            "keep": tuple(keep or ()),
            "recalibrate": recalibrate,
            "input_shape": next(iter(_shapes([input_] if input_ else None).values()), None),
            "mean": _numbers("--mean", mean),
            "std": _numbers("--std", std),
            "seed": seed,
            "device": device,
            "threads": threads,
            "finetune": {
                "epochs": finetune_epochs,
                "optimizer": optimizer,
                "batch_size": batch_size,
                "weight_decay": weight_decay,
                "label_smoothing": label_smoothing,
                "ema": ema,
                "distill": distill,
                "precision": precision,
                "tensorboard": tensorboard,
            }
            | ({} if learning_rate is None else {"learning_rate": learning_rate}),
        }
    )
    recipe = resolved(recipe, Path.cwd())
    if widths_of is not None:
        recipe = recipe.model_copy(update={"widths": pipeline.widths_of_run(widths_of, recipe.network)})
    with _live() as live:
        pipeline.prune(recipe, run, note=live.note, on_progress=live.training)
    if not ranks.is_first():
        return
    _emit({"prune": read_report(run)["prune"]}, run_summary(run), as_json=as_json)
    _say(f"next: p2d {'bench' if recipe.is_onnx else 'export'} {run}", as_json=as_json)


def _say(text: str, *, as_json: bool) -> None:
    if not as_json:
        out.print(text, soft_wrap=True)


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--option '{text}' is not KEY=VALUE; write it like --option score=std")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _require_alone(reason: str, others: dict[str, Any]) -> None:
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise InputError(f"{reason}; leave {given[0]} out")


def _round_to(text: str) -> int | str:
    from prune2deploy.rounding import multiple_of

    value = int(text) if text.isdecimal() else text
    multiple_of(value)
    return value


def _floor(text: str) -> tuple[str, float]:
    pattern, _, width = (part.strip() for part in text.rpartition("="))
    try:
        value = int(width) if width.isdecimal() else float(width)
    except ValueError:
        value = 0
    fits = value >= 1 if isinstance(value, int) else 0 < value <= 1
    if not pattern or not fits:
        raise InputError(f"--floor '{text}' is not PATTERN=WIDTH; write it like 'layer1.*=8' or 'layer1.*=0.5'")
    return pattern, value


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{name} '{text}' is not a list of numbers; write it like 0.5,0.5,0.5") from error


def _shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    found = {}
    for text in texts or []:
        name, colon, sizes = text.rpartition(":")
        try:
            shape = tuple(int(part) for part in sizes.replace("x", ",").split(","))
        except ValueError:
            shape = ()
        if not name or not colon or not shape or min(shape) < 1:
            raise InputError(f"--input '{text}' is not NAME:SHAPE; write it like input:1,3,224,224")
        found[name] = shape
    return found


@app.command()
def export(
    run: Run,
    trt: Annotated[bool, typer.Option("--trt", help="Also build the TensorRT engine.")] = False,
    torch: Annotated[bool, typer.Option("--torch", help="Also write the narrow PyTorch network, to train on.")] = False,
    precision: Annotated[str, typer.Option(help="Of the engine: fp32 or tf32.")] = "fp32",
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write dense.onnx, masked.onnx and, once it is verified, slim.onnx of RUN."""
    from prune2deploy import pipeline
    from prune2deploy.backends.tensorrt import PRECISIONS
    from prune2deploy.report import read_report
    from prune2deploy.screen import run_summary

    if trt and precision not in PRECISIONS:
        raise InputError(f"--precision '{precision}' cannot be built; this version builds {' and '.join(PRECISIONS)}")
    with _live() as live:
        pipeline.export(run, torch=torch, note=live.note)
    report = read_report(run)
    _emit({name: report[name] for name in ("export", "slim", "verify")}, run_summary(run), as_json=as_json)
    _say(f"slim graph: {run / 'slim.onnx'}", as_json=as_json)
    if torch:
        _say(f"narrow network: prune2deploy.load_narrow(FACTORY, '{run / 'narrow'}')", as_json=as_json)
    if trt:
        with _live() as live:
            built = pipeline.build_engine(run, precision, note=live.note)
        _say(f"engine: {built.engine} ({built.size_bytes:,} bytes, TensorRT {built.tensorrt})", as_json=as_json)
    _require_success(run, strict=strict)


def _require_success(run: Path, *, strict: bool) -> None:
    from prune2deploy.findings import Findings
    from prune2deploy.screen import loud

    if strict and (texts := loud(Findings(run))):
        raise StrictError(texts[0])


@app.command()
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

    ends = _numbers("--range", range_) or (-3.0, 3.0)
    if len(ends) != 2 or not ends[0] <= ends[1]:
        raise InputError(f"--range '{range_}' is not LOW,HIGH; write it like 0,255")
    if range_ is not None and tolerance is None:
        raise InputError("--range is for the bound of --tolerance, which is not given; leave it out")
    options = Options(multiple_of(_round_to(round_to)), rtol, drop, tolerance, (ends[0], ends[1]))
    with _live() as live:
        slimmed = slim_file(model, target, options, shapes=_shapes(input_), note=live.note)
    section = slim_section(model, target, slimmed)
    document: dict[str, Any] = {"slim": section | {"verify": slimmed.proof}}
    parts = [slim_summary(section, target), proof_lines(document["slim"]["verify"], "before and after")]
    if explain:
        document["explain"] = reasons(model, slimmed)
        parts.append(reasons_tree(document["explain"]))
    _emit(document, Group(*parts), as_json=as_json)
    if strict and not slimmed.removed_channels:
        raise StrictError(f"no channel of '{model}' is dead")


@app.command()
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
    with _live() as live:
        live.note("running both")
        found = compare(reference, candidate, rtol=rtol, seed=seed, shapes=_shapes(input_))
    rows = [(one.name, f"{one.difference:.2e}", f"{one.limit:.2e}", one.where) for one in found.outputs]
    shown = plain_table(("output", "difference", "limit", "worst on"), rows)
    _emit({"verify": found.to_json()}, Group(shown, proof_lines(found.to_json(), "the two")), as_json=as_json)


@app.command()
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
    given = {key: value for key, value in options.items() if value is not None} | {"shapes": _shapes(input_)}
    with _live() as live:
        if len(models) == 1 and models[0].is_dir():
            recipe = pipeline.load_run(models[0])
            found = pipeline.bench_run(models[0], recipe, note=live.note, on_progress=live.rounds, seed=seed, **given)
        else:
            found = pipeline.bench(models, note=live.note, on_progress=live.rounds, seed=seed, **given)
    section = found.to_json()
    _emit({"bench": section}, bench_summary(section), as_json=as_json)
    if earlier is not None and against is not None:
        pipeline.require_no_slower(found, earlier, against)
    if strict:
        slow = next((one for one in found.verdicts if one.word != "faster"), None)
        if slow is not None:
            raise StrictError(slow.explanation)


@app.command()
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
    _emit(found, Group(*parts), as_json=as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    target: Annotated[Path, typer.Option("-o", "--out", metavar="PAGE.html", help="The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from prune2deploy.page import write_page

    write_page(runs, target)
    out.print(f"page: {target}", soft_wrap=True)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="A recipe, such as RUN/recipe.toml.")],
    target: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last whole step, or epoch.")] = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Walk the whole way: prune, fine-tune, export, slim, verify, time, report."""
    from prune2deploy import pipeline
    from prune2deploy.recipe import load_recipe
    from prune2deploy.report import read_report
    from prune2deploy.screen import run_summary

    resolved = load_recipe(recipe)
    with _live() as live:
        pipeline.walk(resolved, target, resume=resume, note=live.note, on_progress=live.training, on_round=live.rounds)
    if not ranks.is_first():
        return
    _emit(read_report(target), run_summary(target), as_json=as_json)
    for name, what in _RESULTS:
        _say(f"{what:<14} {target / name}", as_json=as_json)
    _require_success(target, strict=strict)


_RESULTS = (
    ("report.html", "report page"),
    ("report.json", "numbers"),
    ("dense.onnx", "dense graph"),
    ("slim.onnx", "slim graph"),
    ("masks.safetensors", "masks"),
    ("recipe.toml", "recipe"),
)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="Methods, targets, seeds and what they share.")],
    target: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the comparison.")],
    jobs: Annotated[int, typer.Option(min=1, help="Trials at once on this machine.")] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run trials on a ray cluster: local, auto, or its address.")
    ] = None,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Time the slim graphs after all trials.")] = True,
    as_json: Json = False,
) -> None:
    """Compare methods x targets x seeds with controls at equal widths: one table and the accuracy-latency picture.

    What is done is skipped, so the same command goes on after a kill.
    """
    from prune2deploy import compare as comparing
    from prune2deploy.comparison import HEAD, cells
    from prune2deploy.screen import plain_table

    loaded = comparing.load_compare_recipe(recipe)
    with _live() as live:
        found = comparing.compare(loaded, target, jobs=jobs, ray=ray, bench=bench, note=live.note, on_trial=live.trials)
    _emit(found, plain_table(HEAD, [cells(row) for row in found["rows"]]), as_json=as_json)
    for name, what in (("compare.html", "page"), ("compare.md", "table"), ("compare.json", "numbers")):
        _say(f"{what:<14} {target / name}", as_json=as_json)


@app.command()
def sensitivity(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help="A name of 'p2d networks', or FILE.py:FACTORY.")],
    target: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the results.")],
    weights: Annotated[Path | None, typer.Option(help="Checkpoint: safetensors, or .pt with tensors only.")] = None,
    data: Annotated[
        str, typer.Option(help="digits, cifar10:DIR, cifar100:DIR, imagefolder:DIR or FILE.py:FACTORY.")
    ] = "digits",
    method: Annotated[str, typer.Option(help="A name of 'p2d methods' that does not train.")] = "l1",
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of the method.")] = None,
    shares: Annotated[str, typer.Option(help="Shares of a group's channels to remove.")] = "0.125,0.25,0.5,0.75",
    images: Annotated[int, typer.Option(min=1, help="Held-out images to measure on, at most.")] = 2000,
    recalibrate: Annotated[
        bool,
        typer.Option("--recalibrate/--no-recalibrate", help="Measure BatchNorm statistics anew each time, or do not."),
    ] = True,
    tolerance: Annotated[float, typer.Option(help="Share of top-1 that a suggested floor may cost.")] = 0.02,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave layers whose parameters match whole.")
    ] = None,
    input_: Annotated[
        str | None, typer.Option("--input", metavar="NAME:SHAPE", help="Shape of one sample, as input:3,32,32.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Normalisation by channel, as 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Normalisation by channel, as 0.2,0.2,0.2.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    as_json: Json = False,
) -> None:
    """Prune every group of channels alone, measure the accuracy on held-out images, and suggest floors for 'p2d prune'.

    A call that was interrupted goes on where it stopped. Nothing is trained.
    """
    from prune2deploy.recipe import make_recipe, resolved
    from prune2deploy.screen import plain_table
    from prune2deploy.sensitivity import NAME, Survey, measure_sensitivity
    from prune2deploy.sensitivity_page import head, rows, write_sensitivity

    survey = Survey(_numbers("--shares", shares) or (), images, recalibrate, tolerance)
    recipe = make_recipe(
        {
            "network": network,
            "weights": None if weights is None else str(weights),
            "data": data,
            "method": method,
            "method_options": dict(_key_value(text) for text in option or []),
            "keep": tuple(keep or ()),
            "input_shape": next(iter(_shapes([input_] if input_ else None).values()), None),
            "mean": _numbers("--mean", mean),
            "std": _numbers("--std", std),
            "seed": seed,
            "device": device,
            "threads": threads,
        }
    )
    with _live() as live:
        found = measure_sensitivity(resolved(recipe, Path.cwd()), survey, target, note=live.note, on_group=live.groups)
        live.note("writing the page")
        write_sensitivity(found, target / "sensitivity.html")
    _emit({"sensitivity": found}, plain_table(head(found), rows(found)), as_json=as_json)
    _say(f"page: {target / 'sensitivity.html'}", as_json=as_json)
    _say(f"floors: p2d prune {network} ... --floors {target / NAME}", as_json=as_json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, for its details.")] = None, as_json: Json = False
) -> None:
    """List the pruning methods, or show one: what it needs and yields, what was read of its paper, and its options."""
    from dataclasses import asdict

    from prune2deploy.methods import all_methods, describe_options, method_class
    from prune2deploy.screen import plain_table

    known = all_methods()
    if name is None:
        rows = [(key, info.summary, _needs(info.needs), info.yields, info.status) for key, info in known.items()]
        table = {key: {k: v for k, v in asdict(info).items() if k != "target"} for key, info in known.items()}
        _emit(
            {"methods": table},
            plain_table(("method", "how it chooses", "needs", "yields", "status"), rows),
            as_json=as_json,
        )
        return
    found = method_class(name)
    info, options = known[name], describe_options(found)
    described = {"needs": asdict(info.needs), "yields": info.yields, "status": info.status, "source": info.source}
    own_loop = not found.phases
    lines = [
        inspect_module.cleandoc(found.__doc__ or ""),
        "",
        f"needs     {_needs(info.needs)}",
        f"yields    {info.yields}",
        f"status    {info.status}; {info.source}",
        f"own loop  {'yes, by prune2deploy.Pruner' if own_loop else 'no: it trains in phases of its own'}",
        "",
        *(f"--option {key}=...  {allowed}" for key, allowed in options.items()),
        *([] if options else ["no options"]),
    ]
    document = {"method": name, "options": options, "own_loop": own_loop, **described}
    _emit(document, "\n".join(lines), as_json=as_json)


def _needs(needs: Any) -> str:
    from dataclasses import asdict

    return ", ".join(key.replace("_", " ") for key, wanted in asdict(needs).items() if wanted) or "nothing"


@app.command()
def networks(as_json: Json = False) -> None:
    """List the built-in networks."""
    from prune2deploy.networks import NETWORKS
    from prune2deploy.screen import plain_table

    rows = [
        (info.name, "x".join(map(str, info.input_shape)), info.num_classes, info.description)
        for info in NETWORKS.values()
    ]
    table = {
        info.name: {
            "input_shape": info.input_shape,
            "num_classes": info.num_classes,
            "description": info.description,
            "paper": info.paper,
        }
        for info in NETWORKS.values()
    }
    _emit({"networks": table}, plain_table(("network", "input", "classes", "what it is"), rows), as_json=as_json)
    _say("also FILE.py:FACTORY, and with the extra 'zoo' torchvision:NAME and timm:NAME", as_json=as_json)


@app.command()
def ops(as_json: Json = False) -> None:
    """List the ONNX operators that the channel analysis has a rule for."""
    from prune2deploy.graph.rules import RULES
    from prune2deploy.plugins import RULES_GROUP, plugins
    from prune2deploy.screen import plain_table

    others = {name: f"rule of {found.package}" for name, found in plugins(RULES_GROUP).items() if name not in RULES}
    table = {name: rule.kind for name, rule in RULES.items()} | others
    _emit({"ops": table}, plain_table(("operator", "kind"), list(table.items())), as_json=as_json)
    _say("any other operator is opaque: what it reads stays, and it is counted", as_json=as_json)


@app.command()
def backends(as_json: Json = False) -> None:
    """List the backends, and what is missing for each."""
    from prune2deploy.backends import BACKENDS
    from prune2deploy.screen import plain_table

    rows = [(name, info.description, _uses(info), info.status() or "ready") for name, info in BACKENDS.items()]
    table = {row[0]: {"description": row[1], "uses": row[2], "status": row[3]} for row in rows}
    _emit({"backends": table}, plain_table(("backend", "what it is", "for", "state"), rows), as_json=as_json)


def _uses(info: Any) -> str:
    return ", ".join(name for name, is_so in (("bench", info.benches), ("export --trt", info.builds)) if is_so)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and which commands can run on it."""
    from importlib.util import find_spec

    from prune2deploy.backends import BACKENDS
    from prune2deploy.environment import environment
    from prune2deploy.screen import plain_table

    found = environment()
    has: Callable[[str], bool] = lambda name: find_spec(name) is not None  # noqa: E731
    checks = [
        (
            "prune, export, run",
            "ready" if has("torch") and has("onnxscript") else "pip install 'prune2deploy[torch,cpu]'",
        ),
        ("slim, verify, inspect", "ready" if has("onnxruntime") else "pip install 'prune2deploy[cpu]'"),
        *((f"{_uses(info)} with {name}", info.status() or "ready") for name, info in BACKENDS.items()),
    ]
    _emit({"environment": found, "checks": dict(checks)}, plain_table(("what", "state"), checks), as_json=as_json)
    shown = {key: value for key, value in found.items() if value not in (None, [], {}) and key != "packages"}
    _say("\n".join(f"{key:<18} {value}" for key, value in shown.items()), as_json=as_json)
    _say("packages           " + ", ".join(f"{k} {v}" for k, v in found["packages"].items()), as_json=as_json)
