"""The figures of a report page, as the plain dictionaries that plotly.js draws."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

Figure = dict[str, Any]

BEFORE, AFTER = "#c3cad5", "#2563eb"
_ARMS = ("#2563eb", "#c2570c", "#0f766e", "#9333ea", "#b91c1c", "#4d7c0f")
_BASELINE, _GRID, _INK = "#5b6577", "#e7eaef", "#1c2430"
_EARLY, _LATE = (37, 99, 235), (194, 87, 12)
_MARGIN = {"l": 8, "r": 12, "t": 40, "b": 8}
_MOST_ROWS = 60
_LONGEST_LABEL = 22


def layer_bars(layers: Sequence[Mapping[str, Any]], before: str, after: str, title: str) -> Figure:
    """Return the layers' ``before`` and ``after`` values as bars over each other; what sticks out was removed."""
    rows = len(layers) <= _MOST_ROWS
    names = [escape(str(layer.get("name", "?"))) for layer in layers]
    places = list(range(len(layers)))
    traces = []
    for key, label, color in ((before, "before", BEFORE), (after, "after", AFTER)):
        values = [layer.get(key) for layer in layers]
        across, along = (values, places) if rows else (places, values)
        traces.append(
            {
                "type": "bar",
                "name": label,
                "orientation": "h" if rows else "v",
                "x": across,
                "y": along,
                "width": 0.7,
                "marker": {"color": color},
                "customdata": names,
                "hovertemplate": f"%{{customdata}}<br>{label}: %{{{'x' if rows else 'y'}}}<extra></extra>",
            }
        )
    value_axis = _axis(title=title, rangemode="tozero")
    layer_axis = _axis(
        tickvals=places if rows else [],
        ticktext=[_label(str(layer.get("name", "?"))) for layer in layers] if rows else [],
        title=None if rows else f"{len(layers)} layers, first to last (touch or point at one for its name)",
        range=[len(layers) - 0.4, -0.6] if rows else [-0.6, len(layers) - 0.4],
        showgrid=False,
    )
    layout = _layout(110 + 20 * len(layers) if rows else 340, barmode="overlay")
    axes = {"xaxis": value_axis, "yaxis": layer_axis} if rows else {"xaxis": layer_axis, "yaxis": value_axis}
    return {"data": traces, "layout": layout | axes}


def latency_shares(samples: Mapping[str, Sequence[Sequence[float]]], baseline: str, control: str | None) -> Figure:
    """Return, for every arm, the share of its runs that took at most so long; the slowest 2 % are off the picture."""
    traces, ends = [], []
    others = [arm for arm in samples if arm not in {baseline, control}]
    styles = {baseline: (BEFORE, "solid", 6.0), control: (_BASELINE, "dot", 2.0)}
    styles |= {arm: (_ARMS[place % len(_ARMS)], "solid", 2.5) for place, arm in enumerate(others)}
    for arm, rounds in samples.items():
        times = np.sort(np.concatenate([np.asarray(one, dtype=float) for one in rounds]))
        shares = np.linspace(0, 100, min(len(times), 400))
        color, dash, width = styles[arm]
        ends.append(float(np.percentile(times, 98)))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": escape(arm),
                "x": np.round(np.percentile(times, shares), 6).tolist(),
                "y": np.round(shares, 3).tolist(),
                "line": {"color": color, "dash": dash, "width": width},
                "hovertemplate": f"{escape(arm)}: %{{y:.0f}} % of runs took at most %{{x:.4g}} ms<extra></extra>",
            }
        )
    layout = _layout(330) | {
        "xaxis": _axis(title="milliseconds", range=[0, 1.05 * max(ends)]),
        "yaxis": _axis(title="% of runs", range=[0, 101]),
    }
    return {"data": traces, "layout": layout}


def ratio_intervals(
    ratios: Sequence[Mapping[str, Any]], control: Mapping[str, Any] | None, rule: Mapping[str, float]
) -> Figure:
    """Return each arm's ratio to the baseline with its interval and its rounds, and the A/A control's below them."""
    named = [*((str(one["arm"]), one) for one in ratios), *([("A/A control", control)] if control is not None else [])]
    traces, ticks, values = [], [], [rule["faster_below"], rule["slower_above"], 1.0]
    for place, (name, one) in enumerate(named):
        color = _BASELINE if one is control else _ARMS[place % len(_ARMS)]
        rounds = list(one.get("session_ratios", ()))
        values += [one["low"], one["high"], *rounds]
        ticks.append(f"<b>{_label(name)}</b><br>{one['ratio']:.3f}<br>({one['low']:.3f} to {one['high']:.3f})")
        traces.append(_marks(rounds, place, f"{color}66", 8, f"{escape(name)}, one round: %{{x:.3f}}<extra></extra>"))
        mean = _marks([one["ratio"]], place, color, 13, f"{escape(name)}: %{{x:.3f}}<extra></extra>")
        up, down = [one["high"] - one["ratio"]], [one["ratio"] - one["low"]]
        mean["error_x"] = {"array": up, "arrayminus": down, "color": color, "thickness": 3, "width": 8}
        traces.append(mean)
    room = 0.06 * (max(values) - min(values))
    band = {"type": "rect", "x0": rule["faster_below"], "x1": rule["slower_above"], "y0": 0, "y1": 1, "yref": "paper"}
    line = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": _INK, "width": 1}}
    layout = _layout(90 + 76 * len(named), showlegend=False, margin=_MARGIN | {"t": 8}) | {
        "xaxis": _axis(title="time, as a share of the baseline's", range=[min(values) - room, max(values) + room]),
        "yaxis": _axis(
            tickvals=list(range(len(named))), ticktext=ticks, range=[len(named) - 0.4, -0.6], showgrid=False
        ),
        "shapes": [band | {"fillcolor": "#f3e8c8", "line": {"width": 0}, "layer": "below"}, line],
    }
    return {"data": traces, "layout": layout}


