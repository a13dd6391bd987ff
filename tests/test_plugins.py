"""Methods and rules that other packages add by entry points."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import ENVIRONMENT, ROOT, Outcome
from onnx import TensorProto, helper, numpy_helper

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from prune2deploy.graph.rules.channelwise import IDENTITY
from prune2deploy.methods.base import NO_CONTEXT, Context, Method, Needs, Weights


@dataclass(frozen=True)
class Last(Method):
    """Keep the last channels.

    Of no use but to show that it is found.
    """

    needs: ClassVar[Needs] = Needs()

    def scores(self, weights, groups, context=NO_CONTEXT):
        return {group.id: np.arange(group.size, dtype=np.float64) for group in groups.prunable}


RULE = IDENTITY
nothing = 3
'''


def installed(folder: Path, **groups: dict[str, str]) -> Path:
    """Write a package with entry points into a folder, as an installer would; return the folder."""
    (folder / "demo_plugin.py").write_text(MODULE)
    info = folder / "demo_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo-plugin\nVersion: 1.0\n")
    text = ""
    for group, entries in groups.items():
        text += f"[prune2deploy.{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(text)
    return folder


def p2d_with(folder: Path, *arguments: object) -> Outcome:
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{folder}"}
    command = [sys.executable, "-m", "prune2deploy", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def small_model(path: Path, op: str = "Relu", domain: str = "") -> Path:
    """Write a graph of two convolutions with an operator between them; the first one's second filter is zero."""
    first = np.arange(1, 9, dtype=np.float32).reshape(4, 2, 1, 1)
    first[1] = 0
    second = np.arange(1, 13, dtype=np.float32).reshape(3, 4, 1, 1)
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"]),
        helper.make_node(op, ["a"], ["b"], domain=domain),
        helper.make_node("Conv", ["b", "second"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4, 4])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4, 4, 4]) for name in "ab"],
    )
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_a_method_of_another_package_is_listed_described_and_used(tmp_path: Path) -> None:
    folder = installed(tmp_path, methods={"last": "demo_plugin:Last"})
    listed = p2d_with(folder, "methods", "--json")
    assert '"source": "the package demo-plugin"' in listed.out
    shown = p2d_with(folder, "methods", "last")
    assert "Keep the last channels." in shown.out
    assert "status    plugin" in shown.out
    model = small_model(tmp_path / "model.onnx")
    pruned = p2d_with(folder, "prune", model, "--method", "last", "--target", "params=0.6", "-o", tmp_path / "run")
    assert pruned.code == 0, pruned.err


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("demo_plugin:nothing", "'last' of the package 'demo-plugin' is not a class"),
        ("demo_plugin:RULE", "is not a class"),
        ("demo_plugin:Gone", "cannot be loaded"),
        ("gone_plugin:Last", "cannot be loaded"),
    ],
)
def test_one_that_cannot_be_loaded_is_said_and_breaks_nothing_else(value: str, says: str, tmp_path: Path) -> None:
    folder = installed(tmp_path, methods={"last": value})
    listed = p2d_with(folder, "methods")
    assert listed.code == 0, listed.err
    assert "broken" in listed.out
    used = p2d_with(folder, "methods", "last")
    assert used.code == 2
    assert says in used.err
    assert len(used.err.splitlines()) == 1


def test_none_can_replace_a_method_or_a_rule_of_ours(tmp_path: Path) -> None:
    folder = installed(tmp_path, methods={"l1": "demo_plugin:Last"}, rules={"Conv": "demo_plugin:RULE"})
    assert "absolute weights" in p2d_with(folder, "methods", "l1").out
    code = "from prune2deploy.graph.rules import RULES, linear; assert RULES['Conv'] is linear.CONV"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_an_operator_of_another_domain_gets_the_rule_of_another_package(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model.onnx", "Same", "demo")
    (tmp_path / "with").mkdir()
    folder = installed(tmp_path / "with", rules={"demo.Same": "demo_plugin:RULE"})
    for place, opaque in ((folder, False), (tmp_path, True)):
        found = p2d_with(place, "inspect", model, "--json")
        assert found.code == 0, found.err
        assert ("demo::Same" in json.loads(found.out)["opaque"]) is opaque
    assert "rule of demo-plugin" in p2d_with(folder, "ops").out


def test_a_rule_that_is_none_is_refused(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model.onnx", "Same", "demo")
    folder = installed(tmp_path, rules={"demo.Same": "demo_plugin:nothing"})
    found = p2d_with(folder, "inspect", model)
    assert found.code == 2
    assert "is not a prune2deploy.graph.rules.base.Rule" in found.err
