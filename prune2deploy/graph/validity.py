"""Whose fault it is: a graph that breaks the analysis is told from a bug by asking those who define what is valid."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import onnx

from prune2deploy.errors import InputError, P2DError, one_line
from prune2deploy.graph.verify import why_it_does_not_run

P = ParamSpec("P")
T = TypeVar("T")


def blaming_the_file(
    function: Callable[Concatenate[onnx.ModelProto, P], T],
) -> Callable[Concatenate[onnx.ModelProto, P], T]:
    """Let a function of a model raise `InputError` where it fails on a model that is not valid; a bug stays a bug."""

    @wraps(function)
    def checked(model: onnx.ModelProto, /, *arguments: P.args, **options: P.kwargs) -> T:
        try:
            with np.errstate(all="ignore"):  # what is not finite is looked for where it matters
                return function(model, *arguments, **options)
        except P2DError:
            raise
        except UnicodeDecodeError as error:
            raise InputError("the graph is not valid: a name in it is no text; export it again") from error
        except Exception as error:
            reason = fault_of(model)
            if reason is None:
                raise
            raise InputError(f"the graph is not valid: {reason}; export it again") from error

    return checked


def fault_of(model: onnx.ModelProto) -> str | None:
    """Return why onnx or ONNX Runtime refuses a model, or None where both take it."""
    try:
        data = model.SerializeToString()
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return one_line(error, 200)
    except MemoryError:
        return "it wants more memory than there is"
    return why_it_does_not_run(data)
