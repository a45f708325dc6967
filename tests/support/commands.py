"""Commands as a user types them, in this process: starting one takes seconds, mostly for torch."""

import io
import sys
import warnings
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from ctfm.cli.app import main


def ctfm(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run the command in a folder, check its exit code, and give what it printed.

    An error that the command does not explain is raised here, as it would be a traceback there.
    """
    printed, notes, got = io.StringIO(), io.StringIO(), 0
    with (
        chdir(cwd),
        patch.object(sys, "argv", ["ctfm", *arguments]),
        redirect_stdout(printed),
        redirect_stderr(notes),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as end:
            got = end.code if isinstance(end.code, int) else int(end.code is not None)
    text = printed.getvalue() + notes.getvalue()
    assert got == code, text
    return text
