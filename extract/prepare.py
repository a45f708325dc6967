"""Preparation: from the files of a scan, to its views on the grid of the head frame.

Reading, checking and aligning are done once a scan; each view is one interpolation. What comes out
is int16 HU: windows, resizing, normalisation and the noise of a view are the device's work.

Axes: s slabs, y rows, x columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int16

from ctfm.extract.align import HeadFrame, find_head_frame, find_scanner_frame
from ctfm.extract.augment import Jitter, draw_view
from ctfm.extract.config import ExtractConfig
from ctfm.extract.hu_check import check_hu
from ctfm.extract.reading import read_volume
from ctfm.extract.resample import reduce_volume, resample
from ctfm.extract.template import register_to_template
from ctfm.extract.volume import Volume
from ctfm.store.errors import ScanError
from ctfm.store.reasons import Reason


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedScan:
    """One view of a scan, ready for the device."""

    hu: Int16[np.ndarray, "s y x"]
    """-1000 outside the scan."""
    position_mm: Float32[np.ndarray, " s"]
    """z of the middle of each row in the head frame; the same in every view."""
    jitter: Jitter | None
    """Change of intensity that the device applies to the window channels; None in view 0."""
    world_from_head: Float64[np.ndarray, "4 4"]
    """Head frame to the RAS mm of the files."""
    quality: dict[str, float]
    """Of the alignment; see `ctfm.extract.align.find_head_frame`."""


def prepare(
    files: Sequence[str],
    config: ExtractConfig,
    *,
    scan_id: str,
    template: Volume | None = None,
    digest: str | None = None,
) -> list[PreparedScan]:
    """Read, check, align and resample a scan.

    Args:
        files: As the catalogue lists them.
        config: Alignment, grid and number of views.
        scan_id: Decides, with `config.seed`, the augmentation.
        template: The volume that `config.template` is the digest of.
        digest: Of the files, as the catalogue has it.

    Returns:
        The views, clean one first.

    Raises:
        ScanError: Whatever is wrong with the scan.
    """
    volume = read_volume(files, digest=digest)
    check_hu(volume)
    return prepare_volume(volume, config, scan_id=scan_id, template=template)


def prepare_volume(
    volume: Volume,
    config: ExtractConfig,
    *,
    scan_id: str,
    template: Volume | None = None,
) -> list[PreparedScan]:
    """As `prepare`, of a volume that is in memory and known to be in HU."""
    frame = _frame(volume, config, template)
    volume = reduce_volume(volume, in_plane_mm=config.in_plane_mm, slice_mm=config.slice_mm)
    scans = []
    for number in range(config.views):
        view = draw_view(config.seed, scan_id, number)
        hu, position_mm = resample(
            volume,
            frame.world_from_head,
            size_px=config.size_px,
            in_plane_mm=config.in_plane_mm,
            slice_mm=config.slice_mm,
            max_slices=config.max_slices,
            warp=view.warp,
        )
        if len(hu) == 0:
            raise ScanError(Reason.EMPTY, "no slice of the head grid lies inside the scan")
        scans.append(
            PreparedScan(
                hu=hu,
                position_mm=position_mm,
                jitter=view.jitter,
                world_from_head=frame.world_from_head,
                quality=frame.quality,
            )
        )
    return scans


def _frame(volume: Volume, config: ExtractConfig, template: Volume | None) -> HeadFrame:
    if config.align == "none":
        return find_scanner_frame(volume)
    if template is not None:
        return register_to_template(volume, template)
    return find_head_frame(volume)
