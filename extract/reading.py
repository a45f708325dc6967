"""Reading: from the files of a scan, whatever their format, to its volume."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

from ctfm.extract.dicom_pixels import read_dicom
from ctfm.extract.formats import image_digest, read_image
from ctfm.extract.hu_check import check_hu
from ctfm.extract.identity import check_unchanged
from ctfm.extract.sources import Opener, format_of
from ctfm.extract.volume import Volume
from ctfm.store.errors import ConfigError, ScanError
from ctfm.store.provenance import file_sha256
from ctfm.store.reasons import Reason


def read_volume(files: Sequence[str], *, digest: str | None = None) -> Volume:
    """Read the scan that some files hold, whatever their format.

    Args:
        files: As the catalogue lists them: absolute paths, or `archive.zip::member`. DICOM in any
            order; of another format one file.
        digest: Of these files, as the catalogue has it; None takes whatever lies there.

    Raises:
        ScanError: If a file is gone, damaged or another than it was, or if they hold no volume.
    """
    if not files:
        raise ScanError(Reason.VANISHED, "the catalogue lists no file for it")
    is_dicom = format_of(files[0]) == "dicom"
    if len(files) > 1 and not is_dicom:
        detail = f"{len(files)} files of a format that keeps a scan in one"
        raise ScanError(Reason.UNSUPPORTED_ENCODING, detail)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the libraries mend in a header
            if is_dicom:
                return read_dicom(files, digest=digest)
            if digest is not None:
                with Opener() as opener:
                    check_unchanged(image_digest(opener, files[0]), digest)
            return read_image(files[0])
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        detail = f"a source file is gone or may not be read ({type(error).__name__})"
        raise ScanError(Reason.VANISHED, detail) from error
    except (OSError, BadZipFile, EOFError) as error:
        detail = f"a source file cannot be read to its end ({type(error).__name__})"
        raise ScanError(Reason.UNREADABLE, detail) from error


def read_template(path: Path) -> tuple[Volume, str]:
    """Read the volume that scans are to be registered to.

    Args:
        path: A NIfTI, NRRD or MetaImage file.

    Returns:
        The volume, and the SHA-256 of the file: `ExtractConfig.template`.

    Raises:
        ConfigError: If it cannot be read, or is not in HU.
    """
    if format_of(str(path)) not in ("nifti", "nrrd", "metaimage"):
        raise ConfigError(f"a template is a NIfTI, NRRD or MetaImage file, got {path}")
    try:
        volume = read_volume([str(path.absolute())])
        check_hu(volume)
    except ScanError as error:
        raise ConfigError(f"{path} cannot be used as a template: {error.detail}") from error
    return volume, file_sha256(path)
