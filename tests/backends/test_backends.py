"""The table of backends."""

import tomllib
from pathlib import Path

import pytest

from prune2deploy.backends import BACKENDS, load_backend
from prune2deploy.backends.base import AbstractBackend
from prune2deploy.errors import DeviceError, InputError


@pytest.mark.parametrize("name", BACKENDS)
def test_every_row_names_a_class_that_can_say_what_is_missing(name: str) -> None:
    line = BACKENDS[name].status()
    assert line is None or ("\n" not in line and len(line) > 20)


@pytest.mark.parametrize("name", [name for name, info in BACKENDS.items() if info.benches])
def test_every_backend_that_measures_has_the_interface_and_its_name(name: str) -> None:
    backend = BACKENDS[name].load()
    assert issubclass(backend, AbstractBackend)
    assert backend.name == name


@pytest.mark.parametrize("name", [name for name, info in BACKENDS.items() if info.benches])
def test_a_backend_loads_exactly_when_nothing_is_missing(name: str) -> None:
    if BACKENDS[name].status() is None:
        assert load_backend(name).describe()["name"] == name
    else:
        with pytest.raises(DeviceError, match="pip install"):
            load_backend(name)


def test_every_extra_is_one_that_pip_can_install() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {info.extra for info in BACKENDS.values()} <= set(project["optional-dependencies"])


def test_an_unknown_backend_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(InputError, match=r"no backend 'gpu'.*ort-cpu, ort-cuda"):
        load_backend("gpu")


def test_a_backend_that_only_builds_is_refused_for_measuring() -> None:
    with pytest.raises(InputError, match=r"'tensorrt' builds engines but measures nothing.*ort-cpu"):
        load_backend("tensorrt")
