"""The errors a user can meet; each knows the exit code of the command that it ends.

P2DError
├── InputError      2  what the user gave: missing, malformed, out of range
├── VerifyError     3  two graphs that should agree do not
├── DeviceError     4  the device or backend is not there
└── StrictError     5  under --strict: nothing removed, not faster, or slower than before

Anything else that escapes is a bug: it keeps its traceback and exits with 1.
"""


class P2DError(Exception):
    """What the user can act on; the message is one line: what is wrong, where, what to do."""

    exit_code = 1


class InputError(P2DError):
    """The user's input cannot be used."""

    exit_code = 2


class VerifyError(P2DError):
    """Two graphs that should compute the same do not."""

    exit_code = 3


class DeviceError(P2DError):
    """The device, or the backend that drives it, is not there."""

    exit_code = 4


class StrictError(P2DError):
    """A result that ``--strict`` or ``--against`` does not accept."""

    exit_code = 5


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """Return an error's text on one line of at most ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
