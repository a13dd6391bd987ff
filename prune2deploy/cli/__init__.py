"""The command line: one function per command, and the only place that prints and exits."""

import errno
import sys
from typing import Annotated

import typer

from prune2deploy import __version__
from prune2deploy.cli.graphs import bench, inspect, slim, verify
from prune2deploy.cli.lists import backends, doctor, methods, networks, ops
from prune2deploy.cli.pruning import compare, prune, sensitivity
from prune2deploy.cli.runs import export, report, run
from prune2deploy.errors import P2DError, one_line

__all__ = ["app", "main"]

INTERRUPTED = 130
_INTERRUPTED = (
    "interrupted; files that were being written keep their earlier contents ('prune' and 'run' go on with --resume, "
    "'compare' and 'sensitivity' by themselves)"
)

app = typer.Typer(
    name="p2d",
    help="Prune a CNN, remove the dead channels from its ONNX graph with proof, and measure latency honestly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
for command in (
    *(prune, export, slim, verify, bench, inspect, report, run, compare, sensitivity),
    *(methods, networks, ops, backends, doctor),
):
    app.command()(command)


def main() -> None:
    """Run the command line; user errors end in one line on stderr, bugs keep their traceback."""
    try:
        app()
    except P2DError as error:
        _fail(one_line(error, 2000), error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"the disk is full ({error.filename or 'while writing'}); free some space and run it again", 2)
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            _fail(_INTERRUPTED, INTERRUPTED)
        raise


def _fail(message: str, code: int) -> None:
    print(f"p2d: {message}", file=sys.stderr)
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        print(f"p2d {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
