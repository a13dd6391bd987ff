"""Compare the latency of models fairly: fresh sessions, interleaved in random order, beside an A/A control.

Two loaded copies of one model differ by several per cent, because memory lands elsewhere, and neighbours disturb long
blocks of runs. So the unit of the statistics is the *round*: every arm is loaded anew, all arms are run once per
iteration in a freshly shuffled order, and the baseline is loaded a second time as the control. What a round says of
an arm is the median over its iterations of log(t_arm / t_baseline); the interval is Student's t over the rounds
(Georges et al., OOPSLA 2007, for fresh invocations; Kalibera & Jones, ISMM 2013, for levels). Interleaved arms also
share the caches, so a model that would stay in a cache when run alone pays for its neighbours here, every arm alike.
"""

import contextlib
import gc
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prune2deploy.backends.base import AbstractBackend, AbstractSession, Feeds
from prune2deploy.backends.feeds import common_inputs, random_feeds
from prune2deploy.environment import usable_cores
from prune2deploy.errors import InputError
from prune2deploy.files import require_file

FASTER_BELOW = 0.98
"""An arm is called faster only when its whole interval lies below this ratio."""
SLOWER_ABOVE = 1.02
"""An arm is called slower only when its whole interval lies above this ratio."""
CONFIDENCE = 0.95
MIN_SESSIONS = 5
P99_RUNS = 1000
"""Fewer runs than this give no p99: it would rest on less than ten of them."""

Word = Literal["faster", "slower", "not shown to be faster"]
_DRIFT_LIMIT = 0.05
_SPREAD_LIMIT = 0.1
_FEWEST_ITERATIONS, _MOST_ITERATIONS = 10, 10_000
_FEWEST_WARM_UPS, _MOST_WARM_UPS = 5, 100_000


@dataclass(frozen=True)
class Arm:
    """A model under comparison: the file that holds it, or its serialized bytes."""

    name: str
    model: bytes | Path

    def read(self) -> bytes:
        """Return the model's bytes (of the file itself, without external data)."""
        return self.model if isinstance(self.model, bytes) else require_file(self.model, "an ONNX model").read_bytes()


@dataclass(frozen=True)
class Timing:
    """One arm's latency in milliseconds, over all its runs; percentiles are interpolated linearly."""

    arm: str
    runs: int
    median_ms: float
    mean_ms: float
    p90_ms: float
    p99_ms: float | None
    min_ms: float
    iqr_ms: float
    session_medians_ms: tuple[float, ...]
    drift: float
    """Median of the second half of the runs over that of the first half, minus 1."""


