"""Finding files, and opening them by name, also inside archives that mean harm."""

import io
import os
import socket
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ctfm.extract.sources import (
    MAX_BYTES_AT_ANY_RATIO,
    Opener,
    find,
    format_of,
    split_member,
    stem_of,
)
from ctfm.store.errors import ConfigError, ScanError
from ctfm.store.reasons import Reason


def touch(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def encrypt(path: Path) -> None:
    """Set the flag bit that says a member is encrypted, in both of its headers."""
    content = bytearray(path.read_bytes())
    for mark, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + flags_at] |= 1
            at = content.find(mark, at + 4)
    path.write_bytes(content)


def test_files_are_found_at_any_depth_and_sorted(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"abcdefghij") / "IM0001"
    files = [touch(deep), touch(tmp_path / "z.nii.gz"), touch(tmp_path / "a" / "1.2.840.99")]
    found = find([tmp_path])
    assert [source.file for source in found.sources] == sorted(map(str, files))


def test_ordinary_files_are_counted_by_their_endings(tmp_path: Path) -> None:
    for name in ("a.txt", "b/c.TXT", "labels.parquet", "DICOMDIR", ".DS_Store", "__MACOSX/x.dcm"):
        touch(tmp_path / name)
    found = find([tmp_path])
    assert found.ignored == {".txt": 2, ".parquet": 1, "DICOMDIR": 1, "hidden": 2}
    assert not found.sources
    assert not found.broken


def test_a_path_given_twice_is_found_once(tmp_path: Path) -> None:
    file = touch(tmp_path / "in" / "scan.nii")
    found = find([tmp_path, tmp_path / "in", file])
    assert [source.file for source in found.sources] == [str(file)]


def test_linked_folders_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    touch(tmp_path / "archive" / "I10")
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "one").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "back").symlink_to(tmp_path / "cohort")
    found = find([tmp_path / "cohort"])
    assert [Path(source.file).name for source in found.sources] == ["I10"]


@pytest.mark.parametrize("target", ["nothing", "itself.dcm"])
def test_a_link_that_leads_nowhere_is_reported(tmp_path: Path, target: str) -> None:
    (tmp_path / "itself.dcm").symlink_to(tmp_path / target)
    touch(tmp_path / "slice")
    found = find([tmp_path])
    (broken,) = found.broken
    assert broken.reason is Reason.UNREADABLE
    assert len(found.sources) == 1


def test_a_folder_that_cannot_be_listed_is_reported_and_the_rest_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "locked" / "inside")
    touch(tmp_path / "slice")
    scandir = os.scandir

    def refuse(folder: str) -> Any:  # modes do not hold back the superuser
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find([tmp_path])
    assert [broken.detail for broken in found.broken] == ["a folder cannot be listed"]
    assert [source.file for source in found.sources] == [str(tmp_path / "slice")]


def test_pipes_and_sockets_are_counted_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.dcm")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        found = find([tmp_path])
    assert found.ignored == {"no regular file": 2}
    assert not found.sources


def test_a_name_may_hold_a_line_break(tmp_path: Path) -> None:
    file = touch(tmp_path / "a\nb" / "sli\nce")
    archive = zip_of(tmp_path / "c\n.zip", {"d\ne": b"one"})
    found = find([tmp_path])
    assert {source.file for source in found.sources} == {str(file), f"{archive}::d\ne"}
    with Opener() as opener:
        assert opener.open(f"{archive}::d\ne").read() == b"one"


def test_a_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    try:
        touch(tmp_path / os.fsdecode(b"caf\xe9") / "slice")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    (broken,) = find([tmp_path]).broken
    assert "UTF-8" in broken.detail
    assert broken.sources[0].file.encode()


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file or folder is at"):
        find([tmp_path / "nowhere"])


def test_members_of_an_archive_are_listed_and_read_in_place(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "ward.ZIP", {"a/1": b"one", "b.nii": b"two", "read.me.txt": b""})
    found = find([tmp_path])
    assert [source.file for source in found.sources] == [f"{archive}::a/1", f"{archive}::b.nii"]
    assert found.ignored == {".txt": 1}
    with Opener() as opener:
        assert opener.open(f"{archive}::a/1").read() == b"one"
        assert opener.open(f"{archive}::b.nii").read() == b"two"
        with pytest.raises(FileNotFoundError):
            opener.open(f"{archive}::c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ward.ZIP"]


