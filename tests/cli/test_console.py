"""What is printed is what was said: no name of a file is taken for markup, and none is cut."""

import pytest
from rich.text import Text

from ctfm.cli import app
from ctfm.cli.console import err, out, print_table, progress_bar, waiting
from ctfm.store.errors import ConfigError

NAMES = ["/data/[batch2]/ct", "a path with [/old] in it", "pip install 'ctfm[slurm]'", "/:brain:/x"]
LONG = "/scratch/" + "a-long-name-of-a-folder/" * 8


@pytest.mark.parametrize("name", [*NAMES, LONG])
def test_a_line_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out.print(f"report: {name}")
    err.print(f"done: {name}")
    assert capsys.readouterr() == (f"report: {name}\n", f"done: {name}\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(name, ["what", f"of {name}"], [["path", name]])
    title, header, row = capsys.readouterr().out.splitlines()
    assert (title.rstrip(), header.split(maxsplit=1)[1]) == (name, f"of {name}")
    assert row.split(maxsplit=1)[1].rstrip() == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[31mbleed", r"\x1b[31mbleed"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb", r"a\rb"),
        ("\x9b2J", r"\x9b2J"),
        ("a\u202eb", r"a\u202eb"),
    ],
)
def test_a_name_says_nothing_to_the_terminal(
    name: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out.print(name)
    err.print(Text.assemble(("error:", "bold red"), f" {name}"))
    print_table(name, ["what", name], [["finding", name]])
    printed = capsys.readouterr()
    assert printed.out.count(shown) == 4
    assert not set(printed.out + printed.err) & set("\x1b\x07\r\x9b\u202e")


@pytest.mark.parametrize("name", NAMES)
def test_a_bar_and_a_status_are_printed_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(err, "_force_terminal", True)
    monkeypatch.setattr(err, "_width", 200)
    with progress_bar(f"fit {name}", "epochs") as bar:
        bar.start(1)
        bar.advance(failed=True, note=f"note: {name}")
    with waiting(f"trying {name}") as drawn:
        assert drawn is not None
        err.print(drawn.renderable)
    printed = capsys.readouterr().err
    assert all(said in printed for said in (f"fit {name}", f"note: {name}", "1 failed"))
    assert f"trying {name}" in printed


@pytest.mark.parametrize("name", [*NAMES, LONG])
def test_an_error_is_printed_as_it_is(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ConfigError(name)

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit):
        app.main()
    assert capsys.readouterr().err == f"error: {name}\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(13, "Permission denied", "ro/sub"),
            "cannot use ro/sub: Permission denied",
        ),
        (OSError("no route to host"), "no route to host"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_without_a_traceback(
    error: OSError,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {said}\n"