@dataclass(frozen=True)
class Ratio:
    """An arm's time as a share of the baseline's, with its interval over the rounds."""

    arm: str
    ratio: float
    low: float
    high: float
    session_ratios: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """What may be claimed of an arm, and why."""

    arm: str
    word: Word
    explanation: str


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found: timings (baseline first), ratios and verdicts of the other arms, and circumstances."""

    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    verdicts: tuple[Verdict, ...]
    control: Ratio | None
    control_timing: Timing | None
    circumstances: Mapping[str, Any]
    warnings: tuple[str, ...]
    raw_ms: Mapping[str, np.ndarray]
    """Arm -> milliseconds [rounds, iterations], in the order they were taken."""

    @property
    def baseline(self) -> str:
        """The name of the arm that the others are held against."""
        return self.timings[0].arm

    def to_json(self) -> dict[str, Any]:
        """Return the section ``bench`` of a report."""
        return {
            **self.circumstances,
            "baseline": self.baseline,
            "timings": [vars(timing) for timing in self.timings],
            "ratios": [vars(ratio) for ratio in self.ratios],
            "verdicts": [vars(verdict) for verdict in self.verdicts],
            "control": None if self.control is None else vars(self.control),
            "control_timing": None if self.control_timing is None else vars(self.control_timing),
            "warnings": list(self.warnings),
        }

    def samples(self) -> dict[str, list[list[float]]]:
        """Return the raw milliseconds of each arm, a list for each round, to the nanosecond."""
        return {arm: np.round(times, 6).tolist() for arm, times in self.raw_ms.items()}


def compare(
    arms: Sequence[Arm],
    *,
    backend: AbstractBackend,
    batch: int | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    feeds: Feeds | None = None,
    threads: int = 1,
    sessions: int = MIN_SESSIONS,
    iterations: int | None = None,
    seconds: float = 1.0,
    warm_up: float = 0.2,
    seed: int = 0,
    control: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Return how long the arms take and what may be claimed of each against the first one.

    Args:
        arms: the models; the first is the baseline.
        backend: opens the models.
        batch: the size of a dynamic first axis; 1 unless given.
        shapes: whole shapes of inputs that have other dynamic axes.
        feeds: the inputs to use in place of random ones.
        threads: how many CPU threads a session uses, and how many CPUs it is pinned to where the system can.
        sessions: rounds with fresh sessions, at least 5.
        iterations: runs of every arm in each round; unless given, as many as take ``seconds`` for each arm.
        seconds: see ``iterations``.
        warm_up: seconds for which each fresh session runs, at least 5 times, before it is measured.
        seed: of the inputs and the order of the runs.
        control: whether the baseline is loaded a second time; without it no claim is made.
        on_progress: called with (rounds done, rounds) after each round.

    Raises:
        InputError: if the arms disagree in their inputs, a shape is missing or wrong, or a model cannot be run.
        DeviceError: if the backend would run on another device.
    """
    _check_arguments(arms, batch, shapes, feeds, threads, sessions, iterations, seconds)
    load_before = os.getloadavg() if hasattr(os, "getloadavg") else None
    everyone = [*arms, *([Arm(f"{arms[0].name} (control)", arms[0].model)] if control else [])]
    rng = np.random.default_rng(seed)
    rounds: list[np.ndarray] = []
    with _pinned(threads) as cpus:
        for done in range(sessions):
            with _opened(everyone, backend, threads, rng) as opened:
                inputs = common_inputs({arm.name: session.inputs for arm, session in zip(arms, opened, strict=False)})
                given = random_feeds(inputs, batch=batch, shapes=shapes or {}, rng=rng) if feeds is None else feeds
                for session in opened:
                    session.bind(given)
                typical_ms = [_warm_up(session, warm_up) for session in opened]
                iterations = iterations or _iterations_for(seconds, typical_ms)
                rounds.append(_interleave(opened, iterations, rng))
                options = opened[0].describe()
            if on_progress is not None:
                on_progress(done + 1, sessions)
    times = np.stack(rounds, axis=1)  # [arms, rounds, iterations]
    circumstances = {
        "backend": backend.describe(),
        "session": options,
        "models": {arm.name: _fingerprint(arm) for arm in arms},
        "inputs": {name: {"shape": list(np.shape(array)), "type": str(array.dtype)} for name, array in given.items()},
        "random_inputs": feeds is None,
        "threads": threads,
        "affinity": cpus,
        "sessions": sessions,
        "iterations": iterations,
        "warm_up_seconds": warm_up,
        "seed": seed,
        "load_average": None if load_before is None else list(load_before),
        "cores": usable_cores(),
        "rule": {"faster_below": FASTER_BELOW, "slower_above": SLOWER_ABOVE, "confidence": CONFIDENCE},
        "percentiles": "linear",
    }
    return _conclude([arm.name for arm in everyone], times, control, circumstances)


