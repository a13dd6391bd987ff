"""Which of several processes this is, as ``torchrun`` says it in the environment; known without torch."""

import os


def count() -> int:
    """Return how many processes work on this command together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Return whether this is the process that prints and writes files."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def own_device(device: str) -> str:
    """Return this process's own device of a kind: of several on a machine, each has the GPU of its number."""
    return device if count() == 1 or device == "cpu" else f"{device.partition(':')[0]}:{os.environ['LOCAL_RANK']}"
