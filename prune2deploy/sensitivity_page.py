"""The page of a sensitivity survey: what every group costs at every share removed, and the floors that follow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune2deploy import figures
from prune2deploy.files import write_bytes
from prune2deploy.markup import Html, card, count_text, figure_place, percent_text, table, tag, tile
from prune2deploy.page import document


def write_sensitivity(found: Mapping[str, Any], out: Path) -> None:
    """Write one HTML file that shows a survey (`sensitivity.measure_sensitivity`'s document) and needs no network.

    Raises:
        InputError: if the file cannot be written.
    """
    dense, groups = found["reference"]["top1"], found["groups"]
    least = dense - found["tolerance"]
    drawn = {
        "curves": figures.sensitivity_curves(groups, dense, least),
        "map": figures.sensitivity_map(groups, dense),
    }
    norms = "norms measured anew each time" if found["recalibrate"] else "norms as they were"
    facts = [
        ("network", found["network"]),
        ("method", found["method"]),
        ("data", found["data"]),
        ("held-out images", count_text(found["reference"]["images"])),
    ]
    body = [
        tag(
            "header",
            tag("h1", f"Sensitivity of {found['network']}"),
            tag("p", "How much accuracy it costs to prune one group of channels, all others whole.", class_="soft"),
        ),
        tag(
            "main",
            tag("p", " · ".join(f"{name} {value}" for name, value in facts) + f" · {norms}", class_="soft"),
            _tiles(found),
            card(
                "Accuracy over the share removed",
                f"A line for every group, early ones blue, late ones orange. Dashed: {percent_text(least)}, the least "
                "that a suggested floor may leave.",
                figure_place("curves", drawn["curves"]["layout"]["height"]),
            ),
            card(
                "What is lost, in points of top-1",
                "Groups in the order of the network. Point at a cell for its width.",
                figure_place("map", drawn["map"]["layout"]["height"]),
            ),
            card("In numbers", _CAVEAT, table(head(found), rows(found), numbers=True)),
        ),
    ]
    write_bytes(out, document(body, drawn).encode())


_CAVEAT = (
    "A floor is the smallest width measured that keeps the tolerance, as do all wider ones. It holds for the group "
    "alone and before fine-tuning: groups that are pruned together cost more, and training wins much of it back. "
    "Weights from elsewhere may have seen the images that are held out here, so look at differences."
)


def head(found: Mapping[str, Any]) -> list[str]:
    """Return the head of the table."""
    return ["group", "channels", *(f"-{100 * share:g} %" for share in found["shares"]), "floor"]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for every group: its channels, its top-1 at every share removed, and its floor."""
    return [
        [one["id"], str(one["size"]), *(percent_text(point["top1"]) for point in one["points"]), str(one["floor"])]
        for one in found["groups"]
    ]


def basis(found: Mapping[str, Any]) -> str:
    """Return what the floors keep: the accuracy that the network has whole, but for the tolerance."""
    whole = f"{percent_text(found['reference']['top1'])} with its norms measured anew" if found["recalibrate"] else ""
    whole = whole or percent_text(found["dense"]["top1"])
    return f"the whole network's top-1 of {whole}, but for {100 * found['tolerance']:g} points"


def _tiles(found: Mapping[str, Any]) -> Html:
    narrowest = [(one["points"][-1]["top1"], one["id"]) for one in found["groups"]]
    share = f"without {100 * found['shares'][-1]:g} % of its channels"
    tiles = [
        ("Top-1, dense", percent_text(found["dense"]["top1"]), "as it came"),
        ("Most sensitive", percent_text(min(narrowest)[0]), f"{min(narrowest)[1]}, {share}"),
        ("Least sensitive", percent_text(max(narrowest)[0]), f"{max(narrowest)[1]}, {share}"),
    ]
    if found["recalibrate"]:
        note = "what is pruned is held against it"
        tiles.insert(1, ("Top-1, norms anew", percent_text(found["reference"]["top1"]), note))
    return tag("div", *(tile(*one) for one in tiles), class_="tiles")
