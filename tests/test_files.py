"""Whole files: what a failed write leaves, permissions, and what reading says of files that are not there."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from prune2deploy.errors import InputError
from prune2deploy.files import read_json, remove_parts, require_file, sha256, write_bytes, write_json, write_with


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b" / "c.bin", b"new")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path / "a" / "b") == ["c.bin"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_writer_that_raises_leaves_the_earlier_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"earlier")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of the new")
        raise error

    with pytest.raises(InputError if isinstance(error, OSError) else type(error)) as caught:
        write_with(path, write)
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["file"]
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert "No space left" in str(caught.value)


def test_a_reader_sees_the_earlier_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    seen = []

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent
        temporary.write_bytes(b"ne")
        seen.append(path.read_bytes())
        temporary.write_bytes(b"new")
        seen.append(path.read_bytes())

    write_with(path, write)
    assert seen == [b"earlier", b"earlier"]
    assert path.read_bytes() == b"new"


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], indirect=True)
def test_the_umask_decides_who_may_read(umask: int, tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert os.umask(umask) == umask, "the process's umask was changed"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "x", Path("/proc/nothing/x")):
        with pytest.raises(InputError, match="cannot write") as caught:
            write_bytes(path, b"x")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_the_file_is_named_and_left(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(InputError, match="folder"):
        write_bytes(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "mine"]


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    write_bytes(tmp_path / "link", b"ours")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert (tmp_path / "link").read_bytes() == b"ours"


def test_equal_documents_are_equal_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "a": {"z": True, "y": "ü"}})
    write_json(tmp_path / "b.json", {"a": {"y": "ü", "z": True}, "b": [1, 2.5, None]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"b": [1, 2.5, None], "a": {"z": True, "y": "ü"}}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_refused_and_nothing_is_written(number: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": number})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("data", [b"{", b"", b"\xff\xfe\x00", b"{'a': 1}"])
def test_what_is_not_json_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match="is not a JSON file") as caught:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value)


def test_json_is_read_as_utf_8_wherever_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps({"name": "größe"}, ensure_ascii=False).encode())
    assert read_json(tmp_path / "a.json") == {"name": "größe"}


def test_require_file_says_what_was_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert require_file(tmp_path / "file", "a thing") == tmp_path / "file"
    with pytest.raises(InputError, match="is a folder, but a thing is wanted"):
        require_file(tmp_path, "a thing")
    with pytest.raises(InputError, match="does not exist, but a thing is wanted"):
        require_file(tmp_path / "none", "a thing")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(InputError, match="does not exist"):
        require_file(tmp_path / "dangling", "a thing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "file").chmod(0)
    with pytest.raises(InputError, match="check its permissions"):
        require_file(tmp_path / "file", "a thing")


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_only_the_parts_of_this_file_are_removed(tmp_path: Path) -> None:
    for name in (".a[1].json.xyz.part", ".a1.json.xyz.part", "a[1].json", ".a[1].json.old"):
        (tmp_path / name).touch()
    remove_parts(tmp_path / "a[1].json")
    assert {path.name for path in tmp_path.iterdir()} == {".a1.json.xyz.part", "a[1].json", ".a[1].json.old"}
    remove_parts(tmp_path / "no folder" / "a.json")
