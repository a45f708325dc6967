"""Isolation: the processes that ctfm starts import nothing from the folder that they start in.

`python -c`, which is how multiprocessing, our readers and Dask start a process, looks for every
module in the current folder first. A user's folder named like a module of a decoder, or any `.py`
there that is named like one of the standard library's, would be run in its place.
"""

import os


def isolate_children() -> None:
    """Make Python processes that are started from now on leave their current folder out.

    By PYTHONSAFEPATH (Python 3.11, the flag `-P`), which children inherit, and those of a cluster
    that passes the environment on. This process is not changed.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
