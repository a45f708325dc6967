"""Whatever the encoding of standard output, a command ends as it would in UTF-8."""

import io
import os
import re
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from commands import ctfm

from ctfm.cli import app
from ctfm.cli.characters import ERRORS, plain, print_in_any_encoding
from ctfm.cli.console import out, print_table

ENCODINGS = ("ascii", "latin-1", "cp1252", "koi8-r", "utf-8")


class Printed:
    """Standard output and error as a process has them, in some encoding."""

    def __init__(self, encoding: str, errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoding = encoding
        self._bytes = io.BytesIO()
        self._stream = io.TextIOWrapper(self._bytes, encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", self._stream)
        monkeypatch.setattr(sys, "stderr", self._stream)

    def text(self) -> str:
        self._stream.flush()
        return self._bytes.getvalue().decode(self.encoding)

    def errors(self) -> str | None:
        return self._stream.errors


every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


def run(*arguments: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["ctfm", *arguments])
    with chdir(cwd), pytest.raises(SystemExit) as ended:
        app.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("text", "in_ascii"),
    [
        ("0.81–0.92", "0.81-0.92"),
        ("≥ 0.90", ">= 0.90"),
        ("−1…+2", "-1...+2"),
        ("share ÷ 2 × 3", "share / 2 x 3"),
        ("Müller", "Muller"),
        ("ﬁne ½", "fine 1/2"),
        ("中", r"\u4e2d"),
        ("🧠", r"\U0001f9e0"),
        ("caf\udce9.nii", r"caf\xe9.nii"),
        ("plain", "plain"),
    ],
)
def test_what_ascii_lacks_is_printed_in_its_words(text: str, in_ascii: str) -> None:
    assert plain(text, "ascii") == in_ascii
    assert text.encode("ascii", ERRORS).decode() == in_ascii


def test_what_an_encoding_has_is_left() -> None:
    assert plain("Müller ≥ ½", "latin-1") == "Müller >= ½"
    assert plain("Müller – ≥ ½ 中", "utf-8") == "Müller – ≥ ½ 中"
    assert plain("≥", "no-such-encoding") == "≥"


def test_columns_are_as_wide_as_what_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Printed("ascii", "strict", monkeypatch)
    print_table("a…b", ["run", "≥ 0.90", "95% CI"], [["x", 3, "0.1–0.2"], ["y", 12, "0.3–0.4"]])
    _, header, *rows = stream.text().splitlines()
    assert header.index("95% CI") == rows[0].index("0.1-0.2") == rows[1].index("0.3-0.4")
    assert rows[0].index("3") + 1 == header.index(">= 0.90") + len(">= 0.90")


@every_encoding
def test_no_character_ends_in_an_error(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = Printed(encoding, "strict", monkeypatch)
    print_in_any_encoding()
    every = "".join(chr(c) for c in range(0x20, 0x3000)) + "🧠\udce9\ud800"
    out.print(every)
    print_table("title", ["what"], [[every]])
    print(every)
    assert printed.text().count("{|}~") >= 2


def test_evaluate_and_compare_say_their_figures(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = ("fit-head", "--experts", "0", "--max-epochs", "2", "--min-epochs", "1", "--out", "r")
    ctfm(*fit, "--set", "min_positives=1", cwd=project)
    for encoding in ENCODINGS:
        with monkeypatch.context() as patch:
            printed = Printed(encoding, "strict", patch)
            assert run("evaluate", "r", cwd=project, monkeypatch=patch) == 0
            assert run("compare", "r", "r", cwd=project, monkeypatch=patch) == 0
            text = printed.text()
        dash = "–" if encoding in ("utf-8", "cp1252") else "-"
        assert re.search(rf"\d\.\d\d\d{dash}\d\.\d\d\d", text)
        assert ("≥ 0.90" if encoding in ("utf-8", "koi8-r") else ">= 0.90") in text


@every_encoding
def test_help_and_errors_are_printed(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = Printed(encoding, "strict", monkeypatch)
    assert run("--help", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert run("sweep", "--help", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert run("evaluate", "läufe/中", cwd=tmp_path, monkeypatch=monkeypatch) == 1
    assert run("phantom", "--scäns", "3", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "is not a run" in printed.text()


@pytest.mark.parametrize("errors", ["replace", "ignore", "xmlcharrefreplace"])
def test_what_the_user_chose_for_other_characters_is_done(
    errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Printed("ascii", errors, monkeypatch)
    print_in_any_encoding()
    assert stream.errors() == errors


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_process_of_a_cluster_job_ends_as_it_should(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    (tmp_path / "läufe").mkdir()
    (tmp_path / "läufe" / "no-scan.dcm").write_text("text")
    unset = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LANG", "LC_CTYPE")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ctfm"), "index", "läufe", "--workers", "1"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in unset} | variables,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert b"no scan is usable" in done.stderr
    assert (done.stdout + done.stderr).isascii()
