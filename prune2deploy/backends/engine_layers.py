"""What TensorRT's engine inspector says of the layers of an engine: their kinds and the types they compute with.

The JSON is not specified and differs between versions: 10.x gives a tensor's type in ``Format/Datatype``, 11.x in a
field of its own; short ("Half") or in a sentence ("Channel major FP16 format where channel % 4 == 0").
Types are therefore read as words, wherever they stand; a layer without any is counted as unknown, never guessed.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_INTEGERS = frozenset({"int32", "int64", "uint8", "bool"})
_TYPES_OF = {"fp32": _INTEGERS | {"fp32"}, "tf32": _INTEGERS | {"fp32", "tf32"}}
_WORDS = {
    "float": "fp32",
    "fp32": "fp32",
    "float32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "float16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "int8": "int8",
    "fp8": "fp8",
    "float8": "fp8",
    "int4": "int4",
    "fp4": "fp4",
    "float4": "fp4",
    "e8m0": "e8m0",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "bool": "bool",
}
_TENSOR_FIELDS = ("format/datatype", "datatype", "format")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine; ``types`` are those of its tensors and weights, and ``tf32`` if its kernel says so."""

    name: str
    kind: str
    types: frozenset[str]

    @property
    def precision(self) -> str:
        """The types joined by ``+``, or ``unknown``."""
        return "+".join(sorted(self.types)) or "unknown"


@dataclass(frozen=True)
class EngineLayers:
    """The layers of an engine, in its order."""

    layers: tuple[EngineLayer, ...]

    @property
    def kinds(self) -> Mapping[str, int]:
        """Layer kind -> how many layers."""
        return Counter(layer.kind for layer in self.layers)

    @property
    def precisions(self) -> Mapping[str, int]:
        """Types of a layer, joined by ``+`` -> how many layers; ``unknown`` where the inspector gives none."""
        return Counter(layer.precision for layer in self.layers)

    def outside(self, precision: str) -> tuple[EngineLayer, ...]:
        """Return the layers that use a type which ``precision`` (fp32 or tf32) does not allow."""
        return tuple(layer for layer in self.layers if layer.types - _TYPES_OF[precision])


def read_layer(text: str) -> EngineLayer:
    """Return what the inspector's JSON of one layer says; only a name, or no JSON at all, leaves the types unknown."""
    try:
        fields = json.loads(text)
    except ValueError:
        return EngineLayer(" ".join(text.split())[:200], "unreadable", frozenset())
    if not isinstance(fields, dict):
        return EngineLayer(str(fields), "unknown", frozenset())
    types = {_WORDS[word] for said in _said_of_types(fields) for word in _words(said) if word in _WORDS}
    if "tf32" in str(fields.get("TacticName", "")).lower():
        types.add("tf32")
    return EngineLayer(str(fields.get("Name", "")), str(fields.get("LayerType", "unknown")), frozenset(types))


def _said_of_types(fields: Mapping[str, Any]) -> Iterator[str]:
    for tensor in [*_dicts(fields.get("Inputs")), *_dicts(fields.get("Outputs"))]:
        lowered = {key.lower(): value for key, value in tensor.items()}
        yield from (str(lowered[key]) for key in _TENSOR_FIELDS if key in lowered)
    for weights in (fields.get("Weights"), fields.get("Bias")):
        if isinstance(weights, dict) and weights.get("Count") != 0:
            yield str(weights.get("Type", ""))


def _dicts(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
