"""What a comparison of methods says: one row for each method and target, from its finished trials and controls."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

Trial = Mapping[str, Any]
"""A finished trial, as `compare.trial_result` writes it."""

Row = dict[str, Any]

Control = Literal["random", "l1", "scratch"]
CONTROLS: tuple[Control, ...] = get_args(Control)


def rows(trials: Sequence[Trial], latencies: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return a row for each method and target: means over the seeds, beside its controls at its own widths.

    Args:
        trials: all that finished, controls among them.
        latencies: `graph key` -> ``ratio``, ``low``, ``high`` of the slim graph's time to the dense one's.
    """
    found = []
    for method, target in dict.fromkeys((one["method"], one["target"]) for one in trials if not one["control"]):
        own = sorted(
            (one for one in trials if not one["control"] and (one["method"], one["target"]) == (method, target)),
            key=lambda one: int(one["seed"]),
        )
        row: Row = {
            "method": method,
            "target": target,
            "seeds": [one["seed"] for one in own],
            "macs": _mean(_share(one["macs"]) for one in own),
            "parameters": _mean(_share(one["parameters"]) for one in own),
            "dynamic_macs": _mean(one["dynamic_macs"] for one in own),
            "dense": _mean(one["accuracy"]["dense"] for one in own),
            "pruned": _mean(one["accuracy"]["pruned"] for one in own),
            "finetuned": _mean(one["accuracy"]["finetuned"] for one in own),
            "spread": _spread([one["accuracy"]["finetuned"] for one in own]),
            "selection_seconds": _mean(one["seconds"].get("selection") for one in own),
            "training_seconds": _mean(one["seconds"].get("training") for one in own),
            "training_epochs": _mean(one["training_epochs"] for one in own),
            "finetune_epochs": own[0]["finetune_epochs"],
            "latency": next((latencies[one["graph"]] for one in own if one["graph"] in latencies), None),
        }
        for control in CONTROLS:
            known = [control_accuracy(one, control, trials) for one in own]
            row[f"{control}_control"] = _mean(known)
            row[f"{control}_seeds"] = [one["seed"] for one, there in zip(own, known, strict=True) if there is not None]
        row["beats_random"] = None if method == "random" else _beats(own, trials)
        found.append(row)
    return found


def control_accuracy(trial: Trial, control: str, trials: Iterable[Trial]) -> float | None:
    """Return the accuracy after fine-tuning of a trial's control: the same widths, seed and fine-tuning.

    The one from scratch trained as long as the trial's method and its fine-tuning did together.
    """
    wanted = (trial["widths_key"], trial["seed"], trial["finetune_epochs"])
    if control == "scratch":
        wanted = (*wanted[:2], trial["training_epochs"] + trial["finetune_epochs"])
    for one in trials:
        if (one["widths_key"], one["seed"], one["finetune_epochs"]) == wanted and control_of(one) == control:
            accuracy: float | None = one["accuracy"]["finetuned"]
            return accuracy
    return None


def control_of(trial: Trial) -> str | None:
    """Return which control a trial can stand for: that of its method, if it has one common share or given widths."""
    if trial["from_scratch"]:
        return "scratch"
    return trial["method"] if trial["method"] in CONTROLS and not trial["options"] else None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, accuracy) that no other beats in both, cheapest first."""
    best, front = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def points(found: Sequence[Row]) -> tuple[list[tuple[str, float, float]], bool]:
    """Return (name, cost, accuracy) of every row that has both, and whether the cost is the time (else the MACs).

    The dense network is the first point. A dynamic network's MACs are the mean over images.
    """
    timed = bool(found) and all(row["latency"] for row in found if row["finetuned"] is not None)
    named = [
        (
            _name(row, found),
            row["latency"]["ratio"] if timed else row["dynamic_macs"] or row["macs"],
            row["finetuned"],
        )
        for row in found
        if row["finetuned"] is not None
    ]
    dense = [("dense", 1.0, row["dense"]) for row in found[:1] if row["dense"] is not None]
    return dense + named, timed


def published_rows(found: Sequence[Row], published: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return each published result with ours, where the method was tried, and the gap between the two changes."""
    listed = []
    for paper in published:
        ours = next((row for row in found if _is_of(row, paper)), None)
        known = paper.get("dense") is not None and paper.get("top1") is not None
        change = paper["top1"] - paper["dense"] if known else paper.get("change")
        own_change = None if ours is None or ours["dense"] is None else ours["finetuned"] - ours["dense"]
        gap = None if change is None or own_change is None else own_change - change
        listed.append(
            {**paper, "change": change, "ours": ours and ours["finetuned"], "own_change": own_change, "gap": gap}
        )
    return listed


