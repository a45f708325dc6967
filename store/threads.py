"""Threads: from what the user set, to how long those of OpenMP wait for each other.

After each small operation they spin until the next. On a machine with other work that takes the
cores from whoever they wait for: a fit of a second took half a minute. With a short spin they sleep
instead. OpenMP reads the environment as its library is loaded: torch must not be, yet.

    GOMP_SPINCOUNT   GNU (torch for Linux): rounds of a spin
    KMP_BLOCKTIME    LLVM and Intel (torch for macOS, MKL): milliseconds
    OMP_WAIT_POLICY  either: active or passive
"""

import os

_BRIEFLY = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
_VARIABLES = (*_BRIEFLY, "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Let threads spin only briefly, here and in processes that are started from now on.

    Unless the environment says anything of it already.
    """
    if not any(name in os.environ for name in _VARIABLES):
        os.environ.update(_BRIEFLY)


def waiting_of_threads() -> str:
    """What the environment says of it, as it would be typed."""
    said = (f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ)
    return " ".join(said) or "OpenMP's default"
