"""How a command ends: one sentence for bad input, one line for Ctrl-C."""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

#: What bad input, files and numbers raise. Other errors are faults of the program, whose traceback is wanted.
ERRORS = (ValueError, OSError, FloatingPointError)
#: With this variable at 1 the traceback comes before the sentence.
DEBUG = "TARFLOW_DEBUG"


@contextmanager
def ending() -> Iterator[None]:
    """Run a command: `ERRORS` are one sentence and exit status 2, Ctrl-C one line and exit status 130; if whoever
    reads the output has gone, as ``head`` does, nothing is said, and the status is 141.

    With ``TARFLOW_DEBUG=1`` in the environment the traceback is printed first.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        if is_read():
            fail(error)  # of another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes
        raise SystemExit(141) from None
    except ERRORS as error:
        fail(error)
    except KeyboardInterrupt:
        if debugging():
            traceback.print_exc()
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def is_read() -> bool:
    """Whether somebody still reads the output, as far as the system tells."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not poll.poll(0)


def fail(error: BaseException) -> NoReturn:
    """Print one sentence and leave with exit status 2; with ``TARFLOW_DEBUG=1`` the traceback first."""
    if debugging():
        traceback.print_exception(error)
    print(f"error: {sentence(error)}", file=sys.stderr)
    raise SystemExit(2) from error


def debugging() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")


def sentence(error: BaseException) -> str:
    """An error on one line. For errors of DataLoader workers, whose text is a traceback, it is the last line; for errors of
    the operating system, what happened to which file."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename!r}"
    message = str(error).strip()
    if message.startswith("Caught "):
        message = message.splitlines()[-1].removeprefix("ValueError: ")
    return " ".join(message.split()) or type(error).__name__