def training_curve(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Return loss and held-out top-1 over the epochs of fine-tuning."""
    epochs = [one.get("epoch") for one in history]
    curves = (("loss", "loss", _BASELINE, "y", 1), ("holdout_top1", "held-out top-1, %", AFTER, "y2", 100))
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label,
            "x": epochs,
            "y": [None if one.get(key) is None else one[key] * factor for one in history],
            "yaxis": axis,
            "line": {"color": color, "width": 2.5},
        }
        for key, label, color, axis, factor in curves
    ]
    layout = _layout(320) | {
        "xaxis": _axis(title="epoch", dtick=1 if len(history) < 12 else None),
        "yaxis": _axis(title="loss", rangemode="tozero"),
        "yaxis2": _axis(title="top-1, %", overlaying="y", side="right", showgrid=False, tickmode="auto"),
    }
    return {"data": traces, "layout": layout}


def pareto_front(points: Sequence[tuple[str, float, float]], front: Sequence[int], cost: str) -> Figure:
    """Return accuracy over cost for (name, cost, accuracy), with a line through those that none beats in both."""
    line, places = [points[index] for index in front], name_places(points)
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "none is better in both",
            "x": [cost for _, cost, _ in line],
            "y": [100 * accuracy for _, _, accuracy in line],
            "line": {"color": AFTER, "width": 2, "dash": "dot"},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "markers+text",
            "showlegend": False,
            "x": [cost for _, cost, _ in points],
            "y": [100 * accuracy for _, _, accuracy in points],
            "text": [escape(name) if place else "" for (name, _, _), place in zip(points, places, strict=True)],
            "textposition": [place or "top center" for place in places],
            "hovertext": [escape(name) for name, _, _ in points],
            "marker": {"size": 10, "color": [AFTER if i in front else _BASELINE for i in range(len(points))]},
            "hovertemplate": "%{hovertext}: %{y:.2f} % at %{x:.3f}<extra></extra>",
        },
    ]
    layout = _layout(460) | {"xaxis": _axis(title=cost), "yaxis": _axis(title="top-1 after fine-tuning, %")}
    return {"data": traces, "layout": layout}


_PICTURE = (800.0, 330.0)
"""About how many pixels points are spread over; a letter of their names has 7, a line 14, and a point 12."""

_BESIDE = 45.0
"""Pixels of the picture beside the outermost points."""

_SIDES = {
    "middle right": (1, 0),
    "middle left": (-1, 0),
    "top center": (0, 1),
    "bottom center": (0, -1),
    "top right": (1, 1),
    "top left": (-1, 1),
    "bottom right": (1, -1),
    "bottom left": (-1, -1),
}


_Box = tuple[float, float, float, float]
"""Left, lower, right and upper end."""


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def name_places(points: Sequence[tuple[str, float, float]]) -> list[str | None]:
    """Return on which side of each point (name, x, y) its name lies over no other name or point; None: on none."""

    def pixels(values: Sequence[float], size: float) -> list[float]:
        low, high = min(values, default=0.0), max(values, default=0.0)
        return [size * (value - low) / ((high - low) or 1.0) for value in values]

    across = pixels([x for _, x, _ in points], _PICTURE[0])
    up = pixels([y for _, _, y in points], _PICTURE[1])
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in zip(across, up, strict=True)]
    found: list[str | None] = []
    for (name, _, _), x, y in zip(points, across, up, strict=True):
        width = 7 * len(name)
        for side, (right, top) in _SIDES.items():
            left, low = x + 7 * right + width * (right - 1) / 2, y + 7 * top + 14 * (top - 1) / 2
            box = (left, low, left + width, low + 14)
            inside = left >= -_BESIDE and left + width <= _PICTURE[0] + _BESIDE
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append(side)
                break
        else:
            found.append(None)
    return found


def sensitivity_curves(groups: Sequence[Mapping[str, Any]], dense: float, least: float) -> Figure:
    """Return top-1 over the share removed, a line for every group (of `sensitivity`'s document), and the least wanted.

    Early groups are blue and late ones orange, since often one end of a network can spare less; the worst are named.
    """
    traces = []
    for place, group in enumerate(groups):
        late = place / max(1, len(groups) - 1)
        color = "#" + "".join(f"{round((1 - late) * a + late * b):02x}" for a, b in zip(_EARLY, _LATE, strict=True))
        name = escape(str(group["id"]))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [0, *(100 * point["share"] for point in group["points"])],
                "y": [100 * dense, *(100 * point["top1"] for point in group["points"])],
                "line": {"color": color, "width": 2},
                "marker": {"size": 5},
                "customdata": [group["size"], *(point["width"] for point in group["points"])],
                "hovertemplate": f"{name}, %{{customdata}} of {group['size']} channels: %{{y:.2f}} %<extra></extra>",
            }
        )
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 100 * least, "y1": 100 * least}
    shares = [100 * point["share"] for point in groups[0]["points"]]
    beside = {"xanchor": "left", "xshift": 6, "showarrow": False}
    worst = sorted(groups, key=lambda group: group["points"][-1]["top1"])[:3]
    lowest = min(point["top1"] for group in groups for point in group["points"])
    named: list[dict[str, Any]] = []
    for group in worst:
        x, y = shares[-1], 100 * group["points"][-1]["top1"]
        is_free = all(y - one["y"] > 5 * (dense - lowest) for one in named)  # 5 % of the height: no name over another
        if y < 100 * least and is_free:
            named.append({"x": x, "y": y, "text": _label(str(group["id"]))} | beside)
    layout = _layout(380, showlegend=False, margin=_MARGIN | {"t": 8}) | {
        "xaxis": _axis(
            title="% of the group's channels removed",
            tickvals=[0, *shares],
            range=[0, 1.25 * shares[-1]],  # room for the names
        ),
        "yaxis": _axis(title="held-out top-1, %"),
        "shapes": [line | {"line": {"color": _INK, "width": 1, "dash": "dash"}}],
        "annotations": named,
    }
    return {"data": traces, "layout": layout}


def sensitivity_map(groups: Sequence[Mapping[str, Any]], dense: float) -> Figure:
    """Return how many points of top-1 every group costs at every share (of `sensitivity`'s document), as a map."""
    losses = [[100 * (dense - point["top1"]) for point in group["points"]] for group in groups]
    widths = [[f"{point['width']} of {group['size']}" for point in group["points"]] for group in groups]
    trace = {
        "type": "heatmap",
        "x": [f"{100 * point['share']:g} %" for point in groups[0]["points"]],
        "y": list(range(len(groups))),
        "z": losses,
        "text": [[f"{loss:.1f}" for loss in row] for row in losses],
        "texttemplate": "%{text}",
        "customdata": widths,
        "hovertemplate": "%{customdata} channels: %{z:.2f} points less<extra></extra>",
        "colorscale": [[0, "#ffffff"], [0.15, "#fde8c9"], [0.5, "#f0a35e"], [1, _ARMS[1]]],
        "zmin": 0,
        "zmax": max(5.0, *(loss for row in losses for loss in row)),
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
    }
    layout = _layout(100 + 22 * len(groups)) | {
        "xaxis": _axis(title="share removed", side="top", type="category", showgrid=False),
        "yaxis": _axis(
            tickvals=list(range(len(groups))),
            ticktext=[_label(str(group["id"])) for group in groups],
            autorange="reversed",
            showgrid=False,
        ),
    }
    return {"data": [trace], "layout": layout}


def _marks(values: Sequence[float], place: int, color: str, size: int, hover: str) -> Figure:
    marker = {"color": color, "size": size}
    return {"type": "scatter", "mode": "markers", "x": list(values), "y": [place] * len(values)} | {
        "marker": marker,
        "hovertemplate": hover,
        "cliponaxis": False,
    }


def _label(name: str) -> str:
    """Return a name that fits beside an axis: its end, which tells layers apart."""
    return escape(name if len(name) <= _LONGEST_LABEL else "…" + name[1 - _LONGEST_LABEL :])


def _axis(*, title: str | None = None, **settings: Any) -> dict[str, Any]:
    axis = {
        "gridcolor": _GRID,
        "zerolinecolor": _GRID,
        "automargin": True,
        "fixedrange": True,
        "ticks": "outside",
        "ticklen": 5,
        "tickcolor": "#ffffff",  # room between the labels and what they name
        **settings,
    }
    return axis if title is None else {**axis, "title": {"text": title, "standoff": 10}}


def _layout(height: int, **settings: Any) -> dict[str, Any]:
    return {
        "height": height,
        "autosize": True,
        "dragmode": False,
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "margin": _MARGIN,
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": _INK},
        "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
        "hoverlabel": {"align": "left"},
        **settings,
    }
