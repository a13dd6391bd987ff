"""Inspect: what the analysis knows of a graph, as plain rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from prune2deploy.graph.keep import Analysis, analyse
from prune2deploy.graph.layers import layer_rows, totals
from prune2deploy.graph.liveness import GRAPH_OUTPUT
from prune2deploy.graph.node import tables
from prune2deploy.graph.normal import normalise
from prune2deploy.graph.rewrite import opaque_operators
from prune2deploy.graph.validity import blaming_the_file


@blaming_the_file
def inspect_model(model: onnx.ModelProto) -> dict[str, Any]:
    """Return a graph's layers, totals, opaque operators, and the facts of every value that has channels."""
    analysis = analyse(tables(normalise(model)))
    rows = layer_rows(analysis)
    before, after = totals(rows, "before"), totals(rows, "after")
    return {
        "layers": [row.to_json() for row in rows],
        "macs": {"before": before.macs, "after": after.macs},
        "parameters": {"before": before.parameters, "after": after.parameters},
        "bytes": {"before": sum(row.bytes_before for row in rows), "after": sum(row.bytes_after for row in rows)},
        "opaque": opaque_operators(analysis),
        "values": [_value_row(value, analysis) for value in analysis.liveness.live if _has_channels(value, analysis)][
            ::-1
        ],
    }


def _has_channels(value: str, analysis: Analysis) -> bool:
    return max(analysis.known.view.facts[value].shape, default=1) > 1


def _value_row(value: str, analysis: Analysis) -> dict[str, Any]:
    """Return counts over the positions of a value; aliases are positions that are affine in another one."""
    fact = analysis.known.view.facts[value]
    live, reader = analysis.liveness.live[value], analysis.liveness.reader[value]
    varying = fact.number[~fact.constant]
    indices = np.unique(reader[live])
    names = ["the graph's output" if i == GRAPH_OUTPUT else analysis.tables.nodes[i].name for i in indices.tolist()]
    kept = [mask.sum() for (name, _), mask in analysis.keep.kept.items() if name == value]
    return {
        "value": value,
        "channels": int(fact.number.size),
        "constant": int(fact.constant.sum()),
        "aliases": len(varying) - len(np.unique(varying)),
        "live": int(live.sum()),
        "kept": int(np.prod(kept, dtype=np.int64)),
        "reader": ", ".join(names[:3]) + (", …" if len(names) > 3 else ""),
    }
