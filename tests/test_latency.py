"""The comparison of latencies: its statistics on planned durations, and the real path through ONNX Runtime."""

import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune2deploy.backends.base import AbstractBackend, AbstractSession, Feeds, InputInfo
from prune2deploy.errors import InputError
from prune2deploy.latency import Arm, Comparison, Ratio, compare, judge, log_ratios, student_interval

FLOAT = np.dtype(np.float32)


class PlannedSession(AbstractSession):
    """A session whose runs take the planned milliseconds; for the statistics only."""

    def __init__(self, plan: Callable[[int], float], inputs: tuple[InputInfo, ...], log: list[str], name: str) -> None:
        self._plan, self._inputs, self._log, self._name, self._runs = plan, inputs, log, name, 0
        self.closed = False
        self.bound: Feeds = {}

    @property
    def inputs(self) -> tuple[InputInfo, ...]:
        return self._inputs

    def bind(self, feeds: Feeds) -> None:
        self.bound = feeds

    def run_once(self) -> float:
        self._log.append(self._name)
        self._runs += 1
        return self._plan(self._runs - 1)

    def infer(self, feeds: Feeds) -> dict[str, np.ndarray]:
        return dict(feeds)

    def describe(self) -> dict[str, Any]:
        return {"planned": True}

    def close(self) -> None:
        self.closed = True