def log_ratios(times: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return each round's median over its iterations of log(t_arm / t_baseline), from times [rounds, iterations]."""
    medians: np.ndarray = np.median(np.log(times / baseline), axis=1)
    return medians


def student_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return the mean of at least two values and the ends of its Student t interval: mean -+ t(n - 1) s / sqrt(n)."""
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half


def judge(ratio: Ratio, control: Ratio | None, baseline: str) -> Verdict:
    """Return what may be claimed of an arm, by a rule that is fixed before the measurement.

    It is faster only when its interval ends below 0.98 *and* below the control's interval; slower only when its
    interval begins above 1.02 and above the control's.
    """
    interval = f"{100 * CONFIDENCE:.0f} % interval {ratio.low:.3f} to {ratio.high:.3f}"
    says = f"'{ratio.arm}' takes {ratio.ratio:.3f} of the time of '{baseline}' ({interval})"
    if control is None:
        return Verdict(ratio.arm, "not shown to be faster", f"{says}; no A/A control was run, so nothing is claimed")
    against = f"the A/A control's interval ({control.low:.3f} to {control.high:.3f})"
    if ratio.high < FASTER_BELOW and ratio.high < control.low:
        return Verdict(ratio.arm, "faster", f"{says}: below {FASTER_BELOW} and below {against}")
    if ratio.low > SLOWER_ABOVE and ratio.low > control.high:
        return Verdict(ratio.arm, "slower", f"{says}: above {SLOWER_ABOVE} and above {against}")
    if ratio.high < FASTER_BELOW or ratio.low > SLOWER_ABOVE:
        return Verdict(ratio.arm, "not shown to be faster", f"{says}, which is not clear of {against}")
    return Verdict(ratio.arm, "not shown to be faster", f"{says}, which reaches into {FASTER_BELOW} to {SLOWER_ABOVE}")


def _conclude(names: Sequence[str], times: np.ndarray, control: bool, circumstances: Mapping[str, Any]) -> Comparison:
    """Return the statistics of times [arms, rounds, iterations]; the control, if there is one, is the last arm."""
    timings = [_timing(name, one) for name, one in zip(names, times, strict=True)]
    ratios = [_ratio(name, log_ratios(one, times[0])) for name, one in zip(names[1:], times[1:], strict=True)]
    control_ratio = ratios.pop() if control else None
    warnings = [
        f"'{timing.arm}' drifted: its second half took {timing.drift:+.1%} against the first; find a quieter machine"
        for timing in timings
        if abs(timing.drift) > _DRIFT_LIMIT
    ]
    warnings += [
        f"'{timing.arm}' is noisy: its interquartile range is {timing.iqr_ms / timing.median_ms:.0%} of its median"
        for timing in timings
        if timing.iqr_ms > _SPREAD_LIMIT * timing.median_ms
    ]
    load, cores, threads = circumstances["load_average"], circumstances["cores"], circumstances["threads"]
    if load is not None and load[0] > cores - threads + 0.5:
        warnings.append(
            f"the load average was {load[0]:.1f} on {cores} cores before the first run; other work may disturb it"
        )
    return Comparison(
        timings=tuple(timings[: len(names) - control]),
        ratios=tuple(ratios),
        verdicts=tuple(judge(ratio, control_ratio, names[0]) for ratio in ratios),
        control=control_ratio,
        control_timing=timings[-1] if control else None,
        circumstances=circumstances,
        warnings=tuple(warnings),
        raw_ms=dict(zip(names, times, strict=True)),
    )


def _timing(name: str, times: np.ndarray) -> Timing:
    flat = times.ravel()
    low, median, high, p90 = (float(value) for value in np.percentile(flat, [25, 50, 75, 90]))
    half = len(flat) // 2
    return Timing(
        arm=name,
        runs=len(flat),
        median_ms=median,
        mean_ms=float(flat.mean()),
        p90_ms=p90,
        p99_ms=float(np.percentile(flat, 99)) if len(flat) >= P99_RUNS else None,
        min_ms=float(flat.min()),
        iqr_ms=high - low,
        session_medians_ms=tuple(np.median(times, axis=1).tolist()),
        drift=float(np.median(flat[half:]) / np.median(flat[:half])) - 1,
    )


def _ratio(name: str, logs: np.ndarray) -> Ratio:
    ratio, low, high = (math.exp(value) for value in student_interval(logs))
    return Ratio(name, ratio, low, high, tuple(np.exp(logs).tolist()))


def _interleave(sessions: Sequence[AbstractSession], iterations: int, rng: np.random.Generator) -> np.ndarray:
    """Return milliseconds [sessions, iterations]; each iteration runs every session once, in a fresh order."""
    times = np.empty((len(sessions), iterations))
    orders = [rng.permutation(len(sessions)).tolist() for _ in range(iterations)]
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for iteration, order in enumerate(orders):
            for index in order:
                times[index, iteration] = sessions[index].run_once()
    finally:
        if was_enabled:
            gc.enable()
    return times


def _warm_up(session: AbstractSession, seconds: float) -> float:
    """Run the session until it has run for so long and return the median of its last runs, in milliseconds."""
    runs: list[float] = []
    spent = 0.0
    while len(runs) < _FEWEST_WARM_UPS or (spent < seconds * 1e3 and len(runs) < _MOST_WARM_UPS):
        runs.append(session.run_once())
        spent += runs[-1]
    return float(np.median(runs[-_FEWEST_WARM_UPS:]))


def _iterations_for(seconds: float, typical_ms: Sequence[float]) -> int:
    wanted = math.ceil(seconds * 1e3 / float(np.mean(typical_ms)))
    return min(max(wanted, _FEWEST_ITERATIONS), _MOST_ITERATIONS)


@contextlib.contextmanager
def _opened(
    arms: Sequence[Arm], backend: AbstractBackend, threads: int, rng: np.random.Generator
) -> Iterator[list[AbstractSession]]:
    """Open a session for each arm, in a random order, since who is loaded first gets other memory."""
    with contextlib.ExitStack() as stack:
        sessions: dict[int, AbstractSession] = {}
        for index in rng.permutation(len(arms)).tolist():
            sessions[index] = stack.enter_context(backend.open(arms[index].model, threads=threads))
        yield [sessions[index] for index in range(len(arms))]


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[list[int] | None]:
    """Keep this thread, and those it starts, on ``threads`` CPUs, on different cores where there are enough."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    chosen = sorted(sorted(before, key=_core_rank)[:threads])
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


def _core_rank(cpu: int) -> tuple[int, int]:
    """Return a CPU's place among the hardware threads of its core, then its number."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return 0, cpu
    siblings = [number for part in text.strip().split(",") for number in _cpu_range(part)]
    return (siblings.index(cpu) if cpu in siblings else 0), cpu


def _cpu_range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _fingerprint(arm: Arm) -> dict[str, Any]:
    data = arm.read()
    file = arm.model.name if isinstance(arm.model, Path) else None
    return {"file": file, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _check_arguments(
    arms: Sequence[Arm],
    batch: int | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    feeds: Feeds | None,
    threads: int,
    sessions: int,
    iterations: int | None,
    seconds: float,
) -> None:
    names = [arm.name for arm in arms]
    cores = usable_cores()
    problems = {
        "no model was given; name at least one": not arms,
        f"two models have one name ({', '.join(names)}); give each its own": len(set(names)) < len(names),
        f"sessions is {sessions}, but the interval needs at least {MIN_SESSIONS}": sessions < MIN_SESSIONS,
        f"threads is {threads}, but must be from 1 to {cores}, the CPUs this process may use": not 1
        <= threads
        <= cores,
        f"batch is {batch}, but must be at least 1": batch is not None and batch < 1,
        f"iterations is {iterations}, but must be at least 2": iterations is not None and iterations < 2,
        f"seconds is {seconds}, but must be more than 0": not seconds > 0,
        "both feeds and shapes were given; give one of them": feeds is not None and bool(shapes or batch),
    }
    for problem, found in problems.items():
        if found:
            raise InputError(problem)
