"""ONNX's own node tests: what the rules claim of these models holds, and what is removed around them is not missed."""

import importlib
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime.capi.onnxruntime_pybind11_state as ort_errors
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.helper import make_node

from graph.rule_check import check_facts, reader_of
from graph.small import copy_of, run
from prune2deploy.errors import InputError
from prune2deploy.graph.facts import Known, channel_facts
from prune2deploy.graph.model import MAX_OPSET, MIN_OPSET
from prune2deploy.graph.node import tables
from prune2deploy.graph.normal import normalise
from prune2deploy.graph.rewrite import remove_dead_channels
from prune2deploy.graph.rules import RULES
from prune2deploy.graph.verify import verify

CASES = "onnx.backend.test.case.node"
QUICK = {"Conv": "conv", "MaxPool": "maxpool", "Pad": "pad", "Reshape": "reshape", "Slice": "slice", "Gemm": "gemm"}
"""Operators of the quick set, with the module that holds their tests: importing all of them takes half a minute."""
FACT_TYPES = ("float32", "float64", "int64", "int32", "bool", "uint8", "int8")
Array = np.ndarray


class UncheckedError(Exception):
    """A form that cannot be checked, with the reason under which it is counted."""


@dataclass(frozen=True)
class Form:
    """One model around a test's node: which inputs are computed, and whether the first has silent channels."""

    model: onnx.ModelProto
    feeds: dict[str, Array]
    outputs: tuple[str, ...]


def collected(op: str, *, everything: bool) -> list[TestCase]:
    """Return the tests of one operator that are one node; the first call for everything imports all of them."""
    node = importlib.import_module(CASES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if everything:
            node.collect_testcases(None)
        else:
            importlib.import_module(f"{CASES}.{QUICK[op]}")
    return [
        case
        for case in node._NodeTestCases
        if case.model is not None and [item.op_type for item in case.model.graph.node] == [op]
    ]


def opset_of(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def channel_axis(array: Array) -> int | None:
    """Return the axis along which to plant: 1 where it has positions, else the last one that has."""
    wide = [axis for axis, size in enumerate(array.shape) if size > 1]
    if not wide or array.dtype.kind != "f":
        return None
    return 1 if 1 in wide else wide[-1]


def silenced(name: str, array: Array) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """Return nodes that make ``name`` of ``name_in``: along one axis some positions are zero, constant or repeated."""
    axis = channel_axis(array)
    assert axis is not None
    size = array.shape[axis]
    column = [1] * array.ndim
    column[axis] = size
    factor = (np.arange(size) % 3 != 1).astype(array.dtype).reshape(column)
    offset = np.where(np.arange(size) % 6 == 4, 0.5, 0.0).astype(array.dtype).reshape(column)
    order = np.where(np.arange(size) % 5 == 3, 0, np.arange(size))
    constants = {f"{name}_order": order, f"{name}_factor": factor, f"{name}_offset": offset}
    nodes = [
        make_node("Gather", [f"{name}_in", f"{name}_order"], [f"{name}_taken"], axis=axis),
        make_node("Mul", [f"{name}_taken", f"{name}_factor"], [f"{name}_scaled"]),
        make_node("Add", [f"{name}_scaled", f"{name}_offset"], [name]),
    ]
    return nodes, constants


def as_array(item: Any) -> Array:
    return numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else np.asarray(item)


def form_of(case: TestCase, *, computed: int, plant: bool) -> Form:
    """Return the test's node with its first ``computed`` inputs computed and all others constant."""
    model, inputs = copy_of(case.model), [as_array(item) for item in case.data_sets[0][0]]
    if any(array.dtype == object for array in inputs):
        raise UncheckedError("inputs that are no arrays of numbers")
    if any(not value.type.HasField("tensor_type") for value in (*model.graph.input, *model.graph.output)):
        raise UncheckedError("inputs or outputs that are no tensors")
    node = onnx.NodeProto.FromString(model.graph.node[0].SerializeToString())
    arrays = dict(zip((value.name for value in model.graph.input), inputs, strict=True))
    slots = [slot for slot, name in enumerate(node.input) if name][:computed]
    nodes, constants, feeds = [], {}, {}
    for slot, name in enumerate(node.input):
        if not name:
            continue
        array, new = arrays[name], f"k{slot}"
        if slot not in slots:
            constants[new] = array
        elif plant and channel_axis(array) is not None:
            more, values = silenced(new, array)
            nodes, constants = nodes + more, constants | values
            feeds[f"{new}_in"] = array
        else:
            feeds[new] = array
        node.input[slot] = new
    if plant and not nodes:
        raise UncheckedError("no computed input with channels to silence")
    outputs = []
    for slot, name in enumerate(node.output):
        if name:
            node.output[slot] = f"y{slot or ''}"
            outputs.append(model.graph.output[len(outputs)])
            outputs[-1].name = node.output[slot]
    return _checked(model, [*nodes, node], constants, feeds, outputs)


def _checked(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    feeds: dict[str, Array],
    outputs: list[onnx.ValueInfoProto],
) -> Form:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()]
    opset = min(max(opset_of(model), 13 if len(nodes) > 1 else MIN_OPSET), MAX_OPSET)
    made = helper.make_model(
        helper.make_graph(nodes, "node", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=min(model.ir_version, 10),
    )
    try:
        onnx.checker.check_model(made)
    except onnx.checker.ValidationError as error:
        raise UncheckedError(f"no form in operator set {opset}") from error
    return Form(made, feeds, tuple(value.name for value in outputs))


ORT_ERRORS = (ort_errors.NotImplemented, ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph)


def values_of(form: Form) -> dict[str, Array]:
    """Return every value of the model that ONNX Runtime computes from the test's own inputs."""
    model = copy_of(form.model)
    inferred = onnx.shape_inference.infer_shapes(model)
    model.graph.output.extend(value for value in inferred.graph.value_info if value.name not in form.feeds)
    try:
        values = run(model, form.feeds)
        again = run(model, form.feeds)
    except (*ORT_ERRORS, ort_errors.RuntimeException) as error:
        raise UncheckedError("ONNX Runtime cannot run it") from error
    except RuntimeError as error:
        if "umpy" not in str(error):
            raise
        raise UncheckedError("a type that numpy does not have") from error
    for name, value in values.items():
        if value.dtype == object:
            raise UncheckedError("outputs that are no arrays of numbers")
        if not np.array_equal(value, again[name], equal_nan=value.dtype.kind in "fc"):
            raise UncheckedError("other values each time")
    return values


def agree(form: Form) -> None:
    """Slim the model; the slim one computes the same on the test's inputs, and on made-up ones where it takes them."""
    slim = remove_dead_channels(copy_of(form.model)).model
    want, got = run(form.model, form.feeds), run(slim, form.feeds)
    for name in form.outputs:
        assert got[name].shape == want[name].shape
        assert got[name].dtype == want[name].dtype
        loose = 1e-2 if want[name].dtype == np.float16 else 1e-4
        np.testing.assert_allclose(got[name], want[name], rtol=loose, atol=loose)
    if any(array.dtype.kind != "f" for array in form.feeds.values()):
        return  # made-up indices are out of range, and made-up pads or repeats are huge
    try:
        verify(form.model.SerializeToString(), slim.SerializeToString())
    except InputError as error:  # the optimiser of ONNX Runtime refuses some forms that run without it
        if "cannot run" not in str(error) and "refuses" not in str(error):
            raise


def with_reader(form: Form, values: dict[str, Array], known: Known) -> Form:
    """Return the model with a reader of half of the positions of its first output."""
    nodes, constants = reader_of(values, known)
    model = copy_of(form.model)
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [None] * values["y"].ndim))
    return Form(model, form.feeds, ("out",))