class PlannedBackend(AbstractBackend):
    """Opens sessions by name; ``plans[name](round, copy)`` gives the plan of a session."""

    name = "planned"

    def __init__(
        self,
        plans: dict[str, Callable[[int, int], Callable[[int], float]]],
        inputs: dict[str, tuple[InputInfo, ...]] | None = None,
    ) -> None:
        self.plans, self.given = plans, inputs or {}
        self.opened: dict[str, int] = dict.fromkeys(plans, 0)
        self.sessions: list[PlannedSession] = []
        self.log: list[str] = []
        self.affinities: list[set[int]] = []

    @classmethod
    def missing(cls) -> str | None:
        return None

    def open(self, model: bytes | Path, *, threads: int = 1) -> AbstractSession:
        name = model.decode() if isinstance(model, bytes) else model.read_text()
        count = self.opened[name]
        self.opened[name] += 1
        copies = 2 if name == next(iter(self.plans)) else 1
        self.affinities.append(os.sched_getaffinity(0))
        inputs = self.given.get(name, (InputInfo("x", ("N", 3), FLOAT),))
        session = PlannedSession(self.plans[name](count // copies, count % copies), inputs, self.log, name)
        self.sessions.append(session)
        return session

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


@pytest.fixture(autouse=True, scope="module")
def no_old_garbage() -> Iterator[None]:
    """Every round collects garbage; what earlier tests have left in memory need not be gone through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def constant(milliseconds: float) -> Callable[[int, int], Callable[[int], float]]:
    return lambda round_, copy: lambda run: milliseconds


def arms(*names: str) -> list[Arm]:
    return [Arm(name, name.encode()) for name in names]


def planned(plans: dict[str, Callable[[int, int], Callable[[int], float]]], **options: Any) -> Comparison:
    options = {"warm_up": 0.0, "iterations": 20} | options
    return compare(arms(*plans), backend=PlannedBackend(plans), **options)


# --- the numbers


def test_the_interval_is_student_s_over_the_rounds() -> None:
    # mean 3, s = sqrt(2.5), t(0.975, 4) = 2.776445: 2.776445 * sqrt(2.5) / sqrt(5) = 1.963243
    mean, low, high = student_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert mean == 3.0
    assert low == pytest.approx(3 - 1.963243, abs=1e-6)
    assert high == pytest.approx(3 + 1.963243, abs=1e-6)


def test_the_interval_widens_with_fewer_rounds_and_more_confidence() -> None:
    # two values 0 and 2: s = sqrt(2), t(0.975, 1) = 12.706205, so the half width is 12.706205 * 1
    assert student_interval(np.array([0.0, 2.0]))[2] == pytest.approx(1 + 12.706205, abs=1e-5)
    # t(0.995, 1) = 63.656741
    assert student_interval(np.array([0.0, 2.0]), 0.99)[2] == pytest.approx(1 + 63.656741, abs=1e-5)


def test_a_round_s_ratio_is_the_median_of_the_paired_ratios() -> None:
    base = np.array([[1.0, 10.0, 100.0]])
    times = np.array([[0.5, 20.0, 50.0]])  # pairs: 0.5, 2, 0.5; the ratio of the medians would be 2
    assert log_ratios(times, base).tolist() == pytest.approx([math.log(0.5)])


def test_ratio_and_interval_combine_the_rounds_geometrically() -> None:
    factors = [0.50, 0.52, 0.48, 0.51, 0.49]
    result = planned({"dense": constant(2.0), "slim": lambda round_, copy: lambda run: 2.0 * factors[round_]})
    (ratio,) = result.ratios
    logs = [math.log(factor) for factor in factors]
    mean = sum(logs) / 5
    half = 2.776445 * math.sqrt(sum((value - mean) ** 2 for value in logs) / 4) / math.sqrt(5)
    assert ratio.session_ratios == pytest.approx(factors)
    assert ratio.ratio == pytest.approx(math.exp(mean))
    assert ratio.low == pytest.approx(math.exp(mean - half), rel=1e-6)
    assert ratio.high == pytest.approx(math.exp(mean + half), rel=1e-6)


def test_a_drift_that_all_arms_share_leaves_the_ratio_alone_and_is_said() -> None:
    def slowing(milliseconds: float) -> Callable[[int, int], Callable[[int], float]]:
        return lambda round_, copy: lambda run: milliseconds * (1 + 0.1 * round_)

    result = planned({"dense": slowing(1.0), "slim": slowing(0.5)})
    assert result.ratios[0].ratio == pytest.approx(0.5)
    assert result.verdicts[0].word == "faster"
    assert [warning for warning in result.warnings if "'dense' drifted" in warning]
    # 20 runs in each of 5 rounds; the first half holds rounds 1, 2 and half of 3, its median is that of round 2
    assert result.timings[0].drift == pytest.approx(1.3 / 1.1 - 1)


def test_steady_times_give_no_drift_warning() -> None:
    result = planned({"dense": constant(1.0), "slim": constant(0.5)})
    assert not [warning for warning in result.warnings if "drift" in warning]


def test_noisy_times_are_said() -> None:
    noisy = planned({"dense": lambda round_, copy: lambda run: 1.0 + 0.4 * (run % 2), "slim": constant(0.5)})
    assert [warning for warning in noisy.warnings if "'dense' is noisy" in warning]
    assert not [warning for warning in noisy.warnings if "'slim'" in warning]


def test_summary_numbers_are_those_of_the_runs() -> None:
    result = planned({"dense": lambda round_, copy: lambda run: max(run - 4.0, 0.5)}, iterations=21, control=False)
    timing = result.timings[0]  # five warm-ups, then 1..21 in every round
    assert (timing.runs, timing.min_ms, timing.median_ms, timing.mean_ms) == (105, 1.0, 11.0, 11.0)
    assert (timing.p90_ms, timing.iqr_ms) == (pytest.approx(19.0), pytest.approx(10.0))
    assert timing.session_medians_ms == (11.0,) * 5


@pytest.mark.parametrize(("iterations", "given"), [(199, False), (200, True)])
def test_p99_needs_a_thousand_runs(iterations: int, given: bool) -> None:
    result = planned({"dense": constant(1.0)}, iterations=iterations)
    assert (result.timings[0].p99_ms is not None) == given


# --- the verdict


def ratio(low: float, high: float, arm: str = "slim") -> Ratio:
    return Ratio(arm, math.sqrt(low * high), low, high, ())


@pytest.mark.parametrize(
    ("found", "control", "word"),
    [
        (ratio(0.50, 0.60), ratio(0.97, 1.03), "faster"),
        (ratio(0.90, 0.979), ratio(0.98, 1.02), "faster"),
        (ratio(0.90, 0.98), ratio(0.99, 1.02), "not shown to be faster"),
        (ratio(0.90, 0.97), ratio(0.95, 1.05), "not shown to be faster"),
        (ratio(0.50, 1.20), ratio(0.99, 1.01), "not shown to be faster"),
        (ratio(0.99, 1.01), ratio(0.99, 1.01), "not shown to be faster"),
        (ratio(1.01, 1.50), ratio(0.99, 1.01), "not shown to be faster"),
        (ratio(1.03, 1.50), ratio(0.90, 1.10), "not shown to be faster"),
        (ratio(1.03, 1.50), ratio(0.99, 1.01), "slower"),
        (ratio(0.50, 0.60), None, "not shown to be faster"),
    ],
)
def test_the_verdict_follows_the_rule(found: Ratio, control: Ratio | None, word: str) -> None:
    verdict = judge(found, control, "dense")
    assert verdict.word == word
    assert "'slim' takes" in verdict.explanation
    assert f"{found.high:.3f}" in verdict.explanation


def test_an_arm_no_better_than_a_noisy_control_is_not_called_faster() -> None:
    def lucky(round_: int, copy: int) -> Callable[[int], float]:
        return lambda run: 1.0 if copy == 0 else [0.6, 1.0, 0.7, 1.1, 0.6][round_]

    result = planned({"dense": lucky, "slim": constant(0.9)})
    assert result.control is not None
    assert result.control.low < 0.9
    assert result.verdicts[0].word == "not shown to be faster"


def test_without_a_control_nothing_is_claimed() -> None:
    result = planned({"dense": constant(1.0), "slim": constant(0.1)}, control=False)
    assert result.control is None
    assert result.verdicts[0].word == "not shown to be faster"
    assert "no A/A control" in result.verdicts[0].explanation


def test_every_arm_is_judged_against_the_first() -> None:
    result = planned({"dense": constant(1.0), "half": constant(0.5), "same": constant(1.0), "double": constant(2.0)})
    assert [(verdict.arm, verdict.word) for verdict in result.verdicts] == [
        ("half", "faster"),
        ("same", "not shown to be faster"),
        ("double", "slower"),
    ]


def test_one_model_alone_is_timed_and_nothing_is_judged() -> None:
    result = planned({"dense": constant(3.0)})
    assert (result.timings[0].median_ms, result.ratios, result.verdicts) == (3.0, (), ())


# --- the procedure


def test_each_round_opens_every_arm_anew_and_the_baseline_twice_and_closes_all() -> None:
    plans = {"dense": constant(1.0), "slim": constant(0.5)}
    backend = PlannedBackend(plans)
    compare(arms(*plans), backend=backend, iterations=3, sessions=6, warm_up=0.0)
    assert backend.opened == {"dense": 12, "slim": 6}
    assert all(session.closed for session in backend.sessions)


def test_every_iteration_runs_each_session_once_and_orders_vary_with_the_seed_alone() -> None:
    plans = {"dense": constant(1.0), "slim": constant(0.5)}

    def order(seed: int) -> list[str]:
        backend = PlannedBackend(plans)
        compare(arms(*plans), backend=backend, iterations=30, warm_up=0.0, seed=seed)
        return backend.log[15:105]  # after the first round's 3 * 5 warm-ups

    first = order(0)
    triples = [tuple(first[start : start + 3]) for start in range(0, 90, 3)]
    assert all(sorted(triple) == ["dense", "dense", "slim"] for triple in triples)
    assert len(set(triples)) == 3
    assert first == order(0) != order(1)


def test_all_arms_get_the_same_inputs_and_they_are_real_numbers() -> None:
    plans = {"dense": constant(1.0), "slim": constant(0.5)}
    backend = PlannedBackend(plans)
    compare(arms(*plans), backend=backend, iterations=3, warm_up=0.0, batch=64)
    for start in range(0, len(backend.sessions), 3):
        first, *others = (session.bound["x"] for session in backend.sessions[start : start + 3])
        assert first.shape == (64, 3)
        assert 0.7 < first.std() < 1.3
        assert all(np.array_equal(first, other) for other in others)


def test_warm_up_lasts_for_the_time_asked_for() -> None:
    backend = PlannedBackend({"dense": constant(10.0)})
    compare(arms("dense"), backend=backend, iterations=2, warm_up=0.2, control=False)
    assert len(backend.log) == 5 * (20 + 2)


@pytest.mark.parametrize(("milliseconds", "iterations"), [(10.0, 50), (1000.0, 10), (0.01, 10_000)])
def test_the_number_of_iterations_fills_the_seconds_within_bounds(milliseconds: float, iterations: int) -> None:
    result = planned({"dense": constant(milliseconds)}, iterations=None, seconds=0.5)
    assert result.circumstances["iterations"] == iterations


def test_progress_is_told_after_each_round() -> None:
    told: list[tuple[int, int]] = []
    planned({"dense": constant(1.0)}, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin threads")
def test_threads_are_pinned_meanwhile_and_freed_afterwards_even_on_an_error() -> None:
    before = os.sched_getaffinity(0)
    backend = PlannedBackend({"dense": constant(1.0)})
    result = compare(arms("dense"), backend=backend, iterations=2, warm_up=0.0)
    assert all(len(cpus) == 1 for cpus in backend.affinities)
    assert result.circumstances["affinity"] == sorted(backend.affinities[0])
    assert os.sched_getaffinity(0) == before

    def broken(round_: int, copy: int) -> Callable[[int], float]:
        def run(run: int) -> float:
            raise InputError("the model broke")

        return run

    failing = PlannedBackend({"dense": broken})
    with pytest.raises(InputError, match="the model broke"):
        compare(arms("dense"), backend=failing, iterations=2, warm_up=0.0)
    assert os.sched_getaffinity(0) == before
    assert all(session.closed for session in failing.sessions)


def test_a_loaded_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (500.0, 1.0, 1.0))
    assert [warning for warning in planned({"dense": constant(1.0)}).warnings if "load average was 500.0" in warning]
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 500.0, 500.0))
    assert not planned({"dense": constant(1.0)}).warnings


# --- what cannot be compared


def informed(**shapes: Sequence[int | str]) -> PlannedBackend:
    inputs = {name: (InputInfo("x", tuple(shape), FLOAT),) for name, shape in shapes.items()}
    return PlannedBackend(dict.fromkeys(shapes, constant(1.0)), inputs)


@pytest.mark.parametrize(
    ("dense", "slim", "message"),
    [
        (("N", 3, 8, 8), ("N", 3, 9, 8), "shape.*in 'dense'.*in 'slim'"),
        (("N", 3), ("N", 3, 1), "'dense' takes .*but 'slim' takes"),
        (("N", "C"), ("N", "C"), "give every dynamic axis a size"),
    ],
)
def test_arms_that_disagree_or_leave_an_axis_open_are_refused(dense: Any, slim: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(arms("dense", "slim"), backend=informed(dense=dense, slim=slim), iterations=2, warm_up=0.0)


def test_arms_with_other_input_names_or_types_are_refused() -> None:
    for other in (InputInfo("z", ("N", 3), FLOAT), InputInfo("x", ("N", 3), np.dtype(np.float16))):
        inputs = {"dense": (InputInfo("x", ("N", 3), FLOAT),), "slim": (other,)}
        backend = PlannedBackend(dict.fromkeys(inputs, constant(1.0)), inputs)
        with pytest.raises(InputError, match="compare models with the same inputs"):
            compare(arms("dense", "slim"), backend=backend, iterations=2, warm_up=0.0)


def shape_of(result: Comparison) -> list[int]:
    shape: list[int] = result.circumstances["inputs"]["x"]["shape"]
    return shape


def test_dynamic_axes_take_the_batch_the_other_arm_s_size_or_the_given_shape() -> None:
    def run(backend: PlannedBackend, **options: Any) -> list[int]:
        return shape_of(compare(arms(*backend.plans), backend=backend, iterations=2, warm_up=0.0, **options))

    assert run(informed(dense=("N", 3))) == [1, 3]
    assert run(informed(dense=("N", 3)), batch=8) == [8, 3]
    assert run(informed(dense=("N", 3, "H"), slim=(2, 3, 7))) == [2, 3, 7]
    assert run(informed(dense=("N", 3, "H")), shapes={"x": (4, 3, 5)}) == [4, 3, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 2}, "first axis fixed at 1, so batch 2"),
        ({"shapes": {"y": (1, 3)}}, "no input 'y'; the inputs are x"),
        ({"shapes": {"x": (1, 4)}}, r"which \[1, 4\] does not fit"),
        ({"shapes": {"x": (1, 3, 1)}}, r"does not fit"),
        ({"sessions": 4}, "at least 5"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "threads is 100000"),
        ({"iterations": 1}, "iterations is 1"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"feeds": {"x": np.ones((1, 3), np.float32)}, "batch": 1}, "both feeds and shapes"),
    ],
)
def test_wrong_options_are_refused_with_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(arms("dense"), backend=informed(dense=(1, 3)), **{"iterations": 2, "warm_up": 0.0, **options})


def test_no_arms_and_two_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="no model was given"):
        compare([], backend=informed(dense=(1, 3)))
    with pytest.raises(InputError, match="two models have one name"):
        compare(arms("dense", "dense"), backend=informed(dense=(1, 3)))


# --- the real path


def conv_net(width: int, *, channels: int = 16, size: int = 28) -> bytes:
    """Return x -> Conv -> Relu -> Conv -> Relu -> Conv -> y, with `width` channels between."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (width, channels, 3, 3), "w2": (width, width, 3, 3), "w3": (channels, width, 3, 3)}
    weights = [numpy_helper.from_array(rng.normal(0, 0.05, s).astype(np.float32), n) for n, s in shapes.items()]
    steps = [("Conv", ["x", "w1"], "a"), ("Relu", ["a"], "b"), ("Conv", ["b", "w2"], "c"), ("Relu", ["c"], "d")]
    steps.append(("Conv", ["d", "w3"], "y"))
    pads = {"Conv": {"pads": [1, 1, 1, 1]}, "Relu": {}}
    nodes = [helper.make_node(op, inputs, [output], **pads[op]) for op, inputs, output in steps]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", channels, size, size]) for name in "xy"]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def real() -> Comparison:
    """Return a real comparison of a net with one of a quarter of its width, and with itself."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    from prune2deploy.backends import load_backend

    models = [Arm("dense", conv_net(64)), Arm("quarter", conv_net(16)), Arm("same", conv_net(64))]
    return compare(models, backend=load_backend("ort-cpu"), iterations=60, warm_up=0.02)


def test_a_net_of_a_quarter_of_the_width_is_really_faster(real: Comparison) -> None:
    quarter = real.verdicts[0]
    assert (quarter.arm, quarter.word) == ("quarter", "faster"), quarter.explanation
    assert real.timings[1].median_ms < real.timings[0].median_ms


def test_a_net_is_not_faster_than_itself(real: Comparison) -> None:
    same = real.verdicts[1]
    assert (same.arm, same.word) == ("same", "not shown to be faster"), same.explanation


def test_the_report_section_is_json_and_tells_all_circumstances(real: Comparison) -> None:
    section = json.loads(json.dumps(real.to_json(), allow_nan=False))
    assert section["baseline"] == "dense"
    assert section["backend"]["name"] == "ort-cpu"
    assert section["session"]["intra_op_num_threads"] == section["threads"] == 1
    assert section["inputs"] == {"x": {"shape": [1, 16, 28, 28], "type": "float32"}}
    assert (section["sessions"], section["iterations"], section["seed"]) == (5, 60, 0)
    assert section["models"]["quarter"]["bytes"] == len(conv_net(16))
    assert section["models"]["dense"]["sha256"] == section["models"]["same"]["sha256"]
    assert len(section["models"]["quarter"]["sha256"]) == 64
    assert [one["arm"] for one in section["timings"]] == ["dense", "quarter", "same"]
    assert [one["arm"] for one in section["ratios"]] == ["quarter", "same"]
    assert section["control"]["arm"] == "dense (control)"


def test_the_raw_samples_are_those_behind_the_numbers(real: Comparison) -> None:
    samples = real.samples()
    assert list(samples) == ["dense", "quarter", "same", "dense (control)"]
    assert [len(rounds) for rounds in samples["quarter"]] == [60] * 5
    for timing in real.timings:
        assert np.median(samples[timing.arm]) == pytest.approx(timing.median_ms, abs=1e-6)
    logs = log_ratios(np.array(samples["quarter"]), np.array(samples["dense"]))
    assert np.exp(logs).tolist() == pytest.approx(real.ratios[0].session_ratios, rel=1e-4)


def test_a_given_input_is_used_and_one_that_does_not_fit_is_refused() -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    from prune2deploy.backends import load_backend

    model = [Arm("dense", conv_net(8, size=4))]
    backend = load_backend("ort-cpu")
    feeds = {"x": np.zeros((3, 16, 4, 4), np.float32)}
    result = compare(model, backend=backend, feeds=feeds, iterations=2, warm_up=0.0)
    assert (shape_of(result), result.circumstances["random_inputs"]) == ([3, 16, 4, 4], False)
    with pytest.raises(InputError, match="cannot run the model"):
        compare(model, backend=backend, feeds={"x": np.zeros((1, 2), np.float32)}, iterations=2, warm_up=0.0)
