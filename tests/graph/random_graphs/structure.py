"""Graph structure around the operators of random graphs: branches that are dead, constant or chosen beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graph.random_graphs.builder import Builder, Value, planted_constant


def constant_branch(builder: Builder, draw: Any, x: Value) -> Value:
    """Add or multiply what constants alone compute."""
    shape = (x.channels,) if x.flat else (x.channels, 1, 1)
    y = builder.node("Exp", [builder.constant(np.minimum(planted_constant(builder, draw, shape), 1))])
    form = draw(st.sampled_from(("sub", "filled", "conv")))
    if form == "filled":
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [draw(st.sampled_from((0.0, 0.5)))])
        y = builder.node("Mul", [y, builder.node("ConstantOfShape", [builder.ints(1)], value=value)])
    elif form == "conv" and not x.flat:
        weight = builder.constant(planted_constant(builder, draw, (x.channels, x.channels, 1, 1)))
        y = builder.node("Conv", [builder.unsqueeze(y, 0), weight])
    else:
        y = builder.node("Sub", [y, builder.constant(1.0)])
    return x.to(builder.node(draw(st.sampled_from(("Add", "Mul"))), [x.name, y]))


def dead_branch(builder: Builder, draw: Any, x: Value) -> Value:
    """A reader whose result nobody reads."""
    builder.node("Relu", [builder.node("Abs", [x.name])])
    return x


def cancelled(builder: Builder, draw: Any, x: Value) -> Value:
    """A value times zero, beside itself: the first is nothing."""
    zero = builder.node("Mul", [x.name, builder.constant(np.zeros((1,) if x.flat else (1, 1, 1)))])
    return x.to(builder.node("Add", [builder.node("Abs", [x.name]), zero]))


def chosen(builder: Builder, draw: Any, x: Value) -> Value:
    """An If whose condition is a constant; its branches read the value around them."""

    def branch(op: str) -> onnx.GraphProto:
        name = builder.name("b")
        node = helper.make_node(op, [x.name], [name], name=f"{builder.family}.{op.lower()}{builder.count}")
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, builder.shape(x))
        return helper.make_graph([node], name, [], [made])

    condition = builder.constant(draw(st.booleans()), np.bool_)
    return x.to(builder.node("If", [condition], then_branch=branch("Relu"), else_branch=branch("Neg")))


def opaque(builder: Builder, draw: Any, x: Value) -> Value:
    """An operator that has no rule."""
    letters = "ab" if x.flat else "abcd"
    return x.to(builder.node("Einsum", [x.name], equation=f"{letters}->{letters}"))
