"""Options that commands share."""

import sys

import pytest

from ctfm.cli.options import typed_command


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("/home/erika/Müller 1951/labels.csv", "labels.csv"),
        ("--labels=../Müller/labels.csv", "--labels=labels.csv"),
        ("s3://bucket/Müller/features/", "features"),
        ("60/20/20", "60/20/20"),
        ("--split=stratified:60/20/20", "--split=stratified:60/20/20"),
        ("--task=0/8", "--task=0/8"),
        ("62.5/17.5/20", "62.5/17.5/20"),
        ("experts=0,1,6", "experts=0,1,6"),
        ("--overwrite", "--overwrite"),
        ("../12345678/990101", "990101"),
        ("base=/data/Müller/x.toml", "base=x.toml"),
        ("/data/a=b/Müller.csv", "a=Müller.csv"),
        ("lr_head=1e-3", "lr_head=1e-3"),
    ],
)
def test_the_record_of_what_was_typed_names_no_folder(
    monkeypatch: pytest.MonkeyPatch, typed: str, kept: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/Müller/bin/ctfm", "fit-head", typed])
    assert typed_command() == ["ctfm", "fit-head", kept]
