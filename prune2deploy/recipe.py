"""Recipes: the whole walk as one TOML file. A run writes the resolved recipe that repeats it."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from prune2deploy.errors import InputError, one_line
from prune2deploy.files import require_file, write_bytes
from prune2deploy.rounding import multiple_of

PATH_FIELDS = ("weights", "samples")
SPEC_FIELDS = ("network", "data")
"""Fields like ``kind:PATH``, ``PATH.py:factory`` or ``PATH.onnx``, whose paths are taken from the recipe's folder."""


def _round_to(value: Any) -> Any:
    try:
        multiple_of(value)
    except InputError as error:
        raise ValueError(str(error)) from error
    return value


def _floor(value: Any) -> Any:
    is_count = type(value) is int and value >= 1
    if not is_count and not (type(value) is float and 0 < value <= 1):
        raise ValueError("a floor is a number of channels from 1, or a share such as 0.5")
    return value


Whole = Annotated[int, Field(strict=True)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Multiple = Annotated[int | str, PlainValidator(_round_to)]
"""A number, or the precision whose multiple is wanted: see `rounding.multiple_of`."""
Floor = Annotated[int | float, PlainValidator(_floor)]
"""A number of channels (int), or a share of a group's channels (float)."""


class Strict(BaseModel):
    """A part of a recipe: unknown keys are refused, values are not converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FineTuning(Strict):
    """How the masked network is trained on: epochs over the training images, and `train.finetune`'s settings.

    With ``distill`` it also learns the dense network's answers: see `train.distill_loss`.
    """

    epochs: Whole = Field(default=0, ge=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Real = Field(default=0.05, gt=0)
    momentum: Real = Field(default=0.9, ge=0, lt=1)
    batch_size: Whole = Field(default=128, ge=2)
    weight_decay: Real = Field(default=5e-4, ge=0)
    warmup_epochs: Real | None = Field(default=None, ge=0)
    label_smoothing: Real = Field(default=0.0, ge=0, lt=1)
    ema: Real = Field(default=0.0, ge=0, lt=1)
    gradient_clipping: Real = Field(default=0.0, ge=0)
    distill: Switch = False
    distill_share: Real = Field(default=0.5, ge=0, le=1)
    temperature: Real = Field(default=4.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    tensorboard: Switch = False

    @property
    def idle(self) -> list[str]:
        """What is set and changes nothing, since there are no epochs; some settings are of a method's training too."""
        usual = FineTuning(optimizer=self.optimizer)
        others = ("momentum", "warmup_epochs", "label_smoothing", "ema", "gradient_clipping", "distill")
        names = ("optimizer", "learning_rate", "batch_size", "weight_decay", *others)
        reference = {name: getattr(usual, name) for name in names} | {"optimizer": "sgd"}
        return [] if self.epochs else [name for name in names if getattr(self, name) != reference[name]]

    @model_validator(mode="before")
    @classmethod
    def _usual_rate(cls, values: Any) -> Any:
        """AdamW's steps are as long as the rate says, whatever the gradients, so its usual rate is far lower."""
        if isinstance(values, dict) and values.get("optimizer") == "adamw" and "learning_rate" not in values:
            return values | {"learning_rate": 1e-3}
        return values

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "FineTuning":
        if self.warmup_epochs is not None and self.epochs and self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs are {self.warmup_epochs:g}, more than the {self.epochs} epochs there are")
        return self


class Bench(Strict):
    """How latency is measured; see `latency.compare`."""

    backend: str = "ort-cpu"
    batch: Whole = Field(default=1, ge=1)
    threads: Whole = Field(default=1, ge=1)
    sessions: Whole = Field(default=5, ge=5)
    seconds: Real = Field(default=1.0, gt=0)
    iterations: Whole | None = Field(default=None, ge=1)


class Recipe(Strict):
    """Everything that a run depends on."""

    network: str
    weights: str | None = None
    data: str = "digits"
    samples: str | None = None
    method: str = "l1"
    method_options: dict[str, Any] = Field(default_factory=dict)
    target: str = "macs=0.5"
    widths: dict[str, Whole] | None = None
    ranking: Literal["uniform", "global"] | None = None
    floors: dict[str, Floor] = Field(default_factory=dict)
    from_scratch: Switch = False
    round_to: Multiple = 1
    keep: tuple[str, ...] = ()
    recalibrate: Switch = False
    input_shape: tuple[Whole, ...] | None = None
    mean: tuple[Real, ...] | None = None
    std: tuple[Real, ...] | None = None
    holdout: Real = Field(default=0.1, gt=0, lt=1)
    seed: Whole = 0
    device: str = "cpu"
    threads: Whole | None = Field(default=None, ge=1)
    finetune: FineTuning = FineTuning()
    bench: Bench = Bench()

    @property
    def is_onnx(self) -> bool:
        """Whether an ONNX file is pruned, without torch."""
        return self.network.endswith(".onnx")

    def to_toml(self) -> str:
        """Return the recipe as TOML; what is None is left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Return a recipe from plain values.

    Raises:
        InputError: naming the first value that does not fit.
    """
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise InputError(first_problem(error, "the recipe")) from error


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in a TOML file, with its paths made absolute from the file's folder.

    Raises:
        InputError: if the file is missing, is not TOML, or a value does not fit.
    """
    try:
        values = tomllib.loads(require_file(path, "a recipe (TOML)").read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not TOML ({one_line(error, 120)}); mend it there") from error
    try:
        recipe = Recipe(**values)
    except (ValidationError, TypeError) as error:
        reason = first_problem(error, f"'{path}'") if isinstance(error, ValidationError) else one_line(error)
        raise InputError(reason) from error
    return resolved(recipe, path.parent)


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with its paths made absolute, relative ones taken from ``folder``."""
    changes: dict[str, str] = {}
    for name in PATH_FIELDS:
        value = getattr(recipe, name)
        if value is not None:
            changes[name] = str((folder / value).resolve())
    for name in SPEC_FIELDS:
        changes[name] = _absolute_spec(getattr(recipe, name), folder)
    return recipe.model_copy(update=changes)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as TOML, whole or not at all."""
    write_bytes(path, recipe.to_toml().encode())


def _absolute_spec(spec: str, folder: Path) -> str:
    first, colon, rest = spec.partition(":")
    if spec.endswith(".onnx"):
        return str((folder / spec).resolve())
    if first.endswith(".py") and colon:
        return f"{(folder / first).resolve()}:{rest}"
    if colon and first in ("cifar10", "cifar100", "imagefolder"):
        return f"{first}:{(folder / rest).resolve()}"
    return spec


def first_problem(error: ValidationError, where: str, wanted: type[BaseModel] = Recipe) -> str:
    """Return the first value that does not fit ``wanted``, in one line."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "a value"
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(wanted.model_fields))
        return f"{where} has an unknown key '{place}'; the keys are {known}, and those of the tables in it"
    if problem["type"] == "missing":
        return f"{where} lacks the key '{place}'"
    reason = problem["msg"].removeprefix("Value error, ")  # what a check of ours says is a sentence of its own
    return one_line(f"{where}: '{place}' is {problem.get('input')!r}, which does not fit: {reason}")
