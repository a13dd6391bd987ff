"""Write to stdout, as JSON, what the real TensorRT bindings offer; run where they can be imported."""

import inspect
import json
import re
import sys
from typing import Any

NAMESPACES = re.compile(r"\b(tensorrt_bindings\.tensorrt\.|tensorrt\.tensorrt\.|nvinfer1::|nvonnxparser::)")
CPP_NAMES = {"IParserError": "ParserError"}  # where the docstrings give the C++ class instead of the Python one
DUNDERS = ("__init__", "__members__")


def signature(name: str, doc: str) -> list[dict[str, Any]]:
    """Return the overloads that pybind11 wrote into a docstring: the parameters without self, and the result."""
    found = []
    for match in re.finditer(rf"(?m)^(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)$", NAMESPACES.sub("", doc)):
        parameters = [part for part in split(match[1]) if not re.match(r"self\b", part)]
        returns = match[2].strip()
        found.append(
            {
                "parameters": [part.split(":")[0].strip() for part in parameters],
                "required": sum("=" not in part for part in parameters),
                "returns": CPP_NAMES.get(returns, returns),
            }
        )
    return found


def split(arguments: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(arguments):
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append(arguments[start:place].strip())
            start = place + 1
    return [*parts, arguments[start:].strip()] if arguments.strip() else []


def member(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, property):
        return {"kind": "property", "settable": value.fset is not None}
    if inspect.isclass(value):
        return {"kind": "class"}
    if callable(value):
        return {"kind": "method", "overloads": signature(name, value.__doc__ or "")}
    return {"kind": "value"}


def describe(kind: type) -> dict[str, Any]:
    names = [name for name in dir(kind) if not name.startswith("_") or name in DUNDERS]
    return {name: member(name, getattr(kind, name)) for name in names}


def bindings() -> dict[str, Any]:
    import tensorrt_bindings as trt

    classes = {name: kind for name, kind in vars(trt).items() if inspect.isclass(kind) and not name.startswith("_")}
    nested = {
        f"{outer}.{name}": kind
        for outer, owner in classes.items()
        for name, kind in vars(owner).items()
        if inspect.isclass(kind) and hasattr(kind, "__members__")
    }
    return {"version": trt.__version__, "classes": {name: describe(kind) for name, kind in (classes | nested).items()}}


if __name__ == "__main__":
    json.dump(bindings(), sys.stdout)
