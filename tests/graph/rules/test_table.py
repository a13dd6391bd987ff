"""Every rule of the table has a line in some family."""

import importlib
import pkgutil

import graph.rules as families
from prune2deploy.graph.rules import RULES


def test_every_rule_has_a_line() -> None:
    modules = [importlib.import_module(f"graph.rules.{item.name}") for item in pkgutil.iter_modules(families.__path__)]
    lines = [line for module in modules for line in getattr(module, "LINES", ())]
    elsewhere = {op for module in modules for op in getattr(module, "TESTED_BY_OTHER_MEANS", ())}
    assert {op for op, _, _ in lines} | elsewhere == set(RULES)
