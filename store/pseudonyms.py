"""Pseudonyms: from the ids of a hospital or a file system, to ids that may be shared.

An id is the first 16 hexadecimal digits of HMAC-SHA256(key, kind + NUL + original) (RFC 2104)
behind a letter for its kind. The same original gives the same pseudonym wherever the same key is
used, so a label table is joined by making pseudonyms of its ids. Without the key nobody can test
a guess; with it anybody can, so the key stays in `scans.private.parquet`.

What counts as the original, with white space around it removed:

    id            DICOM                                       NIfTI, NRRD, MetaImage
    patient_id    PatientID (0010,0020), or the study's       PatientID of its study in DICOM, of
                  original where that is empty                a sidecar of it or its subject; else
                                                              `sub-XXX` of the file's name, or of
                                                              the nearest folder; else as study_id
    study_id      StudyInstanceUID (0020,000D), or the        StudyInstanceUID of its sidecar; else
                  series' original where that is empty        as scan_id
    scan_id       SeriesInstanceUID (0020,000E), or the       the file's name without extension;
                  folder where that is empty                  where several files share it, with
                                                              its folders, then also its extension

Files of one study or patient (`ctfm.extract.file_groups`) have the ids of the first of them: that
of the shortest name. A subject that two data sets have follows the name of its data set and `/`.
Folders count from inside the path that was given to `ctfm index`, separated by `/`; where that is
not enough, and for a series without an id, its own name comes first, then those of the folders
above it. What then still is the same is numbered `#2`, `#3` …, as are further scans in one series.
Where a catalogue is replaced, a file keeps the name that it had in it.
"""

import hmac
import secrets


class Pseudonyms:
    """Makes ids; with no key it gives back the originals (`--keep-ids`)."""

    def __init__(self, key: bytes | None) -> None:
        self._key = key

    def patient(self, original: str) -> str:
        """`p` and 16 hexadecimal digits."""
        return self._make("p", "patient", original)

    def study(self, original: str) -> str:
        """`s` and 16 hexadecimal digits."""
        return self._make("s", "study", original)

    def scan(self, original: str) -> str:
        """`c` and 16 hexadecimal digits."""
        return self._make("c", "scan", original)

    def files(self, digest: str) -> str:
        """`f` and 16 hexadecimal digits: whether the files of a scan are those of before.

        Args:
            digest: `Catalogue.digests` of the scan, which is made of original ids; "" if unknown.
        """
        return self._make("f", "files", digest) if digest else ""

    @property
    def fingerprint(self) -> str:
        """What tells whether two sets of ids were made alike; it does not tell the key."""
        return "original ids" if self._key is None else self._make("k", "key", "")

    def _make(self, letter: str, kind: str, original: str) -> str:
        original = original.strip()
        if self._key is None:
            return original
        message = f"{kind}\0{original}".encode()
        return letter + hmac.new(self._key, message, "sha256").hexdigest()[:16]


def new_key() -> bytes:
    """32 bytes that nobody can guess."""
    return secrets.token_bytes(32)
