"""One file slimmed from the command line: reasons, tolerances, inputs that nothing reads any more."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import done, p2d, refused
from graph.small import graph, weights
from onnx.helper import make_node as node

IMAGE = ["N", 3, 8, 8]


@pytest.fixture
def nearly_dead(tmp_path: Path) -> Path:
    """Two filters of eight are tiny beside the others, one is zero."""
    first = weights(8, 3, 3, 3, zero=(5,))
    first[[1, 4]] *= 1e-20
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="first", pads=[1] * 4),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "v"], ["y"], name="last", pads=[1] * 4),
    ]
    model = graph(nodes, {"w": first, "v": weights(2, 8, 3, 3)}, {"x": IMAGE}, {"y": ["N", 2, 8, 8]})
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_without_a_tolerance_only_zeros_go(nearly_dead: Path, tmp_path: Path) -> None:
    found = json.loads(done("slim", nearly_dead, "-o", tmp_path / "slim.onnx", "--json"))["slim"]
    assert found["removed_channels"] == 1
    assert "tolerance" not in found


def test_a_tolerance_says_what_it_zeroed_and_bounds_the_change(nearly_dead: Path, tmp_path: Path) -> None:
    arguments = ("slim", nearly_dead, "-o", tmp_path / "slim.onnx", "--tolerance", "1e-12", "--range", "-1,1")
    found = json.loads(done(*arguments, "--json"))["slim"]
    assert found["removed_channels"] == 3
    told = found["tolerance"]
    assert (told["weights"], told["filters"], told["range"]) == (54, 2, {"x": [-1, 1]})
    (output,) = told["outputs"]
    assert 0 < output["bound"]["largest"] < 1e-15
    assert output["measured"] < 1e-5
    text = done(*arguments)
    assert "2 whole filters" in " ".join(text.split())
    assert "at most" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tolerance", "2"), "between 0 and 1"),
        (("--tolerance", "1e-9", "--range", "3"), "LOW,HIGH"),
        (("--tolerance", "1e-9", "--range", "3,1"), "LOW,HIGH"),
        (("--range", "a,b"), "list of numbers"),
    ],
)
def test_a_bad_tolerance_is_told_in_one_line(
    nearly_dead: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    refused(p2d("slim", nearly_dead, "-o", tmp_path / "slim.onnx", *arguments), 2, words)
    assert not (tmp_path / "slim.onnx").exists()


def test_reasons_are_told_as_a_tree_and_as_json(nearly_dead: Path, tmp_path: Path) -> None:
    source = {"first": {"module": "stem", "source": "net.py:3 in forward"}}
    (tmp_path / "source_map.json").write_text(json.dumps(source))
    arguments = ("slim", nearly_dead, "-o", tmp_path / "slim.onnx", "--round-to", "4", "--explain")
    text = done(*arguments)
    assert "first (Conv): 8 → 8" in text
    assert "dead but kept: 5: Conv 'first' (stem, net.py:3 in forward) has its width rounded to a multiple of 4" in text
    (layer,) = json.loads(done(*arguments, "--json"))["explain"]
    assert layer["kept"][0]["module"] == "stem"


def test_an_input_that_nothing_reads_any_more_is_told_loudly(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "z"], ["a"]),
        node("GlobalAveragePool", ["a"], ["p"]),
        node("Add", ["p", "x2"], ["y"]),
    ]
    model = graph(
        nodes, {"z": np.zeros((2, 3, 1, 1), np.float32)}, {"x": [1, 3, 8, 8], "x2": [1, 2, 1, 1]}, {"y": [1, 2, 1, 1]}
    )
    onnx.save(model, tmp_path / "model.onnx")
    text = done("slim", tmp_path / "model.onnx", "-o", tmp_path / "slim.onnx")
    assert "NO OUTPUT DEPENDS ON 'x' ANY MORE" in text


def test_the_result_names_the_tool_and_the_file_that_it_came_from(nearly_dead: Path, tmp_path: Path) -> None:
    done("slim", nearly_dead, "-o", tmp_path / "slim.onnx")
    found = {entry.key: entry.value for entry in onnx.load(tmp_path / "slim.onnx").metadata_props}
    assert found["prune2deploy.source_sha256"] == hashlib.sha256(nearly_dead.read_bytes()).hexdigest()
    assert found["prune2deploy.version"]
