"""Groups in memory and on disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_groups import TOYS, residual_groups

from prune2deploy.errors import InputError
from prune2deploy.files import read_json, write_json
from prune2deploy.groups import Groups


@pytest.mark.parametrize("toy", TOYS)
def test_a_saved_file_reads_back_as_the_same_groups(toy: str, tmp_path: Path) -> None:
    groups = TOYS[toy][1]()
    groups.save(tmp_path / "groups.json")
    again = Groups.load(tmp_path / "groups.json")
    assert again.layers == groups.layers
    assert again.cost == groups.cost
    assert [(g.id, g.size, g.activations, g.kept_because) for g in again.groups] == [
        (g.id, g.size, g.activations, g.kept_because) for g in groups.groups
    ]
    for group, loaded in zip(groups.groups, again.groups, strict=True):
        for one, other in zip(group.members, loaded.members, strict=True):
            assert (one.parameter, one.axis, one.role, one.layer) == (
                other.parameter,
                other.axis,
                other.role,
                other.layer,
            )
            assert np.array_equal(one.indices, other.indices)
            assert other.indices.dtype == np.int64


def test_a_file_keeps_as_what_channels_are_read_and_one_written_before_that_was_known_still_loads(
    tmp_path: Path,
) -> None:
    groups = residual_groups()
    stem, *rest = groups.groups
    replace(groups, groups=(replace(stem, read_as=("Relu", "Gated(Relu)")), *rest)).save(tmp_path / "groups.json")
    assert Groups.load(tmp_path / "groups.json")["stem"].read_as == ("Relu", "Gated(Relu)")
    document = read_json(tmp_path / "groups.json")
    for group in document["groups"]:
        del group["read_as"]
    write_json(tmp_path / "groups.json", document)
    assert [group.read_as for group in Groups.load(tmp_path / "groups.json").groups] == [None] * 3


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    residual_groups().save(tmp_path / "a.json")
    Groups.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("document", [[], {"schema_version": 999}, {}])
def test_a_file_of_another_schema_is_refused(document: object, tmp_path: Path) -> None:
    write_json(tmp_path / "groups.json", document)
    with pytest.raises(InputError, match="not a groups file"):
        Groups.load(tmp_path / "groups.json")


def test_only_groups_without_a_reason_to_be_kept_are_prunable() -> None:
    groups = residual_groups()
    assert [group.id for group in groups.prunable] == ["stem", "conv1"]
    assert groups.full_widths() == {"stem": 6, "conv1": 8, "fc": 5}
    assert [part.parameter for part in groups["stem"].of_role("filter", "reader")] == [
        "stem.weight",
        "conv1.weight",
        "conv2.weight",
        "fc.weight",
    ]
