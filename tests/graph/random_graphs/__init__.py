"""Random graphs of all rule families, as hypothesis strategies; they shrink to few nodes.

Hypothesis draws the structure, one seeded generator the numbers. Weights are planted with what removal feeds on:
filters of zero, filters that repeat, input columns of zero. Magnitudes stay near 1 and nothing magnifies rounding, so
that two right graphs agree; what jumps reads only values that are computed exactly (see `Value`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import onnx
from hypothesis import strategies as st

from graph.random_graphs import elementwise, linear, movement, norms, pooling, quantised, structure
from graph.random_graphs.builder import DENSE, PLANTED, Builder, Value

__all__ = ["DENSE", "FAMILIES", "OPSETS", "PLAIN", "PLANTED", "families_of", "models"]

BATCHES = ("N", "N", 1, 2)
OPSETS = (18, 18, 9, 11, 13, 17, 21, 23)
MOST_CHANNELS = 24

MAPS: dict[str, Callable[[Builder, Any, Value], Value]] = {
    "conv": linear.conv,
    "conv_transpose": linear.conv_transpose,
    "conv_1d": linear.conv_1d,
    "conv_3d": linear.conv_3d,
    "tokens": linear.tokens,
    "attention": linear.attention,
    "gate": linear.gate,
    "rows_product": linear.rows_product,
    "batchnorm": norms.batchnorm,
    "instance_norm": norms.instance_norm,
    "group_norm": norms.group_norm,
    "layer_norm": norms.layer_norm,
    "layer_norm_by_parts": norms.layer_norm_by_parts,
    "lp_norm": norms.lp_norm,
    "lrn": norms.lrn,
    "mean_variance_norm": norms.mean_variance_norm,
    "activation": elementwise.activation,
    "prelu": elementwise.prelu,
    "exact_steps": elementwise.exact_steps,
    "choice": elementwise.choice,
    "with_constant": elementwise.with_constant,
    "precision": elementwise.precision,
    "passing": elementwise.passing,
    "pad": movement.pad,
    "slice_channels": movement.slice_channels,
    "slice_space": movement.slice_space,
    "gather": movement.gather,
    "split": movement.split,
    "round_trip": movement.round_trip,
    "shuffle": movement.shuffle,
    "depth_to_space": movement.depth_to_space,
    "space_to_depth": movement.space_to_depth,
    "resize": movement.resize,
    "repeat": movement.repeat,
    "sample": movement.sample,
    "focus": movement.focus,
    "concat_constant": movement.concat_constant,
    "sized_reshape": movement.sized_reshape,
    "pool": pooling.pool,
    "global_pool": pooling.global_pool,
    "reduce_space": pooling.reduce_space,
    "reduce_channels": pooling.reduce_channels,
    "softmax": pooling.softmax,
    "cumsum": pooling.cumsum,
    "topk": pooling.topk,
    "through_integers": quantised.through_integers,
    "quantised_conv": quantised.quantised_conv,
    "integer_layer": quantised.integer_layer,
    "constant_branch": structure.constant_branch,
    "dead_branch": structure.dead_branch,
    "cancelled": structure.cancelled,
    "chosen": structure.chosen,
    "opaque": structure.opaque,
}
JOINS: dict[str, Callable[[Builder, Any, Value, list[Value]], Value]] = {
    "binary": elementwise.binary,
    "broadcast": elementwise.broadcast,
    "concat": movement.concat,
    "residual": linear.residual,
    "space_concat": movement.space_concat,
    "product": linear.product,
    "quantised_sum": quantised.quantised_sum,
}
FLAT: dict[str, Callable[[Builder, Any, Value], Value]] = {
    "dense": linear.dense,
    "quantised_dense": quantised.quantised_dense,
    **{
        name: MAPS[name]
        for name in (
            *("activation", "prelu", "exact_steps", "choice", "with_constant", "precision", "passing"),
            *("slice_channels", "gather", "split", "repeat", "concat_constant"),
            *("layer_norm", "layer_norm_by_parts", "lp_norm"),
            *("reduce_channels", "softmax", "cumsum", "topk", "through_integers", "integer_layer"),
            *("constant_branch", "dead_branch", "cancelled", "chosen", "opaque"),
        )
    },
}
FLAT_JOINS = {name: JOINS[name] for name in ("binary", "concat", "quantised_sum")}
FAMILIES = frozenset({*MAPS, *JOINS, *FLAT, "flatten", "arg"})
OFTEN = ("conv",) * 16 + ("batchnorm",) * 3 + ("activation",) * 4 + ("with_constant",) * 2
OFTEN += ("binary",) * 6 + ("concat",) * 4 + ("residual",) * 4 + ("split", "gather") * 2
OFTEN_FLAT = ("dense",) * 8
OFTEN_EXACT = ("quantised_conv", "quantised_dense") * 20 + ("quantised_sum",) * 6
OFTEN_EXACT += ("exact_steps", "through_integers", "integer_layer", "topk") * 4

PLAIN = frozenset(
    {"conv", "batchnorm", "pad", "slice_channels", "slice_space", "gate", "round_trip", "softmax", "residual", "concat"}
    | {"passing", "space_concat", "flatten", "dense", "prelu", "split", "gather", "shuffle", "space_to_depth"}
)
"""Families of float networks whose channels lie on axis 1."""

SINCE = {
    "layer_norm": 17,
    "cumsum": 11,
    "focus": 10,
    "sample": 10,
    "opaque": 12,
    "through_integers": 10,
    "quantised_conv": 10,
    "quantised_dense": 10,
    "quantised_sum": 10,
    "integer_layer": 11,
}
"""The operator set from which on a family has its operators."""
LEAST_SIZE = {
    "round_trip": 2,
    "rows_product": 2,
    "pool": 2,
    "slice_space": 2,
    "space_concat": 2,
    "mean_variance_norm": 3,
    "focus": 2,
    "depth_to_space": 2,
    "space_to_depth": 2,
    "product": 2,
}
GROWS = frozenset({"conv_transpose", "depth_to_space", "resize", "repeat", "sample"})
"""Families that make a map larger."""
WIDENS = frozenset({"space_to_depth", "focus", "repeat", "gather"})
"""Families that may make many channels."""
EXACT = frozenset(
    {"exact_steps", "through_integers", "quantised_conv", "quantised_dense", "quantised_sum", "integer_layer"}
)
"""Families that jump: they read exact values only."""
KEEPS_EXACT = frozenset(
    {"passing", "slice_channels", "slice_space", "gather", "split", "round_trip", "shuffle", "depth_to_space"}
    | {"space_to_depth", "repeat", "focus", "concat_constant", "sized_reshape", "space_concat", "dead_branch"}
)
"""Families that move, select and compare: what they are given exactly stays exact."""
STATIC = frozenset({"sample"})
"""Families that need a batch of known size."""


def families_of(model: onnx.ModelProto) -> set[str]:
    """Return the families of a random graph: its nodes are named after them."""
    return {node.name.partition(".")[0] for node in model.graph.node} & FAMILIES


def fits(builder: Builder, family: str, x: Value) -> bool:
    """Return whether a family can read a value."""
    return (
        builder.opset >= SINCE.get(family, 0)
        and (x.flat or x.size >= LEAST_SIZE.get(family, 1))
        and (x.flat or x.size <= 6 or family not in GROWS)
        and (x.channels <= 6 or family not in WIDENS)
        and (x.exact or family not in EXACT)
        and (builder.batch != "N" or family not in STATIC)
        and not (family == "focus" and x.size % 2)
    )


def step(builder: Builder, draw: Any, families: Collection[str], x: Value, values: list[Value]) -> Value:
    """Append one of the families that can read ``x``, if there is one."""
    maps, joins = (FLAT, FLAT_JOINS) if x.flat else (MAPS, JOINS)
    often = (OFTEN_EXACT if x.exact else ()) + (OFTEN_FLAT if x.flat else OFTEN)
    known = [name for name in (*often, *maps, *joins) if name in families and (name in maps or name in joins)]
    fitting = [name for name in known if fits(builder, name, x)]
    if not fitting:
        return x
    builder.family = family = draw(st.sampled_from(fitting))
    y = joins[family](builder, draw, x, values) if family in joins else maps[family](builder, draw, x)
    return replace(y, exact=y.exact or (x.exact and family in KEEPS_EXACT))


@st.composite
def models(
    draw: Any,
    max_steps: int = 12,
    *,
    patterns: tuple[str, ...] = PLANTED,
    sharing: bool = True,
    families: Collection[str] = FAMILIES,
    opsets: tuple[int, ...] = OPSETS,
) -> onnx.ModelProto:
    """Draw a random graph of these families (and convolutions) that ends in one or more outputs."""
    seed, batch, opset = draw(st.integers(0, 2**16)), draw(st.sampled_from(BATCHES)), draw(st.sampled_from(opsets))
    builder = Builder(seed, batch, patterns, sharing, "through_integers" in families, opset)
    start = Value("input", draw(st.integers(1, 3)), draw(st.sampled_from((4, 5, 6))))
    if builder.integers and opset >= SINCE["quantised_conv"] and draw(st.integers(0, 2)) == 0:
        values = [quantised.quantised_conv(builder, draw, quantised.requantised(builder, draw, start))]
    else:
        values = [linear.conv(builder, draw, start)]
    for _ in range(draw(st.integers(1, max_steps))):
        x = draw(st.sampled_from(values[-3:]))
        if x.channels <= MOST_CHANNELS:
            values.append(step(builder, draw, families, x, values))
    if draw(st.booleans()):  # a last reader that lets most of its input go
        builder.family = "quantised_conv" if values[-1].exact else "conv"
        values.append(MAPS[builder.family](builder, draw, values[-1]))
    last = values[-1]
    exact = [value for value in values if value.exact]
    if exact and draw(st.booleans()):  # what came later has no reader
        last = exact[-1]
    outputs = [last]
    if "flatten" in families and draw(st.booleans()):
        outputs = [head(builder, draw, families, last)]
        if draw(st.booleans()):
            outputs.append(last)
    if "arg" in families and outputs[0].exact and draw(st.booleans()):
        builder.family = "arg"
        outputs.append(pooling.arg(builder, draw, outputs[0]))
    return builder.model([start], outputs)


def head(builder: Builder, draw: Any, families: Collection[str], x: Value) -> Value:
    """Append layers on a flat value."""
    builder.family = "flatten"
    tail = [movement.flatten(builder, draw, x)]
    for _ in range(draw(st.integers(1, 3))):
        tail.append(step(builder, draw, families, tail[-1], tail))
    return tail[-1]
