"""The circumstances of a result."""

import json
import os
from importlib.metadata import version

from prune2deploy.environment import environment, installed_packages


def test_the_environment_is_json_and_names_the_machine() -> None:
    found = json.loads(json.dumps(environment(), allow_nan=False))
    assert found["cpu"]
    assert found["cores"] == os.cpu_count()
    assert found["cores_usable"] >= 1
    assert found["time"].endswith("+00:00")


def test_versions_are_those_of_the_installed_packages() -> None:
    packages = installed_packages()
    assert packages["numpy"] == version("numpy")
    assert all(packages.values())


def test_nothing_of_the_user_is_told() -> None:
    text = json.dumps(environment())
    assert os.path.expanduser("~") + "/" not in text
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4
