"""Isolation: processes that import nothing from the folder they start in, and end when told to.

`python -c`, which is how multiprocessing, our readers and Dask start a process, looks for every
module in the current folder first. A user's folder named like a module of a decoder, or any `.py`
there that is named like one of the standard library's, would be run in its place.

Ctrl-C reaches every process of a terminal. It is the main process's to handle: a pool that is left
by an exception begins nothing more, and is waited for.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


def isolate_children() -> None:
    """Make Python processes that are started from now on leave their current folder out.

    By PYTHONSAFEPATH (Python 3.11, the flag `-P`), which children inherit, and those of a cluster
    that passes the environment on. This process is not changed.
    """
    os.environ["PYTHONSAFEPATH"] = "1"


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that ignore Ctrl-C; after an exception, what has not begun is not done.

    Args:
        workers: How many.
    """
    isolate_children()
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_leave_interrupts_to_main
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
