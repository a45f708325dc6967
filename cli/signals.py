"""Signals: from Ctrl-C and SIGTERM, to an orderly end that says what is kept.

SLURM sends SIGTERM some seconds before SIGKILL. It is taken like Ctrl-C: whatever tidies up after
that does so after this. Processes that a command starts are not concerned: they begin with the
signals of any process.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RUN_AGAIN = "run the same command again"
KEPT = "what was finished is kept; run the same command to go on"

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes: 128 and the number of the signal."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """Raise `Terminated` in the main thread at the first SIGTERM, and ignore those after it.

    A scheduler may send several, and tidying up is to be interrupted by none.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL:  # ignored by whoever started us, or a test's
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def if_interrupted(said: str) -> Iterator[None]:
    """What to say if the block is interrupted: what is kept of its work, and what to do next."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(said)
        raise


def interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that an exception was raised in answer to, if it was one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def last_words(error: KeyboardInterrupt) -> str:
    """What to print of an interruption."""
    what = "terminated" if isinstance(error, Terminated) else "interrupted"
    return f"{what}: {getattr(error, '__notes__', [RUN_AGAIN])[0]}"


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
