"""Options that several commands have, and how their words are read."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from prune2deploy.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document in place of tables.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="RUN", help="Folder of the run.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME:SHAPE", help="Shape of an input with dynamic axes, as input:1,3,224,224."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last whole step, or epoch.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 5 if nothing was removed or it is not faster.")]
Weights = Annotated[Path | None, typer.Option(help="Checkpoint: safetensors, or .pt with tensors only.")]
DataSpec = Annotated[str, typer.Option(help="digits, cifar10:DIR, cifar100:DIR, imagefolder:DIR or FILE.py:FACTORY.")]
MethodOptions = Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of the method.")]
Keep = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Leave layers whose parameters match whole.")]
SampleShape = Annotated[
    str | None, typer.Option("--input", metavar="NAME:SHAPE", help="Shape of one sample, as input:3,32,32.")
]
Mean = Annotated[str | None, typer.Option(help="Normalisation by channel, as 0.5,0.5,0.5.")]
Std = Annotated[str | None, typer.Option(help="Normalisation by channel, as 0.2,0.2,0.2.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")]


def parse_option(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; a value is JSON, else text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--option '{text}' is not KEY=VALUE; write it like --option score=std")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parse_round_to(text: str) -> int | str:
    """Read a number of channels or the name of a precision."""
    from prune2deploy.rounding import multiple_of

    value = int(text) if text.isdecimal() else text
    multiple_of(value)
    return value


def parse_floor(text: str) -> tuple[str, float]:
    """Read PATTERN=WIDTH; the width is a number of channels or a share."""
    pattern, _, width = (part.strip() for part in text.rpartition("="))
    try:
        value = int(width) if width.isdecimal() else float(width)
    except ValueError:
        value = 0
    fits = value >= 1 if isinstance(value, int) else 0 < value <= 1
    if not pattern or not fits:
        raise InputError(f"--floor '{text}' is not PATTERN=WIDTH; write it like 'layer1.*=8' or 'layer1.*=0.5'")
    return pattern, value


def parse_numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """Read what option ``name`` was given: numbers with commas between them."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{name} '{text}' is not a list of numbers; write it like 0.5,0.5,0.5") from error


def parse_shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    """Read NAME:SHAPE, as often as it was given."""
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
