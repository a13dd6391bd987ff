"""Commands that choose channels: prune, compare, sensitivity."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prune2deploy import ranks
from prune2deploy.cli.options import (
    DataSpec,
    Json,
    Keep,
    Mean,
    MethodOptions,
    Out,
    Resume,
    SampleShape,
    Seed,
    Std,
    Threads,
    Weights,
    parse_floor,
    parse_numbers,
    parse_option,
    parse_round_to,
    parse_shapes,
)
from prune2deploy.cli.output import emit, progress, say
from prune2deploy.errors import InputError


def prune(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK|MODEL.onnx", help="A name of 'p2d networks', FILE.py:FACTORY, or an ONNX file."
        ),
    ],
    run: Out,
    weights: Weights = None,
    data: DataSpec = "digits",
    method: Annotated[str, typer.Option(help="A name of 'p2d methods'.")] = "l1",
    option: MethodOptions = None,
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
    keep: Keep = None,
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
    batch_size: Annotated[int, typer.Option(min=2, help="Images a training step.")] = 128,
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
    input_: SampleShape = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1.")] = "cpu",
    threads: Threads = None,
    resume: Resume = False,
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
            **_shared(network, weights, data, keep, input_, mean, std),
            "method": method,
            "samples": None if samples is None else str(samples),
            "method_options": dict(parse_option(text) for text in option or []) | ({"static": True} if static else {}),
            "target": "macs=0.5" if target is None else target,
            "round_to": parse_round_to(round_to),
            "ranking": ranking,
            "floors": (load_floors(floors) if floors else {}) | dict(parse_floor(text) for text in floor or []),
            "from_scratch": from_scratch,
            "recalibrate": recalibrate,
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
    with progress() as live:
        pipeline.prune(recipe, run, resume=resume, note=live.note, on_progress=live.training)
    if not ranks.is_first():
        return
    emit({"prune": read_report(run)["prune"]}, run_summary(run), as_json=as_json)
    say(f"next: p2d {'bench' if recipe.is_onnx else 'export'} {run}", as_json=as_json)


def _shared(
    network: str,
    weights: Path | None,
    data: str,
    keep: list[str] | None,
    shape: str | None,
    mean: str | None,
    std: str | None,
) -> dict[str, Any]:
    """Return the values of a recipe that say which network is meant, and what it is fed with."""
    return {
        "network": network,
        "weights": None if weights is None else str(weights),
        "data": data,
        "keep": tuple(keep or ()),
        "input_shape": next(iter(parse_shapes([shape] if shape else None).values()), None),
        "mean": parse_numbers("--mean", mean),
        "std": parse_numbers("--std", std),
    }


def _require_alone(reason: str, others: dict[str, Any]) -> None:
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise InputError(f"{reason}; leave {given[0]} out")


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
    with progress() as live:
        found = comparing.compare(loaded, target, jobs=jobs, ray=ray, bench=bench, note=live.note, on_trial=live.trials)
    emit(found, plain_table(HEAD, [cells(row) for row in found["rows"]]), as_json=as_json)
    for name, what in (("compare.html", "page"), ("compare.md", "table"), ("compare.json", "numbers")):
        say(f"{what:<14} {target / name}", as_json=as_json)


def sensitivity(
    network: Annotated[str, typer.Argument(metavar="NETWORK", help="A name of 'p2d networks', or FILE.py:FACTORY.")],
    target: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the results.")],
    weights: Weights = None,
    data: DataSpec = "digits",
    method: Annotated[str, typer.Option(help="A name of 'p2d methods' that does not train.")] = "l1",
    option: MethodOptions = None,
    shares: Annotated[str, typer.Option(help="Shares of a group's channels to remove.")] = "0.125,0.25,0.5,0.75",
    images: Annotated[int, typer.Option(min=1, help="Held-out images to measure on, at most.")] = 2000,
    recalibrate: Annotated[
        bool,
        typer.Option("--recalibrate/--no-recalibrate", help="Measure BatchNorm statistics anew each time, or do not."),
    ] = True,
    tolerance: Annotated[float, typer.Option(help="Share of top-1 that a suggested floor may cost.")] = 0.02,
    keep: Keep = None,
    input_: SampleShape = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prune every group of channels alone, measure the accuracy on held-out images, and suggest floors for 'p2d prune'.

    A call that was interrupted goes on where it stopped. Nothing is trained.
    """
    from prune2deploy.recipe import make_recipe, resolved
    from prune2deploy.screen import plain_table
    from prune2deploy.sensitivity import NAME, Survey, measure_sensitivity
    from prune2deploy.sensitivity_page import basis, head, rows, write_sensitivity

    survey = Survey(parse_numbers("--shares", shares) or (), images, recalibrate, tolerance)
    recipe = make_recipe(
        {
            **_shared(network, weights, data, keep, input_, mean, std),
            "method": method,
            "method_options": dict(parse_option(text) for text in option or []),
            "seed": seed,
            "device": device,
            "threads": threads,
        }
    )
    with progress() as live:
        found = measure_sensitivity(resolved(recipe, Path.cwd()), survey, target, note=live.note, on_group=live.groups)
        live.note("writing the page")
        write_sensitivity(found, target / "sensitivity.html")
    emit({"sensitivity": found}, plain_table(head(found), rows(found)), as_json=as_json)
    say(f"floors: the smallest widths that keep {basis(found)}", as_json=as_json)
    say(f"page: {target / 'sensitivity.html'}", as_json=as_json)
    say(f"next: p2d prune {network} ... --floors {target / NAME}", as_json=as_json)
