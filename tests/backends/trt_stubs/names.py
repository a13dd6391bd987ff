"""Hold a source file that uses TensorRT against a description of its Python API, without running the file.

The types of expressions are followed by annotations (``builder: trt.Builder``) and by what the bindings' docstrings say
that a method returns, so that every attribute and call on an object of TensorRT's is looked up in its class.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

API = Path(__file__).with_name("api.json")
"""What the bindings of `VERSIONS` have in common, of the classes that the package uses."""

VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")

Classes = dict[str, dict[str, Any]]


def load_api() -> Classes:
    classes: Classes = json.loads(API.read_text())["classes"]
    return classes


def common(descriptions: list[Classes], wanted: set[str]) -> Classes:
    """Return the classes in ``wanted`` with the members, and the overloads of methods, that all descriptions have."""
    first, *others = descriptions
    return {
        name: {
            member: _common_member(what, [other[name][member] for other in others])
            for member, what in sorted(first[name].items())
            if all(member in other.get(name, {}) for other in others)
        }
        for name in sorted(wanted)
        if name in first
    }


def _common_member(what: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    if any(other["kind"] != what["kind"] for other in others):
        return {"kind": "differs"}
    if what["kind"] == "property":
        return {"kind": "property", "settable": all(entry["settable"] for entry in [what, *others])}
    if what["kind"] == "method":
        shared = [entry for entry in what["overloads"] if all(entry in other["overloads"] for other in others)]
        return {"kind": "method", "overloads": shared}
    return what


@dataclass
class Uses:
    """What a file uses of TensorRT, and what of it the API does not have."""

    names: set[tuple[str, str]] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Type:
    """An instance of a class, the class itself (``is_class``), or a list of instances (``is_list``)."""

    name: str
    is_class: bool = False
    is_list: bool = False


def uses_of(source: str, api: Classes) -> Uses:
    """Return what ``source`` uses of the module that it calls ``trt``."""
    tree = ast.parse(source)
    checker = _Checker(api, {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)})
    checker.visit(tree)
    return checker.uses


class _Checker(ast.NodeVisitor):
    def __init__(self, api: Classes, functions: dict[str, ast.FunctionDef]) -> None:
        self.api = api
        self.functions = functions
        self.uses = Uses()
        self.scope: dict[str, _Type | None] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.scope = self.scope, dict(self.scope)
        for argument in node.args.args + node.args.kwonlyargs:
            self.scope[argument.arg] = self.annotated(argument.annotation)
        self.generic_visit(node)
        self.scope = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Attribute):
                self.require_settable(target)
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.scope[target.id] = self.infer(node.value)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            for generator in node.generators:
                self.bind(generator.target, generator.iter)
        super().generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.infer(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.require_signature(node)
        self.generic_visit(node)

    def bind(self, target: ast.expr, iterable: ast.expr) -> None:
        of = self.infer(iterable)
        if isinstance(target, ast.Name):
            self.scope[target.id] = _Type(of.name) if of is not None and of.is_list else None

    def annotated(self, annotation: ast.expr | None) -> _Type | None:
        found = self.infer(annotation) if annotation is not None else None
        return _Type(found.name) if found is not None and found.is_class else None

    def infer(self, node: ast.expr) -> _Type | None:
        """Return the TensorRT type of an expression, or None for any other; note what it uses on the way."""
        if isinstance(node, ast.Name):
            return self.scope.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.infer_attribute(node)
        if isinstance(node, ast.Call):
            return self.infer_call(node)
        if isinstance(node, ast.ListComp):
            for generator in node.generators:
                self.bind(generator.target, generator.iter)
            element = self.infer(node.elt)
            return _Type(element.name, is_list=True) if element is not None and not element.is_class else None
        return None

    def infer_attribute(self, node: ast.Attribute) -> _Type | None:
        if isinstance(node.value, ast.Name) and node.value.id == "trt":
            return self.module_attribute(node)
        owner = self.infer(node.value)
        if owner is None or owner.is_list:
            return None
        what = self.member(owner, node)
        if what is None or not owner.is_class:
            return None
        if what["kind"] == "class":
            return _Type(f"{owner.name}.{node.attr}", is_class=True)
        is_enum_value = what["kind"] == "value" and "__members__" in self.api[owner.name] and node.attr != "__members__"
        return _Type(owner.name) if is_enum_value else None

    def module_attribute(self, node: ast.Attribute) -> _Type | None:
        if node.attr == "__version__":
            return None
        self.uses.classes.add(node.attr)
        if node.attr in self.api:
            return _Type(node.attr, is_class=True)
        self.problems(node, f"tensorrt has no '{node.attr}'")
        return None

    def member(self, owner: _Type, node: ast.Attribute) -> dict[str, Any] | None:
        self.uses.names.add((owner.name, node.attr))
        what: dict[str, Any] | None = self.api.get(owner.name, {}).get(node.attr)
        if what is None:
            self.problems(node, f"{owner.name} has no '{node.attr}'")
        elif what["kind"] == "differs":
            self.problems(node, f"{owner.name}.{node.attr} is not the same kind of thing in all versions")
        return what

    def infer_call(self, node: ast.Call) -> _Type | None:
        if isinstance(node.func, ast.Name) and node.func.id in self.functions:
            return self.annotated(self.functions[node.func.id].returns)
        found = self.infer(node.func)
        if found is not None and found.is_class:
            return _Type(found.name)
        returns = {overload["returns"] for overload in self.overloads(node.func)[1] or []}
        name = returns.pop() if len(returns) == 1 else ""
        return _Type(name) if name in self.api else None

    def overloads(self, function: ast.expr) -> tuple[str, list[dict[str, Any]] | None]:
        """Return the name and the overloads of what is called, or None if it is not TensorRT's."""
        found = self.infer(function)
        if found is not None and found.is_class:
            return found.name, self.api[found.name].get("__init__", {}).get("overloads", [])
        if not isinstance(function, ast.Attribute):
            return "", None
        owner = self.infer(function.value)
        if owner is None or owner.is_list:
            return "", None
        what = self.api.get(owner.name, {}).get(function.attr, {"kind": "missing"})
        overloads = what["overloads"] if what["kind"] == "method" else None
        return f"{owner.name}.{function.attr}", overloads

    def require_signature(self, node: ast.Call) -> None:
        name, overloads = self.overloads(node.func)
        if overloads is None:
            return
        unbound = isinstance(node.func, ast.Attribute) and node.func.attr == "__init__"
        count = len(node.args) - unbound  # Class.__init__(self, ...)
        keywords = [keyword.arg or "**" for keyword in node.keywords]
        if not any(_takes(overload, count, keywords) for overload in overloads):
            self.problems(node, f"{name} takes {[overload['parameters'] for overload in overloads]} in all versions")

    def require_settable(self, target: ast.Attribute) -> None:
        owner = self.infer(target.value)
        if owner is not None and not self.api.get(owner.name, {}).get(target.attr, {}).get("settable", False):
            self.problems(target, f"{owner.name}.{target.attr} cannot be set")

    def problems(self, node: ast.expr, text: str) -> None:
        line = f"line {node.lineno}: {text}"
        if line not in self.uses.problems:
            self.uses.problems.append(line)


def _takes(overload: dict[str, Any], positional: int, keywords: list[str]) -> bool:
    parameters: list[str] = overload["parameters"]
    given = [*parameters[:positional], *keywords]
    return (
        positional <= len(parameters)
        and len(set(given)) == len(given)
        and set(given) <= set(parameters)
        and set(parameters[: overload["required"]]) <= set(given)
    )
