"""What the package offers: a version, the names it lists, and modules that can all be imported."""

import importlib
import pkgutil
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

import pytest

import prune2deploy

MODULES = ["prune2deploy", *(info.name for info in pkgutil.walk_packages(prune2deploy.__path__, "prune2deploy."))]


def test_the_version_is_a_release_number_and_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", prune2deploy.__version__)
    try:
        installed = version("prune2deploy")
    except PackageNotFoundError:
        pytest.skip("the package is not installed, only found on the path")
    assert installed == prune2deploy.__version__


def test_every_listed_name_is_there_and_the_version_is_listed() -> None:
    assert "__version__" in prune2deploy.__all__
    assert len(set(prune2deploy.__all__)) == len(prune2deploy.__all__)
    for name in prune2deploy.__all__:
        assert getattr(prune2deploy, name) is not None


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported_and_says_what_it_is_for(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"


def test_the_package_says_that_it_is_typed() -> None:
    assert (files("prune2deploy") / "py.typed").is_file()
