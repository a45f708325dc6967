"""Options that several commands share."""

import csv
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ctfm.cli.console import note
from ctfm.heads.config import FitConfig, SplitMethod
from ctfm.store.errors import ConfigError
from ctfm.store.provenance import usable_cores
from ctfm.store.threads import waiting_of_threads

Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that read; default: one a core, at most 8.")
]
Device = Annotated[
    str | None, typer.Option(help="Torch device; default: cuda if there is one, else cpu.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads that compute; default: torch's, one a core.")
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

DEFAULT_SPLIT = "/".join(f"{100 * share:g}" for share in FitConfig.split_fractions)

Findings = Annotated[
    str | None,
    typer.Option(
        help="Columns that are findings, a,b,…, a name with a comma in quotes: '\"a, b\",c'. "
        "Default: every column of labels."
    ),
]
Ignore = Annotated[str | None, typer.Option(help="Columns to leave out, a,b,….")]
IdColumn = Annotated[
    str | None, typer.Option(help="Column that joins; NAME=study_id if its name does not say.")
]
IdRepair = Annotated[
    str | None,
    typer.Option(help="Undo what was done to ids: pad8 …, unpad, stem, alnum, sub, upper, lower."),
]
Positive = Annotated[
    str | None, typer.Option(help="More words that mean positive, a,b,…; `blank` is no word.")
]
Negative = Annotated[str | None, typer.Option(help="More words that mean negative.")]
Uncertain = Annotated[str | None, typer.Option(help="More words that mean unknown.")]
Sheet = Annotated[str | None, typer.Option(help="Sheet of a workbook.")]
Split = Annotated[
    str,
    typer.Option(
        help="Shares of patients: train/validation/test; or stratified, or stratified:60/20/20."
    ),
]


_SHARES = re.compile(r"(stratified:)?\d{1,3}(\.\d+)?(/\d{1,3}(\.\d+)?)+")
"""0/8, 60/20/20: no paths."""


def typed_command() -> list[str]:
    """What was typed, for the record of a run: it does the same again in the same folder.

    Paths below the current folder are kept, relative to it. Of all others only the last name is,
    as `…/labels.csv`: names of folders elsewhere may be private.
    """
    return ["ctfm", *map(_without_private_folders, sys.argv[1:])]


def _without_private_folders(word: str) -> str:
    name, equals, value = word.partition("=")
    if not equals or "/" in name:
        return _from_here(word)
    return f"{name}={_from_here(value)}"


def _from_here(value: str) -> str:
    """A value, if it is a path, as seen from the current folder."""
    if "/" not in value or _SHARES.fullmatch(value):
        return value
    path = os.path.normpath(value)
    if not os.path.isabs(path) and path.split("/")[0] not in ("..", "~") and "://" not in value:
        return value
    for here in _names_of_here():
        if os.path.isabs(path) and os.path.commonpath([here, path]) == here:
            return os.path.relpath(path, here)
    return f"…/{os.path.basename(path)}"


def _names_of_here() -> list[str]:
    """The current folder, also by the name with links that the shell has for it."""
    real, shown = os.getcwd(), os.environ.get("PWD", "")
    same = os.path.isabs(shown) and os.path.realpath(shown) == real
    return [real, shown] if same else [real]


def names_of(text: str, *, option: str) -> list[str]:
    """Names as they were typed: a,b,…; one that holds a comma stands in double quotes.

    Raises:
        ConfigError: If one is empty.
    """
    stripped = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    if not stripped or not all(stripped):
        raise ConfigError(f"{option} takes names, a,b,…, got {text!r}")
    return stripped


def parse_split(text: str) -> tuple[SplitMethod, tuple[float, float, float]]:
    """How patients are split, and into which fractions, which add up to 1: `80/10/10`."""
    named, colon, shares = text.partition(":")
    stratified = named.strip().lower() == "stratified"
    if stratified and not colon:
        return "stratified", FitConfig.split_fractions
    try:
        train, validation, test = map(float, (shares if stratified else text).split("/"))
    except ValueError:
        raise typer.BadParameter(
            f"split must be like 80/10/10, stratified or stratified:80/10/10, got {text!r}"
        ) from None
    whole = train + validation + test
    if not whole > 0:
        raise typer.BadParameter(f"split must have a share above 0, got {text!r}")
    fractions = (train / whole, validation / whole, test / whole)
    return ("stratified" if stratified else "hash"), fractions


def worker_count(workers: int | None) -> int:
    """The number of reader processes: as asked for, else one a core this process may use."""
    if workers is not None:
        return workers
    return min(8, usable_cores())


def use_threads(threads: int | None, *, say: bool = True) -> None:
    """Let torch compute with so many threads; None leaves it what it takes by itself."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if say:
        count = torch.get_num_threads()
        note(f"computing with {count} thread{'s' * (count != 1)} ({waiting_of_threads()})")


def refuse_threads(threads: int | None, option: str) -> None:
    """Refuse --threads where other processes compute.

    Raises:
        typer.BadParameter: If it was given.
    """
    if threads is not None:
        raise typer.BadParameter(
            f"--threads is of this process, and with {option} others compute: leave it out, and "
            "set OMP_NUM_THREADS for the workers"
        )


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
