"""What commands print: one document or tables, and how far they are."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType

from prune2deploy import ranks

SCHEMA_VERSION = 1

out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120, quiet=not ranks.is_first())
err = Console(stderr=True, highlight=False, quiet=not ranks.is_first())


def emit(document: dict[str, Any], shown: RenderableType, *, as_json: bool) -> None:
    """Print a command's result: the document as JSON, else what is shown in its place."""
    if as_json and ranks.is_first():
        print(json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=1, sort_keys=True))
    elif not as_json:
        out.print(shown)


def say(text: str, *, as_json: bool) -> None:
    """Print a line beside the result, which JSON has no place for."""
    if not as_json:
        out.print(text, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Any]:
    """Show on stderr what happens meanwhile."""
    from prune2deploy.screen import Live

    with Live(err).shown() as live:
        yield live
