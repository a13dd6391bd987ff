"""What other packages add through entry points: pruning methods and rules of ONNX operators."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from prune2deploy.errors import InputError, one_line

METHODS_GROUP = "prune2deploy.methods"
"""The group of entry points for methods: ``name = "module:Class"``."""

RULES_GROUP = "prune2deploy.rules"
"""The group of entry points for rules: ``"Op"`` or ``"domain.Op" = "module:RULE"``. Of an operator of another domain
onnx infers no shapes; the model must give those of what it makes."""


@dataclass(frozen=True)
class Plugin:
    """One entry point: its name, what package it is of, and where it leads."""

    name: str
    package: str
    entry: EntryPoint

    def load(self, wanted: type, what: str) -> Any:
        """Return what the entry point leads to.

        Args:
            wanted: a class that it must be an instance of, or (for ``type``) a class at all.
            what: what was wanted, for the message.

        Raises:
            InputError: if it cannot be imported, or is something else.
        """
        try:
            found = self.entry.load()
        except Exception as error:  # whatever importing somebody's package raises
            raise InputError(
                f"'{self.name}' of the package '{self.package}' cannot be loaded ({one_line(error, 160)}); mend or "
                "remove it"
            ) from error
        if not isinstance(found, wanted):
            raise InputError(
                f"'{self.name}' of the package '{self.package}' is not {what}; mend or remove that package"
            )
        return found


@cache
def plugins(group: str) -> Mapping[str, Plugin]:
    """Return the entry points of a group by name; of two of one name the first package's, by name, counts."""
    found: dict[str, Plugin] = {}
    for entry in sorted(entry_points(group=group), key=lambda one: (one.name, one.dist.name if one.dist else "")):
        package = entry.dist.name if entry.dist else "an unknown package"
        found.setdefault(entry.name, Plugin(entry.name, package, entry))
    return found