def check(form: Form) -> str:
    """Check one form and return how it went: by the rule, or opaque."""
    values = values_of(form)
    table = tables(normalise(copy_of(form.model)))
    known = channel_facts(table)
    shown = {
        name: value
        for name, value in values.items()
        if name in known.view.facts
        and str(value.dtype) in FACT_TYPES
        and len(known.view.facts[name].shape) == value.ndim
    }
    check_facts(known, shown)
    agree(form)
    nodes = [node for node in table.nodes if any(operand.name == "y" for operand in node.outputs)]
    first = values["y"]
    if first.ndim and first.dtype == np.float32 and first.size and nodes and "y" in known.view.facts:
        agree(with_reader(form, values, known))
    ruled = any(known.rules[node.index] is not None for node in nodes)
    return "by the rule" if ruled else "opaque or folded"


def expected(case: TestCase) -> None:
    """The test's own outputs are what the slim graph computes, wherever ONNX Runtime computes them at all."""
    form = form_of(case, computed=len(case.model.graph.input), plant=False)
    values = values_of(form)
    slim = run(remove_dead_channels(copy_of(form.model)).model, form.feeds)
    for name, item in zip(form.outputs, case.data_sets[0][1], strict=True):
        want = as_array(item)
        if not np.allclose(values[name], want, rtol=case.rtol, atol=1e-4, equal_nan=want.dtype.kind == "f"):
            raise UncheckedError("ONNX Runtime disagrees with the expected output")
        np.testing.assert_allclose(slim[name], want, rtol=case.rtol, atol=1e-4)


def check_case(case: TestCase) -> Counter[str]:
    """Return how the forms of one test went; a form that fails raises with the test's name."""
    counts: Counter[str] = Counter()
    present = len([name for name in case.model.graph.node[0].input if name])
    forms: list[dict[str, Any]] = [{"computed": 1, "plant": False}, {"computed": 1, "plant": True}]
    if present > 1:
        forms += [{"computed": 2, "plant": False}, {"computed": 2, "plant": True}]
    try:
        for options in forms:
            try:
                counts[check(form_of(case, **options))] += 1
            except UncheckedError as reason:
                counts[f"skipped: {reason}"] += 1
        try:
            expected(case)
            counts["as expected"] += 1
        except UncheckedError as reason:
            counts[f"skipped: {reason}"] += 1
    except BaseException as error:
        error.add_note(f"in ONNX's test {case.name}")
        raise
    return counts


def check_operator(op: str, *, everything: bool) -> None:
    cases = collected(op, everything=everything)
    if not cases:
        pytest.skip(f"ONNX has no node test of {op}")
    counts: Counter[str] = Counter()
    for case in cases:
        counts += check_case(case)
    print(f"{op}: {len(cases)} models, {dict(counts.most_common())}")
    if not counts["by the rule"] + counts["opaque or folded"]:
        pytest.skip(f"{op}: {dict(counts)}")


@pytest.mark.parametrize("op", sorted(QUICK))
def test_node_tests_of_common_operators(op: str) -> None:
    check_operator(op, everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(RULES))
def test_node_tests_of_every_rule(op: str) -> None:
    check_operator(op, everything=True)