@pytest.mark.parametrize("name", ["../../escaped", "a/../../../escaped", "..\\..\\escaped", ".."])
def test_a_member_whose_name_leads_out_of_its_archive_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    archive = zip_of(tmp_path / "in" / "evil.zip", {name: b"x", "slice": b"y"})
    found = find([tmp_path / "in"])
    assert [source.file for source in found.sources] == [f"{archive}::slice"]
    assert [broken.sources[0].file for broken in found.broken] == [f"{archive}::{name}"]
    assert not found.ignored
    with Opener() as opener, pytest.raises(ScanError, match="leads out of the archive"):
        opener.open(f"{archive}::{name}")


def test_members_under_names_of_another_system_are_read(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", {"/export/1": b"one", "a\\.b\\1": b"", "C:\\x\\2": b"two"})
    found = find([tmp_path])
    assert [source.file for source in found.sources] == [
        f"{archive}::/export/1",
        f"{archive}::C:\\x\\2",
    ]
    assert found.ignored == {"hidden": 1}
    with Opener() as opener:
        assert [opener.open(one.file).read() for one in found.sources] == [b"one", b"two"]


def test_encrypted_members_share_one_line(tmp_path: Path) -> None:
    encrypt(zip_of(tmp_path / "locked.zip", {"1": b"one", "2": b"two", "3.txt": b"three"}))
    (broken,) = find([tmp_path]).broken
    assert broken.reason is Reason.ENCRYPTED
    assert len(broken.sources) == 3
    with Opener() as opener, pytest.raises(ScanError, match="encrypted"):
        opener.open(broken.sources[0].file)


def test_a_member_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    zip_of(tmp_path / "bomb.zip", {"slice": bytes(MAX_BYTES_AT_ANY_RATIO + 1)})
    (broken,) = find([tmp_path]).broken
    assert "hostile" in broken.detail
    with Opener() as opener, pytest.raises(ScanError, match="hostile"):
        opener.open(broken.sources[0].file)


def test_other_archives_and_nested_ones_are_reported_and_not_opened(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("slice", b"x")
    zip_of(tmp_path / "outer.zip", {"inner.zip": inner.getvalue()})
    touch(tmp_path / "backup.tar.gz")
    broken = find([tmp_path]).broken
    assert {entry.reason for entry in broken} == {Reason.UNSUPPORTED_ENCODING}
    assert len(broken) == 2


def test_a_damaged_archive_is_reported(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "half.zip", {"1": b"one" * 1000})
    archive.write_bytes(archive.read_bytes()[:60])
    (broken,) = find([tmp_path]).broken
    assert broken.reason is Reason.UNREADABLE


def test_a_member_with_a_wrong_checksum_is_reported_when_it_is_read(tmp_path: Path) -> None:
    archive = tmp_path / "flipped.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as stored:
        stored.writestr("1", b"0123456789")
    archive.write_bytes(archive.read_bytes().replace(b"0123456789", b"0123456780"))
    with Opener() as opener, pytest.raises(ScanError, match="cannot be unpacked"):
        opener.open(f"{archive}::1")


def test_a_plain_path_that_looks_like_a_member_is_a_path(tmp_path: Path) -> None:
    path = touch(tmp_path / "old.zip::copy" / "slice")
    assert split_member(str(path)) == (str(path), None)
    with Opener() as opener, opener.open(str(path)) as stream:
        assert stream.read() == b"content"


@pytest.mark.parametrize(
    ("name", "form", "stem"),
    [
        ("/a/b.c/sub-01_ct.nii.gz", "nifti", "sub-01_ct"),
        ("x.NRRD", "nrrd", "x"),
        ("x.mhd", "metaimage", "x"),
        ("/a/CT.1.2.840.113619", "dicom", "CT.1.2.840.113619"),
        ("/a/1.dcm", "dicom", "1"),
        ("/a.zip::in/scan.nii", "nifti", "scan"),
        ("/a/b.tar.gz", "other", "b.tar.gz"),
    ],
)
def test_a_name_tells_format_and_stem(name: str, form: str, stem: str) -> None:
    assert format_of(name) == form
    assert stem_of(name) == stem
