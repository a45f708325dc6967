#!/usr/bin/env bash
# dcm2niix 1.0.20260724: `-l y`, "losslessly scale", multiplies the stored integers.
#
# Input: a head as unsigned pixels with intercept -1024, which dcm2niix keeps as uint16 by default.
# Guess: `-l y` stores plain HU as int16.
# Seen:  the stored integers are HU plus 1024, times 35 so as to fill 16 bits; scl_slope is 1/35.
#        With `-l n` (and the default `-l o`) they are HU plus 1024, slope 1. A reader that takes
#        integers as they lie in the file, or knows an intercept only, is off by a factor.
# Why:   the factor differs from head to head, with the densest voxel: the option that sounds
#        safest makes the integers of a cohort incomparable.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet dcm2niix==1.0.20260724 pydicom==3.0.2 nibabel==5.4.2 numpy==2.4.6
venv/bin/python - <<'PY'
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_ct(folder, hu, places, tags=lambda i: {}, tilt=0.0, name="s"):
    """Slices (z, y, x) in HU, at their positions in mm, to one CT series of single files."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    for i, (plane, place) in enumerate(zip(hu, places, strict=True)):
        d = Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, generate_uid()
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = study, series, frame
        d.Modality, d.Manufacturer, d.SeriesDescription = "CT", "ACME", "HEAD"
        d.ImageType, d.PatientPosition, d.KVP = ["ORIGINAL", "PRIMARY", "AXIAL"], "HFS", "120"
        d.StudyID, d.SeriesNumber, d.AcquisitionNumber, d.InstanceNumber = "1", 2, 1, i + 1
        d.PatientID, d.PatientName = "P1", "Head^One"
        d.PatientBirthDate = d.PatientSex = d.AccessionNumber = d.ReferringPhysicianName = ""
        d.StudyDate = d.SeriesDate = d.AcquisitionDate = d.ContentDate = "20200102"
        d.StudyTime = d.SeriesTime = d.AcquisitionTime = d.ContentTime = "101112"
        d.SliceThickness, d.GantryDetectorTilt, d.PositionReferenceIndicator = "4", str(tilt), ""
        d.ImageOrientationPatient = ["1", "0", "0", "0", f"{cos:.10f}", f"{-sin:.10f}"]
        d.ImagePositionPatient = [f"{v:.6f}" for v in place]
        d.PixelSpacing, (d.Rows, d.Columns) = [1, 1], plane.shape
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.RescaleIntercept, d.RescaleSlope, d.RescaleType = "0", "1", "HU"
        d.PixelData = plane.astype("<i2").tobytes()
        for keyword, value in tags(i).items():
            setattr(d, keyword, value)
        d.save_as(folder / f"{name}{i:02d}.dcm", enforce_file_format=True)


def convert(folder, *options):
    """Every NIfTI file that dcm2niix writes for a folder, by name."""
    out = folder.with_name(folder.name + "_out")
    out.mkdir()
    command = ["venv/bin/dcm2niix", *options, "-z", "n", "-b", "n", "-f", "ct", "-o", out, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {p.name: nib.load(p) for p in sorted(out.glob("*.nii"))}, done.stdout


hu = np.full((12, 32, 32), -1000)
hu[2:10, 6:26, 6:26], hu[5, 10:14, 10:14] = 32, 790
for option in ("n", "y", "o"):
    folder = Path(option)
    write_ct(
        folder,
        hu,
        [(-16, -16, 4 * i) for i in range(12)],
        tags=lambda i: {
            "PixelRepresentation": 0,
            "RescaleIntercept": "-1024",
            "PixelData": (hu[i] + 1024).astype("<u2").tobytes(),
        },
    )
    images, _ = convert(folder, "-l", option)
    image = images["ct.nii"]
    stored = image.dataobj.get_unscaled()
    slope, inter = image.dataobj.slope, image.dataobj.inter
    print(
        f"-l {option}: {stored.dtype}, brain stored as {stored[16, 16, 6]}, slope {slope:.4f}, intercept {inter:.0f}"
    )
    assert round(float(np.asarray(image.dataobj)[16, 16, 6])) == 32
    assert round(stored[16, 16, 6] / 1056) == {"n": 1, "y": 35, "o": 1}[option] and inter == -1024
PY