def _is_of(row: Row, paper: Mapping[str, Any]) -> bool:
    wanted = paper.get("target")
    return row["method"] == paper["method"] and row["finetuned"] is not None and wanted in (None, row["target"])


HEAD = (
    "method",
    "MACs",
    "params",
    "before fine-tuning",
    "after",
    "random",
    "L1",
    "from scratch",
    "selection",
    "own training",
    "epochs",
    "time",
)
"""The columns of the table; the three controls have the method's own widths."""


def cells(row: Row) -> list[str]:
    """Return a row as text, in the order of `HEAD`."""
    spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.2f}"
    latency = row["latency"]
    macs = f"⌀ {_percent(row['dynamic_macs'], 1)}" if row["dynamic_macs"] else _percent(row["macs"], 1)
    return [
        f"{row['method']}, {row['target']}",
        macs,
        _percent(row["parameters"], 1),
        _percent(row["pruned"]),
        _percent(row["finetuned"]) + spread,
        _control(row, "random") + (" (not beaten)" if row["beats_random"] is False else ""),
        _control(row, "l1"),
        _control(row, "scratch"),
        "–" if row["selection_seconds"] is None else f"{row['selection_seconds']:.2f} s",
        "–" if row["training_seconds"] is None else f"{row['training_seconds']:,.0f} s",
        f"{row['training_epochs']:g} + {row['finetune_epochs']}"
        if row["training_epochs"]
        else str(row["finetune_epochs"]),
        "–" if latency is None else _ratio(latency),
    ]


def explanation(finetune: Mapping[str, Any]) -> str:
    """Return what the columns of the table mean; ``finetune`` is a recipe's section of that name."""
    return (
        "Accuracies are top-1 on the test images, means over the seeds ± their sample deviation, after "
        f"{finetune['epochs']} epochs of fine-tuning (learning rate {finetune['learning_rate']:g}). "
        "Random, L1 and from scratch are the controls at each method's own widths: the first two with the same "
        "fine-tuning, the last trained for as many epochs as the method and its fine-tuning together. "
        "Epochs are those that trained weights (in the method's own training + fine-tuning). ⌀ is a mean over images. "
        "Time is that of the slim graph, the dense one being 1."
    )


def markdown(found: Sequence[Row], published: Sequence[Row], finetune: Mapping[str, Any]) -> str:
    """Return the tables as Markdown; ``finetune`` is as for `explanation`."""
    lines = [_line(HEAD), _line(["---", *["--:"] * (len(HEAD) - 1)]), *(_line(cells(row)) for row in found)]
    lines += ["", explanation(finetune)]
    if published:
        lines += ["", _line(PUBLISHED_HEAD), _line(["---", *["--:"] * (len(PUBLISHED_HEAD) - 1)])]
        lines += [_line(published_cells(row)) for row in published]
    return "\n".join(lines) + "\n"


PUBLISHED_HEAD = ("published", "dense", "pruned", "change", "ours", "our change", "gap")


def published_cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of `published_rows` as text, in the order of `PUBLISHED_HEAD`; changes are in points."""
    return [
        row["text"],
        _percent(row.get("dense")),
        _percent(row.get("top1")),
        _points(row["change"]),
        _percent(row["ours"]),
        _points(row["own_change"]),
        _points(row["gap"]),
    ]


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def _name(row: Row, found: Sequence[Row]) -> str:
    several = len({one["target"] for one in found}) > 1
    return f"{row['method']} {row['target']}" if several else str(row["method"])


def _percent(share: float | None, digits: int = 2) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def _control(row: Row, control: Control) -> str:
    seeds, all_of_them = row[f"{control}_seeds"], row["seeds"]
    few = f" ({len(seeds)} of {len(all_of_them)} seeds)" if seeds and len(seeds) < len(all_of_them) else ""
    return _percent(row[f"{control}_control"]) + few


def _ratio(latency: Mapping[str, Any]) -> str:
    text = f"{latency['ratio']:.3f} [{latency['low']:.3f}, {latency['high']:.3f}]"
    return text if latency["verdict"] == "faster" else f"{text} ({latency['verdict']})"


def _points(change: float | None) -> str:
    return "–" if change is None else f"{100 * change:+.2f}"


def _share(change: Mapping[str, float]) -> float:
    return change["pruned"] / change["dense"]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _spread(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


def _beats(own: Sequence[Trial], trials: Sequence[Trial]) -> bool | None:
    """Return whether trials are better than random masks in the mean over the seeds that have both."""
    pairs = [(one["accuracy"]["finetuned"], control_accuracy(one, "random", trials)) for one in own]
    gains = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return float(np.mean(gains)) > 0 if gains else None
