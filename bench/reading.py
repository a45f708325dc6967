"""Claim: a scan is read, aligned and resampled in about the time others need to read it.

A phantom series of 40 slices of 512 × 512 pixels (DICOM, uncompressed), and a phantom of 300 such
slices as `.nii.gz`, rows to the front as dcm2niix writes it. Each step is timed in milliseconds of
one core: reading with the check of HU, alignment, resampling to the paper's grid, and the whole.

The yardstick, in the same run, is what a script would do to have the voxels in HU alone: pydicom's
`pixel_array` of every file, rescaled and stacked in the order of positions; nibabel's `get_fdata`.
Their voxels are compared first.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from jaxtyping import Num
from measure import Seconds, main_with_out, median_seconds
from threadpoolctl import threadpool_limits

from ctfm.extract.align import find_head_frame
from ctfm.extract.config import ExtractConfig
from ctfm.extract.hu_check import check_hu
from ctfm.extract.phantom_cohort import make_scan, write_series
from ctfm.extract.prepare import prepare
from ctfm.extract.reading import read_volume
from ctfm.extract.resample import reduce_volume, resample
from ctfm.extract.volume import Volume

SLICES, THIN_SLICES, REPEATS = 40, 300, 7
PATIENTS = {"SIEMENS": 1, "GE": 3, "Canon": 2}
CONFIG = ExtractConfig(backbone="")


def write_nifti(volume: Volume, path: Path) -> None:
    """Write a volume with its rows reversed, so that they run to the front."""
    affine = np.eye(4)
    affine[:3, 0] = volume.column_step_mm
    affine[:3, 1] = -volume.row_step_mm
    ends = volume.slice_origin_mm[[0, -1]]
    affine[:3, 2] = (ends[1] - ends[0]) / (len(volume.hu) - 1)
    affine[:3, 3] = ends[0] + volume.row_step_mm * (volume.hu.shape[1] - 1)
    image = nib.Nifti1Image(volume.hu[:, ::-1].T, None)
    image.set_sform(affine, code=1)
    nib.save(image, path)


def with_pydicom(files: list[str]) -> Num[np.ndarray, "z y x"]:
    """Every file with pydicom, in the order of positions."""
    slices = sorted(
        (pydicom.dcmread(file) for file in files),
        key=lambda one: float(one.ImagePositionPatient[2]),
    )
    return np.stack([one.pixel_array * one.RescaleSlope + one.RescaleIntercept for one in slices])


def with_nibabel(files: list[str]) -> Num[np.ndarray, "z y x"]:
    """The file with nibabel, turned as `Volume` is."""
    (file,) = files
    voxels: Num[np.ndarray, "x y z"] = nib.load(file).get_fdata()
    return voxels.T[:, ::-1]


def steps_of(files: list[str]) -> dict[str, Callable[[], object]]:
    """The steps of `prepare`, each on what the one before it gives, and all of them."""
    volume = read_volume(files)
    frame = find_head_frame(volume)

    def read() -> None:
        check_hu(read_volume(files))

    def to_grid() -> None:
        resample(
            reduce_volume(volume, in_plane_mm=CONFIG.in_plane_mm, slice_mm=CONFIG.slice_mm),
            frame.world_from_head,
            size_px=CONFIG.size_px,
            in_plane_mm=CONFIG.in_plane_mm,
            slice_mm=CONFIG.slice_mm,
            max_slices=CONFIG.max_slices,
        )

    return {
        "read": read,
        "align": lambda: find_head_frame(volume),
        "resample": to_grid,
        "whole": lambda: prepare(files, CONFIG, scan_id=""),
    }


def core_ms(seconds: Mapping[str, Seconds]) -> dict[str, float]:
    """Medians in milliseconds."""
    return {name: 1000 * times.median for name, times in seconds.items()}


def measure_scan(
    files: list[str], plain: Callable[[list[str]], Num[np.ndarray, "z y x"]]
) -> dict[str, Seconds]:
    """Seconds of one core of every step, and of the yardstick."""
    ours = read_volume(files).hu
    inside = ours > -1024  # padding is drawn as air by one and not by the other
    np.testing.assert_array_equal(ours[inside], plain(files)[inside])
    steps = steps_of(files)
    return median_seconds(
        {**steps, "plain": lambda: plain(files)}, repeats=REPEATS, clock=time.process_time
    )


def measure() -> dict[str, object]:
    """Milliseconds of every step of every scan, and the whole against the yardstick."""
    seconds = {}
    with tempfile.TemporaryDirectory() as name, threadpool_limits(1):
        folder = Path(name)
        for vendor, patient in PATIENTS.items():
            write_series(make_scan(0, patient, slices=SLICES), folder / vendor)
            files = sorted(map(str, (folder / vendor).iterdir()))
            seconds[vendor] = measure_scan(files, with_pydicom)
        thin = folder / "thin.nii.gz"
        write_nifti(make_scan(0, 1, slices=THIN_SLICES).volume, thin)
        seconds["thin"] = measure_scan([str(thin)], with_nibabel)
    ms = {scan: core_ms(times) for scan, times in seconds.items()}
    ratios = {scan: steps["whole"] / steps["plain"] for scan, steps in ms.items()}
    worst = max(PATIENTS, key=lambda vendor: ms[vendor]["whole"])
    return {
        "claim": f"whole preparation against plain reading ({ms[worst]['whole']:.0f} ms of one "
        f"core for {SLICES} slices of DICOM, {ms['thin']['whole']:.0f} ms for {THIN_SLICES} of "
        "NIfTI)",
        "slices": {"dicom": SLICES, "nifti": THIN_SLICES},
        "core_ms": ms,
        "ratio": ratios[worst],
        "ratios": ratios,
        "raw": seconds,
    }


if __name__ == "__main__":
    main_with_out(measure)
