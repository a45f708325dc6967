"""The `ctfm` command: the Typer app and the entry point.

A command parses, calls one library function and prints. Heavy imports happen inside commands, so
that `ctfm --help` is instant. Exit codes: 0 done, 1 something to mend (a `CtfmError`, or
a file that cannot be used), 2 wrong usage, 3 done but some scans failed, 130 interrupted, 143
terminated.
"""

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ctfm.cli import demo, doctor, extract, features, fit, runs, scans
from ctfm.cli.labels import labels_app
from ctfm.cli.models import models_app

app = typer.Typer(
    name="ctfm",
    help="Specialise vision foundation models for head CT: embed every slice once, then fit "
    "mixture-of-low-rank-experts heads in seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
store_app = typer.Typer(
    help="Look at feature stores, check, merge, export them.", no_args_is_help=True
)

COMMANDS: dict[str, list[Callable[..., None]]] = {
    "The path": [
        scans.phantom,
        scans.index,
        extract.extract,
        fit.fit_head,
        fit.sweep,
        runs.evaluate,
        runs.compare,
        runs.report,
        runs.predict,
    ],
    "Help and overview": [demo.demo, doctor.doctor],
}


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(importlib.metadata.version("ctfm"))
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
for command in (features.info, features.verify, features.merge, features.export):
    store_app.command()(command)
app.add_typer(labels_app, name="labels", rich_help_panel="Help and overview")
app.add_typer(models_app, name="models", rich_help_panel="Help and overview")
app.add_typer(store_app, name="store", rich_help_panel="Help and overview")


def main() -> None:
    """Run the app; print what the user can mend without a traceback."""
    from rich.text import Text

    from ctfm.cli.characters import print_in_any_encoding
    from ctfm.cli.console import err
    from ctfm.cli.signals import (
        INTERRUPTED,
        TERMINATED,
        Terminated,
        interruption,
        last_words,
        terminated_in_order,
    )
    from ctfm.store.errors import CtfmError
    from ctfm.store.threads import wait_briefly

    wait_briefly()
    print_in_any_encoding()
    try:
        with terminated_in_order():
            app()
    except CtfmError as error:
        err.print(Text.assemble(("error:", "bold red"), f" {error}"))
        sys.exit(1)
    except OSError as error:
        what = f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error)
        err.print(Text.assemble(("error:", "bold red"), f" {what}"))
        sys.exit(1)
    except (SystemExit, KeyboardInterrupt) as end:  # Typer makes 130 of a KeyboardInterrupt
        if (interrupted := interruption(end)) is None:
            raise
        err.print(last_words(interrupted))
        sys.exit(TERMINATED if isinstance(interrupted, Terminated) else INTERRUPTED)
