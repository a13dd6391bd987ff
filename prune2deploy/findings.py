"""What a run's report says, whichever of its sections are there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prune2deploy.report import read_report, read_samples

Z_95 = 1.959964
"""The normal quantile of a two-sided 95 % interval."""


class Findings:
    """A run's report, asked for its results; what was not measured is None or empty."""

    def __init__(self, run: Path) -> None:
        self.name = run.resolve().name
        self.report = read_report(run)
        self.samples = read_samples(run)

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section, empty where the run did not come to it."""
        found: Mapping[str, Any] = self.report.get(name) or {}
        return found

    @property
    def ratio(self) -> Mapping[str, Any] | None:
        """The ratio to the baseline that a headline is about: that of ``slim``, else of the first arm."""
        ratios: Sequence[Mapping[str, Any]] = self.section("bench").get("ratios") or []
        return next((one for one in ratios if one["arm"] == "slim"), ratios[0] if ratios else None)

    @property
    def verdict(self) -> Mapping[str, Any] | None:
        """The verdict on that arm."""
        ratio = self.ratio
        verdicts: Sequence[Mapping[str, Any]] = self.section("bench").get("verdicts") or []
        return next((one for one in verdicts if ratio is not None and one["arm"] == ratio["arm"]), None)

    @property
    def nothing_removed(self) -> bool:
        """Whether the slim graph, or without one the plan, is as large as the dense network."""
        if self.section("slim"):
            return bool(self.section("slim").get("removed_channels") == 0)
        before, after = self.change("macs")
        return before is not None and before == after

    def change(self, what: str) -> tuple[float | None, float | None]:
        """Return ``macs`` or ``parameters`` before and after, of the slim graph where there is one, else as planned.

        Before is the masked graph, or the dense one where the method made that larger.
        """
        slim, prune = self.section("slim").get(what) or {}, self.section("prune").get(what) or {}
        dense = self.section("export").get("dense") or {}
        before = dense.get(what, slim.get("before"))
        return (before, slim.get("after")) if slim else (prune.get("dense"), prune.get("pruned"))

    def share(self, what: str) -> float | None:
        """Return which share of the MACs or parameters is left."""
        before, after = self.change(what)
        return after / before if before and after is not None else None

    def top1(self, which: str) -> float | None:
        """Return the top-1 accuracy of ``dense``, ``pruned`` or ``finetuned``; ``last`` is the last one measured."""
        accuracy = self.section("prune").get("accuracy") or {}
        wanted = ("finetuned", "pruned") if which == "last" else (which,)
        return next((accuracy[key]["top1"] for key in wanted if accuracy.get(key)), None)

    def disagreeing(self) -> list[Mapping[str, Any]]:
        """Return the outputs that differ by more than their limit."""
        return [one for one in self.section("verify").get("outputs") or [] if not within_limit(one)]

    def has_samples_of(self, arms: Sequence[str]) -> bool:
        """Return whether the raw timings are there and are those behind the report's medians."""
        timings = [*self.section("bench").get("timings", []), self.section("bench").get("control_timing") or {}]
        medians = {one["arm"]: one["median_ms"] for one in timings if one}
        if not set(arms) <= set(self.samples):
            return False
        found = {arm: float(np.median([time for times in self.samples[arm] for time in times])) for arm in arms}
        return all(abs(found[arm] - medians[arm]) <= 1e-3 * medians[arm] for arm in arms)


def within_limit(output: Mapping[str, Any]) -> bool:
    """Return whether an output of the section ``verify`` differs by no more than its limit; unknown means no."""
    difference, limit = output.get("difference"), output.get("limit")
    return difference is not None and limit is not None and bool(difference <= limit)


def caveats(verify: Mapping[str, Any]) -> list[str]:
    """Return what the section ``verify`` does not prove, or only with a reservation, in sentences."""
    texts = [f"'{name}' is nowhere a number: nothing is proved of it" for name in verify.get("not_numbers") or []]
    if verify.get("computed_in"):
        texts.append(f"ONNX Runtime has no kernels of the graphs' own type: both were run in {verify['computed_in']}")
    if verify.get("ill_conditioned"):
        texts.append(
            "rounding alone (a last place in the weights, or what the runtime makes of quantised layers) moves the "
            "outputs as much as the two graphs differ, on inputs "
            f"{'; '.join(verify['ill_conditioned'])}"
        )
    return texts


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the ends of the 95 % score interval of a share of ``count`` (Wilson, JASA 22, 1927)."""
    center = share + Z_95**2 / (2 * count)
    half = Z_95 * (share * (1 - share) / count + Z_95**2 / (4 * count**2)) ** 0.5
    return (center - half) / (1 + Z_95**2 / count), (center + half) / (1 + Z_95**2 / count)
