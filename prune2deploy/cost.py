"""What a network costs at given group widths: a polynomial, in plain arithmetic.

Widths may be ints, floats or torch tensors: the cost of real widths is real and can be differentiated.
MACs are the multiply-adds of convolutions and linear layers for one sample, counted once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Widths = Mapping[str, Any]
"""Group id -> how many of its channels are kept."""


@dataclass(frozen=True)
class Width:
    """A tensor's width as a linear form: ``constant + sum(factor * widths[group])``."""

    constant: int
    terms: tuple[tuple[str, int], ...] = ()

    def at(self, widths: Widths) -> Any:
        """Return the width where each group has kept ``widths[group]`` channels."""
        total: Any = self.constant
        for group, factor in self.terms:
            total = total + factor * widths[group]
        return total


@dataclass(frozen=True)
class Term:
    """``coefficient * product of the widths / divisor``, of one layer; the divisor is its number of groups."""

    layer: str
    coefficient: int
    factors: tuple[Width, ...] = ()
    divisor: int = 1

    def at(self, widths: Widths) -> Any:
        """Return the term's value; exact integers for integer widths."""
        value: Any = self.coefficient
        for factor in self.factors:
            value = value * factor.at(widths)
        return value // self.divisor if isinstance(value, int) else value / self.divisor


@dataclass(frozen=True)
class Cost:
    """MACs per sample and parameters of a network as functions of its group widths."""

    macs_terms: tuple[Term, ...]
    parameter_terms: tuple[Term, ...]

    def terms(self, kind: str) -> tuple[Term, ...]:
        """Return the terms of ``macs`` or ``params``."""
        return {"macs": self.macs_terms, "params": self.parameter_terms}[kind]

    def macs(self, widths: Widths) -> Any:
        """Return the multiply-adds of convolutions and linear layers for one sample."""
        return sum(term.at(widths) for term in self.macs_terms)

    def parameters(self, widths: Widths) -> Any:
        """Return the number of weights, biases, and norm scales and shifts (running statistics are not counted)."""
        return sum(term.at(widths) for term in self.parameter_terms)

    def of(self, kind: str, widths: Widths) -> Any:
        """Return ``macs`` or ``parameters`` at these widths."""
        return sum(term.at(widths) for term in self.terms(kind))
