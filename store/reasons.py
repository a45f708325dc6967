"""Reason codes: why a scan is not used, in the catalogue and in every feature store.

A code is stable: tables on disk hold it, scripts filter by it. Add codes, never rename one.
"""

from enum import StrEnum


class Reason(StrEnum):
    """Why a scan is, or is not, turned into embeddings. Each value is what tables hold."""

    OK = "ok"

    # Found by `ctfm index`, from headers alone.
    UNREADABLE = "unreadable"
    """The file cannot be parsed, or is truncated."""
    ENCRYPTED = "encrypted"
    """The archive is encrypted."""
    NOT_AN_IMAGE = "not_an_image"
    """A DICOM object without pixels: report, structure set, directory."""
    NOT_CT = "not_ct"
    """Another modality, or a secondary capture (dose screen, summary)."""
    COLOUR = "colour"
    """More than one sample a pixel."""
    LOCALIZER = "localizer"
    """A scout or localizer image."""
    NOT_AXIAL = "not_axial"
    """A coronal, sagittal or strongly oblique reconstruction."""
    DERIVED = "derived"
    """A derived map (MIP, perfusion, dual-energy map) whose values are not HU."""
    CONTRAST = "contrast"
    """A contrast-enhanced or angiographic series."""
    TOO_FEW_SLICES = "too_few_slices"
    """Fewer slices, or less coverage, than a head volume needs."""
    MISSING_SLICES = "missing_slices"
    """A gap in the stack that is a whole slice or more."""
    DUPLICATE_POSITIONS = "duplicate_positions"
    """Several different images at one position."""
    BAD_GEOMETRY = "bad_geometry"
    """Position, orientation or spacing is missing, inconsistent or impossible."""
    CONFLICTING_IDS = "conflicting_ids"
    """Images of one series carry different patient or study ids."""
    BAD_RESCALE = "bad_rescale"
    """The rescale slope is zero, NaN or missing its intercept."""
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    """A transfer syntax or file variant that no maintained decoder reads."""
    OTHER_SERIES_CHOSEN = "other_series_chosen"
    """A usable reconstruction, but another one of the same study was chosen."""
    DUPLICATE_SCAN = "duplicate_scan"
    """The same series was found twice."""

    # Found by `ctfm extract`, from voxels.
    VANISHED = "vanished"
    """A source file that the catalogue lists is gone or unreachable."""
    CHANGED = "changed"
    """Another image lies where the one that was indexed lay."""
    NOT_FINITE = "not_finite"
    """NaN or infinite voxels."""
    NOT_HU = "not_hu"
    """Values that are no HU of a head: rescaled twice or never, clipped, labels, another unit."""
    NOT_A_HEAD = "not_a_head"
    """No head-sized object in the volume."""
    EMPTY = "empty"
    """No slice of the head grid lies inside the scan."""
    NOT_FINITE_EMBEDDING = "not_finite_embedding"
    """The backbone returned NaN or infinite numbers."""
    READER_CRASHED = "reader_crashed"
    """The process that read the scan died, or took more time or memory than it may."""
