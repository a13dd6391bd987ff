"""The page of a comparison: accuracy over time with its Pareto front, and the table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune2deploy import comparison, figures
from prune2deploy.figures import Figure
from prune2deploy.files import write_bytes
from prune2deploy.markup import Html, banner, card, figure_place, table, tag
from prune2deploy.page import document


def write_comparison(found: Mapping[str, Any], out: Path) -> None:
    """Write one HTML file that shows a comparison (`compare.compare`'s document) and needs no network.

    Raises:
        InputError: if the file cannot be written.
    """
    drawn: dict[str, Figure] = {}
    points, timed = comparison.points(found["rows"])
    cost = (
        "time of the slim graph, as a share of the dense one's" if timed else "MACs, as a share of the dense network's"
    )
    if len(points) > 1:
        front = comparison.pareto([(cost, accuracy) for _, cost, accuracy in points])
        drawn["front"] = figures.pareto_front(points, front, cost)
    failed = [f"{name}: {why}" for name, why in found["failed"].items()]
    body = [
        tag(
            "header",
            tag("h1", f"Methods on {found['network']}"),
            tag("p", "Accuracy and latency of pruning methods, beside controls at their own widths.", class_="soft"),
        ),
        tag(
            "main",
            *(banner("bad", "Failed. ", text) for text in failed),
            *(
                card("Accuracy and cost", "", figure_place(name, one["layout"]["height"]))
                for name, one in drawn.items()
            ),
            card(
                "Methods",
                comparison.explanation(found["finetune"]),
                table(comparison.HEAD, [comparison.cells(row) for row in found["rows"]], numbers=True),
            ),
            *(_published(found["published"]) if found["published"] else []),
        ),
    ]
    write_bytes(out, document(body, drawn).encode())


def _published(rows: list[Mapping[str, Any]]) -> list[Html]:
    cells = [comparison.published_cells(row) for row in rows]
    return [card("Published results, and ours", "", table(comparison.PUBLISHED_HEAD, cells, numbers=True))]
