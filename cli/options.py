"""Options that several commands share."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ctfm.store.errors import ConfigError
from ctfm.store.provenance import usable_cores

Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that read; default: one a core, at most 8.")
]
Device = Annotated[
    str | None, typer.Option(help="Torch device; default: cuda if there is one, else cpu.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let code run that comes with an hf: model or a program (.pt2, .pt): it may do "
        "anything on this machine. No other model needs it.",
    ),
]
AllowDownload = Annotated[
    bool,
    typer.Option(
        "--allow-download",
        help="Fetch weights that are not on this machine from where this run or store, which may "
        "be someone else's, says that they are.",
    ),
]

Catalogue = Annotated[
    Path, typer.Option(help="Catalogue; the key beside it joins tables that hold original ids.")
]


_SHARES = re.compile(r"\d{1,3}(\.\d+)?(/\d{1,3}(\.\d+)?)+")
"""0/8, 60/20/20: no paths."""


def typed_command() -> list[str]:
    """What was typed, for the record of a run, without folders: their names may be private."""
    return ["ctfm", *map(_without_folders, sys.argv[1:])]


def _without_folders(word: str) -> str:
    return "=".join(
        one if _SHARES.fullmatch(one) else one.rstrip("/").rpartition("/")[2]
        for one in word.split("=")
    )


def worker_count(workers: int | None) -> int:
    """The number of reader processes: as asked for, else one a core this process may use."""
    if workers is not None:
        return workers
    return min(8, usable_cores())


def device_name(device: str | None) -> str:
    """The torch device: as asked for, else a GPU if there is one.

    Raises:
        ConfigError: If torch cannot compute on it here.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(
            f"there is no device {device!r} here: `ctfm doctor` says which there is"
        ) from error
    return device


def device_of_a_worker(device: str | None) -> str | None:
    """The torch device of another machine, which may have what this one lacks; None is its own.

    Raises:
        ConfigError: If no machine can have it.
    """
    import torch

    try:
        return None if device is None else str(torch.device(device))
    except RuntimeError as error:
        raise ConfigError(f"no machine has a device {device!r}: try cpu, cuda or mps") from error
