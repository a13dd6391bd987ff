"""Commands that take a run: export, run, report."""

from pathlib import Path
from typing import Annotated

import typer

from prune2deploy import ranks
from prune2deploy.cli.options import Json, Out, Resume, Run, Strict
from prune2deploy.cli.output import emit, out, progress, say
from prune2deploy.errors import InputError, StrictError

_RESULTS = (
    ("report.html", "report page"),
    ("report.json", "numbers"),
    ("dense.onnx", "dense graph"),
    ("slim.onnx", "slim graph"),
    ("masks.safetensors", "masks"),
    ("recipe.toml", "recipe"),
)


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
    with progress() as live:
        pipeline.export(run, torch=torch, note=live.note)
    report = read_report(run)
    emit({name: report[name] for name in ("export", "slim", "verify")}, run_summary(run), as_json=as_json)
    say(f"slim graph: {run / 'slim.onnx'}", as_json=as_json)
    if torch:
        say(f"narrow network: prune2deploy.load_narrow(FACTORY, '{run / 'narrow'}')", as_json=as_json)
    if trt:
        with progress() as live:
            built = pipeline.build_engine(run, precision, note=live.note)
        say(f"engine: {built.engine} ({built.size_bytes:,} bytes, TensorRT {built.tensorrt})", as_json=as_json)
    _require_success(run, strict=strict)


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="A recipe, such as RUN/recipe.toml.")],
    target: Out,
    resume: Resume = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Walk the whole way: prune, fine-tune, export, slim, verify, time, report."""
    from prune2deploy import pipeline
    from prune2deploy.recipe import load_recipe
    from prune2deploy.report import read_report
    from prune2deploy.screen import run_summary

    resolved = load_recipe(recipe)
    with progress() as live:
        pipeline.walk(resolved, target, resume=resume, note=live.note, on_progress=live.training, on_round=live.rounds)
    if not ranks.is_first():
        return
    emit(read_report(target), run_summary(target), as_json=as_json)
    for name, what in _RESULTS:
        say(f"{what:<14} {target / name}", as_json=as_json)
    _require_success(target, strict=strict)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    target: Annotated[Path, typer.Option("-o", "--out", metavar="PAGE.html", help="The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from prune2deploy.page import write_page

    write_page(runs, target)
    out.print(f"page: {target}", soft_wrap=True)


def _require_success(run: Path, *, strict: bool) -> None:
    from prune2deploy.findings import Findings
    from prune2deploy.screen import loud

    if strict and (texts := loud(Findings(run))):
        raise StrictError(texts[0])
