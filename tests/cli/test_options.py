"""Options that commands share."""

import os
import sys
from pathlib import Path

import pytest

from ctfm.cli.options import typed_command


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("/home/erika/Müller 1951/labels.csv", "…/labels.csv"),
        ("--labels=../Müller/labels.csv", "--labels=…/labels.csv"),
        ("--labels=runs/../../Müller/labels.csv", "--labels=…/labels.csv"),
        ("s3://bucket/Müller/features/", "…/features"),
        ("~/Müller/labels.csv", "…/labels.csv"),
        ("60/20/20", "60/20/20"),
        ("--split=stratified:60/20/20", "--split=stratified:60/20/20"),
        ("--task=0/8", "--task=0/8"),
        ("62.5/17.5/20", "62.5/17.5/20"),
        ("experts=0,1,6", "experts=0,1,6"),
        ("--overwrite", "--overwrite"),
        ("../12345678/990101", "…/990101"),
        ("base=/data/Müller/x.toml", "base=…/x.toml"),
        ("/data/a=b/Müller.csv", "…/Müller.csv"),
        ("--labels=/data/a=b/Müller/x=y.csv", "--labels=…/x=y.csv"),
        ("lr_head=1e-3", "lr_head=1e-3"),
        ("labels.csv", "labels.csv"),
        ("tables/labels.csv", "tables/labels.csv"),
        ("./tables/labels.csv", "./tables/labels.csv"),
        ("--out=runs/mine", "--out=runs/mine"),
        ("HERE/tables/labels.csv", "tables/labels.csv"),
        ("--out=HERE/runs/mine/", "--out=runs/mine"),
        ("HERE-too/tables/labels.csv", "…/labels.csv"),
        ("LINK/runs/mine", "runs/mine"),
    ],
)
def test_the_record_of_what_was_typed_names_no_folder_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, kept: str
) -> None:
    project, link = tmp_path / "project", tmp_path / "link"
    project.mkdir()
    link.symlink_to(project)
    monkeypatch.chdir(project)
    monkeypatch.setenv("PWD", str(link))
    word = typed.replace("HERE", os.getcwd()).replace("LINK", str(link))
    monkeypatch.setattr(sys, "argv", ["/opt/Müller/bin/ctfm", "fit-head", word])
    assert typed_command() == ["ctfm", "fit-head", kept]


def test_a_folder_that_the_shell_is_not_in_is_none_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PWD", "/home/Müller")
    monkeypatch.setattr(sys, "argv", ["ctfm", "fit-head", "/home/Müller/labels.csv"])
    assert typed_command() == ["ctfm", "fit-head", "…/labels.csv"]
