"""report.json: every command replaces its own section."""

import json
from pathlib import Path

import numpy as np
import pytest

from prune2deploy import __version__
from prune2deploy.errors import InputError
from prune2deploy.report import SCHEMA_VERSION, SECTIONS, read_report, read_samples, update_section, write_samples


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    update_section(tmp_path, "prune", {"method": "l1", "seed": 1})
    update_section(tmp_path, "slim", {"removed_channels": 3})
    update_section(tmp_path, "prune", {"method": "fpgm"})
    report = read_report(tmp_path)
    assert (report["prune"], report["slim"]) == ({"method": "fpgm"}, {"removed_channels": 3})
    assert report["schema_version"] == SCHEMA_VERSION
    assert report["tool"] == {"name": "prune2deploy", "version": __version__}


def test_equal_sections_make_equal_files(tmp_path: Path) -> None:
    for run, order in ((tmp_path / "a", ("slim", "prune")), (tmp_path / "b", ("prune", "slim"))):
        for name in order:
            update_section(run, name, {"z": 1, "a": [1, 2]})
    assert (tmp_path / "a/report.json").read_bytes() == (tmp_path / "b/report.json").read_bytes()


def test_numpy_values_paths_and_infinities_become_json(tmp_path: Path) -> None:
    content = {
        "array": np.arange(3),
        "number": np.float32(0.5),
        "path": Path("weights.bin"),
        "losses": (1.0, float("nan"), float("inf")),
    }
    update_section(tmp_path, "prune", content)
    expected = {"array": [0, 1, 2], "number": 0.5, "path": "weights.bin", "losses": [1.0, None, None]}
    assert read_report(tmp_path)["prune"] == expected


def test_the_recipe_is_read_but_never_written_into_the_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('network = "resnet56"\n')
    update_section(tmp_path, "prune", {})
    assert read_report(tmp_path)["recipe"] == 'network = "resnet56"\n'
    update_section(tmp_path, "slim", {})
    assert "recipe" not in json.loads((tmp_path / "report.json").read_text())


def test_a_failed_write_leaves_the_report_as_it_was(tmp_path: Path) -> None:
    update_section(tmp_path, "prune", {"seed": 1})
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(TypeError):
        update_section(tmp_path, "prune", {"seed": object()})
    assert (tmp_path / "report.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_an_unknown_section_is_a_bug_of_the_caller(tmp_path: Path) -> None:
    assert "bench" in SECTIONS
    with pytest.raises(KeyError):
        update_section(tmp_path, "benchmark", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "is not a JSON file"),
        ("[]", "is not a report of p2d"),
        ('{"tool": {}}', "is not a report of p2d"),
        ('{"schema_version": 99}', "has the schema version 99"),
        ('{"schema_version": 1, "bench": []}', "section 'bench'"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(InputError, match=message):
            update_section(tmp_path, "prune", {})
    with pytest.raises(InputError, match=message):
        read_report(tmp_path)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == {}
    samples = {"dense": [[1.5, 2.5], [3.0]], "slim": [[0.5], [0.25]]}
    write_samples(tmp_path, samples)
    assert read_samples(tmp_path) == samples
    assert (tmp_path / "samples/bench.json").exists()


@pytest.mark.parametrize("text", ["[]", '{"dense": [1, 2]}', '{"dense": [["a"]]}'])
def test_a_file_of_other_things_is_no_samples(tmp_path: Path, text: str) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/bench.json").write_text(text)
    with pytest.raises(InputError, match="does not hold raw timings"):
        read_samples(tmp_path)
