"""A folder that is named like a module is not imported by any process that ctfm starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctfm.extract.phantom_cohort import write_cohort

NAMES = ("dl", "pickle", "openjpeg", "isal", "struct", "ctfm", "distributed")
"""Modules that a reader, a pool or a worker would import; `dl` is a place where pydicom looks."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_cohort(folder / "cohort", scans=4, seed=0, matrix=64, slices=36)
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
        )
    return folder


def plain_environment() -> dict[str, str]:
    """Without what a test before this one, in this process, may have set."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}


@pytest.mark.parametrize(
    "command",
    [
        ("index", "cohort", "--workers", "2"),
        ("extract", "--model", "intensity", "--workers", "2", "--out", "a"),
        pytest.param(
            ("extract", "--model", "intensity", "--cluster", "local", "--jobs", "1", "--out", "b"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_of_the_current_folder_is_imported(project: Path, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ctfm"), *command],
        cwd=project,
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (project / "ran").exists()


def test_the_planted_folders_would_be_imported_by_a_plain_child(project: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", "import dl"], cwd=project, env=plain_environment(), check=True
    )
    assert (project / "ran").exists()
